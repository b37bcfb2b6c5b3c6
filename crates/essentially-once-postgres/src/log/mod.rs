//! The log: rows of one table, and a row per log that records where it begins and ends.

mod append;
mod catalog;
mod codec;
mod reader;
mod retention;
pub(crate) mod sending;
mod table;
pub(crate) mod wake;

use std::sync::Arc;

use async_trait::async_trait;
use essentially_once::{
    Error, Log, NewRecord, Offset,
    backend::{Bounds, Durability, LogId, LogReader, Retention, check_unnumbered},
};
use tokio_postgres::Transaction;

use self::{append::AppendedIn, catalog::Wanted, reader::PgReader, table::Table};
use crate::{
    connection::{Pool, durability},
    options::LogOptions,
};

/// A log in a PostgreSQL database. See [`Pg::log`](crate::Pg::log). Offsets are dense, begin at 0
/// and are never reused.
///
/// All records are rows of the table `records`, in this crate's schema, with the log's id from the
/// table `logs`. An append locks the log's row until it is committed, so offsets have the order of
/// the commits, and no hole fills in behind a reader. Transactions elsewhere, however long, delay
/// no reader. Appends to one log run one after the other, so append many records at once.
///
/// Any tool may read the rows. To append with SQL, run the statement below. The log yields a row
/// that it cannot decode as malformed.
///
/// ```sql
/// WITH log AS (UPDATE essentially_once.logs SET next = next + 1 WHERE name = 'orders' RETURNING id, next - 1 AS place)
/// INSERT INTO essentially_once.records (log, "offset", payload) SELECT id, place, '10248' FROM log;
/// NOTIFY "essentially_once:essentially_once"; -- optional: a reader looks every 200 ms in any case
/// ```
///
/// An append is one statement, so a failed append leaves no records behind.
///
/// # As an outbox
///
/// A handler's [`PgTx`](crate::PgTx) sends to any log of its schema, and
/// [`append_in`](Self::append_in) appends in a transaction of yours. Both give each record an
/// [`Origin`](essentially_once::Origin): its producer belongs to the log, its epoch is the stable
/// one, and its sequence is the offset. Open the log with [`Pg::log`](crate::Pg::log) to read it,
/// or to [relay](essentially_once::relay::Relay) it to another log.
///
/// ```
/// # use essentially_once::Error;
/// # use essentially_once_postgres::Pg;
/// use essentially_once::relay::Relay;
/// use essentially_once::{Consumer, ConsumerId, NewRecord, Outbox, Record, handler_fn};
/// use essentially_once_postgres::PgTx;
///
/// # async fn example(shop: Pg, bus: Pg) -> Result<(), Error> {
/// let ship = handler_fn(|order: &Record, tx: &mut PgTx| {
///     Box::pin(async move {
///         tx.queue("INSERT INTO shipments (order_id) VALUES ($1)", &[&&order.payload[..]]).await?;
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
/// The records are staged in this process. Their numbers are taken in the commit, so a slow handler
/// delays no other sender. A log that a transaction sends to for the first time is created at once,
/// and stays, empty, if the transaction is rolled back.
///
/// [`append`](Log::append) numbers nothing. A relay rejects the records that it leaves in an outbox
/// without an origin.
///
/// The log's [retention](crate::LogOptions::retention) also removes records that were not relayed.
/// Instead of a retention, call
/// [`remove_passed`](essentially_once::consumer::remove_passed) from time to time. It removes the
/// records that the relay has passed, and no others.
#[derive(Clone, Debug)]
pub struct PgLog {
    table: Arc<Table>,
}

impl PgLog {
    pub(crate) async fn open(pool: Arc<Pool>, name: &str, options: LogOptions) -> Result<Self, Error> {
        let wanted = Wanted {
            must_exist: options.existing,
            retention: options.retention.map(retention::to_columns).transpose()?,
            as_outbox: false,
        };
        let found = catalog::open(&pool, name, wanted).await?;
        Ok(Self {
            table: Arc::new(Table::new(pool, found.id, found.row)),
        })
    }

