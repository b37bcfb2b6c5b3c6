//! The contract of the store, in short form, and SQL in its transaction.

use std::{
    cell::Cell,
    fs,
    io::{Seek, SeekFrom, Write},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use essentially_once::{
    Consumer, ConsumerId, Error, KeyValue, Log, NewRecord, Offset, OffsetStore, Record,
    backend::{Advance, Durability, LogId, Numbering, Revision, Transaction, Window},
    handler_fn,
};
use essentially_once_sqlite::{
    LogOptions, Retention, Sqlite, SqliteOptions, SqliteStore, SqliteTx,
    rusqlite::{Connection, ErrorCode},
    sqlite_error,
};
use tempfile::TempDir;

async fn open() -> (TempDir, Sqlite, SqliteStore) {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
    let store = sqlite.store();
    (folder, sqlite, store)
}

fn shipping() -> ConsumerId {
    ConsumerId::new("shipping").expect("name")
}

fn orders() -> LogId {
    LogId::new("orders").expect("name")
}

/// The revision after this many commits of one session.
fn revision(commits: u64) -> Revision {
    match commits {
        0 => Revision::NONE,
        count => Revision::new(1, count),
    }
}

fn advance(next: u64, commits: u64) -> Advance {
    let expected = revision(commits);
    Advance::new(orders(), next.into(), expected, revision(commits.saturating_add(1)))
}

fn numbering(text: &str) -> Numbering {
    text.parse().expect("numbering")
}

async fn state(store: &SqliteStore, consumer: &ConsumerId, key: &str) -> Option<String> {
    let mut tx = store.begin(consumer).await.expect("begin");
    let value = tx.get(key.as_bytes()).await.expect("get")?;
    Some(String::from_utf8(value.to_vec()).expect("text"))
}

async fn staged(store: &SqliteStore, value: &str) -> SqliteTx {
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.put(b"k", value.as_bytes()).await.expect("put");
    tx
}

#[tokio::test]
async fn state_and_position_are_committed_together() {
    let (_folder, sqlite, store) = open().await;
    assert_eq!(store.position(&shipping()).await.expect("position"), None);
    staged(&store, "1").await.commit(advance(7, 0)).await.expect("commit");
    let reopened = Sqlite::open(sqlite.path()).await.expect("open").store();
    for store in [&store, &reopened] {
        let position = store.position(&shipping()).await.expect("position").expect("some");
        assert_eq!((position.next, position.revision), (7.into(), revision(1)));
        assert_eq!(position.log, orders());
        assert_eq!(state(store, &shipping(), "k").await.as_deref(), Some("1"));
    }
    assert_eq!(store.durability().await.expect("durability"), Durability::Durable);
}

#[tokio::test]
async fn late_writer_is_fenced() {
    let (_folder, sqlite, store) = open().await;
    let other = Sqlite::open(sqlite.path()).await.expect("open").store();
    staged(&store, "first")
        .await
        .commit(advance(1, 0))
        .await
        .expect("commit");
    staged(&other, "second")
        .await
        .commit(advance(2, 1))
        .await
        .expect("commit");
    for commits in [0, 1, 3, u64::MAX] {
        for store in [&store, &other] {
            let fenced = staged(store, "late").await.commit(advance(9, commits)).await;
            assert!(
                matches!(&fenced, Err(Error::Fenced { expected, .. }) if *expected == revision(commits)),
                "{fenced:?}"
            );
        }
    }
    assert_eq!(state(&store, &shipping(), "k").await.as_deref(), Some("second"));
    let position = store.position(&shipping()).await.expect("position").expect("some");
    assert_eq!((position.next, position.revision), (2.into(), revision(2)));
    // A position that was never stored cannot be advanced.
    let nobody = ConsumerId::new("nobody").expect("name");
    let tx = store.begin(&nobody).await.expect("begin");
    assert!(matches!(tx.commit(advance(1, 1)).await, Err(Error::Fenced { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_revision_has_one_winner_when_two_handles_race() {
    let (_folder, sqlite, store) = open().await;
    let other = Sqlite::open(sqlite.path()).await.expect("open").store();
    let race = |store: SqliteStore| async move {
        let mut wins = 0;
        for _ in 0..100 {
            let commits = store
                .position(&shipping())
                .await
                .expect("position")
                .map_or(0, |p| p.revision.count());
            tokio::task::yield_now().await;
            let mut tx = store.begin(&shipping()).await.expect("begin");
            let count = tx.get(b"count").await.expect("get").map_or(0, |count| count[0]);
            tx.put(b"count", &[count + 1]).await.expect("put");
            match tx.commit(advance(commits, commits)).await {
                Ok(()) => wins += 1,
                Err(Error::Fenced { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        wins
    };
    let (one, two) = (tokio::spawn(race(store.clone())), tokio::spawn(race(other)));
    let wins = one.await.expect("race") + two.await.expect("race");
    let mut tx = store.begin(&shipping()).await.expect("begin");
    assert_eq!(u64::from(tx.get(b"count").await.expect("get").expect("some")[0]), wins);
    let position = store.position(&shipping()).await.expect("position").expect("some");
    assert_eq!(position.revision, revision(wins));
}

#[tokio::test]
async fn a_position_remembers_its_log() {
    let (_folder, _, store) = open().await;
    let with = |incarnation: Option<&str>, commits| {
        let log = match incarnation {
            Some(incarnation) => orders().with_incarnation(incarnation).expect("name"),
            None => orders(),
        };
        let mut advance = advance(commits, commits);
        advance.log = log;
        advance
    };
    let commit = async |advance| staged(&store, "x").await.commit(advance).await;
    commit(with(None, 0)).await.expect("first");
    commit(with(Some("a1"), 1))
        .await
        .expect("the incarnation becomes known");
    let wrong = commit(with(Some("b2"), 2)).await;
    assert!(
        matches!(&wrong, Err(Error::WrongLog { stored, .. }) if stored.incarnation() == Some("a1")),
        "{wrong:?}"
    );
    let mut other = advance(5, 2);
    other.log = LogId::new("payments").expect("name");
    assert!(matches!(commit(other).await, Err(Error::WrongLog { .. })));
    assert!(
        matches!(commit(with(Some("b2"), 1)).await, Err(Error::Fenced { .. })),
        "fenced comes first"
    );
    commit(with(None, 2)).await.expect("an unknown incarnation is accepted");
    assert_eq!(
        store
            .position(&shipping())
            .await
            .expect("position")
            .expect("some")
            .revision,
        revision(3)
    );
}

#[tokio::test]
async fn a_dropped_or_rolled_back_transaction_leaves_no_trace() {
    let (_folder, _, store) = open().await;
    drop(staged(&store, "dropped").await);
    staged(&store, "rolled back").await.rollback().await.expect("rollback");
    assert_eq!(state(&store, &shipping(), "k").await, None);
    staged(&store, "kept")
        .await
        .commit(advance(1, 0))
        .await
        .expect("commit");
    assert_eq!(state(&store, &shipping(), "k").await.as_deref(), Some("kept"));
}

#[tokio::test]
async fn a_transaction_reads_its_own_writes() {
    let (_folder, _, store) = open().await;
    let mut tx = staged(&store, "1").await;
    assert_eq!(tx.get(b"k").await.expect("get").as_deref(), Some(&b"1"[..]));
    tx.put(b"k", b"").await.expect("put");
    assert_eq!(tx.get(b"k").await.expect("get").as_deref(), Some(&b""[..]));
    tx.delete(b"k").await.expect("delete");
    tx.delete(b"k").await.expect("delete again");
    assert_eq!(tx.get(b"k").await.expect("get"), None);
    let binary: Vec<u8> = (0..=255).collect();
    tx.put(&binary, &binary).await.expect("put");
    tx.put(b"", b"empty key").await.expect("put");
    tx.commit(advance(1, 0)).await.expect("commit");
    let mut tx = store.begin(&shipping()).await.expect("begin");
    assert_eq!(tx.get(&binary).await.expect("get").as_deref(), Some(&binary[..]));
    assert_eq!(tx.get(b"").await.expect("get").as_deref(), Some(&b"empty key"[..]));
}

#[tokio::test]
async fn consumers_never_see_each_other() {
    let (_folder, _, store) = open().await;
    staged(&store, "mine")
        .await
        .commit(advance(3, 0))
        .await
        .expect("commit");
    let other = ConsumerId::new("shipping2").expect("name");
    assert_eq!(state(&store, &other, "k").await, None);
    assert_eq!(store.position(&other).await.expect("position"), None);
    let mut tx = store.begin(&other).await.expect("begin");
    tx.delete(b"k").await.expect("delete");
    tx.commit(advance(1, 0)).await.expect("commit");
    assert_eq!(state(&store, &shipping(), "k").await.as_deref(), Some("mine"));
}

#[tokio::test]
async fn consumers_whose_names_differ_in_case_or_at_the_end_are_distinct() {
    let (_folder, _, store) = open().await;
    let long = "x".repeat(100);
    let names = [
        "Shipping".into(),
        "shipping".into(),
        format!("{long}a"),
        format!("{long}b"),
    ];
    for (n, name) in names.iter().enumerate() {
        let consumer = ConsumerId::new(name).expect("name");
        let mut tx = store.begin(&consumer).await.expect("begin");
        tx.put(b"k", name.as_bytes()).await.expect("put");
        tx.commit(advance(n as u64 + 1, 0))
            .await
            .expect("the consumer's first commit");
    }
    for (n, name) in names.iter().enumerate() {
        let consumer = ConsumerId::new(name).expect("name");
        let position = store.position(&consumer).await.expect("position").expect("some");
        assert_eq!(position.next, (n as u64 + 1).into(), "{name}");
        assert_eq!(state(&store, &consumer, "k").await.as_ref(), Some(name));
    }
}

#[tokio::test]
async fn keys_and_values_over_the_limit_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = SqliteOptions::new()
        .record_limit(10)
        .open(folder.path().join("a.db"))
        .await
        .expect("open");
    let mut tx = sqlite.store().begin(&shipping()).await.expect("begin");
    tx.put(&[1; 10], &[2; 10]).await.expect("at the limit");
    assert!(matches!(
        tx.put(&[1; 11], &[]).await,
        Err(Error::TooLarge {
            what: "key",
            size: 11,
            ..
        })
    ));
    assert!(matches!(
        tx.put(&[], &[1; 11]).await,
        Err(Error::TooLarge { what: "value", .. })
    ));
    tx.commit(advance(1, 0)).await.expect("the transaction continues");
}

/// A window as the core encodes it: version, highest, hi, lo, two times, and 17 blocks.
fn window(highest: u8) -> Window {
    let mut bytes = [0; Window::ENCODED_LEN];
    (bytes[0], bytes[8]) = (2, highest);
    Window::decode(&bytes).expect("window")
}

#[tokio::test]
async fn windows_and_large_numbers_round_trip() {
    let (_folder, _, store) = open().await;
    let mut first = advance(0, 0);
    first.next = Offset::new(u64::MAX, u64::MAX - 1);
    first.windows = vec![(numbering("a"), window(1)), (numbering("a#7"), window(2))];
    staged(&store, "x").await.commit(first.clone()).await.expect("commit");
    let mut second = advance(0, 1);
    second.next = first.next;
    second.windows = vec![(numbering("c"), window(3)), (numbering("a#7"), window(9))];
    second.forgotten = vec![numbering("a"), numbering("never-there")];
    staged(&store, "x").await.commit(second.clone()).await.expect("commit");
    assert!(
        staged(&store, "x").await.commit(first).await.is_err(),
        "fenced: windows stay"
    );
    let position = store.position(&shipping()).await.expect("position").expect("some");
    assert_eq!(position.next, Offset::new(u64::MAX, u64::MAX - 1));
    let mut windows = position.windows;
    windows.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(windows, [(numbering("a#7"), window(9)), (numbering("c"), window(3))]);
}

#[tokio::test]
async fn a_position_that_was_tampered_with_is_an_error_that_names_the_file() {
    let (_folder, sqlite, store) = open().await;
    let mut first = advance(1, 0);
    first.windows = vec![(numbering("a"), window(1))];
    staged(&store, "x").await.commit(first).await.expect("commit");
    let shell = Connection::open(sqlite.path()).expect("open");
    shell
        .execute_batch("UPDATE essentially_once_windows SET \"window\" = x'00'")
        .expect("edit");
    let error = store.position(&shipping()).await.expect_err("no window").to_string();
    assert!(error.contains("a.db") && error.contains("window"), "{error}");
}

#[tokio::test]
async fn sql_takes_part_in_the_transaction() {
    let (_folder, _, store) = open().await;
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.execute("CREATE TABLE sums (country TEXT PRIMARY KEY, sum INTEGER)", [])
        .expect("create");
    for (country, sum) in [("Brazil", 3), ("France", 5)] {
        assert_eq!(
            tx.execute("INSERT INTO sums VALUES (?1, ?2)", (country, sum))
                .expect("insert"),
            1
        );
    }
    tx.commit(advance(1, 0)).await.expect("commit");

    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.execute("UPDATE sums SET sum = 100", []).expect("update");
    assert!(matches!(tx.commit(advance(1, 0)).await, Err(Error::Fenced { .. })));

    let mut tx = store.begin(&shipping()).await.expect("begin");
    let all: Vec<(String, i64)> = tx
        .query("SELECT * FROM sums ORDER BY sum", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .expect("query");
    assert_eq!(all, [("Brazil".into(), 3), ("France".into(), 5)]);
    let none: Option<i64> = tx
        .query_one("SELECT sum FROM sums WHERE sum > 9", [], |row| row.get(0))
        .expect("query");
    assert_eq!(none, None);
    let returned: Vec<i64> = tx
        .query("UPDATE sums SET sum = sum + 1 RETURNING sum", [], |row| row.get(0))
        .expect("returning");
    assert_eq!(returned.iter().sum::<i64>(), 10);
    assert_eq!(tx.consumer(), &shipping());
}

#[tokio::test]
async fn mistakes_in_sql_fail_and_the_transaction_goes_on() {
    let (_folder, _, store) = open().await;
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.execute("CREATE TABLE t (x UNIQUE)", []).expect("create");
    tx.execute("INSERT INTO t VALUES (1)", []).expect("insert");
    let violated = tx.execute("INSERT INTO t VALUES (1)", []).expect_err("unique");
    assert!(matches!(violated, Error::Failed { .. }));
    let code = sqlite_error(&violated).and_then(|error| error.sqlite_error_code());
    assert_eq!(code, Some(ErrorCode::ConstraintViolation));
    for sql in [
        "",
        "SELEC",
        "INSERT INTO missing VALUES (1)",
        "INSERT INTO t VALUES (?1)",
        "SELECT 1",
        "\0",
    ] {
        assert!(matches!(tx.execute(sql, []), Err(Error::Failed { .. })), "{sql:?}");
    }
    let text: Result<Option<String>, _> = tx.query_one("SELECT x FROM t", [], |row| row.get(0));
    assert!(matches!(text, Err(Error::Failed { .. })), "a number is not text");
    tx.commit(advance(1, 0)).await.expect("commit");
    let mut tx = store.begin(&shipping()).await.expect("begin");
    assert_eq!(
        tx.query_one("SELECT count(*) FROM t", [], |row| row.get(0))
            .expect("count"),
        Some(1)
    );
}

/// Overwrites the root page of a table, as a faulty disk might.
fn damage(sqlite: &Sqlite, table: &str) {
    let shell = Connection::open(sqlite.path()).expect("open");
    let (root, size): (u64, u64) = shell
        .query_row(
            "SELECT rootpage, (SELECT page_size FROM pragma_page_size) FROM sqlite_master WHERE name = ?1",
            [table],
            |row| Ok((row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64)),
        )
        .expect("root page");
    let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
    shell.query_row(checkpoint, [], |_| Ok(())).expect("checkpoint");
    drop(shell);
    let mut file = fs::OpenOptions::new().write(true).open(sqlite.path()).expect("open");
    file.seek(SeekFrom::Start((root - 1) * size)).expect("seek");
    file.write_all(&vec![0xa5; size as usize]).expect("write");
}

#[tokio::test]
async fn a_damaged_page_whose_error_is_ignored_keeps_the_transaction_from_committing() {
    for table in ["essentially_once_state", "t"] {
        let (folder, sqlite, store) = open().await;
        let mut tx = staged(&store, "before").await;
        tx.execute("CREATE TABLE t (x)", []).expect("create");
        tx.execute("CREATE TABLE whole (x)", []).expect("create");
        tx.commit(advance(1, 0)).await.expect("commit");
        let path = sqlite.path().to_owned();
        drop((sqlite, store));
        damage(&Sqlite::open(&path).await.expect("open"), table);

        let store = Sqlite::open(&path).await.expect("open").store();
        let mut tx = store.begin(&shipping()).await.expect("begin");
        tx.execute("INSERT INTO whole VALUES (1)", []).expect("another page");
        let ignored = match table {
            "t" => tx.query("SELECT x FROM t", [], |_| Ok(())).is_ok(),
            _ => tx.get(b"k").await.is_ok(),
        };
        assert!(!ignored, "{table}");
        let error = tx.commit(advance(2, 1)).await.expect_err(table);
        assert!(matches!(error, Error::Failed { .. }), "{table}: {error:?}");
        let text = error.to_string();
        assert!(text.contains("only be rolled back"), "{table}: {text}");
        let position = store.position(&shipping()).await.expect("position").expect("some");
        assert_eq!(position.next, 1.into(), "{table}");
        drop(folder);
    }
}

#[tokio::test]
async fn a_handler_cannot_end_its_transaction() {
    let (_folder, sqlite, store) = open().await;
    staged(&store, "before")
        .await
        .commit(advance(1, 0))
        .await
        .expect("commit");
    let mut tx = staged(&store, "after").await;
    for sql in [
        "COMMIT",
        "ROLLBACK",
        "BEGIN",
        "ATTACH ':memory:' AS m",
        "PRAGMA synchronous = OFF",
    ] {
        let error = tx.execute(sql, []).expect_err(sql);
        assert!(error.to_string().contains("savepoints are allowed"), "{sql}: {error}");
        assert!(tx.query(sql, [], |_| Ok(())).is_err(), "{sql}");
    }
    let steal = "UPDATE essentially_once_consumers SET count = 0";
    assert!(tx.execute(steal, []).is_err());
    assert!(
        tx.execute("INSERT INTO essentially_once_state VALUES ('other', 'k', 'x')", [])
            .is_err()
    );
    for sql in [
        "SAVEPOINT s",
        "CREATE TABLE t (x)",
        "ROLLBACK TO s",
        "SAVEPOINT left_open",
    ] {
        tx.execute(sql, []).expect(sql);
    }
    let shell = Connection::open(sqlite.path()).expect("open");
    let revision: i64 = shell
        .query_row("SELECT count FROM essentially_once_consumers", [], |row| row.get(0))
        .expect("revision");
    assert_eq!(revision, 1, "nothing was committed early");
    tx.commit(advance(2, 1)).await.expect("commit");
    assert_eq!(state(&store, &shipping(), "k").await.as_deref(), Some("after"));
}

#[tokio::test]
async fn a_handler_cannot_keep_logs_from_being_created_or_trimmed() {
    let (_folder, sqlite, store) = open().await;
    let log = sqlite.log("orders").await.expect("log");
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.execute("CREATE TABLE mine (id INTEGER PRIMARY KEY AUTOINCREMENT, x)", [])
        .expect("create");
    for sql in [
        "ALTER TABLE mine RENAME TO essentially_once_log_2",
        "CREATE UNIQUE INDEX essentially_once_log_2 ON mine (x)",
        "CREATE TABLE child (x REFERENCES essentially_once_log_1)",
        "UPDATE sqlite_sequence SET seq = 0",
    ] {
        let error = tx.execute(sql, []).expect_err(sql).to_string();
        assert!(error.contains("a handler cannot"), "{sql}: {error}");
    }
    tx.execute("ALTER TABLE mine RENAME TO theirs", []).expect("rename");
    tx.execute("DROP TABLE theirs", []).expect("drop");
    tx.commit(advance(1, 0)).await.expect("commit");
    sqlite.log("payments").await.expect("a second log");
    log.append(&[NewRecord::new("a"), NewRecord::new("b")])
        .await
        .expect("append");
    let keep = LogOptions::new().retention(Retention::new().max_records(1));
    let log = sqlite.log_with("orders", keep).await.expect("retention");
    assert_eq!(log.trim().await.expect("trim"), 1);
}

#[tokio::test]
async fn nothing_runs_after_sqlite_itself_rolled_back() {
    let (_folder, _, store) = open().await;
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.execute("CREATE TABLE t (x UNIQUE)", []).expect("create");
    tx.execute(
        "CREATE TRIGGER undo BEFORE DELETE ON t BEGIN SELECT RAISE(ROLLBACK, 'no deletes'); END",
        [],
    )
    .expect("trigger");
    tx.execute("INSERT INTO t VALUES (1)", []).expect("insert");
    tx.commit(advance(1, 0)).await.expect("commit");
    for sql in ["INSERT OR ROLLBACK INTO t VALUES (1)", "DELETE FROM t"] {
        let mut tx = staged(&store, "gone").await;
        assert!(tx.execute(sql, []).is_err(), "{sql}");
        assert!(
            tx.execute("INSERT INTO t VALUES (2)", []).is_err(),
            "{sql}: no autocommit"
        );
        assert!(tx.query("SELECT 1", [], |_| Ok(())).is_err());
        assert!(tx.put(b"k", b"2").await.is_err());
        assert!(tx.get(b"k").await.is_err());
        assert!(tx.delete(b"k").await.is_err());
        let error = tx.commit(advance(2, 1)).await.expect_err("gone");
        assert!(matches!(error, Error::Failed { .. }) && error.to_string().contains("rolled the transaction back"));
    }
    assert_eq!(state(&store, &shipping(), "k").await, None);
    let mut tx = store.begin(&shipping()).await.expect("begin");
    assert_eq!(
        tx.query_one("SELECT count(*) FROM t", [], |row| row.get(0))
            .expect("count"),
        Some(1)
    );
}

#[tokio::test]
async fn a_deferred_constraint_fails_the_commit_and_nothing_is_applied() {
    let (_folder, _, store) = open().await;
    let mut tx = staged(&store, "x").await;
    tx.execute("CREATE TABLE a (id INTEGER PRIMARY KEY)", [])
        .expect("create");
    tx.execute("CREATE TABLE b (a REFERENCES a DEFERRABLE INITIALLY DEFERRED)", [])
        .expect("create");
    tx.execute("INSERT INTO b VALUES (1)", []).expect("not yet");
    let error = tx.commit(advance(1, 0)).await.expect_err("violated");
    assert!(matches!(error, Error::Failed { .. }), "{error:?}");
    assert_eq!(store.position(&shipping()).await.expect("position"), None);
    assert_eq!(state(&store, &shipping(), "k").await, None);
}

#[tokio::test]
async fn an_append_within_a_handler_ends_with_an_explanation() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(100));
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let tx = staged(&sqlite.store(), "x").await;
    let error = log.append(&[NewRecord::new("y")]).await.expect_err("waits for itself");
    assert!(matches!(error, Error::Failed { .. }), "it can never succeed: {error:?}");
    assert!(error.to_string().contains("waits for itself"), "{error}");
    // Another handle on the same file waits for the same lock.
    let other = options.open(folder.path().join(".").join("a.db")).await.expect("open");
    let orders = other.log("orders").await.expect("log");
    let error = orders
        .append(&[NewRecord::new("y")])
        .await
        .expect_err("waits for itself");
    assert!(matches!(error, Error::Failed { .. }), "it can never succeed: {error:?}");
    // Another task can succeed once the handler is done.
    let (store, waiting) = (other.store(), shipping());
    let elsewhere = tokio::spawn(async move { store.begin(&waiting).await.map(drop) });
    let error = elsewhere.await.expect("no panic").expect_err("locked");
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    tx.commit(advance(1, 0)).await.expect("commit");
    log.append(&[NewRecord::new("y")]).await.expect("the lock is free");
}

#[tokio::test]
async fn a_consumer_whose_handler_appends_to_its_own_file_ends_and_says_why() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(50));
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    log.append(&[NewRecord::new("x")]).await.expect("append");
    let results = sqlite.log("results").await.expect("log");
    let handler = handler_fn(move |_: &Record, _: &mut SqliteTx| {
        let results = results.clone();
        Box::pin(async move {
            results.append(&[NewRecord::new("y")]).await?;
            Ok(())
        })
    });
    let consumer = Consumer::essentially_once(shipping(), log, sqlite.store(), handler)
        .min_backoff(Duration::from_millis(1))
        .max_backoff(Duration::from_millis(1));
    let ended = tokio::time::timeout(Duration::from_secs(20), consumer.run()).await;
    let error = ended
        .expect("the run does not retry forever")
        .expect_err("the append can never succeed");
    assert!(error.to_string().contains("waits for itself"), "{error}");
}

#[tokio::test]
async fn a_run_does_not_end_because_another_run_in_its_task_is_slow() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(50));
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    log.append(&[NewRecord::new("x"), NewRecord::new("y")])
        .await
        .expect("append");
    let entered = Arc::new(tokio::sync::Notify::new());
    let run = |name: &str, takes: Duration| {
        let entered = Arc::clone(&entered);
        let handler = handler_fn(move |_: &Record, _: &mut SqliteTx| {
            entered.notify_one();
            Box::pin(async move {
                tokio::time::sleep(takes).await;
                Ok(())
            })
        });
        Consumer::essentially_once(
            ConsumerId::new(name).expect("name"),
            log.clone(),
            sqlite.store(),
            handler,
        )
        .min_backoff(Duration::from_millis(1))
        .max_backoff(Duration::from_millis(20))
        .run_until_caught_up()
    };
    let quick = async {
        // The slow run holds the lock now.
        entered.notified().await;
        run("quick", Duration::ZERO).await
    };
    let (slow, quick) = tokio::join!(run("slow", Duration::from_millis(300)), quick);
    assert_eq!((slow.expect("run").handled, quick.expect("run").handled), (2, 2));
}

/// The lock changed hands within the task, so the task did not wait for itself.
#[tokio::test]
async fn a_task_that_does_two_things_at_once_does_not_wait_for_itself() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(300));
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let tx = staged(&sqlite.store(), "x").await;
    let record = [NewRecord::new("y")];
    let (committed, appended) = tokio::join!(
        async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            tx.commit(advance(1, 0)).await
        },
        log.append(&record)
    );
    committed.expect("commit");
    appended.expect("append");
}

/// Holds the file's write lock on another connection until the sender is used or dropped. The
/// thread returns whether that happened in time.
fn hold_lock(sqlite: &Sqlite) -> (mpsc::Sender<()>, thread::JoinHandle<bool>) {
    let (locked, wait) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let path = sqlite.path().to_owned();
    let holder = thread::spawn(move || {
        let connection = Connection::open(path).expect("open");
        connection.execute_batch("BEGIN IMMEDIATE").expect("lock");
        locked.send(()).expect("told");
        let told = released.recv_timeout(Duration::from_secs(5));
        connection.execute_batch("COMMIT").expect("unlock");
        told != Err(mpsc::RecvTimeoutError::Timeout)
    });
    wait.recv().expect("locked");
    (release, holder)
}

#[tokio::test(flavor = "current_thread")]
async fn waiting_for_the_lock_never_blocks_the_runtime() {
    let (_folder, sqlite, store) = open().await;
    let log = sqlite.log("orders").await.expect("log");
    let (release, holder) = hold_lock(&sqlite);
    let released = Cell::new(false);
    let ticking = async {
        // This task releases the lock. It gets to run only if the others do not block the thread.
        for _ in 0..50 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        released.set(true);
        // The send fails if the holder gave up, which the last assertion reports.
        let _ = release.send(());
    };
    let committing = async {
        staged(&store, "x").await.commit(advance(1, 0)).await.expect("commit");
        assert!(released.get(), "it had to wait");
    };
    let appending = async {
        log.append(&[NewRecord::new("y")]).await.expect("append");
        assert!(released.get(), "it had to wait");
    };
    tokio::join!(committing, appending, ticking);
    assert!(holder.join().expect("holder"), "the other task could not run");
}

#[tokio::test]
async fn a_lock_held_too_long_is_unavailable_and_reading_goes_on() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(80));
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
    log.append(&[NewRecord::new("x")]).await.expect("append");
    let (release, holder) = hold_lock(&sqlite);
    let error = store.begin(&shipping()).await.expect_err("locked");
    assert!(
        matches!(error, Error::Unavailable { .. }) && error.to_string().contains("a.db"),
        "{error}"
    );
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    let records: Vec<Record> = reader.next(5).await.expect("next");
    assert_eq!(records.len(), 1);
    assert_eq!(store.position(&shipping()).await.expect("position"), None);
    drop(release);
    holder.join().expect("holder");
    store.begin(&shipping()).await.expect("the lock is free");
}
