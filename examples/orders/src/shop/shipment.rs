//! What the shop writes and counts.

use std::collections::HashMap;

use async_trait::async_trait;
use essentially_once::HandlerError;

use crate::order::Order;

/// The effect of an order. Offsets are kept as text, because a log's offsets are opaque.
pub(crate) struct Shipment<'a> {
    pub(crate) offset: String,
    pub(crate) order: &'a Order,
}

/// Writes shipments.
#[async_trait]
pub(crate) trait Shop: Send {
    /// Any error stops the worker. If at-most-once skipped a failed record, it would be counted as
    /// lost to a kill.
    async fn ship(&mut self, shipment: &Shipment<'_>) -> Result<(), HandlerError>;
}

/// How often each offset was shipped.
pub(crate) type Shipments = HashMap<String, u64>;
