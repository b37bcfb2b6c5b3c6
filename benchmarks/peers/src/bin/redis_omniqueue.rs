//! omniqueue on Redis Streams: counts a batch, then acknowledges each of its records.

use std::{error::Error, time::Duration};

use futures_util::future::try_join_all;
use omniqueue::backends::{RedisBackend, RedisConfig};
use redis::AsyncCommands;
use tokio::time::sleep;
use worker::{EFFECTS, Program, Sending, Task, Work};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const STREAM: &str = "{peers}:log";
const GROUP: &str = "peers";

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    let mut redis = redis::Client::open(&*program.bus)?
        .get_multiplexed_async_connection()
        .await?;
    match &program.task {
        Task::Prepare => Ok(redis.xgroup_create_mkstream(STREAM, GROUP, "0").await?),
        Task::Send(sending) => send_all(&program.bus, *sending).await,
        Task::Work(work) => consume(&program.bus, work, &mut redis).await,
    }
}

fn config(url: &str, work: Option<&Work>) -> RedisConfig {
    RedisConfig {
        dsn: url.into(),
        max_connections: 8,
        reinsert_on_nack: false,
        queue_key: STREAM.into(),
        delayed_queue_key: format!("{STREAM}:delayed"),
        delayed_lock_key: format!("{STREAM}:delayed-lock"),
        consumer_group: GROUP.into(),
        consumer_name: work.map_or("sender", |work| &work.instance).into(),
        payload_key: "payload".into(),
        ack_deadline_ms: work.map_or(0, |work| work.patience as i64),
        dlq_config: None,
        sentinel_config: None,
    }
}

async fn send_all(url: &str, sending: Sending) -> Result<()> {
    let producer = RedisBackend::builder(config(url, None)).build_producer().await?;
    let producer = &producer;
    let publish = async |number| producer.send_raw(&worker::payload(number)).await;
    let schedule = sending.start();
    for numbers in schedule.batches(64) {
        if let Some(wait) = schedule.wait(numbers.start) {
            sleep(wait).await;
        }
        try_join_all(numbers.map(publish)).await?;
    }
    Ok(())
}

async fn consume(url: &str, work: &Work, effects: &mut redis::aio::MultiplexedConnection) -> Result<()> {
    let mut consumer = RedisBackend::builder(config(url, Some(work))).build_consumer().await?;
    loop {
        let batch = consumer.receive_all(work.batch, Duration::from_millis(50)).await?;
        if batch.is_empty() {
            continue;
        }
        let mut count = redis::pipe();
        for delivery in &batch {
            let payload = delivery.borrow_payload().ok_or("a delivery without a payload")?;
            count.hincr(EFFECTS, worker::number(payload), 1).ignore();
            if !work.pause().is_zero() {
                sleep(work.pause()).await;
            }
        }
        count.query_async::<()>(effects).await?;
        let acknowledge =
            |delivery: omniqueue::Delivery| async move { delivery.ack().await.map_err(|(error, _)| error) };
        try_join_all(batch.into_iter().map(acknowledge)).await?;
    }
}
