//! What a worker does.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::place::Address;

/// A worker's settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Work {
    /// Where the log is.
    pub log: Address,
    /// The log's name.
    pub log_name: String,
    /// Where the store is.
    pub store: Address,
    /// The consumer's name.
    pub consumer: String,
    /// The most records in a batch.
    pub max_batch: usize,
    /// How long the handler takes for each record.
    pub pause: Duration,
    /// One in this many records takes `long_pause`.
    pub long_every: Option<u64>,
    /// How long the handler takes for that record.
    pub long_pause: Duration,
    /// How long a standby waits. The default is zero: a killed or frozen worker is then fenced at
    /// its commits, and nobody waits for it.
    pub standby_after: Duration,
    /// A file that grows by one byte for each call of the handler.
    pub calls: Option<PathBuf>,
}

impl Work {
    /// Work without pauses, in batches of 100.
    pub fn new(log: Address, store: Address, log_name: &str, consumer: &str) -> Self {
        Self {
            log,
            log_name: log_name.to_owned(),
            store,
            consumer: consumer.to_owned(),
            max_batch: 100,
            pause: Duration::ZERO,
            long_every: None,
            long_pause: Duration::ZERO,
            standby_after: Duration::ZERO,
            calls: None,
        }
    }
}
