//! The backends that a service or the bus can be on.

use std::str::FromStr;

use essentially_once::Error;
use serde::{Deserialize, Serialize};

/// A backend. It has no `Debug`, because a URL may hold a password.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Place {
    /// SQLite files.
    Sqlite,
    /// The PostgreSQL database with this URL.
    #[cfg(feature = "postgres")]
    Postgres(String),
    /// The Redis server with this URL.
    #[cfg(feature = "redis")]
    Redis(String),
    /// The RabbitMQ broker with this URL.
    #[cfg(feature = "rabbitmq")]
    Rabbitmq(String),
}

impl Place {
    /// Connects once, so that a wrong URL and a missing server are refused before anything is
    /// written.
    pub(crate) async fn reach(&self) -> Result<(), Error> {
        match self {
            Self::Sqlite => Ok(()),
            #[cfg(feature = "postgres")]
            Self::Postgres(url) => crate::shop::connect(url).await.map(drop),
            #[cfg(feature = "redis")]
            Self::Redis(url) => essentially_once_redis::Redis::connect(url).await.map(drop),
            #[cfg(feature = "rabbitmq")]
            Self::Rabbitmq(url) => essentially_once_rabbitmq::Rabbit::connect(url).await.map(drop),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let scheme = text.split_once(':').map(|(scheme, _)| scheme);
        match scheme {
            None if text == "sqlite" => Ok(Self::Sqlite),
            #[cfg(feature = "postgres")]
            Some("postgres" | "postgresql") => Ok(Self::Postgres(text.into())),
            #[cfg(not(feature = "postgres"))]
            Some("postgres" | "postgresql") => {
                Err("this program was built without PostgreSQL: run it with `--features postgres`".into())
            }
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
            Some("kafka" | "kafkas") => Err("Kafka keeps no state, so only the bus can be on it".into()),
            _ => Err(
                "expected `sqlite` or a URL that begins with postgres://, redis://, rediss://, amqp:// or amqps://; the bus also \
                 takes kafka:// and kafkas://"
                    .into(),
            ),
        }
    }
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// The text that [`FromStr`] accepts. It includes the password.
impl From<Place> for String {
    fn from(place: Place) -> Self {
        match place {
            Place::Sqlite => "sqlite".into(),
            #[cfg(feature = "postgres")]
            Place::Postgres(url) => url,
            #[cfg(feature = "redis")]
            Place::Redis(url) => url,
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => url,
        }
    }
}
