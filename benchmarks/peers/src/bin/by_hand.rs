//! The loops that people write without a library. Only one instance at a time holds a lease on the
//! position, as far as a lease can say, and nothing checks it when it commits.
//!
//! - `separately`: handles each record of a batch, and then stores the position.
//! - `first`: stores the position, and then handles each record of a batch.
//! - `together`: commits a batch and the position in one transaction.
//! - `group`: on Redis, reads through a consumer group, and acknowledges a batch after it is
//!   handled. It needs no lease: entries that were not acknowledged for long are claimed.

use std::{
    collections::HashMap,
    error::Error,
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use postgres::{NoTls, Statement};
use redis::{Commands, streams::StreamReadReply};
use rusqlite::OptionalExtension;
use worker::{COUNT, EFFECTS, Program, Sending, Task, Work, payload};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const STREAM: &str = "{peers}:log";
const GROUP: &str = "peers";

/// How long to wait if there is nothing to do.
const IDLE: Duration = Duration::from_millis(5);

fn main() -> Result<()> {
    let program: Program = clap::Parser::parse();
    let mut backend = open(&program.bus)?;
    match &program.task {
        Task::Prepare => backend.prepare(),
        Task::Send(sending) => send_all(&mut *backend, *sending),
        Task::Work(work) if program.way == "group" => consume_in_group(&program.bus, work),
        Task::Work(work) => consume(&mut *backend, work, &program.way),
    }
}

fn open(url: &str) -> Result<Box<dyn Backend>> {
    Ok(match url.split_once("://") {
        Some(("redis", _)) => Box::new(redis::Client::open(url)?.get_connection()?),
        Some(("postgres", _)) => Box::new(Postgres {
            client: postgres::Client::connect(url, NoTls)?,
            statements: HashMap::new(),
        }),
        _ => {
            let connection = rusqlite::Connection::open(url)?;
            connection.pragma_update(None, "journal_mode", "wal")?;
            connection.pragma_update(None, "synchronous", "full")?;
            connection.busy_timeout(Duration::from_secs(30))?;
            Box::new(connection)
        }
    })
}

fn send_all(backend: &mut dyn Backend, sending: Sending) -> Result<()> {
    let schedule = sending.start();
    for numbers in schedule.batches(1_000) {
        if let Some(wait) = schedule.wait(numbers.start) {
            sleep(wait);
        }
        backend.append(&numbers.collect::<Vec<_>>())?;
    }
    Ok(())
}

fn consume(backend: &mut dyn Backend, work: &Work, way: &str) -> Result<()> {
    let mut position = None;
    loop {
        if !backend.lease(&work.instance, work.patience())? {
            position = None;
            sleep(IDLE);
            continue;
        }
        let after = match position.take() {
            Some(position) => position,
            None => backend.position()?,
        };
        let (numbers, last) = backend.read(&after, work.batch)?;
        if numbers.is_empty() {
            sleep(IDLE);
            position = Some(after);
            continue;
        }
        match way {
            "together" => backend.handle(&numbers, work.pause(), Some(&last))?,
            "first" => {
                backend.store(&last)?;
                handle_each(backend, &numbers, work.pause())?;
            }
            _ => {
                handle_each(backend, &numbers, work.pause())?;
                backend.store(&last)?;
            }
        }
        position = Some(last);
    }
}

/// Commits the effect of each record.
fn handle_each(backend: &mut dyn Backend, numbers: &[u64], pause: Duration) -> Result<()> {
    for number in numbers {
        backend.handle(&[*number], Duration::ZERO, None)?;
        sleep(pause);
    }
    Ok(())
}

/// What the loop does on one backend. Positions are ids of entries on Redis, and numbers of rows
/// elsewhere.
trait Backend {
    fn prepare(&mut self) -> Result<()>;
    fn append(&mut self, numbers: &[u64]) -> Result<()>;
    /// Takes or extends the lease, if nobody else holds it.
    fn lease(&mut self, instance: &str, time: Duration) -> Result<bool>;
    fn position(&mut self) -> Result<String>;
    fn read(&mut self, after: &str, batch: usize) -> Result<(Vec<u64>, String)>;
    /// Handles and commits records, and the position with them if it is given.
    fn handle(&mut self, numbers: &[u64], pause: Duration, position: Option<&str>) -> Result<()>;
    fn store(&mut self, position: &str) -> Result<()>;
}

impl Backend for redis::Connection {
    fn prepare(&mut self) -> Result<()> {
        Ok(self.xgroup_create_mkstream(STREAM, GROUP, "0")?)
    }

    fn append(&mut self, numbers: &[u64]) -> Result<()> {
        let mut pipe = redis::pipe();
        for number in numbers {
            pipe.xadd(STREAM, "*", &[("payload", &payload(*number)[..])]).ignore();
        }
        Ok(pipe.query(self)?)
    }

    fn lease(&mut self, instance: &str, time: Duration) -> Result<bool> {
        const LEASE: &str = "{peers}:lease";
        let mut take = redis::cmd("SET");
        take.arg(LEASE)
            .arg(instance)
            .arg("NX")
            .arg("PX")
            .arg(time.as_millis() as u64);
        if take.query::<Option<String>>(self)?.is_some() {
            return Ok(true);
        }
        let holder: Option<String> = self.get(LEASE)?;
        Ok(holder.as_deref() == Some(instance) && self.pexpire(LEASE, time.as_millis() as i64)?)
    }

    fn position(&mut self) -> Result<String> {
        let position: Option<String> = self.get("{peers}:position")?;
        Ok(position.unwrap_or_else(|| "0".into()))
    }

    fn read(&mut self, after: &str, batch: usize) -> Result<(Vec<u64>, String)> {
        let reply: Option<StreamReadReply> = redis::cmd("XREAD")
            .arg("COUNT")
            .arg(batch)
            .arg("STREAMS")
            .arg(STREAM)
            .arg(after)
            .query(self)?;
        let (numbers, mut ids) = entries(reply);
        Ok((numbers, ids.pop().unwrap_or_default()))
    }

    fn handle(&mut self, numbers: &[u64], pause: Duration, position: Option<&str>) -> Result<()> {
        let mut pipe = redis::pipe();
        pipe.atomic();
        for number in numbers {
            pipe.hincr(EFFECTS, *number, 1).ignore();
            sleep(pause);
        }
        if let Some(position) = position {
            pipe.set("{peers}:position", position).ignore();
        }
        Ok(pipe.query(self)?)
    }

    fn store(&mut self, position: &str) -> Result<()> {
        Ok(self.set("{peers}:position", position)?)
    }
}

fn entries(reply: Option<StreamReadReply>) -> (Vec<u64>, Vec<String>) {
    let streams = reply.map(|reply| reply.keys).unwrap_or_default();
    let entries = streams.into_iter().flat_map(|stream| stream.ids);
    entries.map(|entry| (number_of(&entry), entry.id)).unzip()
}

fn number_of(entry: &redis::streams::StreamId) -> u64 {
    let payload: Option<Vec<u8>> = entry.get("payload");
    worker::number(&payload.unwrap_or_default())
}

/// Reads what this consumer was given before it was killed, then what others have left for long,
/// then what is new.
fn consume_in_group(url: &str, work: &Work) -> Result<()> {
    let mut redis = redis::Client::open(url)?.get_connection()?;
    let mut own = "0".to_owned();
    let mut claimed = Instant::now();
    loop {
        let mut read = redis::cmd("XREADGROUP");
        read.arg("GROUP").arg(GROUP).arg(&work.instance);
        read.arg("COUNT").arg(work.batch).arg("BLOCK").arg(50);
        let reply: Option<StreamReadReply> = read.arg("STREAMS").arg(STREAM).arg(&own).query(&mut redis)?;
        let (mut numbers, mut ids) = entries(reply);
        if numbers.is_empty() {
            own = ">".into();
        }
        if claimed.elapsed() >= work.patience() {
            let options = redis::streams::StreamAutoClaimOptions::default().count(work.batch);
            let idle = work.patience().as_millis() as u64;
            let claim: redis::streams::StreamAutoClaimReply =
                redis.xautoclaim_options(STREAM, GROUP, &work.instance, idle, "0", options)?;
            numbers.extend(claim.claimed.iter().map(number_of));
            ids.extend(claim.claimed.into_iter().map(|entry| entry.id));
            claimed = Instant::now();
        }
        if numbers.is_empty() {
            continue;
        }
        handle_each(&mut redis, &numbers, work.pause())?;
        let _: u64 = redis.xack(STREAM, GROUP, &ids)?;
    }
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as i64)
}

