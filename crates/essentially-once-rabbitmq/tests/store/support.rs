//! A broker for all tests, unique names, and a stranger's view of the streams.

use std::{future::poll_fn, pin::Pin, sync::OnceLock, time::Duration};

use essentially_once::{
    ConsumerId, Error, KeyValue as _, OffsetStore as _,
    backend::{Advance, LogId, Revision, Transaction as _},
};
use essentially_once_rabbitmq::{Rabbit, RabbitOptions, RabbitStore};
use futures_core::Stream as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    options::{BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use test_servers::RabbitNode;

/// It is never dropped. Its janitor ends it with this process.
pub(crate) fn node() -> &'static RabbitNode {
    static NODE: OnceLock<RabbitNode> = OnceLock::new();
    NODE.get_or_init(|| RabbitNode::start().expect("a node"))
}

pub(crate) fn shipping() -> ConsumerId {
    ConsumerId::new("shipping").expect("name")
}

pub(crate) fn log(name: &str) -> LogId {
    LogId::new(name).expect("name")
}

/// The advance of the commit after `commits` commits of one session.
pub(crate) fn advance(next: u64, commits: u64) -> Advance {
    let of = |count| Revision::new(0, count);
    Advance::new(log("orders"), next.into(), of(commits), of(commits + 1))
}

/// A namespace for one test.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) url: String,
    pub(crate) prefix: String,
    pub(crate) timeout: Duration,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::at(node().port())
    }

    pub(crate) fn at(port: u16) -> Self {
        let prefix = (0..12).map(|_| fastrand::alphanumeric()).collect();
        Self {
            prefix,
            ..Self::new_at(port, String::new())
        }
    }

    /// The same place through another port.
    pub(crate) fn through(&self, port: u16) -> Self {
        Self::new_at(port, self.prefix.clone())
    }

    fn new_at(port: u16, prefix: String) -> Self {
        Self {
            url: format!("amqp://guest:guest@127.0.0.1:{port}/%2f"),
            prefix,
            timeout: Duration::from_secs(20),
        }
    }

    pub(crate) fn options(&self) -> RabbitOptions {
        RabbitOptions::new().prefix(&self.prefix).timeout(self.timeout)
    }

    pub(crate) async fn rabbit(&self) -> Result<Rabbit, Error> {
        self.options().connect(&self.url).await
    }

    /// A handle as another process has it.
    pub(crate) async fn store(&self) -> Result<RabbitStore, Error> {
        Ok(self.rabbit().await?.store())
    }

    pub(crate) fn changelog(&self) -> String {
        format!("{}.{}.changelog", self.prefix, shipping())
    }

    pub(crate) fn snapshots(&self, letter: char) -> String {
        format!("{}.{}.snapshots.{letter}", self.prefix, shipping())
    }

    pub(crate) async fn stranger(&self) -> Stranger {
        let connection = Connection::connect(&self.url, ConnectionProperties::default())
            .await
            .expect("connects");
        let channel = connection.create_channel().await.expect("a channel");
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await
            .expect("confirms");
        Stranger {
            url: self.url.clone(),
            connection,
            channel,
        }
    }
}

/// A client that knows the streams but not this crate.
pub(crate) struct Stranger {
    url: String,
    connection: Connection,
    pub(crate) channel: Channel,
}

impl Stranger {
    pub(crate) async fn publish(&self, stream: &str, body: &[u8]) {
        self.publish_with(stream, body, BasicProperties::default()).await;
    }

    pub(crate) async fn publish_with(&self, stream: &str, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions::default();
        let confirm = self
            .channel
            .basic_publish("".into(), stream.into(), options, body, properties)
            .await;
        confirm.expect("published").await.expect("confirmed");
    }

    /// Declares a stream as the store declares changelogs.
    pub(crate) async fn declare_changelog(&self, stream: &str) {
        self.declare(stream, 512 << 20, 16 << 20).await;
    }

    /// Declares a stream as the store declares those of snapshots.
    pub(crate) async fn declare_snapshots(&self, stream: &str) {
        self.declare(stream, 1 << 30, 64 << 20).await;
    }

    async fn declare(&self, stream: &str, length: i64, segment: i64) {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
        arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(length));
        arguments.insert(
            "x-stream-max-segment-size-bytes".into(),
            AMQPValue::LongLongInt(segment),
        );
        let options = QueueDeclareOptions::durable();
        let declared = self.channel.queue_declare(stream.into(), options, arguments).await;
        declared.expect("declared");
    }

    /// Whether that stream exists.
    pub(crate) async fn sees(&self, stream: &str) -> bool {
        let channel = self.connection.create_channel().await.expect("a channel");
        let options = QueueDeclareOptions::default().passive();
        channel
            .queue_declare(stream.into(), options, FieldTable::default())
            .await
            .is_ok()
    }

    async fn consume(&self, stream: &str) -> lapin::Result<Consumer> {
        let connection = Connection::connect(&self.url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.basic_qos(10_000, BasicQosOptions::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
        let options = BasicConsumeOptions::default();
        channel
            .basic_consume(stream.into(), "".into(), options, arguments)
            .await
    }

    /// The first message, present or future, that satisfies the condition, and its offset.
    pub(crate) async fn find(&self, stream: &str, mut wanted: impl FnMut(&[u8]) -> bool) -> (u64, Vec<u8>) {
        let mut consumer = loop {
            // A stream declared a moment ago may not be up, and asking for it then ends the
            // connection.
            if let Ok(consumer) = self.consume(stream).await {
                break consumer;
            }
        };
        let finding = async {
            loop {
                let next = poll_fn(|context| Pin::new(&mut consumer).poll_next(context)).await;
                let delivery = next.expect("it does not end").expect("a message");
                let headers = delivery.properties.headers().as_ref().expect("headers").inner();
                let Some(AMQPValue::LongLongInt(offset)) = headers.get("x-stream-offset") else {
                    panic!("{headers:?} hold no offset");
                };
                if wanted(&delivery.data) {
                    return (*offset as u64, delivery.data);
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), finding)
            .await
            .expect("within the time limit")
    }
}

/// The changelog offset of a chunk of a snapshot.
pub(crate) fn chunk_offset(chunk: &[u8]) -> u64 {
    u64::from_be_bytes(chunk[25..33].try_into().expect("8 bytes"))
}

/// Stages `key`, and commits it with the revision's number as the next offset.
pub(crate) async fn put(store: &RabbitStore, key: &str, value: &str, expected_revision: u64) -> Result<(), Error> {
    let mut tx = store.begin(&shipping()).await?;
    tx.put(key.as_bytes(), value.as_bytes()).await?;
    tx.commit(advance(expected_revision + 1, expected_revision)).await
}

pub(crate) async fn get(store: &RabbitStore, key: &str) -> Result<Option<String>, Error> {
    let value = store.begin(&shipping()).await?.get(key.as_bytes()).await?;
    Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
}

pub(crate) async fn revision(store: &RabbitStore) -> Result<u64, Error> {
    Ok(store
        .position(&shipping())
        .await?
        .map_or(0, |position| position.revision.count()))
}
