//! Where logs and stores live during a test.

use std::{env, path::PathBuf, sync::Arc};

use essentially_once::{Error, Log, backend::Source};
use essentially_once_kafka::Kafka;
use essentially_once_postgres::Pg;
use essentially_once_rabbitmq::{LogOptions, Packing, Rabbit};
use essentially_once_redis::Redis;
use essentially_once_sqlite::Sqlite;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use test_servers::{KafkaServer, PostgresServer, RabbitNode, RedisServer};

use crate::counter::TABLE;

/// A backend known to the tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backend {
    /// A SQLite file.
    Sqlite,
    /// A PostgreSQL server with its own settings.
    Postgres,
    /// A Redis server that syncs each write to disk before it acknowledges it.
    Redis,
    /// A RabbitMQ broker, with one message per record.
    Rabbitmq,
    /// A RabbitMQ broker, with many records per message. As a store it is the same as without
    /// packing.
    RabbitmqPacked,
    /// A broker that speaks Kafka's protocol, for logs only.
    Kafka,
}

impl Backend {
    /// All kinds of logs.
    pub const LOGS: [Self; 6] = [
        Self::Sqlite,
        Self::Postgres,
        Self::Redis,
        Self::Rabbitmq,
        Self::RabbitmqPacked,
        Self::Kafka,
    ];

    /// All kinds of stores.
    pub const STORES: [Self; 4] = [Self::Sqlite, Self::Postgres, Self::Redis, Self::Rabbitmq];

    /// The pairs of a log and a store to test: each log with its own store, if there is one, and
    /// each log and each store with at least one other. `ESSENTIALLY_ONCE_PAIRS=full`, which `cargo
    /// xtask test --full` sets, makes it all of them.
    pub fn pairs() -> Vec<(Self, Self)> {
        let is_full = env::var_os("ESSENTIALLY_ONCE_PAIRS").is_some_and(|value| value == "full");
        let place = |backend: Self| Self::STORES.iter().position(|store| *store == backend.as_store());
        let is_near = |log, store| {
            let (log, store) = (place(log).unwrap_or(0), place(store).unwrap_or(0));
            store == log || store == (log + 1) % Self::STORES.len()
        };
        let all = Self::LOGS
            .into_iter()
            .flat_map(|log| Self::STORES.map(|store| (log, store)));
        all.filter(|(log, store)| is_full || is_near(*log, *store)).collect()
    }

    /// Each kind of log with the store of the same server, or with PostgreSQL's if it has none.
    pub fn alone() -> Vec<(Self, Self)> {
        let mut alone: Vec<_> = Self::STORES.map(|backend| (backend, backend)).into();
        alone.push((Self::Kafka, Self::Postgres));
        alone
    }

    /// The store of the same server.
    const fn as_store(self) -> Self {
        match self {
            Self::RabbitmqPacked => Self::Rabbitmq,
            other => other,
        }
    }

    /// The backend's name in test names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Postgres => "postgres",
            Self::Redis => "redis",
            Self::Rabbitmq => "rabbitmq",
            Self::RabbitmqPacked => "rabbitmq_packed",
            Self::Kafka => "kafka",
        }
    }

    /// Why it cannot start here. `None` if it can.
    pub fn missing(self) -> Option<String> {
        match self {
            Self::Sqlite => None,
            Self::Postgres => test_servers::postgres_bin().err(),
            Self::Redis => test_servers::redis_server().err(),
            Self::Rabbitmq | Self::RabbitmqPacked => test_servers::rabbitmq_server().err(),
            Self::Kafka => test_servers::kafka_server().err(),
        }
    }

    /// Starts a private instance.
    ///
    /// # Errors
    /// If the server does not come up.
    pub fn start(self) -> Result<Place, Source> {
        Ok(match self {
            Self::Sqlite => Place::Sqlite(tempfile::tempdir()?),
            Self::Postgres => {
                let server = PostgresServer::start()?;
                // Two processes that create a table at once would fail.
                server.run_sql(TABLE)?;
                Place::Postgres(server)
            }
            Self::Redis => Place::Redis(RedisServer::durable().start()?),
            Self::Rabbitmq => Place::Rabbitmq(RabbitNode::start()?),
            Self::RabbitmqPacked => Place::RabbitmqPacked(RabbitNode::start()?),
            Self::Kafka => Place::Kafka(KafkaServer::start()?),
        })
    }
}

/// A started backend. Dropping it removes it.
pub enum Place {
    /// A folder with a SQLite file.
    Sqlite(TempDir),
    /// A PostgreSQL server.
    Postgres(PostgresServer),
    /// A Redis server.
    Redis(RedisServer),
    /// A RabbitMQ broker.
    Rabbitmq(RabbitNode),
    /// A RabbitMQ broker, for a log of packed records.
    RabbitmqPacked(RabbitNode),
    /// A broker that speaks Kafka's protocol.
    Kafka(KafkaServer),
}

impl Place {
    /// The address at which another process opens it.
    pub fn address(&self) -> Address {
        match self {
            Self::Sqlite(folder) => Address::Sqlite(folder.path().join("test.db")),
            Self::Postgres(server) => Address::Postgres(server.url()),
            Self::Redis(server) => Address::Redis(server.url()),
            Self::Rabbitmq(node) => Address::Rabbitmq(node.url()),
            Self::RabbitmqPacked(node) => Address::RabbitmqPacked(node.url()),
            Self::Kafka(server) => Address::Kafka(server.url()),
        }
    }

    /// Kills the server, if there is one, and starts it again. The broker that speaks Kafka's
    /// protocol is stopped instead, because it loses what it acknowledged last when it is killed.
    ///
    /// # Errors
    /// If it does not come up again.
    pub fn restart(&self) -> Result<(), Source> {
        match self {
            Self::Sqlite(_) => Ok(()),
            Self::Postgres(server) => server.restart(),
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
            Self::Kafka(server) => server.restart(),
        }
    }
}

/// Where a process finds a backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Address {
    /// The file.
    Sqlite(PathBuf),
    /// The URL of the database.
    Postgres(String),
    /// The server's URL.
    Redis(String),
    /// The broker's URL.
    Rabbitmq(String),
    /// The broker's URL, for a log of packed records.
    RabbitmqPacked(String),
    /// The brokers' URL.
    Kafka(String),
}

impl Address {
    /// Opens the log of that name.
    ///
    /// # Errors
    /// Those of the backend.
    pub async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(match self {
            Self::Sqlite(path) => Arc::new(Sqlite::open(path).await?.log(name).await?),
            Self::Postgres(url) => Arc::new(Pg::connect(url).await?.log(name).await?),
            Self::Redis(url) => Arc::new(Redis::connect(url).await?.log(name).await?),
            Self::Rabbitmq(url) => Arc::new(Rabbit::connect(url).await?.log(name).await?),
            Self::Kafka(url) => {
                // The tests stop its only broker and do not kill it.
                let options = essentially_once_kafka::LogOptions::new().topic_setting("flush.messages", "1");
                Arc::new(Kafka::connect(url).await?.log_with(name, options).await?)
            }
            Self::RabbitmqPacked(url) => {
                let options = LogOptions::new().packed(Packing::new().max_records(16).max_bytes(64 * 1024));
                Arc::new(Rabbit::connect(url).await?.log_with(name, options).await?)
            }
        })
    }
}
