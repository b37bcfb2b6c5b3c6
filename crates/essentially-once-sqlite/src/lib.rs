//! SQLite as log and store for [`essentially_once`]: records, state and position in one file, committed together.
//!
//! - [`Sqlite`] is an open file; its clones share two connections.
//! - [`SqliteLog`] is a log in it: offsets are dense, begin at 0 and are never used twice.
//! - [`SqliteStore`] keeps positions and state. A handler's [`SqliteTx`] is portable
//!   [`KeyValue`](essentially_once::KeyValue) state and also takes SQL on tables of your own.
//!
//! The file is put into WAL mode and every connection of this crate syncs at each commit
//! (`synchronous=FULL`), so what was acknowledged survives a crash. Tables of this crate are named
//! `essentially_once_*`; the rest of the file, and `user_version`, is yours.
//!
//! ```
//! use essentially_once::{ConsumerId, Log, NewRecord, Offset, OffsetStore, backend::{Advance, Revision, Transaction}};
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
//! // What a consumer's loop does: read, change state, and commit the change together with the new position.
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

//! # Several processes
//!
//! Several processes may use one file, on one machine and a local disk. Only one transaction writes
//! at a time, and a handler's transaction is open while the handler runs. Those who wait get the
//! write lock in the order of asking, so with a batch time limit of 100 ms an append waits about
//! 100 ms at most for each busy consumer. The order is kept by locks on an empty file beside the
//! database, `shop.db-turn`. It may be deleted while no process uses the database. Where it cannot
//! be made, and beside programs that do not know it, everything works, but a busy consumer may keep
//! others waiting up to their [`busy_timeout`](SqliteOptions::busy_timeout).
//!
//! A handler cannot append to a log in its own file: the append would wait for the handler's own
//! lock. It fails after the `busy_timeout`, and says so. Insert into a table of yours instead, or
//! use a log in another file.
//!
//! # Backing up and restoring
//!
//! A file in use is the database together with its WAL, so a plain copy of `shop.db` misses what
//! was committed last. There are two ways to make a copy:
//!
//! - While processes work: run `VACUUM INTO 'copy.db'` in any SQLite shell or library, such as
//!   `sqlite3 shop.db "VACUUM INTO 'copy.db'"`. The copy is whole and of one moment, and nobody is
//!   kept from writing. Until it is done the WAL cannot be cut back, and [a
//!   warning](SqliteOptions::wal_limit) may say so.
//! - Without a shell: stop all other processes, [`close`](Sqlite::close) the file, and copy
//!   `shop.db`.
//!
//! To restore a copy:
//!
//! 1. Stop every process that uses the file. SQLite goes on writing to a file that was replaced.
//! 2. Delete `shop.db-wal` and `shop.db-shm`: they belong to the old file, and would damage the new
//!    one.
//! 3. Move the copy to `shop.db`, and start the processes again.
//!
//! What a consumer does then depends on what else was restored:
//!
//! - Log, position and state are in this file: they went back together, and the consumer goes on
//!   from the copy's position. Records appended since the copy are lost, and what handlers did
//!   outside the file since then happens again.
//! - Only the log went back, and the store is elsewhere: the position is past records that do not
//!   exist any more, or are other ones by now. The run ends with [`Error::OutOfRange`], or with
//!   [`Error::LogChanged`] once the log has grown past the position. Find out which records are
//!   new, and [`seek`](essentially_once::seek) to the first of them.
//! - Only the store went back, and the log is elsewhere: the consumer handles the records since the
//!   copy again, which is right for the state in this file.
//!
//! SQLite can also restore into the open file (`.restore` in its shell), under processes that go
//! on. A run that finds its position gone back ends with [`Error::PositionLost`], unless the log
//! went back with it and has not grown since. Start it again.

mod codec;
mod connect;
mod error;
mod guard;
mod log;
mod place;
mod prepared;
mod pulse;
mod reader;
mod retention;
mod row;
mod schema;
mod shared;
mod store;
mod turnstile;
mod wal;

