//! A handler's SQL.

use std::{
    fs,
    io::{Seek, SeekFrom, Write},
};

use essentially_once::{Error, KeyValue, Log, NewRecord, OffsetStore, backend::Transaction};
use essentially_once_sqlite::{
    LogOptions, Retention, Sqlite,
    rusqlite::{Connection, ErrorCode},
    sqlite_error,
};

use super::{advance, open, shipping, staged, state};

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
