//! Readers: what they yield, and how they wait and fail.

use std::time::{Duration, Instant, UNIX_EPOCH};

use essentially_once::{Error, Log, NewRecord, Offset, Record};
use tokio::time::timeout;

use crate::support::{admin, assert_waits, numbered, orders, payloads, read, soon, take, texts};

pub(crate) async fn cancelled_calls_lose_and_repeat_nothing() {
    let (_server, _, log) = orders().await;
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    let appending = {
        let log = log.clone();
        tokio::spawn(async move {
            for n in 0..300 {
                log.append(&numbered(10 * n..10 * n + 10)).await.expect("append");
                tokio::time::sleep(Duration::from_micros(n as u64 % 7 * 300)).await;
            }
        })
    };
    let mut seen = Vec::new();
    let mut cancelled = 0;
    while seen.len() < 3_000 {
        match timeout(Duration::from_millis(1), reader.next(7)).await {
            Ok(records) => seen.extend(records.expect("next")),
            Err(_) => cancelled += 1,
        }
    }
    appending.await.expect("the appender");
    assert_eq!(payloads(&seen), texts(0..3_000));
    assert!(cancelled > 0, "no call was cancelled");
    assert_waits(&mut *reader).await;
}

pub(crate) async fn large_records_come_a_few_at_a_time() {
    const SIZE: usize = 5 * 1024 * 1024;
    let (server, _, log) = orders().await;
    for n in 0..12_u8 {
        log.append(&[NewRecord::new(vec![n; SIZE])]).await.expect("append");
    }
    admin(&server, &["CONFIG", "RESETSTAT"]);
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    for n in 0..12 {
        let records = soon(reader.next(10_000)).await.expect("next");
        assert_eq!(records.len(), 1);
        assert!(records[0].payload.len() == SIZE && records[0].payload[0] == n);
        if n == 0 {
            let stats = admin(&server, &["INFO", "stats"]);
            let sent: usize = stats
                .line("total_net_output_bytes")
                .expect("a count")
                .parse()
                .expect("a number");
            assert!(sent < 6 * SIZE, "for its first record a reader fetched {sent} bytes");
        }
    }
    // And many small ones at once.
    log.append(&numbered(0..5_000)).await.expect("append");
    let mut fetches = 0;
    let mut found = 0;
    while found < 5_000 {
        found += soon(reader.next(10_000)).await.expect("next").len();
        fetches += 1;
    }
    assert!(fetches < 50, "{fetches} fetches for 5,000 small records");
}

pub(crate) async fn other_peoples_entries_and_odd_ids() {
    let (server, _, log) = orders().await;
    admin(
        &server,
        &[
            "XADD", "orders", "5-0", "colour", "red", "payload", "x", "colour", "blue",
        ],
    );
    admin(&server, &["XADD", "orders", "5-1", "only", "headers"]);
    admin(
        &server,
        &["XADD", "orders", "6-0", "essentially-once", "2", "payload", "x"],
    );
    let records = read(&log, Offset::ZERO, 3).await;
    let offsets: Vec<_> = records.iter().map(|record| record.offset).collect();
    assert_eq!(offsets, [Offset::new(5, 0), Offset::new(5, 1), Offset::new(6, 0)]);
    assert_eq!(records[0].appended_at, UNIX_EPOCH + Duration::from_millis(5));
    let colours: Vec<_> = records[0].headers.iter().map(|(_, value)| &value[..]).collect();
    assert_eq!(
        (payloads(&records[..2]), colours),
        (vec!["x", ""], vec![&b"red"[..], b"blue"])
    );
    assert!(
        records[2]
            .malformed
            .as_deref()
            .is_some_and(|why| why.contains("version")),
        "{:?}",
        records[2]
    );
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (Offset::new(5, 0), Offset::new(6, 1)));
    // Ids go on from the clock's, which is far ahead; and below a number of the clock nothing is missed.
    log.append(&numbered(0..1)).await.expect("append");
    assert_eq!(payloads(&read(&log, Offset::new(6, 1), 1).await), ["0"]);
}

pub(crate) async fn the_last_id_of_all() {
    let (server, _, log) = orders().await;
    let last = Offset::new(u64::MAX, u64::MAX);
    admin(
        &server,
        &["XADD", "orders", &format!("{}-{}", u64::MAX, u64::MAX), "payload", "x"],
    );
    let mut reader = log.read(last).await.expect("read");
    let records = take(&mut *reader, 1).await;
    assert_eq!(records[0].offset, last);
    let error = soon(reader.next(1)).await.expect_err("nothing can follow");
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    log.bounds().await.expect("bounds");
}

pub(crate) async fn a_reader_fails_when_the_server_goes_and_the_next_goes_on() {
    let (server, _, log) = orders().await;
    log.append(&numbered(0..3)).await.expect("append");
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    let seen = take(&mut *reader, 3).await;
    assert_waits(&mut *reader).await;
    tokio::task::block_in_place(|| server.kill()).expect("kill");
    let error = soon(reader.next(1)).await.expect_err("the server is gone");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    let down = match log.read(Offset::ZERO).await {
        Ok(_) => panic!("it reads from a server that is gone"),
        Err(error) => error,
    };
    assert!(matches!(down, Error::Unavailable { .. }), "{down}");
    tokio::task::block_in_place(|| server.restart()).expect("restart");
    let mut reader = log.read(seen[2].offset.successor()).await.expect("read");
    let _ = log.append(&numbered(3..4)).await;
    log.append(&numbered(4..5)).await.expect("append");
    assert_eq!(payloads(&take(&mut *reader, 1).await).len(), 1);
}

pub(crate) async fn a_server_that_becomes_a_replica_is_left() {
    let (server, _, log) = orders().await;
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    assert_waits(&mut *reader).await;
    // Of a master that does not exist: it keeps what it has.
    admin(&server, &["REPLICAOF", "127.0.0.1", "1"]);
    let error = soon(reader.next(1)).await.expect_err("a replica");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    let error = log.append(&numbered(0..1)).await.expect_err("a replica");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    admin(&server, &["REPLICAOF", "NO", "ONE"]);
    log.append(&numbered(0..1)).await.expect("a master again");
    assert_eq!(payloads(&read(&log, Offset::ZERO, 1).await), ["0"]);
}

pub(crate) async fn a_spent_reader_says_so() {
    let (server, _, log) = orders().await;
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    admin(&server, &["DEL", "orders"]);
    soon(reader.next(1)).await.expect_err("gone");
    let error = soon(reader.next(1)).await.expect_err("spent");
    assert!(error.to_string().contains("open a new one"), "{error}");
}

pub(crate) async fn a_waiting_reader_is_woken_at_once() {
    let (_server, _, log) = orders().await;
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    let mut wakes = Vec::new();
    for n in 0..20 {
        assert!(timeout(Duration::from_millis(20), reader.next(1)).await.is_err());
        log.append(&numbered(n..n + 1)).await.expect("append");
        let appended = Instant::now();
        let records: Vec<Record> = soon(reader.next(1)).await.expect("next");
        wakes.push(appended.elapsed());
        assert_eq!(payloads(&records), [n.to_string()]);
    }
    // Another program may hold up any one of them, and hardly half of them.
    wakes.sort();
    assert!(wakes[10] < Duration::from_millis(500), "woken after {wakes:?}");
}
