//! RustStream on Redis Streams: a batch's writes and acknowledgements in one MULTI. Each instance
//! also claims what others have left for long, as the crate's documentation says.

use std::{
    error::Error,
    num::NonZeroUsize,
    sync::{LazyLock, OnceLock},
    time::Duration,
};

use fred::interfaces::StreamsInterface;
use futures_util::future::try_join_all;
use ruststream::{Broker, OutgoingMessage, Publisher};
use ruststream_fred::prelude::*;
use tokio::time::sleep;
use worker::{EFFECTS, Program, Sending, Task, Work};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const STREAM: &str = "{peers}:log";
const GROUP: &str = "peers";

static WORK: OnceLock<Work> = OnceLock::new();
static PATIENCE: LazyLock<Duration> = LazyLock::new(|| WORK.get().map_or(Duration::ZERO, Work::patience));

#[derive(Deserialized)]
struct Frame<'a>(&'a [u8]);

#[subscriber(RedisStream::new(STREAM).group(GROUP).start_id(StreamStart::Beginning))]
async fn new(frames: &[Frame<'_>], context: &mut Context<'_, PipelineContext>) -> HandlerOutcome {
    let pipeline = context.context(keys::Pipeline).clone();
    for frame in frames {
        let number = worker::number(frame.0).to_string();
        if pipeline.hincrby(EFFECTS, number, 1).await.is_err() {
            return HandlerOutcome::retry();
        }
        pause().await;
    }
    HandlerOutcome::ack()
}

#[subscriber(RedisStream::reclaim(STREAM, *PATIENCE).group(GROUP).block(Duration::from_millis(50)))]
async fn left_over(frame: &Frame<'_>, Ctx(pipeline): Ctx<keys::Pipeline>) -> HandlerOutcome {
    let number = worker::number(frame.0).to_string();
    if pipeline.hincrby(EFFECTS, number, 1).await.is_err() {
        return HandlerOutcome::retry();
    }
    pause().await;
    HandlerOutcome::ack()
}

async fn pause() {
    let pause = WORK.get().map_or(Duration::ZERO, Work::pause);
    if !pause.is_zero() {
        sleep(pause).await;
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    match &program.task {
        Task::Prepare => {
            let broker = RedisBroker::standalone(&program.bus).connect().await?;
            let pool = broker.pool_handle()?;
            Ok(pool.xgroup_create::<(), _, _, _>(STREAM, GROUP, "0", true).await?)
        }
        Task::Send(sending) => send_all(&program.bus, *sending).await,
        Task::Work(work) => {
            let batch = NonZeroUsize::new(work.batch).ok_or("a batch of no records")?;
            WORK.set(work.clone()).map_err(|_| "the work is set once")?;
            let broker = RedisBroker::standalone(&program.bus);
            let app = RustStream::new(AppInfo::new("peers", "0.1.0")).with_broker(broker, move |scope| {
                scope.include(new.batch(batch).pipeline().atomic());
                scope.include(left_over.pipeline().atomic());
            });
            Ok(app.run().await?)
        }
    }
}

async fn send_all(url: &str, sending: Sending) -> Result<()> {
    let broker = RedisBroker::standalone(url).connect().await?;
    let publisher = broker.publisher();
    let publish = async |number| {
        let payload = worker::payload(number);
        let sent = publisher.publish(OutgoingMessage::new(STREAM, &payload), None).await;
        sent.map(drop).map_err(|error| error.to_string())
    };
    let schedule = sending.start();
    for numbers in schedule.batches(1_000) {
        if let Some(wait) = schedule.wait(numbers.start) {
            sleep(wait).await;
        }
        try_join_all(numbers.map(publish)).await?;
    }
    Ok(())
}
