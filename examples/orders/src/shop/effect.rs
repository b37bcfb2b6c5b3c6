//! What the shop writes and counts.

use async_trait::async_trait;
use essentially_once::HandlerError;

use crate::order::Order;

/// The effect of a line of the log. Offsets are kept as text, because a log's offsets are opaque.
pub(crate) enum Effect<'a> {
    Shipped {
        offset: String,
        order: &'a Order,
    },
    Rejected {
        offset: String,
        line: u32,
        payload: &'a str,
        reason: &'a str,
    },
}

/// Writes effects.
#[async_trait]
pub(crate) trait Shop: Send {
    /// Any error stops the worker. If at-most-once skipped a failed record, it would be counted as
    /// lost to a kill.
    async fn write(&mut self, effect: &Effect<'_>) -> Result<(), HandlerError>;
}

/// What the shop holds, counted by offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Books {
    pub(crate) shipped_once: u64,
    pub(crate) shipped_more: u64,
    pub(crate) rejected: u64,
    /// The number of effects ever written, including doubled ones.
    pub(crate) effects: u64,
}
