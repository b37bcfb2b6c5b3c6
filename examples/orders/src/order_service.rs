//! The order service: takes orders, announces them, and follows what becomes of them.

use std::{collections::HashMap, path::PathBuf};

use async_trait::async_trait;
use essentially_once::{Handler, HandlerError, NewRecord, Record, json};
use essentially_once_sqlite::{
    SqliteLog, SqliteTx,
    rusqlite::{Connection, TransactionBehavior, params},
};
use serde::{Deserialize, Serialize};

use crate::{
    Failure, database,
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
    path: PathBuf,
    outbox: SqliteLog,
}

impl OrderBook {
    /// Opens the table of orders, and creates it if it is missing.
    pub(crate) async fn open(settings: &Settings) -> Result<Self, Failure> {
        let sqlite = settings.order_database().await?;
        let outbox = sqlite.log(OUTBOX).await?;
        let path = sqlite.path().to_owned();
        let connection = database::open(&path)?;
        let created = connection.execute_batch(
            "CREATE TABLE IF NOT EXISTS orders \
             (number INTEGER PRIMARY KEY, line TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'placed', \
             early INTEGER NOT NULL DEFAULT 0)",
        );
        created.map_err(|error| database::explain("create the table of orders", &path, error))?;
        Ok(Self {
            connection,
            path,
            outbox,
        })
    }

    /// Stores orders and announces them, in one transaction.
    pub(crate) fn place(&mut self, orders: &[(u32, &str)]) -> Result<(), Failure> {
        let explain = |error| database::explain("store new orders", &self.path, error);
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(explain)?;
        let mut announcements = Vec::with_capacity(orders.len());
        for (number, line) in orders {
            let insert = "INSERT INTO orders (number, line) VALUES (?1, ?2)";
            tx.execute(insert, params![number, line]).map_err(explain)?;
            announcements.push(announcement(*number, line));
        }
        self.outbox.append_in(&tx, &announcements)?;
        tx.commit().map_err(explain)
    }

    /// The number of the last order.
    pub(crate) fn last(&self) -> Result<Option<u32>, Failure> {
        let last = self
            .connection
            .query_row("SELECT max(number) FROM orders", [], |row| row.get(0));
        last.map_err(|error| database::explain("read the last order", &self.path, error))
    }

    /// How many orders were reported as shipped before they were reported as packing.
    pub(crate) fn early(&self) -> Result<u64, Failure> {
        let count = "SELECT count(*) FROM orders WHERE early";
        let count = self.connection.query_row(count, [], |row| row.get::<_, i64>(0));
        let count = count.map_err(|error| database::explain("count early reports", &self.path, error))?;
        Ok(count.unsigned_abs())
    }

    /// What was last reported about each order, by its number.
    pub(crate) fn statuses(&self) -> Result<HashMap<u32, Option<Status>>, Failure> {
        let select = self.connection.prepare("SELECT number, status FROM orders");
        let statuses = select.and_then(|mut select| {
            let rows = select.query_map([], |row| {
                let status = match row.get_ref(1)?.as_str()? {
                    "packing" => Some(Status::Packing),
                    "shipped" => Some(Status::Shipped),
                    _ => None,
                };
                Ok((row.get(0)?, status))
            })?;
            rows.collect()
        });
        statuses.map_err(|error| database::explain("read the orders", &self.path, error))
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
