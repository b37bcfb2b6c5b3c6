//! An abandoned call returns immediately, and leaves nothing open behind.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::mpsc,
    time::{Duration, Instant},
};

use essentially_once::{ConsumerId, KeyValue, Log, NewRecord, Offset, OffsetStore};
use essentially_once_sqlite::{Sqlite, SqliteOptions, rusqlite::Connection};
use tokio::{runtime::Builder, task, time::timeout};

const SOON: Duration = Duration::from_secs(20);

fn numbered(count: u64) -> Vec<NewRecord> {
    (0..count).map(|n| NewRecord::new(n.to_string())).collect()
}

fn shipping() -> ConsumerId {
    ConsumerId::new("shipping").expect("name")
}

/// Slow work runs on its own threads, so a service with a full blocking pool holds no lock.
#[test]
fn everything_works_while_the_blocking_pool_is_full() {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .max_blocking_threads(1)
        .build()
        .expect("runtime");
    let (release, released) = mpsc::channel::<()>();
    runtime.block_on(async {
        let (occupied, begun) = tokio::sync::oneshot::channel();
        let occupant = task::spawn_blocking(move || {
            occupied.send(()).expect("awaited");
            let _ = released.recv();
        });
        begun.await.expect("occupied");
        let folder = tempfile::tempdir().expect("folder");
        let work = async {
            let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
            let log = sqlite.log("orders").await.expect("log");
            log.append(&numbered(2_000)).await.expect("append");
            let mut reader = log.read(Offset::ZERO).await.expect("read");
            let mut read = 0;
            while read < 2_000 {
                read += reader.next(300).await.expect("next").len();
            }
            let mut tx = sqlite.store().begin(&shipping()).await.expect("begin");
            tx.put(b"k", b"v").await.expect("put");
            drop(tx);
            assert_eq!(sqlite.store().position(&shipping()).await.expect("position"), None);
            assert_eq!(log.bounds().await.expect("bounds").end, 2_000.into());
            assert_eq!(log.trim().await.expect("trim"), 0);
            sqlite.close().await.expect("close");
        };
        timeout(SOON, work).await.expect("nothing waits for the pool");
        drop(release);
        occupant.await.expect("no panic");
    });
}

/// The number of descriptors of this process for files whose paths begin with `path`.
#[cfg(target_os = "linux")]
fn descriptors(path: &Path) -> usize {
    let path = path.to_str().expect("text");
    fs::read_dir("/proc/self/fd")
        .expect("proc")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_str().is_some_and(|target| target.starts_with(path)))
        .count()
}

/// SQLite does not close a file while a lock on it is held, because closing it would release the
/// lock. It keeps the descriptors for reuse instead, as many as were open at the same time.
#[cfg(target_os = "linux")]
const KEPT: usize = 12;

/// Waits until at most `limit` descriptors are open. Finished threads close their files a moment
/// later.
#[cfg(target_os = "linux")]
async fn at_most(limit: usize, path: &Path) {
    let started = Instant::now();
    while descriptors(path) > limit {
        assert!(started.elapsed() < SOON, "{} of {limit} descriptors", descriptors(path));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The number of threads of this crate, including those of other tests.
#[cfg(target_os = "linux")]
fn threads() -> usize {
    fs::read_dir("/proc/self/task")
        .expect("proc")
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("essentially"))
        .count()
}

/// Abandons the call 60 times, after 1 to 20 ms, and checks that it ends in time.
async fn give_up<T>(mut what: impl AsyncFnMut() -> T) {
    for millis in (1..=20).cycle().take(60) {
        let limit = Duration::from_millis(millis);
        let started = Instant::now();
        let _ = timeout(limit, what()).await;
        let took = started.elapsed();
        assert!(
            took < limit + Duration::from_millis(500),
            "gave up after {took:?} instead of {limit:?}"
        );
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_abandoned_open_leaves_no_descriptor() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let shell = Connection::open(&path).expect("open");
    shell
        .execute_batch("BEGIN EXCLUSIVE; CREATE TABLE t (x)")
        .expect("lock");
    let before = descriptors(&path);
    // Far longer than this test waits.
    let options = SqliteOptions::new().busy_timeout(10 * SOON);
    give_up(async || options.open(&path).await.map(drop)).await;
    at_most(before + KEPT, &path).await;
    let started = Instant::now();
    while threads() > KEPT {
        assert!(started.elapsed() < SOON, "{} abandoned threads", threads());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    shell.execute_batch("COMMIT").expect("unlock");
    drop(shell);
    give_up(async || Sqlite::open(&path).await.map(drop)).await;
    at_most(0, &path).await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn calls_abandoned_while_another_process_holds_the_lock_leave_nothing_behind() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
    log.append(&numbered(10)).await.expect("append");
    drop(log.read(Offset::ZERO).await.expect("read"));
    let shell = Connection::open(&path).expect("open");
    shell.execute_batch("BEGIN IMMEDIATE").expect("lock");
    // In the second round, a process was frozen inside the turnstile.
    let turnstile = File::open(turn(&path)).expect("the turnstile");
    for frozen in [false, true] {
        if frozen {
            turnstile.lock().expect("free");
        }
        let before = descriptors(&path);
        give_up(async || store.begin(&shipping()).await.map(drop)).await;
        give_up(async || log.append(&numbered(1_000)).await.map(drop)).await;
        give_up(async || log.append(&numbered(1)).await.map(drop)).await;
        give_up(async || log.read(Offset::ZERO).await.map(drop)).await;
        give_up(async || log.bounds().await).await;
        give_up(async || store.position(&shipping()).await).await;
        give_up(async || store.pulse(&shipping()).await).await;
        give_up(async || {
            let handle = Sqlite::open(&path).await.expect("open");
            handle.store().begin(&shipping()).await.map(drop)
        })
        .await;
        at_most(before + KEPT, &path).await;
    }
    turnstile.unlock().expect("unlock");
    shell.execute_batch("COMMIT").expect("unlock");
    let appended = timeout(SOON, log.append(&numbered(1))).await.expect("the lock is free");
    appended.expect("append");
    assert_eq!(
        log.bounds().await.expect("bounds").end,
        11.into(),
        "abandoned appends did not happen"
    );
    drop((sqlite, log, store, shell, turnstile));
    at_most(0, &path).await;
}

fn turn(path: &Path) -> PathBuf {
    format!("{}-turn", path.display()).into()
}

#[tokio::test]
async fn an_abandoned_append_releases_the_lock() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    give_up(async || log.append(&numbered(3_000)).await.map(drop)).await;
    let other = SqliteOptions::new().busy_timeout(SOON).open(&path).await.expect("open");
    let log = other.log("orders").await.expect("log");
    log.append(&numbered(1)).await.expect("append");
    assert_eq!(
        log.bounds().await.expect("bounds").end.lo() % 3_000,
        1,
        "each append is applied completely or not at all"
    );
}
