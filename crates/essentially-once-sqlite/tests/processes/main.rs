//! Several processes on one file, some of which are killed. A test starts this program again as a
//! child, which runs one of the ignored tests. `Child::kill` is SIGKILL on Unix.

mod contention;
mod kills;
mod outbox;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use essentially_once::{ConsumerId, Log, NewRecord, Offset, OffsetStore};
use essentially_once_sqlite::Sqlite;
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

/// Polls for an effect of another process, which sends no notification.
async fn until(mut condition: impl FnMut() -> bool) {
    let asking = async {
        while !condition() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LONG, asking).await.expect("in time");
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
