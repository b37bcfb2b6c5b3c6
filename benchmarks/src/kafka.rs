//! Kafka on private brokers: appending, and consuming with counter and offset in one transaction
//! of SQLite or PostgreSQL. By hand with `rdkafka`, and through the library.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::ValueEnum;
use essentially_once::{Consumer, ConsumerId, Log, NewRecord};
use essentially_once_kafka::{
    Kafka, KafkaLog,
    rdkafka::{
        ClientConfig, Message as _, Offset, TopicPartitionList,
        consumer::{BaseConsumer, Consumer as _},
        producer::{FutureProducer, FutureRecord},
    },
};
use essentially_once_sqlite::{Sqlite, rusqlite::Connection};
use tempfile::TempDir;
use test_servers::{KafkaServer, PostgresServer};

use crate::{Contest, Result, Row, Rules, by_batch, postgres, sqlite};

/// Records per append before the consuming begins.
const FILL: usize = 10_000;

/// How long a loop by hand waits for one more record, before it commits what it has.
const PAUSE: Duration = Duration::from_millis(10);

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Appending by the idempotent producer, with `acks=all`.
    Append,
    /// Consuming into SQLite, with a counter update per record.
    Sqlite,
    /// Consuming into PostgreSQL, with one upsert per batch.
    Postgres,
}

/// Where the counters are. Each run has a broker of its own, because it rewrites all that it holds
/// again and again.
pub(crate) struct Brokers {
    part: Part,
    /// For SQLite's files.
    folder: TempDir,
    postgres: Option<PostgresServer>,
    counters: u64,
    runtime: tokio::runtime::Runtime,
}

impl Brokers {
    pub(crate) fn new(part: Part, counters: u64, folder: TempDir) -> Result<Self> {
        let postgres = (part == Part::Postgres).then(PostgresServer::start).transpose()?;
        Ok(Self {
            part,
            folder,
            postgres,
            counters,
            runtime: postgres::runtime()?,
        })
    }
}

impl Contest for Brokers {
    fn rows(&self, rules: &Rules<'_>) -> Vec<Row> {
        let part = self.part;
        by_batch(rules, |batch| match (part, batch) {
            (Part::Postgres, 1) => 1_000,
            (_, 1) => 4_000,
            (_, 10) => 20_000,
            (_, 100) => 80_000,
            _ => 200_000,
        })
    }

    fn by_hand(&self, name: &str, row: &Row) -> Result<Duration> {
        let broker = Broker(KafkaServer::start()?);
        self.runtime.block_on(async {
            match self.part {
                Part::Append => {
                    broker.log(name).await?;
                    append(&broker.config(), name, row).await
                }
                Part::Sqlite => {
                    broker.fill(name, row).await?;
                    into_sqlite(|| broker.reader(name), &self.file(name), row, self.counters)
                }
                Part::Postgres => {
                    broker.fill(name, row).await?;
                    let reader = || broker.reader(name);
                    into_postgres(reader, &self.postgres_url()?, name, row, self.counters).await
                }
            }
        })
    }

    fn ours(&self, name: &str, row: &Row) -> Result<Duration> {
        let broker = Broker(KafkaServer::start()?);
        self.runtime.block_on(async {
            if self.part == Part::Append {
                let log = broker.log(name).await?;
                let chunk = vec![NewRecord::new(row.payload); row.batch.size()];
                // Connects the producer.
                log.append(&chunk).await?;
                let started = Instant::now();
                for _ in 0..row.records / row.batch.size() as u64 {
                    log.append(&chunk).await?;
                }
                return Ok(started.elapsed());
            }
            let log = broker.fill(name, row).await?;
            // The loops by hand do not end their clients in the measured time either.
            let _kept = log.clone();
            match self.part {
                Part::Postgres => {
                    let (url, write) = (self.postgres_url()?, postgres::Write::Gather);
                    postgres::consume(&url, name, log, row, self.counters, write).await
                }
                _ => {
                    let path = self.file(name);
                    let counter = Connection::open(&path)?;
                    sqlite::create_counters(&counter, self.counters.min(row.records))?;
                    let store = Sqlite::open(path).await?.store();
                    let started = Instant::now();
                    let (id, count) = (
                        ConsumerId::new("bench")?,
                        sqlite::Count::new(self.counters, row.payload.len()),
                    );
                    let consumer = Consumer::essentially_once(id, log, store, count);
                    let consumer = row.batch.apply(consumer).accept_volatile();
                    tokio::spawn(consumer.run_until_caught_up()).await??;
                    let time = started.elapsed();
                    sqlite::check(&counter, row.records)?;
                    Ok(time)
                }
            }
        })
    }
}

