//! Where logs and stores are kept while a test runs.

use std::{path::PathBuf, sync::Arc};

use essentially_once::{Error, Log, backend::Source};
use essentially_once_rabbitmq::{LogOptions, Rabbit};
use essentially_once_redis::Redis;
use essentially_once_sqlite::Sqlite;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use test_servers::{RabbitNode, RedisServer};

use crate::store::{Of, Store};

/// A backend that the tests know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backend {
    /// A file.
    Sqlite,
    /// A server, with each write on disk before it is acknowledged.
    Redis,
    /// A broker, one message for each record.
    Rabbitmq,
    /// A broker, many records in a message. As a store it is the same as without packing.
    RabbitmqPacked,
}

impl Backend {
    /// All kinds of logs.
    pub const LOGS: [Self; 4] = [Self::Sqlite, Self::Redis, Self::Rabbitmq, Self::RabbitmqPacked];

    /// All kinds of stores.
    pub const STORES: [Self; 3] = [Self::Sqlite, Self::Redis, Self::Rabbitmq];

    /// Its name in test names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Redis => "redis",
            Self::Rabbitmq => "rabbitmq",
            Self::RabbitmqPacked => "rabbitmq_packed",
        }
    }

    /// Why it cannot be started here, if so.
    pub fn missing(self) -> Option<String> {
        match self {
            Self::Sqlite => None,
            Self::Redis => test_servers::redis_server().err(),
            Self::Rabbitmq | Self::RabbitmqPacked => test_servers::rabbitmq_server().err(),
        }
    }

    /// Starts it in a place of its own.
    ///
    /// # Errors
    /// If the server does not come up.
    pub fn start(self) -> Result<Place, Source> {
        Ok(match self {
            Self::Sqlite => Place::Sqlite(tempfile::tempdir()?),
            Self::Redis => Place::Redis(RedisServer::durable().start()?),
            Self::Rabbitmq => Place::Rabbitmq(RabbitNode::start()?),
            Self::RabbitmqPacked => Place::RabbitmqPacked(RabbitNode::start()?),
        })
    }
}

/// A started backend. It goes when this is dropped.
pub enum Place {
    /// A folder with a file.
    Sqlite(TempDir),
    /// A server.
    Redis(RedisServer),
    /// A broker.
    Rabbitmq(RabbitNode),
    /// A broker, for a log of packed records.
    RabbitmqPacked(RabbitNode),
}

impl Place {
    /// What another process opens.
    pub fn address(&self) -> Address {
        match self {
            Self::Sqlite(folder) => Address::Sqlite(folder.path().join("test.db")),
            Self::Redis(server) => Address::Redis(server.url()),
            Self::Rabbitmq(node) => Address::Rabbitmq(node.url()),
            Self::RabbitmqPacked(node) => Address::RabbitmqPacked(node.url()),
        }
    }

    /// Kills the server, if there is one, and starts it again.
    ///
    /// # Errors
    /// If it does not come up again.
    pub fn restart(&self) -> Result<(), Source> {
        match self {
            Self::Sqlite(_) => Ok(()),
            Self::Redis(server) => {
                server.kill()?;
                server.restart()?;
                Ok(())
            }
            Self::Rabbitmq(node) | Self::RabbitmqPacked(node) => {
                node.kill()?;
                node.restart()?;
                Ok(())
            }
        }
    }
}

/// Where a process finds a backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Address {
    /// The file.
    Sqlite(PathBuf),
    /// The server's URL.
    Redis(String),
    /// The broker's URL.
    Rabbitmq(String),
    /// The broker's URL, for a log of packed records.
    RabbitmqPacked(String),
}

impl Address {
    /// Opens the log of that name.
    ///
    /// # Errors
    /// The backend's.
    pub async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(match self {
            Self::Sqlite(path) => Arc::new(Sqlite::open(path).await?.log(name).await?),
            Self::Redis(url) => Arc::new(Redis::connect(url).await?.log(name).await?),
            Self::Rabbitmq(url) => Arc::new(Rabbit::connect(url).await?.log(name).await?),
            Self::RabbitmqPacked(url) => {
                let options = LogOptions::new().packed(16, 64 * 1024);
                Arc::new(Rabbit::connect(url).await?.log_with(name, options).await?)
            }
        })
    }

    /// Opens the store.
    ///
    /// # Errors
    /// The backend's.
    pub async fn store(&self) -> Result<Box<dyn Store>, Error> {
        Ok(match self {
            Self::Sqlite(path) => Box::new(Of(Sqlite::open(path).await?.store())),
            Self::Redis(url) => Box::new(Of(Redis::connect(url).await?.store())),
            Self::Rabbitmq(url) | Self::RabbitmqPacked(url) => Box::new(Of(Rabbit::connect(url).await?.store())),
        })
    }
}
