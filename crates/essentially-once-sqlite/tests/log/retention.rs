//! Removing records.

use std::time::Duration;

use essentially_once::{Error, Log, Offset};
use essentially_once_sqlite::{LogOptions, Retention, Sqlite, SqliteLog, rusqlite::Connection};

use super::{numbered, orders, payloads, read_to_end};

/// Opens the log `orders` with a retention.
async fn set_retention(sqlite: &Sqlite, retention: Retention) -> Result<SqliteLog, Error> {
    sqlite.log_with("orders", LogOptions::new().retention(retention)).await
}

#[tokio::test]
async fn retention_by_count_applies_to_every_appender() {
    let (_folder, sqlite, log) = orders().await;
    assert_eq!(log.retention().await.expect("retention"), Retention::default());
    let keep = Retention::new().max_records(10);
    set_retention(&sqlite, keep).await.expect("set");
    let other = Sqlite::open(sqlite.path())
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    assert_eq!(other.retention().await.expect("retention"), keep);
    for n in 0..30 {
        other.append(&numbered(n..n + 1)).await.expect("append");
    }
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (20.into(), 30.into()));
    assert!(set_retention(&sqlite, Retention::new().max_records(0)).await.is_err());
}

#[tokio::test]
async fn a_backlog_is_trimmed_bit_by_bit_or_at_once() {
    let (_folder, sqlite, log) = orders().await;
    log.append(&numbered(0..25_000)).await.expect("append");
    let keep = |records| Retention::new().max_records(records);
    set_retention(&sqlite, keep(100)).await.expect("set");
    log.append(&numbered(0..1)).await.expect("append");
    let earliest = log.bounds().await.expect("bounds").earliest.lo();
    assert!(earliest > 0 && earliest < 1000, "a bounded part: {earliest}");
    assert_eq!(log.trim().await.expect("trim"), 25_001 - 100 - earliest);
    assert_eq!(log.trim().await.expect("trim"), 0);
    assert_eq!(log.bounds().await.expect("bounds").earliest, 24_901.into());
}

#[tokio::test]
async fn offsets_are_not_reused_after_all_records_expired() {
    let (_folder, sqlite, log) = orders().await;
    log.append(&numbered(0..5)).await.expect("append");
    let second = Retention::new().max_age(Duration::from_secs(1));
    set_retention(&sqlite, second).await.expect("set");
    assert_eq!(log.trim().await.expect("trim"), 0, "too young");
    let edit = Connection::open(sqlite.path()).expect("open");
    edit.execute_batch(
        "UPDATE essentially_once_log_1 SET appended_at = appended_at - 5000;
         UPDATE essentially_once_log_1 SET appended_at = 'x' WHERE \"offset\" = 1",
    )
    .expect("age");
    assert_eq!(log.trim().await.expect("trim"), 5);
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (5.into(), 5.into()));
    assert!(matches!(log.read(4.into()).await.err(), Some(Error::Truncated { earliest, .. }) if earliest == 5.into()));
    assert_eq!(log.append(&numbered(0..1)).await.expect("append"), Some(5.into()));
    assert_eq!(read_to_end(&log, 5, 9).await.len(), 1);
}

#[tokio::test]
async fn a_reader_that_retention_overtook_gets_an_error() {
    let (_folder, sqlite, log) = orders().await;
    log.append(&numbered(0..10)).await.expect("append");
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    assert_eq!(reader.next(2).await.expect("next").len(), 2);
    set_retention(&sqlite, Retention::new().max_records(3))
        .await
        .expect("set");
    log.trim().await.expect("trim");
    assert!(matches!(
        reader.next(2).await,
        Err(Error::Truncated { requested, earliest, .. }) if requested == 2.into() && earliest == 7.into()
    ));
    let error = log.read(6.into()).await.err().expect("trimmed");
    assert!(matches!(error, Error::Truncated { earliest, .. } if earliest == 7.into()));
    assert_eq!(payloads(&read_to_end(&log, 7, 9).await), ["7", "8", "9"]);
}

