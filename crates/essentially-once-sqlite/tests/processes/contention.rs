//! Many processes that want the write lock.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use essentially_once::{Consumer, ConsumerId, Log, NewRecord, Record, handler_fn};
use essentially_once_sqlite::{Sqlite, SqliteTx, rusqlite::Connection};
use tokio::time::{sleep, timeout};

use super::{LONG, Process, given_file, until};

/// The file in which an appender records, for each append, its duration in microseconds and the
/// number of commits by others ahead of it.
fn waits_file(path: &Path, process: u32) -> PathBuf {
    path.with_extension(format!("waits-{process}"))
}

/// Commits batches of ten that take 50 ms, under its own consumer name.
#[tokio::test]
#[ignore = "a child process of contend"]
async fn child_consumes_slowly() {
    let Some(path) = given_file() else { return };
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("backlog").await.expect("log");
    let handler = handler_fn(|_: &Record, _: &mut SqliteTx| {
        Box::pin(async move {
            sleep(Duration::from_millis(5)).await;
            Ok(())
        })
    });
    let name = ConsumerId::new(format!("slow-{}", std::process::id())).expect("name");
    let consumer = Consumer::essentially_once(name, log, sqlite.store(), handler);
    consumer.run().await.expect("run");
}

#[tokio::test]
#[ignore = "a child process of contend"]
async fn child_appends_and_notes_how_long_it_waits() {
    let Some(path) = given_file() else { return };
    let mut waits = fs::File::create(waits_file(&path, std::process::id())).expect("create");
    let log = Sqlite::open(&path)
        .await
        .expect("open")
        .log("incoming")
        .await
        .expect("log");
    let shell = Connection::open(&path).expect("open");
    let mut commits = shell
        .prepare(
            "SELECT total(count) + (SELECT max(next) FROM essentially_once_logs WHERE name = 'incoming')
             FROM essentially_once_consumers",
        )
        .expect("prepare");
    let mut commits = || commits.query_row([], |row| row.get::<_, f64>(0)).expect("count");
    loop {
        let (before, started) = (commits(), Instant::now());
        log.append(&[NewRecord::new("x")]).await.expect("append");
        let took = started.elapsed().as_micros();
        // One write per line, so that a kill truncates no line.
        let line = format!("{took} {}\n", commits() - before - 1.0);
        waits.write_all(line.as_bytes()).expect("write");
        sleep(Duration::from_millis(5)).await;
    }
}

/// The duration of each append and the number of commits by others ahead of it, both sorted.
struct Waits {
    took: Vec<Duration>,
    overtaken: Vec<u64>,
}

impl Waits {
    /// The value that this percentage of the appends does not exceed.
    fn percentile<T: Copy>(sorted: &[T], percent: usize) -> Option<T> {
        let place = sorted.len() * percent / 100;
        sorted.get(place.min(sorted.len().saturating_sub(1))).copied()
    }
}