const STORE: &str = "UPDATE position SET next = $1";
const LEASE: &str = "UPDATE lease SET holder = $1, until = $2 WHERE holder = $1 OR until < $3";

impl Backend for rusqlite::Connection {
    fn prepare(&mut self) -> Result<()> {
        Ok(self.execute_batch(
            "CREATE TABLE log (seq INTEGER PRIMARY KEY, payload BLOB NOT NULL);
             CREATE TABLE position (next INTEGER NOT NULL); INSERT INTO position VALUES (0);
             CREATE TABLE lease (holder TEXT, until INTEGER); INSERT INTO lease VALUES ('', 0)",
        )?)
    }

    fn append(&mut self, numbers: &[u64]) -> Result<()> {
        let tx = self.transaction()?;
        for number in numbers {
            tx.prepare_cached("INSERT INTO log (payload) VALUES (?1)")?
                .execute([payload(*number)])?;
        }
        Ok(tx.commit()?)
    }

    fn lease(&mut self, instance: &str, time: Duration) -> Result<bool> {
        // A write costs a sync, so the lease is extended only when half of it has passed.
        let (until, early) = (now() + time.as_millis() as i64, now() + time.as_millis() as i64 / 2);
        let mut held = self.prepare_cached("SELECT 1 FROM lease WHERE holder = ?1 AND until > ?2")?;
        if held.query_row((instance, early), |_| Ok(())).optional()?.is_some() {
            return Ok(true);
        }
        let mut take = self.prepare_cached(LEASE)?;
        Ok(take.execute((instance, until, now()))? == 1)
    }

