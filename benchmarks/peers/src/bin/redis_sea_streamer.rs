//! SeaStreamer on Redis Streams: counts a batch, then acknowledges and commits it.

use std::error::Error;

use sea_streamer_redis::{AutoCommit, AutoStreamReset, RedisConnectOptions, RedisConsumerOptions, RedisStreamer};
use sea_streamer_types::{Buffer, Consumer, ConsumerMode, ConsumerOptions, Message, Producer, StreamKey, Streamer};
use tokio::time::{sleep, timeout};
use worker::{EFFECTS, Program, Sending, Task, Work};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// SeaStreamer allows no braces in names.
const STREAM: &str = "peers-log";

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    match &program.task {
        Task::Prepare => Ok(()),
        Task::Send(sending) => send_all(&program.bus, *sending).await,
        Task::Work(work) => consume(&program.bus, work).await,
    }
}

async fn connect(url: &str) -> Result<RedisStreamer> {
    Ok(RedisStreamer::connect(url.trim_end_matches('/').parse()?, RedisConnectOptions::default()).await?)
}

async fn send_all(url: &str, sending: Sending) -> Result<()> {
    let streamer = connect(url).await?;
    let mut producer = streamer
        .create_producer(StreamKey::new(STREAM)?, Default::default())
        .await?;
    let schedule = sending.start();
    for numbers in schedule.batches(1_000) {
        if let Some(wait) = schedule.wait(numbers.start) {
            sleep(wait).await;
        }
        for number in numbers {
            producer.send(&worker::payload(number)[..])?;
        }
        producer.flush().await?;
    }
    Ok(producer.end().await?)
}

async fn consume(url: &str, work: &Work) -> Result<()> {
    let mut effects = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    let mut options = RedisConsumerOptions::new(ConsumerMode::LoadBalanced);
    options.set_auto_stream_reset(AutoStreamReset::Earliest);
    options.set_auto_commit(AutoCommit::Disabled);
    options.set_batch_size(work.batch);
    options.set_auto_claim_interval(Some(work.patience()));
    options.set_auto_claim_idle(work.patience());
    let streamer = connect(url).await?;
    let mut consumer = streamer.create_consumer(&[StreamKey::new(STREAM)?], options).await?;
    loop {
        let mut batch = vec![consumer.next().await?];
        while batch.len() < work.batch {
            // Takes what has arrived.
            let Ok(next) = timeout(std::time::Duration::ZERO, consumer.next()).await else {
                break;
            };
            batch.push(next?);
        }
        let mut count = redis::pipe();
        for message in &batch {
            let number = worker::number(message.message().as_bytes());
            count.hincr(EFFECTS, number, 1).ignore();
            if !work.pause().is_zero() {
                sleep(work.pause()).await;
            }
        }
        count.query_async::<()>(&mut effects).await?;
        for message in &batch {
            consumer.ack(message)?;
        }
        consumer.commit()?.await?;
    }
}
