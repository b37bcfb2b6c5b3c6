//! The table of one log: its state, its SQL statements, and appends.

use std::{fmt, sync::Arc};

use essentially_once::{
    Error, NewRecord, Offset, Origin,
    backend::{Bounds, LogId, Numbering, Retention, encode_headers},
};
use rusqlite::{Connection, OptionalExtension, Statement, ToSql};
use tokio::sync::watch;

use super::{
    catalog::find,
    codec::COLUMNS,
    retention::{TrimStatements, from_columns, now_millis},
};
use crate::{
    connection::{Connections, WriteTx},
    error::{classify, is_busy},
};

/// The table of one log.
pub(crate) struct Table {
    pub(super) connections: Arc<Connections>,
    pub(super) id: LogId,
    sql: Statements,
    pub(super) wake: Arc<watch::Sender<()>>,
}

/// The SQL statements on one log's table.
struct Statements {
    insert: String,
    status: String,
    set_end: String,
    set_sender: String,
    fetch: String,
    trim: TrimStatements,
}

impl Statements {
    fn new(log: i64) -> Self {
        let table = format!("main.essentially_once_log_{log}");
        let update = "UPDATE main.essentially_once_logs";
        let row = format!("id = {log} AND incarnation = ?2");
        Self {
            insert: format!("INSERT INTO {table} ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"),
            status: format!(
                "SELECT next, keep_records, keep_age_ms,
                     (SELECT min(\"offset\") FROM {table} WHERE \"offset\" >= 0), (SELECT max(\"offset\") FROM {table}),
                     sender
                 FROM main.essentially_once_logs WHERE id = {log} AND incarnation = ?1"
            ),
            set_end: format!("{update} SET next = ?1 WHERE {row}"),
            set_sender: format!("{update} SET sender = ?1 WHERE {row}"),
            // Checks the log's row once per fetch, so that a recreated log is not read as the old
            // one.
            fetch: format!(
                "SELECT {COLUMNS} FROM {table}
                 WHERE \"offset\" >= ?1
                     AND EXISTS (SELECT 1 FROM main.essentially_once_logs WHERE id = {log} AND incarnation = ?3)
                 ORDER BY \"offset\" LIMIT ?2"
            ),
            trim: TrimStatements::new(&table),
        }
    }
}

/// The state of a log, read in one statement and therefore consistent.
#[derive(Debug)]
pub(super) struct Status {
    pub(super) earliest: u64,
    /// The last record's offset. `None` if the log is empty.
    pub(super) last: Option<u64>,
    pub(super) end: u64,
    pub(super) retention: Retention,
    /// The producer of the records that transactions send. `None` before the first one.
    pub(super) sender: Option<String>,
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
    /// Read again: records arrived meanwhile.
    Readable,
    /// Wait for an append.
    AtEnd,
}

impl Table {
    /// The table of the log with that row id.
    pub(super) fn new(connections: Arc<Connections>, id: LogId, row: i64) -> Self {
        Self {
            id,
            sql: Statements::new(row),
            wake: connections.file.appends(row),
            connections,
        }
    }

    /// The SQL that inserts a record. See [`Batch::insert`].
    pub(super) fn insert_sql(&self) -> &str {
        &self.sql.insert
    }

    /// The SQL that fetches records.
    pub(super) fn fetch_sql(&self) -> &str {
        &self.sql.fetch
    }

    pub(super) fn incarnation(&self) -> &str {
        self.id.incarnation().unwrap_or_default()
    }

    /// Reads the log's state. Returns `None` if the log was deleted or recreated since this handle
    /// opened it.
    pub(super) fn status(&self, connection: &Connection) -> rusqlite::Result<Option<Status>> {
        let read = connection.prepare_cached(&self.sql.status).and_then(|mut statement| {
            statement
                .query_row([self.incarnation()], |row| {
                    let (first, last): (Option<i64>, Option<i64>) = (row.get(3)?, row.get(4)?);
                    let first = first.map(|first| u64::try_from(first).unwrap_or(0));
                    let last = last.and_then(|last| u64::try_from(last).ok());
                    let next = u64::try_from(row.get::<_, i64>(0)?).unwrap_or(0);
                    // Rows inserted by hand count too, although they do not update `next`.
                    let end = last.map_or(next, |last| next.max(last + 1));
                    Ok(Status {
                        earliest: first.unwrap_or(end),
                        last,
                        end,
                        retention: from_columns((row.get(1)?, row.get(2)?)),
                        sender: row.get(5)?,
                    })
                })
                .optional()
        });
        match read {
            // The statement cannot be prepared without the log's table, so check whether the log
            // itself is gone.
            Err(error) if !is_busy(&error) => match find(connection, self.id.name())? {
                Some(found) if found.incarnation == self.incarnation() => Err(error),
                _ => Ok(None),
            },
            read => read,
        }
    }

    /// Decides whether a reader at `requested` has records to read, must wait, or can never
    /// continue.
    pub(super) fn standing(&self, requested: Offset, status: Option<&Status>) -> Result<Standing, Error> {
        let Some(status) = status else {
            // The log was deleted, or recreated with another incarnation.
            return Err(Error::OutOfRange {
                log: self.id.clone(),
                requested,
                end: Offset::ZERO,
            });
        };
        let bounds = status.bounds();
        bounds.check(&self.id, requested)?;
        if requested == bounds.end {
            return Ok(Standing::AtEnd);
        }
        if status.last.is_none_or(|last| requested > last.into()) {
            // The records before the end were deleted.
            return Err(Error::Truncated {
                log: self.id.clone(),
                requested,
                earliest: bounds.end,
            });
        }
        Ok(Standing::Readable)
    }

    /// Returns the log's state, or an error if the log is gone.
    fn require(&self, connection: &Connection, action: impl Fn() -> String) -> Result<Status, Error> {
        match self.status(connection) {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err(self.gone(self.connections.on(action()))),
            Err(error) => Err(classify(self.connections.on(action()), error)),
        }
    }

    pub(super) async fn current_status(&self, verb: &str) -> Result<Status, Error> {
        let action = || format!("{verb} log {}", self.id);
        let status = self
            .connections
            .read(action, |connection| self.status(connection))
            .await?;
        status.ok_or_else(|| self.gone(self.connections.on(action())))
    }

    pub(super) fn gone(&self, action: String) -> Error {
        Error::failed(
            action,
            "the log was deleted or recreated after this handle opened it; open it again",
        )
    }

    /// Appends in the open transaction, and commits it.
    pub(super) fn append(&self, tx: WriteTx, records: &[NewRecord]) -> Result<Offset, Error> {
        let action = || format!("append to log {}", self.id);
        let batch = Batch::new(self.require(tx.connection(), action)?);
        let end = self.insert(
            tx.connection(),
            batch,
            records,
            || self.connections.on(action()),
            classify,
        )?;
        tx.commit(|| self.connections.on(action()))?;
        self.wake.send_replace(());
        Ok((end - 1).into())
    }

    /// Inserts records in the open transaction, and returns the log's new end.
    pub(super) fn insert(
        &self,
        connection: &Connection,
        mut batch: Batch,
        records: &[NewRecord],
        action: impl Fn() -> String,
        classify: fn(String, rusqlite::Error) -> Error,
    ) -> Result<u64, Error> {
        batch.check_room(records.len() as u64, &action)?;
        let now = now_millis();
        let inserted = connection
            .prepare_cached(&self.sql.insert)
            .and_then(|mut insert| {
                records
                    .iter()
                    .try_for_each(|record| batch.insert(&mut insert, now, record))
            })
            .and_then(|()| self.finish(connection, &batch, batch.added(), now));
        match inserted {
            Ok(()) => Ok(batch.end),
            Err(error) => Err(explain_insert(&action, error, classify)),
        }
    }

    /// Stores where the log ends after a batch, and removes some of the expired records: more than
    /// the `added` ones, so that a backlog shrinks, but not all, so that appends stay fast.
    pub(super) fn finish(&self, connection: &Connection, batch: &Batch, added: u64, now: i64) -> rusqlite::Result<()> {
        self.set_end(connection, batch.end)?;
        let before = &batch.before;
        if before.retention != Retention::default() {
            let limit = 2 * added + 64;
            let held = before.earliest..batch.end;
            self.sql.trim.trim(connection, before.retention, held, now, limit)?;
        }
        Ok(())
    }

    /// Stores where the log ends.
    fn set_end(&self, connection: &Connection, end: u64) -> rusqlite::Result<()> {
        self.set(connection, &self.sql.set_end, end as i64)
    }

    /// Stores who sends the records of the log's transactions.
    pub(super) fn set_sender(&self, connection: &Connection, sender: &str) -> rusqlite::Result<()> {
        self.set(connection, &self.sql.set_sender, sender)
    }

    /// Changes the log's row. A change that was not made would use numbers again.
    fn set(&self, connection: &Connection, sql: &str, value: impl ToSql) -> rusqlite::Result<()> {
        match connection.prepare_cached(sql)?.execute((value, self.incarnation()))? {
            1 => Ok(()),
            rows => Err(rusqlite::Error::StatementChangedRows(rows)),
        }
    }

    /// Removes up to `limit` expired records in the open transaction, and commits it.
    pub(super) fn trim(&self, tx: WriteTx, limit: u64) -> Result<u64, Error> {
        let action = || format!("trim log {}", self.id);
        let status = self.require(tx.connection(), action)?;
        let held = status.earliest..status.end;
        // The end also counts rows that were inserted by hand, and may be removed now.
        let removed = self
            .set_end(tx.connection(), status.end)
            .and_then(|()| {
                let trim = &self.sql.trim;
                trim.trim(tx.connection(), status.retention, held, now_millis(), limit)
            })
            .map_err(|error| classify(self.connections.on(action()), error))?;
        tx.commit(|| self.connections.on(action()))?;
        Ok(removed)
    }

    /// Whether the log holds records before `offset`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] past the end.
    pub(super) fn holds_before(&self, offset: Offset, status: &Status) -> Result<bool, Error> {
        let bounds = status.bounds();
        bounds.check(&self.id, offset.max(bounds.earliest))?;
        Ok(offset > bounds.earliest)
    }

    /// Removes records before `offset` in the open transaction, up to `limit` offsets, and commits
    /// it.
    pub(super) fn remove_before(&self, tx: WriteTx, offset: Offset, limit: u64) -> Result<u64, Error> {
        let action = || format!("remove records from log {}", self.id);
        let status = self.require(tx.connection(), action)?;
        if !self.holds_before(offset, &status)? {
            return Ok(0);
        }
        let cut = offset.lo().min(status.earliest.saturating_add(limit));
        // As in `trim`.
        let removed = self
            .set_end(tx.connection(), status.end)
            .and_then(|()| self.sql.trim.remove_before(tx.connection(), cut))
            .map_err(|error| classify(self.connections.on(action()), error))?;
        tx.commit(|| self.connections.on(action()))?;
        Ok(removed)
    }
}

/// Records that an open transaction appends to one log.
#[derive(Debug)]
pub(super) struct Batch {
    before: Status,
    /// One past the last record.
    end: u64,
    /// The producer of all records. Their sequences are their offsets. `None` if each record keeps
    /// its own origin.
    sender: Option<String>,
    /// The numbering of the last record that kept its own, as text. Most records have that of the
    /// one before.
    numbering: Option<(Numbering, String)>,
}

impl Batch {
    /// Begins at the end of the log, and keeps the records' origins.
    pub(super) fn new(before: Status) -> Self {
        Self {
            end: before.end,
            before,
            sender: None,
            numbering: None,
        }
    }

    /// Begins at the end of the log, and gives each record an origin.
    pub(super) fn numbered(before: Status, sender: String) -> Self {
        Self {
            sender: Some(sender),
            ..Self::new(before)
        }
    }

    /// The number of records that were inserted.
    pub(super) fn added(&self) -> u64 {
        self.end - self.before.end
    }

    /// Refuses offsets that SQLite cannot store.
    pub(super) fn check_room(&self, records: u64, action: impl Fn() -> String) -> Result<(), Error> {
        if self.end.saturating_add(records) <= i64::MAX as u64 {
            return Ok(());
        }
        Err(Error::failed(
            action(),
            format!(
                "the next offset would be {}, but SQLite's largest is {}; use a new log",
                self.end,
                i64::MAX
            ),
        ))
    }

    /// Inserts a record with the statement of [`Table::insert_sql`].
    pub(super) fn insert(
        &mut self,
        statement: &mut Statement<'_>,
        now: i64,
        record: &NewRecord,
    ) -> rusqlite::Result<()> {
        let (producer, sequence) = match (&self.sender, &record.origin) {
            (Some(sender), _) => (Some(&**sender), Some(self.end)),
            (
                None,
                Some(Origin {
                    numbering, sequence, ..
                }),
            ) => {
                let shown = self.numbering.take().filter(|(shown, _)| shown == numbering);
                let (_, text) = self
                    .numbering
                    .insert(shown.unwrap_or_else(|| (numbering.clone(), numbering.to_string())));
                (Some(&**text), Some(*sequence))
            }
            (None, None) => (None, None),
        };
        let inserted = statement.execute((
            self.end as i64,
            now,
            record.key.as_deref(),
            encode_headers(&record.headers),
            &record.payload[..],
            producer,
            sequence.map(|sequence| sequence as i64),
        ))?;
        if inserted == 0 {
            return Err(rusqlite::Error::StatementChangedRows(0));
        }
        self.end += 1;
        Ok(())
    }
}

/// Explains why [`Batch::insert`] or [`Table::finish`] failed.
pub(super) fn explain_insert(
    action: impl Fn() -> String,
    error: rusqlite::Error,
    classify: fn(String, rusqlite::Error) -> Error,
) -> Error {
    match error {
        rusqlite::Error::StatementChangedRows(_) => Error::failed(
            action(),
            "a trigger on the log's table ignored the record (`RAISE(IGNORE)`); remove the trigger",
        ),
        error => classify(action(), error),
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("id", &self.id)
            .field("path", &self.connections.path)
            .finish_non_exhaustive()
    }
}
