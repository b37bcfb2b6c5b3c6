//! Files written by earlier versions. Their data stays usable, and a process that still runs the
//! old version fails safely.

mod outbox;

use std::{
    fs,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use essentially_once::{
    Consumer, ConsumerId, Handler, HandlerError, KeyValue as _, Log as _, NewRecord, Offset, OffsetStore as _, Origin,
    Record, async_trait,
    backend::{Advance, DeadLetters as _, Journal, LogId, Note, Numbering, Revision, Transaction as _},
    consumer::{DeadLetterOptions, Operator, OperatorAction, dead_letters},
};
use essentially_once_sqlite::{Sqlite, SqliteTx};
use rusqlite::Connection;
use tempfile::TempDir;

/// A copy of a file that schema version 1 wrote. `fixtures/README.md` lists its content.
fn schema_1() -> (TempDir, PathBuf) {
    copy_of("schema-1.db")
}

/// A copy of a file that schema version 2 wrote.
fn schema_2() -> (TempDir, PathBuf) {
    copy_of("schema-2.db")
}

fn copy_of(fixture: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("shop.db");
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    fs::copy(fixtures.join(fixture), &path).expect("copy");
    (folder, path)
}

fn consumer(name: &str) -> ConsumerId {
    ConsumerId::new(name).expect("name")
}

struct Count;

#[async_trait]
impl Handler<SqliteTx> for Count {
    async fn handle(&mut self, _: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        tx.execute("CREATE TABLE IF NOT EXISTS handled (n INTEGER)", [])?;
        tx.execute("INSERT INTO handled VALUES (1)", [])?;
        Ok(())
    }
}

#[tokio::test]
async fn positions_of_schema_1_are_kept() {
    let (_folder, path) = schema_1();
    let sqlite = Sqlite::open(&path).await.expect("open");
    let store = sqlite.store();
    for (name, next, revision, windows) in [
        ("shipping", Offset::from(250), 5, 2),
        ("billing", 90.into(), 1, 0),
        ("audit", Offset::new(7, 9), 1, 0),
    ] {
        let position = store
            .position(&consumer(name))
            .await
            .expect("position")
            .expect("a position");
        assert_eq!(
            (position.next, position.revision),
            (next, Revision::new(0, revision)),
            "{name}"
        );
        assert_eq!((position.owner, position.note), (None, Note::default()), "{name}");
        assert_eq!(position.windows.len(), windows, "{name}");
    }
    let audit = store
        .position(&consumer("audit"))
        .await
        .expect("position")
        .expect("some");
    assert_eq!(audit.log, LogId::new("elsewhere").expect("name"));
}

#[tokio::test]
async fn a_consumer_of_schema_1_goes_on_where_it_was_and_knows_its_duplicates() {
    let (_folder, path) = schema_1();
    let sqlite = Sqlite::open(&path).await.expect("open");
    let orders = sqlite.log("orders").await.expect("log");
    // Seen before the upgrade, and sent again after it.
    let web: Numbering = "web".parse().expect("numbering");
    let again = Origin::new(web.producer().clone(), web.epoch(), 125);
    orders
        .append(&[NewRecord::new("again").origin(again)])
        .await
        .expect("append");
    let report = Consumer::essentially_once(consumer("shipping"), orders, sqlite.store(), Count)
        .run_until_caught_up()
        .await
        .expect("run");
    assert_eq!((report.handled, report.duplicates), (50, 1), "{report}");
    let position = sqlite
        .store()
        .position(&consumer("shipping"))
        .await
        .expect("position")
        .expect("some");
    assert!(position.revision.epoch() > 0, "the first new session opens an epoch");
}

/// Runs the statements of the old version's commits.
#[tokio::test]
async fn a_process_of_schema_1_that_still_runs_fails_at_its_next_commit() {
    let (_folder, path) = schema_1();
    let old = Connection::open(&path).expect("open");
    let commits = [
        "UPDATE main.essentially_once_positions SET revision = revision + 1 WHERE consumer = 'shipping'",
        "INSERT INTO main.essentially_once_positions (consumer, log, incarnation, next_hi, next_lo, revision)
             VALUES ('new', 'orders', NULL, 0, 0, 1) ON CONFLICT (consumer) DO NOTHING",
    ];
    let mut prepared = commits.map(|commit| old.prepare(commit).expect("schema 1"));
    drop(Sqlite::open(&path).await.expect("open"));
    for commit in &mut prepared {
        let error = commit.execute([]).expect_err("refused").to_string();
        assert!(error.contains("upgrade this program"), "{error}");
    }
}

/// A user's foreign key may refer to any table of this crate. With ON DELETE CASCADE, dropping the
/// table would delete the user's rows.
#[tokio::test]
async fn views_and_foreign_keys_of_the_user_outlive_the_migration() {
    let (_folder, path) = schema_1();
    let user = Connection::open(&path).expect("open");
    user.execute_batch(
        "CREATE TABLE notes (
             consumer TEXT REFERENCES essentially_once_positions (consumer) ON DELETE CASCADE, note TEXT);
         INSERT INTO notes VALUES ('shipping', 'mine');
         CREATE VIEW standing AS SELECT consumer, next_lo FROM essentially_once_positions",
    )
    .expect("the user's own schema");
    drop(Sqlite::open(&path).await.expect("open"));
    let count = |sql: &str| user.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("count");
    assert_eq!(count("SELECT count(*) FROM notes"), 1);
    assert_eq!(count("SELECT count(*) FROM standing"), 3);
    user.execute_batch("ALTER TABLE notes RENAME TO remarks")
        .expect("all references resolve");
}

