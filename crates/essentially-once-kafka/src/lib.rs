//! Kafka as log for [`essentially_once`]. A log is one partition of a topic.
//!
//! - [`Kafka`] is a cluster. [`KafkaOptions`] says how to connect.
//! - [`KafkaLog`] is a log on a partition. It reads the records that any program produces, and
//!   documents the format of its own, so that any program can read them.
//!
//! Kafka keeps no state for its consumers besides an offset, so the positions and the state of a
//! consumer are in the store of another adapter, and are committed there together. The client never
//! commits an offset to Kafka, and joins no consumer group.
//!
//! ```no_run
//! use essentially_once::memory::Memory;
//! use essentially_once::{
//!     Consumer, ConsumerId, Handler, HandlerError, KeyValue, Log, NewRecord, Record, async_trait,
//! };
//! use essentially_once_kafka::Kafka;
//!
//! struct Ship;
//!
//! #[async_trait]
//! impl<Tx: KeyValue> Handler<Tx> for Ship {
//!     async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
//!         // Takes effect with the offset, or not at all.
//!         tx.put(&order.payload, b"shipped").await?;
//!         Ok(())
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), essentially_once::Error> {
//! let kafka = Kafka::connect("kafka://127.0.0.1:9092").await?;
//! let orders = kafka.log("orders").await?;
//! orders.append(&[NewRecord::new("10248"), NewRecord::new("10249")]).await?;
//! // For a store that lasts, use `essentially-once-postgres` or `essentially-once-sqlite`.
//! let store = Memory::new().store();
//! let consumer = Consumer::essentially_once(ConsumerId::new("shipping")?, orders, store, Ship);
//! println!("{}", consumer.run_until_caught_up().await?);
//! # Ok(())
//! # }
//! ```
//!
//! The feature `tls` enables `kafkas://` URLs and SCRAM passwords. It needs OpenSSL.

mod connection;
mod error;
mod log;
mod options;

use std::sync::Arc;

use essentially_once::Error;
pub use rdkafka;

use crate::connection::Cluster;
pub use crate::{
    log::KafkaLog,
    options::{Appends, KafkaOptions, LogOptions},
};

/// A Kafka cluster.
///
/// Clones share it. Each log that appends and each reader has its own client, with its own
/// connections and threads, which reconnects by itself.
#[derive(Clone, Debug)]
pub struct Kafka {
    cluster: Arc<Cluster>,
}

impl Kafka {
    /// Connects with the default [`KafkaOptions`].
    ///
    /// # Errors
    /// As [`KafkaOptions::connect`].
    pub async fn connect(url: &str) -> Result<Self, Error> {
        KafkaOptions::new().connect(url).await
    }

    /// Opens the log with this name, which is partition 0 of the topic of that name. Creates the
    /// topic, with one partition and the broker's default replication, if it does not exist.
    ///
    /// # Errors
    /// As [`log_with`](Self::log_with).
    pub async fn log(&self, name: &str) -> Result<KafkaLog, Error> {
        self.log_with(name, LogOptions::new()).await
    }

    /// What a client of [`rdkafka`] needs to reach the same brokers as the same user. It contains
    /// the password.
    pub fn client_config(&self) -> rdkafka::ClientConfig {
        self.cluster.config()
    }

    /// Like [`log`](Self::log), for another partition, for a topic that must exist, or for appends
    /// in transactions.
    ///
    /// Dropping the future may leave the topic created. It has no other effect.
    ///
    /// # Errors
    /// - [`Error::InvalidName`], [`Error::InvalidSetting`];
    /// - [`Error::Failed`] if the topic or partition does not exist and is not to be created, or
    ///   the user lacks a right;
    /// - [`Error::Unavailable`].
    pub async fn log_with(&self, name: &str, options: LogOptions) -> Result<KafkaLog, Error> {
        KafkaLog::open(Arc::clone(&self.cluster), name, options).await
    }
}

impl KafkaOptions {
    /// Connects to `kafka://[user:password@]host[:port][,host[:port]..]`, or to `kafkas://..` with
    /// TLS. One broker that answers is enough. The others are learned from it.
    ///
    /// The URL may end in [settings](Self::setting), as in
    /// `kafkas://..?ssl.ca.location=/etc/ca.pem&client.rack=a`. They, the user and the password may
    /// contain percent escapes, such as `%26` for `&`.
    ///
    /// # Errors
    /// - [`Error::InvalidSetting`];
    /// - [`Error::Failed`] if the brokers refuse the user, or TLS cannot verify them. The client
    ///   tries again until the [timeout](Self::timeout) is over;
    /// - [`Error::Unavailable`] if no broker answers. Kafka does not say why it closes a
    ///   connection, so this includes a port that requires TLS, a user or a client's certificate.
    ///
    /// No message contains the user's password.
    pub async fn connect(self, url: &str) -> Result<Kafka, Error> {
        let cluster = Cluster::connect(self, url).await?;
        Ok(Kafka {
            cluster: Arc::new(cluster),
        })
    }
}
