//! Writes shipments, in the store's transaction or outside it.

mod shipment;
mod sqlite;

#[cfg(feature = "rabbitmq")]
mod rabbitmq;
#[cfg(feature = "redis")]
mod redis;

use essentially_once::Offset;

use crate::{
    Failure,
    backend::{Backend, Place},
};

#[cfg(feature = "rabbitmq")]
pub(crate) use self::rabbitmq::RabbitShop;
#[cfg(feature = "redis")]
pub(crate) use self::redis::RedisShop;
pub(crate) use self::{
    shipment::{Shipment, Shipments, Shop},
    sqlite::own_connection,
};

impl Backend {
    /// Creates everything that the shop needs before the first shipment.
    pub(crate) fn create_shop(&self) -> Result<(), Failure> {
        match self.store {
            Place::Sqlite => Ok(sqlite::create_table(&self.database)?),
            #[cfg(any(feature = "redis", feature = "rabbitmq"))]
            _ => Ok(()),
        }
    }

    /// Counts the shipments of the records at these offsets, as stored on disk.
    pub(crate) async fn shipments(&self, offsets: &[Offset]) -> Result<Shipments, Failure> {
        let _ = offsets;
        match &self.store {
            Place::Sqlite => Ok(sqlite::count(&own_connection(&self.database)?)?),
            #[cfg(feature = "redis")]
            Place::Redis(url) => RedisShop::connect(url, &self.consumer).await?.count().await,
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => RabbitShop::connect(url, &self.consumer).await?.count(offsets).await,
        }
    }

    /// Removes this run's data from a shared server.
    pub(crate) async fn remove(&self) -> Result<(), Failure> {
        for place in [&self.log, &self.store] {
            match place {
                Place::Sqlite => {}
                #[cfg(feature = "redis")]
                Place::Redis(url) => RedisShop::connect(url, &self.consumer).await?.remove().await?,
                #[cfg(feature = "rabbitmq")]
                Place::Rabbitmq(url) => rabbitmq::remove(url, &self.consumer).await?,
            }
        }
        Ok(())
    }
}
