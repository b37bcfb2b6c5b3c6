//! The shop's lists on a Redis server: one for shipments, one for rejected lines.

use std::collections::HashMap;

use async_trait::async_trait;
use essentially_once::{ConsumerId, HandlerError};
use essentially_once_redis::{
    RedisTx,
    redis::{AsyncConnectionConfig, Client, Cmd, RedisResult, aio::MultiplexedConnection, cmd},
};

use super::effect::{Books, Effect, Shop};
use crate::Failure;

/// In the transaction that commits the position. The push happens in the same step or not at all.
#[async_trait]
impl Shop for RedisTx {
    async fn write(&mut self, effect: &Effect<'_>) -> Result<(), HandlerError> {
        let push = push(&keys(self.consumer()), effect);
        self.command(push).await.map_err(HandlerError::fatal)
    }
}

/// The shop's own connection. Every push takes effect immediately, independently of the position.
pub(crate) struct RedisShop {
    connection: MultiplexedConnection,
    consumer: ConsumerId,
}

#[async_trait]
impl Shop for RedisShop {
    async fn write(&mut self, effect: &Effect<'_>) -> Result<(), HandlerError> {
        let push = push(&keys(&self.consumer), effect);
        let pushed: RedisResult<u64> = push.query_async(&mut self.connection).await;
        pushed.map(|_| ()).map_err(HandlerError::fatal)
    }
}

impl RedisShop {
    pub(crate) async fn connect(url: &str, consumer: &ConsumerId) -> Result<Self, Failure> {
        // Without its own time limit, because a late reply is not a reason to ship twice.
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        Ok(Self {
            connection: Client::open(url)?
                .get_multiplexed_async_connection_with_config(&config)
                .await?,
            consumer: consumer.clone(),
        })
    }

    pub(super) async fn count(&mut self) -> Result<Books, Failure> {
        let keys = keys(&self.consumer);
        let shipped = self.times_by_offset(&keys.shipments).await?;
        let rejected = self.times_by_offset(&keys.rejected).await?;
        let once = shipped.values().filter(|times| **times == 1).count() as u64;
        Ok(Books {
            shipped_once: once,
            shipped_more: shipped.len() as u64 - once,
            rejected: rejected.len() as u64,
            effects: shipped.values().chain(rejected.values()).sum(),
        })
    }

    /// How often each offset was written. An entry begins with its offset.
    async fn times_by_offset(&mut self, key: &str) -> Result<HashMap<String, u64>, Failure> {
        const AT_A_TIME: usize = 10_000;
        let mut times = HashMap::new();
        for first in (0..).step_by(AT_A_TIME) {
            let range = cmd("LRANGE").arg(key).arg(first).arg(first + AT_A_TIME - 1).to_owned();
            let entries: Vec<String> = range.query_async(&mut self.connection).await?;
            for entry in &entries {
                let offset = entry.split(',').next().unwrap_or_default();
                *times.entry(offset.to_owned()).or_default() += 1;
            }
            if entries.len() < AT_A_TIME {
                break;
            }
        }
        Ok(times)
    }

    /// Deletes all keys that begin with the consumer's hash tag, and the store's own keys for this
    /// consumer.
    pub(super) async fn remove(&mut self) -> Result<(), Failure> {
        let mut cursor = 0_u64;
        loop {
            let scan = cmd("SCAN")
                .arg(cursor)
                .arg("MATCH")
                .arg(format!("*{{{}}}*", self.consumer))
                .arg("COUNT")
                .arg(1_000)
                .to_owned();
            let (next, found): (u64, Vec<Vec<u8>>) = scan.query_async(&mut self.connection).await?;
            if !found.is_empty() {
                cmd("DEL").arg(found).query_async::<u64>(&mut self.connection).await?;
            }
            if next == 0 {
                return Ok(());
            }
            cursor = next;
        }
    }
}

struct Keys {
    shipments: String,
    rejected: String,
}

/// The keys share the consumer's hash tag, so that one step can write them together with its
/// position, even in a cluster.
fn keys(consumer: &ConsumerId) -> Keys {
    Keys {
        shipments: format!("{{{consumer}}}:shipments"),
        rejected: format!("{{{consumer}}}:rejected"),
    }
}

/// A push that runs twice leaves two entries, so a doubled effect is visible.
fn push(keys: &Keys, effect: &Effect<'_>) -> Cmd {
    let (key, entry) = match effect {
        Effect::Shipped { offset, order } => (&keys.shipments, format!("{offset},{},{}", order.id, order.freight)),
        Effect::Rejected {
            offset,
            line,
            payload,
            reason,
        } => (&keys.rejected, format!("{offset},{line},{payload},{reason}")),
    };
    cmd("RPUSH").arg(key).arg(entry).to_owned()
}
