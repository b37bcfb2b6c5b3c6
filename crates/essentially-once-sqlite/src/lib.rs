//! SQLite as log and store for [`essentially_once`]. Records, state and position live in one file
//! and commit together.
//!
//! - [`Sqlite`] is an open file. Its clones share its connections.
//! - [`SqliteLog`] is a log in the file. Offsets are dense, begin at 0 and are never reused.
//! - [`SqliteStore`] keeps positions and state. A handler's [`SqliteTx`] offers portable
//!   [`KeyValue`](essentially_once::KeyValue) state, runs SQL on your own tables, and
//!   [sends](essentially_once::Outbox) records to logs of the file.
//!   [`SqliteLog::append_in`] does the same in a transaction on a connection of yours.
//!
//! The crate puts the file into WAL mode, and each of its connections syncs at every commit
//! (`synchronous=FULL`). Acknowledged data therefore survives a crash. The crate names its tables
//! `essentially_once_*`. The rest of the file, and `user_version`, is yours.
//!
//! ```
//! use essentially_once::{
//!     ConsumerId, Log, NewRecord, Offset, OffsetStore,
//!     backend::{Advance, Revision, Transaction},
//! };
//! use essentially_once_sqlite::Sqlite;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("shop.db");
//! let sqlite = Sqlite::open(path).await?;
//! let orders = sqlite.log("orders").await?;
//! orders.append(&[NewRecord::new("32.38"), NewRecord::new("11.61")]).await?;
//!
//! // A consumer's loop reads, changes state, and commits the change with the new position.
//! let shipping = ConsumerId::new("shipping")?;
//! let store = sqlite.store();
//! let mut reader = orders.read(Offset::ZERO).await?;
//! let mut tx = store.begin(&shipping).await?;
//! tx.execute("CREATE TABLE IF NOT EXISTS freight (offset INTEGER PRIMARY KEY, price REAL)", [])?;
//! let records = reader.next(100).await?;
//! for record in &records {
//!     let price: f64 = std::str::from_utf8(&record.payload)?.parse()?;
//!     tx.execute("INSERT INTO freight VALUES (?1, ?2)", (record.offset.lo() as i64, price))?;
//! }
//! let next = records[records.len() - 1].offset.successor();
//! let (expected, revision) = (Revision::NONE, Revision::NONE.next_epoch());
//! tx.commit(Advance::new(orders.id().clone(), next, expected, revision)).await?;
//!
//! let sum: Option<f64> = store
//!     .begin(&shipping)
//!     .await?
//!     .query_one("SELECT sum(price) FROM freight", [], |row| row.get(0))?;
//! assert_eq!(sum, Some(43.99));
//! assert_eq!(store.position(&shipping).await?.map(|position| position.next), Some(2.into()));
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! - `bundled` (default): compiles SQLite into the program, which needs a C compiler. Without it,
//!   the program links the SQLite library of the system, which must be version 3.51.3 or later, or
//!   3.50.7 or later in the 3.50 series. Opening a file with an older one fails, because its
//!   [WAL-reset bug](https://sqlite.org/wal.html#the_wal_reset_bug) can lose committed records.
//!
//! # Several processes
//!
//! Several processes can use one file, on one machine and a local disk. Only one transaction writes
//! at a time, and a handler's transaction stays open while the handler runs. Writers get the lock
//! in the order in which they asked for it. With a batch time limit of 100 ms, an append waits at
//! most about 100 ms for each busy consumer.
//!
//! File locks on an empty file next to the database, `shop.db-turn`, keep that order. You may
//! delete the file while no process uses the database. If it cannot be created, or if other
//! programs write to the database without it, everything still works, but a busy consumer may make
//! others wait up to their [`busy_timeout`](SqliteOptions::busy_timeout).
//!
//! An essentially-once handler sends records to the logs of its own file with
//! [`Outbox::send`](essentially_once::Outbox::send). It cannot append to them, because the append
//! would wait for the handler's own lock. Such an append fails at once, with an error that says so.
//!
//! # Backing up and restoring
//!
//! A file in use consists of the database and its WAL, so a plain copy of `shop.db` misses the most
//! recent commits. There are two ways to make a copy:
//!
//! - While processes work, run `VACUUM INTO 'copy.db'` in any SQLite shell or library, such as
//!   `sqlite3 shop.db "VACUUM INTO 'copy.db'"`. The copy is complete and consistent, and writers
//!   keep writing meanwhile. The WAL cannot shrink until the copy is done, and [a
//!   warning](SqliteOptions::wal_limit) may say so.
//! - Without a shell, stop all other processes, [`close`](Sqlite::close) the file, and copy
//!   `shop.db`.
//!
//! To restore a copy:
//!
//! 1. Stop every process that uses the file. SQLite keeps writing to a file that was replaced.
//! 2. Delete `shop.db-wal` and `shop.db-shm`. They belong to the old file and would damage the new
//!    one.
//! 3. Move the copy to `shop.db`, and start the processes again.
//!
//! What a consumer does next depends on what else was restored:
//!
//! - Log, position and state are in this file. All three went back together, so the consumer
//!   continues from the copy's position. Records appended since the copy are lost, and side effects
//!   outside the file since then happen again.
//! - Only the log went back, and the store is elsewhere. The position is past records that no
//!   longer exist or that are different now. The run ends with [`Error::OutOfRange`], or with
//!   [`Error::LogChanged`] once the log has grown past the position. Find out which records are
//!   new, and [`seek`](essentially_once::seek) to the first of them.
//! - Only the store went back, and the log is elsewhere. The consumer handles the records since the
//!   copy again, which is correct for the state in this file.
//!
//! A log to which transactions send goes on with numbers that it used before. Consumers behind a
//! relay would drop the new records as copies of those that were sent after the copy was made. So
//! give such logs new producers before you start the processes again, and do the same in a copy
//! that is used next to the original. Records that the copy holds keep their origins.
//!
//! ```sql
//! UPDATE essentially_once_logs SET sender = NULL;
//! ```
//!
//! If it was forgotten, the relay [stops](essentially_once::relay::Relay#a-restored-outbox) before
//! the first record that consumers would drop, in most cases.
//!
//! SQLite can also restore into an open file (`.restore` in its shell) while processes keep
//! running. A run whose position went back ends with [`Error::PositionLost`], unless the log went
//! back with it and has not grown since. Start the run again. If transactions send to a log of the
//! file, update the copy before you restore it, or a running handler uses old numbers meanwhile.

