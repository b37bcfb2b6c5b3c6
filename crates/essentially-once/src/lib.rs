//! Act on every record of a log as if it had been delivered once.
//!
//! Exactly-once *delivery* is impossible: after a lost reply neither side can know what the other
//! saw (the Two Generals). *Essentially once* is possible: the consumer persists the offset of the
//! next record **in the same transaction as the state change** that the record caused. A crash
//! before the commit restarts the consumer at the same, unmoved offset. A crash after the commit
//! restarts it past the record. Seen from the state, every record took effect once.
//!
//! - A [`Log`] holds the records, an [`OffsetStore`] keeps state and position, and a [`Handler`] is
//!   your code.
//! - A [`Consumer`] is the one loop that connects them, for every backend and every delivery.
//! - A [`Producer`] sends records without losing or doubling one when a reply is lost.
//! - [`memory`] is a backend for tests. The adapter crates, such as `essentially-once-sqlite`, are
//!   for production.
//!
//! ```
//! use essentially_once::{Consumer, ConsumerId, KeyValue, Log, NewRecord, OffsetStore, Record, handler_fn};
//! use essentially_once::memory::{Memory, MemoryTx};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), essentially_once::Error> {
//! let memory = Memory::new();
//! let (orders, store) = (memory.log("orders")?, memory.store());
//! orders.append(&[NewRecord::new("32.38"), NewRecord::new("11.61")]).await?;
//!
//! let add_up = handler_fn(|record: &Record, tx: &mut MemoryTx| {
//!     Box::pin(async move {
//!         let before: f64 = match tx.get(b"freight").await? {
//!             Some(sum) => std::str::from_utf8(&sum)?.parse()?,
//!             None => 0.0,
//!         };
//!         let freight: f64 = std::str::from_utf8(&record.payload)?.parse()?;
//!         tx.put(b"freight", (before + freight).to_string().as_bytes()).await?;
//!         Ok(())
//!     })
//! });
//! let shipping = ConsumerId::new("shipping")?;
//! let report = Consumer::essentially_once(shipping.clone(), orders, store.clone(), add_up)
//!     .accept_volatile() // the in-memory backend loses its data in a crash
//!     .run_until_caught_up()
//!     .await?;
//! assert_eq!(report.handled, 2);
//! assert_eq!(store.begin(&shipping).await?.get(b"freight").await?.as_deref(), Some(&b"43.99"[..]));
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! No feature is on by default.
//!
//! - `json`: the module `json` makes records from values and hands values to handlers, with
//!   [serde](https://docs.rs/serde). A payload that cannot be decoded is rejected with its line and
//!   column.
//! - `signed`: the module `signed` wraps a log and signs its records with HMAC-SHA256. A record
//!   that somebody altered, inserted, or moved from another log never reaches a handler.

pub mod backend;
mod backoff;
pub mod consumer;
mod error;
mod handler;
mod journal;
#[cfg(feature = "json")]
pub mod json;
mod letters;
mod log;
pub mod memory;
mod name;
mod note;
mod outbox;
mod passed;
pub mod producer;
mod record;
pub mod relay;
mod revision;
mod rt;
#[cfg(feature = "signed")]
pub mod signed;
mod store;
mod window;

/// The attribute of all traits here. Implementors need not depend on the `async-trait` crate
/// themselves.
pub use async_trait::async_trait;
pub use tokio_util::sync::CancellationToken;

use crate::{
    backend::{
        Advance, Bounds, Durability, Journal, LogId, LogReader, Note, Numbering, Owner, Position, Pulse, Revision,
        Snapshot, Transaction, Tried, Window,
    },
    consumer::{HandlerErrorKind, Operator},
};
pub use crate::{
    consumer::{Consumer, StartAt, seek, skip},
    error::Error,
    handler::{Handler, HandlerError, handler_fn},
    log::Log,
    name::{ConsumerId, Epoch, ProducerId},
    outbox::Outbox,
    producer::Producer,
    record::{NewRecord, Offset, Origin, Record},
    store::{KeyValue, OffsetStore, ReadState},
};
