//! durare on PostgreSQL: a workflow per record, whose only step is a transaction that commits with
//! its checkpoint.

use std::{
    error::Error,
    future::pending,
    sync::{Arc, OnceLock},
    time::Duration,
};

use durare::{Client, DurableContext, DurableEngine, PostgresProvider, Tx, WorkflowOptions, WorkflowQueue, params};
use tokio::time::sleep;
use worker::{Program, Sending, Task, Work};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const QUEUE: &str = "peers";

static WORK: OnceLock<Work> = OnceLock::new();

#[durare::transaction]
async fn count(ctx: &DurableContext, tx: &mut Tx<'_>, number: i64) -> durare::Result<()> {
    let count = "INSERT INTO public.effects (number, times) VALUES (?, 1)
         ON CONFLICT (number) DO UPDATE SET times = effects.times + 1";
    tx.execute(count, &params![number]).await?;
    if let Some(work) = WORK.get()
        && !work.pause().is_zero()
    {
        sleep(work.pause()).await;
    }
    Ok(())
}

#[durare::workflow]
async fn handle(ctx: DurableContext, payload: String) -> durare::Result<()> {
    count(&ctx, worker::number(payload.as_bytes()) as i64).await
}

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    let provider = Arc::new(PostgresProvider::connect(&program.bus).await?);
    match &program.task {
        Task::Prepare => {
            DurableEngine::new(provider).await?;
            Ok(())
        }
        Task::Send(sending) => send_all(provider, *sending).await,
        Task::Work(work) => consume(provider, work).await,
    }
}

async fn send_all(provider: Arc<PostgresProvider>, sending: Sending) -> Result<()> {
    let client = Client::new(provider);
    let schedule = sending.start();
    for number in 0..sending.records {
        if let Some(wait) = schedule.wait(number) {
            sleep(wait).await;
        }
        let payload = String::from_utf8(worker::payload(number).to_vec())?;
        let options = WorkflowOptions::with_id(number.to_string());
        client.enqueue::<_, ()>(QUEUE, "handle", payload, options).await?;
    }
    Ok(())
}

async fn consume(provider: Arc<PostgresProvider>, work: &Work) -> Result<()> {
    WORK.set(work.clone()).map_err(|_| "the work is set once")?;
    let queue = WorkflowQueue::new(QUEUE)
        .worker_concurrency(work.batch)
        .base_polling_interval(Duration::from_millis(20));
    let mut engine = DurableEngine::builder(provider);
    engine
        .executor_id(&work.instance)
        .app_version("1")
        .recover_on_launch(true)
        .register_queue(queue);
    let engine = engine.build().await?;
    engine.launch().await?;
    pending().await
}