/// Runs that many consumers with a backlog and appenders on one file, each in its own process. It
/// takes that time, or longer on a slow machine, until there are that many appends.
async fn contend(consumers: usize, appenders: usize, time: Duration, appends: usize) -> Waits {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let backlog: Vec<_> = (0..20_000).map(|n| NewRecord::new(n.to_string())).collect();
    let log = sqlite.log("backlog").await.expect("log");
    log.append(&backlog).await.expect("append");
    let mut working: Vec<_> = (0..consumers)
        .map(|_| Process::start("contention::child_consumes_slowly", &path))
        .collect();
    let shell = Connection::open(&path).expect("open");
    until(|| {
        let begun = "SELECT count(*) FROM essentially_once_consumers";
        let begun: i64 = shell.query_row(begun, [], |row| row.get(0)).expect("count");
        begun == consumers as i64
    })
    .await;
    let mut appending: Vec<_> = (0..appenders)
        .map(|_| Process::start("contention::child_appends_and_notes_how_long_it_waits", &path))
        .collect();
    sleep(time).await;
    let noted = |appender: &Process| fs::read_to_string(waits_file(&path, appender.0.id())).unwrap_or_default();
    until(|| {
        appending
            .iter()
            .map(|appender| noted(appender).lines().count())
            .sum::<usize>()
            >= appends
    })
    .await;
    let mut waits = Waits {
        took: Vec::new(),
        overtaken: Vec::new(),
    };
    for appender in &mut appending {
        assert!(appender.0.try_wait().expect("wait").is_none(), "an append failed");
        appender.kill();
        for line in noted(appender).lines() {
            let (micros, commits) = line.split_once(' ').expect("two numbers");
            waits
                .took
                .push(Duration::from_micros(micros.parse().expect("a number")));
            waits.overtaken.push(commits.parse().expect("a number"));
        }
    }
    for consumer in &mut working {
        assert!(consumer.0.try_wait().expect("wait").is_none(), "a consumer ended");
        consumer.kill();
    }
    let handled =
        "SELECT total(next_lo), coalesce(min(next_lo), 0), coalesce(max(next_lo), 0) FROM essentially_once_consumers";
    let handled: (f64, i64, i64) = shell
        .query_row(handled, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .expect("count");
    waits.took.sort();
    waits.overtaken.sort_unstable();
    eprintln!(
        "{consumers} consumers, {appenders} appenders, {time:?}: {} appends; {} records handled, by each {} to {}",
        waits.took.len(),
        handled.0,
        handled.1,
        handled.2,
    );
    for percent in [50, 90, 99, 100] {
        if let Some(took) = Waits::percentile(&waits.took, percent)
            && let Some(overtaken) = Waits::percentile(&waits.overtaken, percent)
        {
            eprintln!("    {percent} %: at most {took:?}, and {overtaken} commits of others before it");
        }
    }
    waits
}

/// A busy consumer used to lock others out for longer than the busy timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_appender_gets_its_turn_next_to_busy_consumers() {
    let waits = contend(2, 2, Duration::from_secs(4), 12).await;
    // Two batches and another append are ahead of it, and one more may be running when the wait
    // begins.
    let overtaken = Waits::percentile(&waits.overtaken, 75).expect("some");
    assert!(overtaken <= 4, "{:?}", waits.overtaken);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: cargo test --release -p essentially-once-sqlite --test processes measure_ -- --ignored --nocapture"]
async fn measure_how_long_appenders_wait() {
    for (consumers, appenders, seconds) in [(0, 1, 10), (1, 0, 10), (1, 1, 20), (10, 10, 40)] {
        contend(consumers, appenders, Duration::from_secs(seconds), 0).await;
    }
}

/// Whether a process is inside the turnstile.
fn someone_waits(path: &Path) -> bool {
    let turnstile = fs::File::open(path.with_extension("db-turn")).expect("the turnstile");
    turnstile.try_lock().is_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_waiter_blocks_nobody() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let log = Sqlite::open(&path)
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    let shell = Connection::open(&path).expect("open");
    shell.execute_batch("BEGIN IMMEDIATE").expect("lock");
    let mut waiter = Process::start("child_appends", &path);
    until(|| someone_waits(&path)).await;
    let append = tokio::spawn({
        let log = log.clone();
        async move { log.append(&[NewRecord::new("x")]).await }
    });
    waiter.kill();
    shell.execute_batch("COMMIT").expect("unlock");
    timeout(LONG, append)
        .await
        .expect("in time")
        .expect("no panic")
        .expect("append");
    assert_eq!(log.bounds().await.expect("bounds").end, 1.into());
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_waiter_is_bypassed() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let log = Sqlite::open(&path)
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    let shell = Connection::open(&path).expect("open");
    shell.execute_batch("BEGIN IMMEDIATE").expect("lock");
    let mut waiter = Process::start("child_appends", &path);
    until(|| someone_waits(&path)).await;
    waiter.freeze().await;
    shell.execute_batch("COMMIT").expect("unlock");
    assert!(someone_waits(&path), "it was stopped inside");
    for _ in 0..3 {
        let appended = timeout(LONG, log.append(&[NewRecord::new("x")])).await;
        appended.expect("in time").expect("append");
    }
    waiter.signal("-CONT");
    waiter.succeeds().await;
    assert_eq!(log.bounds().await.expect("bounds").end, 103.into());
}
