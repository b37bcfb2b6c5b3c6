//! This library, on each pair of a bus and a store.

use std::{collections::BTreeMap, error::Error, mem, sync::Arc, time::Duration};

use essentially_once::{Consumer, ConsumerId, Handler, HandlerError, Log, NewRecord, OffsetStore, Record, async_trait};
use essentially_once_kafka::Kafka;
use essentially_once_postgres::{Pg, PgTx};
use essentially_once_rabbitmq::Rabbit;
use essentially_once_redis::{Redis, RedisTx, redis::cmd};
use essentially_once_sqlite::{Sqlite, SqliteTx};
use tokio::time::sleep;
use worker::{COUNT, EFFECTS, Program, Sending, Task, Work};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Sums of a batch, so that PostgreSQL gets one statement for it.
const COUNT_ALL: &str = "INSERT INTO effects (number, times) SELECT * FROM unnest($1::bigint[], $2::bigint[])
     ON CONFLICT (number) DO UPDATE SET times = effects.times + excluded.times";

#[tokio::main]
async fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    match &program.task {
        Task::Prepare => open(&program.bus).await.map(drop),
        Task::Send(sending) => append(&*open(&program.bus).await?, *sending).await,
        Task::Work(work) => {
            let (log, store) = (open(&program.bus).await?, program.store());
            match scheme(store) {
                "redis" => consume(log, Redis::connect(store).await?.store(), work).await,
                "postgres" => consume(log, Pg::connect(store).await?.store(), work).await,
                _ => consume(log, Sqlite::open(store).await?.store(), work).await,
            }
        }
    }
}

async fn open(bus: &str) -> Result<Arc<dyn Log>> {
    const NAME: &str = "peers";
    Ok(match scheme(bus) {
        "redis" => Arc::new(Redis::connect(bus).await?.log(NAME).await?),
        "postgres" => Arc::new(Pg::connect(bus).await?.log(NAME).await?),
        "amqp" => Arc::new(Rabbit::connect(bus).await?.log(NAME).await?),
        "kafka" => Arc::new(Kafka::connect(bus).await?.log(NAME).await?),
        _ => Arc::new(Sqlite::open(bus).await?.log(NAME).await?),
    })
}

fn scheme(url: &str) -> &str {
    url.split_once("://").map_or("", |(scheme, _)| scheme)
}

async fn append(log: &dyn Log, sending: Sending) -> Result<()> {
    let schedule = sending.start();
    for numbers in schedule.batches(1_000) {
        if let Some(wait) = schedule.wait(numbers.start) {
            sleep(wait).await;
        }
        let records = numbers.map(|number| NewRecord::new(worker::payload(number).to_vec()));
        log.append(&records.collect::<Vec<_>>()).await?;
    }
    Ok(())
}

async fn consume<S>(log: Arc<dyn Log>, store: S, work: &Work) -> Result<()>
where
    S: OffsetStore,
    Count: Handler<S::Tx>,
{
    let count = Count {
        pause: work.pause(),
        gathered: BTreeMap::new(),
    };
    // The private Kafka broker does not sync, and says so.
    let consumer = Consumer::essentially_once(ConsumerId::new("peers")?, log, store, count).accept_volatile();
    let patience = if work.alone { Duration::ZERO } else { work.patience() };
    consumer.max_batch(work.batch).standby_after(patience).run().await?;
    Ok(())
}

/// Counts a record, and then works on for a while.
struct Count {
    pause: Duration,
    gathered: BTreeMap<i64, i64>,
}

impl Count {
    async fn pause(&self) {
        if !self.pause.is_zero() {
            sleep(self.pause).await;
        }
    }
}

#[async_trait]
impl Handler<SqliteTx> for Count {
    async fn handle(&mut self, record: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        tx.execute(COUNT, [worker::number(&record.payload) as i64])?;
        self.pause().await;
        Ok(())
    }
}

#[async_trait]
impl Handler<RedisTx> for Count {
    async fn handle(&mut self, record: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        let mut increment = cmd("HINCRBY");
        increment.arg(EFFECTS).arg(worker::number(&record.payload)).arg(1);
        tx.command(increment).await?;
        self.pause().await;
        Ok(())
    }
}

#[async_trait]
impl Handler<PgTx> for Count {
    async fn handle(&mut self, record: &Record, _: &mut PgTx) -> Result<(), HandlerError> {
        *self.gathered.entry(worker::number(&record.payload) as i64).or_default() += 1;
        self.pause().await;
        Ok(())
    }

    async fn flush(&mut self, tx: &mut PgTx) -> Result<(), HandlerError> {
        let (numbers, times): (Vec<i64>, Vec<i64>) = mem::take(&mut self.gathered).into_iter().unzip();
        if !numbers.is_empty() {
            tx.queue(COUNT_ALL, &[&numbers, &times]).await?;
        }
        Ok(())
    }

    async fn reset(&mut self) {
        self.gathered.clear();
    }
}
