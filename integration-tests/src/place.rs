//! Where logs and stores are kept while a test runs.

use std::{path::PathBuf, sync::Arc};

use essentially_once::{Error, Log, Source};
use essentially_once_redis::Redis;
use essentially_once_sqlite::Sqlite;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use test_servers::RedisServer;

use crate::store::{Of, Store};

/// A backend that the tests know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backend {
    /// A file.
    Sqlite,
    /// A server, with each write on disk before it is acknowledged.
    Redis,
}

impl Backend {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Sqlite, Self::Redis];

    /// Its name in test names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Redis => "redis",
        }
    }

    /// Why it cannot be started here, if so.
    pub fn missing(self) -> Option<String> {
        match self {
            Self::Sqlite => None,
            Self::Redis => test_servers::redis_server().err(),
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
        })
    }
}

/// A started backend. It goes when this is dropped.
pub enum Place {
    /// A folder with a file.
    Sqlite(TempDir),
    /// A server.
    Redis(RedisServer),
}

impl Place {
    /// What another process opens.
    pub fn address(&self) -> Address {
        match self {
            Self::Sqlite(folder) => Address::Sqlite(folder.path().join("test.db")),
            Self::Redis(server) => Address::Redis(server.url()),
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
}

impl Address {
    /// Opens the log, which all tests call the same.
    ///
    /// # Errors
    /// The backend's.
    pub async fn log(&self) -> Result<Arc<dyn Log>, Error> {
        const NAME: &str = "orders";
        Ok(match self {
            Self::Sqlite(path) => Arc::new(Sqlite::open(path).await?.log(NAME).await?),
            Self::Redis(url) => Arc::new(Redis::connect(url).await?.log(NAME).await?),
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
        })
    }
}
