//! Helpers for the tests.

use std::time::Duration;

use essentially_once::{Error, Log, NewRecord, Offset, Record, backend::LogReader};
use essentially_once_redis::{LogOptions, Redis, RedisLog, Retention};
use test_servers::{RedisServer, Reply};
use tokio::time::timeout;

/// A durable server, and a handle to it.
pub(crate) async fn server() -> (RedisServer, Redis) {
    let server = RedisServer::durable().start().expect("a server");
    let redis = Redis::connect(&server.url()).await.expect("connect");
    (server, redis)
}

pub(crate) async fn orders() -> (RedisServer, Redis, RedisLog) {
    let (server, redis) = server().await;
    let log = redis.log("orders").await.expect("log");
    (server, redis, log)
}

/// The log `orders` through a handle that keeps this many records.
pub(crate) async fn keeping(redis: &Redis, records: u64) -> RedisLog {
    let retention = Retention::new().max_records(records);
    let options = LogOptions::new().retention(retention);
    redis.log_with("orders", options).await.expect("log")
}

pub(crate) fn numbered(range: std::ops::Range<usize>) -> Vec<NewRecord> {
    range.map(|n| NewRecord::new(n.to_string())).collect()
}

/// Runs a command as an administrator.
pub(crate) fn admin(server: &RedisServer, command: &[&str]) -> Reply {
    server.command(command).expect("a command")
}

/// Adds records to `orders` with the ids `<first + n>-0`, none of which is the successor of
/// another.
pub(crate) fn add_spread(server: &RedisServer, first: u64, range: std::ops::Range<usize>) {
    let script = "for n = ARGV[2], ARGV[3] - 1 do \
        redis.call('XADD', 'orders', string.format('%.0f-0', ARGV[1] + n), 'payload', string.format('%.0f', n)) end";
    let (first, start, end) = (first.to_string(), range.start.to_string(), range.end.to_string());
    admin(server, &["EVAL", script, "0", &first, &start, &end]);
}

pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future).await.expect("soon")
}

/// Reads this many records.
pub(crate) async fn take(reader: &mut dyn LogReader, count: usize) -> Vec<Record> {
    let mut records = Vec::new();
    while records.len() < count {
        records.extend(soon(reader.next(count - records.len())).await.expect("next"));
    }
    records
}

/// The first `count` records at or after `from`.
pub(crate) async fn read(log: &RedisLog, from: Offset, count: usize) -> Vec<Record> {
    take(&mut *log.read(from).await.expect("read"), count).await
}

/// The error of a read at `from`, which may come from `read` or from `next`.
pub(crate) async fn read_error(log: &RedisLog, from: Offset) -> Error {
    match log.read(from).await {
        Ok(mut reader) => soon(reader.next(10)).await.expect_err("an error"),
        Err(error) => error,
    }
}

/// Checks that a reader at `from` finds no error and no record.
pub(crate) async fn assert_waits(reader: &mut dyn LogReader) {
    let early = timeout(Duration::from_millis(200), reader.next(10)).await;
    assert!(early.is_err(), "the reader should wait, but returned {early:?}");
}

pub(crate) fn payloads(records: &[Record]) -> Vec<&str> {
    records
        .iter()
        .map(|record| str::from_utf8(&record.payload).expect("text"))
        .collect()
}

/// The payloads `0`, `1`, ... as text.
pub(crate) fn texts(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}
