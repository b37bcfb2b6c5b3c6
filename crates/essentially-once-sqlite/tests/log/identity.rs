//! Creating and deleting logs, and their names.

use essentially_once::{Error, Log, Offset, backend::Durability};
use essentially_once_sqlite::{LogOptions, Sqlite, rusqlite::Connection};
use tokio::time::timeout;

use super::{SOON, numbered, orders, payloads, read_to_end};

#[tokio::test]
async fn a_recreated_log_is_another_log() {
    let (_folder, sqlite, log) = orders().await;
    log.append(&numbered(0..3)).await.expect("append");
    let mut reading = log.read(Offset::ZERO).await.expect("read");
    let mut waiting = log.read(3.into()).await.expect("read");
    let shell = Connection::open(sqlite.path()).expect("open");
    shell
        .execute_batch("DELETE FROM essentially_once_logs; DROP TABLE essentially_once_log_1")
        .expect("delete");
    let recreated = sqlite.log("orders").await.expect("log");
    assert!(!recreated.id().is_same_log(log.id()));
    recreated.append(&numbered(0..9)).await.expect("append");
    for reader in [&mut reading, &mut waiting] {
        let next = timeout(SOON, reader.next(5)).await.expect("no silence");
        assert!(matches!(next, Err(Error::OutOfRange { .. })), "{next:?}");
    }
    for error in [
        log.append(&numbered(0..1)).await.err(),
        log.read(Offset::ZERO).await.err(),
        log.bounds().await.err(),
        log.trim().await.err(),
    ] {
        let error = error.expect("gone").to_string();
        assert!(error.contains("open it again"), "{error}");
    }
    assert_eq!(read_to_end(&recreated, 0, 10).await.len(), 9);
}

/// Records appended through an old handle must not become orphaned rows, or rows of a log that
/// replaced the old one.
#[tokio::test]
async fn an_append_to_a_deleted_log_fails_and_leaves_no_row() {
    let (_folder, sqlite, log) = orders().await;
    log.append(&numbered(0..3)).await.expect("append");
    let shell = Connection::open(sqlite.path()).expect("open");
    let count = |sql: &str| shell.query_row(sql, [], |row| row.get::<_, i64>(0));
    let refused = async |records: u64| {
        let error = log.append(&numbered(0..records)).await.expect_err("deleted");
        assert!(
            matches!(error, Error::Failed { .. }) && error.to_string().contains("open it again"),
            "{error}"
        );
        assert!(log.retention().await.is_err());
        assert!(log.trim().await.is_err());
    };
    // Deletes only the log's row, as a careless user might.
    shell.execute("DELETE FROM essentially_once_logs", []).expect("delete");
    for records in [1, 1_000] {
        refused(records).await;
        assert_eq!(count("SELECT count(*) FROM essentially_once_log_1").expect("count"), 3);
        assert_eq!(count("SELECT count(*) FROM essentially_once_logs").expect("count"), 0);
    }
    shell.execute_batch("DROP TABLE essentially_once_log_1").expect("drop");
    refused(1).await;
    assert!(
        count("SELECT count(*) FROM essentially_once_log_1").is_err(),
        "the table is not recreated"
    );

    let again = sqlite.log("orders").await.expect("log");
    for records in [1, 1_000] {
        refused(records).await;
        assert_eq!(again.bounds().await.expect("bounds").end, Offset::ZERO);
    }
    assert_eq!(again.append(&numbered(0..1)).await.expect("append"), Some(Offset::ZERO));
}

#[tokio::test]
async fn names_that_differ_in_case_or_at_the_end_are_distinct() {
    let (_folder, sqlite, _) = orders().await;
    let long = "x".repeat(100);
    let names = ["Orders", "orders", "ORDERS", "orders1", "orders2"].map(String::from);
    let names: Vec<_> = names
        .into_iter()
        .chain([format!("{long}a"), format!("{long}b")])
        .collect();
    for (n, name) in names.iter().enumerate() {
        let log = sqlite.log(name).await.expect("log");
        assert_eq!(log.id().name(), name);
        log.append(&numbered(n as u64..n as u64 + 1)).await.expect("append");
    }
    for (n, name) in names.iter().enumerate() {
        let log = sqlite.log(name).await.expect("log");
        assert_eq!(payloads(&read_to_end(&log, 0, 9).await), [n.to_string()], "{name}");
    }
}

#[tokio::test]
async fn a_log_that_must_exist_is_not_created() {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
    let existing = || LogOptions::new().existing();
    let refusal = async |name: &str| {
        let error = sqlite.log_with(name, existing()).await.expect_err("missing");
        assert!(matches!(error, Error::Failed { .. }), "{error:?}");
        error.to_string()
    };
    let text = refusal("orders").await;
    assert!(text.contains("holds no other log") && text.contains("a.db"), "{text}");
    let log = sqlite.log("orders").await.expect("created");
    sqlite.log_with("payments", LogOptions::new()).await.expect("created");
    let text = refusal("ordres").await;
    assert!(text.contains("orders, payments;"), "{text}");
    refusal("Orders").await;
    let opened = sqlite.log_with("orders", existing()).await.expect("it exists");
    assert_eq!(opened.id(), log.id());
    for n in 0..30 {
        sqlite.log(&format!("log-{n:02}")).await.expect("created");
    }
    let text = refusal("ordres").await;
    assert!(text.contains("log-19 and others") && !text.contains("log-20"), "{text}");
}

#[tokio::test]
async fn logs_of_one_file_are_separate_and_reopen() {
    let (_folder, sqlite, log) = orders().await;
    let other = sqlite.log("payments").await.expect("log");
    log.append(&numbered(0..2)).await.expect("append");
    other.append(&numbered(5..6)).await.expect("append");
    assert_eq!(payloads(&read_to_end(&other, 0, 9).await), ["5"]);
    let (path, id) = (sqlite.path().to_owned(), log.id().clone());
    drop((sqlite, log, other));
    let log = Sqlite::open(path)
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    assert_eq!(*log.id(), id);
    assert_eq!(payloads(&read_to_end(&log, 0, 9).await), ["0", "1"]);
    assert_eq!(log.durability().await.expect("durability"), Durability::Durable);
}

#[tokio::test]
async fn a_log_is_created_once_however_many_ask() {
    let (_folder, sqlite, _) = orders().await;
    let second = Sqlite::open(sqlite.path()).await.expect("open");
    let (a, b, c) = tokio::join!(sqlite.log("new"), second.log("new"), sqlite.log("new"));
    let (a, b, c) = (a.expect("log"), b.expect("log"), c.expect("log"));
    assert_eq!(a.id(), b.id());
    assert_eq!(a.id(), c.id());
    assert!(matches!(sqlite.log("a b").await, Err(Error::InvalidName { .. })));
}
