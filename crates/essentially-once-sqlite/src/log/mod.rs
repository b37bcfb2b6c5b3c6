//! The log: one table per log, and one row that records where the log ends.

mod catalog;
mod codec;
mod reader;
mod retention;
pub(crate) mod sending;
mod table;
mod ticks;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use essentially_once::{
    Error, Log, NewRecord, Offset,
    backend::{Bounds, Durability, LogId, LogReader, Retention, check_unnumbered},
};
use rusqlite::Transaction;

use self::{
    reader::{Cursor, SqliteReader},
    table::Table,
};
use crate::{
    connection::{Connections, open, thread::on_a_thread},
    error::classify,
    options::LogOptions,
};

/// Appends up to this many records and bytes run on the caller's thread, which is faster than
/// handing them to another one.
const INLINE_RECORDS: usize = 256;
const INLINE_BYTES: usize = 1024 * 1024;

/// Records that [`SqliteLog::trim`] and [`Log::remove_before`] remove per transaction. The bound
/// keeps other writers from waiting long.
const TRIM_CHUNK: u64 = 10_000;

/// A log in a SQLite file. See [`Sqlite::log`](crate::Sqlite::log). Offsets are dense, begin at 0
/// and are never reused.
///
/// Each record is a row of the table `essentially_once_log_<id>`, with the id from
/// `essentially_once_logs`. Any tool may read the rows. The log also reads rows that were inserted
/// by hand, and yields a row that it cannot decode as malformed. The column `producer` holds the
/// producer's name, followed by `#` and the epoch unless it is the stable one, as in `web#17`.
/// Versions before 0.2 yield such a record as malformed rather than mix up epochs.
///
/// An append is one transaction, so a failed append leaves no records behind.
///
/// Under essentially-once, an append within a handler on the same file would wait for the handler's
/// own lock, so it fails at once with [`Error::Failed`], and the record counts as failed. In a task
/// that the handler has spawned, the append ends after the `busy_timeout`. Such a handler sends its
/// records with [`Outbox::send`](essentially_once::Outbox::send) instead.
///
/// # As an outbox
///
/// A handler's [`SqliteTx`](crate::SqliteTx) sends to any log of its file, and
/// [`append_in`](Self::append_in) appends in a transaction of yours. Both give each record an
/// [`Origin`](essentially_once::Origin): its producer belongs to the log, its epoch is the stable
/// one, and its sequence is the offset. Open the log with [`Sqlite::log`](crate::Sqlite::log) to
/// read it, or to [relay](essentially_once::relay::Relay) it to another log. The producer is drawn
/// for the first such record, and stored in the column `sender` of `essentially_once_logs`.
///
/// ```
/// # use essentially_once::Error;
/// # use essentially_once_sqlite::Sqlite;
/// use essentially_once::relay::Relay;
/// use essentially_once::{Consumer, ConsumerId, NewRecord, Outbox, Record, handler_fn};
/// use essentially_once_sqlite::SqliteTx;
///
/// # async fn example(shop: Sqlite, bus: Sqlite) -> Result<(), Error> {
/// let ship = handler_fn(|order: &Record, tx: &mut SqliteTx| {
///     Box::pin(async move {
///         tx.execute("INSERT INTO shipments (order_id) VALUES (?1)", [&order.payload[..]])?;
///         tx.send("outbox", NewRecord::new("shipped").key(order.payload.clone())).await?;
///         Ok(())
///     })
/// });
/// let (orders, outbox) = (shop.log("orders").await?, shop.log("outbox").await?);
/// let shipping = ConsumerId::new("shipping")?;
/// let shipping = Consumer::essentially_once(shipping, orders, shop.store(), ship);
///
/// let relay = Relay::to(bus.log("shipped").await?);
/// let relay = Consumer::at_least_once(ConsumerId::new("relay")?, outbox, shop.store(), relay);
/// let (shipping, relay) = tokio::join!(shipping.run(), relay.run());
/// # (shipping?, relay?);
/// # Ok(())
/// # }
/// ```
///
/// [`append`](Log::append) numbers nothing. A relay rejects the records that it leaves in an outbox
/// without an origin.
///
/// The log's [retention](crate::LogOptions::retention) also removes records that were not relayed.
/// A log that a transaction creates keeps every record. If it must not grow forever, set a
/// `max_age` that is longer than the longest time for which the relay may be away. `max_records`
/// also counts the records of one large transaction. A relay from which retention removed records
/// ends with [`Error::Truncated`]. Instead of a retention, call
/// [`remove_passed`](essentially_once::consumer::remove_passed) from time to time. It removes the
/// records that the relay has passed, and no others. SQLite uses their space in the file again.
#[derive(Clone, Debug)]
pub struct SqliteLog {
    table: Arc<Table>,
}

