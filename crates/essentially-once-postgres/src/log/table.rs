//! One log: its row, and what it says about a place.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use essentially_once::{
    Error, NewRecord, Offset,
    backend::{Bounds, LogId, Retention},
};

use super::{
    append::{APPEND, Columns},
    retention::{Trimmer, from_columns},
};
use crate::connection::Pool;

const STATUS: &str =
    "SELECT next, earliest, keep_records, keep_age_ms FROM {s}.logs WHERE id = $1 AND incarnation = $2";

/// How often appends remove expired records.
const TRIM_EVERY: Duration = Duration::from_secs(1);

/// One log.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) pool: Arc<Pool>,
    pub(super) id: LogId,
    pub(super) row: i64,
    trimmed: Mutex<Option<Instant>>,
}

/// What the row of a log says.
#[derive(Debug)]
pub(super) struct Status {
    pub(super) earliest: u64,
    pub(super) end: u64,
    pub(super) retention: Retention,
}

impl Status {
    pub(super) fn bounds(&self) -> Bounds {
        Bounds {
            earliest: self.earliest.into(),
            end: self.end.into(),
        }
    }
}

/// What a reader that found no record should do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// Read again: records arrived meanwhile. The log ends here.
    Readable(Offset),
    /// Wait for an append.
    AtEnd,
}

impl Table {
    pub(super) fn new(pool: Arc<Pool>, id: LogId, row: i64) -> Self {
        Self {
            pool,
            id,
            row,
            trimmed: Mutex::default(),
        }
    }

    pub(super) fn incarnation(&self) -> &str {
        self.id.incarnation().unwrap_or_default()
    }

    pub(super) fn action(&self, verb: &str) -> String {
        self.pool.on(format!("{verb} log {}", self.id))
    }

    /// Reads the log's row. `None` if the log was deleted or recreated since this handle opened it.
    async fn status(&self, verb: &str) -> Result<Option<Status>, Error> {
        let action = || self.action(verb);
        let mut session = self.pool.take(action).await?;
        let rows = self
            .pool
            .within(session.query_own(STATUS, &[&self.row, &self.incarnation()]))
            .await;
        let rows = rows.map_err(|fault| fault.of_read(action()))?;
        Ok(rows.first().map(|row| Status {
            end: row.get::<_, i64>(0) as u64,
            earliest: row.get::<_, i64>(1) as u64,
            retention: from_columns((row.get(2), row.get(3))),
        }))
    }

    pub(super) async fn current_status(&self, verb: &str) -> Result<Status, Error> {
        self.status(verb).await?.ok_or_else(|| self.gone(verb))
    }

    pub(super) fn gone(&self, verb: &str) -> Error {
        Error::failed(
            self.action(verb),
            "the log was deleted or recreated after this handle opened it; open it again",
        )
    }

    /// Decides whether a reader at `requested` has records to read, must wait, or can never
    /// continue.
    pub(super) async fn standing(&self, requested: Offset) -> Result<Standing, Error> {
        let Some(status) = self.status("read").await? else {
            return Err(Error::OutOfRange {
                log: self.id.clone(),
                requested,
                end: Offset::ZERO,
            });
        };
        let bounds = status.bounds();
        bounds.check(&self.id, requested)?;
        Ok(match requested == bounds.end {
            true => Standing::AtEnd,
            false => Standing::Readable(bounds.end),
        })
    }

    /// Appends the records, and returns the offset of the last one.
    pub(super) async fn append(&self, records: &[NewRecord]) -> Result<Offset, Error> {
        const VERB: &str = "append to";
        let action = || self.action(VERB);
        let mut session = self.pool.take(action).await?;
        let columns = Columns::of(records).with_origins(records);
        let incarnation = self.incarnation();
        let statement = self.pool.within(session.own(APPEND)).await;
        let statement = statement.map_err(|fault| fault.of_read(action()))?;
        let params = columns.params(&self.row, &incarnation);
        let rows = self.pool.within(session.query(&statement, &params)).await;
        let rows = rows.map_err(|fault| fault.of_write(action()))?;
        let Some(row) = rows.first() else {
            return Err(self.gone(VERB));
        };
        self.pool.bell.ring(&self.pool, [self.row].into_iter());
        if row.get(1) {
            self.trim_soon();
        }
        Ok((row.get::<_, i64>(0) as u64 - 1).into())
    }

    pub(super) fn trimmer(&self) -> Trimmer {
        Trimmer {
            pool: Arc::clone(&self.pool),
            row: self.row,
            incarnation: self.incarnation().to_owned(),
        }
    }

    /// Removes some expired records in the background, if that was not done a moment ago.
    fn trim_soon(&self) {
        let mut trimmed = self.trimmed.lock().unwrap_or_else(PoisonError::into_inner);
        if trimmed.is_some_and(|trimmed| trimmed.elapsed() < TRIM_EVERY) {
            return;
        }
        *trimmed = Some(Instant::now());
        let (trimmer, id) = (self.trimmer(), self.id.clone());
        tokio::spawn(async move {
            let action = || trimmer.pool.on(format!("trim log {id}"));
            let trimmed = async {
                let mut session = trimmer.pool.take(action).await?;
                while trimmer
                    .expire(&mut session)
                    .await
                    .map_err(|fault| fault.of_read(action()))?
                    .1
                {}
                Ok::<_, Error>(())
            };
            if let Err(error) = trimmed.await {
                tracing::warn!(%error, "expired records were not removed; the next append tries again");
            }
        });
    }
}
