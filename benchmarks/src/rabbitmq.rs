//! RabbitMQ on one private node: publishing to a stream, and consuming it with counter and offset
//! in one SQLite transaction. By hand with `lapin`, and through the library. The packed rows are
//! compared with the same hand-written loops, which send one message per record.

use std::{
    cell::Cell,
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use essentially_once::{Consumer, ConsumerId, Log};
use essentially_once_rabbitmq::{LogOptions, Packing, Rabbit, RabbitLog};
use essentially_once_sqlite::{Sqlite, rusqlite};
use futures_util::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tempfile::TempDir;
use test_servers::RabbitNode;

use crate::{Batch, Contest, Result, Row, Rules, sqlite};

const APPEND: &str = "append";
/// The hand-written loop also sends the time in a header, as the library does.
const APPEND_WITH_TIME: &str = "append, with the time by hand too";
const CONSUME: &str = "consume";
const APPEND_PACKED: &str = "append, packed";
const CONSUME_PACKED: &str = "consume, packed";

/// Records per append and commit, and messages in flight and prefetched, on both sides.
const BATCH: usize = 1_000;

/// A private node, and a folder for the SQLite files.
pub(crate) struct Node {
    node: RabbitNode,
    folder: TempDir,
    runtime: tokio::runtime::Runtime,
    /// Each stream and file is used once.
    used: Cell<u32>,
}

impl Node {
    pub(crate) fn start(folder: TempDir) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        Ok(Self {
            node: RabbitNode::start()?,
            folder,
            runtime,
            used: Cell::new(0),
        })
    }

    fn path(&self) -> PathBuf {
        self.used.set(self.used.get() + 1);
        self.folder.path().join(format!("{}.db", self.used.get()))
    }
}

impl Contest for Node {
    fn rows(&self, rules: &Rules<'_>) -> Vec<Row> {
        [
            (APPEND, 40_000),
            (APPEND_WITH_TIME, 40_000),
            (CONSUME, 40_000),
            (APPEND_PACKED, 200_000),
            (CONSUME_PACKED, 200_000),
        ]
        .map(|(label, records)| Row {
            label: label.into(),
            records,
            batch: Batch::Records(BATCH),
            payload: rules.payload,
        })
        .into()
    }

    fn by_hand(&self, name: &str, row: &Row) -> Result<Duration> {
        let path = self.path();
        self.runtime.block_on(async {
            let connection = Connection::connect(&self.node.url(), ConnectionProperties::default()).await?;
            let channel = connection.create_channel().await?;
            let appending = publish(&channel, name, row).await?;
            let time = match row.label.starts_with(APPEND) {
                true => appending,
                false => consume(&connection, name, row, path).await?,
            };
            channel.queue_delete(name.into(), Default::default()).await?;
            connection.close(200, "done".into()).await?;
            Ok(time)
        })
    }

    fn ours(&self, name: &str, row: &Row) -> Result<Duration> {
        let path = self.path();
        let options = match row.label.as_str() {
            APPEND_PACKED | CONSUME_PACKED => {
                LogOptions::new().packed(Packing::new().max_records(BATCH).max_bytes(1024 * 1024))
            }
            _ => LogOptions::new(),
        };
        self.runtime.block_on(async {
            let log = Rabbit::connect(&self.node.url()).await?.log_with(name, options).await?;
            let fill = row.fill();
            let started = Instant::now();
            for chunk in fill.chunks(BATCH) {
                log.append(chunk).await?;
            }
            let appending = started.elapsed();
            match row.label.starts_with(APPEND) {
                true => Ok(appending),
                false => consume_ours(log, row, path).await,
            }
        })
    }
}

