//! Redis, AOF with `appendfsync always`, on one server: the same work by hand and through the
//! library. Times cover only the consuming. Both sides check the counter.

use std::time::{Duration, Instant};

use essentially_once::{Consumer, ConsumerId, Handler, HandlerError, Log, Record, async_trait};
use essentially_once_redis::{
    Redis, RedisTx,
    redis::{self, AsyncConnectionConfig, Client, Value, aio::MultiplexedConnection, cmd, pipe},
};

use test_servers::RedisServer;

use crate::{Contest, Result, Row, Rules, by_batch};

/// Records per append on both sides.
const FILL: u64 = 1_000;

/// A private server that syncs each write to disk before it acknowledges it.
pub(crate) struct Server {
    server: RedisServer,
    counters: u64,
}

impl Server {
    /// The records are spread over `counters` counters. The library combines increments of one
    /// counter in one commit. The hand-written loop does not.
    pub(crate) fn start(counters: u64) -> Result<Self> {
        Ok(Self {
            server: RedisServer::durable().start()?,
            counters,
        })
    }
}

impl Contest for Server {
    fn rows(&self, rules: &Rules<'_>) -> Vec<Row> {
        by_batch(rules, |batch| match batch {
            1 => 2_000,
            10 => 15_000,
            100 => 80_000,
            _ => 120_000,
        })
    }

    fn by_hand(&self, name: &str, row: &Row) -> Result<Duration> {
        runtime()?.block_on(by_hand(&self.server.url(), name, row, self.counters))
    }

    fn ours(&self, name: &str, row: &Row) -> Result<Duration> {
        runtime()?.block_on(ours(&self.server.url(), name, row, self.counters))
    }
}

async fn by_hand(url: &str, name: &str, row: &Row, counters: u64) -> Result<Duration> {
    let records = row.records;
    let mut connection = connect(url).await?;
    let (stream, state) = (format!("{{{name}}}:log"), format!("{{{name}}}:state"));
    for first in (0..records).step_by(FILL as usize) {
        let mut fill = pipe();
        for _ in first..records.min(first + FILL) {
            fill.cmd("XADD")
                .arg(&stream)
                .arg("*")
                .arg("payload")
                .arg(row.payload)
                .ignore();
        }
        fill.query_async::<()>(&mut connection).await?;
    }

    let started = Instant::now();
    let mut left = records;
    consume_by_hand(
        &mut connection,
        &stream,
        &state,
        row.batch.size(),
        counters,
        None,
        |entries| {
            assert!(entries.iter().all(|(_, payload)| payload.len() == row.payload.len()));
            left -= entries.len() as u64;
            left > 0
        },
    )
    .await?;
    let time = started.elapsed();
    check(&mut connection, &state, records).await?;
    clear(&mut connection, &[&stream, &state]).await?;
    Ok(time)
}

/// The loop that a user writes without a library: XREAD a batch, then increment the counter for
/// each record and move the offset in one MULTI/EXEC. At the end of the stream, the server holds
/// back its reply for up to `block` milliseconds. `committed` gets the entries of each batch, even
/// if there are none, and returns whether to go on.
pub(crate) async fn consume_by_hand(
    connection: &mut MultiplexedConnection,
    stream: &str,
    state: &str,
    batch: usize,
    counters: u64,
    block: Option<usize>,
    mut committed: impl FnMut(&[(String, Vec<u8>)]) -> bool,
) -> Result<()> {
    let mut next: String = "0-0".into();
    let mut handled = 0;
    loop {
        let mut read = cmd("XREAD");
        read.arg("COUNT").arg(batch);
        if let Some(block) = block {
            read.arg("BLOCK").arg(block);
        }
        read.arg("STREAMS").arg(stream).arg(&next);
        let entries = entries(read.query_async(connection).await?)?;
        if let Some((last, _)) = entries.last() {
            let mut commit = pipe();
            commit.atomic();
            for _ in &entries {
                commit.cmd("HINCRBY").arg(state).arg(handled % counters).arg(1).ignore();
                handled += 1;
            }
            next.clone_from(last);
            commit.cmd("HSET").arg(state).arg("next").arg(&next).ignore();
            commit.query_async::<()>(connection).await?;
        }
        if !committed(&entries) {
            return Ok(());
        }
    }
}

/// An id, and alternating fields and values.
type Entry = (String, Vec<Vec<u8>>);

/// Ids and payloads of an XREAD reply for one stream: `[[stream, [[id, [field, value]], …]]]`.
fn entries(reply: Value) -> Result<Vec<(String, Vec<u8>)>> {
    // Nil if no entry came.
    let streams: Option<Vec<(String, Vec<Entry>)>> = redis::from_redis_value(reply)?;
    let entries = streams
        .unwrap_or_default()
        .pop()
        .map(|(_, entries)| entries)
        .unwrap_or_default();
    Ok(entries
        .into_iter()
        .filter_map(|(id, mut fields)| Some((id, fields.pop()?)))
        .collect())
}

/// Counts each record in the next of its counters, which are fields of a hash.
pub(crate) struct Count {
    key: String,
    counters: u64,
    handled: u64,
    /// The length of each payload.
    length: usize,
}

impl Count {
    pub(crate) fn new(key: String, counters: u64, length: usize) -> Self {
        Self {
            key,
            counters,
            handled: 0,
            length,
        }
    }
}

#[async_trait]
impl Handler<RedisTx> for Count {
    async fn handle(&mut self, record: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        assert_eq!(record.payload.len(), self.length);
        let mut increment = cmd("HINCRBY");
        increment.arg(&self.key).arg(self.handled % self.counters).arg(1);
        self.handled += 1;
        tx.command(increment).await?;
        Ok(())
    }
}

/// The same work through the library.
async fn ours(url: &str, name: &str, row: &Row, counters: u64) -> Result<Duration> {
    let redis = Redis::connect(url).await?;
    let log = redis.log(name).await?;
    for chunk in row.fill().chunks(FILL as usize) {
        log.append(chunk).await?;
    }
    let state = format!("{{{name}}}:state");
    let started = Instant::now();
    let count = Count::new(state.clone(), counters, row.payload.len());
    let consumer = Consumer::essentially_once(ConsumerId::new(name)?, log, redis.store(), count);
    tokio::spawn(row.batch.apply(consumer).run_until_caught_up()).await??;
    let time = started.elapsed();
    let mut connection = connect(url).await?;
    check(&mut connection, &state, row.records).await?;
    clear(&mut connection, &[name, &state]).await?;
    Ok(time)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?)
}

pub(crate) async fn connect(url: &str) -> Result<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    Ok(Client::open(url)?
        .get_multiplexed_async_connection_with_config(&config)
        .await?)
}

async fn check(connection: &mut MultiplexedConnection, state: &str, records: u64) -> Result<()> {
    let counters: Vec<(String, String)> = cmd("HGETALL").arg(state).query_async(connection).await?;
    let mut counted = 0;
    for (counter, count) in counters {
        if counter != "next" {
            counted += count.parse::<u64>()?;
        }
    }
    if counted != records {
        return Err(format!("counted {counted} of {records} records: the measurement is invalid").into());
    }
    Ok(())
}

/// Keeps the server as empty for the next round.
async fn clear(connection: &mut MultiplexedConnection, keys: &[&str]) -> Result<()> {
    cmd("DEL").arg(keys).query_async::<u64>(connection).await?;
    Ok(())
}
