//! Appends in a transaction on a connection of the user.

use std::sync::Mutex;

use essentially_once::{Epoch, Error, Log, NewRecord, Origin, ProducerId};
use essentially_once_sqlite::{
    LogOptions, Retention, Sqlite, SqliteLog, SqliteOptions,
    rusqlite::{Connection, Transaction, TransactionBehavior},
};
use tokio::time::timeout;

use super::{SOON, all, numbered, open, payloads, send_alone, users};

async fn out() -> (tempfile::TempDir, Sqlite, SqliteLog, Connection) {
    let (folder, sqlite) = open().await;
    let out = sqlite.log("out").await.expect("log");
    let user = users(&sqlite);
    user.execute_batch("CREATE TABLE orders (id)").expect("table");
    (folder, sqlite, out, user)
}

fn immediate(user: &mut Connection) -> Transaction<'_> {
    user.transaction_with_behavior(TransactionBehavior::Immediate)
        .expect("begin")
}

fn records(payloads: &[&'static str]) -> Vec<NewRecord> {
    payloads.iter().map(|payload| NewRecord::new(*payload)).collect()
}

fn orders(user: &Connection) -> i64 {
    user.query_row("SELECT count(*) FROM orders", [], |row| row.get(0))
        .expect("count")
}

/// Appends in a transaction that has a change of its own, and returns why it was refused. The
/// change is committed.
fn refusal(out: &SqliteLog, user: &mut Connection, records: &[NewRecord]) -> Error {
    let before = orders(user);
    let tx = immediate(user);
    tx.execute("INSERT INTO orders VALUES (1)", []).expect("insert");
    let error = out.append_in(&tx, records).expect_err("refused");
    assert_no_savepoint(&tx);
    tx.commit().expect("the transaction goes on");
    assert_eq!(orders(user), before + 1);
    error
}

/// Savepoints that stayed open would pile up in a long transaction.
fn assert_no_savepoint(tx: &Transaction<'_>) {
    let error = tx.execute_batch("RELEASE essentially_once_append").expect_err("none");
    assert!(error.to_string().contains("no such savepoint"), "{error}");
}

#[tokio::test]
async fn records_are_appended_with_the_users_commit_or_not_at_all() {
    let (_folder, sqlite, out, mut user) = out().await;
    let tx = immediate(&mut user);
    tx.execute("INSERT INTO orders VALUES (1)", []).expect("insert");
    assert_eq!(out.append_in(&tx, &[]).expect("nothing"), None);
    assert_eq!(
        out.append_in(&tx, &records(&["a", "b"])).expect("append"),
        Some(1.into())
    );
    assert_eq!(out.append_in(&tx, &records(&["c"])).expect("append"), Some(2.into()));
    assert_no_savepoint(&tx);
    assert_eq!(out.bounds().await.expect("bounds").end, 0.into(), "not committed");
    tx.commit().expect("commit");
    send_alone(&sqlite, "out", "d", 0).await;
    let tx = immediate(&mut user);
    out.append_in(&tx, &records(&["undone"])).expect("append");
    tx.rollback().expect("rollback");
    let tx = immediate(&mut user);
    out.append_in(&tx, &records(&["undone"])).expect("append");
    drop(tx);
    let tx = immediate(&mut user);
    assert_eq!(out.append_in(&tx, &records(&["e"])).expect("append"), Some(4.into()));
    tx.commit().expect("commit");
    assert_eq!(numbered(&out).await.0, ["a", "b", "c", "d", "e"]);
    assert_eq!(orders(&user), 1);
}

#[tokio::test]
async fn a_sender_that_was_drawn_in_a_rolled_back_transaction_is_forgotten() {
    let (_folder, _, out, mut user) = out().await;
    let tx = immediate(&mut user);
    out.append_in(&tx, &records(&["undone"])).expect("append");
    tx.rollback().expect("rollback");
    let sender = "SELECT sender FROM essentially_once_logs";
    let stored = |user: &Connection| {
        user.query_row(sender, [], |row| row.get::<_, Option<String>>(0))
            .expect("row")
    };
    assert_eq!(stored(&user), None);
    for payload in ["a", "b"] {
        let tx = immediate(&mut user);
        out.append_in(&tx, &records(&[payload])).expect("append");
        tx.commit().expect("commit");
    }
    let (appended, producer) = numbered(&out).await;
    assert_eq!(appended, ["a", "b"]);
    assert_eq!(stored(&user).as_deref(), Some(producer.as_str()));
}

#[tokio::test]
async fn a_waiting_reader_finds_the_users_records() {
    let (_folder, _, out, mut user) = out().await;
    let mut reader = out.read(0.into()).await.expect("read");
    let append = async {
        let tx = immediate(&mut user);
        out.append_in(&tx, &records(&["a"])).expect("append");
        tx.commit().expect("commit");
    };
    let (next, ()) = tokio::join!(timeout(SOON, reader.next(9)), append);
    assert_eq!(payloads(&next.expect("soon").expect("next")), ["a"]);
}

#[tokio::test]
async fn another_file_is_refused_even_if_it_is_a_copy() {
    let (folder, sqlite, out, user) = out().await;
    let copy = folder.path().join("copy.db");
    user.execute("VACUUM INTO ?1", [copy.to_str()]).expect("copy");
    let empty = folder.path().join("empty.db");
    let elsewhere = Sqlite::open(folder.path().join("other.db")).await.expect("open");
    elsewhere.log("out").await.expect("a log of the same name");
    for path in [copy.as_path(), empty.as_path(), elsewhere.path()] {
        let mut other = Connection::open(path).expect("open");
        // The log's own file is attached, and must not be found there.
        let attached = sqlite.path().to_str().expect("UTF-8");
        other.execute("ATTACH ?1 AS other", [attached]).expect("attach");
        other
            .execute_batch("CREATE TABLE IF NOT EXISTS main.orders (id)")
            .expect("table");
        let error = refusal(&out, &mut other, &records(&["a"]));
        let text = error.to_string();
        let shown = path.file_name().and_then(|name| name.to_str()).expect("UTF-8");
        assert!(matches!(error, Error::Failed { .. }), "{error:?}");
        assert!(text.contains(shown) && text.contains("a.db"), "{text}");
    }
    let mut memory = Connection::open_in_memory().expect("open");
    memory.execute_batch("CREATE TABLE orders (id)").expect("table");
    let text = refusal(&out, &mut memory, &records(&["a"])).to_string();
    assert!(text.contains("in memory"), "{text}");
    assert_eq!(out.bounds().await.expect("bounds").end, 0.into());
}

#[tokio::test]
async fn the_log_is_found_in_the_main_file_under_any_name_of_it() {
    let (folder, _, out, _) = out().await;
    let link = folder.path().join(".").join("a.db");
    let mut user = Connection::open(&link).expect("open");
    // Tables of the same names that would come first without `main`.
    user.execute_batch(
        "CREATE TEMP TABLE essentially_once_logs AS SELECT * FROM main.essentially_once_logs;
         CREATE TEMP TABLE essentially_once_log_1 AS SELECT * FROM main.essentially_once_log_1",
    )
    .expect("temp");
    let tx = immediate(&mut user);
    out.append_in(&tx, &records(&["a"])).expect("append");
    tx.commit().expect("commit");
    for (schema, stored) in [("main", (1, true)), ("temp", (0, false))] {
        let sql = format!("SELECT next, sender IS NOT NULL FROM {schema}.essentially_once_logs");
        let row = user.query_row(&sql, [], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)));
        assert_eq!(row.expect("row"), stored, "{schema}");
    }
    #[cfg(unix)]
    {
        let link = folder.path().join("link.db");
        std::os::unix::fs::symlink(folder.path().join("a.db"), &link).expect("link");
        let mut user = Connection::open(&link).expect("open");
        let tx = immediate(&mut user);
        out.append_in(&tx, &records(&["b"])).expect("append");
        tx.commit().expect("commit");
        assert_eq!(out.bounds().await.expect("bounds").end, 2.into());
    }
    assert_eq!(numbered(&out).await.0[0], "a");
}

