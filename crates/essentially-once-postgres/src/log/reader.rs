//! Reads a log in order and without holes, and wakes soon after an append.

use std::{collections::VecDeque, future::Future, mem, pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use essentially_once::{
    Error, Record,
    backend::{FetchBudget, LogReader, NumberingCache},
};
use tokio::{sync::watch, time};
use tokio_postgres::Row;

use super::{
    codec::Decoder,
    table::{Standing, Table},
};
use crate::{
    connection::{Lease, Param},
    error::Fault,
};

/// How often to look for records when other processes can say that there are some.
const POLL_SELDOM: Duration = Duration::from_millis(200);

/// How often to look when they cannot.
const POLL_OFTEN: Duration = Duration::from_millis(10);

/// The most records of a fetch. So many do not fit into the number of bytes.
const MOST: i64 = FetchBudget::BYTES as i64 / 100;

/// The next records, as many as fit into the number of bytes, but at least one. Nothing if the log
/// was deleted or recreated, or if its retention has passed the place.
const FETCH: &str = "SELECT \"offset\", appended_at, key, headers, payload, producer, sequence FROM (
         SELECT *, sum(octet_length(payload) + coalesce(octet_length(key), 0) + coalesce(octet_length(headers), 0) + 100)
             OVER (ORDER BY \"offset\") AS bytes
         FROM (SELECT * FROM {s}.records WHERE log = $1 AND \"offset\" >= $2 ORDER BY \"offset\" LIMIT $3) AS first
     ) AS sized
     WHERE (bytes <= $4 OR \"offset\" = $2)
         AND EXISTS (SELECT 1 FROM {s}.logs WHERE id = $1 AND incarnation = $5 AND earliest <= $2)
     ORDER BY \"offset\"";

/// The same records, if all of them fit into the number of bytes, and otherwise nothing. The server
/// takes half as long for it. It also reads no further than to the end of the range, while without
/// statistics of the table it may sort all that follows for a `LIMIT`.
const FETCH_ALL: &str = "SELECT \"offset\", appended_at, key, headers, payload, producer, sequence FROM {s}.records
     WHERE log = $1 AND \"offset\" >= $2 AND \"offset\" < $3
         AND (SELECT sum(octet_length(payload) + coalesce(octet_length(key), 0) + coalesce(octet_length(headers), 0) + 100)
             FROM {s}.records WHERE log = $1 AND \"offset\" >= $2 AND \"offset\" < $3) <= $4
         AND EXISTS (SELECT 1 FROM {s}.logs WHERE id = $1 AND incarnation = $5 AND earliest <= $2)
     ORDER BY \"offset\"";

/// A fetch that goes on while nobody waits for it.
type Fetch = Pin<Box<dyn Future<Output = Result<Vec<Row>, Error>> + Send>>;

/// A reader. Between two calls it holds no session.
pub(super) struct PgReader {
    table: Arc<Table>,
    wake: watch::Receiver<()>,
    /// The offset of the next record to fetch.
    next: u64,
    /// A call that was dropped leaves its fetch to the next one.
    fetch: Option<Fetch>,
    fetched: VecDeque<Record>,
    /// Whether the last fetch found nothing, although the log goes on: somebody may have deleted
    /// the rows.
    was_missing: bool,
    numberings: NumberingCache,
    bytes: usize,
}

impl PgReader {
    pub(super) fn new(table: Arc<Table>, next: u64) -> Self {
        Self {
            wake: table.pool.bell.subscribe(table.row),
            table,
            next,
            fetch: None,
            fetched: VecDeque::new(),
            was_missing: false,
            numberings: NumberingCache::new(),
            bytes: 0,
        }
    }

    /// Fetches records, unless some are there.
    async fn look(&mut self, max: usize) -> Result<(), Error> {
        if self.fetch.is_none() {
            self.wake.borrow_and_update();
            let (table, next) = (Arc::clone(&self.table), self.next);
            let limit = i64::try_from(max).unwrap_or(i64::MAX).min(MOST);
            self.fetch = Some(Box::pin(async move { fetch(&table, next, limit).await }));
        }
        let rows = match &mut self.fetch {
            Some(fetch) => fetch.as_mut().await,
            None => return Ok(()),
        };
        self.fetch = None;
        let rows = rows?;
        let Some(first) = rows.first() else {
            return Ok(());
        };
        let first = first.get::<_, i64>(0) as u64;
        if first != self.next {
            return Err(Error::Truncated {
                log: self.table.id.clone(),
                requested: self.next.into(),
                earliest: first.into(),
            });
        }
        let mut decoder = Decoder::new(self.bytes, &mut self.numberings);
        let mut budget = FetchBudget::new();
        for row in &rows {
            let record = decoder.record(row);
            // Rows after a hole are fetched again, and then reported as truncated.
            if record.offset != self.next.into() || !budget.admits(record.size() + mem::size_of::<Record>()) {
                break;
            }
            self.fetched.push_back(record);
            self.next += 1;
        }
        self.bytes = decoder.buffered();
        Ok(())
    }

    /// Waits for an append, or until it is time to look.
    async fn changed(&mut self) {
        let bell = &self.table.pool.bell;
        bell.keep_running(&self.table.pool);
        let poll = match bell.is_listening() {
            true => POLL_SELDOM,
            false => POLL_OFTEN,
        };
        tokio::select! {
            biased;
            // The sender may be gone, and then only looking helps.
            Ok(()) = self.wake.changed() => {}
            () = time::sleep(poll) => {}
        }
    }
}

/// Fetches up to `limit` records, first in the way that is fast unless they are large.
async fn fetch(table: &Table, next: u64, limit: i64) -> Result<Vec<Row>, Error> {
    let action = || table.pool.on(format!("read log {}", table.id));
    let mut session: Lease = table.pool.take(action).await?;
    let (next, budget, incarnation) = (next as i64, FetchBudget::BYTES as i64, table.incarnation());
    let end = next.saturating_add(limit);
    let rows: Result<_, Fault> = async {
        let params: [Param<'_>; 5] = [&table.row, &next, &end, &budget, &incarnation];
        let rows = table.pool.within(session.query_own(FETCH_ALL, &params)).await?;
        if !rows.is_empty() {
            return Ok(rows);
        }
        let params: [Param<'_>; 5] = [&table.row, &next, &limit, &budget, &incarnation];
        table.pool.within(session.query_own(FETCH, &params)).await
    }
    .await;
    rows.map_err(|fault| fault.of_read(action()))
}

#[async_trait]
impl LogReader for PgReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        let max = max.max(1);
        loop {
            if !self.fetched.is_empty() {
                self.was_missing = false;
                let taken = self.fetched.len().min(max);
                return Ok(self.fetched.drain(..taken).collect());
            }
            self.look(max).await?;
            if !self.fetched.is_empty() {
                continue;
            }
            match self.table.standing(self.next.into()).await? {
                Standing::AtEnd => {
                    self.was_missing = false;
                    self.changed().await;
                }
                // They arrived after the fetch, unless the next one finds none either.
                Standing::Readable(_) if !self.was_missing => self.was_missing = true,
                Standing::Readable(end) => {
                    return Err(Error::Truncated {
                        log: self.table.id.clone(),
                        requested: self.next.into(),
                        earliest: end,
                    });
                }
            }
        }
    }
}
