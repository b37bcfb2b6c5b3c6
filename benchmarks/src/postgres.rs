//! PostgreSQL with its own settings, on one server: the same work by hand and through the library.
//! Times cover only the consuming. Both sides check the counters.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use essentially_once::{Consumer, ConsumerId, Handler, HandlerError, KeyValue, Log, Record, async_trait};
use essentially_once_postgres::{
    Pg, PgTx,
    tokio_postgres::{self, Client, NoTls, Statement},
};
use test_servers::PostgresServer;

use crate::{Contest, Result, Row, Rules, by_batch};

/// Records per append on both sides.
const FILL: u64 = 1_000;

/// How the handler counts.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Write {
    /// One statement for a whole batch, in `Handler::flush`.
    Gather,
    /// A read and a write of the portable state per record.
    KeyValue,
    /// A statement per record, not awaited.
    Queue,
}

/// A private server that syncs each commit to disk.
pub(crate) struct Server {
    server: PostgresServer,
    counters: u64,
    write: Write,
}

impl Server {
    /// The records are spread over `counters` counters.
    pub(crate) fn start(counters: u64, write: Write) -> Result<Self> {
        Ok(Self {
            server: PostgresServer::start()?,
            counters,
            write,
        })
    }
}

impl Contest for Server {
    fn rows(&self, rules: &Rules<'_>) -> Vec<Row> {
        by_batch(rules, |batch| match batch {
            1 => 1_000,
            10 => 8_000,
            100 => 40_000,
            _ => 80_000,
        })
    }

    fn by_hand(&self, name: &str, row: &Row) -> Result<Duration> {
        runtime()?.block_on(by_hand(&self.server.url(), &table(name), row, self.counters))
    }

    fn ours(&self, name: &str, row: &Row) -> Result<Duration> {
        runtime()?.block_on(self.run(name, row))
    }
}

/// One statement for a batch, on both sides.
fn upsert(table: &str) -> String {
    format!(
        "INSERT INTO {table} AS c (counter, n) SELECT * FROM unnest($1::bigint[], $2::bigint[])
         ON CONFLICT (counter) DO UPDATE SET n = c.n + excluded.n"
    )
}

/// The loop that a user writes without a library: select a batch, then count it.
async fn by_hand(url: &str, table: &str, row: &Row, counters: u64) -> Result<Duration> {
    let client = connect(url).await?;
    client.batch_execute(&create_log(table)).await?;
    let fill =
        format!("INSERT INTO {table}_log SELECT place, $3 FROM generate_series($1::bigint, $2::bigint) AS place");
    for first in (0..row.records).step_by(FILL as usize) {
        let last = row.records.min(first + FILL) - 1;
        client
            .execute(&fill, &[&(first as i64), &(last as i64), &row.payload])
            .await?;
    }
    let mut counting = ByHand::start(url, table, counters).await?;
    let read = counting.client.prepare(&read_log(table)).await?;

    let started = Instant::now();
    while (counting.next as u64) < row.records {
        let (next, limit) = (counting.next, row.batch.size() as i64);
        let rows = counting.client.query(&read, &[&next, &limit]).await?;
        for found in &rows {
            let payload: &[u8] = found.get(1);
            assert_eq!(payload.len(), row.payload.len());
        }
        counting.count(rows.len()).await?;
    }
    let time = started.elapsed();
    counting.finish(row.records).await?;
    client.batch_execute(&format!("DROP TABLE {table}_log")).await?;
    Ok(time)
}

/// The table that a loop by hand reads.
pub(crate) fn create_log(table: &str) -> String {
    format!("CREATE TABLE {table}_log (place bigint PRIMARY KEY, payload bytea NOT NULL)")
}

pub(crate) fn read_log(table: &str) -> String {
    format!("SELECT place, payload FROM {table}_log WHERE place >= $1 ORDER BY place LIMIT $2")
}

/// Counts by hand: adds to the counters with one statement and moves the offset, if nobody else
/// has, in one transaction.
pub(crate) struct ByHand {
    client: Client,
    table: String,
    upsert: Statement,
    advance: Statement,
    counters: i64,
    /// The place of the next record.
    pub(crate) next: i64,
    revision: i64,
}

impl ByHand {
    pub(crate) async fn start(url: &str, table: &str, counters: u64) -> Result<Self> {
        let client = connect(url).await?;
        let sql = format!(
            "CREATE TABLE {table} (counter bigint PRIMARY KEY, n bigint NOT NULL);
             CREATE TABLE {table}_position (next bigint NOT NULL, revision bigint NOT NULL);
             INSERT INTO {table}_position VALUES (0, 0)"
        );
        client.batch_execute(&sql).await?;
        let advance = format!("UPDATE {table}_position SET next = $1, revision = revision + 1 WHERE revision = $2");
        Ok(Self {
            upsert: client.prepare(&upsert(table)).await?,
            advance: client.prepare(&advance).await?,
            client,
            table: table.to_owned(),
            counters: counters as i64,
            next: 0,
            revision: 0,
        })
    }

