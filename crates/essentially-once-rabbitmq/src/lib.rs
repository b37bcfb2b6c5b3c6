//! RabbitMQ streams as log and store for [`essentially_once`], over AMQP 0-9-1.
//!
//! ```no_run
//! use essentially_once::{
//!     Consumer, ConsumerId, Handler, HandlerError, KeyValue, NewRecord, Outbox, Record, async_trait,
//! };
//! use essentially_once_rabbitmq::{Rabbit, RabbitTx};
//!
//! struct Ship;
//!
//! #[async_trait]
//! impl Handler<RabbitTx> for Ship {
//!     async fn handle(&mut self, order: &Record, tx: &mut RabbitTx) -> Result<(), HandlerError> {
//!         // Both are applied with the offset, or not at all.
//!         tx.put(&order.payload, b"shipped").await?;
//!         // Others read it from `RabbitStore::sent_to`.
//!         tx.send("billing", NewRecord::new(order.payload.clone())).await?;
//!         Ok(())
//!     }
//! }
//!
//! # async fn example() -> Result<(), essentially_once::Error> {
//! let rabbit = Rabbit::connect("amqp://shop:secret@rabbit.example/%2f").await?;
//! let (orders, store) = (rabbit.log("orders").await?, rabbit.store());
//! let consumer = Consumer::essentially_once(ConsumerId::new("shipping")?, orders, store, Ship);
//! println!("{}", consumer.run_until_caught_up().await?);
//! # Ok(())
//! # }
//! ```
//!
//! # Threads
//! One thread with its own runtime serves all connections of a process, and lapin adds a thread per
//! connection. Heartbeats therefore continue while a handler blocks its runtime, and handles may be
//! used from several runtimes.
//!
//! # TLS
//!
//! This crate uses rustls and installs no process-wide provider of cryptography. It uses the one
//! that the program has installed, or else `ring` for its own connections.
//!
//! # Logging
//!
//! No event of this crate contains a user name or a password. The client library, lapin, logs every
//! frame at level `TRACE`, including the one with the password, as a list of numbers. Keep its
//! level at `DEBUG` or above.
#![doc = include_str!("format.md")]

mod connection;
mod error;
mod log;
mod options;
mod store;

use std::sync::Arc;

use essentially_once::Error;
pub use essentially_once::backend::Retention;

use crate::connection::server::Server;
pub use crate::{
    log::RabbitLog,
    options::{LogOptions, Packing, RabbitOptions},
    store::{RabbitSent, RabbitStore, RabbitTx},
};

/// A RabbitMQ broker or cluster.
///
/// Each log that is appended to has its own connection, and so has each reader. The consumers of
/// all stores opened from one handle share two: one to publish and one to read.
#[derive(Clone, Debug)]
pub struct Rabbit {
    server: Arc<Server>,
}

impl Rabbit {
    /// Connects with the default [`RabbitOptions`].
    ///
    /// # Errors
    /// As [`RabbitOptions::connect`].
    pub async fn connect(url: &str) -> Result<Self, Error> {
        RabbitOptions::new().connect(url).await
    }

    /// Opens the stream `name` as a log with the default [`LogOptions`]. Declares the stream if it
    /// does not exist.
    ///
    /// # Errors
    /// As [`log_with`](Self::log_with).
    pub async fn log(&self, name: &str) -> Result<RabbitLog, Error> {
        self.log_with(name, LogOptions::new()).await
    }

    /// Opens the stream `name` as a log.
    ///
    /// # Errors
    /// [`Error::InvalidName`], also for the name of one of the store's own streams.
    /// [`Error::Failed`] if a queue of that name exists that is not a stream or has other settings,
    /// and if the user may not declare or see it. [`Error::Unavailable`] if the broker cannot be
    /// reached.
    pub async fn log_with(&self, name: &str, options: LogOptions) -> Result<RabbitLog, Error> {
        RabbitLog::open(Arc::clone(&self.server), name, options).await
    }

    /// The store. Every call returns a handle that reads the state for itself. Clones of one handle
    /// share what they have read.
    pub fn store(&self) -> RabbitStore {
        RabbitStore::new(Arc::clone(&self.server))
    }
}

impl RabbitOptions {
    /// Connects to `amqp://[user:password@]host[:port][/vhost]`, or to `amqps://` for TLS. Write a
    /// `/` in the name of the virtual host as `%2f`.
    ///
    /// The URL may set `?heartbeat=` (seconds, 10 by default), `connection_timeout=`
    /// (milliseconds), `frame_max=`, `channel_max=` and `auth_mechanism=`.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for a malformed URL, an unusable certificate, or an option out of
    /// its bounds. [`Error::Failed`] for a refused user, password or virtual host.
    /// [`Error::Unavailable`] if the broker cannot be reached. No message contains the user or
    /// password of the URL.
    pub async fn connect(self, url: &str) -> Result<Rabbit, Error> {
        let server = Server::connect(self, url).await?;
        Ok(Rabbit { server })
    }
}
