//! Reading a log: in order, without holes, and awake soon after an append.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use essentially_once::{Error, LogReader, ProducerId, Record};
use rusqlite::Connection;
use tokio::{
    sync::watch,
    time::{self, Instant},
};

use crate::{
    error::{classify, is_busy},
    log::{Inner, Standing},
    row::{Columns, Decoder},
    schema::internal,
    shared::retry_busy,
};

/// About how many bytes of records one `next` returns at most.
const FETCH_BYTES: usize = 1024 * 1024;

/// How often to ask whether another process wrote to the file.
const POLL: Duration = Duration::from_millis(10);

/// A reader with a connection of its own, on which no transaction stays open between calls.
pub(crate) struct SqliteReader {
    log: Arc<Inner>,
    connection: Connection,
    wake: watch::Receiver<()>,
    next: u64,
    /// The file's `data_version` before it was found that there is nothing to read.
    version: i64,
    producer: Option<ProducerId>,
    /// What the last fetch needed, as a guess at what the next one will.
    fetched_bytes: usize,
    fetched_records: usize,
}

enum Found {
    Records(Vec<Record>),
    Nothing(Result<Standing, Error>),
}

impl SqliteReader {
    pub(crate) fn new(log: Arc<Inner>, connection: Connection, next: u64) -> Self {
        Self {
            wake: log.wake.subscribe(),
            log,
            connection,
            next,
            version: 0,
            producer: None,
            fetched_bytes: 0,
            fetched_records: 0,
        }
    }

    /// The records from the wanted one on, or why there are none.
    fn look(&mut self, max: usize) -> rusqlite::Result<Found> {
        self.wake.borrow_and_update();
        let fetched = match self.fetch(max) {
            Ok(records) if !records.is_empty() => {
                let first = records[0].offset;
                if first == self.next.into() {
                    return Ok(Found::Records(records));
                }
                return Ok(Found::Nothing(Err(Error::Truncated {
                    log: self.log.id.clone(),
                    requested: self.next.into(),
                    earliest: first,
                })));
            }
            Err(error) if is_busy(&error) => return Err(error),
            fetched => fetched.map(|_| ()),
        };
        // In this order: what is appended after the status was read changes the version after it was.
        self.version = self.data_version()?;
        let standing = match self.log.status(&self.connection) {
            Ok(status) => self.log.standing(self.next.into(), status.as_ref()),
            Err(error) => return Err(error),
        };
        // A fetch fails where the table is gone: then the standing says so, or the fetch's error stands.
        if standing.is_ok() {
            fetched?;
        }
        Ok(Found::Nothing(standing))
    }

    /// The records from the wanted one on, up to the first hole.
    fn fetch(&mut self, max: usize) -> rusqlite::Result<Vec<Record>> {
        let mut statement = self.connection.prepare_cached(&self.log.sql.fetch)?;
        let limit = i64::try_from(max).unwrap_or(i64::MAX);
        let mut rows = statement.query((self.next as i64, limit, self.log.incarnation()))?;
        let mut decoder = Decoder::new(self.fetched_bytes, &mut self.producer);
        let mut records = Vec::with_capacity(max.min(self.fetched_records));
        let mut bytes = 0;
        let mut expected = None;
        while let Some(row) = rows.next()? {
            let columns = Columns::of(row)?;
            let size = columns.size();
            let behind_a_hole = expected.is_some_and(|expected| columns.offset != expected);
            if behind_a_hole || (!records.is_empty() && bytes + size > FETCH_BYTES) {
                break;
            }
            records.push(decoder.record(&columns));
            bytes += size;
            expected = Some(columns.offset + 1);
        }
        self.fetched_bytes = decoder.buffered();
        self.fetched_records = records.len();
        Ok(records)
    }

    fn data_version(&self) -> rusqlite::Result<i64> {
        self.connection
            .prepare_cached(internal!("PRAGMA main.data_version"))?
            .query_row([], |row| row.get(0))
    }

    /// Waits for an append through this handle, or a write to the file by anyone else.
    async fn changed(&mut self) -> Result<(), Error> {
        loop {
            // The log holds the sender, so an answer means that something was appended.
            if time::timeout(POLL, self.wake.changed()).await.is_ok() {
                return Ok(());
            }
            match self.data_version() {
                Ok(version) if version == self.version => {}
                Ok(_) => return Ok(()),
                Err(error) if is_busy(&error) => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    fn failed(&self, error: rusqlite::Error) -> Error {
        classify(self.log.shared.on(format!("read log {}", self.log.id)), error)
    }
}

#[async_trait]
impl LogReader for SqliteReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        let max = max.max(1);
        loop {
            let deadline = Instant::now() + self.log.shared.options.busy_timeout;
            let found = match retry_busy(deadline, || self.look(max)).await {
                Ok(found) => found,
                Err(error) => return Err(self.failed(error)),
            };
            match found {
                Found::Records(records) => {
                    // The only change of place, with no await behind it: a dropped call changed nothing.
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
