//! What the shop writes and counts.

use async_trait::async_trait;
use essentially_once::{HandlerError, NewRecord};

use crate::order::Order;

/// The effect of an order.
pub(crate) struct Shipment<'a> {
    pub(crate) number: u32,
    pub(crate) order: &'a Order,
}

/// Writes shipments.
#[async_trait]
pub(crate) trait Shop: Send {
    /// Any error stops the worker. If at-most-once skipped a failed record, it would be counted as
    /// lost to a kill.
    async fn ship(&mut self, shipment: &Shipment<'_>) -> Result<(), HandlerError>;

    /// Sends a record to the order service. The record goes to the shop's outbox, so it is sent if
    /// and only if the shipment is written. A shop without a transaction has no outbox, so that
    /// nothing would hold for a record that it sent. It sends none.
    async fn report(&mut self, record: NewRecord) -> Result<(), HandlerError>;
}
