//! How long records take from their append: to a bus, through a relay, or to the commit of a
//! consumer's transaction.

mod consume;
mod relay;
mod timing;

use std::time::Duration;

use clap::{Args, Subcommand};
use tempfile::TempDir;

use self::timing::Load;
use crate::Result;

/// How often a loop by hand on SQLite looks for records.
const POLL: Duration = Duration::from_millis(1);

/// How many records a loop by hand takes at once: the default of the library.
const BATCH: usize = 1_000;

#[derive(Clone, Copy, Args)]
pub(crate) struct LatencyArguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Copy, Subcommand)]
enum What {
    /// From the commit of an order, with an outbox on SQLite, to a bus.
    Relay {
        /// Where the relay sends records.
        bus: relay::Bus,
        #[command(flatten)]
        load: Load,
    },
    /// From the append of a record to the commit of the transaction that handled it.
    Consume {
        /// Where the records are, and what counts them.
        backend: consume::Backend,
        #[command(flatten)]
        load: Load,
    },
}

pub(crate) fn measure(arguments: LatencyArguments, rounds: u32, folder: TempDir) -> Result<()> {
    match arguments.what {
        What::Relay { bus, load } => relay::measure(bus, load, rounds, folder),
        What::Consume { backend, load } => consume::measure(backend, load, rounds, folder),
    }
}
