//! The connections that the clones of one handle share: one for writing, one for short reads, one
//! for pulses, and those of the readers.

mod file;
pub(crate) mod lock;
pub(crate) mod open;
pub(crate) mod prepared;
pub(crate) mod retry;
pub(crate) mod thread;
mod transaction;
mod turnstile;
mod wal;
mod writer;

use std::{
    fmt,
    ops::Deref,
    path::PathBuf,
    sync::{Arc, Mutex, Weak, atomic::AtomicBool},
};

use essentially_once::Error;
use rusqlite::Connection;
use tokio::time::Instant;

pub(crate) use self::transaction::WriteTx;
use self::{
    file::{Errand, OpenFile},
    lock::lock,
    retry::{LONGEST_PAUSE, SHORTEST_PAUSE, retry_busy},
    thread::on_a_thread,
    writer::Writer,
};
use crate::{
    error::{classify, closed, on},
    options::SqliteOptions,
    store::pulse::Observer,
};

pub(crate) struct Connections {
    pub(crate) path: PathBuf,
    pub(crate) options: SqliteOptions,
    pub(crate) file: Arc<OpenFile>,
    writer: Writer,
    /// Reads never wait for the writer in WAL mode. `None` once the handle is closed.
    reader: Mutex<Option<Connection>>,
    /// Opened when a standby first asks for a pulse.
    observer: Mutex<Option<Observer>>,
    /// The readers of logs, each with its own connection. `None` once the handle is closed.
    readers: Mutex<Option<Vec<Weak<dyn Close>>>>,
    /// Each connection of a reader has a clone, also while it is being closed.
    open_readers: Arc<()>,
}

/// A reader with a connection that closes with the handle.
pub(crate) trait Close: Send + Sync {
    /// Closes the connection. Waits for a running fetch.
    fn close(&self);
}

/// The connection of a reader.
pub(crate) struct ReaderConnection {
    connection: Connection,
    /// Dropped after the connection is closed.
    _open: Arc<()>,
}

impl Deref for ReaderConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Connections {
    /// Opens the file. It blocks the thread, also while it waits for locks, until `given_up` is
    /// set.
    pub(crate) fn open(path: PathBuf, options: SqliteOptions, given_up: &AtomicBool) -> Result<Self, Error> {
        let writer = Writer::open(&path, options, given_up)?;
        let reader = open::read_only(&path, &options)?;
        Ok(Self {
            file: Arc::clone(writer.file()),
            path,
            options,
            writer,
            reader: Mutex::new(Some(reader)),
            observer: Mutex::default(),
            readers: Mutex::new(Some(Vec::new())),
            open_readers: Arc::default(),
        })
    }

    /// Adds the file to an error's action.
    pub(crate) fn on(&self, what: impl fmt::Display) -> String {
        on(what, &self.path)
    }

    /// Opens a write transaction. Waits for the lock without blocking the thread.
    pub(crate) async fn begin(&self, action: impl Fn() -> String) -> Result<WriteTx, Error> {
        self.writer.begin(Errand::Other, action).await
    }

    /// Like [`begin`](Self::begin), for a transaction of the store.
    pub(crate) async fn begin_for_store(&self, action: impl Fn() -> String) -> Result<WriteTx, Error> {
        self.writer.begin(Errand::Store, action).await
    }

    /// Like [`begin`](Self::begin), for an append. A handler that holds the lock may be the one
    /// that waits.
    pub(crate) async fn begin_append(&self, action: impl Fn() -> String) -> Result<WriteTx, Error> {
        self.writer.begin(Errand::Append, action).await
    }