#[tokio::test]
async fn a_connection_that_does_not_sync_is_refused() {
    let (_folder, _, out, mut user) = out().await;
    for weak in ["NORMAL", "OFF"] {
        user.pragma_update(None, "synchronous", weak).expect("pragma");
        let text = refusal(&out, &mut user, &records(&["a"])).to_string();
        assert!(
            text.contains("power failure") && text.contains("set it to FULL"),
            "{text}"
        );
    }
    for strong in ["FULL", "EXTRA"] {
        user.pragma_update(None, "synchronous", strong).expect("pragma");
        let tx = immediate(&mut user);
        out.append_in(&tx, &records(&["a"])).expect("append");
        tx.commit().expect("commit");
    }
    assert_eq!(numbered(&out).await.0, ["a", "a"]);
}

#[tokio::test]
async fn a_transaction_without_the_lock_is_told_to_begin_with_it() {
    let (_folder, _, out, mut user) = out().await;
    let tx = user.transaction().expect("deferred");
    orders(&tx);
    out.append(&[NewRecord::new("overtakes")]).await.expect("append");
    let error = out.append_in(&tx, &records(&["a"])).expect_err("an old snapshot");
    assert!(
        matches!(error, Error::Unavailable { .. }) && error.to_string().contains("TransactionBehavior::Immediate"),
        "{error:?}"
    );
    drop(tx);
    assert_eq!(payloads(&all(&out).await), ["overtakes"]);
}

