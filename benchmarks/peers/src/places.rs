//! Fresh, private servers and files, one for each run.

use std::any::Any;

use tempfile::TempDir;
use test_servers::{KafkaServer, PostgresServer, RabbitNode, RedisServer};

use crate::Result;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Backend {
    Kafka,
    Postgres,
    Rabbitmq,
    Redis,
    Sqlite,
}

impl Backend {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kafka => "Kafka",
            Self::Postgres => "PostgreSQL",
            Self::Rabbitmq => "RabbitMQ",
            Self::Redis => "Redis",
            Self::Sqlite => "SQLite",
        }
    }
}

/// A server or a file, until it is dropped.
pub(crate) struct Place {
    pub(crate) backend: Backend,
    pub(crate) url: String,
    _held: Box<dyn Any>,
}

impl Place {
    pub(crate) fn start(backend: Backend) -> Result<Self> {
        let (url, held): (String, Box<dyn Any>) = match backend {
            Backend::Kafka => {
                let server = KafkaServer::start()?;
                (server.direct_url(), Box::new(server))
            }
            Backend::Postgres => {
                let server = PostgresServer::start()?;
                (server.url(), Box::new(server))
            }
            Backend::Rabbitmq => {
                let node = RabbitNode::start()?;
                (node.url(), Box::new(node))
            }
            Backend::Redis => {
                let server = RedisServer::durable().start()?;
                (server.url(), Box::new(server))
            }
            Backend::Sqlite => {
                let folder = TempDir::new()?;
                let path = folder.path().join("peers.db");
                (path.display().to_string(), Box::new(folder))
            }
        };
        Ok(Self {
            backend,
            url,
            _held: held,
        })
    }
}
