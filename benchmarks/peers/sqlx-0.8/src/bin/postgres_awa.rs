//! awa on PostgreSQL: a handler counts one record, then the library completes its job.

use std::{error::Error, future::pending};

use awa::{Client, InsertOpts, JobArgs, JobResult, QueueConfig};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use tokio::time::sleep;
use worker::{COUNT, Program, Sending, Task, Work};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const QUEUE: &str = "peers";

#[derive(Serialize, Deserialize, JobArgs)]
struct Sent {
    payload: String,
}

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    let pool = PgPool::connect(&program.bus).await?;
    match &program.task {
        Task::Prepare => Ok(awa::migrations::run(&pool).await?),
        Task::Send(sending) => send_all(&pool, *sending).await,
        Task::Work(work) => consume(pool, work).await,
    }
}

fn options() -> InsertOpts {
    InsertOpts {
        queue: QUEUE.into(),
        ..InsertOpts::default()
    }
}

async fn send_all(pool: &PgPool, sending: Sending) -> Result<()> {
    let schedule = sending.start();
    for numbers in schedule.batches(1_000) {
        if let Some(wait) = schedule.wait(numbers.start) {
            sleep(wait).await;
        }
        let mut jobs = Vec::new();
        for number in numbers {
            let payload = String::from_utf8(worker::payload(number).to_vec())?;
            jobs.push(awa::model::insert::params_with(&Sent { payload }, options())?);
        }
        awa::insert_many_copy_from_pool(pool, &jobs).await?;
    }
    Ok(())
}

async fn consume(pool: PgPool, work: &Work) -> Result<()> {
    let queue = QueueConfig {
        max_workers: work.batch as u32,
        poll_interval: std::time::Duration::from_millis(20),
        ..QueueConfig::default()
    };
    let (effects, pause) = (pool.clone(), work.pause());
    let client = Client::builder(pool)
        .queue(QUEUE, queue)
        .heartbeat_interval(work.patience() / 4)
        .heartbeat_rescue_interval(work.patience() / 4)
        .heartbeat_staleness(work.patience())
        .leader_election_interval(work.patience())
        .register::<Sent, _, _>(move |sent, _| {
            let effects = effects.clone();
            async move {
                let count = sqlx::query(COUNT).bind(worker::number(sent.payload.as_bytes()) as i64);
                count.execute(&effects).await.map_err(awa::JobError::retryable)?;
                if !pause.is_zero() {
                    sleep(pause).await;
                }
                Ok(JobResult::Completed)
            }
        })
        .build()?;
    client.start().await?;
    pending().await
}