    /// Opens a write transaction if the lock is free. Does not wait, and does not queue.
    pub(crate) fn try_begin(&self, action: impl Fn() -> String) -> Result<Option<WriteTx>, Error> {
        self.writer.try_begin(action)
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
            Ok(None) => Err(closed(self.on(action()))),
            Err(error) => Err(classify(self.on(action()), error)),
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
                return Err(closed(self.on(action())));
            }
            observer.get_or_insert(opened);
        }
        let deadline = Instant::now() + self.options.busy_timeout;
        let observed = retry_busy(deadline, LONGEST_PAUSE, || {
            lock(&self.observer).as_mut().map(&mut query).transpose()
        });
        match observed.await {
            Ok(Some(observed)) => Ok(observed),
            Ok(None) => Err(closed(self.on(action()))),
            Err(error) => Err(classify(self.on(action()), error)),
        }
    }

    /// Opens a connection for a reader. [`close`](Self::close) closes it too.
    pub(crate) async fn reader<R: Close + 'static>(
        &self,
        action: impl Fn() -> String,
        reader: impl FnOnce(ReaderConnection) -> R,
    ) -> Result<Arc<R>, Error> {
        let reader = Arc::new(reader(ReaderConnection {
            connection: open::reader(&self.path, &self.options).await?,
            _open: Arc::clone(&self.open_readers),
        }));
        let mut readers = lock(&self.readers);
        let Some(readers) = &mut *readers else {
            return Err(closed(self.on(action())));
        };
        readers.retain(|reader| reader.strong_count() > 0);
        let weak: Weak<R> = Arc::downgrade(&reader);
        readers.push(weak);
        Ok(reader)
    }

    /// Waits for the open transaction, closes every connection of the handle, and copies the WAL
    /// into the file.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        let action = || self.on("close SQLite file");
        let deadline = Instant::now() + self.options.busy_timeout;
        let Ok(mut writer) = self.writer.lock(deadline).await else {
            return Err(Error::unavailable(
                action(),
                "a transaction of this handle is still open, so nothing was closed; end it, then close again",
            ));
        };
        let Some(writer) = writer.take() else {
            return Ok(());
        };
        // The reader must go first. Without it, no observer is opened again.
        let reader = lock(&self.reader).take();
        let observer = lock(&self.observer).take();
        let readers = lock(&self.readers).take().unwrap_or_default();
        let open_readers = Arc::downgrade(&self.open_readers);
        let emptied = on_a_thread(move || {
            drop((reader, observer));
            for reader in readers.iter().filter_map(Weak::upgrade) {
                reader.close();
            }
            // A reader that was dropped a moment ago may still be closing on another thread.
            while open_readers.strong_count() > 1 {
                if Instant::now() >= deadline {
                    return Ok(false);
                }
                std::thread::sleep(SHORTEST_PAUSE);
            }
            while !writer.wal.empty(&writer.connection)? {
                if Instant::now() >= deadline {
                    return Ok(false);
                }
                std::thread::sleep(SHORTEST_PAUSE);
            }
            Ok(true)
        });
        match emptied.await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(Error::unavailable(
                action(),
                "the file is closed and all commits are safe, but part of the data is still in the WAL, because \
                 another handle or process reads or writes the file; copy it with `VACUUM INTO`, or together with \
                 its -wal file once nobody has it open",
            )),
            Ok(Err(error)) => Err(classify(action(), error)),
            Err(error) => Err(Error::unavailable(action(), error)),
        }
    }

    /// Replaces the writer connection with one that SQLite interrupts while the flag is set.
    #[cfg(test)]
    pub(crate) async fn interruptible(&self) -> Arc<AtomicBool> {
        use self::{prepared::Prepared, transaction::WriteConnection, wal::Wal};
        use crate::store::authorizer::Authorizer;

        let interrupted = Arc::new(AtomicBool::new(false));
        let authorizer = Authorizer::default();
        let mut connection = open::writer(&self.path, &authorizer, &self.options)
            .await
            .expect("writer");
        let flag = Arc::clone(&interrupted);
        connection
            .progress_handler(1, Some(move || flag.load(std::sync::atomic::Ordering::Relaxed)))
            .expect("handler");
        let wal = Wal::of(&self.path, self.options.wal_limit);
        let connection = WriteConnection::new(Prepared::new(connection), authorizer, wal);
        let deadline = Instant::now() + self.options.busy_timeout;
        *self.writer.lock(deadline).await.expect("free") = Some(connection);
        interrupted
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn connections(folder: &tempfile::TempDir) -> Connections {
        Connections::open(
            folder.path().join("a.db"),
            SqliteOptions::default(),
            &AtomicBool::new(false),
        )
        .expect("open")
    }

    #[tokio::test]
    async fn a_connection_whose_rollback_failed_is_opened_again() {
        let folder = tempfile::tempdir().expect("folder");
        let connections = connections(&folder);
        {
            let mut tx = connections.begin(|| "begin".into()).await.expect("begin");
            tx.connection()
                .execute_batch("CREATE TEMP TABLE old (x)")
                .expect("temp");
            tx.connection().execute_batch("COMMIT").expect("commit");
            tx.connection.broken = true;
        }
        let tx = connections.begin(|| "begin".into()).await.expect("begin");
        assert!(!tx.connection.broken && tx.is_open());
        assert!(
            tx.connection().prepare("SELECT * FROM temp.old").is_err(),
            "the connection is new"
        );
    }

    #[tokio::test]
    async fn a_dropped_transaction_leaves_the_connection_free() {
        let folder = tempfile::tempdir().expect("folder");
        let connections = connections(&folder);
        let tx = connections.begin(|| "begin".into()).await.expect("begin");
        tx.connection().execute_batch("CREATE TABLE t (x)").expect("create");
        drop(tx);
        let tx = connections.begin(|| "begin".into()).await.expect("begin");
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
            connections: Arc::new(connections(&folder)),
        };
        let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
        let set_pages = async |extra: i64| {
            let deadline = Instant::now() + Duration::from_secs(60);
            let writer = sqlite.connections.writer.lock(deadline).await.expect("free");
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
}