mod connection;
mod error;
mod log;
mod options;
mod store;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use essentially_once::Error;
pub use essentially_once::backend::Retention;
pub use rusqlite;

use crate::connection::{Connections, open, thread::on_a_thread};
pub use crate::{
    error::sqlite_error,
    log::SqliteLog,
    options::{LogOptions, SqliteOptions},
    store::{SqliteStore, SqliteTx},
};

/// An open SQLite file. Clones share its connections.
///
/// All writes of a handle and its clones go through one connection, one transaction at a time.
/// Tasks and processes get the write lock in the order in which they asked for it. Waiting for the
/// lock never blocks the runtime's thread. Committing does, for as long as the disk takes to sync.
/// No call waits for the runtime's blocking pool: trimming, and appends of more than 256 records,
/// use threads of their own.
///
/// Any call may be dropped. A dropped call keeps no transaction open and holds no lock.
///
/// The file must stay in place while it is open. SQLite keeps writing to a file that was moved or
/// deleted.
#[derive(Clone, Debug)]
pub struct Sqlite {
    connections: Arc<Connections>,
}

impl Sqlite {
    /// Opens the file with the default [`SqliteOptions`], and creates it if it is missing.
    ///
    /// # Errors
    /// As [`SqliteOptions::open`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        SqliteOptions::new().open(path).await
    }

    /// Opens the log of that name, and creates it empty if it is missing.
    ///
    /// # Errors
    /// As [`log_with`](Self::log_with).
    pub async fn log(&self, name: &str) -> Result<SqliteLog, Error> {
        self.log_with(name, LogOptions::new()).await
    }

    /// Opens the log of that name with options, such as a [retention](LogOptions::retention).
    ///
    /// Dropping the future may leave the log created, and has no other effect.
    ///
    /// # Errors
    /// [`Error::InvalidName`], [`Error::InvalidSetting`] and [`Error::Unavailable`].
    /// [`Error::Failed`], also if the log must exist and does not; the error then lists the logs of
    /// the file.
    pub async fn log_with(&self, name: &str, options: LogOptions) -> Result<SqliteLog, Error> {
        SqliteLog::open(Arc::clone(&self.connections), name, options).await
    }

    /// Returns the store of positions and state.
    pub fn store(&self) -> SqliteStore {
        SqliteStore::new(Arc::clone(&self.connections))
    }

    /// Closes the file. It waits for the open transaction, closes every connection of this handle
    /// and its clones, and copies the WAL into the file. If no other handle or process has the file
    /// open, the file alone then holds all data, and you may copy or move it.
    ///
    /// From then on, the handle's clones, logs, readers and stores fail with [`Error::Failed`].
    /// Closing twice has no effect. Dropping a handle without closing it loses no data: the last
    /// connection to close does the same work. That may happen a moment later, once a running fetch
    /// has ended.
    ///
    /// Dropping the future may leave the file open or closed.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if a transaction stays open for the whole `busy_timeout`; nothing is
    /// closed then. Also [`Error::Unavailable`] if other handles or processes read and write the
    /// file for that long; the file is closed then, and part of the data stays in the WAL.
    pub async fn close(&self) -> Result<(), Error> {
        self.connections.close().await
    }

    /// Returns the file's absolute path.
    pub fn path(&self) -> &Path {
        &self.connections.path
    }
}

impl SqliteOptions {
    /// Opens the file, and creates it if it is missing. Its folder must exist.
    ///
    /// Dropping the future may leave the file created, and keeps nothing open.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for a setting out of its bounds. [`Error::Failed`] if the path
    /// cannot be a database file (`:memory:` is one such path), or if the file is not a database,
    /// is not writable or was made by a newer version. The error names the path and says what to
    /// do. [`Error::Unavailable`] if another process keeps the file locked. A refused file stays
    /// unchanged.
    pub async fn open(self, path: impl AsRef<Path>) -> Result<Sqlite, Error> {
        self.check()?;
        let path = open::check_path(path.as_ref())?;
        let action = error::on("open SQLite file", &path);
        let given_up = GivenUp(Arc::default());
        let flag = Arc::clone(&given_up.0);
        match on_a_thread(move || Connections::open(path, self, &flag)).await {
            Ok(connections) => Ok(Sqlite {
                connections: Arc::new(connections?),
            }),
            Err(error) => Err(Error::unavailable(action, error)),
        }
    }
}

/// Signals to a thread that its caller gave up.
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
