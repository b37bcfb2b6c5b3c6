//! Whoever gives up waiting is free at once, and leaves nothing open behind.

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

/// What takes long has threads of its own, so a service that keeps the pool busy keeps no lock
/// held.
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

/// How many descriptors of this process are open on files whose paths begin with this.
#[cfg(target_os = "linux")]
fn descriptors(path: &Path) -> usize {
    let path = path.to_str().expect("text");
    fs::read_dir("/proc/self/fd")
        .expect("proc")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_str().is_some_and(|target| target.starts_with(path)))
        .count()
}

/// While someone holds a lock on a file, SQLite keeps what is closed meanwhile to reuse it, since
/// closing it would drop that lock: as many as were open at the same time, however often that was.
#[cfg(target_os = "linux")]
const KEPT: usize = 12;

/// Waits until no more are open than that: threads that are done close their files a moment later.
#[cfg(target_os = "linux")]
async fn at_most(limit: usize, path: &Path) {
    let started = Instant::now();
    while descriptors(path) > limit {
        assert!(started.elapsed() < SOON, "{} of {limit} descriptors", descriptors(path));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// How many threads of this process are ours; other tests have some as well.
#[cfg(target_os = "linux")]
fn threads() -> usize {
    fs::read_dir("/proc/self/task")
        .expect("proc")
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("essentially"))
        .count()
}

/// Gives up the same 60 times, after 1 to 20 ms, and never later than that.
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
async fn opening_that_was_given_up_leaves_no_descriptor() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let shell = Connection::open(&path).expect("open");
    shell
        .execute_batch("BEGIN EXCLUSIVE; CREATE TABLE t (x)")
        .expect("lock");
    let before = descriptors(&path);
    // Far longer than the test waits for it.
    let options = SqliteOptions::new().busy_timeout(10 * SOON);
    give_up(async || options.open(&path).await.map(drop)).await;
    at_most(before + KEPT, &path).await;
    let started = Instant::now();
    while threads() > KEPT {
        assert!(started.elapsed() < SOON, "{} threads wait for nobody", threads());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    shell.execute_batch("COMMIT").expect("unlock");
    drop(shell);
    give_up(async || Sqlite::open(&path).await.map(drop)).await;
    at_most(0, &path).await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn what_was_given_up_while_another_process_holds_the_lock_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
    log.append(&numbered(10)).await.expect("append");
    drop(log.read(Offset::ZERO).await.expect("read"));
    let shell = Connection::open(&path).expect("open");
    shell.execute_batch("BEGIN IMMEDIATE").expect("lock");
    // A process that was frozen while it was next.
    let turnstile = File::open(turn(&path)).expect("made with the file");
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
    let appended = timeout(SOON, log.append(&numbered(1)))
        .await
        .expect("nobody is in the way");
    appended.expect("append");
    assert_eq!(
        log.bounds().await.expect("bounds").end,
        11.into(),
        "what was given up did not happen"
    );
    drop((sqlite, log, store, shell, turnstile));
    at_most(0, &path).await;
}

fn turn(path: &Path) -> PathBuf {
    format!("{}-turn", path.display()).into()
}

#[tokio::test]
async fn an_append_that_was_given_up_lets_go_of_the_lock() {
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
        "each whole or not at all"
    );
}