#[tokio::test]
async fn retention_is_stored_in_the_file_until_it_is_set_again() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let keep = Retention::new().max_records(5).max_age(Duration::from_secs(60));
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = set_retention(&sqlite, keep).await.expect("created with a retention");
    assert_eq!(log.retention().await.expect("retention"), keep);
    drop((sqlite, log));
    let sqlite = Sqlite::open(&path).await.expect("open");
    let existing = LogOptions::new().existing();
    let log = sqlite.log_with("orders", existing.clone()).await.expect("log");
    assert_eq!(log.retention().await.expect("retention"), keep, "the stored one stays");
    for refused in [
        Retention::new().max_bytes(1_000),
        Retention::new().max_age(Duration::ZERO),
        Retention::new().max_records(u64::MAX),
    ] {
        let error = set_retention(&sqlite, refused).await.expect_err("refused");
        assert!(
            matches!(
                error,
                Error::InvalidSetting {
                    setting: "retention",
                    ..
                }
            ),
            "{error:?}"
        );
        assert_eq!(log.retention().await.expect("retention"), keep);
    }
    let none = existing.clone().retention(Retention::new());
    sqlite.log_with("orders", none).await.expect("set");
    assert_eq!(log.retention().await.expect("retention"), Retention::new());
    let missing = existing.retention(keep);
    sqlite
        .log_with("ordres", missing.clone())
        .await
        .expect_err("it does not exist");
    sqlite
        .log_with("ordres", missing)
        .await
        .expect_err("it was not created");
}

#[tokio::test]
async fn records_are_removed_in_steps_past_holes_and_rows_of_others() {
    let (_folder, sqlite, log) = orders().await;
    log.append(&numbered(0..25_000)).await.expect("append");
    let edit = Connection::open(sqlite.path()).expect("open");
    // A hole of more than one step, and a row past the stored end.
    edit.execute_batch(
        "DELETE FROM essentially_once_log_1 WHERE \"offset\" BETWEEN 100 AND 21000;
         INSERT INTO essentially_once_log_1 (\"offset\", appended_at, payload) VALUES (25000, 0, 'by hand')",
    )
    .expect("edit");
    assert_eq!(log.remove_before(24_000.into()).await.expect("removed"), 100 + 2_999);
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (24_000.into(), 25_001.into()));
    let past = log.remove_before(25_002.into()).await.expect_err("past the end");
    assert!(matches!(past, Error::OutOfRange { .. }), "{past}");
    assert_eq!(log.remove_before(25_001.into()).await.expect("removed"), 1_001);
    assert_eq!(log.append(&numbered(0..1)).await.expect("append"), Some(25_001.into()));
}

#[tokio::test]
async fn appends_go_on_between_the_steps_of_a_removal() {
    let (_folder, _sqlite, log) = orders().await;
    for _ in 0..5 {
        log.append(&numbered(0..20_000)).await.expect("append");
    }
    let removal = log.remove_before(100_000.into());
    let mut earliest = Vec::new();
    let appends = async {
        // Each append waits for one step at most, since the writers take turns.
        while earliest.last() != Some(&100_000) {
            log.append(&numbered(0..1)).await.expect("append");
            earliest.push(log.bounds().await.expect("bounds").earliest.lo());
        }
    };
    let (removed, ()) = tokio::join!(removal, appends);
    assert_eq!(removed.expect("removed"), 100_000);
    assert!(
        earliest.iter().any(|earliest| (1..100_000).contains(earliest)),
        "{earliest:?}"
    );
}

#[tokio::test]
async fn a_deleted_log_removes_nothing() {
    let (_folder, sqlite, log) = orders().await;
    log.append(&numbered(0..5)).await.expect("append");
    let edit = Connection::open(sqlite.path()).expect("open");
    edit.execute_batch("DELETE FROM essentially_once_logs; DROP TABLE essentially_once_log_1")
        .expect("delete");
    let new = sqlite.log("orders").await.expect("created again");
    new.append(&numbered(0..5)).await.expect("append");
    let error = log.remove_before(3.into()).await.expect_err("another log");
    assert!(error.to_string().contains("deleted or recreated"), "{error}");
    assert_eq!(new.bounds().await.expect("bounds").earliest, Offset::ZERO);
}
