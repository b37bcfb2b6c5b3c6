//! Several processes on one file, some of which are killed. A test starts this program again as a
//! child, which runs one of the ignored tests below. `Child::kill` is SIGKILL on Unix.

use std::{
    env,
    fs::{self, OpenOptions},
    hash::{BuildHasher, RandomState},
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Epoch, Error, Handler, Log, NewRecord, Offset, OffsetStore, Origin,
    ProducerId, Record,
    backend::{Advance, Revision, Transaction},
    handler_fn,
};
use essentially_once_sqlite::{Sqlite, SqliteTx, rusqlite::Connection};
use essentially_once_testkit::{Check, Expectation, Ledger, read_ledger, read_log};
use tokio::time::{sleep, timeout};

const FILE: &str = "ESSENTIALLY_ONCE_SQLITE_TEST_FILE";
const LONG: Duration = Duration::from_secs(60);

/// A child process that is killed at the end of the test.
struct Process(Child);

impl Process {
    fn start(role: &str, path: &Path) -> Self {
        let child = Command::new(env::current_exe().expect("this program"))
            .args([role, "--exact", "--ignored", "--test-threads=1"])
            .env(FILE, path)
            .stdout(Stdio::null())
            .spawn()
            .expect("start");
        Self(child)
    }

    /// Starts a child with a limit on open files.
    #[cfg(unix)]
    fn start_with_few_descriptors(role: &str, path: &Path, limit: u32) -> Self {
        let child = Command::new("sh")
            .args(["-c", &format!("ulimit -n {limit} && exec \"$@\""), "sh"])
            .arg(env::current_exe().expect("this program"))
            .args([role, "--exact", "--ignored", "--test-threads=1"])
            .env(FILE, path)
            .stdout(Stdio::null())
            .spawn()
            .expect("start");
        Self(child)
    }

