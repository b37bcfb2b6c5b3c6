//! Writes shipments, in the store's transaction or outside it.

mod shipment;
mod sqlite;

#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;
#[cfg(feature = "redis")]
mod redis;

use std::sync::Arc;

use essentially_once::Log;

use crate::{
    Failure,
    place::Place,
    settings::{OUTBOX, Settings},
};

#[cfg(feature = "postgres")]
pub(crate) use self::postgres::{PostgresShop, connect};
#[cfg(feature = "rabbitmq")]
pub(crate) use self::rabbitmq::RabbitShop;
#[cfg(feature = "redis")]
pub(crate) use self::redis::RedisShop;
pub(crate) use self::{
    shipment::{Shipment, Shop},
    sqlite::own_connection,
};

impl Settings {
    /// Creates everything that the shop needs before the first shipment.
    pub(crate) async fn create_shop(&self) -> Result<(), Failure> {
        match &self.store {
            Place::Sqlite => sqlite::create_table(&self.file("shipping.db")),
            #[cfg(feature = "postgres")]
            Place::Postgres(url) => postgres::create_table(url, &self.shipping()?).await,
            #[cfg(any(feature = "redis", feature = "rabbitmq"))]
            _ => Ok(()),
        }
    }

    /// Opens the outbox to which the shop's transactions send.
    pub(crate) async fn shop_outbox(&self) -> Result<Arc<dyn Log>, Failure> {
        match &self.store {
            Place::Sqlite => Ok(Arc::new(self.shipping_database().await?.log(OUTBOX).await?)),
            #[cfg(feature = "postgres")]
            Place::Postgres(url) => Ok(Arc::new(self.postgres(url).await?.log(OUTBOX).await?)),
            #[cfg(feature = "redis")]
            Place::Redis(url) => {
                let outbox = redis::outbox(&self.shipping()?);
                let options = essentially_once_redis::LogOptions::new().stream(outbox);
                let redis = essentially_once_redis::Redis::connect(url).await?;
                Ok(Arc::new(redis.log_with(OUTBOX, options).await?))
            }
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => {
                let rabbit = essentially_once_rabbitmq::Rabbit::connect(url).await?;
                Ok(Arc::new(rabbit.store().sent_to(&self.shipping()?, OUTBOX)?))
            }
        }
    }

    /// The numbers of the shipped orders, in the order of the shipments, as stored on disk.
    pub(crate) async fn shipments(&self) -> Result<Vec<u32>, Failure> {
        match &self.store {
            Place::Sqlite => sqlite::list(&self.file("shipping.db")),
            #[cfg(feature = "postgres")]
            Place::Postgres(url) => postgres::list(url, &self.shipping()?).await,
            #[cfg(feature = "redis")]
            Place::Redis(url) => RedisShop::connect(url, &self.shipping()?).await?.list().await,
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => RabbitShop::connect(url, &self.shipping()?).await?.list().await,
        }
    }

    /// Removes this run's data from a shared server.
    pub(crate) async fn remove_from(&self, place: &Place) -> Result<(), Failure> {
        match place {
            // The files are in the folder of the run, which is removed as a whole.
            Place::Sqlite => Ok(()),
            #[cfg(feature = "postgres")]
            Place::Postgres(url) => postgres::remove(url, self).await,
            #[cfg(feature = "redis")]
            Place::Redis(url) => {
                let mut shop = RedisShop::connect(url, &self.shipping()?).await?;
                shop.remove(&self.run).await
            }
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => rabbitmq::remove(url, self).await,
        }
    }
}
