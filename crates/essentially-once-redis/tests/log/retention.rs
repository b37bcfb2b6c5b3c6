//! Which readers report that records were removed, and which do not.

use std::time::Duration;

use essentially_once::{Error, Log, Offset, Record};
use essentially_once_redis::{LogOptions, Redis, RedisLog, Retention};
use test_servers::{RedisServer, Reply};

use crate::support::{
    add_spread, admin, assert_waits, keeping, numbered, orders, payloads, read, read_error, server, soon, take, texts,
};

/// An id far ahead of the clock.
const FAR: u64 = 5_000_000_000_000;

fn is_truncated(error: &Error, at: Offset, left: Offset) -> bool {
    matches!(error, Error::Truncated { requested, earliest, .. } if *requested == at && *earliest == left)
}

fn id(offset: Offset) -> String {
    format!("{}-{}", offset.hi(), offset.lo())
}

fn after(record: &Record) -> Offset {
    record.offset.successor()
}

pub(crate) async fn retention_keeps_a_number_of_records_and_readers_notice_losses() {
    let (server, redis, log) = orders().await;
    add_spread(&server, 1, 0..1_000);
    let all = read(&log, Offset::ZERO, 1_000).await;
    // Trim within one of the stream's nodes, which hold 100 entries each.
    let ours = keeping(&redis, 451).await;
    assert_eq!(ours.trim().await.expect("trim"), 549);
    assert_eq!(ours.trim().await.expect("trim"), 0);
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (all[549].offset, after(&all[999])));
    // A reader that has read all removed records has lost none, although none of them is left.
    assert_eq!(read(&log, after(&all[548]), 451).await, all[549..]);
    for lost in [Offset::ZERO, after(&all[100]), all[548].offset] {
        let error = read_error(&log, lost).await;
        assert!(is_truncated(&error, lost, all[549].offset), "{lost}: {error}");
    }
    // It also continues.
    log.append(&numbered(1_000..1_010)).await.expect("append");
    assert_eq!(ours.trim().await.expect("trim"), 10);
    assert_eq!(read(&log, after(&all[558]), 451).await[0], all[559]);
    assert!(is_truncated(
        &read_error(&log, after(&all[548])).await,
        after(&all[548]),
        all[559].offset
    ));
    // This is more than one step of the script removes.
    for _ in 0..12 {
        log.append(&numbered(0..10_000)).await.expect("append");
    }
    assert_eq!(ours.trim().await.expect("trim"), 120_000);
}

pub(crate) async fn removes_by_age() {
    let (server, redis, log) = orders().await;
    let of_age = |age| LogOptions::new().retention(Retention::new().max_age(age));
    let hour = redis
        .log_with("orders", of_age(Duration::from_secs(3600)))
        .await
        .expect("log");
    assert_eq!(hour.trim().await.expect("trim"), 0, "of an empty stream");
    for n in 1..=250 {
        admin(&server, &["XADD", "orders", &format!("{n}-0"), "payload", "old"]);
    }
    log.append(&numbered(0..3)).await.expect("append");
    let endless = redis.log_with("orders", of_age(Duration::MAX)).await.expect("log");
    assert_eq!(endless.trim().await.expect("trim"), 0);
    assert_eq!(hour.trim().await.expect("trim"), 250);
    let left = read(&log, Offset::new(250, 1), 3).await;
    assert_eq!(payloads(&left), texts(0..3));
    assert!(is_truncated(
        &read_error(&log, Offset::new(250, 0)).await,
        Offset::new(250, 0),
        left[0].offset
    ));
    // With two limits the stricter one counts. All records may be too old.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let both = Retention::new().max_records(2).max_age(Duration::from_millis(1));
    let both = redis
        .log_with("orders", LogOptions::new().retention(both))
        .await
        .expect("log");
    assert_eq!(both.trim().await.expect("trim"), 3);
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (after(&left[2]), after(&left[2])));
    assert_waits(&mut *log.read(bounds.end).await.expect("read")).await;
    assert!(is_truncated(
        &read_error(&log, left[2].offset).await,
        left[2].offset,
        bounds.end
    ));
}

