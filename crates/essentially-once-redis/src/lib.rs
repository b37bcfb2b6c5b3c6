//! Redis as log and store for [`essentially_once`]. A log is a stream. State and position are
//! hashes, committed in one fenced step.
//!
//! - [`Redis`] is a server (7.0 or later), a cluster, or a master behind Sentinels.
//!   [`RedisOptions`] says how to connect.
//! - [`RedisLog`] is a log on a stream. Offsets are stream ids. It reads the entries that any
//!   program adds with `XADD`, and documents the format of its own entries, so that any program can
//!   write them.
//! - [`RedisStore`] keeps positions, state and dead letters, and documents their formats. A
//!   handler's [`RedisTx`] offers portable [`KeyValue`](essentially_once::KeyValue) state. It also
//!   takes Redis commands on your own keys, and [sends](essentially_once::Outbox) records to logs,
//!   in the same step.
//!
//! Acknowledged writes survive a crash if the server syncs before it answers: `appendonly yes` and
//! `appendfsync always`. A consumer refuses any other server and names the settings to change,
//! unless you allow it to run without durability.
//!
//! ```no_run
//! use essentially_once::{
//!     Consumer, ConsumerId, Handler, HandlerError, Log, NewRecord, Record, async_trait,
//! };
//! use essentially_once_redis::{Redis, RedisTx, redis::Cmd};
//!
//! struct Ship;
//!
//! #[async_trait]
//! impl Handler<RedisTx> for Ship {
//!     async fn handle(&mut self, order: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
//!         // Takes effect with the offset, or not at all.
//!         let shipments = format!("{}:shipments", tx.hash_tag());
//!         tx.command(Cmd::rpush(shipments, &order.payload[..])).await?;
//!         Ok(())
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), essentially_once::Error> {
//! let redis = Redis::connect("redis://127.0.0.1/").await?;
//! let orders = redis.log("orders").await?;
//! orders.append(&[NewRecord::new("10248"), NewRecord::new("10249")]).await?;
//! let shipping = ConsumerId::new("shipping")?;
//! let consumer = Consumer::essentially_once(shipping, orders, redis.store(), Ship);
//! println!("{}", consumer.run_until_caught_up().await?);
//! # Ok(())
//! # }
//! ```
//!
//! The feature `tls`, on by default, enables `rediss://` URLs.

mod connection;
mod error;
mod log;
mod msgpack;
mod options;
mod store;

use std::sync::Arc;

use essentially_once::Error;
pub use essentially_once::backend::Retention;
pub use redis;

use crate::connection::Server;
pub use crate::{
    log::RedisLog,
    options::{LogOptions, RedisOptions},
    store::{RedisStore, RedisTx},
};

/// A Redis server, cluster, or master behind Sentinels.
///
/// Clones share it. Each log, reader and consumer has its own connection.
///
/// A closed connection is replaced before it is used again. A connection that was idle for a second
/// must answer a `PING` first, or it is replaced too. A log or store closes a connection that it
/// has not used for a minute, and reconnects when it needs one. Handles work on any Tokio runtime,
/// even after the runtime that created them has ended.
#[derive(Clone, Debug)]
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

    /// Opens the log with this name, which is a stream under this key. Creates the stream if it
    /// does not exist. Each call returns a handle with its own connection. Clones share that
    /// connection, and each reader opens another.
    ///
    /// # Errors
    /// As [`log_with`](Self::log_with).
    pub async fn log(&self, name: &str) -> Result<RedisLog, Error> {
        self.log_with(name, LogOptions::new()).await
    }

    /// Like [`log`](Self::log), for a stream with another key, with entries of another program, or
    /// with retention.
    ///
    /// Dropping the future may leave the stream created. It has no other effect.
    ///
    /// # Errors
    /// - [`Error::InvalidName`], [`Error::InvalidSetting`];
    /// - [`Error::Failed`] if the key holds something other than a stream, or the user lacks a
    ///   permission;
    /// - [`Error::Unavailable`];
    /// - [`Error::Indeterminate`] if the stream may have been created. Open it again.
    pub async fn log_with(&self, name: &str, options: LogOptions) -> Result<RedisLog, Error> {
        RedisLog::open(Arc::clone(&self.server), name, options).await
    }

    /// Name and version of the server when this handle connected, such as `Redis 7.0.15`. `None` if
    /// the server hides them.
    pub fn version(&self) -> Option<&str> {
        self.server.version.as_deref()
    }

    /// The store of positions and state. Each call returns a store with its own connections. Clones
    /// share them.
    pub fn store(&self) -> RedisStore {
        RedisStore::new(Arc::clone(&self.server))
    }
}

impl RedisOptions {
    /// Connects to `redis://[user:password@]host[:port][/database]`, to `rediss://…` with TLS, or
    /// to `redis+unix:///path` through a socket.
    ///
    /// Uses RESP3 if the server supports it, because only then does the client library report at
    /// once that a connection was closed. `?protocol=resp2` in the URL forces the older protocol,
    /// for instance for a proxy.
    ///
    /// # Errors
    /// - [`Error::InvalidSetting`];
    /// - [`Error::Failed`] for an untrusted certificate, a rejected user or password, or a server
    ///   older than Redis 7.0;
    /// - [`Error::Unavailable`] if the server cannot be reached.
    ///
    /// No message contains the URL's user or password.
    pub async fn connect(self, url: &str) -> Result<Redis, Error> {
        let server = Server::connect(self, url).await?;
        Ok(Redis { server })
    }
}
