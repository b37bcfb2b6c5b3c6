//! Appending records.

use std::time::Duration;

use bytes::Bytes;
use essentially_once::{Epoch, Error, Log, NewRecord, Offset, Origin, ProducerId};
use essentially_once_sqlite::{SqliteOptions, rusqlite::Connection};
use tokio::time::timeout;

use super::{SOON, numbered, orders, payloads, read_to_end};

#[tokio::test]
async fn offsets_are_dense_and_begin_at_zero() {
    let (_folder, _, log) = orders().await;
    assert_eq!(log.append(&[]).await.expect("nothing"), None);
    assert_eq!(log.append(&numbered(0..3)).await.expect("append"), Some(2.into()));
    assert_eq!(log.append(&numbered(3..4)).await.expect("append"), Some(3.into()));
    for (from, step) in [(0, 1), (0, 100), (2, 2), (3, 1)] {
        let records = read_to_end(&log, from, step).await;
        assert_eq!(payloads(&records), (from..4).map(|n| n.to_string()).collect::<Vec<_>>());
        assert_eq!(records[0].offset, from.into());
    }
}

#[tokio::test]
async fn large_appends_keep_their_order() {
    let (_folder, _, log) = orders().await;
    assert_eq!(log.append(&numbered(0..1000)).await.expect("append"), Some(999.into()));
    assert_eq!(
        payloads(&read_to_end(&log, 0, 300).await),
        (0..1000).map(|n| n.to_string()).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn every_field_round_trips() {
    let (_folder, _, log) = orders().await;
    let producer = ProducerId::new("web").expect("name");
    let binary: Vec<u8> = (0..=255).collect();
    let new = [
        NewRecord::new(binary.clone())
            .key(binary.clone())
            .header("h", binary.clone())
            .header("h", ""),
        NewRecord::new("")
            .key("")
            .origin(Origin::new(producer.clone(), Epoch::new(u64::MAX), u64::MAX)),
        NewRecord::new("").origin(Origin::new(producer, Epoch::STABLE, 0)),
    ];
    log.append(&new).await.expect("append");
    for (read, new) in read_to_end(&log, 0, 10).await.iter().zip(new) {
        assert_eq!(
            (&read.key, &read.headers, &read.payload),
            (&new.key, &new.headers, &new.payload)
        );
        assert_eq!(read.origin, new.origin);
        assert_eq!(read.malformed, None);
        assert!(read.appended_at.elapsed().expect("past") < SOON);
    }
}

#[tokio::test]
async fn a_record_over_the_limit_is_refused_before_anything_is_appended() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().record_limit(100_000);
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    for size in [0, 1, 65_536, 65_537, 100_000] {
        log.append(&[NewRecord::new(vec![1; size])])
            .await
            .expect("within the limit");
    }
    let mix = [NewRecord::new("fine"), NewRecord::new(vec![1; 99_999]).key("ab")];
    assert!(matches!(
        log.append(&mix).await,
        Err(Error::TooLarge {
            size: 100_001,
            limit: 100_000,
            ..
        })
    ));
    let sizes: Vec<_> = read_to_end(&log, 0, 10)
        .await
        .iter()
        .map(|record| record.payload.len())
        .collect();
    assert_eq!(sizes, [0, 1, 65_536, 65_537, 100_000]);
    assert!(
        SqliteOptions::new()
            .record_limit(usize::MAX)
            .open(folder.path().join("b.db"))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_dropped_append_leaves_all_or_nothing() {
    let (_folder, _, log) = orders().await;
    for micros in [0, 1, 50, 200, 1000, 5000] {
        let before = log.bounds().await.expect("bounds").end.lo();
        let _ = timeout(Duration::from_micros(micros), log.append(&numbered(0..2000))).await;
        // The next append waits for the dropped one if that still runs.
        log.append(&[NewRecord::new(Bytes::new())]).await.expect("append");
        let added = log.bounds().await.expect("bounds").end.lo() - before;
        assert!(added == 1 || added == 2001, "{added}");
    }
}

#[tokio::test]
async fn offsets_at_the_limits_of_sqlite_integers_lose_nothing() {
    let (_folder, sqlite, log) = orders().await;
    log.append(&numbered(0..2)).await.expect("append");
    let by_hand = Connection::open(sqlite.path()).expect("open");
    let insert = "INSERT INTO essentially_once_log_1 (\"offset\", payload) VALUES (?1, 'by hand')";
    by_hand.execute(insert, [-5]).expect("below all offsets");
    assert_eq!(log.bounds().await.expect("bounds").earliest, Offset::ZERO);
    assert_eq!(payloads(&read_to_end(&log, 0, 10).await), ["0", "1"]);

    by_hand.execute(insert, [i64::MAX - 1]).expect("near the end");
    let error = log.append(&numbered(2..4)).await.expect_err("one too many");
    assert!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("new log"),
        "{error}"
    );
    let end = Offset::from(i64::MAX as u64);
    assert_eq!(log.bounds().await.expect("bounds").end, end, "nothing was appended");
}

#[tokio::test]
async fn the_longest_busy_timeout_overflows_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let longest = Duration::from_secs(365 * 24 * 60 * 60);
    let options = SqliteOptions::new().busy_timeout(longest);
    let log = options
        .open(folder.path().join("a.db"))
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    log.append(&numbered(0..1)).await.expect("append");
    assert_eq!(payloads(&read_to_end(&log, 0, 1).await), ["0"]);
    let longer = options.busy_timeout(longest + Duration::from_nanos(1));
    let error = longer.open(folder.path().join("b.db")).await.expect_err("too long");
    assert!(
        matches!(
            error,
            Error::InvalidSetting {
                setting: "busy_timeout",
                ..
            }
        ) && error.to_string().contains("365 days"),
        "{error}"
    );
    assert!(!folder.path().join("b.db").exists());
}