/// A transaction that holds the file's write lock. Waiting for the lock ends it.
static HOLDER: Mutex<Option<Connection>> = Mutex::new(None);

#[tokio::test]
async fn a_deferred_transaction_that_has_read_nothing_waits_for_the_lock() {
    let (_folder, sqlite, out, mut user) = out().await;
    let holder = users(&sqlite);
    holder
        .execute_batch("BEGIN IMMEDIATE; INSERT INTO orders VALUES (1)")
        .expect("lock");
    *HOLDER.lock().expect("one test") = Some(holder);
    user.busy_handler(Some(|_| {
        let holder = HOLDER.lock().expect("one test").take();
        holder.is_some_and(|holder| holder.execute_batch("COMMIT").is_ok())
    }))
    .expect("handler");
    let tx = user.transaction().expect("deferred");
    out.append_in(&tx, &records(&["a"])).expect("append");
    tx.commit().expect("commit");
    assert_eq!(numbered(&out).await.0, ["a"]);
    assert_eq!(orders(&user), 1);
    assert!(HOLDER.lock().expect("one test").is_none(), "it had to wait");
}

#[tokio::test]
async fn a_failed_append_leaves_nothing_in_the_transaction() {
    let (_folder, _, out, mut user) = out().await;
    user.execute_batch(
        "CREATE TRIGGER refuse BEFORE INSERT ON essentially_once_log_1 WHEN NEW.payload = CAST('bad' AS BLOB)
             BEGIN SELECT RAISE(ABORT, 'no such country'); END;
         CREATE TRIGGER swallow BEFORE INSERT ON essentially_once_log_1 WHEN NEW.payload = CAST('gone' AS BLOB)
             BEGIN SELECT RAISE(IGNORE); END",
    )
    .expect("triggers");
    for (second, why) in [("bad", "no such country"), ("gone", "trigger")] {
        let text = refusal(&out, &mut user, &records(&["first", second])).to_string();
        assert!(text.contains(why) && text.contains("a.db"), "{text}");
        assert_eq!(out.bounds().await.expect("bounds").end, 0.into());
    }
    let tx = immediate(&mut user);
    out.append_in(&tx, &records(&["a"])).expect("append");
    out.append_in(&tx, &records(&["b", "bad"])).expect_err("refused");
    assert_eq!(out.append_in(&tx, &records(&["c"])).expect("append"), Some(1.into()));
    tx.commit().expect("commit");
    assert_eq!(numbered(&out).await.0, ["a", "c"]);
}

