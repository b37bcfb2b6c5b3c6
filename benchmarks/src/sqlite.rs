//! SQLite: the same work by hand and through the library. Times cover only the consuming. Both
//! sides check the counter.

use std::{
    ops::Range,
    path::Path,
    time::{Duration, Instant},
};

use essentially_once::{Consumer, ConsumerId, Handler, HandlerError, Log, Record, async_trait};
use essentially_once_sqlite::{
    Sqlite, SqliteTx,
    rusqlite::{Connection, params},
};
use tempfile::TempDir;

use crate::{Contest, Result, Row, Rules, by_batch};

pub(crate) const COUNT: &str = "UPDATE counter SET n = n + 1 WHERE id = ?1";

/// Records per append on both sides. This determines the size of the WAL file when the measurement
/// begins, and overwriting a file is faster than growing it.
const FILL: usize = 10_000;

/// Fresh files in one folder.
pub(crate) struct Files {
    pub(crate) folder: TempDir,
    pub(crate) counters: u64,
}

impl Contest for Files {
    fn rows(&self, rules: &Rules<'_>) -> Vec<Row> {
        by_batch(rules, |batch| match batch {
            1 => 4_000,
            10 => 30_000,
            100 => 150_000,
            _ => 300_000,
        })
    }

    fn by_hand(&self, name: &str, row: &Row) -> Result<Duration> {
        by_hand(&self.folder.path().join(name), row, self.counters)
    }

    fn ours(&self, name: &str, row: &Row) -> Result<Duration> {
        ours(&self.folder.path().join(name), row, self.counters)
    }
}

fn by_hand(path: &Path, row: &Row, counters: u64) -> Result<Duration> {
    let (records, batch) = (row.records, row.batch.size());
    let mut connection = open_by_hand(path, counters.min(records))?;
    connection.execute_batch("CREATE TABLE log (\"offset\" INTEGER PRIMARY KEY, payload BLOB NOT NULL)")?;
    for first in (0..records).step_by(FILL) {
        let fill = connection.transaction()?;
        {
            let mut insert = fill.prepare_cached("INSERT INTO log VALUES (?1, ?2)")?;
            for offset in first..records.min(first + FILL as u64) {
                insert.execute(params![offset as i64, row.payload])?;
            }
        }
        fill.commit()?;
    }

    let started = Instant::now();
    consume_by_hand(&connection, "log", batch, counters, |rows| {
        assert!(rows.iter().all(|(_, payload)| payload.len() == row.payload.len()));
        !rows.is_empty()
    })?;
    let time = started.elapsed();
    check(&connection, records)?;
    Ok(time)
}

/// The loop that a user writes without a library: select a batch, update the counter for each
/// record, move the offset, commit. `committed` gets the rows of each batch, even if there are
/// none, and returns whether to go on.
pub(crate) fn consume_by_hand(
    connection: &Connection,
    log: &str,
    batch: usize,
    counters: u64,
    mut committed: impl FnMut(&[(i64, Vec<u8>)]) -> bool,
) -> Result<()> {
    let select = format!("SELECT \"offset\", payload FROM {log} WHERE \"offset\" >= ?1 LIMIT ?2");
    let mut select = connection.prepare(&select)?;
    let mut count = connection.prepare(COUNT)?;
    let mut advance = connection.prepare("UPDATE position SET next = ?1 WHERE id = 1")?;
    let mut begin = connection.prepare("BEGIN IMMEDIATE")?;
    let mut commit = connection.prepare("COMMIT")?;
    let mut next: i64 = connection.query_row("SELECT next FROM position WHERE id = 1", [], |row| row.get(0))?;
    let mut handled = 0;
    loop {
        let rows = select.query_map(params![next, batch as i64], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?))
        })?;
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        if let Some((last, _)) = rows.last() {
            next = last + 1;
            begin.execute([])?;
            for _ in &rows {
                count.execute([(handled % counters) as i64])?;
                handled += 1;
            }
            advance.execute([next])?;
            commit.execute([])?;
        }
        if !committed(&rows) {
            return Ok(());
        }
    }
}

/// Counts records and stores the offset after them in one transaction, for other loops by hand.
pub(crate) fn count_by_hand(connection: &mut Connection, numbers: Range<u64>, counters: u64, next: i64) -> Result<()> {
    let transaction = connection.transaction()?;
    {
        let mut update = transaction.prepare_cached(COUNT)?;
        for number in numbers {
            update.execute([(number % counters) as i64])?;
        }
    }
    transaction
        .prepare_cached("UPDATE position SET next = ?1 WHERE id = 1")?
        .execute([next])?;
    Ok(transaction.commit()?)
}

/// Counts each record in the next of its counters.
pub(crate) struct Count {
    counters: u64,
    handled: u64,
    /// The length of each payload.
    length: usize,
}

impl Count {
    pub(crate) fn new(counters: u64, length: usize) -> Self {
        Self {
            counters,
            handled: 0,
            length,
        }
    }
}

#[async_trait]
impl Handler<SqliteTx> for Count {
    async fn handle(&mut self, record: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        assert_eq!(record.payload.len(), self.length);
        tx.execute(COUNT, [(self.handled % self.counters) as i64])?;
        self.handled += 1;
        Ok(())
    }
}

/// The same work through the library.
fn ours(path: &Path, row: &Row, counters: u64) -> Result<Duration> {
    let records = row.records;
    let connection = Connection::open(path)?;
    create_counters(&connection, counters.min(records))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()?;
    let time = runtime.block_on(async {
        let sqlite = Sqlite::open(path).await?;
        let log = sqlite.log("bench").await?;
        for chunk in row.fill().chunks(FILL) {
            log.append(chunk).await?;
        }
        let started = Instant::now();
        let count = Count::new(counters, row.payload.len());
        let consumer = Consumer::essentially_once(ConsumerId::new("bench")?, log, sqlite.store(), count);
        tokio::spawn(row.batch.apply(consumer).run_until_caught_up()).await??;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(started.elapsed())
    })?;
    check(&connection, records)?;
    Ok(time)
}

/// A file with counters and a position, for a loop by hand.
pub(crate) fn open_by_hand(path: &Path, counters: u64) -> Result<Connection> {
    let connection = Connection::open(path)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")?;
    create_counters(&connection, counters)?;
    connection.execute_batch(
        "CREATE TABLE position (id INTEGER PRIMARY KEY, next INTEGER NOT NULL); INSERT INTO position VALUES (1, 0)",
    )?;
    Ok(connection)
}

/// Creates the counters from 0 on.
pub(crate) fn create_counters(connection: &Connection, counters: u64) -> Result<()> {
    connection.execute_batch("CREATE TABLE counter (id INTEGER PRIMARY KEY, n INTEGER NOT NULL)")?;
    let fill = "WITH RECURSIVE id (id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM id WHERE id < ?1 - 1)
         INSERT INTO counter SELECT id, 0 FROM id";
    connection.execute(fill, [counters as i64])?;
    Ok(())
}

pub(crate) fn check(connection: &Connection, records: u64) -> Result<()> {
    let counted: i64 = connection.query_row("SELECT sum(n) FROM counter", [], |row| row.get(0))?;
    if counted as u64 != records {
        return Err(format!("counted {counted} of {records} records: the measurement is invalid").into());
    }
    Ok(())
}
