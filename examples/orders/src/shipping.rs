//! What is done with an order: the same code for every delivery.

use async_trait::async_trait;
use essentially_once::{Handler, HandlerError, Record};
use essentially_once_sqlite::{
    SqliteTx,
    rusqlite::{Connection, Params, params},
};

use crate::{order::Format, worker::Leash};

/// Ships each order, or sets it aside if it is malformed. `D` says where it writes.
pub(crate) struct Shipping<D> {
    pub(crate) desk: D,
    pub(crate) format: Format,
    pub(crate) leash: Leash,
}

#[async_trait]
impl<Tx: Send, D: Desk<Tx>> Handler<Tx> for Shipping<D> {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let line = line_number(record)?;
        ship(self.desk.shop(tx), self.format, record, line)?;
        self.leash.reached(line).map_err(HandlerError::fatal)
    }
}

fn ship(shop: &mut impl Shop, format: Format, record: &Record, line: u32) -> Result<(), HandlerError> {
    let offset = record.offset.to_string();
    let payload = String::from_utf8_lossy(&record.payload);
    match format.parse(&payload) {
        Ok(order) => shop.write(
            "INSERT INTO shipments (log_offset, order_id, freight) VALUES (?1, ?2, ?3)",
            params![offset, order.id, order.freight],
        ),
        Err(reason) => shop.write(
            "INSERT INTO rejected (log_offset, line, payload, reason) VALUES (?1, ?2, ?3, ?4)",
            params![offset, line, payload, reason],
        ),
    }
}

/// The line of the file that the record was, as its writer noted.
fn line_number(record: &Record) -> Result<u32, HandlerError> {
    record
        .header("line")
        .and_then(|value| std::str::from_utf8(value).ok()?.parse().ok())
        .ok_or_else(|| HandlerError::fatal("the record has no header `line`: it is not of this program"))
}

/// Where shipments are written.
pub(crate) trait Shop: Send {
    /// Any error stops the worker: one that at-most-once passed over would be counted as lost to a kill.
    fn write(&mut self, sql: &str, values: impl Params) -> Result<(), HandlerError>;
}

/// In the transaction that commits the position.
impl Shop for SqliteTx {
    fn write(&mut self, sql: &str, values: impl Params) -> Result<(), HandlerError> {
        self.execute(sql, values).map(|_| ()).map_err(HandlerError::fatal)
    }
}

/// At once, without regard to the position.
impl Shop for Connection {
    fn write(&mut self, sql: &str, values: impl Params) -> Result<(), HandlerError> {
        self.prepare_cached(sql)
            .and_then(|mut statement| statement.execute(values))
            .map(|_| ())
            .map_err(HandlerError::fatal)
    }
}

/// Finds the shop to write in, given what the delivery hands to its handler.
pub(crate) trait Desk<Tx>: Send {
    type Shop: Shop;

    fn shop<'a>(&'a mut self, tx: &'a mut Tx) -> &'a mut Self::Shop;
}

/// Essentially-once hands over a transaction.
pub(crate) struct InTransaction;

impl Desk<SqliteTx> for InTransaction {
    type Shop = SqliteTx;

    fn shop<'a>(&'a mut self, tx: &'a mut SqliteTx) -> &'a mut SqliteTx {
        tx
    }
}

/// The other deliveries hand over nothing, so the handler brings its own connection.
pub(crate) struct OnItsOwn(pub(crate) Connection);

impl Desk<()> for OnItsOwn {
    type Shop = Connection;

    fn shop<'a>(&'a mut self, (): &'a mut ()) -> &'a mut Connection {
        &mut self.0
    }
}