    fn position(&mut self) -> Result<String> {
        let next: i64 = self.query_row("SELECT next FROM position", [], |row| row.get(0))?;
        Ok(next.to_string())
    }

    fn read(&mut self, after: &str, batch: usize) -> Result<(Vec<u64>, String)> {
        let mut read = self.prepare_cached("SELECT seq, payload FROM log WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
        let mut rows = read.query((after.parse::<i64>()?, batch as i64))?;
        let (mut numbers, mut last) = (Vec::new(), after.to_owned());
        while let Some(row) = rows.next()? {
            let payload: Vec<u8> = row.get(1)?;
            numbers.push(worker::number(&payload));
            last = row.get::<_, i64>(0)?.to_string();
        }
        Ok((numbers, last))
    }

    fn handle(&mut self, numbers: &[u64], pause: Duration, position: Option<&str>) -> Result<()> {
        let tx = self.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        for number in numbers {
            tx.prepare_cached(COUNT)?.execute([*number as i64])?;
            sleep(pause);
        }
        if let Some(position) = position {
            tx.prepare_cached(STORE)?.execute([position])?;
        }
        Ok(tx.commit()?)
    }

    fn store(&mut self, position: &str) -> Result<()> {
        self.prepare_cached(STORE)?.execute([position])?;
        Ok(())
    }
}

/// Prepares each statement once.
struct Postgres {
    client: postgres::Client,
    statements: HashMap<&'static str, Statement>,
}

impl Postgres {
    fn statement(&mut self, sql: &'static str) -> Result<Statement> {
        if !self.statements.contains_key(sql) {
            self.statements.insert(sql, self.client.prepare(sql)?);
        }
        Ok(self.statements[sql].clone())
    }
}

impl Backend for Postgres {
    fn prepare(&mut self) -> Result<()> {
        Ok(self.client.batch_execute(
            "CREATE TABLE log (seq bigserial PRIMARY KEY, payload bytea NOT NULL);
             CREATE TABLE position (next bigint NOT NULL); INSERT INTO position VALUES (0);
             CREATE TABLE lease (holder text, until bigint); INSERT INTO lease VALUES ('', 0)",
        )?)
    }

    fn append(&mut self, numbers: &[u64]) -> Result<()> {
        let payloads: Vec<Vec<u8>> = numbers.iter().map(|number| payload(*number).to_vec()).collect();
        let append = self.statement("INSERT INTO log (payload) SELECT * FROM unnest($1::bytea[])")?;
        self.client.execute(&append, &[&payloads])?;
        Ok(())
    }

    fn lease(&mut self, instance: &str, time: Duration) -> Result<bool> {
        let (until, early) = (now() + time.as_millis() as i64, now() + time.as_millis() as i64 / 2);
        let held = self.statement("SELECT 1 FROM lease WHERE holder = $1 AND until > $2")?;
        if !self.client.query(&held, &[&instance, &early])?.is_empty() {
            return Ok(true);
        }
        let take = self.statement(LEASE)?;
        Ok(self.client.execute(&take, &[&instance, &until, &now()])? == 1)
    }

    fn position(&mut self) -> Result<String> {
        let row = self.client.query_one("SELECT next FROM position", &[])?;
        Ok(row.get::<_, i64>(0).to_string())
    }

    fn read(&mut self, after: &str, batch: usize) -> Result<(Vec<u64>, String)> {
        let read = self.statement("SELECT seq, payload FROM log WHERE seq > $1 ORDER BY seq LIMIT $2")?;
        let rows = self.client.query(&read, &[&after.parse::<i64>()?, &(batch as i64)])?;
        let last = rows
            .last()
            .map_or(after.to_owned(), |row| row.get::<_, i64>(0).to_string());
        let numbers = rows.iter().map(|row| worker::number(row.get::<_, &[u8]>(1)));
        Ok((numbers.collect(), last))
    }

    fn handle(&mut self, numbers: &[u64], pause: Duration, position: Option<&str>) -> Result<()> {
        let count = self.statement(
            "INSERT INTO effects (number, times) SELECT number, 1 FROM unnest($1::bigint[]) AS number
             ON CONFLICT (number) DO UPDATE SET times = effects.times + 1",
        )?;
        let store = self.statement(STORE)?;
        let mut tx = self.client.transaction()?;
        for _ in numbers {
            sleep(pause);
        }
        let numbers: Vec<i64> = numbers.iter().map(|number| *number as i64).collect();
        tx.execute(&count, &[&numbers])?;
        if let Some(position) = position {
            tx.execute(&store, &[&position.parse::<i64>()?])?;
        }
        Ok(tx.commit()?)
    }

    fn store(&mut self, position: &str) -> Result<()> {
        let store = self.statement(STORE)?;
        self.client.execute(&store, &[&position.parse::<i64>()?])?;
        Ok(())
    }
}
