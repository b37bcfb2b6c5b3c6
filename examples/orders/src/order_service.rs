//! The order service: takes orders, announces them, and follows what becomes of them.

use std::time::Duration;

use async_trait::async_trait;
use essentially_once::{Handler, HandlerError, NewRecord, Record, json};
use essentially_once_sqlite::{
    SqliteLog, SqliteTx,
    rusqlite::{self, Connection, TransactionBehavior, params},
};
use serde::{Deserialize, Serialize};

use crate::{
    Failure,
    order::{self, ORDER_HEADER},
    settings::{OUTBOX, Settings},
};

/// How far the shipping service is with an order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    Packing,
    Shipped,
}

/// What the shipping service tells the order service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) order: u32,
    pub(crate) status: Status,
}

/// The table of orders, and the outbox in the same file.
pub(crate) struct OrderBook {
    connection: Connection,
    outbox: SqliteLog,
}

impl OrderBook {
    /// Opens the table of orders, and creates it if it is missing.
    pub(crate) async fn open(settings: &Settings) -> Result<Self, Failure> {
        let sqlite = settings.order_database().await?;
        let outbox = sqlite.log(OUTBOX).await?;
        let connection = Connection::open(sqlite.path())?;
        // The consumer of this service commits to the same file.
        connection.busy_timeout(Duration::from_secs(10))?;
        connection.execute_batch(
            "CREATE TABLE IF NOT EXISTS orders \
             (number INTEGER PRIMARY KEY, line TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'placed', \
             early INTEGER NOT NULL DEFAULT 0)",
        )?;
        Ok(Self { connection, outbox })
    }

    /// Stores orders and announces them, in one transaction.
    pub(crate) fn place(&mut self, orders: &[(u32, &str)]) -> Result<(), Failure> {
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut announcements = Vec::with_capacity(orders.len());
        for (number, line) in orders {
            tx.execute(
                "INSERT INTO orders (number, line) VALUES (?1, ?2)",
                params![number, line],
            )?;
            announcements.push(announcement(*number, line));
        }
        self.outbox.append_in(&tx, &announcements)?;
        Ok(tx.commit()?)
    }

    /// The number of the last order.
    pub(crate) fn last(&self) -> rusqlite::Result<Option<u32>> {
        self.connection
            .query_row("SELECT max(number) FROM orders", [], |row| row.get(0))
    }

    /// How many orders were reported as shipped before they were reported as packing.
    pub(crate) fn early(&self) -> rusqlite::Result<u64> {
        let count: i64 = self
            .connection
            .query_row("SELECT sum(early) FROM orders", [], |row| row.get::<_, Option<i64>>(0))?
            .unwrap_or_default();
        Ok(count.unsigned_abs())
    }

    /// How many orders have this status.
    pub(crate) fn count(&self, status: &str) -> rusqlite::Result<u64> {
        let count = "SELECT count(*) FROM orders WHERE status = ?1";
        let count: i64 = self.connection.query_row(count, [status], |row| row.get(0))?;
        Ok(count.unsigned_abs())
    }
}

fn announcement(number: u32, line: &str) -> NewRecord {
    let record = NewRecord::new(line.to_owned()).header(ORDER_HEADER, number.to_string());
    match order::key(line) {
        Some(key) => record.key(key),
        None => record,
    }
}

/// Marks an order as packing and then as shipped, as the shipping service reports it.
///
/// The reports of an order arrive in order, with one exception: if `packing` was altered on the bus
/// and `shipped` was not, the second one is handled first, and the relay sends the first one again.
/// So an early `shipped` is noted, and takes effect with `packing`.
pub(crate) struct Follow;

#[async_trait]
impl Handler<SqliteTx> for Follow {
    async fn handle(&mut self, record: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        let Progress { order, status } = json::decode(record)?;
        let (update, expected) = match status {
            Status::Packing => (
                "UPDATE orders SET status = iif(early, 'shipped', 'packing') WHERE number = ?1 AND status = 'placed'",
                "placed",
            ),
            Status::Shipped => (
                "UPDATE orders SET status = iif(status = 'packing', 'shipped', status), early = (status = 'placed') \
                 WHERE number = ?1 AND (status = 'packing' OR status = 'placed' AND NOT early)",
                "packing",
            ),
        };
        match tx.execute(update, params![order])? {
            1 => Ok(()),
            _ => Err(HandlerError::reject(format!(
                "order {order} is reported as {status:?}, but it is unknown or not `{expected}`"
            ))),
        }
    }
}
