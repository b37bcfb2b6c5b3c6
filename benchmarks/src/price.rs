//! What a promise costs: the same records, counted essentially once, at least once and at most
//! once. Essentially-once counts in the transaction of the position, the others outside of it.

use std::{
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use essentially_once::{
    Consumer, ConsumerId, Handler, HandlerError, Log, OffsetStore, Record, StartAt, async_trait, consumer::Delivery,
};
use essentially_once_postgres::Pg;
use essentially_once_redis::{Redis, redis::aio::MultiplexedConnection};
use essentially_once_sqlite::{Sqlite, rusqlite::Connection};
use tempfile::TempDir;

use crate::{
    Result,
    backends::{Backend, COUNT, Host, Inside, Kind, Writes, fill, increment, tail},
    median,
    postgres::runtime,
    spread,
};

#[derive(Clone, Copy, Args)]
pub(crate) struct PriceArguments {
    /// What holds log, store and counter.
    backend: Kind,
    /// When the handler counts.
    #[arg(long, default_value = "record")]
    writes: Writes,
}

#[derive(Clone, Copy)]
enum Promise {
    AtMost,
    AtLeast,
    Essentially,
}

const PROMISES: [Promise; 3] = [Promise::AtMost, Promise::AtLeast, Promise::Essentially];

impl Promise {
    /// Chosen so that a round takes about a second.
    fn records(self, writes: Writes, batch: usize) -> u64 {
        match (self, writes, batch) {
            (_, _, 1) => 2_000,
            // Each record waits for the disk.
            (Self::AtMost | Self::AtLeast, Writes::Record, _) => 2_000,
            (_, _, 10) => 10_000,
            _ => 40_000,
        }
        .max(batch as u64)
    }
}

pub(crate) fn measure(arguments: PriceArguments, rounds: u32, batches: &[usize], folder: &TempDir) -> Result<()> {
    runtime()?.block_on(async {
        match arguments.backend {
            Kind::Sqlite => compare::<Sqlite>(arguments, rounds, batches, folder).await,
            Kind::Redis => compare::<Redis>(arguments, rounds, batches, folder).await,
            Kind::Postgres => compare::<Pg>(arguments, rounds, batches, folder).await,
        }
    })
}

async fn compare<B: Outside>(
    PriceArguments { backend, writes }: PriceArguments,
    rounds: u32,
    batches: &[usize],
    folder: &TempDir,
) -> Result<()> {
    let host = Host::start(backend, folder, "price.db")?;
    let consuming = Consuming::<B>::fill(&host, writes, batches).await?;
    println!("{rounds} rounds; records/s are medians, and the ratios are to at-least-once, round by round");
    println!(
        "| records per commit | at most once, records/s | at least once | essentially once | at most once, ratio | min \
         | max | essentially once, ratio | min | max |"
    );
    println!("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    for batch in batches {
        let mut rates = PROMISES.map(|_| Vec::new());
        for round in 0..rounds as usize {
            // Another one comes first in each round.
            for index in (0..PROMISES.len()).map(|index| (index + round) % PROMISES.len()) {
                let name = format!("{batch}-{round}-{index}");
                rates[index].push(consuming.rate(PROMISES[index], *batch, &name).await?);
            }
        }
        let [most, least, essentially] = &mut rates;
        let ratio = |rates: &[f64]| {
            let mut ratios: Vec<f64> = rates.iter().zip(&*least).map(|(rate, least)| rate / least).collect();
            let (ratio, min, max) = spread(&mut ratios);
            format!("{ratio:.2} | {min:.2} | {max:.2}")
        };
        let ratios = [ratio(most), ratio(essentially)].join(" | ");
        let [most, least, essentially] = [most, least, essentially].map(|rates| median(rates));
        println!("| {batch} | {most:.0} | {least:.0} | {essentially:.0} | {ratios} |");
    }
    Ok(())
}

/// One log that is consumed again and again.
struct Consuming<B> {
    address: String,
    backend: B,
    log: Arc<dyn Log>,
    writes: Writes,
}

impl<B: Outside> Consuming<B> {
    async fn fill(host: &Host, writes: Writes, batches: &[usize]) -> Result<Self> {
        let address = host.address();
        let mut client = B::connect(&address).await?;
        let backend = B::open(&address).await?;
        let log = backend.log("bench").await?;
        let counts = batches
            .iter()
            .flat_map(|batch| PROMISES.map(|promise| promise.records(writes, *batch)));
        fill(&*log, counts.max().unwrap_or_default()).await?;
        B::settle(&mut client).await?;
        Ok(Self {
            address,
            backend,
            log,
            writes,
        })
    }

    /// Consumes the last records of the log, and returns how many per second.
    async fn rate(&self, promise: Promise, batch: usize, name: &str) -> Result<f64> {
        let Self { log, writes, .. } = self;
        let records = promise.records(*writes, batch);
        let from = StartAt::Offset(tail(&**log, records).await?);
        let mut judge = B::connect(&self.address).await?;
        let before = B::counted(&mut judge).await?;
        let (id, log, store) = (ConsumerId::new(name)?, log.clone(), self.backend.store());
        let outside = CountOutside::<B> {
            client: B::connect(&self.address).await?,
            writes: *writes,
            gathered: 0,
        };
        let time = match promise {
            Promise::AtMost => time(Consumer::at_most_once(id, log, store, outside), from, batch).await?,
            Promise::AtLeast => time(Consumer::at_least_once(id, log, store, outside), from, batch).await?,
            Promise::Essentially => {
                let count = Inside::<B>::new(*writes);
                time(Consumer::essentially_once(id, log, store, count), from, batch).await?
            }
        };
        match B::counted(&mut judge).await? - before {
            counted if counted == records => Ok(records as f64 / time.as_secs_f64()),
            counted => Err(format!("counted {counted} of {records} records: the measurement is invalid").into()),
        }
    }
}

async fn time<S: OffsetStore, H: Handler<D::Tx> + 'static, D: Delivery<S>>(
    consumer: Consumer<S, H, D>,
    from: StartAt,
    batch: usize,
) -> Result<Duration> {
    let started = Instant::now();
    // Slow statements would make batches smaller otherwise.
    let consumer = consumer.start_at(from).max_batch(batch).batch_time_limit(Duration::MAX);
    tokio::spawn(consumer.run_until_caught_up()).await??;
    Ok(started.elapsed())
}

