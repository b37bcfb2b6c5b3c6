//! Files and servers that hold log, store and a counter, for measurements of the library alone.

use std::{marker::PhantomData, mem, sync::Arc};

use clap::ValueEnum;
use essentially_once::{Handler, HandlerError, KeyValue, Log, NewRecord, Offset, OffsetStore, Record, async_trait};
use essentially_once_postgres::{
    Pg, PgStore, PgTx,
    tokio_postgres::{Client, Statement},
};
use essentially_once_redis::{
    Redis, RedisStore, RedisTx,
    redis::{Cmd, aio::MultiplexedConnection, cmd},
};
use essentially_once_sqlite::{Sqlite, SqliteStore, SqliteTx, rusqlite::Connection};
use tempfile::TempDir;
use test_servers::{PostgresServer, RedisServer};

use crate::{PAYLOAD, Result, postgres, redis, relay::open};

/// Records per append.
const FILL: u64 = 10_000;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// A file with WAL and synchronous=FULL.
    Sqlite,
    /// A private server with appendfsync=always.
    Redis,
    /// A private server with its own settings.
    Postgres,
}

/// A fresh file, or a private server.
pub(crate) enum Host {
    Sqlite(String),
    Redis(RedisServer),
    Postgres(PostgresServer),
}

impl Host {
    /// Each name is used once in a folder.
    pub(crate) fn start(kind: Kind, folder: &TempDir, name: &str) -> Result<Self> {
        Ok(match kind {
            Kind::Sqlite => Self::Sqlite(folder.path().join(name).display().to_string()),
            // A rewrite of the file in the background would disturb a measurement.
            Kind::Redis => {
                let server = RedisServer::durable().with(&[("auto-aof-rewrite-percentage", "0")]);
                Self::Redis(server.start()?)
            }
            Kind::Postgres => Self::Postgres(PostgresServer::start()?),
        })
    }

    /// A path or URL.
    pub(crate) fn address(&self) -> String {
        match self {
            Self::Sqlite(path) => path.clone(),
            Self::Redis(server) => server.url(),
            Self::Postgres(server) => server.url(),
        }
    }
}

pub(crate) type Tx<B> = <<B as Backend>::Store as OffsetStore>::Tx;

/// The library on a host.
#[async_trait]
pub(crate) trait Backend: Send + Sync + Sized + 'static {
    type Store: OffsetStore<Tx: KeyValue>;
    /// A client of the host without the library.
    type Client: Send;

    async fn open(address: &str) -> Result<Self>;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>>;

    fn store(&self) -> Self::Store;

    /// Adds to the counter in a transaction.
    async fn add(tx: &mut Tx<Self>, count: u64) -> Result<(), HandlerError>;

    /// Connects, and creates the counter if there is none.
    async fn connect(address: &str) -> Result<Self::Client>;

    /// Does what the host would otherwise do in the background after many appends.
    async fn settle(client: &mut Self::Client) -> Result<()> {
        let _ = client;
        Ok(())
    }
}

pub(crate) const COUNT: &str = "UPDATE counter SET n = n + ?1 WHERE id = 1";

#[async_trait]
impl Backend for Sqlite {
    type Store = SqliteStore;
    type Client = Connection;

    async fn open(address: &str) -> Result<Self> {
        Ok(Sqlite::open(address).await?)
    }

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>> {
        Ok(Arc::new(Sqlite::log(self, name).await?))
    }

    fn store(&self) -> Self::Store {
        Sqlite::store(self)
    }

    async fn add(tx: &mut SqliteTx, count: u64) -> Result<(), HandlerError> {
        tx.execute(COUNT, [count as i64])?;
        Ok(())
    }

    async fn connect(address: &str) -> Result<Connection> {
        let connection = open(address.as_ref())?;
        connection.execute_batch(
            "CREATE TABLE IF NOT EXISTS counter (id INTEGER PRIMARY KEY, n INTEGER NOT NULL);
             INSERT OR IGNORE INTO counter VALUES (1, 0)",
        )?;
        Ok(connection)
    }
}

#[async_trait]
impl Backend for Redis {
    type Store = RedisStore;
    type Client = MultiplexedConnection;