impl SqliteLog {
    pub(crate) async fn open(connections: Arc<Connections>, name: &str, options: LogOptions) -> Result<Self, Error> {
        let id = LogId::new(name)?;
        let wanted = options.retention.map(retention::to_columns).transpose()?;
        let action = || format!("open log {name}");
        let failed = |error| classify(connections.on(action()), error);
        let mut found = connections
            .read(action, |connection| catalog::find(connection, name))
            .await?;
        let is_complete = match &found {
            Some(found) => wanted.is_none_or(|wanted| wanted == found.retention),
            None => options.existing,
        };
        if !is_complete {
            let tx = connections.begin(action).await?;
            found = catalog::open(tx.connection(), name, options.existing, wanted).map_err(failed)?;
            tx.commit(|| connections.on(action()))?;
        }
        let Some(found) = found else {
            let names = connections.read(action, catalog::names).await?;
            return Err(Error::failed(connections.on(action()), catalog::no_such_log(&names)));
        };
        let id = id.with_incarnation(&found.incarnation)?;
        Ok(Self {
            table: Arc::new(Table::new(connections, id, found.id)),
        })
    }

    /// Appends records in a transaction of yours, for a service that is no consumer but changes the
    /// tables of this file on its own connection. Your commit makes them visible together with your
    /// changes, and a rollback removes both. Returns the offset of the last record, which is final
    /// once the transaction is committed, or `None` for no records.
    ///
    /// Each record gets an origin, as described [above](SqliteLog#as-an-outbox). All readers, also
    /// those of this process, find the records as if another process had appended them: within
    /// about 10 ms after the commit, or 1 ms if they have found others within the last second. The
    /// log's retention applies, as with [`append`](Log::append).
    ///
    /// The connection must have [`Sqlite::path`](crate::Sqlite::path) open as its main database,
    /// with `synchronous` at `FULL`, which is SQLite's default. Begin the transaction with
    /// `TransactionBehavior::Immediate`, and set a `busy_timeout` on the connection. No consumer
    /// commits to the file until your transaction ends. Your connection does not queue for the lock
    /// with [the others](crate#several-processes), and blocks its thread while it waits, so use it
    /// on a thread of its own, for instance with `tokio::task::spawn_blocking`. The statements of
    /// this call take about six places in the connection's statement cache.
    ///
    /// The call changes what SQLite's `last_insert_rowid` and `changes` return. Read them before.
    ///
    /// ```
    /// # use essentially_once::{Log, NewRecord};
    /// # use essentially_once_sqlite::Sqlite;
    /// use essentially_once_sqlite::rusqlite::{Connection, TransactionBehavior};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("shop.db");
    /// let sqlite = Sqlite::open(path).await?;
    /// let outbox = sqlite.log("outbox").await?;
    ///
    /// let mut connection = Connection::open(sqlite.path())?;
    /// connection.execute_batch("CREATE TABLE orders (id INTEGER PRIMARY KEY, country TEXT)")?;
    /// let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    /// tx.execute("INSERT INTO orders (country) VALUES ('Brazil')", [])?;
    /// outbox.append_in(&tx, &[NewRecord::new("ordered").key("Brazil")])?;
    /// tx.commit()?;
    /// assert_eq!(outbox.bounds().await?.end, 1.into());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// After an error, none of the records is in the transaction. It can go on, unless SQLite
    /// rolled it back or it did not get the write lock.
    ///
    /// - [`Error::TooLarge`] for a record over the
    ///   [`record_limit`](crate::SqliteOptions::record_limit).
    /// - [`Error::Unavailable`] if the transaction does not get the file's write lock. Begin it
    ///   again.
    /// - [`Error::Failed`] if a record has an origin, if the connection has another file open or
    ///   other settings, if a statement of yours is still writing, if the log was deleted or
    ///   recreated after this handle opened it, or if SQLite refuses the rows.
    pub fn append_in(&self, tx: &Transaction<'_>, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let table = &self.table;
        for record in records {
            check_unnumbered(table.id.name(), record)?;
            record.check_size(table.connections.options.record_limit)?;
        }
        if records.is_empty() {
            return Ok(None);
        }
        table.append_in(tx, records).map(Some)
    }

