//! Appends to PostgreSQL: many processes to one log, and one table for all logs against one each.

use std::{
    collections::{BTreeSet, HashMap},
    env,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use essentially_once::{Log as _, NewRecord, Record};
use essentially_once_postgres::{Pg, PgLog};
use test_servers::PostgresServer;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    PAYLOAD, Result,
    postgres::{connect, runtime},
};

#[derive(Args)]
pub(crate) struct AppendsArguments {
    /// What to measure.
    #[arg(default_value = "one-log")]
    what: What,
    /// How many processes append, or how many logs there are.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    appenders: u64,
    /// How many records each append has.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    records: u64,
    /// How many other transactions are open at each moment, for up to 5 s each.
    #[arg(long, default_value_t = 4)]
    open: u64,
    /// For how long.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Processes append to one log, sometimes in transactions that are rolled back, while other
    /// transactions of the database stay open for up to 5 s. Another process reads and checks the
    /// order.
    OneLog,
    /// SQL by hand, with a log for each connection: all records in one table, against a table for
    /// each log.
    Tables,
}

/// One of the appending processes. The command line of this program starts it.
#[derive(Args)]
pub(crate) struct Appender {
    url: String,
    number: u64,
    records: u64,
    seconds: u64,
}

pub(crate) fn measure(arguments: &AppendsArguments, rounds: u32) -> Result<()> {
    runtime()?.block_on(async {
        match arguments.what {
            What::OneLog => one_log(arguments).await,
            What::Tables => tables(arguments, rounds).await,
        }
    })
}

/// Appends until the time is over, and prints the number of records that were acknowledged.
pub(crate) fn append(appender: &Appender) -> Result<()> {
    runtime()?.block_on(async {
        let log = Pg::connect(&appender.url).await?.log("orders").await?;
        let mut client = connect(&appender.url).await?;
        let end = Instant::now() + Duration::from_secs(appender.seconds);
        let mut acknowledged = 0;
        for append in 0_u64.. {
            if Instant::now() >= end {
                break;
            }
            let records: Vec<NewRecord> = (acknowledged..acknowledged + appender.records)
                .map(|n| NewRecord::new(payload(appender.number, n)))
                .collect();
            match append % 10 {
                // As a service does that is not a consumer.
                8 => {
                    let tx = client.transaction().await?;
                    log.append_in(&tx, &records).await?;
                    tx.commit().await?;
                }
                9 => {
                    let tx = client.transaction().await?;
                    log.append_in(&tx, &records).await?;
                    tx.rollback().await?;
                    continue;
                }
                _ => drop(log.append(&records).await?),
            }
            acknowledged += appender.records;
        }
        println!("{acknowledged}");
        Ok(())
    })
}

/// 100 bytes that begin with the appender and its number.
fn payload(appender: u64, n: u64) -> Vec<u8> {
    let mut payload = PAYLOAD.to_vec();
    payload[..8].copy_from_slice(&appender.to_be_bytes());
    payload[8..16].copy_from_slice(&n.to_be_bytes());
    payload
}

async fn one_log(arguments: &AppendsArguments) -> Result<()> {
    let server = PostgresServer::start()?;
    let log = Pg::connect(&server.url()).await?.log("orders").await?;
    connect(&server.url())
        .await?
        .batch_execute("CREATE TABLE elsewhere (n bigint)")
        .await?;
    let done = CancellationToken::new();
    let mut others = JoinSet::new();
    for number in 0..arguments.open {
        others.spawn(stay_open(server.url(), number, done.clone()));
    }
    let mut appending = JoinSet::new();
    let begun = Instant::now();
    for number in 0..arguments.appenders {
        let words = [
            "appender".to_owned(),
            server.url(),
            number.to_string(),
            arguments.records.to_string(),
            arguments.seconds.to_string(),
        ];
        let child = Command::new(env::current_exe()?)
            .args(words)
            .stdout(Stdio::piped())
            .spawn()?;
        appending.spawn_blocking(move || child.wait_with_output());
    }
    let reading = tokio::spawn(read(log, done.clone()));
    let mut acknowledged = 0;
    while let Some(output) = appending.join_next().await {
        let output = output??;
        if !output.status.success() {
            return Err(format!("an appender ended with {}", output.status).into());
        }
        acknowledged += String::from_utf8(output.stdout)?.trim().parse::<u64>()?;
    }
    let took = begun.elapsed();
    done.cancel();
    let (read, longest) = reading.await??;
    while let Some(other) = others.join_next().await {
        other??;
    }
    if read != acknowledged {
        return Err(format!("{read} records were read and {acknowledged} were acknowledged").into());
    }
    println!(
        "{} processes, {} records per append: {:.0} records/s; {read} records read in the order of their appends, \
         without a gap; the reader waited for at most {longest:.1?}",
        arguments.appenders,
        arguments.records,
        acknowledged as f64 / took.as_secs_f64(),
    );
    Ok(())
}

