//! The price of dead letters on SQLite: of records that are parked, of many letters in the file,
//! and of what an operator does to many of them.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use essentially_once::{
    Consumer, ConsumerId, Handler, HandlerError, Log as _, NewRecord, Record, StartAt, async_trait,
    consumer::{
        DeadLetterOptions, Operator, Report,
        dead_letters::{self, LetterFilter},
    },
    seek,
};
use essentially_once_sqlite::{Sqlite, SqliteTx, rusqlite::Connection};
use tempfile::TempDir;

use crate::{Result, median};

/// The number of records, and of every how many one is rejected.
const REJECTED: [(u64, Option<u64>); 3] = [(20_000, None), (20_000, Some(1_000)), (20_000, Some(100))];

/// Letters in the file when a consumer starts.
const WAITING: [u64; 3] = [0, 10_000, 1_000_000];

/// Records that such a consumer then handles.
const RECORDS: u64 = 20_000;

/// Letters that an operator retries and discards, next to as many that the filter leaves out.
const SELECTED: u64 = 100_000;

/// Counts records, and rejects some.
struct Count {
    rejects_every: Option<u64>,
    /// When the first and the last record came. The end of a run also frees what it knew about
    /// letters.
    came: Arc<Mutex<Option<(Instant, Instant)>>>,
}

#[async_trait]
impl Handler<SqliteTx> for Count {
    async fn handle(&mut self, record: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        let now = Instant::now();
        let mut came = self.came.lock().unwrap_or_else(PoisonError::into_inner);
        *came = Some((came.map_or(now, |(first, _)| first), now));
        drop(came);
        if self
            .rejects_every
            .is_some_and(|every| record.offset.lo() % every == every / 2)
        {
            return Err(HandlerError::reject("every so often"));
        }
        tx.execute("UPDATE counter SET n = n + 1", [])?;
        Ok(())
    }
}

pub(crate) fn measure(rounds: u32, folder: &TempDir) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    println!("{rounds} rounds; SQLite, batches of 100, every record has a key of its own");
    println!("| rejected and parked | records/s, median | relative to none |");
    println!("|---|---:|---:|");
    let mut none = None;
    for (records, every) in REJECTED {
        let mut rates = Vec::new();
        for round in 0..rounds {
            let path = folder
                .path()
                .join(format!("rejected-{}-{round}.db", every.unwrap_or(0)));
            let (report, start, rest) = runtime.block_on(consume(&path, records, every, 0))?;
            let seconds = start + rest;
            let parked = every.map_or(0, |every| records / every);
            if (report.handled, report.parked) != (records - parked, parked) {
                return Err(format!("{report}").into());
            }
            rates.push(records as f64 / seconds);
        }
        let rate = median(&mut rates);
        let none = *none.get_or_insert(rate);
        let label = every.map_or("none".into(), |every| format!("1 in {every}"));
        println!("| {label} | {rate:.0} | {:.2} |", rate / none);
    }
    println!();
    println!("| letters in the file | start up to the first record, s | {RECORDS} records of other keys, records/s |");
    println!("|---:|---:|---:|");
    for letters in WAITING {
        let path = folder.path().join(format!("waiting-{letters}.db"));
        let (mut starts, mut rates) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            let letters = if round == 0 { letters } else { 0 };
            let (report, start, rest) = runtime.block_on(consume(&path, RECORDS, None, letters))?;
            if report.handled != RECORDS {
                return Err(format!("{report}").into());
            }
            starts.push(start);
            rates.push(RECORDS as f64 / rest);
        }
        let (start, rate) = (median(&mut starts), median(&mut rates));
        println!("| {letters} | {start:.2} | {rate:.0} |");
    }
    println!();
    println!("| {SELECTED} of {} letters, by a filter | s, median |", 2 * SELECTED);
    println!("|---|---:|");
    let (mut retried, mut discarded) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let path = folder.path().join(format!("selected-{round}.db"));
        let (retry, discard) = runtime.block_on(change_many(&path))?;
        retried.push(retry);
        discarded.push(discard);
    }
    println!("| retried | {:.2} |", median(&mut retried));
    println!("| discarded | {:.2} |", median(&mut discarded));
    Ok(())
}

/// Retries and then discards the letters with one reason. Returns how long each took, in seconds.
async fn change_many(path: &Path) -> Result<(f64, f64)> {
    let sqlite = Sqlite::open(path).await?;
    let (log, store) = (sqlite.log("orders").await?, sqlite.store());
    let (shipping, by) = (ConsumerId::new("shipping")?, Operator::new("benchmark"));
    // Its first position.
    seek(&shipping, &log, &store, StartAt::Earliest, &by).await?;
    add_letters(&Connection::open(path)?, 2 * SELECTED)?;
    let odd = LetterFilter::all().reason("odd");
    let started = Instant::now();
    let retried = dead_letters::retry_all(&shipping, &store, &odd, &by).await?;
    let retry = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let discarded = dead_letters::discard_all(&shipping, &store, &odd, &by).await?;
    let discard = started.elapsed().as_secs_f64();
    if (retried, discarded) != (SELECTED, SELECTED) {
        return Err(format!("{retried} letters were retried, and {discarded} discarded").into());
    }
    Ok((retry, discard))
}

/// Adds letters at offsets that the log never reaches, each with a key that no record has.
fn add_letters(user: &Connection, letters: u64) -> Result<()> {
    user.execute(
        "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?1)
         INSERT INTO essentially_once_letters
             SELECT 'shipping', unhex(printf('%016X%016X', 1, n)), 1, n, 0, CAST('letter ' || n AS BLOB), NULL, x'00',
                 NULL, NULL, NULL, 1, iif(n % 2, 'odd', 'even'), 'why', 0, 0, NULL, 1, x'' FROM n",
        [letters as i64],
    )?;
    Ok(())
}

/// Appends records, adds letters, and consumes. Returns the report, and how long it took up to the
/// first record and from there to the last one, in seconds.
async fn consume(path: &Path, records: u64, rejects_every: Option<u64>, letters: u64) -> Result<(Report, f64, f64)> {
    let user = Connection::open(path)?;
    user.execute_batch(
        "CREATE TABLE IF NOT EXISTS counter (n INTEGER);
         INSERT INTO counter SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM counter)",
    )?;
    let sqlite = Sqlite::open(path).await?;
    let log = sqlite.log("orders").await?;
    for chunk in 0..records.div_ceil(1_000) {
        let numbers = chunk * 1_000..records.min((chunk + 1) * 1_000);
        let records: Vec<_> = numbers.map(|n| NewRecord::new("an order").key(n.to_string())).collect();
        log.append(&records).await?;
    }
    if letters > 0 {
        add_letters(&user, letters)?;
    }
    let came = Arc::default();
    let handler = Count {
        rejects_every,
        came: Arc::clone(&came),
    };
    let consumer = Consumer::essentially_once(ConsumerId::new("shipping")?, log, sqlite.store(), handler)
        .max_batch(100)
        .dead_letters(DeadLetterOptions::new().limit(2_000_000));
    let started = Instant::now();
    let report = consumer.run_until_caught_up().await?;
    let came = *came.lock().unwrap_or_else(PoisonError::into_inner);
    let (first, last) = came.ok_or("it handled nothing")?;
    Ok((report, (first - started).as_secs_f64(), (last - first).as_secs_f64()))
}
