//! Handles an order, with the same code for every delivery and every store.

use async_trait::async_trait;
use essentially_once::{Handler, HandlerError, Record};

use crate::{
    leash::Leash,
    order::Format,
    shop::{Effect, Shop},
};

/// Ships each order, or sets it aside if it is malformed. `D` determines where it writes.
pub(crate) struct Shipping<D> {
    pub(crate) desk: D,
    pub(crate) format: Format,
    pub(crate) leash: Leash,
}

#[async_trait]
impl<Tx: Send, D: Desk<Tx>> Handler<Tx> for Shipping<D> {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let line = line_number(record)?;
        ship(self.desk.shop(tx), self.format, record, line).await?;
        self.leash.reached(line).map_err(HandlerError::fatal)
    }
}

async fn ship(shop: &mut impl Shop, format: Format, record: &Record, line: u32) -> Result<(), HandlerError> {
    let offset = record.offset.to_string();
    let payload = String::from_utf8_lossy(&record.payload);
    match format.parse(&payload) {
        Ok(order) => shop.write(&Effect::Shipped { offset, order: &order }).await,
        Err(reason) => {
            let rejected = Effect::Rejected {
                offset,
                line,
                payload: &payload,
                reason: &reason,
            };
            shop.write(&rejected).await
        }
    }
}

/// The line of the file that the record came from, as the writer noted it.
fn line_number(record: &Record) -> Result<u32, HandlerError> {
    record
        .header("line")
        .and_then(|value| std::str::from_utf8(value).ok()?.parse().ok())
        .ok_or_else(|| HandlerError::fatal("the record has no header `line`: another program wrote it"))
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