/// Transactions that have written and read something, and stay open for up to 5 s.
async fn stay_open(url: String, number: u64, done: CancellationToken) -> Result<()> {
    let mut client = connect(&url).await?;
    for round in 0_u64.. {
        if done.is_cancelled() {
            break;
        }
        let tx = client.transaction().await?;
        tx.batch_execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            .await?;
        tx.execute("INSERT INTO elsewhere VALUES ($1)", &[&(number as i64)])
            .await?;
        tx.query("SELECT count(*) FROM essentially_once.logs", &[]).await?;
        let open = Duration::from_millis((number * 1_733 + round * 1_237) % 5_000);
        // The last ones end with the measurement.
        let _ = tokio::time::timeout(open, done.cancelled()).await;
        match (number + round) % 2 {
            0 => tx.commit().await?,
            _ => tx.rollback().await?,
        }
    }
    Ok(())
}

/// Reads to the end of what was appended. Returns the number of records, and the longest wait for
/// the next ones.
async fn read(log: PgLog, done: CancellationToken) -> Result<(u64, Duration)> {
    let mut reader = log.read(0.into()).await?;
    let (mut next, mut longest) = (0_u64, Duration::ZERO);
    let mut appenders = HashMap::<u64, u64>::new();
    loop {
        if done.is_cancelled() && log.bounds().await?.end == next.into() {
            return Ok((next, longest));
        }
        let begun = Instant::now();
        let records = tokio::select! {
            records = reader.next(1_000) => records?,
            () = done.cancelled(), if !done.is_cancelled() => continue,
        };
        // The first records come when the appenders have started.
        if next > 0 {
            longest = longest.max(begun.elapsed());
        }
        for record in records {
            if record.offset != next.into() {
                return Err(format!("a gap: expected offset {next}, found {}", record.offset).into());
            }
            next += 1;
            let (appender, n) = numbers(&record)?;
            let expected = appenders.entry(appender).or_default();
            if n != *expected {
                return Err(format!("appender {appender}: expected record {expected}, found {n}").into());
            }
            *expected += 1;
        }
    }
}

/// What [`payload`] has written.
fn numbers(record: &Record) -> Result<(u64, u64)> {
    let number = |bytes: &[u8]| bytes.try_into().map(u64::from_be_bytes);
    Ok((number(&record.payload[..8])?, number(&record.payload[8..16])?))
}

/// The ratio of one table to a table per log, for appends and for reading everything in order.
async fn tables(arguments: &AppendsArguments, rounds: u32) -> Result<()> {
    let server = PostgresServer::start()?;
    let client = connect(&server.url()).await?;
    client
        .batch_execute("CREATE TABLE logs (id bigint PRIMARY KEY, next bigint NOT NULL)")
        .await?;
    println!("{rounds} rounds; records/s are medians, the ratio is one table / a table per log, round by round");
    println!("| | a table per log, records/s | one table, records/s | ratio, median | min | max |");
    println!("|---|---|---|---|---|---|");
    let mut figures = [const { Vec::new() }; 2];
    for round in 0..rounds {
        let mut speeds = [[0.0; 2]; 2];
        for is_shared in [round % 2 == 0, round % 2 != 0] {
            speeds[usize::from(is_shared)] = fill_and_read(&server.url(), arguments, is_shared).await?;
        }
        for (which, figures) in figures.iter_mut().enumerate() {
            figures.push((speeds[0][which], speeds[1][which]));
        }
    }
    for (label, figures) in ["append", "read"].iter().zip(&figures) {
        let median = |of: fn(&(f64, f64)) -> f64| {
            let mut all: Vec<f64> = figures.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            (all[all.len() / 2], all[0], all[all.len() - 1])
        };
        let (each, ..) = median(|(each, _)| *each);
        let (shared, ..) = median(|(_, shared)| *shared);
        let (ratio, min, max) = median(|(each, shared)| shared / each);
        println!("| {label} | {each:.0} | {shared:.0} | {ratio:.2} | {min:.2} | {max:.2} |");
    }
    Ok(())
}

