//! What a record costs while log, producers or consumers grow: the same records at each size, in
//! turn, on a file or server per size.

use std::{sync::Arc, time::Instant};

use clap::{Args, ValueEnum};
use essentially_once::{
    Consumer, ConsumerId, Epoch, Handler, HandlerError, KeyValue, Log, NewRecord, Offset, Origin, ProducerId, Record,
    StartAt, async_trait,
};
use essentially_once_postgres::Pg;
use essentially_once_redis::Redis;
use essentially_once_sqlite::Sqlite;
use tempfile::TempDir;

use crate::{
    PAYLOAD, Result,
    backends::{Backend, Host, Inside, Kind, Writes, fill, tail},
    median,
    postgres::runtime,
    spread,
};

/// Records that each of the other consumers has handled, and entries of its state.
const HANDLED_BY_OTHERS: u64 = 100;

/// Records per append, if they have producers.
const APPEND: usize = 10_000;

#[derive(Args)]
pub(crate) struct GrowthArguments {
    /// What grows.
    what: What,
    /// What holds log and store.
    #[arg(default_value = "sqlite")]
    backend: Kind,
    /// The sizes to compare.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..))]
    sizes: Option<Vec<u64>>,
    /// How many records are consumed at each size.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    records: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// The log holds this many records before those that are consumed.
    Records,
    /// This many producers have sent the records that are consumed, in turn.
    Producers,
    /// This many consumers have a position and state in the store.
    Consumers,
}

impl What {
    fn sizes(self) -> &'static [u64] {
        match self {
            Self::Records => &[10_000, 100_000, 1_000_000, 10_000_000],
            Self::Producers => &[1, 10, 100, 1_000, 10_000],
            Self::Consumers => &[1, 10, 100, 1_000],
        }
    }

    fn grows(self) -> &'static str {
        match self {
            Self::Records => "records before",
            Self::Producers => "producers",
            Self::Consumers => "consumers",
        }
    }
}

pub(crate) fn measure(arguments: &GrowthArguments, rounds: u32, folder: &TempDir) -> Result<()> {
    runtime()?.block_on(async {
        match arguments.backend {
            Kind::Sqlite => compare::<Sqlite>(arguments, rounds, folder).await,
            Kind::Redis => compare::<Redis>(arguments, rounds, folder).await,
            Kind::Postgres => compare::<Pg>(arguments, rounds, folder).await,
        }
    })
}

async fn compare<B: Backend>(arguments: &GrowthArguments, rounds: u32, folder: &TempDir) -> Result<()> {
    let sizes = arguments.sizes.as_deref().unwrap_or(arguments.what.sizes());
    let mut grown = Vec::new();
    for size in sizes {
        grown.push(Grown::<B>::fill(arguments, *size, folder).await?);
    }
    let mut rates = vec![Vec::new(); sizes.len()];
    for round in 0..rounds as usize {
        // Another size comes first in each round.
        for index in (0..sizes.len()).map(|index| (index + round) % sizes.len()) {
            rates[index].push(grown[index].consume(round, arguments.records).await?);
        }
    }
    println!(
        "{rounds} rounds of {} records; the ratio is to the first row, round by round",
        arguments.records
    );
    println!(
        "| {} | records/s, median | ratio, median | min | max |",
        arguments.what.grows()
    );
    println!("|---:|---:|---:|---:|---:|");
    for (size, rates_here) in sizes.iter().zip(&rates) {
        let ratios = rates_here.iter().zip(&rates[0]).map(|(here, first)| here / first);
        let (ratio, min, max) = spread(&mut ratios.collect::<Vec<_>>());
        let rate = median(&mut rates_here.clone());
        println!("| {size} | {rate:.0} | {ratio:.2} | {min:.2} | {max:.2} |");
    }
    Ok(())
}

/// A host of one size.
struct Grown<B> {
    backend: B,
    log: Arc<dyn Log>,
    /// Where the records that are consumed begin.
    from: Offset,
    _host: Host,
}

impl<B: Backend> Grown<B> {
    async fn fill(arguments: &GrowthArguments, size: u64, folder: &TempDir) -> Result<Self> {
        let GrowthArguments { what, records, .. } = *arguments;
        let host = Host::start(arguments.backend, folder, &format!("{size}.db"))?;
        let address = host.address();
        let mut client = B::connect(&address).await?;
        let backend = B::open(&address).await?;
        let log = backend.log("bench").await?;
        match what {
            What::Records => fill(&*log, size + records).await?,
            What::Producers => fill_in_turn(&*log, size, records).await?,
            What::Consumers => {
                fill(&*log, records).await?;
                for other in 1..size {
                    let id = ConsumerId::new(format!("other-{other}"))?;
                    let from = StartAt::Offset(tail(&*log, HANDLED_BY_OTHERS.min(records)).await?);
                    let others = Consumer::essentially_once(id, log.clone(), backend.store(), Keep::default());
                    others.start_at(from).run_until_caught_up().await?;
                }
            }
        }
        B::settle(&mut client).await?;
        Ok(Self {
            from: tail(&*log, records).await?,
            backend,
            log,
            _host: host,
        })
    }

    /// Consumes the records once more, and returns how many per second.
    async fn consume(&self, round: usize, records: u64) -> Result<f64> {
        let id = ConsumerId::new(format!("round-{round}"))?;
        let (store, count) = (self.backend.store(), Inside::<B>::new(Writes::Batch));
        let started = Instant::now();
        let consumer = Consumer::essentially_once(id, self.log.clone(), store, count);
        let consumer = consumer.start_at(StartAt::Offset(self.from));
        let report = tokio::spawn(consumer.run_until_caught_up()).await??;
        let time = started.elapsed();
        match report.handled == records {
            true => Ok(records as f64 / time.as_secs_f64()),
            false => Err(format!("not all of {records} records were handled: {report}").into()),
        }
    }
}

/// Appends records that this many producers have sent in turn.
async fn fill_in_turn(log: &dyn Log, producers: u64, records: u64) -> Result<()> {
    let names = (0..producers).map(|producer| ProducerId::new(format!("producer-{producer}")));
    let names = names.collect::<Result<Vec<_>, _>>()?;
    let record = |number: u64| {
        let producer = names[(number % producers) as usize].clone();
        NewRecord::new(PAYLOAD.as_slice()).origin(Origin::new(producer, Epoch::STABLE, number / producers))
    };
    let records: Vec<NewRecord> = (0..records).map(record).collect();
    for chunk in records.chunks(APPEND) {
        log.append(chunk).await?;
    }
    Ok(())
}

/// Keeps an entry of state per record.
#[derive(Default)]
struct Keep {
    kept: u64,
}

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Keep {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let key = self.kept.to_string();
        self.kept += 1;
        Ok(tx.put(key.as_bytes(), &record.payload).await?)
    }

    async fn reset(&mut self) {
        self.kept = 0;
    }
}
