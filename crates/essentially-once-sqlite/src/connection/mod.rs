//! The connections that the clones of one handle share: one for writing, one for short reads, and
//! those of the readers.

pub(crate) mod file;
pub(crate) mod open;
pub(crate) mod prepared;
pub(crate) mod turnstile;
pub(crate) mod wal;

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::AtomicBool},
    thread,
    time::Duration,
};

use essentially_once::Error;
use rusqlite::{Connection, Statement};
use tokio::{
    sync::{self, OwnedMappedMutexGuard, OwnedMutexGuard, oneshot},
    time::{self, Instant},
};

use crate::{
    SqliteOptions,
    connection::file::{Holder, Place},
    connection::prepared::Prepared,
    connection::wal::Wal,
    error::{classify, classify_commit, is_busy, on},
    log::reader::Cursor,
    store::authorizer::Guard,
    store::pulse::Observer,
};

const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_millis(20);
/// The writer whose turn it is polls often. It is the only one that polls, and nobody writes while
/// it sleeps.
const LONGEST_PAUSE_IN_TURN: Duration = Duration::from_millis(2);

/// A writer that has passed the turnstile may write again for this long without passing it again.
/// That saves system calls if commits take microseconds. Each waiting writer waits at most this
/// much longer for each writer ahead of it.
const TENURE: Duration = Duration::from_millis(2);

/// How long to wait for a turn before checking whether the writer inside the turnstile still makes
/// progress.
const PATIENCE: Duration = Duration::from_millis(250);
/// Long enough for the writer inside the turnstile to ask for the write lock many times.
const SECOND_LOOK: Duration = Duration::from_millis(30);

pub(crate) struct Shared {
    pub(crate) path: PathBuf,
    pub(crate) options: SqliteOptions,
    pub(crate) place: Arc<Place>,
    /// Fair among the tasks of this handle. `None` once the handle is closed.
    writer: Arc<sync::Mutex<Option<Writer>>>,
    /// Reads never wait for the writer in WAL mode. `None` once the handle is closed.
    reader: Mutex<Option<Connection>>,
    /// Opened when a standby first asks for a pulse.
    observer: Mutex<Option<Observer>>,
    /// The readers of logs, each with its own connection. `None` once the handle is closed.
    cursors: Mutex<Option<Vec<Weak<Mutex<Cursor>>>>>,
}

/// The purpose of a write transaction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Errand {
    Append,
    Other,
}

impl Shared {
    /// Opens the file. It blocks the thread, also while it waits for locks, until `given_up` is
    /// set.
    pub(crate) fn open(path: PathBuf, options: SqliteOptions, given_up: &AtomicBool) -> Result<Self, Error> {
        let guard = Guard::default();
        let connection = open::create(&path, &guard, &options, given_up)?;
        let writer = Writer::new(Prepared::new(connection), guard, Wal::of(&path, options.wal_limit));
        let reader = open::read_only(&path, &options)?;
        Ok(Self {
            place: Place::of(&path),
            path,
            options,
            writer: Arc::new(sync::Mutex::new(Some(writer))),
            reader: Mutex::new(Some(reader)),
            observer: Mutex::default(),
            cursors: Mutex::new(Some(Vec::new())),
        })
    }

    /// Adds the file to an error's action.
    pub(crate) fn on(&self, what: impl fmt::Display) -> String {
        on(what, &self.path)
    }

    /// Opens a write transaction. Waits for the lock without blocking the thread.
    pub(crate) async fn begin(&self, action: impl Fn() -> String) -> Result<WriteTx, Error> {
        self.begin_for(Errand::Other, action).await
    }

    /// Like [`begin`](Self::begin), for an append. A handler that holds the lock may be the one
    /// that waits.
    pub(crate) async fn begin_append(&self, action: impl Fn() -> String) -> Result<WriteTx, Error> {
        self.begin_for(Errand::Append, action).await
    }

    async fn begin_for(&self, errand: Errand, action: impl Fn() -> String) -> Result<WriteTx, Error> {
        let deadline = Instant::now() + self.options.busy_timeout;
        let held = self.place.holder();
        let Ok(writer) = time::timeout_at(deadline, Arc::clone(&self.writer).lock_owned()).await else {
            return Err(self.kept_waiting(errand, action(), held, None));
        };
        let Ok(mut writer) = OwnedMutexGuard::try_map(writer, Option::as_mut) else {
            return Err(self.closed(action()));
        };
        if writer.broken {
            tracing::warn!(path = %self.path.display(), "a rollback failed: opening the connection again");
            writer.reopen(self).await?;
        }
        match self.lock_file(&mut writer, deadline).await {
            Ok(()) => Ok(self.write_tx(writer)),
            Err(error) if is_busy(&error) => Err(self.kept_waiting(errand, action(), held, Some(error))),
            Err(error) => Err(classify(self.on(action()), error)),
        }
    }