/// Fills the logs and reads them. Returns the records per second of both.
async fn fill_and_read(url: &str, arguments: &AppendsArguments, is_shared: bool) -> Result<[f64; 2]> {
    let client = connect(url).await?;
    let table = |log: u64| match is_shared {
        true => "records".to_owned(),
        false => format!("records_{log}"),
    };
    let (column, key) = match is_shared {
        true => ("log bigint NOT NULL, ", "log, place"),
        false => ("", "place"),
    };
    let logs = 0..arguments.appenders;
    let tables: BTreeSet<String> = logs.clone().map(table).collect();
    for table in &tables {
        let sql = format!("CREATE TABLE {table} ({column}place bigint, payload bytea NOT NULL, PRIMARY KEY ({key}))");
        client.batch_execute(&sql).await?;
    }
    let ids: Vec<i64> = logs.clone().map(|log| log as i64).collect();
    client
        .execute("INSERT INTO logs SELECT id, 0 FROM unnest($1::bigint[]) AS id", &[&ids])
        .await?;
    let total = |counts: &[u64]| counts.iter().sum::<u64>() as f64;
    let begun = Instant::now();
    let end = begun + Duration::from_secs(arguments.seconds);
    let mut filling = JoinSet::new();
    for log in logs.clone() {
        filling.spawn(fill(url.to_owned(), log, table(log), is_shared, arguments.records, end));
    }
    let counts = filling.join_all().await.into_iter().collect::<Result<Vec<u64>>>()?;
    let appended = total(&counts) / begun.elapsed().as_secs_f64();
    // Without statistics, the planner may sort the whole table for each read.
    client.batch_execute("ANALYZE").await?;
    let begun = Instant::now();
    let mut reading = JoinSet::new();
    for log in logs {
        reading.spawn(read_all(url.to_owned(), log, table(log), is_shared));
    }
    let read = reading.join_all().await.into_iter().collect::<Result<Vec<u64>>>()?;
    if total(&read) != total(&counts) {
        return Err("not all records were read: the measurement is invalid".into());
    }
    let reads = total(&read) / begun.elapsed().as_secs_f64();
    let tables: Vec<&str> = tables.iter().map(String::as_str).collect();
    client
        .batch_execute(&format!("DROP TABLE {}; DELETE FROM logs", tables.join(", ")))
        .await?;
    Ok([appended, reads])
}

async fn fill(url: String, log: u64, table: String, is_shared: bool, records: u64, end: Instant) -> Result<u64> {
    let client = connect(&url).await?;
    let (columns, values) = match is_shared {
        true => ("log, place, payload", "$1, "),
        false => ("place, payload", ""),
    };
    let sql = format!(
        "WITH log AS (UPDATE logs SET next = next + $2 WHERE id = $1 RETURNING next)
         INSERT INTO {table} ({columns})
         SELECT {values}log.next - $2 + r.place - 1, r.payload
         FROM log, unnest($3::bytea[]) WITH ORDINALITY AS r (payload, place)"
    );
    let append = client.prepare(&sql).await?;
    let payloads = vec![PAYLOAD.as_slice(); records as usize];
    let mut count = 0;
    while Instant::now() < end {
        client
            .execute(&append, &[&(log as i64), &(records as i64), &payloads])
            .await?;
        count += records;
    }
    Ok(count)
}

async fn read_all(url: String, log: u64, table: String, is_shared: bool) -> Result<u64> {
    let client = connect(&url).await?;
    let condition = if is_shared {
        format!("log = {log} AND ")
    } else {
        String::new()
    };
    let sql = format!("SELECT place, payload FROM {table} WHERE {condition}place >= $1 ORDER BY place LIMIT 1000");
    let select = client.prepare(&sql).await?;
    let mut next = 0_i64;
    loop {
        let rows = client.query(&select, &[&next]).await?;
        let Some(last) = rows.last() else {
            return Ok(next as u64);
        };
        next = last.get::<_, i64>(0) + 1;
    }
}
