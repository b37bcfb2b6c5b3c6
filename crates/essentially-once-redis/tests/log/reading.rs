//! Readers: their records, their waiting, and their errors.

use std::{
    sync::Arc,
    time::{Duration, Instant, UNIX_EPOCH},
};

use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, Log, NewRecord, Offset, Record, async_trait,
};
use tokio::time::timeout;

use crate::support::{admin, assert_waits, numbered, orders, payloads, read, soon, take, texts};

pub(crate) async fn cancelled_calls_lose_and_repeat_nothing() {
    let (_server, _, log) = orders().await;
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    let on_empty = timeout(Duration::from_millis(1), reader.next(7)).await;
    assert!(on_empty.is_err(), "the log is empty");
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
    while seen.len() < 3_000 {
        if let Ok(records) = timeout(Duration::from_millis(1), reader.next(7)).await {
            seen.extend(records.expect("next"));
        }
    }
    appending.await.expect("the appender");
    assert_eq!(payloads(&seen), texts(0..3_000));
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
    // Many small records come at once.
    log.append(&numbered(0..5_000)).await.expect("append");
    let mut fetches = 0;
    let mut found = 0;
    while found < 5_000 {
        found += soon(reader.next(10_000)).await.expect("next").len();
        fetches += 1;
    }
    assert!(fetches < 50, "{fetches} fetches for 5,000 small records");
}

pub(crate) async fn a_fetch_is_bounded_for_records_of_any_size() {
    const MIB: usize = 1024 * 1024;
    // The overhead per request and record: protocol, field names, the extent of the stream.
    const MARGIN: usize = 400_000;
    let (server, _, log) = orders().await;
    let small = |n: usize| NewRecord::new(n.to_string()).header("kind", "small");
    for first in (0..12_000).step_by(1_000) {
        let records: Vec<_> = (first..first + 1_000).map(small).collect();
        log.append(&records).await.expect("append");
    }
    for large in 0..40 {
        log.append(&[NewRecord::new(vec![large; MIB]).header("kind", "large")])
            .await
            .expect("append");
    }
    let sent = || -> usize {
        let stats = admin(&server, &["INFO", "stats"]);
        stats
            .line("total_net_output_bytes")
            .expect("a count")
            .parse()
            .expect("a number")
    };
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    let (mut found, mut before, mut at_once) = (0, sent(), 0);
    while found < 12_040 {
        let records = soon(reader.next(usize::MAX)).await.expect("next");
        let bytes: usize = records.iter().map(Record::size).sum();
        assert!(
            bytes <= MIB || records.len() == 1,
            "{bytes} bytes in {} records",
            records.len()
        );
        found += records.len();
        let now = sent();
        // The reply, and the reply to the request that was sent ahead.
        at_once = at_once.max(now - before);
        before = now;
    }
    assert!(
        at_once <= 2 * MIB + 2 * MARGIN,
        "the server sent {at_once} bytes at once"
    );
}

pub(crate) async fn a_deleted_last_record_is_behind_the_readable_end() {
    let (server, redis, log) = orders().await;
    let end = || async {
        (
            log.bounds().await.expect("bounds").end,
            log.readable_end().await.expect("end"),
        )
    };
    assert_eq!(end().await, (Offset::ZERO, Offset::ZERO));
    let third = log.append(&numbered(0..3)).await.expect("append").expect("an offset");
    assert_eq!(end().await, (third.successor(), third.successor()));
    // Before a reader starts, and while one waits.
    let delete = |offset: Offset| {
        let id = format!("{}-{}", offset.hi(), offset.lo());
        assert_eq!(admin(&server, &["XDEL", "orders", &id]), test_servers::Reply::Int(1));
    };
    let first = log.bounds().await.expect("bounds").earliest;
    delete(third);
    let mut reader = log.read(first).await.expect("read");
    let seen = take(&mut *reader, 2).await;
    assert_eq!(end().await, (third.successor(), seen[1].offset.successor()));
    assert_waits(&mut *reader).await;
    let fourth = log.append(&numbered(3..4)).await.expect("append").expect("an offset");
    assert_eq!(end().await, (fourth.successor(), fourth.successor()));
    delete(fourth);
    assert_eq!(end().await, (fourth.successor(), seen[1].offset.successor()));
    // A skipped id was never a record.
    admin(&server, &["XSETID", "orders", "9000000000000-0"]);
    let skipped = Offset::new(9_000_000_000_000, 1);
    assert_eq!(end().await, (skipped, seen[1].offset.successor()));
    let empty = redis.log("returns").await.expect("log");
    admin(&server, &["XSETID", "returns", "9000000000000-0"]);
    let ends = (
        empty.bounds().await.expect("bounds").end,
        empty.readable_end().await.expect("end"),
    );
    assert_eq!(ends, (skipped, Offset::ZERO));
    // A deleted stream has no end.
    admin(&server, &["DEL", "orders"]);
    let error = log.readable_end().await.expect_err("gone");
    assert!(matches!(error, Error::Failed { .. }), "{error}");
}

/// Deletes the last record when it gets the first.
struct Deleting(Option<Box<dyn FnOnce() + Send>>);

#[async_trait]
impl<Tx: Send> Handler<Tx> for Deleting {
    async fn handle(&mut self, _: &Record, _: &mut Tx) -> Result<(), HandlerError> {
        if let Some(delete) = self.0.take() {
            delete();
        }
        Ok(())
    }
}

pub(crate) async fn a_deleted_last_record_keeps_no_consumer_waiting() {
    let (server, redis, log) = orders().await;
    let server = Arc::new(server);
    // More than twice the records that a consumer holds.
    log.append(&vec![NewRecord::new(vec![0; 1_000]); 20_000])
        .await
        .expect("append");
    let delete_last = {
        let server = Arc::clone(&server);
        move || {
            let last = admin(&server, &["XREVRANGE", "orders", "+", "-", "COUNT", "1"]);
            let last = last.list()[0].list()[0].text().to_owned();
            admin(&server, &["XDEL", "orders", &last]);
        }
    };
    // First while the consumer runs, then before one starts.
    let consumer = |handler| {
        let id = ConsumerId::new("shipping").expect("a name");
        Consumer::essentially_once(id, log.clone(), redis.store(), handler).max_batch(500)
    };
    let running = consumer(Deleting(Some(Box::new(delete_last.clone()))));
    let report = soon(running.run_until_caught_up()).await.expect("caught up");
    assert_eq!(report.handled, 19_999, "{report}");
    log.append(&numbered(10..12)).await.expect("append");
    delete_last();
    let report = soon(consumer(Deleting(None)).run_until_caught_up())
        .await
        .expect("caught up");
    assert_eq!(report.handled, 1, "{report}");
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
    // New ids continue from the clock, which is far ahead, and the reader misses no id below it.
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
    let error = soon(reader.next(1)).await.expect_err("no record can follow");
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    log.bounds().await.expect("bounds");
}

pub(crate) async fn a_reader_fails_with_its_server_and_the_next_continues() {
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
    log.append(&numbered(3..4)).await.expect("append");
    assert_eq!(payloads(&take(&mut *reader, 1).await), ["3"]);
}

pub(crate) async fn a_server_that_becomes_a_replica_is_left() {
    let (server, _, log) = orders().await;
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    assert_waits(&mut *reader).await;
    // Make it a replica of a master that does not exist, so it keeps its data.
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
    // Other load on the machine may delay single wake-ups, but hardly half of them.
    wakes.sort();
    assert!(wakes[10] < Duration::from_millis(500), "woken after {wakes:?}");
}