    /// Appends records in a transaction of yours, for a service that is no consumer but changes its
    /// tables on its own connection to this database. Your commit makes them visible together with
    /// your changes, and a rollback removes both. Returns the offset of the last record, which is
    /// final once the transaction is committed, or `None` for no records.
    ///
    /// Each record gets an origin, as described [above](PgLog#as-an-outbox). The log's row stays
    /// locked until your transaction ends, and others that append to the log wait for it, so append
    /// at the end of the transaction. Readers find the records within about 200 ms after the
    /// commit, or at once if another append follows.
    ///
    /// ```
    /// # use essentially_once::NewRecord;
    /// # use essentially_once_postgres::{PgLog, tokio_postgres};
    /// # async fn example(client: &mut tokio_postgres::Client, outbox: &PgLog) -> Result<(), Box<dyn std::error::Error>> {
    /// let tx = client.transaction().await?;
    /// tx.execute("INSERT INTO orders (country) VALUES ('Brazil')", &[]).await?;
    /// outbox.append_in(&tx, &[NewRecord::new("ordered").key("Brazil")]).await?;
    /// tx.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// After an error of the server, PostgreSQL lets the transaction only be rolled back.
    ///
    /// - [`Error::TooLarge`] for a record over the
    ///   [`record_limit`](crate::PgOptions::record_limit).
    /// - [`Error::Unavailable`] if the log's row is locked for longer than the `lock_timeout` of
    ///   your connection, or if the server is in trouble.
    /// - [`Error::Failed`] if a record has an origin, if the connection is to another database, if
    ///   its `synchronous_commit` is off, or if the log was deleted or recreated after this handle
    ///   opened it.
    pub async fn append_in(&self, tx: &Transaction<'_>, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let table = &self.table;
        let verb = "append in your transaction to";
        for record in records {
            check_unnumbered(table.id.name(), record)?;
            record.check_size(table.pool.options.record_limit)?;
        }
        append::check_batch(records, || table.action(verb))?;
        if records.is_empty() {
            return Ok(None);
        }
        let wanted = Wanted {
            must_exist: true,
            as_outbox: true,
            ..Wanted::default()
        };
        let found = catalog::open(&table.pool, table.id.name(), wanted).await?;
        if found.id != table.id {
            return Err(table.gone(verb));
        }
        let schema = &table.pool.options.schema;
        let appended = append::append_in(tx, schema, table.row, table.incarnation(), records).await;
        let cause = match appended.map_err(|fault| fault.of_read(table.action(verb)))? {
            AppendedIn::Next(next) => return Ok(Some((next as u64 - 1).into())),
            AppendedIn::Volatile => {
                "a crash of the server could take back the commit and use the record's number again: set \
                 `synchronous_commit = on` on the connection"
            }
            AppendedIn::NoLog => {
                "the connection is to another database, or the log was deleted or recreated after this handle opened it; \
                 open it again"
            }
        };
        Err(Error::failed(table.action(verb), cause))
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
        let action = || self.table.action("trim");
        self.table.current_status("trim").await?;
        let (trimmer, mut total) = (self.table.trimmer(), 0);
        let mut session = self.table.pool.take(action).await?;
        loop {
            let step = trimmer.expire(&mut session).await;
            let (removed, may_go_on) = step.map_err(|fault| fault.of_write(action()))?;
            total += removed;
            if !may_go_on {
                return Ok(total);
            }
        }
    }
}

#[async_trait]
impl Log for PgLog {
    fn id(&self) -> &LogId {
        &self.table.id
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let table = &self.table;
        for record in records {
            record.check_size(table.pool.options.record_limit)?;
        }
        append::check_batch(records, || table.action("append to"))?;
        if records.is_empty() {
            return Ok(None);
        }
        table.append(records).await.map(Some)
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        self.table.standing(from).await?;
        Ok(Box::new(PgReader::new(Arc::clone(&self.table), from.lo())))
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

    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        let status = self.table.current_status("find the last records of").await?;
        Ok(Some(status.end.saturating_sub(count).max(status.earliest).into()))
    }

    /// Moves the beginning of the log at once, and then removes up to 10,000 rows per statement.
    /// Appends and commits go on meanwhile.
    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        const VERB: &str = "remove records from";
        let action = || self.table.action(VERB);
        let bounds = self.table.current_status(VERB).await?.bounds();
        bounds.check(&self.table.id, offset.max(bounds.earliest))?;
        if offset <= bounds.earliest {
            return Ok(0);
        }
        let (trimmer, mut total) = (self.table.trimmer(), 0);
        let mut session = self.table.pool.take(action).await?;
        loop {
            let removed = trimmer.cut(&mut session, offset.lo() as i64).await;
            let removed = removed.map_err(|fault| fault.of_write(action()))?;
            total += removed;
            if removed == 0 {
                return Ok(total);
            }
        }
    }

    async fn durability(&self) -> Result<Durability, Error> {
        durability(&self.table.pool).await
    }
}
