//! The shop's table in the SQLite file.

use std::path::Path;

use async_trait::async_trait;
use essentially_once::{HandlerError, NewRecord, Outbox as _};
use essentially_once_sqlite::{
    SqliteTx,
    rusqlite::{Connection, params},
};

use super::{Shipment, Shop};
use crate::{Failure, database, settings::OUTBOX};

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
        let path = self.path().unwrap_or_default().to_owned();
        done.map(|_| ())
            .map_err(|error| HandlerError::fatal(database::explain("write a shipment", Path::new(&path), error)))
    }

    async fn report(&mut self, _: NewRecord) -> Result<(), HandlerError> {
        Ok(())
    }
}

const INSERT: &str = "INSERT INTO shipments (order_number, order_id, freight) VALUES (?1, ?2, ?3)";

/// The table has no unique constraint, which would hide doubled shipments.
pub(super) fn create_table(path: &Path) -> Result<(), Failure> {
    let created = database::open(path)?.execute_batch(
        "CREATE TABLE IF NOT EXISTS shipments (order_number INTEGER NOT NULL, order_id TEXT NOT NULL, freight REAL NOT NULL)",
    );
    created.map_err(|error| database::explain("create the table of shipments", path, error))
}

/// The shop's own connection, on which every statement commits on its own.
pub(crate) fn own_connection(path: &Path) -> Result<Connection, Failure> {
    let connection = database::open(path)?;
    // A write survives the death of its process without a sync. Here only processes die.
    let set = connection.pragma_update(None, "synchronous", "NORMAL");
    set.map_err(|error| database::explain("open the table of shipments", path, error))?;
    Ok(connection)
}

/// The numbers of the shipped orders, in the order of the shipments.
pub(super) fn list(path: &Path) -> Result<Vec<u32>, Failure> {
    let shop = database::open(path)?;
    let numbers = shop
        .prepare("SELECT order_number FROM shipments ORDER BY rowid")
        .and_then(|mut select| select.query_map([], |row| row.get(0))?.collect());
    numbers.map_err(|error| database::explain("read the shipments", path, error))
}