    /// Takes the file's write lock in turn.
    async fn lock_file(&self, writer: &mut Writer, deadline: Instant) -> rusqlite::Result<()> {
        if writer.passed.is_some_and(|passed| passed.elapsed() < TENURE) {
            match writer.begin() {
                Err(error) if is_busy(&error) => {}
                result => return result,
            }
        }
        let Ok(turn) = time::timeout_at(deadline, self.place.turnstile.line_up()).await else {
            return writer.begin();
        };
        let mut patience = PATIENCE;
        while !turn.comes_within(patience.min(deadline - Instant::now())).await {
            // The writer inside takes the lock as soon as it is free. If it leaves a free lock
            // alone twice, it is frozen.
            match writer.begin() {
                Ok(()) if patience == SECOND_LOOK => return Ok(()),
                Ok(()) => {
                    writer.run("ROLLBACK")?;
                    patience = SECOND_LOOK;
                }
                Err(error) if is_busy(&error) && Instant::now() < deadline => patience = PATIENCE,
                Err(error) => return Err(error),
            }
        }
        writer.restart_wal(deadline).await;
        retry_busy(deadline, LONGEST_PAUSE_IN_TURN, || writer.begin()).await?;
        writer.passed = Some(Instant::now());
        Ok(())
    }

    /// Builds the error for a writer that did not get the lock in time. `held` is the transaction
    /// that was open when the wait began.
    ///
    /// A task that waits for itself would do so at every attempt. But one task may also run two
    /// consumers concurrently (`join!`), where one waits for the other's slow handler. So only an
    /// append fails permanently.
    fn kept_waiting(
        &self,
        errand: Errand,
        action: String,
        held: Option<Holder>,
        error: Option<rusqlite::Error>,
    ) -> Error {
        let (action, timeout) = (self.on(action), self.options.busy_timeout);
        match (self.place.holder().filter(|holder| held == Some(*holder)), error) {
            (Some(holder), _) if errand == Errand::Append && holder.is_this_task() => Error::failed(
                action,
                format!(
                    "this task waits for itself: its own open transaction on the same file has held the write lock for {timeout:?}; \
                     within a handler, use the handler's transaction and insert into a table of yours, from which another consumer \
                     appends, or append to a log in another file"
                ),
            ),
            (Some(_), _) | (None, None) => Error::unavailable(
                action,
                format!(
                    "another transaction of this process has held the write lock for {timeout:?}; check whether a handler waits for \
                     itself because another task appends to a log of this file or opens a second transaction"
                ),
            ),
            (None, Some(error)) => classify(action, error),
        }
    }

    /// The error of any call after [`close`](Self::close).
    fn closed(&self, action: String) -> Error {
        Error::failed(
            self.on(action),
            "the file was closed with `Sqlite::close`; open it again",
        )
    }

