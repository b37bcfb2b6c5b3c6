//! pgmq: counts a batch and deletes its messages in one transaction, which is rolled back if
//! another instance has deleted one of them in the meantime.

use std::{error::Error, time::Duration};

use pgmq::PGMQueueExt;
use sqlx::PgPool;
use tokio::time::sleep;
use worker::{Program, Sending, Task, Work};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const QUEUE: &str = "peers";

const COUNT_ALL: &str = "INSERT INTO effects (number, times) SELECT number, 1 FROM unnest($1::bigint[]) AS number
     ON CONFLICT (number) DO UPDATE SET times = effects.times + 1";

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    let pool = PgPool::connect(&program.bus).await?;
    let queue = PGMQueueExt::new_with_pool(pool.clone()).await;
    match &program.task {
        Task::Prepare => {
            queue.install_sql_from_embedded().await?;
            queue.create(QUEUE).await?;
            Ok(())
        }
        Task::Send(sending) => send_all(&queue, *sending).await,
        Task::Work(work) => consume(&queue, &pool, work).await,
    }
}

async fn send_all(queue: &PGMQueueExt, sending: Sending) -> Result<()> {
    let payload = |number| String::from_utf8(worker::payload(number).to_vec());
    let schedule = sending.start();
    for numbers in schedule.batches(1_000) {
        if let Some(wait) = schedule.wait(numbers.start) {
            sleep(wait).await;
        }
        let payloads: Vec<String> = numbers.map(payload).collect::<Result<_, _>>()?;
        queue.send_batch(QUEUE, &payloads).await?;
    }
    Ok(())
}

async fn consume(queue: &PGMQueueExt, pool: &PgPool, work: &Work) -> Result<()> {
    // Messages are hidden for whole seconds.
    let hidden = work.patience().as_secs().max(1) as i32;
    loop {
        let batch = queue.read_batch::<String>(QUEUE, hidden, work.batch as i32).await?;
        if batch.is_empty() {
            sleep(Duration::from_millis(5)).await;
            continue;
        }
        let ids: Vec<i64> = batch.iter().map(|message| message.msg_id).collect();
        let mut numbers = Vec::with_capacity(batch.len());
        for message in &batch {
            numbers.push(worker::number(message.message.as_bytes()) as i64);
            if !work.pause().is_zero() {
                sleep(work.pause()).await;
            }
        }
        let mut tx = pool.begin().await?;
        sqlx::query(COUNT_ALL).bind(&numbers).execute(&mut *tx).await?;
        let deleted = queue.delete_batch_with_cxn(QUEUE, &ids, &mut *tx).await?;
        if deleted == ids.len() {
            tx.commit().await?;
        } else {
            let others = ids.len() - deleted;
            eprintln!("another instance has deleted {others} of {} messages", ids.len());
        }
    }
}
