//! A relay from an outbox on SQLite to a bus, against a copy loop by hand with the same durability:
//! select a batch, append it to the bus, wait until it is stored, move the position, commit.
//!
//! Both sides send each record with its producer and its number. Times cover only the moving.

use std::{
    cell::Cell,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::ValueEnum;
use essentially_once::{
    Consumer, ConsumerId, Epoch, Log, NewRecord, Offset, Origin, ProducerId, StartAt, relay::Relay,
};
use essentially_once_rabbitmq::Rabbit;
use essentially_once_redis::{
    Redis,
    redis::{AsyncConnectionConfig, Client, aio::MultiplexedConnection, cmd, pipe},
};
use essentially_once_sqlite::{
    Sqlite, SqliteLog,
    rusqlite::{self, Connection, params},
};
use lapin::{
    BasicProperties, Channel, Confirmation,
    options::BasicPublishOptions,
    types::{AMQPValue, FieldTable},
};
use tempfile::TempDir;
use test_servers::{RabbitNode, RedisServer};
use tokio::runtime::Runtime;

use crate::{Contest, Result, Row, Rules, by_batch, rabbitmq::prepare};

/// Records per append when the outbox is filled.
const FILL: usize = 10_000;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bus {
    /// Another SQLite file.
    Sqlite,
    /// A private server that syncs each write.
    Redis,
    /// A private node.
    Rabbitmq,
    /// Another SQLite file, and a million relayed records behind the others in the outbox of ours.
    /// The other side is a relay, too, with none behind.
    Behind,
}

/// A bus, and a folder for the SQLite files.
pub(crate) struct Relays {
    bus: Running,
    /// How many relayed records the outbox of ours holds.
    behind: Option<u64>,
    folder: TempDir,
    runtime: Runtime,
    /// Each file and log is used once.
    used: Cell<u32>,
}

enum Running {
    Sqlite,
    Redis(RedisServer),
    Rabbitmq(RabbitNode),
}

impl Relays {
    pub(crate) fn start(bus: Bus, folder: TempDir) -> Result<Self> {
        const MILLION: u64 = 1_000_000;
        Ok(Self {
            bus: match bus {
                Bus::Sqlite | Bus::Behind => Running::Sqlite,
                Bus::Redis => Running::Redis(RedisServer::durable().start()?),
                Bus::Rabbitmq => Running::Rabbitmq(RabbitNode::start()?),
            },
            behind: (bus == Bus::Behind).then_some(MILLION),
            folder,
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?,
            used: Cell::new(0),
        })
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// A path that nothing used before.
    pub(crate) fn path(&self) -> PathBuf {
        self.used.set(self.used.get() + 1);
        self.folder.path().join(format!("{}.db", self.used.get()))
    }

    /// Opens a new log on the bus.
    pub(crate) async fn bus(&self, name: &str, path: &Path) -> Result<Arc<dyn Log>> {
        Ok(match &self.bus {
            Running::Sqlite => Arc::new(Sqlite::open(path).await?.log("bus").await?),
            Running::Redis(server) => Arc::new(Redis::connect(&server.url()).await?.log(name).await?),
            Running::Rabbitmq(node) => Arc::new(Rabbit::connect(&node.url()).await?.log(name).await?),
        })
    }

    /// Opens a new bus for a loop by hand.
    pub(crate) async fn bus_by_hand(&self, name: &str, path: &Path) -> Result<ByHand> {
        match &self.bus {
            Running::Sqlite => ByHand::sqlite(path),
            Running::Redis(server) => ByHand::redis(&server.url(), name).await,
            Running::Rabbitmq(node) => ByHand::rabbitmq(&node.url(), name).await,
        }
    }

    /// Fills an outbox, and relays what is behind `behind` records.
    async fn relay(&self, name: &str, row: &Row, behind: u64) -> Result<Duration> {
        let (path, bus_path) = (self.path(), self.path());
        let outbox = Sqlite::open(&path).await?;
        let log = outbox.log("outbox").await?;
        fill(&log, row.payload, behind + row.records).await?;
        let bus = self.bus(name, &bus_path).await?;
        let started = Instant::now();
        let relay = Consumer::at_least_once(ConsumerId::new("relay")?, log, outbox.store(), Relay::to(bus.clone()));
        let relay = row.batch.apply(relay).start_at(StartAt::Offset(Offset::from(behind)));
        let report = tokio::spawn(relay.run_until_caught_up()).await??;
        let time = started.elapsed();
        check(report.handled, row.records)?;
        if let Some(bounds) = bus.count_from(Offset::ZERO).await? {
            check(bounds, row.records)?;
        }
        self.clear(name).await?;
        outbox.close().await?;
        remove(&path)?;
        remove(&bus_path)?;
        Ok(time)
    }

    async fn copy(&self, name: &str, row: &Row) -> Result<Duration> {
        let (path, bus_path) = (self.path(), self.path());
        let connection = open(&path)?;
        connection.execute_batch(
            "CREATE TABLE outbox (number INTEGER PRIMARY KEY, key BLOB, headers BLOB, payload BLOB NOT NULL);
             CREATE TABLE position (id INTEGER PRIMARY KEY, next INTEGER NOT NULL);
             INSERT INTO position VALUES (1, 0);",
        )?;
        for first in (0..row.records).step_by(FILL) {
            connection.execute_batch("BEGIN IMMEDIATE")?;
            let mut insert = connection.prepare_cached("INSERT INTO outbox VALUES (?1, NULL, NULL, ?2)")?;
            for number in first..row.records.min(first + FILL as u64) {
                insert.execute(params![number as i64, row.payload])?;
            }
            connection.execute_batch("COMMIT")?;
        }
        let mut bus = self.bus_by_hand(name, &bus_path).await?;

        let started = Instant::now();
        let mut select = connection.prepare("SELECT * FROM outbox WHERE number >= ?1 LIMIT ?2")?;
        let mut advance = connection.prepare("UPDATE position SET next = ?1 WHERE id = 1")?;
        let mut next: i64 = 0;
        loop {
            let rows = select.query_map(params![next, row.batch.size() as i64], Sent::from_row)?;
            let rows: Vec<Sent> = rows.collect::<std::result::Result<_, _>>()?;
            let Some(last) = rows.last() else {
                break;
            };
            next = last.number + 1;
            bus.append(rows).await?;
            // A commit of its own.
            advance.execute([next])?;
        }
        let time = started.elapsed();
        check(next as u64, row.records)?;
        self.clear(name).await?;
        remove(&path)?;
        remove(&bus_path)?;
        Ok(time)
    }

    /// Keeps a server as empty for the next round.
    pub(crate) async fn clear(&self, name: &str) -> Result<()> {
        match &self.bus {
            Running::Sqlite => {}
            Running::Redis(server) => {
                let mut connection = connect(&server.url()).await?;
                cmd("DEL").arg(name).query_async::<u64>(&mut connection).await?;
            }
            Running::Rabbitmq(node) => {
                let connection = lapin::Connection::connect(&node.url(), Default::default()).await?;
                let channel = connection.create_channel().await?;
                channel.queue_delete(name.into(), Default::default()).await?;
                connection.close(200, "done".into()).await?;
            }
        }
        Ok(())
    }
}

impl Contest for Relays {
    fn rows(&self, rules: &Rules<'_>) -> Vec<Row> {
        by_batch(rules, |batch| match batch {
            1 => 1_000,
            10 => 8_000,
            100 => 40_000,
            _ => 100_000,
        })
    }

    fn by_hand(&self, name: &str, row: &Row) -> Result<Duration> {
        match self.behind {
            None => self.runtime.block_on(self.copy(name, row)),
            Some(_) => self.runtime.block_on(self.relay(name, row, 0)),
        }
    }

    fn ours(&self, name: &str, row: &Row) -> Result<Duration> {
        self.runtime.block_on(self.relay(name, row, self.behind.unwrap_or(0)))
    }
}

async fn fill(outbox: &SqliteLog, payload: &'static [u8], records: u64) -> Result<()> {
    let producer = ProducerId::new("outbox")?;
    let numbers: Vec<u64> = (0..records).collect();
    for numbers in numbers.chunks(FILL) {
        let record = |number: &u64| {
            let origin = Origin::new(producer.clone(), Epoch::STABLE, *number);
            NewRecord::new(payload).origin(origin)
        };
        outbox.append(&numbers.iter().map(record).collect::<Vec<_>>()).await?;
    }
    Ok(())
}

/// A row of an outbox.
pub(crate) struct Sent {
    pub(crate) number: i64,
    key: Option<Vec<u8>>,
    headers: Option<Vec<u8>>,
    pub(crate) payload: Vec<u8>,
}

impl Sent {
    pub(crate) fn from_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            number: row.get(0)?,
            key: row.get(1)?,
            headers: row.get(2)?,
            payload: row.get(3)?,
        })
    }
}