#[tokio::test]
async fn records_state_and_the_users_tables_of_schema_1_are_as_they_were() {
    let (_folder, path) = schema_1();
    let sqlite = Sqlite::open(&path).await.expect("open");
    let orders = sqlite.log("orders").await.expect("log");
    let records = orders
        .read(Offset::ZERO)
        .await
        .expect("read")
        .next(300)
        .await
        .expect("next");
    assert_eq!(records.len(), 300);
    for (n, record) in records.iter().enumerate() {
        assert_eq!(record.payload, format!("order {n}"));
        assert_eq!(record.key.is_some(), n % 3 != 2, "{n}");
        let origin = record.origin.as_ref().map(|origin| origin.to_string());
        let expected = match n % 4 {
            0 | 1 => Some(format!("web:{}", n / 4 * 2 + n % 4)),
            2 => Some(format!("till:{}", 1_000 + n / 4 * 3)),
            _ => None,
        };
        assert_eq!(origin, expected, "{n}");
        assert_eq!(record.malformed, None, "{n}");
    }
    let payments = sqlite
        .log("payments")
        .await
        .expect("log")
        .bounds()
        .await
        .expect("bounds");
    assert_eq!((payments.earliest, payments.end), (70.into(), 120.into()));
    let mut tx = sqlite.store().begin(&consumer("shipping")).await.expect("begin");
    let state = tx.get(b"count").await.expect("get");
    assert_eq!(state.as_deref(), Some(&250u64.to_be_bytes()[..]));
    let users = |tx: &mut SqliteTx, sql: &str| tx.query_one(sql, [], |row| row.get::<_, i64>(0)).expect("query");
    assert_eq!(users(&mut tx, "SELECT count(*) FROM freight"), Some(5));
    assert_eq!(users(&mut tx, "SELECT count(*) FROM customers"), Some(2));
    assert_eq!(users(&mut tx, "PRAGMA user_version"), Some(42));
}

#[tokio::test]
async fn positions_of_schema_2_are_kept_and_can_beat() {
    let (_folder, path) = schema_2();
    let sqlite = Sqlite::open(&path).await.expect("open");
    let store = sqlite.store();
    let shipping = store
        .position(&consumer("shipping"))
        .await
        .expect("position")
        .expect("a position");
    assert_eq!((shipping.next, shipping.revision), (250.into(), Revision::new(1, 6)));
    assert_eq!(shipping.note.passed_offset(), Some(249.into()));
    assert_eq!(shipping.windows.len(), 3);
    let owner = shipping.owner.expect("committed by a run");
    let before = store.pulse(&consumer("shipping")).await.expect("pulse");
    assert_eq!((before.owner, before.beats), (Some(owner), 0));
    store.beat(&consumer("shipping"), owner).await.expect("beat");
    assert_eq!(store.pulse(&consumer("shipping")).await.expect("pulse").beats, 1);
    let billing = store
        .position(&consumer("billing"))
        .await
        .expect("position")
        .expect("a position");
    assert_eq!((billing.next, billing.revision), (90.into(), Revision::new(1, 1)));
    assert_eq!((billing.owner, billing.note), (None, Note::default()));
}

