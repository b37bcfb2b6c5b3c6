//! eventcore on PostgreSQL: an event and its checkpoint in one transaction, by the projector that
//! holds an advisory lock.

use std::{error::Error, future::Future, sync::OnceLock, time::Duration};

use eventcore::{
    Event, StreamId,
    postgres::{PostgresEventStore, projections::*},
};
use eventcore_types::{BatchSize, EventStore, StreamVersion, StreamWrites};
use serde::{Deserialize, Serialize};
use sqlx::{PgPool, Postgres, Transaction};
use tokio::time::sleep;
use worker::{COUNT, Program, Sending, Task, Work};

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

static WORK: OnceLock<Work> = OnceLock::new();

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Sent {
    stream: StreamId,
    payload: String,
}

impl Event for Sent {
    fn stream_id(&self) -> &StreamId {
        &self.stream
    }

    fn event_type_name() -> &'static str {
        "sent"
    }
}

struct Count(ProjectorName);

impl PostgresProjector for Count {
    type Event = Sent;
    type Error = sqlx::Error;
    type AfterCommit = NoopAfterCommit;

    fn name(&self) -> &ProjectorName {
        &self.0
    }

    fn apply<'a, 'c>(
        &'a mut self,
        event: &'a Sent,
        _: DeliveryPosition,
        tx: &'a mut Transaction<'c, Postgres>,
    ) -> impl Future<Output = Result<NoopAfterCommit, sqlx::Error>> + Send + 'a
    where
        'c: 'a,
    {
        async move {
            let count = sqlx::query(COUNT).bind(worker::number(event.payload.as_bytes()) as i64);
            count.execute(&mut **tx).await?;
            if let Some(work) = WORK.get()
                && !work.pause().is_zero()
            {
                sleep(work.pause()).await;
            }
            Ok(NoopAfterCommit)
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    let pool = PgPool::connect(&program.bus).await?;
    match &program.task {
        Task::Prepare => {
            PostgresEventStore::from_pool(pool.clone()).migrate().await;
            source(&pool)?.migrate().await?;
            PostgresProjectionStore::from_pool(pool).migrate().await?;
            Ok(())
        }
        Task::Send(sending) => send_all(pool, *sending).await,
        Task::Work(work) => consume(pool, work).await,
    }
}

fn source(pool: &PgPool) -> Result<PostgresProjectionSource> {
    let id = DeliverySourceId::try_new("peers")?;
    Ok(PostgresProjectionSource::from_pool(pool.clone(), id))
}

async fn send_all(pool: PgPool, sending: Sending) -> Result<()> {
    let (events, stream) = (PostgresEventStore::from_pool(pool), StreamId::try_new("peers")?);
    let schedule = sending.start();
    for numbers in schedule.batches(500) {
        if let Some(wait) = schedule.wait(numbers.start) {
            sleep(wait).await;
        }
        let version = StreamVersion::new(numbers.start as usize);
        let mut writes = StreamWrites::new().register_stream(stream.clone(), version)?;
        for number in numbers {
            writes = writes.append(Sent {
                stream: stream.clone(),
                payload: String::from_utf8(worker::payload(number).to_vec())?,
            })?;
        }
        events.append_events(writes).await?;
    }
    Ok(())
}

/// A projection ends when it has caught up, so it is run again and again.
async fn consume(pool: PgPool, work: &Work) -> Result<()> {
    WORK.set(work.clone()).map_err(|_| "the work is set once")?;
    let (source, store) = (source(&pool)?, PostgresProjectionStore::from_pool(pool));
    loop {
        let selection = ProjectionSelection::try_new(
            ProjectionSelectionId::try_new("all")?,
            ProjectionStreamFilter::All,
            vec![EventTypeName::try_new("sent")?],
        )?;
        let config = PostgresProjectionConfig::new(selection).with_batch_size(BatchSize::new(work.batch))?;
        let count = Count(ProjectorName::try_new("count")?);
        // Another instance may hold the lock.
        if let Err(error) = run_transactional_projection(count, &source, &store, config).await {
            eprintln!("{error}");
            sleep(Duration::from_millis(50)).await;
        }
        sleep(Duration::from_millis(5)).await;
    }
}