/// A bus to which a user appends without a library.
pub(crate) enum ByHand {
    Sqlite(Connection),
    Redis(MultiplexedConnection, String),
    Rabbitmq {
        _connection: Box<lapin::Connection>,
        channel: Channel,
        stream: String,
    },
}

impl ByHand {
    fn sqlite(path: &Path) -> Result<Self> {
        let connection = open(path)?;
        connection.execute_batch(
            "CREATE TABLE bus (\"offset\" INTEGER PRIMARY KEY, appended_at INTEGER NOT NULL, key BLOB, headers BLOB,
                 payload BLOB NOT NULL, producer TEXT, number INTEGER)",
        )?;
        Ok(Self::Sqlite(connection))
    }

    async fn redis(url: &str, stream: &str) -> Result<Self> {
        Ok(Self::Redis(connect(url).await?, stream.into()))
    }

    async fn rabbitmq(url: &str, stream: &str) -> Result<Self> {
        let connection = lapin::Connection::connect(url, Default::default()).await?;
        let channel = connection.create_channel().await?;
        prepare(&channel, stream).await?;
        Ok(Self::Rabbitmq {
            _connection: Box::new(connection),
            channel,
            stream: stream.into(),
        })
    }

    /// Appends a batch, and returns when all of it is stored.
    pub(crate) async fn append(&mut self, rows: Vec<Sent>) -> Result<()> {
        match self {
            Self::Sqlite(connection) => {
                let tx = connection.transaction()?;
                {
                    let mut insert =
                        tx.prepare_cached("INSERT INTO bus VALUES (NULL, ?1, ?2, ?3, ?4, 'outbox', ?5)")?;
                    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as i64;
                    for sent in rows {
                        insert.execute(params![now, sent.key, sent.headers, sent.payload, sent.number])?;
                    }
                }
                tx.commit()?;
            }
            Self::Redis(connection, stream) => {
                let mut append = pipe();
                for Sent { number, payload, .. } in rows {
                    let add = append.cmd("XADD").arg(&*stream).arg("*").arg("payload").arg(payload);
                    add.arg("producer").arg("outbox").arg("number").arg(number).ignore();
                }
                append.query_async::<()>(connection).await?;
            }
            Self::Rabbitmq { channel, stream, .. } => {
                let mandatory = BasicPublishOptions {
                    mandatory: true,
                    ..BasicPublishOptions::default()
                };
                let mut confirms = Vec::with_capacity(rows.len());
                for Sent { number, payload, .. } in rows {
                    let mut headers = FieldTable::default();
                    headers.insert("producer".into(), AMQPValue::LongString("outbox".into()));
                    headers.insert("number".into(), AMQPValue::LongLongInt(number));
                    let properties = BasicProperties::default().with_headers(headers);
                    let stream = stream.as_str().into();
                    confirms.push(
                        channel
                            .basic_publish("".into(), stream, mandatory, &payload, properties)
                            .await?,
                    );
                }
                for confirm in confirms {
                    if confirm.await? != Confirmation::Ack(None) {
                        return Err("a message was not confirmed".into());
                    }
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn open(path: &Path) -> Result<Connection> {
    let connection = Connection::open(path)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")?;
    Ok(connection)
}

async fn connect(url: &str) -> Result<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    let client = Client::open(url)?;
    Ok(client.get_multiplexed_async_connection_with_config(&config).await?)
}

fn check(moved: u64, records: u64) -> Result<()> {
    match moved == records {
        true => Ok(()),
        false => Err(format!("moved {moved} of {records} records: the measurement is invalid").into()),
    }
}

/// Removes a database if there is one. The connection that leaves the WAL behind may still be open.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