pub(crate) async fn appends_trim_on_their_own() {
    let (server, redis) = server().await;
    let log = keeping(&redis, 10).await;
    log.append(&numbered(0..500)).await.expect("append");
    soon(async {
        while admin(&server, &["XLEN", "orders"]) != Reply::Int(10) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!(payloads(&read(&log, bounds.earliest, 10).await), texts(490..500));
}

pub(crate) async fn a_trim_by_others_is_exact_for_an_online_reader() {
    let (server, _, log) = orders().await;
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    for round in 0..5 {
        log.append(&numbered(0..10)).await.expect("append");
        let seen = take(&mut *reader, 10).await;
        assert_waits(&mut *reader).await;
        // One step removes everything that was read, and adds a record.
        match round % 2 {
            0 => {
                admin(&server, &["XADD", "orders", "MAXLEN", "=", "1", "*", "payload", "new"]);
            }
            _ => {
                admin(&server, &["XTRIM", "orders", "MAXLEN", "=", "0"]);
                admin(&server, &["XADD", "orders", "*", "payload", "new"]);
            }
        }
        assert_eq!(payloads(&take(&mut *reader, 1).await), ["new"], "round {round}");
        // A new reader cannot know.
        let error = read_error(&log, after(&seen[9])).await;
        assert!(matches!(error, Error::Truncated { .. }), "{error}");
    }
    // A reader in the middle of the stream knows too.
    add_spread(&server, FAR, 0..3_000);
    let seen = take(&mut *reader, 2_000).await;
    admin(&server, &["XTRIM", "orders", "MINID", "=", &id(after(&seen[1_999]))]);
    assert_eq!(payloads(&take(&mut *reader, 1_000).await), texts(2_000..3_000));
}

pub(crate) async fn a_reader_that_fell_behind_reports_it() {
    let (server, _, log) = orders().await;
    // The reader is online, and at the end except for one record that it had no time to read.
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    log.append(&numbered(0..10)).await.expect("append");
    let seen = take(&mut *reader, 10).await;
    admin(
        &server,
        &[
            "EVAL",
            "redis.call('XADD', 'orders', '*', 'payload', 'lost') \
        redis.call('XADD', 'orders', 'MAXLEN', '=', '1', '*', 'payload', 'left')",
            "0",
        ],
    );
    let left = log.bounds().await.expect("bounds").earliest;
    let error = soon(reader.next(1)).await.expect_err("a record was lost");
    assert!(is_truncated(&error, after(&seen[9]), left), "{error}");

    // The reader is online with a backlog. A trim removes part of it, and another removes all of
    // it.
    add_spread(&server, FAR, 0..50);
    let all = read(&log, left, 51).await;
    for keep in ["20", "0"] {
        let mut reader = log
            .read(log.bounds().await.expect("bounds").earliest)
            .await
            .expect("read");
        // The first request asks for 4 records, and the next is sent at once. Both fetch their
        // records before the removal.
        let mut held = take(&mut *reader, 4).await;
        admin(&server, &["XTRIM", "orders", "MAXLEN", "=", keep]);
        let left = log.bounds().await.expect("bounds").earliest;
        let error = loop {
            match soon(reader.next(4)).await {
                Ok(records) => held.extend(records),
                Err(error) => break error,
            }
        };
        let place = after(held.last().expect("some were read"));
        assert!(held.len() < 20, "{} records were held", held.len());
        assert!(is_truncated(&error, place, left), "{error}");
        let first = all.iter().position(|record| *record == held[0]).expect("among all");
        assert_eq!(held, all[first..first + held.len()]);
    }
}

pub(crate) async fn an_emptied_stream() {
    let (server, _, log) = orders().await;
    add_spread(&server, 1, 0..5);
    let all = read(&log, Offset::ZERO, 5).await;
    let end = after(&all[4]);
    let mut caught_up = log.read(end).await.expect("read");
    assert_waits(&mut *caught_up).await;
    admin(&server, &["XTRIM", "orders", "MAXLEN", "0"]);
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (end, end));
    for lost in [Offset::ZERO, all[4].offset] {
        assert!(is_truncated(&read_error(&log, lost).await, lost, end));
    }
    let mut new = log.read(end).await.expect("read");
    log.append(&numbered(5..6)).await.expect("append");
    for reader in [&mut caught_up, &mut new] {
        assert_eq!(payloads(&take(&mut **reader, 1).await), ["5"]);
    }
}

pub(crate) async fn a_deleted_middle_is_passed_over() {
    let (server, _, log) = orders().await;
    add_spread(&server, 1, 0..10);
    let all = read(&log, Offset::ZERO, 10).await;
    let mut online = log.read(Offset::ZERO).await.expect("read");
    take(&mut *online, 2).await;
    admin(&server, &["XDEL", "orders", &id(all[4].offset), &id(all[9].offset)]);
    let left: Vec<_> = [0, 1, 2, 3, 5, 6, 7, 8].map(|n: usize| all[n].clone()).into();
    assert_eq!(read(&log, all[0].offset, 8).await, left);
    assert_eq!(read(&log, all[4].offset, 4).await, left[4..]);
    // The last record is removed. The reader passes its place, and the end stays.
    let mut at_last = log.read(all[9].offset).await.expect("read");
    assert_waits(&mut *at_last).await;
    log.append(&numbered(10..11)).await.expect("append");
    assert_eq!(payloads(&take(&mut *at_last, 1).await), ["10"]);
    // Readers that passed the holes continue after a trim of the records that they have read.
    admin(&server, &["XTRIM", "orders", "MAXLEN", "=", "0"]);
    log.append(&numbered(11..12)).await.expect("append");
    assert_eq!(payloads(&take(&mut *at_last, 1).await), ["11"]);
}

pub(crate) async fn a_trim_by_others_before_ours_is_forgotten() {
    let (server, redis, log) = orders().await;
    add_spread(&server, 1, 0..100);
    let all = read(&log, Offset::ZERO, 100).await;
    let ours = keeping(&redis, 50).await;
    admin(&server, &["XTRIM", "orders", "MAXLEN", "=", "80"]);
    let error = read_error(&log, after(&all[19])).await;
    assert!(
        matches!(error, Error::Truncated { .. }),
        "a false alarm, since nobody can know: {error}"
    );
    assert_eq!(ours.trim().await.expect("trim"), 30);
    assert_eq!(read(&log, after(&all[49]), 50).await, all[50..]);
    assert!(matches!(
        read_error(&log, all[49].offset).await,
        Error::Truncated { .. }
    ));
    // Then other records are removed.
    admin(&server, &["XTRIM", "orders", "MAXLEN", "=", "40"]);
    assert!(matches!(
        read_error(&log, after(&all[49])).await,
        Error::Truncated { .. }
    ));
    assert_eq!(read(&log, all[60].offset, 40).await, all[60..]);
}

/// A log with 10 records of which retention keeps 4, and the offset after the removed ones.
async fn trimmed(server: &RedisServer, redis: &Redis, name: &str, stream: &str) -> (RedisLog, Offset) {
    let retention = Retention::new().max_records(4);
    let options = LogOptions::new().stream(stream).retention(retention);
    let log = redis.log_with(name, options).await.expect("log");
    for n in 0..10 {
        admin(server, &["XADD", stream, &format!("{}-0", 2 * n + 1), "payload", "x"]);
    }
    assert_eq!(log.trim().await.expect("trim"), 6);
    // No entry before this place is left, so only the retention hash shows that none after it is
    // missing.
    (log, Offset::new(11, 1))
}

pub(crate) async fn a_stream_and_its_namesake_in_braces_are_separate() {
    let (server, redis) = server().await;
    let (plain, from) = trimmed(&server, &redis, "plain", "s").await;
    let (braces, _) = trimmed(&server, &redis, "braces", "{s}").await;
    for log in [&plain, &braces] {
        assert_eq!(read(log, from, 4).await.len(), 4, "{}", log.id());
    }
}

pub(crate) async fn the_retention_hash_of_an_earlier_version_is_used() {
    let (server, redis) = server().await;
    let (log, from) = trimmed(&server, &redis, "braces", "{s}").await;
    let (now, before) = ("essentially-once:retention:}{s}", "essentially-once:retention:{s}");
    admin(&server, &["RENAME", now, before]);
    assert_eq!(read(&log, from, 4).await.len(), 4);
    // An instance of an earlier version trims after this version has.
    admin(&server, &["COPY", before, now]);
    admin(&server, &["XTRIM", "{s}", "MAXLEN", "3"]);
    admin(&server, &["HSET", before, "mark", "13-0", "gone", "7"]);
    assert_eq!(read(&log, Offset::new(13, 1), 3).await.len(), 3);
    let error = read_error(&log, Offset::new(13, 0)).await;
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
    // The hash of the stream `s` does not apply to `{s}`.
    admin(&server, &["DEL", now]);
    admin(&server, &["HSET", before, "incarnation", "another"]);
    let error = read_error(&log, Offset::new(13, 1)).await;
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
}

pub(crate) async fn removed_records_are_known_exactly_in_steps_of_any_number() {
    let (server, redis, log) = orders().await;
    add_spread(&server, 1, 0..1_000);
    let all = read(&log, Offset::ZERO, 1_000).await;
    // Within one of the stream's nodes, between two ids, and nothing.
    assert_eq!(log.remove_before(all[549].offset).await.expect("removed"), 549);
    assert_eq!(log.remove_before(after(&all[553])).await.expect("removed"), 5);
    for nothing in [Offset::ZERO, all[3].offset, all[554].offset] {
        assert_eq!(log.remove_before(nothing).await.expect("removed"), 0, "{nothing}");
    }
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (all[554].offset, after(&all[999])));
    // A reader that has read all removed records has lost none, although none of them is left.
    let other = redis.log("orders").await.expect("log");
    assert_eq!(read(&other, after(&all[553]), 446).await, all[554..]);
    let lost = all[553].offset;
    assert!(is_truncated(&read_error(&other, lost).await, lost, all[554].offset));
    let past = log
        .remove_before(bounds.end.successor())
        .await
        .expect_err("past the end");
    assert!(matches!(past, Error::OutOfRange { .. }), "{past}");
    // This is more than one step of the script removes.
    for _ in 0..12 {
        log.append(&numbered(0..10_000)).await.expect("append");
    }
    let end = log.bounds().await.expect("bounds").end;
    assert_eq!(log.remove_before(end).await.expect("removed"), 446 + 120_000);
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.end), (end, end));
    assert_waits(&mut *log.read(end).await.expect("read")).await;
}

pub(crate) async fn an_old_handle_removes_nothing_from_a_recreated_stream() {
    let (server, redis, log) = orders().await;
    log.append(&numbered(0..5)).await.expect("append");
    admin(&server, &["DEL", "orders"]);
    let new = redis.log("orders").await.expect("log");
    new.append(&numbered(0..5)).await.expect("append");
    let end = new.bounds().await.expect("bounds").end;
    let error = log.remove_before(end).await.expect_err("another stream");
    assert!(error.to_string().contains("deleted or created again"), "{error}");
    assert_eq!(admin(&server, &["XLEN", "orders"]), Reply::Int(5));
}
