//! The shop on a RabbitMQ broker: in the consumer's state, or in a separate stream.

use async_trait::async_trait;
use essentially_once::{ConsumerId, HandlerError, KeyValue, Log, NewRecord, OffsetStore, Outbox as _};
use essentially_once_rabbitmq::{Rabbit, RabbitLog, RabbitTx};
use lapin::{Connection, ConnectionProperties, options::QueueDeleteOptions};

use super::{Shipment, Shipments, Shop};
use crate::{
    Failure,
    settings::{OUTBOX, Settings, Topic, read_all},
};

/// In the transaction that commits the position. The state has no lists, so each shipment is a key,
/// and its value counts how often it was written.
#[async_trait]
impl Shop for RabbitTx {
    async fn ship(&mut self, shipment: &Shipment<'_>) -> Result<(), HandlerError> {
        let key = key(shipment.number);
        let times = times(self.get(key.as_bytes()).await.map_err(HandlerError::fatal)?);
        let value = (times + 1).to_string();
        let put = self.put(key.as_bytes(), value.as_bytes());
        put.await.map_err(HandlerError::fatal)
    }

    async fn report(&mut self, record: NewRecord) -> Result<(), HandlerError> {
        Ok(self.send(OUTBOX, record).await?)
    }
}

/// The shop's own stream. Every shipment is published immediately, independently of the position.
pub(crate) struct RabbitShop {
    rabbit: Rabbit,
    shipments: RabbitLog,
    consumer: ConsumerId,
}

#[async_trait]
impl Shop for RabbitShop {
    async fn ship(&mut self, Shipment { number, order }: &Shipment<'_>) -> Result<(), HandlerError> {
        let shipment = NewRecord::new(format!("{},{}", order.id, order.freight)).key(number.to_string());
        let published = self.shipments.append(&[shipment]).await;
        published.map(|_| ()).map_err(HandlerError::fatal)
    }

    async fn report(&mut self, _: NewRecord) -> Result<(), HandlerError> {
        Ok(())
    }
}

impl RabbitShop {
    pub(crate) async fn connect(url: &str, consumer: &ConsumerId) -> Result<Self, Failure> {
        let rabbit = Rabbit::connect(url).await?;
        Ok(Self {
            shipments: rabbit.log(&shipments(consumer)).await?,
            rabbit,
            consumer: consumer.clone(),
        })
    }

    /// Counts the shipments of the orders with these numbers.
    pub(super) async fn count(&mut self, numbers: &[u32]) -> Result<Shipments, Failure> {
        let mut counts = Shipments::new();
        for record in read_all(&self.shipments).await? {
            let number = String::from_utf8_lossy(&record.key.unwrap_or_default()).parse()?;
            *counts.entry(number).or_default() += 1;
        }
        let mut state = self.rabbit.store().begin(&self.consumer).await?;
        for number in numbers {
            let committed = times(state.get(key(*number).as_bytes()).await?);
            if committed > 0 {
                *counts.entry(*number).or_default() += committed;
            }
        }
        Ok(counts)
    }
}

fn shipments(consumer: &ConsumerId) -> String {
    format!("{consumer}.shipments")
}

/// Deletes the streams of a run, and those of the store for its consumers.
pub(super) async fn remove(url: &str, settings: &Settings) -> Result<(), Failure> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let shipping = settings.shipping()?;
    let mut streams = vec![shipments(&shipping)];
    streams.extend(Topic::ALL.map(|topic| settings.bus_stream(topic)));
    for consumer in [shipping, settings.shipping_relay()?] {
        let store = ["changelog", "snapshots.a", "snapshots.b"];
        streams.extend(store.map(|stream| format!("essentially-once.{consumer}.{stream}")));
    }
    for stream in streams {
        // Deleting a missing stream succeeds.
        channel
            .queue_delete(stream.into(), QueueDeleteOptions::default())
            .await?;
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// The key of the state under which a shipment is counted.
fn key(number: u32) -> String {
    format!("shipped/{number}")
}

fn times(value: Option<impl AsRef<[u8]>>) -> u64 {
    let text = value.map(|value| String::from_utf8_lossy(value.as_ref()).into_owned());
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}
