//! The shop's table in the SQLite file.

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use essentially_once::{HandlerError, NewRecord, Outbox as _};
use essentially_once_sqlite::{
    SqliteTx,
    rusqlite::{self, Connection, params},
};

use super::{Shipment, Shipments, Shop};
use crate::settings::OUTBOX;

/// In the transaction that commits the position.
#[async_trait]
impl Shop for SqliteTx {
    async fn ship(&mut self, shipment: &Shipment<'_>) -> Result<(), HandlerError> {
        let Shipment { number, order } = shipment;
        let done = self.execute(INSERT, params![number, order.id, order.freight]);
        done.map(|_| ()).map_err(HandlerError::fatal)
    }

    async fn report(&mut self, record: NewRecord) -> Result<(), HandlerError> {
        Ok(self.send(OUTBOX, record).await?)
    }
}

/// Immediately, independently of the position.
#[async_trait]
impl Shop for Connection {
    async fn ship(&mut self, shipment: &Shipment<'_>) -> Result<(), HandlerError> {
        let Shipment { number, order } = shipment;
        let insert = self.prepare_cached(INSERT);
        let done = insert.and_then(|mut insert| insert.execute(params![number, order.id, order.freight]));
        done.map(|_| ()).map_err(HandlerError::fatal)
    }

    async fn report(&mut self, _: NewRecord) -> Result<(), HandlerError> {
        Ok(())
    }
}

const INSERT: &str = "INSERT INTO shipments (order_number, order_id, freight) VALUES (?1, ?2, ?3)";

/// The table has no unique constraint, which would hide doubled shipments.
pub(super) fn create_table(path: &Path) -> rusqlite::Result<()> {
    Connection::open(path)?.execute_batch(
        "CREATE TABLE IF NOT EXISTS shipments (order_number INTEGER NOT NULL, order_id TEXT NOT NULL, freight REAL NOT NULL)",
    )
}

/// The shop's own connection, on which every statement commits on its own.
pub(crate) fn own_connection(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    // The consumer commits its position to the same file meanwhile.
    connection.busy_timeout(Duration::from_secs(10))?;
    // A write survives the death of its process without a sync. Here only processes die.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    Ok(connection)
}

pub(super) fn count(shop: &Connection) -> rusqlite::Result<Shipments> {
    let mut counts = shop.prepare("SELECT order_number, count(*) FROM shipments GROUP BY order_number")?;
    let counts = counts.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)))?;
    counts.collect()
}