    /// Sends a signal, to stop or to continue the child.
    #[cfg(unix)]
    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.0.id().to_string()]).status();
        assert!(sent.expect("kill").success());
    }

    /// Stops it, and waits until all its threads have stopped. A thread that still ran could take
    /// the lock first.
    #[cfg(unix)]
    async fn freeze(&self) {
        self.signal("-STOP");
        let threads = format!("/proc/{}/task", self.0.id());
        // Only Linux shows the threads.
        if let Ok(threads) = fs::read_dir(threads) {
            let threads: Vec<_> = threads.map(|thread| thread.expect("thread").path()).collect();
            until(|| {
                threads.iter().all(|thread| {
                    let status = fs::read_to_string(thread.join("status"));
                    status.is_ok_and(|status| status.contains("State:\tT"))
                })
            })
            .await;
        }
    }

    fn kill(&mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("wait");
    }

    async fn succeeds(&mut self) {
        let mut status = None;
        until(|| {
            status = self.0.try_wait().expect("wait");
            status.is_some()
        })
        .await;
        assert!(status.is_some_and(|status| status.success()));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The file that this child was started for. `None` if a person runs the ignored tests by hand.
fn given_file() -> Option<PathBuf> {
    env::var_os(FILE).map(PathBuf::from)
}

fn counting() -> ConsumerId {
    ConsumerId::new("counting").expect("name")
}

/// Counts in the user's own tables how often each record was handled.
fn count(tx: &mut SqliteTx, record: &Record) -> Result<(), Error> {
    tx.execute("UPDATE total SET handled = handled + 1", [])?;
    let upsert = "INSERT INTO counts VALUES (?1, 1) ON CONFLICT (record) DO UPDATE SET times = times + 1";
    tx.execute(upsert, [record.offset.lo() as i64])?;
    Ok(())
}

fn create_counts(path: &Path) -> Connection {
    let shell = Connection::open(path).expect("open");
    shell.busy_timeout(LONG).expect("timeout");
    shell
        .execute_batch(
            "CREATE TABLE total (handled INTEGER); INSERT INTO total VALUES (0);
             CREATE TABLE counts (record INTEGER PRIMARY KEY, times INTEGER)",
        )
        .expect("create");
    shell
}

/// Returns the total, the number of distinct records, and how often the most frequent one was
/// handled.
fn counts(shell: &Connection) -> (i64, i64, i64) {
    shell
        .query_row(
            "SELECT (SELECT handled FROM total), count(*), coalesce(max(times), 0) FROM counts",
            [],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .expect("counts")
}

/// Checks the ledger of the file's consumer against log and position, while no worker runs. Returns
/// the number of applied records.
async fn check(sqlite: &Sqlite, drained: bool) -> usize {
    let log = sqlite.log("orders").await.expect("log");
    let records = read_log(&log).await.expect("records");
    let applied = read_ledger(&sqlite.store(), &counting()).await.expect("ledger");
    let position = sqlite.store().position(&counting()).await.expect("position");
    let check = Check::new(&records, &applied).position(position.as_ref());
    let check = if drained { check.drained() } else { check };
    check
        .findings()
        .judge(Expectation::EssentiallyOnce)
        .expect("essentially once");
    applied.len()
}

/// Records of seven keys, each with an origin. Every tenth record is sent again fifty records
/// later.
fn keyed(count: u64) -> Vec<NewRecord> {
    let producer = ProducerId::new("web").expect("name");
    let record = |n: u64| {
        NewRecord::new(n.to_string())
            .key((n % 7).to_string())
            .origin(Origin::new(producer.clone(), Epoch::STABLE, n))
    };
    (0..count)
        .flat_map(|n| {
            let again = n.checked_sub(50).filter(|again| again % 10 == 0);
            [Some(n), again]
        })
        .flatten()
        .map(record)
        .collect()
}

/// Polls for an effect of another process, which sends no notification.
async fn until(mut condition: impl FnMut() -> bool) {
    let asking = async {
        while !condition() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LONG, asking).await.expect("in time");
}

/// Kills a worker at a random moment, within about a batch.
async fn kill_at_random(child: &mut Process) {
    let micros = RandomState::new().hash_one(0u8) % 40_000;
    sleep(Duration::from_micros(micros)).await;
    child.kill();
}

#[tokio::test]
#[ignore = "a child process of two_processes_append_and_read_one_log"]
async fn child_appends() {
    let Some(path) = given_file() else { return };
    let log = Sqlite::open(path)
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    for n in 0..100 {
        let name = std::process::id();
        log.append(&[NewRecord::new(format!("{name}:{n}"))])
            .await
            .expect("append");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_append_and_read_one_log() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let mut children = [
        Process::start("child_appends", &path),
        Process::start("child_appends", &path),
    ];
    let log = Sqlite::open(&path)
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    let mut records = Vec::new();
    while records.len() < 200 {
        records.extend(timeout(LONG, reader.next(64)).await.expect("in time").expect("next"));
    }
    for child in &mut children {
        child.succeeds().await;
        let name = format!("{}:", child.0.id());
        let numbers: Vec<u32> = records
            .iter()
            .filter_map(|record| str::from_utf8(&record.payload).ok()?.strip_prefix(&name)?.parse().ok())
            .collect();
        assert_eq!(numbers, (0..100).collect::<Vec<_>>());
    }
}

#[tokio::test]
#[ignore = "a child process of state_and_position_agree_after_kills"]
async fn child_commits_forever() {
    let Some(path) = given_file() else { return };
    let sqlite = Sqlite::open(path).await.expect("open");
    let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
    loop {
        let position = store.position(&counting()).await.expect("position");
        let (next, revision) = position.map_or((Offset::ZERO, Revision::NONE), |p| (p.next, p.revision));
        let mut reader = log.read(next).await.expect("read");
        let records = reader.next(5).await.expect("next");
        let mut tx = store.begin(&counting()).await.expect("begin");
        let mut next = next;
        for record in &records {
            tx.execute("UPDATE total SET handled = handled + 1", [])
                .expect("update");
            Ledger.handle(record, &mut tx).await.expect("ledger");
            next = record.offset.successor();
        }
        let advance = Advance::new(log.id().clone(), next, revision, revision.next_count());
        tx.commit(advance).await.expect("commit");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_and_position_agree_after_kills() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    // More records than a worker handles before it is killed.
    let records: Vec<_> = (0..20_000)
        .map(|n| NewRecord::new("").key((n % 7).to_string()))
        .collect();
    log.append(&records).await.expect("append");
    let shell = create_counts(&path);
    let mut before = 0;
    for round in 0..6 {
        let mut child = Process::start("child_commits_forever", &path);
        until(|| counts(&shell).0 >= before + 20 + 7 * round).await;
        kill_at_random(&mut child).await;
        let position = sqlite
            .store()
            .position(&counting())
            .await
            .expect("position")
            .expect("some");
        let (handled, ..) = counts(&shell);
        assert_eq!(position.next, Offset::from(handled as u64));
        assert_eq!(check(&sqlite, false).await, handled as usize);
        assert!(handled > before);
        before = handled;
    }
}

/// Holds a byte for each time a record was handled. No rollback removes one.
fn tries_file(path: &Path) -> PathBuf {
    path.with_extension("tries")
}

#[tokio::test]
#[ignore = "a child process of each_record_counts_once_however_often_the_worker_is_killed"]
async fn child_consumes() {
    let Some(path) = given_file() else { return };
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let handler = handler_fn(move |record: &Record, tx: &mut SqliteTx| {
        let mut tries = OpenOptions::new().append(true).open(tries_file(&path)).expect("open");
        Box::pin(async move {
            tries.write_all(b".").expect("write");
            count(tx, record)?;
            Ledger.handle(record, tx).await?;
            // Gives the parent time to kill this process in the middle of a batch.
            sleep(Duration::from_micros(300)).await;
            Ok(())
        })
    });
    let consumer = Consumer::essentially_once(counting(), log, sqlite.store(), handler)
        .max_batch(32)
        // The previous worker is dead.
        .standby_after(Duration::ZERO);
    consumer.run_until_caught_up().await.expect("run");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_record_counts_once_however_often_the_worker_is_killed() {
    const RECORDS: u64 = 1500;
    const KILLS: i64 = 7;
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let records = keyed(RECORDS);
    assert!(records.len() > RECORDS as usize, "some records are sent twice");
    log.append(&records).await.expect("append");
    fs::write(tries_file(&path), "").expect("write");
    let shell = create_counts(&path);
    let (mut in_a_batch, mut lost_before) = (0, 0);
    for kill in 1..=KILLS {
        let mut child = Process::start("child_consumes", &path);
        until(|| counts(&shell).0 >= kill * 120).await;
        kill_at_random(&mut child).await;
        let (handled, seen, most) = counts(&shell);
        assert_eq!((handled, most), (seen, 1));
        assert!(handled < RECORDS as i64, "killed before the end");
        assert_eq!(check(&sqlite, false).await, handled as usize);
        let tries = fs::metadata(tries_file(&path)).expect("tries").len() as i64;
        in_a_batch += i64::from(tries - lost_before > handled);
        lost_before = tries - handled;
    }
    assert!(in_a_batch > KILLS / 2, "only {in_a_batch} kills hit a batch");
    Process::start("child_consumes", &path).succeeds().await;
    assert_eq!(counts(&shell), (RECORDS as i64, RECORDS as i64, 1));
    assert_eq!(check(&sqlite, true).await, RECORDS as usize);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_consumers_of_one_name_count_each_record_once() {
    const RECORDS: u64 = 2000;
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let log = Sqlite::open(&path)
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    let shell = create_counts(&path);
    let stop = CancellationToken::new();
    let run = |stop: CancellationToken| {
        let path = path.clone();
        async move {
            let sqlite = Sqlite::open(path).await.expect("open");
            let log = sqlite.log("orders").await.expect("log");
            let handler = handler_fn(|record: &Record, tx: &mut SqliteTx| {
                Box::pin(async move {
                    count(tx, record)?;
                    Ok(())
                })
            });
            Consumer::essentially_once(counting(), log, sqlite.store(), handler)
                .max_batch(16)
                .min_backoff(Duration::from_millis(1))
                .max_backoff(Duration::from_millis(20))
                .run_until(stop)
                .await
                .expect("run")
        }
    };
    let consumers = [tokio::spawn(run(stop.clone())), tokio::spawn(run(stop.clone()))];
    for n in 0..RECORDS / 20 {
        let records: Vec<_> = (0..20).map(|i| NewRecord::new((n * 20 + i).to_string())).collect();
        log.append(&records).await.expect("append");
    }
    until(|| counts(&shell).0 >= RECORDS as i64).await;
    stop.cancel();
    let mut handled = 0;
    for consumer in consumers {
        let report = consumer.await.expect("no panic");
        eprintln!("{report}");
        handled += report.handled;
    }
    assert_eq!(handled, RECORDS);
    assert_eq!(counts(&shell), (RECORDS as i64, RECORDS as i64, 1));
}

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

/// Runs that many consumers with a backlog and appenders on one file, each in its own process.
async fn contend(consumers: usize, appenders: usize, time: Duration) -> Waits {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let backlog: Vec<_> = (0..20_000).map(|n| NewRecord::new(n.to_string())).collect();
    let log = sqlite.log("backlog").await.expect("log");
    log.append(&backlog).await.expect("append");
    let mut working: Vec<_> = (0..consumers)
        .map(|_| Process::start("child_consumes_slowly", &path))
        .collect();
    let shell = Connection::open(&path).expect("open");
    until(|| {
        let begun = "SELECT count(*) FROM essentially_once_consumers";
        let begun: i64 = shell.query_row(begun, [], |row| row.get(0)).expect("count");
        begun == consumers as i64
    })
    .await;
    let mut appending: Vec<_> = (0..appenders)
        .map(|_| Process::start("child_appends_and_notes_how_long_it_waits", &path))
        .collect();
    sleep(time).await;
    let mut waits = Waits {
        took: Vec::new(),
        overtaken: Vec::new(),
    };
    for appender in &mut appending {
        assert!(appender.0.try_wait().expect("wait").is_none(), "an append failed");
        appender.kill();
        let noted = fs::read_to_string(waits_file(&path, appender.0.id())).expect("waits");
        for line in noted.lines() {
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
    let waits = contend(2, 2, Duration::from_secs(4)).await;
    assert!(waits.took.len() >= 12, "only {} appends", waits.took.len());
    // Two batches and another append are ahead of it, and one more may be running when the wait
    // begins.
    let overtaken = Waits::percentile(&waits.overtaken, 75).expect("some");
    assert!(overtaken <= 4, "{:?}", waits.overtaken);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: cargo test --release -p essentially-once-sqlite --test processes measure_ -- --ignored --nocapture"]
async fn measure_how_long_appenders_wait() {
    for (consumers, appenders, seconds) in [(0, 1, 10), (1, 0, 10), (1, 1, 20), (10, 10, 40)] {
        contend(consumers, appenders, Duration::from_secs(seconds)).await;
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

#[tokio::test]
#[ignore = "a child process of running_out_of_descriptors_passes"]
async fn child_runs_out_of_descriptors() {
    let Some(path) = given_file() else { return };
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    log.append(&[NewRecord::new("x")]).await.expect("append");
    let mut taken = Vec::new();
    while let Ok(file) = fs::File::open("/dev/null") {
        taken.push(file);
    }
    let other = path.with_extension("other");
    for error in [
        log.read(Offset::ZERO).await.map(drop).expect_err("no descriptor"),
        Sqlite::open(&path).await.map(drop).expect_err("no descriptor"),
        Sqlite::open(&other).await.map(drop).expect_err("no descriptor"),
        sqlite
            .store()
            .pulse(&counting())
            .await
            .map(drop)
            .expect_err("no descriptor"),
    ] {
        assert!(error.is_transient(), "{error:?}");
        assert!(error.to_string().contains("ulimit -n"), "{error}");
    }
    log.append(&[NewRecord::new("y")])
        .await
        .expect("the connection is open");
    drop(taken);
    let mut reader = log.read(Offset::ZERO).await.expect("descriptors are free again");
    assert_eq!(reader.next(9).await.expect("next").len(), 2);
    Sqlite::open(&other).await.expect("descriptors are free again");
}

#[cfg(unix)]
#[tokio::test]
async fn running_out_of_descriptors_passes() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    Process::start_with_few_descriptors("child_runs_out_of_descriptors", &path, 48)
        .succeeds()
        .await;
}
