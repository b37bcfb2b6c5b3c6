//! The shop on a RabbitMQ broker: in the consumer's state, or in a separate stream.

use async_trait::async_trait;
use essentially_once::{ConsumerId, HandlerError, KeyValue, Log, NewRecord, OffsetStore, Outbox as _};
use essentially_once_rabbitmq::{Rabbit, RabbitLog, RabbitTx};
use lapin::{Connection, ConnectionProperties, options::QueueDeleteOptions};

use super::{Shipment, Shop};
use crate::{
    Failure,
    settings::{OUTBOX, Settings, Topic, read_all},
};

/// In the transaction that commits the position. The state has no lists, so each place of a list is
/// a key, and another key holds the length.
#[async_trait]
impl Shop for RabbitTx {
    async fn ship(&mut self, shipment: &Shipment<'_>) -> Result<(), HandlerError> {
        let length = length(self).await.map_err(HandlerError::fatal)?;
        let (place, number) = (place(length), shipment.number.to_string());
        let put = self.put(place.as_bytes(), number.as_bytes());
        put.await.map_err(HandlerError::fatal)?;
        let length = (length + 1).to_string();
        let put = self.put(LENGTH, length.as_bytes());
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

    /// The numbers of the shipped orders, in the order of the shipments.
    pub(super) async fn list(&mut self) -> Result<Vec<u32>, Failure> {
        let mut numbers = Vec::new();
        for record in read_all(&self.shipments).await? {
            numbers.push(String::from_utf8_lossy(&record.key.unwrap_or_default()).parse()?);
        }
        let mut state = self.rabbit.store().begin(&self.consumer).await?;
        for index in 0..length(&mut state).await? {
            numbers.push(number(state.get(place(index).as_bytes()).await?)?);
        }
        Ok(numbers)
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
    streams.extend(Topic::ALL.map(|topic| settings.bus_name(topic)));
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

/// The key of the state that holds how many shipments there are.
const LENGTH: &[u8] = b"shipments";

/// The key of the state that holds the order's number of a shipment.
fn place(index: u32) -> String {
    format!("shipments/{index}")
}

async fn length(state: &mut RabbitTx) -> Result<u32, Failure> {
    match state.get(LENGTH).await? {
        Some(length) => number(Some(length)),
        None => Ok(0),
    }
}

fn number(value: Option<impl AsRef<[u8]>>) -> Result<u32, Failure> {
    let value = value.ok_or("a shipment is missing in the state")?;
    Ok(std::str::from_utf8(value.as_ref())?.parse()?)
}