    /// Runs a short query on the read connection.
    pub(crate) async fn read<T>(
        &self,
        action: impl Fn() -> String,
        mut query: impl FnMut(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + self.options.busy_timeout;
        let read = retry_busy(deadline, LONGEST_PAUSE, || {
            lock(&self.reader).as_ref().map(&mut query).transpose()
        });
        match read.await {
            Ok(Some(read)) => Ok(read),
            Ok(None) => Err(self.closed(action())),
            Err(error) => Err(classify(self.on(action()), error)),
        }
    }

    /// Opens a write transaction if the lock is free. Does not wait, and does not queue.
    pub(crate) fn try_begin(&self, action: impl Fn() -> String) -> Result<Option<WriteTx>, Error> {
        let Ok(writer) = Arc::clone(&self.writer).try_lock_owned() else {
            return Ok(None);
        };
        let Ok(mut writer) = OwnedMutexGuard::try_map(writer, Option::as_mut) else {
            return Err(self.closed(action()));
        };
        if writer.broken || self.place.holder().is_some() {
            return Ok(None);
        }
        match writer.begin() {
            Ok(()) => Ok(Some(self.write_tx(writer))),
            Err(error) if is_busy(&error) => Ok(None),
            Err(error) => Err(classify(self.on(action()), error)),
        }
    }

    fn write_tx(&self, writer: OwnedMappedMutexGuard<Option<Writer>, Writer>) -> WriteTx {
        WriteTx {
            holder: self.place.began(),
            place: Arc::clone(&self.place),
            writer,
        }
    }

    /// Runs a short query on the connection for pulses, and opens that connection first if
    /// necessary.
    pub(crate) async fn observe<T>(
        &self,
        action: impl Fn() -> String,
        mut query: impl FnMut(&mut Observer) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        if lock(&self.observer).is_none() {
            let opened = Observer::new(open::observer(&self.path, &self.options).await?);
            let mut observer = lock(&self.observer);
            if lock(&self.reader).is_none() {
                return Err(self.closed(action()));
            }
            observer.get_or_insert(opened);
        }
        let deadline = Instant::now() + self.options.busy_timeout;
        let observed = retry_busy(deadline, LONGEST_PAUSE, || {
            lock(&self.observer).as_mut().map(&mut query).transpose()
        });
        match observed.await {
            Ok(Some(observed)) => Ok(observed),
            Ok(None) => Err(self.closed(action())),
            Err(error) => Err(classify(self.on(action()), error)),
        }
    }

    /// Opens a connection for a reader. [`close`](Self::close) closes it too.
    pub(crate) async fn cursor(
        &self,
        action: impl Fn() -> String,
        cursor: impl FnOnce(Connection) -> Cursor,
    ) -> Result<Arc<Mutex<Cursor>>, Error> {
        let connection = open::reader(&self.path, &self.options).await?;
        let cursor = Arc::new(Mutex::new(cursor(connection)));
        let mut cursors = lock(&self.cursors);
        let Some(cursors) = &mut *cursors else {
            return Err(self.closed(action()));
        };
        cursors.retain(|cursor| cursor.strong_count() > 0);
        cursors.push(Arc::downgrade(&cursor));
        Ok(cursor)
    }

    /// Waits for the open transaction, closes every connection of the handle, and copies the WAL
    /// into the file.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        let action = || self.on("close SQLite file");
        let deadline = Instant::now() + self.options.busy_timeout;
        let Ok(mut writer) = time::timeout_at(deadline, self.writer.lock()).await else {
            return Err(Error::unavailable(
                action(),
                "a transaction of this handle is still open, so nothing was closed; end the transaction, then close again",
            ));
        };
        let Some(writer) = writer.take() else {
            return Ok(());
        };
        // The reader must go first. Without it, no observer is opened again.
        let reader = lock(&self.reader).take();
        let observer = lock(&self.observer).take();
        let cursors = lock(&self.cursors).take().unwrap_or_default();
        let emptied = on_a_thread(move || {
            drop((reader, observer));
            for cursor in cursors.iter().filter_map(Weak::upgrade) {
                // The lock waits for a running fetch.
                lock(&cursor).close();
            }
            while !writer.wal.empty(&writer.connection)? {
                if Instant::now() >= deadline {
                    return Ok(false);
                }
                thread::sleep(SHORTEST_PAUSE);
            }
            Ok(true)
        });
        match emptied.await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(Error::unavailable(
                action(),
                "the file is closed and all commits are safe, but part of the data is still in the WAL, because another handle or \
                 process reads or writes the file; copy it with `VACUUM INTO`, or together with its -wal file once nobody has it \
                 open",
            )),
            Ok(Err(error)) => Err(classify(action(), error)),
            Err(error) => Err(Error::unavailable(action(), error)),
        }
    }

    /// Replaces the writer connection with one that SQLite interrupts while the flag is set.
    #[cfg(test)]
    pub(crate) async fn interruptible(&self) -> Arc<AtomicBool> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let guard = Guard::default();
        let mut connection = open::writer(&self.path, &guard, &self.options).await.expect("writer");
        let flag = Arc::clone(&interrupted);
        connection
            .progress_handler(1, Some(move || flag.load(std::sync::atomic::Ordering::Relaxed)))
            .expect("handler");
        let wal = Wal::of(&self.path, self.options.wal_limit);
        *self.writer.lock().await = Some(Writer::new(Prepared::new(connection), guard, wal));
        interrupted
    }
}

/// Ignores poisoning: no panic leaves a partial change behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs slow work on its own thread. The runtime's blocking pool may be full, and a holder of the
/// file's write lock must not wait for it.
///
/// Dropping the future does not stop the work.
pub(crate) async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, essentially_once::backend::Source> {
    let (done, result) = oneshot::channel();
    let thread = thread::Builder::new().name("essentially-once-sqlite".into());
    thread.spawn(move || {
        // The send fails if the caller gave up.
        let _ = done.send(work());
    })?;
    result.await.map_err(|_| "the thread that did it panicked".into())
}

