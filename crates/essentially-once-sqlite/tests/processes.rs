//! Several processes on one file, some of them killed. A test starts this test program again, as a child that runs one of the
//! ignored tests below; `Child::kill` is SIGKILL on Unix.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use essentially_once::{
    Advance, CancellationToken, Consumer, ConsumerId, Error, Log, NewRecord, Offset, OffsetStore, Record, Transaction,
    handler_fn,
};
use essentially_once_sqlite::{Sqlite, SqliteTx, rusqlite::Connection};
use tokio::time::{sleep, timeout};

const FILE: &str = "ESSENTIALLY_ONCE_SQLITE_TEST_FILE";
const LONG: Duration = Duration::from_secs(60);

/// A child process that ends with the test.
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

    fn kill(&mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("wait");
    }

    async fn succeeds(&mut self) {
        let ended = timeout(LONG, async {
            loop {
                if let Some(status) = self.0.try_wait().expect("wait") {
                    return status;
                }
                sleep(Duration::from_millis(5)).await;
            }
        });
        assert!(ended.await.expect("in time").success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The file that a child was started for; `None` if someone runs the ignored tests by hand.
fn given_file() -> Option<PathBuf> {
    env::var_os(FILE).map(PathBuf::from)
}

fn counting() -> ConsumerId {
    ConsumerId::new("counting").expect("name")
}

/// What the handlers below keep: how often each record was handled.
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

/// Total handled, records seen, and the most times that one was handled.
fn counts(shell: &Connection) -> (i64, i64, i64) {
    shell
        .query_row(
            "SELECT (SELECT handled FROM total), count(*), coalesce(max(times), 0) FROM counts",
            [],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .expect("counts")
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
async fn child_commits_for_ever() {
    let Some(path) = given_file() else { return };
    let sqlite = Sqlite::open(path).await.expect("open");
    let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
    loop {
        let revision = store
            .position(&counting())
            .await
            .expect("position")
            .map_or(0, |p| p.revision);
        let mut tx = store.begin(&counting()).await.expect("begin");
        for _ in 0..5 {
            tx.execute("UPDATE total SET handled = handled + 1", [])
                .expect("update");
        }
        let advance = Advance {
            log: log.id().clone(),
            next: (5 * (revision + 1)).into(),
            expected_revision: revision,
            windows: vec![],
            forgotten: vec![],
        };
        tx.commit(advance).await.expect("commit");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_and_position_agree_after_kills() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let shell = create_counts(&path);
    let mut before = 0;
    for round in 0..6 {
        let mut child = Process::start("child_commits_for_ever", &path);
        let progress = async {
            while counts(&shell).0 < before + 20 + 7 * round {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(LONG, progress).await.expect("in time");
        child.kill();
        let position = sqlite
            .store()
            .position(&counting())
            .await
            .expect("position")
            .expect("some");
        let (handled, ..) = counts(&shell);
        assert_eq!(position.next, Offset::from(handled as u64));
        assert!(handled > before);
        before = handled;
    }
}

#[tokio::test]
#[ignore = "a child process of each_record_counts_once_however_often_the_worker_is_killed"]
async fn child_consumes() {
    let Some(path) = given_file() else { return };
    let sqlite = Sqlite::open(path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let handler = handler_fn(|record: &Record, tx: &mut SqliteTx| {
        Box::pin(async move {
            count(tx, record)?;
            // Gives the parent time to kill in the middle of a batch.
            sleep(Duration::from_micros(300)).await;
            Ok(())
        })
    });
    let consumer = Consumer::essentially_once(counting(), log, sqlite.store(), handler).max_batch(32);
    consumer.run_until_caught_up().await.expect("run");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_record_counts_once_however_often_the_worker_is_killed() {
    const RECORDS: u64 = 1500;
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let log = Sqlite::open(&path)
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    let records: Vec<_> = (0..RECORDS).map(|n| NewRecord::new(n.to_string())).collect();
    log.append(&records).await.expect("append");
    let shell = create_counts(&path);
    for round in 1..=5 {
        let mut child = Process::start("child_consumes", &path);
        let progress = async {
            while counts(&shell).0 < round * 150 {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(LONG, progress).await.expect("in time");
        child.kill();
        let (handled, seen, most) = counts(&shell);
        assert_eq!((handled, most), (seen, 1));
        assert!(handled < RECORDS as i64, "killed before the end");
    }
    Process::start("child_consumes", &path).succeeds().await;
    assert_eq!(counts(&shell), (RECORDS as i64, RECORDS as i64, 1));
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
                .backoff(Duration::from_millis(1), Duration::from_millis(20))
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
    let progress = async {
        while counts(&shell).0 < RECORDS as i64 {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LONG, progress).await.expect("in time");
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