    /// Returns what the log keeps.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Failed`].
    pub async fn retention(&self) -> Result<Retention, Error> {
        Ok(self.table.current_status("read retention of").await?.retention)
    }

    /// Removes all records that have expired under the log's retention, and returns their number.
    ///
    /// Dropping the future may leave some expired records in place.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Failed`].
    pub async fn trim(&self) -> Result<u64, Error> {
        let mut total = 0;
        loop {
            let action = || format!("trim log {}", self.table.id);
            let tx = self.table.connections.begin(action).await?;
            let table = Arc::clone(&self.table);
            let removed = run_on_thread(self, "trim", move || table.trim(tx, TRIM_CHUNK)).await?;
            total += removed;
            if removed < TRIM_CHUNK {
                return Ok(total);
            }
        }
    }
}

/// Runs slow work on another thread. The work completes even if the caller gives up.
async fn run_on_thread<T: Send + 'static>(
    log: &SqliteLog,
    verb: &str,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    on_a_thread(work).await.unwrap_or_else(|error| {
        let action = log.table.connections.on(format!("{verb} log {}", log.table.id));
        Err(Error::indeterminate(action, error))
    })
}

#[async_trait]
impl Log for SqliteLog {
    fn id(&self) -> &LogId {
        &self.table.id
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let table = &self.table;
        let mut bytes = 0;
        for record in records {
            record.check_size(table.connections.options.record_limit)?;
            bytes += record.size();
        }
        if records.is_empty() {
            return Ok(None);
        }
        let tx = table
            .connections
            .begin_append(|| format!("append to log {}", table.id))
            .await?;
        // No await from here to the commit on this thread, so a dropped future leaves no partial
        // append.
        let last = if records.len() <= INLINE_RECORDS && bytes <= INLINE_BYTES {
            table.append(tx, records)?
        } else {
            let (table, records) = (Arc::clone(table), records.to_vec());
            run_on_thread(self, "append to", move || table.append(tx, &records)).await?
        };
        Ok(Some(last))
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let status = self.table.current_status("read").await?;
        self.table.standing(from, Some(&status))?;
        let action = || format!("read log {}", self.table.id);
        let cursor = self
            .table
            .connections
            .reader(action, |connection| {
                Mutex::new(Cursor::new(Arc::clone(&self.table), connection))
            })
            .await?;
        Ok(Box::new(SqliteReader::new(Arc::clone(&self.table), cursor, from.lo())))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        Ok(self.table.current_status("read bounds of").await?.bounds())
    }

    /// Exact, unless rows were deleted by hand.
    async fn count_from(&self, from: Offset) -> Result<Option<u64>, Error> {
        let status = self.table.current_status("count records of").await?;
        let from = if from.hi() == 0 { from.lo() } else { u64::MAX };
        Ok(Some(status.end.saturating_sub(from.max(status.earliest))))
    }

    /// Removes up to 10,000 records per transaction. Appends and commits go on in between.
    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        const VERB: &str = "remove records from";
        let mut total = 0;
        // Only a log that holds such records takes the write lock.
        while self
            .table
            .holds_before(offset, &self.table.current_status(VERB).await?)?
        {
            let action = || format!("{VERB} log {}", self.table.id);
            let tx = self.table.connections.begin(action).await?;
            let table = Arc::clone(&self.table);
            total += run_on_thread(self, VERB, move || table.remove_before(tx, offset, TRIM_CHUNK)).await?;
        }
        Ok(total)
    }

    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        let status = self.table.current_status("find the last records of").await?;
        Ok(Some(status.end.saturating_sub(count).max(status.earliest).into()))
    }

    async fn durability(&self) -> Result<Durability, Error> {
        let action = || format!("read durability of log {}", self.table.id);
        self.table.connections.read(action, open::durability).await
    }
}