#[tokio::test]
async fn a_consumer_of_schema_2_goes_on_where_it_was_and_knows_its_duplicates() {
    let (_folder, path) = schema_2();
    let sqlite = Sqlite::open(&path).await.expect("open");
    let orders = sqlite.log("orders").await.expect("log");
    let web: Numbering = "web#17".parse().expect("numbering");
    let again = Origin::new(web.producer().clone(), web.epoch(), 62);
    orders
        .append(&[NewRecord::new("again").origin(again)])
        .await
        .expect("append");
    let report = Consumer::essentially_once(consumer("shipping"), orders, sqlite.store(), Count)
        // The former owner can no longer show life.
        .standby_after(Duration::from_millis(50))
        .run_until_caught_up()
        .await
        .expect("run");
    assert_eq!((report.handled, report.duplicates), (50, 1), "{report}");
    let mut tx = sqlite.store().begin(&consumer("shipping")).await.expect("begin");
    assert_eq!(
        tx.get(b"count").await.expect("get").as_deref(),
        Some(&250u64.to_be_bytes()[..])
    );
    let users = |tx: &mut SqliteTx, sql: &str| tx.query_one(sql, [], |row| row.get::<_, i64>(0)).expect("query");
    assert_eq!(users(&mut tx, "SELECT count(*) FROM freight"), Some(5));
    assert_eq!(users(&mut tx, "SELECT count(*) FROM customers"), Some(2));
    assert_eq!(users(&mut tx, "PRAGMA user_version"), Some(42));
}

/// Runs the statements of schema 2's commits. They still work, and fencing still applies.
#[tokio::test]
async fn a_process_of_schema_2_continues_next_to_newer_ones() {
    let (_folder, path) = schema_2();
    let old = Connection::open(&path).expect("open");
    let mut update = old
        .prepare(
            "UPDATE main.essentially_once_consumers \
             SET incarnation = coalesce(?3, incarnation), next_hi = ?4, next_lo = ?5, epoch = ?6, count = ?7, \
                 owner = ?8, passed = ?9 \
             WHERE consumer = ?1 AND epoch = ?10 AND count = ?11 AND log = ?2 \
                 AND (incarnation = ?3 OR incarnation IS NULL OR ?3 IS NULL)",
        )
        .expect("schema 2");
    let mut insert = old
        .prepare(
            "INSERT INTO main.essentially_once_consumers \
                 (consumer, log, incarnation, next_hi, next_lo, epoch, count, owner, passed) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT (consumer) DO NOTHING",
        )
        .expect("schema 2");
    let store = Sqlite::open(&path).await.expect("open").store();
    let none: Option<&str> = None;
    let moved = update.execute((&"billing", &"payments", none, 0, 91, 1, 2, none, none, 1, 1));
    assert_eq!(moved.expect("the statement ignores the new column"), 1);
    let added = insert.execute((&"new", &"orders", none, 0, 5, 1, 1, none, none));
    assert_eq!(added.expect("insert"), 1);
    for (name, next) in [("billing", 91), ("new", 5)] {
        let position = store.position(&consumer(name)).await.expect("position").expect("some");
        assert_eq!(position.next, next.into(), "{name}");
    }
    let pulse = store.pulse(&consumer("new")).await.expect("pulse");
    assert_eq!((pulse.next, pulse.beats), (5.into(), 0));
}

