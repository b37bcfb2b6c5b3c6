//! apalis on SQLite: counts a record, then marks its job as done. Without the library's own
//! `PRAGMA synchronous = OFF`, which may lose acknowledged jobs when the machine stops.

use std::{error::Error, process, time::Duration};

use apalis::prelude::*;
use apalis_sqlite::{Config, SqliteStorage};
use futures_util::StreamExt;
use sqlx::SqlitePool;
use tokio::time::sleep;
use worker::{COUNT, Program, Sending, Work};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

async fn count(payload: String, pool: Data<SqlitePool>, work: Data<Work>) -> Result<(), BoxDynError> {
    let count = sqlx::query(COUNT).bind(worker::number(payload.as_bytes()) as i64);
    count.execute(&*pool).await?;
    if !work.pause().is_zero() {
        sleep(work.pause()).await;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    let pool = peers_sqlx_0_9::open(&program.bus).await?;
    match &program.task {
        worker::Task::Prepare => Ok(SqliteStorage::migrations().run(&pool).await?),
        worker::Task::Send(sending) => send_all(&pool, *sending).await,
        worker::Task::Work(work) => {
            // The library counts in whole seconds.
            let config = Config::default()
                .queue("peers")
                .batch_size(work.batch)
                .heartbeat_interval(work.patience().max(Duration::from_secs(1)))
                .missed_heartbeats(1);
            // A name cannot be used again while its last holder may be alive.
            let name = format!("{}-{}", work.instance, process::id());
            let worker = WorkerBuilder::new(name)
                .backend(SqliteStorage::<String>::new(&pool).with_config(config))
                .data(pool.clone())
                .data(work.clone())
                .build(count);
            worker.run().await.map_err(|error| error.to_string().into())
        }
    }
}

async fn send_all(pool: &SqlitePool, sending: Sending) -> Result<()> {
    let mut storage: SqliteStorage<String> = SqliteStorage::new(pool).with_config(Config::default().queue("peers"));
    let payload = |number| String::from_utf8(worker::payload(number).to_vec());
    let schedule = sending.start();
    for numbers in schedule.batches(1_000) {
        if let Some(wait) = schedule.wait(numbers.start) {
            sleep(wait).await;
        }
        let payloads: Vec<String> = numbers.map(payload).collect::<Result<_, _>>()?;
        let tasks = payloads.into_iter().map(|payload| TaskBuilder::new(payload).build());
        let mut tasks = futures_util::stream::iter(tasks).boxed();
        let pushed = storage.push_all(&mut tasks).await;
        pushed.map_err(|error| error.to_string())?;
    }
    Ok(())
}
