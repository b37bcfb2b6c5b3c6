//! Redis as log and store for [`essentially_once`]: streams, and state and position in hashes, committed in one fenced step.
//!
//! - [`Redis`] is a server (7.0 or later, or Valkey), a cluster, or a master behind Sentinels; [`RedisOptions`] says how to connect.
//! - [`RedisLog`] is a log on a stream. Offsets are stream ids. It reads what any program adds with `XADD`, and says how any program writes
//!   what this crate writes.
//! - [`RedisStore`] keeps positions and state. A handler's [`RedisTx`] is portable [`KeyValue`](essentially_once::KeyValue) state,
//!   and also takes Redis commands on keys of your own, run in the same step.
//!
//! What is acknowledged survives a crash if the server syncs before it answers: `appendonly yes` and `appendfsync always`. A consumer
//! refuses a server that does not, with the settings to change, unless it is told to accept that.
//!
//! ```no_run
//! use essentially_once::{Consumer, ConsumerId, Handler, HandlerError, Log, NewRecord, Record, async_trait};
//! use essentially_once_redis::{Redis, RedisTx, redis::Cmd};
//!
//! struct Ship;
//!
//! #[async_trait]
//! impl Handler<RedisTx> for Ship {
//!     async fn handle(&mut self, order: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
//!         // Takes effect with the offset, or not at all.
//!         tx.command(Cmd::rpush(format!("{}:shipments", tx.hash_tag()), &order.payload[..])).await?;
//!         Ok(())
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), essentially_once::Error> {
//! let redis = Redis::connect("redis://127.0.0.1/").await?;
//! let orders = redis.log("orders").await?;
//! orders.append(&[NewRecord::new("10248"), NewRecord::new("10249")]).await?;
//! let consumer = Consumer::essentially_once(ConsumerId::new("shipping")?, orders, redis.store(), Ship);
//! println!("{}", consumer.run_until_caught_up().await?);
//! # Ok(())
//! # }
//! ```
//!
//! The feature `tls`, on by default, is for `rediss://` URLs.

mod codec;
mod commit;
mod connection;
mod durability;
mod error;
mod log;
mod names;
mod native;
mod options;
mod packed;
mod reader;
mod retention;
mod server;
mod snapshot;
mod store;
mod tx;

use std::{fmt, sync::Arc};

use essentially_once::Error;
pub use essentially_once::backend::Retention;
pub use redis;

use crate::server::Server;
pub use crate::{
    log::{LogOptions, RedisLog},
    options::RedisOptions,
    store::RedisStore,
    tx::RedisTx,
};

/// A Redis server, cluster, or master behind Sentinels. Clones share it; each log, reader and consumer has a connection of its own.
///
/// A connection that ended is replaced before it is used again, and so is one that was idle for a
/// second and does not answer. One that a log or store has not used for a minute is closed, and
/// made again when it is needed. Handles work on any Tokio runtime, also after the one on which
/// they were made has ended.
#[derive(Clone)]
pub struct Redis {
    server: Arc<Server>,
}

impl Redis {
    /// Connects with the default [`RedisOptions`].
    ///
    /// # Errors
    /// As [`RedisOptions::connect`].
    pub async fn connect(url: &str) -> Result<Self, Error> {
        RedisOptions::new().connect(url).await
    }

    /// Opens the log of that name, a stream under that key, and creates it if there is none. Each call gives a handle with a connection
    /// of its own; clones share it, and each reader has another.
    ///
    /// # Errors
    /// As [`log_with`](Self::log_with).
    pub async fn log(&self, name: &str) -> Result<RedisLog, Error> {
        self.log_with(name, LogOptions::new()).await
    }

    /// As [`log`](Self::log), for a stream with another key or another program's entries, or with retention.
    ///
    /// Dropping the future may leave the stream created, and has no other effect.
    ///
    /// # Errors
    /// [`Error::InvalidName`], [`Error::InvalidSetting`]; [`Error::Failed`] if the key holds something else than a stream, or the user may
    /// not do this; [`Error::Unavailable`]; [`Error::Indeterminate`] if the stream may have been created: open it again.
    pub async fn log_with(&self, name: &str, options: LogOptions) -> Result<RedisLog, Error> {
        RedisLog::open(Arc::clone(&self.server), name, options).await
    }

    /// The store of positions and state. Each call gives one with connections of its own; clones share them.
    pub fn store(&self) -> RedisStore {
        RedisStore::new(Arc::clone(&self.server))
    }

    pub(crate) fn new(server: Arc<Server>) -> Self {
        Self { server }
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis")
            .field("server", &self.server.to_string())
            .finish_non_exhaustive()
    }
}