    /// Counts the next records.
    pub(crate) async fn count(&mut self, records: usize) -> Result<()> {
        let mut counts = BTreeMap::new();
        for _ in 0..records {
            *counts.entry(self.next % self.counters).or_insert(0_i64) += 1;
            self.next += 1;
        }
        let (keys, values): (Vec<i64>, Vec<i64>) = counts.into_iter().unzip();
        let tx = self.client.transaction().await?;
        tx.execute(&self.upsert, &[&keys, &values]).await?;
        if tx.execute(&self.advance, &[&self.next, &self.revision]).await? != 1 {
            return Err("somebody else has moved the position".into());
        }
        tx.commit().await?;
        self.revision += 1;
        Ok(())
    }

    /// Checks the counters, and removes the tables.
    pub(crate) async fn finish(self, records: u64) -> Result<()> {
        let table = &self.table;
        let sum = format!("SELECT sum(n)::bigint FROM {table}");
        check(self.client.query_one(&sum, &[]).await?.get(0), records)?;
        let drop = format!("DROP TABLE {table}, {table}_position");
        Ok(self.client.batch_execute(&drop).await?)
    }
}

impl Server {
    /// The same work through the library.
    async fn run(&self, name: &str, row: &Row) -> Result<Duration> {
        let pg = Pg::connect(&self.server.url()).await?;
        let log = pg.log(name).await?;
        for chunk in row.fill().chunks(FILL as usize) {
            log.append(chunk).await?;
        }
        consume(&self.server.url(), name, log, row, self.counters, self.write).await
    }
}

/// Counts the records of a log through the library.
pub(crate) async fn consume(
    url: &str,
    name: &str,
    log: impl Log + 'static,
    row: &Row,
    counters: u64,
    write: Write,
) -> Result<Duration> {
    let (pg, client, table) = (Pg::connect(url).await?, connect(url).await?, table(name));
    let count = Count::create(&client, &table, counters.min(row.records), row.payload.len(), write).await?;
    let consumer = ConsumerId::new(name)?;
    let started = Instant::now();
    // A single Kafka broker is volatile, for both loops.
    let consuming = Consumer::essentially_once(consumer.clone(), log, pg.store(), count).accept_volatile();
    tokio::spawn(row.batch.apply(consuming).run_until_caught_up()).await??;
    let time = started.elapsed();
    let sum = match write {
        Write::KeyValue => {
            "SELECT coalesce(sum(convert_from(value, 'UTF8')::bigint), 0)::bigint FROM essentially_once.state".into()
        }
        _ => format!("SELECT sum(n)::bigint FROM {table}"),
    };
    check(client.query_one(&sum, &[]).await?.get(0), row.records)?;
    let clear = format!("DROP TABLE {table}; TRUNCATE essentially_once.records, essentially_once.state");
    client.batch_execute(&clear).await?;
    Ok(time)
}

/// Counts each record in the next of its counters.
pub(crate) struct Count {
    write: Write,
    sql: String,
    counters: i64,
    handled: i64,
    gathered: BTreeMap<i64, i64>,
    /// The length of each payload.
    length: usize,
}

impl Count {
    /// Creates the table of the counters.
    pub(crate) async fn create(
        client: &Client,
        table: &str,
        counters: u64,
        length: usize,
        write: Write,
    ) -> Result<Self> {
        let sql = format!("CREATE TABLE {table} (counter bigint PRIMARY KEY, n bigint NOT NULL)");
        client.batch_execute(&sql).await?;
        let counters = counters as i64;
        if write == Write::Queue {
            let zero = format!("INSERT INTO {table} SELECT counter, 0 FROM generate_series(0, $1::bigint) AS counter");
            client.execute(&zero, &[&(counters - 1)]).await?;
        }
        Ok(Self {
            write,
            sql: match write {
                Write::Queue => format!("UPDATE {table} SET n = n + 1 WHERE counter = $1"),
                _ => upsert(table),
            },
            counters,
            handled: 0,
            gathered: BTreeMap::new(),
            length,
        })
    }
}

#[async_trait]
impl Handler<PgTx> for Count {
    async fn handle(&mut self, record: &Record, tx: &mut PgTx) -> Result<(), HandlerError> {
        assert_eq!(record.payload.len(), self.length);
        let counter = self.handled % self.counters;
        self.handled += 1;
        match self.write {
            Write::Gather => *self.gathered.entry(counter).or_default() += 1,
            Write::Queue => tx.queue(&self.sql, &[&counter]).await?,
            Write::KeyValue => {
                let key = counter.to_string();
                let count: i64 = match tx.get(key.as_bytes()).await? {
                    Some(count) => std::str::from_utf8(&count)?.parse()?,
                    None => 0,
                };
                tx.put(key.as_bytes(), (count + 1).to_string().as_bytes()).await?;
            }
        }
        Ok(())
    }

    async fn flush(&mut self, tx: &mut PgTx) -> Result<(), HandlerError> {
        if !self.gathered.is_empty() {
            let (counters, counts): (Vec<i64>, Vec<i64>) = std::mem::take(&mut self.gathered).into_iter().unzip();
            tx.queue(&self.sql, &[&counters, &counts]).await?;
        }
        Ok(())
    }

    async fn reset(&mut self) {
        self.gathered.clear();
    }
}

pub(crate) fn table(name: &str) -> String {
    name.replace('-', "_")
}

fn check(counted: i64, records: u64) -> Result<()> {
    match counted as u64 == records {
        true => Ok(()),
        false => Err(format!("counted {counted} of {records} records: the measurement is invalid").into()),
    }
}

pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?)
}

pub(crate) async fn connect(url: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}
