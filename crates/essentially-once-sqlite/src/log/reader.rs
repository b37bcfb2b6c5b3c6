//! Reads a log in order and without holes, and wakes soon after an append.

use std::{
    mem,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use essentially_once::{
    Error, Record,
    backend::{FetchBudget, LogReader, NumberingCache},
};
use rusqlite::Connection;
use tokio::{
    sync::watch,
    task,
    time::{self, Instant},
};

use super::{
    codec::{Columns, Decoder},
    table::{Standing, Table},
    ticks::tick,
};
use crate::{
    connection::{
        Close, ReaderConnection,
        lock::lock,
        retry::{LONGEST_PAUSE, retry_busy},
    },
    error::{classify, closed_connection, is_busy},
};

/// How long to wait for a thread of the blocking pool before fetching on the caller's thread.
const POOL_PATIENCE: Duration = Duration::from_millis(20);

/// How often to check whether another process wrote to the file.
const POLL: Duration = Duration::from_millis(10);

/// How long after a record others are expected to arrive, so that the reader checks with each
/// [tick]. A check takes a few microseconds.
const BUSY: Duration = Duration::from_secs(1);

/// A fetch of at least this many records indicates a backlog, so the next fetch runs on another
/// thread.
const BACKLOG: usize = 64;

/// A reader with its own connection, which has no open transaction between calls.
///
/// With a backlog, the reader fetches on a thread of the blocking pool. That decodes records while
/// the task handles the previous ones. Without a backlog it fetches on the caller's thread, which
/// has less latency.
pub(super) struct SqliteReader {
    cursor: Arc<Mutex<Cursor>>,
    log: Arc<Table>,
    wake: watch::Receiver<()>,
    next: u64,
    has_backlog: bool,
    /// When a record was last found.
    found: Option<Instant>,
}

/// The half that queries SQLite. It does not store the reader's position, so an abandoned fetch
/// changes nothing.
pub(super) struct Cursor {
    log: Arc<Table>,
    /// `None` once the handle is closed.
    connection: Option<ReaderConnection>,
    /// The file's `data_version` before the reader found no records.
    version: i64,
    numberings: NumberingCache,
    /// The size of the last fetch, as an estimate for the next one.
    fetched_bytes: usize,
    fetched_records: usize,
}

enum Found {
    Records(Vec<Record>),
    Nothing(Result<Standing, Error>),
}

impl Cursor {
    pub(super) fn new(log: Arc<Table>, connection: ReaderConnection) -> Self {
        Self {
            log,
            connection: Some(connection),
            version: 0,
            numberings: NumberingCache::new(),
            fetched_bytes: 0,
            fetched_records: 0,
        }
    }

    fn connection(connection: &Option<ReaderConnection>) -> rusqlite::Result<&Connection> {
        connection.as_deref().ok_or_else(closed_connection)
    }

    /// Reads the records from `next` on, or the reason why there are none.
    fn look(&mut self, next: u64, max: usize) -> rusqlite::Result<Found> {
        let fetched = match self.fetch(next, max) {
            Ok(records) if !records.is_empty() => {
                let first = records[0].offset;
                if first == next.into() {
                    return Ok(Found::Records(records));
                }
                return Ok(Found::Nothing(Err(Error::Truncated {
                    log: self.log.id.clone(),
                    requested: next.into(),
                    earliest: first,
                })));
            }
            Err(error) if is_busy(&error) => return Err(error),
            fetched => fetched.map(|_| ()),
        };
        // The version must be read before the status, so that an append after the status changes
        // it.
        self.version = self.data_version()?;
        let status = self.log.status(Self::connection(&self.connection)?)?;
        let standing = self.log.standing(next.into(), status.as_ref());
        // A fetch fails if the table is gone. The standing reports that. Otherwise the fetch's own
        // error counts.
        if standing.is_ok() {
            fetched?;
        }
        Ok(Found::Nothing(standing))
    }

    /// Reads the records from `next` on, up to the first hole.
    fn fetch(&mut self, next: u64, max: usize) -> rusqlite::Result<Vec<Record>> {
        let mut statement = Self::connection(&self.connection)?.prepare_cached(self.log.fetch_sql())?;
        let limit = i64::try_from(max).unwrap_or(i64::MAX);
        let mut rows = statement.query((next as i64, limit, self.log.incarnation()))?;
        let mut decoder = Decoder::new(self.fetched_bytes, &mut self.numberings);
        let mut records = Vec::with_capacity(max.min(self.fetched_records));
        let mut budget = FetchBudget::new();
        let mut expected = None;
        while let Some(row) = rows.next()? {
            let columns = Columns::of(row)?;
            // The record's own size in memory counts too. Otherwise one fetch could return a
            // million empty records.
            let size = columns.size() + mem::size_of::<Record>();
            let after_a_hole = expected.is_some_and(|expected| columns.offset != expected);
            if after_a_hole || !budget.admits(size) {
                break;
            }
            records.push(decoder.record(&columns));
            expected = Some(columns.offset + 1);
        }
        self.fetched_bytes = decoder.buffered();
        self.fetched_records = records.len();
        Ok(records)
    }

    fn data_version(&self) -> rusqlite::Result<i64> {
        Self::connection(&self.connection)?
            .prepare_cached("PRAGMA main.data_version")?
            .query_row([], |row| row.get(0))
    }
}

impl Close for Mutex<Cursor> {
    fn close(&self) {
        lock(self).connection = None;
    }
}

impl SqliteReader {
    pub(super) fn new(log: Arc<Table>, cursor: Arc<Mutex<Cursor>>, next: u64) -> Self {
        Self {
            cursor,
            wake: log.wake.subscribe(),
            log,
            next,
            has_backlog: false,
            found: None,
        }
    }

    async fn look(&mut self, max: usize) -> Result<Found, Error> {
        self.wake.borrow_and_update();
        if self.has_backlog
            && let Some(found) = self.look_in_pool(max).await?
        {
            return Ok(found);
        }
        let (next, cursor) = (self.next, &self.cursor);
        let deadline = Instant::now() + self.log.connections.options.busy_timeout;
        let found = retry_busy(deadline, LONGEST_PAUSE, || lock(cursor).look(next, max)).await;
        found.map_err(|error| self.failed(error))
    }

    /// Fetches on a thread of the blocking pool. Returns `None` if no thread is free, or if the
    /// file is briefly locked.
    async fn look_in_pool(&self, max: usize) -> Result<Option<Found>, Error> {
        let next = self.next;
        // A queued fetch must not keep the connection open, and must not run after its caller gave
        // up.
        let (cursor, taken) = (Arc::downgrade(&self.cursor), Arc::new(AtomicBool::new(false)));
        let begun = Arc::clone(&taken);
        let mut fetch = task::spawn_blocking(move || {
            let cursor = cursor.upgrade()?;
            (!begun.swap(true, Ordering::Relaxed)).then(|| lock(&cursor).look(next, max))
        });
        let found = match time::timeout(POOL_PATIENCE, &mut fetch).await {
            Ok(found) => found,
            Err(_) if !taken.swap(true, Ordering::Relaxed) => return Ok(None),
            Err(_) => fetch.await,
        };
        match found {
            Ok(Some(Err(error))) if is_busy(&error) => Ok(None),
            Ok(Some(found)) => found.map(Some).map_err(|error| self.failed(error)),
            Ok(None) => Ok(None),
            Err(error) => Err(Error::unavailable(self.action(), error)),
        }
    }

    /// Waits for an append through this process, or a write to the file by another connection.
    async fn changed(&mut self) -> Result<(), Error> {
        loop {
            // The log holds the sender, so `Ok` always means an append.
            let expects = self.found.is_some_and(|found| found.elapsed() < BUSY);
            let pause = async {
                match expects {
                    // A thread that has stopped, such as after a fork, must not stop the reader.
                    true => drop(time::timeout(POLL, tick()).await),
                    false => time::sleep(POLL).await,
                }
            };
            tokio::select! {
                biased;
                Ok(()) = self.wake.changed() => return Ok(()),
                () = pause => {}
            }
            let cursor = lock(&self.cursor);
            match cursor.data_version() {
                Ok(version) if version == cursor.version => {}
                Ok(_) => return Ok(()),
                Err(error) if is_busy(&error) => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    fn failed(&self, error: rusqlite::Error) -> Error {
        classify(self.action(), error)
    }

    fn action(&self) -> String {
        self.log.connections.on(format!("read log {}", self.log.id))
    }
}

#[async_trait]
impl LogReader for SqliteReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        let max = max.max(1);
        loop {
            match self.look(max).await? {
                Found::Records(records) => {
                    self.has_backlog = records.len() >= BACKLOG;
                    self.found = Some(Instant::now());
                    // No await follows this change, so a dropped call loses no record.
                    self.next += records.len() as u64;
                    return Ok(records);
                }
                Found::Nothing(standing) => {
                    if standing? == Standing::AtEnd {
                        self.changed().await?;
                    }
                }
            }
        }
    }
}