use std::{
    fmt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use essentially_once::Error;
pub use essentially_once::backend::Retention;
pub use rusqlite;

use crate::shared::{Shared, on_a_thread};
pub use crate::{
    error::sqlite_error,
    log::{LogOptions, SqliteLog},
    store::{SqliteStore, SqliteTx},
};

/// An open SQLite file. Clones share its connections.
///
/// All writing of a handle and its clones goes through one connection, one transaction at a time.
/// Whoever waits for it, in this handle, another one or another process, gets it in the order of
/// asking. Waiting never blocks the runtime's thread. Committing does, for as long as the disk
/// takes to sync. Nothing waits for the runtime's blocking pool: appends of more than 256 records,
/// and trimming, use threads of their own.
///
/// Any call may be dropped: it then holds nothing open, and no lock.
///
/// The file must stay where it is while it is open: SQLite goes on writing to a file that was moved or deleted.
#[derive(Clone)]
pub struct Sqlite {
    shared: Arc<Shared>,
}

impl Sqlite {
    /// Opens the file with the default [`SqliteOptions`], and creates it if it is missing.
    ///
    /// # Errors
    /// As [`SqliteOptions::open`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        SqliteOptions::new().open(path).await
    }

    /// The log of that name, created empty if it is missing.
    ///
    /// # Errors
    /// As [`log_with`](Self::log_with).
    pub async fn log(&self, name: &str) -> Result<SqliteLog, Error> {
        self.log_with(name, LogOptions::new()).await
    }

    /// As [`log`](Self::log), with options: [`LogOptions::existing`] creates nothing.
    ///
    /// Dropping the future may leave the log created, and has no other effect.
    ///
    /// # Errors
    /// [`Error::InvalidName`], [`Error::Unavailable`]; [`Error::Failed`], also for a log that must exist and does not. It then names
    /// the logs of the file.
    pub async fn log_with(&self, name: &str, options: LogOptions) -> Result<SqliteLog, Error> {
        SqliteLog::open(Arc::clone(&self.shared), name, options).await
    }

    /// The store of positions and state.
    pub fn store(&self) -> SqliteStore {
        SqliteStore::new(Arc::clone(&self.shared))
    }

    /// Closes the file: it waits for the transaction that is open, closes every connection of this
    /// handle and its clones, and copies what is in the WAL into the file. After that, if no other
    /// handle or process has the file open, it alone holds everything, and may be copied or moved.
    ///
    /// Clones of the handle, and its logs, readers and stores, fail with [`Error::Failed`] from
    /// then on. Closing twice does nothing. Dropping a handle without closing it loses nothing
    /// either: the last connection that closes does the same, which may be a moment later, when a
    /// fetch that is under way has ended.
    ///
    /// Dropping the future may leave the file open or closed.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if a transaction stays open for the whole `busy_timeout`: nothing was closed then. The same if
    /// other handles or processes read and write the file for so long: then it is closed, and a part stays in the WAL.
    pub async fn close(&self) -> Result<(), Error> {
        self.shared.close().await
    }

    /// The file's absolute path.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }
}

impl fmt::Debug for Sqlite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sqlite")
            .field("path", &self.shared.path)
            .finish_non_exhaustive()
    }
}

/// How to open a file; see [`Sqlite::open`].
///
/// ```no_run
/// # use essentially_once_sqlite::SqliteOptions;
/// # use std::time::Duration;
/// # async fn example() -> Result<(), essentially_once::Error> {
/// let sqlite = SqliteOptions::new()
///     .busy_timeout(Duration::from_secs(2))
///     .record_limit(64 * 1024)
///     .open("/var/lib/shop/shop.db")
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SqliteOptions {
    pub(crate) busy_timeout: Duration,
    pub(crate) record_limit: usize,
    pub(crate) wal_limit: u64,
}

impl SqliteOptions {
    /// The defaults: 10 seconds, records of 16 MiB, a WAL of 64 MiB.
    pub fn new() -> Self {
        Self {
            busy_timeout: Duration::from_secs(10),
            record_limit: 16 * 1024 * 1024,
            wal_limit: 64 * 1024 * 1024,
        }
    }

    /// How long to wait for the write lock before [`Error::Unavailable`]; a year at most.
    #[must_use]
    pub fn busy_timeout(mut self, timeout: Duration) -> Self {
        // Points in time are computed with it, which a longer one could overflow.
        self.busy_timeout = timeout.min(Duration::from_secs(365 * 24 * 60 * 60));
        self
    }

    /// Largest record (key, headers and payload together), state key or state value, in bytes.
    #[must_use]
    pub fn record_limit(mut self, bytes: usize) -> Self {
        self.record_limit = bytes;
        self
    }

    /// How large the WAL (`-wal`, beside the file) may grow, in bytes. SQLite usually copies it
    /// into the file after every 4 MiB, or after this much if it is less.
    ///
    /// It grows over the limit where a single transaction is larger, and while a read transaction
    /// on the file stays open: SQLite cannot remove what someone may still read. A warning says so.
    /// Once that has ended, a commit cuts it back.
    #[must_use]
    pub fn wal_limit(mut self, bytes: u64) -> Self {
        self.wal_limit = bytes;
        self
    }

    /// Opens the file, and creates it if it is missing. Its folder must exist.
    ///
    /// Dropping the future may leave the file created, and keeps nothing open.
    ///
    /// # Errors
    /// [`Error::Failed`] for a path that cannot be a database (`:memory:` is none), a file that is something else, cannot be
    /// written or was made by a newer version, always with the path and what to do; [`Error::Unavailable`] if another process
    /// keeps the file locked. Nothing is changed in a file that is refused.
    pub async fn open(self, path: impl AsRef<Path>) -> Result<Sqlite, Error> {
        if self.record_limit > MAX_RECORD_LIMIT {
            return Err(Error::InvalidSetting {
                setting: "record_limit",
                reason: format!(
                    "{} bytes is over what SQLite takes, {MAX_RECORD_LIMIT}",
                    self.record_limit
                ),
            });
        }
        let path = connect::check_path(path.as_ref())?;
        let action = error::on("open SQLite file", &path);
        let given_up = GivenUp(Arc::default());
        let flag = Arc::clone(&given_up.0);
        match on_a_thread(move || Shared::open(path, self, &flag)).await {
            Ok(shared) => Ok(Sqlite {
                shared: Arc::new(shared?),
            }),
            Err(error) => Err(Error::unavailable(action, error)),
        }
    }
}

/// Says to a thread that nobody waits for it any more.
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// SQLite takes rows of up to 1,000,000,000 bytes; the rest is room for the other columns and the encoding of headers.
const MAX_RECORD_LIMIT: usize = 900_000_000;

impl Default for SqliteOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// The README's examples compile, as part of the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
