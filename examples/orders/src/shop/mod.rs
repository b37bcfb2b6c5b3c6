//! Writes shipments, in the store's transaction or outside it.

mod sqlite;

#[cfg(feature = "rabbitmq")]
pub(crate) mod rabbitmq;
#[cfg(feature = "redis")]
mod redis;

use async_trait::async_trait;
use essentially_once::{HandlerError, Offset};

use crate::{
    Failure,
    backend::{Backend, Place},
    order::Order,
};

#[cfg(feature = "rabbitmq")]
pub(crate) use self::rabbitmq::RabbitShop;
#[cfg(feature = "redis")]
pub(crate) use self::redis::RedisShop;
pub(crate) use self::sqlite::own_connection;

/// The effect of a line of the log. Offsets are kept as text, because a log's offsets are opaque.
pub(crate) enum Effect<'a> {
    Shipped {
        offset: String,
        order: &'a Order,
    },
    Rejected {
        offset: String,
        line: u32,
        payload: &'a str,
        reason: &'a str,
    },
}

/// Writes effects.
#[async_trait]
pub(crate) trait Shop: Send {
    /// Any error stops the worker. If at-most-once skipped a failed record, it would be counted as
    /// lost to a kill.
    async fn write(&mut self, effect: &Effect<'_>) -> Result<(), HandlerError>;
}

/// What the shop holds, counted by offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Books {
    pub(crate) shipped_once: u64,
    pub(crate) shipped_more: u64,
    pub(crate) rejected: u64,
    /// The number of effects ever written, including doubled ones.
    pub(crate) effects: u64,
}

impl Backend {
    /// Creates everything that the shop needs before the first effect.
    pub(crate) fn create_shop(&self) -> Result<(), Failure> {
        match self.store {
            Place::Sqlite => Ok(sqlite::create_tables(&self.database)?),
            #[cfg(any(feature = "redis", feature = "rabbitmq"))]
            _ => Ok(()),
        }
    }

    /// Counts the effects written for the records at these offsets, as stored on disk.
    pub(crate) async fn books(&self, offsets: &[Offset]) -> Result<Books, Failure> {
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
