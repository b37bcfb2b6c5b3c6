//! What the clones of one handle share: the writer connection, a connection for short reads, and the readers to wake.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use essentially_once::Error;
use rusqlite::{Connection, Statement};
use tokio::{
    sync::{self, OwnedMutexGuard, watch},
    task,
    time::{self, Instant},
};

use crate::{
    SqliteOptions, connect,
    error::{classify, classify_commit, is_busy, on},
    guard::Guard,
    prepared::Prepared,
};

const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

pub(crate) struct Shared {
    pub(crate) path: PathBuf,
    pub(crate) options: SqliteOptions,
    /// Fair among the tasks of this process.
    writer: Arc<sync::Mutex<Writer>>,
    /// In WAL mode reading never waits for the writer.
    reader: Mutex<Connection>,
    wakes: Mutex<HashMap<i64, Arc<watch::Sender<()>>>>,
}

impl Shared {
    /// Opens the file; may block.
    pub(crate) fn open(path: PathBuf, options: SqliteOptions) -> Result<Self, Error> {
        let guard = Guard::default();
        let writer = Writer {
            connection: Prepared::new(connect::create(&path, &guard, options.busy_timeout)?),
            guard,
            broken: false,
        };
        let reader = connect::reader(&path, options.busy_timeout)?;
        Ok(Self {
            path,
            options,
            writer: Arc::new(sync::Mutex::new(writer)),
            reader: Mutex::new(reader),
            wakes: Mutex::default(),
        })
    }

    /// `what` and the file, for an error's text.
    pub(crate) fn on(&self, what: impl fmt::Display) -> String {
        on(what, &self.path)
    }

    /// Opens a write transaction, waiting for the lock without blocking the thread.
    pub(crate) async fn begin(&self, action: impl Fn() -> String) -> Result<WriteTx, Error> {
        let timeout = self.options.busy_timeout;
        let deadline = Instant::now() + timeout;
        let Ok(mut writer) = time::timeout_at(deadline, Arc::clone(&self.writer).lock_owned()).await else {
            return Err(Error::unavailable(
                self.on(action()),
                format!(
                    "another transaction of this process has held the write lock for {timeout:?}: perhaps a handler \
                     appends to a log of this file, or opens a second transaction, and waits for itself"
                ),
            ));
        };
        if writer.broken {
            writer = self.reopen(writer).await?;
        }
        retry_busy(deadline, || writer.begin())
            .await
            .map_err(|error| classify(self.on(action()), error))?;
        Ok(WriteTx { writer })
    }