impl Brokers {
    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn postgres_url(&self) -> Result<String> {
        Ok(self.postgres.as_ref().ok_or("started with this part")?.url())
    }
}

/// The broker of one run.
pub(crate) struct Broker(pub(crate) KafkaServer);

impl Broker {
    fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", format!("127.0.0.1:{}", self.0.direct_port()));
        config
    }

    pub(crate) async fn log(&self, name: &str) -> Result<KafkaLog> {
        Ok(Kafka::connect(&self.0.direct_url()).await?.log(name).await?)
    }

    /// Appends the records that are consumed.
    async fn fill(&self, name: &str, row: &Row) -> Result<KafkaLog> {
        let log = self.log(name).await?;
        for chunk in row.fill().chunks(FILL) {
            log.append(chunk).await?;
        }
        Ok(log)
    }

    /// A client at the beginning of the topic that commits nothing to Kafka.
    pub(crate) fn reader(&self, name: &str) -> Result<BaseConsumer> {
        let mut config = self.config();
        config
            .set("group.id", "by-hand")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "error");
        let reader: BaseConsumer = config.create()?;
        let mut place = TopicPartitionList::new();
        place.add_partition_offset(name, 0, Offset::Offset(0))?;
        reader.assign(&place)?;
        Ok(reader)
    }
}

/// Sends a batch, and waits until each record is stored.
async fn append(config: &ClientConfig, topic: &str, row: &Row) -> Result<Duration> {
    let mut config = config.clone();
    config
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("linger.ms", "0");
    let producer: FutureProducer = config.create()?;
    let send = async || {
        let mut flying = Vec::with_capacity(row.batch.size());
        for _ in 0..row.batch.size() {
            let record = FutureRecord::<[u8], [u8]>::to(topic).partition(0).payload(row.payload);
            flying.push(producer.send_result(record).map_err(|(error, _)| error)?);
        }
        for delivery in flying {
            delivery.await?.map_err(|(error, _)| error)?;
        }
        Ok::<_, crate::Failure>(())
    };
    // Connects the producer.
    send().await?;
    let started = Instant::now();
    for _ in 0..row.records / row.batch.size() as u64 {
        send().await?;
    }
    Ok(started.elapsed())
}

/// Reads up to that many records, and waits for the first and for each of the others for so long.
/// Returns the offset after them and their number, or `None` at the end.
pub(crate) fn batch(
    reader: &BaseConsumer,
    limit: usize,
    (wait, pause): (Duration, Duration),
    mut see: impl FnMut(&[u8]),
) -> Result<Option<(i64, u64)>> {
    let (mut next, mut count) = (None, 0);
    while (count as usize) < limit {
        let wait = if count == 0 { wait } else { pause };
        let Some(message) = reader.poll(wait) else { break };
        let message = message?;
        see(message.payload().unwrap_or_default());
        next = Some(message.offset() + 1);
        count += 1;
    }
    Ok(next.map(|next| (next, count)))
}

/// The next records, as many as a commit covers if the last ones do not come first.
fn full_batch(reader: &BaseConsumer, row: &Row) -> Result<(i64, u64)> {
    let check = |payload: &[u8]| assert_eq!(payload.len(), row.payload.len());
    Ok(batch(reader, row.batch.size(), (LIMIT, PAUSE), check)?.ok_or("no record came")?)
}

/// Counts each record and stores the offset, in one transaction per batch.
fn into_sqlite(
    reader: impl FnOnce() -> Result<BaseConsumer>,
    path: &Path,
    row: &Row,
    counters: u64,
) -> Result<Duration> {
    let mut database = sqlite::open_by_hand(path, counters.min(row.records))?;
    let started = Instant::now();
    let reader = reader()?;
    let mut handled = 0;
    while handled < row.records {
        let (next, count) = full_batch(&reader, row)?;
        sqlite::count_by_hand(&mut database, handled..handled + count, counters, next)?;
        handled += count;
    }
    let time = started.elapsed();
    sqlite::check(&database, row.records)?;
    Ok(time)
}

/// Counts the records with one statement per batch, and stores the offset with it.
async fn into_postgres(
    reader: impl FnOnce() -> Result<BaseConsumer>,
    url: &str,
    name: &str,
    row: &Row,
    counters: u64,
) -> Result<Duration> {
    let mut counting = postgres::ByHand::start(url, &postgres::table(name), counters).await?;
    let started = Instant::now();
    let reader = reader()?;
    let mut handled = 0;
    while handled < row.records {
        let (_, count) = full_batch(&reader, row)?;
        counting.count(count as usize).await?;
        handled += count;
    }
    let time = started.elapsed();
    counting.finish(row.records).await?;
    Ok(time)
}
