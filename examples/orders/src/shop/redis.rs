//! The shop's list of shipments on a Redis server.

use async_trait::async_trait;
use essentially_once::{ConsumerId, HandlerError, NewRecord, Outbox as _};
use essentially_once_redis::{
    RedisTx,
    redis::{AsyncConnectionConfig, Client, Cmd, RedisResult, aio::MultiplexedConnection, cmd},
};

use super::{Shipment, Shop};
use crate::{Failure, settings::OUTBOX};

/// In the transaction that commits the position. The push happens in the same step or not at all.
#[async_trait]
impl Shop for RedisTx {
    async fn ship(&mut self, shipment: &Shipment<'_>) -> Result<(), HandlerError> {
        let push = push(self.consumer(), shipment);
        self.command(push).await.map_err(HandlerError::fatal)
    }

    async fn report(&mut self, record: NewRecord) -> Result<(), HandlerError> {
        let outbox = outbox(self.consumer());
        Ok(self.send(&outbox, record).await?)
    }
}

/// The shop's own connection. Every push takes effect immediately, independently of the position.
pub(crate) struct RedisShop {
    connection: MultiplexedConnection,
    consumer: ConsumerId,
}

#[async_trait]
impl Shop for RedisShop {
    async fn ship(&mut self, shipment: &Shipment<'_>) -> Result<(), HandlerError> {
        let push = push(&self.consumer, shipment);
        let pushed: RedisResult<u64> = push.query_async(&mut self.connection).await;
        pushed.map(|_| ()).map_err(HandlerError::fatal)
    }

    async fn report(&mut self, _: NewRecord) -> Result<(), HandlerError> {
        Ok(())
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

    /// The numbers of the shipped orders, in the order of the shipments. An entry begins with its
    /// number.
    pub(super) async fn list(&mut self) -> Result<Vec<u32>, Failure> {
        const AT_A_TIME: usize = 10_000;
        let key = list(&self.consumer);
        let mut numbers = Vec::new();
        for first in (0..).step_by(AT_A_TIME) {
            let range = cmd("LRANGE").arg(&key).arg(first).arg(first + AT_A_TIME - 1).to_owned();
            let entries: Vec<String> = range.query_async(&mut self.connection).await?;
            for entry in &entries {
                numbers.push(entry.split(',').next().unwrap_or_default().parse()?);
            }
            if entries.len() < AT_A_TIME {
                break;
            }
        }
        Ok(numbers)
    }

    /// Deletes all keys of a run.
    pub(super) async fn remove(&mut self, run: &str) -> Result<(), Failure> {
        let mut cursor = 0_u64;
        loop {
            let scan = cmd("SCAN")
                .arg(cursor)
                .arg("MATCH")
                .arg(format!("*{run}*"))
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

/// Both keys have the consumer's hash tag, so that one step can write them together with the
/// position, even in a cluster.
pub(crate) fn outbox(consumer: &ConsumerId) -> String {
    format!("{{{consumer}}}:{OUTBOX}")
}

fn list(consumer: &ConsumerId) -> String {
    format!("{{{consumer}}}:shipments")
}

/// A push that runs twice leaves two entries, so a doubled shipment is visible.
fn push(consumer: &ConsumerId, Shipment { number, order }: &Shipment<'_>) -> Cmd {
    let entry = format!("{number},{},{}", order.id, order.freight);
    cmd("RPUSH").arg(list(consumer)).arg(entry).to_owned()
}