/// Publishes with a bounded number of outstanding confirms, and accepts only a plain
/// acknowledgement.
async fn publish(channel: &Channel, stream: &str, row: &Row) -> Result<Duration> {
    prepare(channel, stream).await?;
    let started = Instant::now();
    let mandatory = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let mut left = row.records as usize;
    while left > 0 {
        let count = left.min(BATCH);
        let mut confirms = Vec::with_capacity(count);
        for _ in 0..count {
            let properties = match row.label == APPEND_WITH_TIME {
                true => BasicProperties::default().with_headers(now()?),
                false => BasicProperties::default(),
            };
            let published = channel.basic_publish("".into(), stream.into(), mandatory, row.payload, properties);
            confirms.push(published.await?);
        }
        for confirm in confirms {
            if confirm.await? != Confirmation::Ack(None) {
                return Err("a message was not confirmed".into());
            }
        }
        left -= count;
    }
    Ok(started.elapsed())
}

/// Declares a stream, and lets the channel confirm what is published.
pub(crate) async fn prepare(channel: &Channel, stream: &str) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
    let durable = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    channel.queue_declare(stream.into(), durable, arguments).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(())
}

fn now() -> Result<FieldTable> {
    let millis = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let mut headers = FieldTable::default();
    headers.insert(
        "essentially-once-time".into(),
        AMQPValue::LongString(millis.to_string().into()),
    );
    Ok(headers)
}

/// Reads a stream from its beginning.
pub(crate) async fn subscribe(connection: &Connection, stream: &str) -> Result<lapin::Consumer> {
    let channel = connection.create_channel().await?;
    channel.basic_qos(BATCH as u16, BasicQosOptions::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), AMQPValue::LongLongInt(0));
    let options = BasicConsumeOptions::default();
    Ok(channel
        .basic_consume(stream.into(), "bench".into(), options, arguments)
        .await?)
}

/// Counts each message and stores the offset, in one transaction per prefetched batch.
async fn consume(connection: &Connection, stream: &str, row: &Row, path: PathBuf) -> Result<Duration> {
    let records = row.records;
    let mut database = sqlite::open_by_hand(&path, 1)?;
    let started = Instant::now();
    let mut consumer = subscribe(connection, stream).await?;
    let mut handled = 0;
    while handled < records {
        let transaction = database.transaction()?;
        let mut next = 0;
        let mut last = None;
        {
            let mut count = transaction.prepare_cached(sqlite::COUNT)?;
            for _ in 0..(BATCH as u64).min(records - handled) {
                let delivery = consumer.next().await.ok_or("the consumer ended")??;
                assert_eq!(delivery.data.len(), row.payload.len());
                next = offset(&delivery)? + 1;
                count.execute([0])?;
                handled += 1;
                last = Some(delivery);
            }
        }
        transaction.execute("UPDATE position SET next = ?1 WHERE id = 1", [next])?;
        transaction.commit()?;
        if let Some(delivery) = last {
            delivery.ack(BasicAckOptions { multiple: true }).await?;
        }
    }
    let time = started.elapsed();
    sqlite::check(&database, records)?;
    Ok(time)
}

pub(crate) fn offset(delivery: &lapin::message::Delivery) -> Result<i64> {
    let headers = delivery.properties.headers().as_ref();
    match headers.and_then(|headers| headers.inner().get("x-stream-offset")) {
        Some(AMQPValue::LongLongInt(offset)) => Ok(*offset),
        _ => Err("a message has no offset, although it comes from a stream".into()),
    }
}

async fn consume_ours(log: RabbitLog, row: &Row, path: PathBuf) -> Result<Duration> {
    let database = rusqlite::Connection::open(&path)?;
    sqlite::create_counters(&database, 1)?;
    let store = Sqlite::open(path).await?.store();
    let started = Instant::now();
    let count = sqlite::Count::new(1, row.payload.len());
    let consumer = Consumer::essentially_once(ConsumerId::new("bench")?, log, store, count);
    tokio::spawn(consumer.max_batch(BATCH).run_until_caught_up()).await??;
    let time = started.elapsed();
    sqlite::check(&database, row.records)?;
    Ok(time)
}