    async fn open(address: &str) -> Result<Self> {
        Ok(Redis::connect(address).await?)
    }

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>> {
        Ok(Arc::new(Redis::log(self, name).await?))
    }

    fn store(&self) -> Self::Store {
        Redis::store(self)
    }

    async fn add(tx: &mut RedisTx, count: u64) -> Result<(), HandlerError> {
        Ok(tx.command(increment(count)).await?)
    }

    async fn connect(address: &str) -> Result<MultiplexedConnection> {
        redis::connect(address).await
    }
}

/// Adds to the counter on Redis.
pub(crate) fn increment(count: u64) -> Cmd {
    let mut increment = cmd("HINCRBY");
    increment.arg("counters").arg(1).arg(count);
    increment
}

#[async_trait]
impl Backend for Pg {
    type Store = PgStore;
    type Client = (Client, Statement);

    async fn open(address: &str) -> Result<Self> {
        Ok(Pg::connect(address).await?)
    }

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>> {
        Ok(Arc::new(Pg::log(self, name).await?))
    }

    fn store(&self) -> Self::Store {
        Pg::store(self)
    }

    async fn add(tx: &mut PgTx, count: u64) -> Result<(), HandlerError> {
        Ok(tx.queue(&COUNT.replace('?', "$"), &[&(count as i64)]).await?)
    }

    async fn connect(address: &str) -> Result<Self::Client> {
        let client = postgres::connect(address).await?;
        client
            .batch_execute(
                "CREATE TABLE IF NOT EXISTS counter (id bigint PRIMARY KEY, n bigint NOT NULL);
                 INSERT INTO counter VALUES (1, 0) ON CONFLICT DO NOTHING",
            )
            .await?;
        let count = client.prepare(&COUNT.replace('?', "$")).await?;
        Ok((client, count))
    }

    async fn settle((client, _): &mut Self::Client) -> Result<()> {
        // Autovacuum does the same within a minute.
        client.batch_execute("VACUUM ANALYZE").await?;
        Ok(client.batch_execute("CHECKPOINT").await?)
    }
}

/// Appends this number of records.
pub(crate) async fn fill(log: &dyn Log, records: u64) -> Result<()> {
    let chunk = vec![NewRecord::new(PAYLOAD.as_slice()); FILL as usize];
    for first in (0..records).step_by(FILL as usize) {
        log.append(&chunk[..(records - first).min(FILL) as usize]).await?;
    }
    Ok(())
}

/// Where the last records begin.
pub(crate) async fn tail(log: &dyn Log, records: u64) -> Result<Offset> {
    Ok(log
        .tail(records)
        .await?
        .ok_or("the log does not say where its last records begin")?)
}

/// When a handler counts.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Writes {
    /// With a statement per record.
    Record,
    /// With one statement per batch, in `Handler::flush`.
    Batch,
}

impl Writes {
    /// How many to count now that a record was handled.
    pub(crate) fn now(self, gathered: &mut u64) -> u64 {
        *gathered += 1;
        match self {
            Self::Record => mem::take(gathered),
            Self::Batch => 0,
        }
    }
}

/// Counts in the transaction.
pub(crate) struct Inside<B> {
    writes: Writes,
    gathered: u64,
    backend: PhantomData<fn() -> B>,
}

impl<B> Inside<B> {
    pub(crate) fn new(writes: Writes) -> Self {
        Self {
            writes,
            gathered: 0,
            backend: PhantomData,
        }
    }
}

#[async_trait]
impl<B: Backend> Handler<Tx<B>> for Inside<B> {
    async fn handle(&mut self, _: &Record, tx: &mut Tx<B>) -> Result<(), HandlerError> {
        match self.writes.now(&mut self.gathered) {
            0 => Ok(()),
            count => B::add(tx, count).await,
        }
    }

    async fn flush(&mut self, tx: &mut Tx<B>) -> Result<(), HandlerError> {
        match mem::take(&mut self.gathered) {
            0 => Ok(()),
            count => B::add(tx, count).await,
        }
    }

    async fn reset(&mut self) {
        self.gathered = 0;
    }
}