#[tokio::test]
async fn a_file_of_schema_3_gets_room_for_dead_letters() {
    let (_folder, path) = copy_of("schema-3.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let store = sqlite.store();
    let position = store
        .position(&consumer("shipping"))
        .await
        .expect("position")
        .expect("a position");
    assert_eq!(
        (position.next, position.revision),
        (3.into(), Revision::new(7_144_538_342, 2))
    );
    let letters = dead_letters::list(&consumer("shipping"), &store, None, 10).await;
    assert!(letters.expect("list").is_empty());
    let orders = sqlite.log("orders").await.expect("log");
    orders.append(&[NewRecord::new("Peru")]).await.expect("append");
    let report = Consumer::essentially_once(consumer("shipping"), orders, store, Count)
        .dead_letters(DeadLetterOptions::new())
        .run_until_caught_up()
        .await
        .expect("run");
    assert_eq!(report.handled, 1, "{report}");
}

fn at(millis: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}

#[tokio::test]
async fn letters_of_schema_4_come_back_without_edits() {
    let (_folder, path) = copy_of("schema-4.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let store = sqlite.store();
    let shipping = consumer("shipping");
    let position = store.position(&shipping).await.expect("position").expect("some");
    assert_eq!(
        (position.next, position.revision),
        (5.into(), Revision::new(17_181_103_751, 1))
    );
    assert_eq!(position.journal, Journal::default());
    let letters = dead_letters::list(&shipping, &store, None, 10).await.expect("list");
    let orders = sqlite.log("orders").await.expect("log");
    let mut reader = orders.read(1.into()).await.expect("read");
    let mut records = reader.next(3).await.expect("next");
    records[2].malformed = Some("its key is not valid".into());
    assert_eq!(records[0].headers.len(), 2);
    for (letter, record) in letters.iter().zip(records) {
        assert_eq!(letter.record, record);
        assert_eq!(letter.edit, None);
    }
    let [first, behind, due] = &letters[..] else {
        panic!("{letters:?}")
    };
    assert_eq!((first.tries, behind.tries, due.tries), (5, 0, 2));
    assert_eq!(
        (&*first.first_reason, &*first.last_reason),
        ("no such customer", "größer")
    );
    assert_eq!(first.parked_at, at(1_700_000_000_001));
    assert_eq!(first.last_failed_at, at(1_700_000_060_002));
    assert_eq!((first.due, due.due), (None, Some(at(1_700_000_090_005))));
    assert_eq!((first.version, behind.version, due.version), (3, 1, 2));
    let mut tx = store.begin(&shipping).await.expect("begin");
    assert_eq!(
        tx.get(b"count").await.expect("get").as_deref(),
        Some(&2u64.to_be_bytes()[..])
    );
}

/// Runs the statements of schema 4. They keep a journal, and refuse to forget an edit.
#[tokio::test]
async fn a_process_of_schema_4_continues_next_to_newer_ones_but_forgets_no_edit() {
    let (_folder, path) = copy_of("schema-4.db");
    let old = Connection::open(&path).expect("open");
    let mut update = old
        .prepare("UPDATE main.essentially_once_consumers SET next_lo = 6, count = 3 WHERE consumer = ?1 AND count = 2")
        .expect("schema 4");
    let mut park = old
        .prepare(
            "INSERT OR REPLACE INTO main.essentially_once_letters (consumer, place, offset_hi, offset_lo, appended_at, \
                 key, headers, payload, producer, sequence, malformed, tries, first_reason, last_reason, parked_at, \
                 last_failed_at, due_at, version) \
             SELECT consumer, place, offset_hi, offset_lo, appended_at, key, headers, payload, producer, sequence, \
                 malformed, tries + 1, first_reason, 'again', parked_at, last_failed_at, due_at, version + 1 \
             FROM main.essentially_once_letters WHERE consumer = 'shipping' AND offset_lo = ?1",
        )
        .expect("schema 4");
    let store = Sqlite::open(&path).await.expect("open").store();
    let shipping = consumer("shipping");
    let before = store.position(&shipping).await.expect("position").expect("some");
    let mut tx = store.begin(&shipping).await.expect("begin");
    let mut edited = tx.letter(1.into()).await.expect("letter").expect("some");
    let by = Operator::new("ann");
    edited.edit(NewRecord::new("order 1").key("Peru"), &by);
    tx.park(&edited).await.expect("park");
    let mut advance = Advance::new(before.log, 5.into(), before.revision, before.revision.next_count());
    let journal = Journal::default().with(&by, OperatorAction::Edit(1.into()));
    advance.journal = Some(journal.clone());
    tx.commit(advance).await.expect("commit");

    assert_eq!(update.execute(["shipping"]).expect("update"), 1);
    let after = store.position(&shipping).await.expect("position").expect("some");
    assert_eq!((after.next, after.journal), (6.into(), journal));
    assert_eq!(park.execute([2]).expect("a letter that nobody edited"), 1);
    let error = park.execute([1]).expect_err("it would forget the edit").to_string();
    assert!(error.contains("upgrade this program"), "{error}");
    let mut letters = dead_letters::list(&shipping, &store, None, 10).await.expect("list");
    assert_eq!(letters[0], edited);
    assert_eq!(letters[1].last_reason, "again");

    // A process of this version may replace an edited letter by one without an edit.
    let mut tx = store.begin(&shipping).await.expect("begin");
    letters[0].edit = None;
    tx.park(&letters[0]).await.expect("park");
    assert_eq!(tx.letter(1.into()).await.expect("letter").as_ref(), Some(&letters[0]));
}