/// A backend on which a handler counts without the library.
#[async_trait]
trait Outside: Backend {
    async fn add_outside(client: &mut Self::Client, count: u64) -> Result<(), HandlerError>;

    async fn counted(client: &mut Self::Client) -> Result<u64>;
}

#[async_trait]
impl Outside for Sqlite {
    async fn add_outside(connection: &mut Connection, count: u64) -> Result<(), HandlerError> {
        connection.prepare_cached(COUNT)?.execute([count as i64])?;
        Ok(())
    }

    async fn counted(connection: &mut Connection) -> Result<u64> {
        let counted: i64 = connection.query_row("SELECT n FROM counter", [], |row| row.get(0))?;
        Ok(counted as u64)
    }
}

#[async_trait]
impl Outside for Redis {
    async fn add_outside(connection: &mut MultiplexedConnection, count: u64) -> Result<(), HandlerError> {
        Ok(increment(count).exec_async(connection).await?)
    }

    async fn counted(connection: &mut MultiplexedConnection) -> Result<u64> {
        Ok(increment(0).query_async(connection).await?)
    }
}

#[async_trait]
impl Outside for Pg {
    async fn add_outside((client, add): &mut Self::Client, count: u64) -> Result<(), HandlerError> {
        client.execute(&*add, &[&(count as i64)]).await?;
        Ok(())
    }

    async fn counted((client, _): &mut Self::Client) -> Result<u64> {
        let row = client.query_one("SELECT n FROM counter", &[]).await?;
        Ok(row.get::<_, i64>(0) as u64)
    }
}

/// Counts with statements of its own.
struct CountOutside<B: Backend> {
    client: B::Client,
    writes: Writes,
    gathered: u64,
}

#[async_trait]
impl<B: Outside> Handler<()> for CountOutside<B> {
    async fn handle(&mut self, _: &Record, (): &mut ()) -> Result<(), HandlerError> {
        match self.writes.now(&mut self.gathered) {
            0 => Ok(()),
            count => B::add_outside(&mut self.client, count).await,
        }
    }

    async fn flush(&mut self, (): &mut ()) -> Result<(), HandlerError> {
        match mem::take(&mut self.gathered) {
            0 => Ok(()),
            count => B::add_outside(&mut self.client, count).await,
        }
    }

    async fn reset(&mut self) {
        self.gathered = 0;
    }
}