    /// Runs a short query on the read connection.
    pub(crate) async fn read<T>(
        &self,
        action: impl Fn() -> String,
        mut query: impl FnMut(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + self.options.busy_timeout;
        retry_busy(deadline, || query(&lock(&self.reader)))
            .await
            .map_err(|error| classify(self.on(action()), error))
    }

    /// Where appends to the log of that id in this process are announced.
    pub(crate) fn wake(&self, log: i64) -> Arc<watch::Sender<()>> {
        Arc::clone(lock(&self.wakes).entry(log).or_default())
    }

    /// Opens another connection to write on, which SQLite interrupts while the flag is set.
    #[cfg(test)]
    pub(crate) async fn interruptible(&self) -> Arc<std::sync::atomic::AtomicBool> {
        let interrupted = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let guard = Guard::default();
        let mut connection = connect::writer(&self.path, &guard, self.options.busy_timeout).expect("writer");
        let flag = Arc::clone(&interrupted);
        connection
            .progress_handler(1, Some(move || flag.load(std::sync::atomic::Ordering::Relaxed)))
            .expect("handler");
        *self.writer.lock().await = Writer {
            connection: Prepared::new(connection),
            guard,
            broken: false,
        };
        interrupted
    }

    async fn reopen(&self, mut writer: OwnedMutexGuard<Writer>) -> Result<OwnedMutexGuard<Writer>, Error> {
        tracing::warn!(path = %self.path.display(), "a rollback failed: opening the connection anew");
        let (path, timeout) = (self.path.clone(), self.options.busy_timeout);
        let reopened = task::spawn_blocking(move || {
            *writer = Writer::reopen(&path, timeout)?;
            Ok(writer)
        });
        reopened
            .await
            .unwrap_or_else(|error| Err(Error::unavailable(self.on("reopen SQLite file"), error)))
    }
}

/// A panic elsewhere leaves no half-made change behind these locks, so poisoning is of no interest.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tries again while another connection holds the lock, after short pauses in which other tasks run.
pub(crate) async fn retry_busy<T>(
    deadline: Instant,
    mut attempt: impl FnMut() -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let mut pause = SHORTEST_PAUSE;
    loop {
        match attempt() {
            Err(error) if is_busy(&error) && Instant::now() < deadline => {
                time::sleep(jittered(pause)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            result => return result,
        }
    }
}

/// Half to all of `pause`, so that two processes do not ask in step for ever.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().hash_one(0u8) as u32;
    pause / 2 + (pause / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// The one connection of a handle that writes.
struct Writer {
    connection: Prepared,
    guard: Guard,
    /// A rollback failed, so nothing is known of the connection's state.
    broken: bool,
}

impl Writer {
    fn reopen(path: &Path, busy_timeout: Duration) -> Result<Self, Error> {
        let guard = Guard::default();
        Ok(Self {
            connection: Prepared::new(connect::writer(path, &guard, busy_timeout)?),
            guard,
            broken: false,
        })
    }

    /// Takes `&mut self` so that a future which calls it again and again is `Send`: a connection is not `Sync`.
    fn begin(&mut self) -> rusqlite::Result<()> {
        self.run("BEGIN IMMEDIATE")
    }
}

impl Writer {
    /// Runs SQL of ours that has no parameters.
    fn run(&mut self, sql: &str) -> rusqlite::Result<()> {
        self.connection
            .run_internal(sql, |statement| statement.execute([]))
            .map(drop)
    }
}

/// A write transaction. Dropping it rolls back.
pub(crate) struct WriteTx {
    writer: OwnedMutexGuard<Writer>,
}

impl WriteTx {
    pub(crate) fn connection(&self) -> &Connection {
        &self.writer.connection
    }

    /// Runs SQL of ours.
    pub(crate) fn run_internal<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.writer.connection.run_internal(sql, run)
    }

    /// Runs a handler's SQL, with the authorizer on guard.
    pub(crate) fn run_native<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let Writer { connection, guard, .. } = &mut *self.writer;
        guard.run(connection, sql, run)
    }

    /// False once SQLite has rolled back by itself, as `INSERT OR ROLLBACK` or a full disk makes it do. Whatever ran then would
    /// be committed on the spot.
    pub(crate) fn is_open(&self) -> bool {
        !self.writer.connection.is_autocommit()
    }

    /// Commits, with `action` for an error's text.
    pub(crate) fn commit(mut self, action: impl FnOnce() -> String) -> Result<(), Error> {
        self.writer
            .run("COMMIT")
            .map_err(|error| classify_commit(action(), error))
    }

    pub(crate) fn rollback(mut self, action: impl FnOnce() -> String) -> Result<(), Error> {
        self.try_rollback().map_err(|error| classify(action(), error))
    }

    fn try_rollback(&mut self) -> rusqlite::Result<()> {
        if !self.is_open() {
            return Ok(());
        }
        let result = self.writer.run("ROLLBACK");
        self.writer.broken = self.is_open();
        result
    }
}

impl Drop for WriteTx {
    fn drop(&mut self) {
        if let Err(error) = self.try_rollback() {
            tracing::warn!(%error, "a rollback failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(folder: &tempfile::TempDir) -> Shared {
        Shared::open(folder.path().join("a.db"), SqliteOptions::default()).expect("open")
    }

    #[tokio::test]
    async fn a_connection_whose_rollback_failed_is_opened_anew() {
        let folder = tempfile::tempdir().expect("folder");
        let shared = shared(&folder);
        {
            let mut tx = shared.begin(|| "begin".into()).await.expect("begin");
            tx.connection()
                .execute_batch("CREATE TEMP TABLE old (x)")
                .expect("temp");
            tx.writer.connection.execute_batch("COMMIT").expect("commit");
            tx.writer.broken = true;
        }
        let tx = shared.begin(|| "begin".into()).await.expect("begin");
        assert!(!tx.writer.broken && tx.is_open());
        assert!(
            tx.connection().prepare("SELECT * FROM temp.old").is_err(),
            "a new connection"
        );
    }

    #[tokio::test]
    async fn a_dropped_transaction_leaves_the_connection_free() {
        let folder = tempfile::tempdir().expect("folder");
        let shared = shared(&folder);
        let tx = shared.begin(|| "begin".into()).await.expect("begin");
        tx.connection().execute_batch("CREATE TABLE t (x)").expect("create");
        drop(tx);
        let tx = shared.begin(|| "begin".into()).await.expect("begin");
        assert!(tx.connection().prepare("SELECT * FROM t").is_err());
        tx.rollback(|| "rollback".into()).expect("rollback");
    }

    #[tokio::test]
    async fn a_full_disk_fails_and_leaves_nothing_behind() {
        use essentially_once::{
            Advance, ConsumerId, KeyValue, Log, NewRecord, Offset, OffsetStore, Revision, Transaction,
        };

        let folder = tempfile::tempdir().expect("folder");
        let sqlite = crate::Sqlite {
            shared: Arc::new(shared(&folder)),
        };
        let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
        let set_pages = async |extra: i64| {
            let writer = sqlite.shared.writer.lock().await;
            let pages: i64 = writer
                .connection
                .query_row("PRAGMA page_count", [], |row| row.get(0))
                .expect("page_count");
            let set = format!("PRAGMA max_page_count = {}", pages + extra);
            writer
                .connection
                .query_row(&set, [], |_| Ok(()))
                .expect("max_page_count");
        };
        set_pages(4).await;
        let big = vec![7; 1_000_000];
        let error = log
            .append(&[NewRecord::new("a"), NewRecord::new(big.clone())])
            .await
            .expect_err("full");
        assert!(
            matches!(error, Error::Failed { .. }) && error.to_string().contains("make room"),
            "{error}"
        );
        assert_eq!(log.bounds().await.expect("bounds").end, Offset::ZERO);

        let consumer = ConsumerId::new("c").expect("name");
        let advance = Advance::new(log.id().clone(), 1.into(), Revision::NONE, Revision::new(1, 1));
        let mut tx = store.begin(&consumer).await.expect("begin");
        tx.put(b"small", b"1").await.expect("fits");
        assert!(matches!(tx.put(b"big", &big).await, Err(Error::Failed { .. })));
        assert!(
            matches!(tx.commit(advance.clone()).await, Err(Error::Failed { .. })),
            "rolled back by SQLite"
        );
        assert_eq!(store.position(&consumer).await.expect("position"), None);

        set_pages(10_000).await;
        let mut tx = store.begin(&consumer).await.expect("begin");
        assert_eq!(tx.get(b"small").await.expect("get"), None);
        tx.put(b"big", &big).await.expect("fits now");
        tx.commit(advance).await.expect("commit");
        log.append(&[NewRecord::new("a")]).await.expect("append");
    }

    #[test]
    fn pauses_stay_within_their_bounds() {
        for _ in 0..1000 {
            let pause = jittered(LONGEST_PAUSE);
            assert!(pause >= LONGEST_PAUSE / 2 && pause <= LONGEST_PAUSE, "{pause:?}");
        }
    }
}