#[tokio::test]
async fn records_that_a_log_refuses_are_refused_here_too() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().record_limit(1_000);
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let out = sqlite.log("out").await.expect("log");
    let mut user = users(&sqlite);
    user.execute_batch("CREATE TABLE orders (id)").expect("table");
    let large = [NewRecord::new("a"), NewRecord::new(vec![1; 1_001])];
    let error = refusal(&out, &mut user, &large);
    assert!(matches!(error, Error::TooLarge { size: 1_001, .. }), "{error:?}");
    let origin = Origin::new(ProducerId::new("web").expect("name"), Epoch::STABLE, 1);
    let text = refusal(&out, &mut user, &[NewRecord::new("a").origin(origin)]).to_string();
    assert!(text.contains("origin web:1"), "{text}");
    assert_eq!(out.bounds().await.expect("bounds").end, 0.into());
}

#[tokio::test]
async fn a_log_that_was_recreated_is_not_appended_to() {
    let (_folder, sqlite, out, mut user) = out().await;
    user.execute_batch("DELETE FROM essentially_once_logs; DROP TABLE essentially_once_log_1")
        .expect("delete");
    for _ in 0..2 {
        let text = refusal(&out, &mut user, &records(&["a"])).to_string();
        assert!(text.contains("open it again"), "{text}");
        let again = sqlite.log("out").await.expect("log");
        assert_eq!(again.bounds().await.expect("bounds").end, 0.into());
    }
}

#[tokio::test]
async fn a_transaction_that_sqlite_rolled_back_is_refused() {
    let (_folder, _, out, mut user) = out().await;
    user.execute_batch("CREATE UNIQUE INDEX one ON orders (id); INSERT INTO orders VALUES (1)")
        .expect("index");
    let tx = immediate(&mut user);
    tx.execute("INSERT OR ROLLBACK INTO orders VALUES (1)", [])
        .expect_err("violated");
    let text = out.append_in(&tx, &records(&["a"])).expect_err("refused").to_string();
    assert!(text.contains("OR ROLLBACK"), "{text}");
    drop(tx);
    assert_eq!(out.bounds().await.expect("bounds").end, 0.into());
}

#[tokio::test]
async fn retention_applies_and_numbers_go_on() {
    let (_folder, sqlite, out, mut user) = out().await;
    let keep = LogOptions::new().retention(Retention::new().max_records(2));
    sqlite.log_with("out", keep).await.expect("log");
    for _ in 0..4 {
        let tx = immediate(&mut user);
        out.append_in(&tx, &records(&["a", "b", "c"])).expect("append");
        tx.commit().expect("commit");
    }
    let bounds = out.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (10.into(), 12.into()));
    user.execute("DELETE FROM essentially_once_log_1", []).expect("empty");
    let tx = immediate(&mut user);
    assert_eq!(out.append_in(&tx, &records(&["d"])).expect("append"), Some(12.into()));
    tx.commit().expect("commit");
}

#[tokio::test]
async fn a_statement_that_is_still_writing_is_named_and_not_waited_for() {
    let (_folder, _sqlite, out, mut user) = out().await;
    let tx = immediate(&mut user);
    {
        let mut insert = tx
            .prepare("INSERT INTO orders VALUES (1), (2) RETURNING id")
            .expect("prepare");
        let mut rows = insert.query([]).expect("insert");
        rows.next().expect("a row");
        let error = out.append_in(&tx, &records(&["a"])).expect_err("in progress");
        assert!(
            matches!(error, Error::Failed { .. }),
            "another try would fail too: {error:?}"
        );
        assert!(error.to_string().contains("still writing"), "{error}");
    }
    out.append_in(&tx, &records(&["a"])).expect("append");
    tx.commit().expect("commit");
    assert_eq!(numbered(&out).await.0, ["a"]);
}
