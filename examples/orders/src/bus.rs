//! The message bus. It can also be on Kafka, which keeps no state and so is no place for a service.

use std::{str::FromStr, sync::Arc};

use essentially_once::{Error, Log};
use essentially_once_sqlite::Sqlite;
use serde::{Deserialize, Serialize};

use crate::{
    Failure,
    place::Place,
    settings::{Settings, Topic},
};

/// Where the bus is. It has no `Debug`, because a URL may hold a password.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Bus {
    /// On a backend that could hold a service as well.
    At(Place),
    /// On the Kafka cluster with this URL.
    #[cfg(feature = "kafka")]
    Kafka(String),
}

impl Bus {
    /// Connects once, as [`Place::reach`] does.
    pub(crate) async fn reach(&self) -> Result<(), Error> {
        match self {
            Self::At(place) => place.reach().await,
            #[cfg(feature = "kafka")]
            Self::Kafka(url) => essentially_once_kafka::Kafka::connect(url).await.map(drop),
        }
    }

    /// Opens a log without signatures, and creates it if it is missing.
    pub(crate) async fn open(&self, topic: Topic, settings: &Settings) -> Result<Arc<dyn Log>, Error> {
        match self {
            Self::At(Place::Sqlite) => {
                let sqlite = Sqlite::open(settings.file("bus.db")).await?;
                Ok(Arc::new(sqlite.log(&topic.to_string()).await?))
            }
            #[cfg(feature = "postgres")]
            Self::At(Place::Postgres(url)) => {
                Ok(Arc::new(settings.postgres(url).await?.log(&topic.to_string()).await?))
            }
            #[cfg(feature = "redis")]
            Self::At(Place::Redis(url)) => {
                let options = essentially_once_redis::LogOptions::new().stream(format!("{}:{topic}", settings.run));
                let redis = essentially_once_redis::Redis::connect(url).await?;
                Ok(Arc::new(redis.log_with(&topic.to_string(), options).await?))
            }
            #[cfg(feature = "rabbitmq")]
            Self::At(Place::Rabbitmq(url)) => {
                let rabbit = essentially_once_rabbitmq::Rabbit::connect(url).await?;
                Ok(Arc::new(rabbit.log(&settings.bus_name(topic)).await?))
            }
            #[cfg(feature = "kafka")]
            Self::Kafka(url) => {
                // Otherwise a single broker may lose what it acknowledged.
                let options = essentially_once_kafka::LogOptions::new()
                    .topic(settings.bus_name(topic))
                    .topic_setting("flush.messages", "1");
                let kafka = essentially_once_kafka::Kafka::connect(url).await?;
                Ok(Arc::new(kafka.log_with(&topic.to_string(), options).await?))
            }
        }
    }

    /// Removes this run's data from a shared server.
    pub(crate) async fn remove(&self, settings: &Settings) -> Result<(), Failure> {
        match self {
            Self::At(place) => settings.remove_from(place).await,
            #[cfg(feature = "kafka")]
            Self::Kafka(url) => remove_topics(url, settings).await,
        }
    }
}

/// Deletes the topics of a run.
#[cfg(feature = "kafka")]
async fn remove_topics(url: &str, settings: &Settings) -> Result<(), Failure> {
    use essentially_once_kafka::rdkafka::{
        admin::{AdminClient, AdminOptions},
        types::RDKafkaErrorCode,
    };

    let kafka = essentially_once_kafka::Kafka::connect(url).await?;
    let admin: AdminClient<_> = kafka.client_config().create()?;
    let topics = Topic::ALL.map(|topic| settings.bus_name(topic));
    let topics = topics.each_ref().map(|topic| &**topic);
    let deleted = admin.delete_topics(&topics, &AdminOptions::new()).await?;
    for result in deleted {
        match result {
            // Not every delivery uses both.
            Ok(_) | Err((_, RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
            Err((topic, code)) => return Err(format!("topic {topic} cannot be deleted: {code}").into()),
        }
    }
    Ok(())
}

impl FromStr for Bus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':').map(|(scheme, _)| scheme) {
            #[cfg(feature = "kafka")]
            Some("kafka" | "kafkas") => Ok(Self::Kafka(text.into())),
            #[cfg(not(feature = "kafka"))]
            Some("kafka" | "kafkas") => {
                Err("this program was built without Kafka: run it with `--features kafka`".into())
            }
            _ => text.parse().map(Self::At),
        }
    }
}

impl TryFrom<String> for Bus {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// The text that [`FromStr`] accepts. It includes the password.
impl From<Bus> for String {
    fn from(bus: Bus) -> Self {
        match bus {
            Bus::At(place) => place.into(),
            #[cfg(feature = "kafka")]
            Bus::Kafka(url) => url,
        }
    }
}
