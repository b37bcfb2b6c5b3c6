//! Handles an order, with the same code for every delivery and every store.

use std::borrow::Cow;

use async_trait::async_trait;
use essentially_once::{Handler, HandlerError, Record};

use crate::{
    leash::Leash,
    order::Format,
    shop::{Shipment, Shop},
};

/// Ships each order, and rejects a line that is not one. `D` determines where it writes.
pub(crate) struct Shipping<D> {
    pub(crate) desk: D,
    pub(crate) format: Format,
    pub(crate) leash: Leash,
}

#[async_trait]
impl<Tx: Send, D: Desk<Tx>> Handler<Tx> for Shipping<D> {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let line = line_number(record)
            .ok_or_else(|| HandlerError::fatal("the record has no header `line`: another program wrote it"))?;
        let outcome = match self.format.parse(&text(record)) {
            Ok(order) => {
                let offset = record.offset.to_string();
                self.desk.shop(tx).ship(&Shipment { offset, order: &order }).await
            }
            // No retry would help. The consumer sets the record aside or passes over it.
            Err(reason) => Err(HandlerError::reject(reason)),
        };
        self.leash.reached(line).map_err(HandlerError::fatal)?;
        outcome
    }
}

/// The line of the file that the record came from, as the writer noted it.
pub(crate) fn line_number(record: &Record) -> Option<u32> {
    std::str::from_utf8(record.header("line")?).ok()?.parse().ok()
}

/// The text of that line.
pub(crate) fn text(record: &Record) -> Cow<'_, str> {
    String::from_utf8_lossy(&record.payload)
}

/// Finds the shop to write to, given the argument that the delivery passes to its handler.
pub(crate) trait Desk<Tx>: Send {
    type Shop: Shop;

    fn shop<'a>(&'a mut self, tx: &'a mut Tx) -> &'a mut Self::Shop;
}

/// Essentially-once passes a transaction.
pub(crate) struct InTransaction;

impl<Tx: Shop> Desk<Tx> for InTransaction {
    type Shop = Tx;

    fn shop<'a>(&'a mut self, tx: &'a mut Tx) -> &'a mut Tx {
        tx
    }
}

/// The other deliveries pass nothing, so the handler brings its own connection.
pub(crate) struct OnItsOwn<S>(pub(crate) S);

impl<S: Shop> Desk<()> for OnItsOwn<S> {
    type Shop = S;

    fn shop<'a>(&'a mut self, (): &'a mut ()) -> &'a mut S {
        &mut self.0
    }
}
