//! Opens log and store. This is the one place to change for another backend.

use std::{path::PathBuf, str::FromStr, sync::Arc};

use essentially_once::{ConsumerId, Error, Log, Record};
use essentially_once_sqlite::Sqlite;

use crate::Failure;

/// The log and store of one delivery's run. Parent and worker open the same ones.
pub(crate) struct Backend {
    pub(crate) log: Place,
    pub(crate) store: Place,
    /// The SQLite file, if the log or the store is kept in SQLite.
    pub(crate) database: PathBuf,
    /// The consumer whose position is stored. Other programs and earlier runs use the same servers,
    /// so the name is unique to this run.
    pub(crate) consumer: ConsumerId,
}

/// Where a log or a store is kept. It has no `Debug`, because a URL may hold a password.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a SQLite file.
    Sqlite,
    /// On the Redis server with this URL.
    #[cfg(feature = "redis")]
    Redis(String),
    /// On the RabbitMQ broker with this URL.
    #[cfg(feature = "rabbitmq")]
    Rabbitmq(String),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let scheme = text.split_once(':').map(|(scheme, _)| scheme);
        match scheme {
            None if text == "sqlite" => Ok(Self::Sqlite),
            #[cfg(feature = "redis")]
            Some("redis" | "rediss" | "redis+unix" | "unix") => Ok(Self::Redis(text.into())),
            #[cfg(not(feature = "redis"))]
            Some("redis" | "rediss" | "redis+unix" | "unix") => {
                Err("this program was built without Redis: run it with `--features redis`".into())
            }
            #[cfg(feature = "rabbitmq")]
            Some("amqp" | "amqps") => Ok(Self::Rabbitmq(text.into())),
            #[cfg(not(feature = "rabbitmq"))]
            Some("amqp" | "amqps") => {
                Err("this program was built without RabbitMQ: run it with `--features rabbitmq`".into())
            }
            _ => Err("expected `sqlite` or a URL that begins with redis://, rediss://, amqp:// or amqps://".into()),
        }
    }
}

impl Place {
    /// The text that [`FromStr`] accepts. It includes the password, so only the worker may get it.
    pub(crate) fn secret(&self) -> &str {
        match self {
            Self::Sqlite => "sqlite",
            #[cfg(feature = "redis")]
            Self::Redis(url) => url,
            #[cfg(feature = "rabbitmq")]
            Self::Rabbitmq(url) => url,
        }
    }
}

impl Backend {
    /// Opens the log of orders, and creates it if it is missing.
    pub(crate) async fn open_log(&self) -> Result<Arc<dyn Log>, Error> {
        match &self.log {
            Place::Sqlite => Ok(Arc::new(self.sqlite().await?.log("orders").await?)),
            #[cfg(feature = "redis")]
            Place::Redis(url) => {
                let stream = format!("{{{}}}:log", self.consumer);
                let options = essentially_once_redis::LogOptions::new().stream(stream);
                let redis = essentially_once_redis::Redis::connect(url).await?;
                Ok(Arc::new(redis.log_with("orders", options).await?))
            }
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => {
                let rabbit = essentially_once_rabbitmq::Rabbit::connect(url).await?;
                Ok(Arc::new(rabbit.log(&order_stream(&self.consumer)).await?))
            }
        }
    }

    /// Opens the SQLite file, and creates it if it is missing.
    pub(crate) async fn sqlite(&self) -> Result<Sqlite, Error> {
        Sqlite::open(&self.database).await
    }
}

/// Reads all records that the log holds now.
pub(crate) async fn read_all(log: &dyn Log) -> Result<Vec<Record>, Failure> {
    const AT_A_TIME: usize = 1_000;
    let bounds = log.bounds().await?;
    let (mut records, mut next) = (Vec::<Record>::new(), bounds.earliest);
    if next < bounds.end {
        let mut reader = log.read(next).await?;
        while next < bounds.end {
            records.extend(reader.next(AT_A_TIME).await?);
            next = records.last().map_or(bounds.end, |last| last.offset.successor());
        }
    }
    Ok(records)
}

/// The stream of a run's orders on a RabbitMQ broker.
#[cfg(feature = "rabbitmq")]
pub(crate) fn order_stream(consumer: &ConsumerId) -> String {
    format!("{consumer}.orders")
}
