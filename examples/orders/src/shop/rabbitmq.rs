//! The shop on a RabbitMQ broker: in the consumer's state, or in a separate stream.

use std::collections::HashMap;

use async_trait::async_trait;
use essentially_once::{ConsumerId, HandlerError, KeyValue, Log, NewRecord, Offset, OffsetStore};
use essentially_once_rabbitmq::{Rabbit, RabbitLog, RabbitTx};
use lapin::{Connection, ConnectionProperties, options::QueueDeleteOptions};

use super::effect::{Books, Effect, Shop};
use crate::{
    Failure,
    backend::{order_stream, read_all},
};

/// In the transaction that commits the position. The state has no lists, so each effect is a key,
/// and its value counts how often it was written.
#[async_trait]
impl Shop for RabbitTx {
    async fn write(&mut self, effect: &Effect<'_>) -> Result<(), HandlerError> {
        let (key, _) = entry(effect);
        let times = times(self.get(key.as_bytes()).await.map_err(HandlerError::fatal)?);
        let value = (times + 1).to_string();
        let put = self.put(key.as_bytes(), value.as_bytes());
        put.await.map_err(HandlerError::fatal)
    }
}

/// The shop's own stream. Every effect is published immediately, independently of the position.
pub(crate) struct RabbitShop {
    rabbit: Rabbit,
    effects: RabbitLog,
    consumer: ConsumerId,
}

#[async_trait]
impl Shop for RabbitShop {
    async fn write(&mut self, effect: &Effect<'_>) -> Result<(), HandlerError> {
        let (key, payload) = entry(effect);
        let published = self.effects.append(&[NewRecord::new(payload).key(key)]).await;
        published.map(|_| ()).map_err(HandlerError::fatal)
    }
}

impl RabbitShop {
    pub(crate) async fn connect(url: &str, consumer: &ConsumerId) -> Result<Self, Failure> {
        let rabbit = Rabbit::connect(url).await?;
        Ok(Self {
            effects: rabbit.log(&effects(consumer)).await?,
            rabbit,
            consumer: consumer.clone(),
        })
    }

    /// Counts the effects of these records.
    pub(super) async fn count(&mut self, offsets: &[Offset]) -> Result<Books, Failure> {
        let mut published: HashMap<Vec<u8>, u64> = HashMap::new();
        for record in read_all(&self.effects).await? {
            *published.entry(record.key.unwrap_or_default().into()).or_default() += 1;
        }
        let mut state = self.rabbit.store().begin(&self.consumer).await?;
        let mut books = Books::default();
        for offset in offsets {
            for kind in [SHIPPED, REJECTED] {
                let key = format!("{kind}/{offset}");
                let committed = times(state.get(key.as_bytes()).await?);
                let times = committed + published.get(key.as_bytes()).copied().unwrap_or_default();
                books.effects += times;
                match (kind, times) {
                    (_, 0) => {}
                    (REJECTED, _) => books.rejected += 1,
                    (_, 1) => books.shipped_once += 1,
                    _ => books.shipped_more += 1,
                }
            }
        }
        Ok(books)
    }
}

fn effects(consumer: &ConsumerId) -> String {
    format!("{consumer}.effects")
}

/// Deletes the streams of this run, and the store's streams for its consumer.
pub(super) async fn remove(url: &str, consumer: &ConsumerId) -> Result<(), Failure> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let store =
        ["changelog", "snapshots.a", "snapshots.b"].map(|stream| format!("essentially-once.{consumer}.{stream}"));
    for stream in [order_stream(consumer), effects(consumer)].into_iter().chain(store) {
        // Deleting a missing stream succeeds.
        channel
            .queue_delete(stream.into(), QueueDeleteOptions::default())
            .await?;
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

const SHIPPED: &str = "shipped";
const REJECTED: &str = "rejected";

/// The key under which an effect is kept, and its text.
fn entry(effect: &Effect<'_>) -> (String, String) {
    match effect {
        Effect::Shipped { offset, order } => (format!("{SHIPPED}/{offset}"), format!("{},{}", order.id, order.freight)),
        Effect::Rejected {
            offset,
            line,
            payload,
            reason,
        } => (format!("{REJECTED}/{offset}"), format!("{line},{payload},{reason}")),
    }
}

fn times(value: Option<impl AsRef<[u8]>>) -> u64 {
    let text = value.map(|value| String::from_utf8_lossy(value.as_ref()).into_owned());
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}