/// Retries while another connection holds the lock. Other tasks run during the short pauses.
pub(crate) async fn retry_busy<T>(
    deadline: Instant,
    longest_pause: Duration,
    mut attempt: impl FnMut() -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let mut pause = SHORTEST_PAUSE;
    loop {
        match attempt() {
            Err(error) if is_busy(&error) && Instant::now() < deadline => {
                time::sleep(jittered(pause)).await;
                pause = (pause * 2).min(longest_pause);
            }
            result => return result,
        }
    }
}

/// Returns half to all of `pause`, at random, so that two processes do not poll in lockstep.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().hash_one(0u8) as u32;
    pause / 2 + (pause / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// The only connection of a handle that writes.
struct Writer {
    connection: Prepared,
    guard: Guard,
    wal: Wal,
    /// When this connection last got the lock in turn.
    passed: Option<Instant>,
    /// A rollback failed, so the connection's state is unknown.
    broken: bool,
}

impl Writer {
    fn new(connection: Prepared, guard: Guard, wal: Wal) -> Self {
        Self {
            connection,
            guard,
            wal,
            passed: None,
            broken: false,
        }
    }

    async fn reopen(&mut self, shared: &Shared) -> Result<(), Error> {
        let guard = Guard::default();
        self.connection = Prepared::new(open::writer(&shared.path, &guard, &shared.options).await?);
        self.guard = guard;
        self.broken = false;
        Ok(())
    }

    /// Takes `&mut self` so that a future that holds the writer is `Send`. A connection is not
    /// `Sync`.
    fn begin(&mut self) -> rusqlite::Result<()> {
        self.run("BEGIN IMMEDIATE")
    }

    /// Restarts the WAL if it has grown too large. The caller must be the next to write.
    async fn restart_wal(&mut self, deadline: Instant) {
        let Some(patience) = self.wal.restart_within() else {
            return;
        };
        let until = deadline.min(Instant::now() + patience);
        loop {
            let Self { connection, wal, .. } = &mut *self;
            if wal.restart(connection) {
                return;
            }
            if Instant::now() >= until {
                return self.wal.starves();
            }
            time::sleep(SHORTEST_PAUSE).await;
        }
    }

    /// Runs SQL of this crate that has no parameters.
    fn run(&mut self, sql: &str) -> rusqlite::Result<()> {
        self.connection
            .run_internal(sql, |statement| statement.execute([]))
            .map(drop)
    }
}

/// An open write transaction. Dropping it rolls back.
pub(crate) struct WriteTx {
    writer: OwnedMappedMutexGuard<Option<Writer>, Writer>,
    place: Arc<Place>,
    holder: Holder,
}

impl WriteTx {
    pub(crate) fn connection(&self) -> &Connection {
        &self.writer.connection
    }

    /// Runs SQL of this crate.
    pub(crate) fn run_internal<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.writer.connection.run_internal(sql, run)
    }

    /// Runs a handler's SQL under the authorizer's restrictions.
    pub(crate) fn run_native<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let Writer { connection, guard, .. } = &mut *self.writer;
        guard.run(connection, sql, run)
    }

    /// False once SQLite itself has rolled back, for example because of `INSERT OR ROLLBACK` or a
    /// full disk. A statement that ran then would be committed immediately.
    pub(crate) fn is_open(&self) -> bool {
        !self.writer.connection.is_autocommit()
    }

    /// Commits. `action` becomes the action of an error.
    pub(crate) fn commit(mut self, action: impl FnOnce() -> String) -> Result<(), Error> {
        self.writer
            .run("COMMIT")
            .map_err(|error| classify_commit(action(), error))?;
        self.writer.wal.committed();
        self.place.commits.send_replace(());
        Ok(())
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
        self.place.ended(self.holder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(folder: &tempfile::TempDir) -> Shared {
        Shared::open(
            folder.path().join("a.db"),
            SqliteOptions::default(),
            &AtomicBool::new(false),
        )
        .expect("open")
    }

    #[tokio::test]
    async fn a_connection_whose_rollback_failed_is_opened_again() {
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
            "the connection is new"
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
            ConsumerId, KeyValue, Log, NewRecord, Offset, OffsetStore,
            backend::{Advance, Revision, Transaction},
        };

        let folder = tempfile::tempdir().expect("folder");
        let sqlite = crate::Sqlite {
            shared: Arc::new(shared(&folder)),
        };
        let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
        let set_pages = async |extra: i64| {
            let writer = sqlite.shared.writer.lock().await;
            let writer = writer.as_ref().expect("open");
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
            "SQLite rolled back"
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
