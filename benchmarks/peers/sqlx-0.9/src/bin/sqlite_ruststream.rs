//! RustStream's inbox on SQLite: a record's write and its removal in one transaction, fenced by a
//! lease on the row.

use std::{error::Error, sync::OnceLock};

use ruststream::{OutgoingMessage, Publisher};
use ruststream_sqlx::{SqlxBrokerError, prelude::*};
use sqlx::{Sqlite, SqliteConnection, SqlitePool};
use tokio::time::sleep;
use worker::{COUNT, Program, Sending, Task, Work};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

static WORK: OnceLock<Work> = OnceLock::new();

#[derive(Inbox, sqlx::FromRow)]
#[inbox(table = "jobs")]
struct Job {
    #[field(id, generated)]
    id: i64,
    #[field(locked_until)]
    locked_until: Option<chrono::DateTime<chrono::Utc>>,
    #[field(payload)]
    payload: Vec<u8>,
}

impl Publish<Sqlite> for Job {
    async fn publish(connection: &mut SqliteConnection, message: &OutgoingMessage<'_>) -> Result<(), sqlx::Error> {
        let insert = sqlx::query("INSERT INTO jobs (payload) VALUES (?)").bind(message.payload());
        insert.execute(connection).await.map(drop)
    }
}

#[derive(Deserialized)]
struct Frame<'a>(&'a [u8]);

#[subscriber(InboxQueue::<Job>::new("jobs"))]
async fn count(frame: &Frame<'_>, Ctx(mut tx): Ctx<keys::Tx<Sqlite>>) -> HandlerOutcome {
    let connection: &mut SqliteConnection = &mut tx;
    let counting = sqlx::query(COUNT).bind(worker::number(frame.0) as i64);
    if counting.execute(connection).await.is_err() {
        return HandlerOutcome::retry();
    }
    if let Some(work) = WORK.get()
        && !work.pause().is_zero()
    {
        sleep(work.pause()).await;
    }
    HandlerOutcome::ack()
}

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    let pool = peers_sqlx_0_9::open(&program.bus).await?;
    match &program.task {
        Task::Prepare => {
            let table = "CREATE TABLE jobs (id INTEGER PRIMARY KEY, locked_until TEXT, payload BLOB NOT NULL)";
            sqlx::raw_sql(table).execute(&pool).await?;
            Ok(())
        }
        Task::Send(sending) if sending.per_second.is_some() => send_paced(pool, *sending).await,
        Task::Send(sending) => {
            sending.start();
            let mut tx = pool.begin().await?;
            for number in 0..sending.records {
                let payload = worker::payload(number).to_vec();
                let insert = sqlx::query("INSERT INTO jobs (payload) VALUES (?)").bind(payload);
                insert.execute(&mut *tx).await?;
            }
            Ok(tx.commit().await?)
        }
        Task::Work(work) => {
            WORK.set(work.clone()).map_err(|_| "the work is set once")?;
            let broker = SqlxBroker::new(pool).lease(work.patience());
            let app = RustStream::new(AppInfo::new("peers", "0.1.0")).with_broker(broker, |scope| {
                scope.include(count.transactional());
            });
            Ok(app.run().await?)
        }
    }
}

/// Sends through the library's publisher, which commits each record.
async fn send_paced(pool: SqlitePool, sending: Sending) -> Result<()> {
    let app = RustStream::new(AppInfo::new("peers", "0.1.0")).with_broker(SqlxBroker::new(pool), move |scope| {
        scope.after_startup(Repository::<Job>::default(), async move |publisher| {
            let schedule = sending.start();
            for number in 0..sending.records {
                if let Some(wait) = schedule.wait(number) {
                    sleep(wait).await;
                }
                let payload = worker::payload(number);
                publisher.publish(OutgoingMessage::new("jobs", &payload), None).await?;
            }
            Ok::<_, SqlxBrokerError>(())
        });
    });
    app.start().await?.shutdown().await?;
    Ok(())
}
