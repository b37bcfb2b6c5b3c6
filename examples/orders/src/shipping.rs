//! The shipping service: ships orders and reports it, with the same code for every delivery and
//! every store.

use std::borrow::Cow;

use async_trait::async_trait;
use essentially_once::{Handler, HandlerError, NewRecord, Record};

use crate::{
    order::{Format, ORDER_HEADER},
    order_service::{Progress, Status},
    shop::{Shipment, Shop},
};

/// Ships each order, and rejects a line that is not one. `D` determines where it writes.
pub(crate) struct Shipping<D> {
    pub(crate) desk: D,
    pub(crate) format: Format,
}

#[async_trait]
impl<Tx: Send, D: Desk<Tx>> Handler<Tx> for Shipping<D> {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let number = order_number(record)
            .ok_or_else(|| HandlerError::fatal("the record names no order: another program wrote it"))?;
        // No retry would help. The consumer sets the record aside or passes over it.
        let order = self.format.parse(&text(record)).map_err(HandlerError::reject)?;
        let shop = self.desk.shop(tx);
        shop.report(progress(number, Status::Packing)?).await?;
        shop.ship(&Shipment { number, order: &order }).await?;
        shop.report(progress(number, Status::Shipped)?).await
    }
}

fn progress(order: u32, status: Status) -> Result<NewRecord, HandlerError> {
    let record = NewRecord::json(&Progress { order, status })?;
    let number = order.to_string();
    Ok(record.header(ORDER_HEADER, number.clone()).key(number))
}

/// The number of the order that the record is about.
pub(crate) fn order_number(record: &Record) -> Option<u32> {
    std::str::from_utf8(record.header(ORDER_HEADER)?).ok()?.parse().ok()
}

/// The line of the file that the order came from.
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
