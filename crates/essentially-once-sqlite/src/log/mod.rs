//! The log: one table per log, and one row that records where the log ends.

pub(crate) mod codec;
pub(crate) mod headers;
pub(crate) mod reader;
pub(crate) mod retention;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use essentially_once::{
    Error, Log, NewRecord, Offset,
    backend::{Bounds, Durability, LogId, LogReader, Retention},
};
use rusqlite::{Connection, OptionalExtension};
use tokio::sync::watch;

use crate::{
    connection::open,
    connection::{Shared, WriteTx, on_a_thread},
    error::{classify, is_busy},
    log::codec::COLUMNS,
    log::headers::encode_headers,
    log::reader::{Cursor, SqliteReader},
    log::retention::{from_columns, now_millis, to_columns, trim},
};

/// Appends up to this many records and bytes run on the caller's thread, which is faster than
/// handing them to another one.
const INLINE_RECORDS: usize = 256;
const INLINE_BYTES: usize = 1024 * 1024;

/// Records that [`SqliteLog::trim`] removes per transaction. The bound keeps other writers from
/// waiting long.
const TRIM_CHUNK: u64 = 10_000;

/// Settings for opening a log. See [`Sqlite::log_with`](crate::Sqlite::log_with).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LogOptions {
    existing: bool,
}

impl LogOptions {
    /// Creates the log if it is missing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fails if the log does not exist, instead of creating it. Without this, a consumer with a
    /// mistyped log name would wait on an empty log.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }
}

/// A log in a SQLite file. See [`Sqlite::log`](crate::Sqlite::log). Offsets are dense, begin at 0
/// and are never reused.
///
/// Each record is a row of the table `essentially_once_log_<id>`, with the id from
/// `essentially_once_logs`. Any tool may read the rows. The log also reads rows that were inserted
/// by hand, and yields a row that it cannot decode as malformed. The column `producer` holds the
/// producer's name, followed by `#` and the epoch unless it is the stable one, as in `web#17`.
/// Versions before 0.2 yield such a record as malformed rather than mix up epochs.
///
/// An append is one transaction, so a failed append leaves no records behind. An append within a
/// handler's transaction on the same file waits for the handler's own lock. It ends with
/// [`Error::Failed`] after the `busy_timeout`, and the error says what to do instead.
#[derive(Clone)]
pub struct SqliteLog {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) id: LogId,
    pub(crate) sql: Statements,
    pub(crate) wake: Arc<watch::Sender<()>>,
}

/// The SQL statements on one log's table.
pub(crate) struct Statements {
    insert: String,
    status: String,
    pub(crate) fetch: String,
    pub(crate) times: String,
    pub(crate) delete_before: String,
}

impl Statements {
    fn new(log: i64) -> Self {
        let table = format!("main.essentially_once_log_{log}");
        Self {
            insert: format!("INSERT INTO {table} ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"),
            status: format!(
                "SELECT next, keep_records, keep_age_ms,
                     (SELECT min(\"offset\") FROM {table} WHERE \"offset\" >= 0), (SELECT max(\"offset\") FROM {table})
                 FROM main.essentially_once_logs WHERE id = {log} AND incarnation = ?1"
            ),
            // Checks the log's row once per fetch, so that a recreated log is not read as the old
            // one.
            fetch: format!(
                "SELECT {COLUMNS} FROM {table}
                 WHERE \"offset\" >= ?1
                     AND EXISTS (SELECT 1 FROM main.essentially_once_logs WHERE id = {log} AND incarnation = ?3)
                 ORDER BY \"offset\" LIMIT ?2"
            ),
            times: format!(
                "SELECT \"offset\", appended_at FROM {table}
                 WHERE \"offset\" >= ?1 AND \"offset\" < ?2 ORDER BY \"offset\""
            ),
            delete_before: format!("DELETE FROM {table} WHERE \"offset\" < ?1"),
        }
    }
}

/// The state of a log, read in one statement and therefore consistent.
#[derive(Clone, Copy)]
pub(crate) struct Status {
    pub(crate) earliest: u64,
    /// The last record's offset. `None` if the log is empty.
    pub(crate) last: Option<u64>,
    pub(crate) end: u64,
    pub(crate) retention: Retention,
}

/// What a reader that found no record should do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Standing {
    /// Read again: records have arrived meanwhile.
    Before,
    /// Wait for an append.
    AtEnd,
}

impl SqliteLog {
    pub(crate) async fn open(shared: Arc<Shared>, name: &str, options: LogOptions) -> Result<Self, Error> {
        let id = LogId::new(name)?;
        let action = || format!("open log {name}");
        let found = match shared.read(action, |connection| find(connection, name)).await? {
            Some(found) => found,
            None if options.existing => {
                let names = shared.read(action, names).await?;
                return Err(Error::failed(shared.on(action()), no_such_log(&names)));
            }
            None => {
                let tx = shared.begin(action).await?;
                let found = create(tx.connection(), name).map_err(|error| classify(shared.on(action()), error))?;
                tx.commit(|| shared.on(action()))?;
                found
            }
        };
        Ok(Self {
            inner: Arc::new(Inner {
                id: id.with_incarnation(&found.1)?,
                sql: Statements::new(found.0),
                wake: shared.place.appends(found.0),
                shared,
            }),
        })
    }

    /// Sets what the log keeps. The file stores the setting, so it applies to appends of every
    /// process. Each append removes about twice as many expired records as it adds.
    /// [`trim`](Self::trim) removes all expired records at once.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] if the retention would keep no records. [`Error::Unavailable`] and
    /// [`Error::Failed`].
    pub async fn set_retention(&self, retention: Retention) -> Result<(), Error> {
        retention.check()?;
        retention.refuse_bytes("SQLite")?;
        let action = || format!("set retention of log {}", self.inner.id);
        let tx = self.inner.shared.begin(action).await?;
        self.inner.require(tx.connection(), action)?;
        let (records, age) = to_columns(retention);
        tx.connection()
            .execute(
                "UPDATE main.essentially_once_logs SET keep_records = ?1, keep_age_ms = ?2 \
                     WHERE name = ?3 AND incarnation = ?4",
                (records, age, self.inner.id.name(), self.inner.incarnation()),
            )
            .map_err(|error| classify(self.inner.shared.on(action()), error))?;
        tx.commit(|| self.inner.shared.on(action()))
    }

    /// Returns what the log keeps.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Failed`].
    pub async fn retention(&self) -> Result<Retention, Error> {
        Ok(self.inner.current_status("read retention of").await?.retention)
    }

    /// Removes all records that have expired under the log's retention, and returns their number.
    ///
    /// Dropping the future may leave some expired records in place.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Failed`].
    pub async fn trim(&self) -> Result<u64, Error> {
        let mut total = 0;
        loop {
            let tx = self
                .inner
                .shared
                .begin(|| format!("trim log {}", self.inner.id))
                .await?;
            let inner = Arc::clone(&self.inner);
            let removed = run_on_thread(self, "trim", move || inner.trim_chunk(tx)).await?;
            total += removed;
            if removed < TRIM_CHUNK {
                return Ok(total);
            }
        }
    }
}

impl Inner {
    pub(crate) fn incarnation(&self) -> &str {
        self.id.incarnation().unwrap_or_default()
    }

    /// Reads the log's state. Returns `None` if the log was deleted or recreated since this handle
    /// opened it.
    pub(crate) fn status(&self, connection: &Connection) -> rusqlite::Result<Option<Status>> {
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
                        retention: from_columns(row.get(1)?, row.get(2)?),
                    })
                })
                .optional()
        });
        match read {
            // The statement cannot be prepared without the log's table, so check whether the log
            // itself is gone.
            Err(error) if !is_busy(&error) => match find(connection, self.id.name())? {
                Some((_, incarnation)) if incarnation == self.incarnation() => Err(error),
                _ => Ok(None),
            },
            read => read,
        }
    }

    /// Decides whether a reader at `requested` has records to read, must wait, or can never
    /// continue.
    pub(crate) fn standing(&self, requested: Offset, status: Option<&Status>) -> Result<Standing, Error> {
        let out_of_range = |end: u64| Error::OutOfRange {
            log: self.id.clone(),
            requested,
            end: end.into(),
        };
        let truncated = |earliest: u64| Error::Truncated {
            log: self.id.clone(),
            requested,
            earliest: earliest.into(),
        };
        // The log was deleted, or recreated with another incarnation.
        let Some(status) = status else {
            return Err(out_of_range(0));
        };
        // Offsets in this log have no `hi` part, so an offset that has one is past the end.
        let wanted = if requested.hi() == 0 { requested.lo() } else { u64::MAX };
        if wanted > status.end {
            Err(out_of_range(status.end))
        } else if wanted == status.end {
            Ok(Standing::AtEnd)
        } else if status.last.is_none_or(|last| last < wanted) {
            Err(truncated(status.end))
        } else if wanted < status.earliest {
            Err(truncated(status.earliest))
        } else {
            Ok(Standing::Before)
        }
    }

    /// Returns the log's state, or an error if the log is gone.
    fn require(&self, connection: &Connection, action: impl Fn() -> String) -> Result<Status, Error> {
        match self.status(connection) {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err(self.gone(action())),
            Err(error) => Err(classify(self.shared.on(action()), error)),
        }
    }

    async fn current_status(&self, verb: &str) -> Result<Status, Error> {
        let action = || format!("{verb} log {}", self.id);
        let status = self.shared.read(action, |connection| self.status(connection)).await?;
        status.ok_or_else(|| self.gone(action()))
    }

    fn gone(&self, action: String) -> Error {
        Error::failed(
            self.shared.on(action),
            "the log was deleted or recreated after this handle opened it; open it again",
        )
    }

    /// Appends in the open transaction, and commits it.
    fn append(&self, tx: WriteTx, records: &[NewRecord]) -> Result<Offset, Error> {
        let action = || format!("append to log {}", self.id);
        let status = self.require(tx.connection(), action)?;
        if status.end.saturating_add(records.len() as u64) > i64::MAX as u64 {
            return Err(Error::failed(
                self.shared.on(action()),
                format!(
                    "the next offset would be {}, but SQLite's largest is {}; use a new log",
                    status.end,
                    i64::MAX
                ),
            ));
        }
        let end = self
            .insert(tx.connection(), status, records)
            .map_err(|error| classify(self.shared.on(action()), error))?;
        tx.commit(|| self.shared.on(action()))?;
        self.wake.send_replace(());
        Ok((end - 1).into())
    }

    fn insert(&self, connection: &Connection, before: Status, records: &[NewRecord]) -> rusqlite::Result<u64> {
        let now = now_millis();
        let mut end = before.end;
        {
            let mut insert = connection.prepare_cached(&self.sql.insert)?;
            for record in records {
                let origin = record.origin.as_ref();
                insert.execute((
                    end as i64,
                    now,
                    record.key.as_deref(),
                    encode_headers(&record.headers),
                    &record.payload[..],
                    origin.map(|origin| origin.numbering.to_string()),
                    origin.map(|origin| origin.sequence as i64),
                ))?;
                end += 1;
            }
        }
        connection
            .prepare_cached("UPDATE main.essentially_once_logs SET next = ?1 WHERE name = ?2 AND incarnation = ?3")?
            .execute((end as i64, self.id.name(), self.incarnation()))?;
        if before.retention != Retention::default() {
            let after = Status { end, ..before };
            // Removes more records than were added, so that a backlog shrinks, but not all, so that
            // appends stay fast.
            trim(connection, &self.sql, &after, now, 2 * records.len() as u64 + 64)?;
        }
        Ok(end)
    }

    /// Removes one chunk of expired records in the open transaction, and commits it.
    fn trim_chunk(&self, tx: WriteTx) -> Result<u64, Error> {
        let action = || format!("trim log {}", self.id);
        let status = self.require(tx.connection(), action)?;
        let removed = trim(tx.connection(), &self.sql, &status, now_millis(), TRIM_CHUNK)
            .map_err(|error| classify(self.shared.on(action()), error))?;
        tx.commit(|| self.shared.on(action()))?;
        Ok(removed)
    }
}

/// Returns the id and incarnation of the log of that name.
fn find(connection: &Connection, name: &str) -> rusqlite::Result<Option<(i64, String)>> {
    connection
        .prepare_cached("SELECT id, incarnation FROM main.essentially_once_logs WHERE name = ?1")?
        .query_row([name], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
}

/// The number of logs that an error lists.
const NAMED: usize = 20;

/// Returns the names of the logs in order, at most one more than an error lists.
fn names(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare_cached("SELECT name FROM main.essentially_once_logs ORDER BY name LIMIT ?1")?
        .query_map([NAMED as i64 + 1], |row| row.get(0))?
        .collect()
}

fn no_such_log(names: &[String]) -> String {
    if names.is_empty() {
        return "no log has that name, and the file holds no other log; check the path, or open the log without \
                `existing()` to create it"
            .into();
    }
    let rest = if names.len() > NAMED { " and others" } else { "" };
    let names = names[..names.len().min(NAMED)].join(", ");
    format!(
        "no log has that name; the file holds {names}{rest}; check the name, or open the log without `existing()` to create it"
    )
}

fn create(connection: &Connection, name: &str) -> rusqlite::Result<(i64, String)> {
    // Another handle may have created the log while this one waited for the lock.
    if let Some(found) = find(connection, name)? {
        return Ok(found);
    }
    let (id, incarnation) = connection.query_row(
        "INSERT INTO main.essentially_once_logs (name, incarnation, next) VALUES (?1, lower(hex(randomblob(8))), 0) \
             RETURNING id, incarnation",
        [name],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    connection.execute_batch(&format!(
        "CREATE TABLE main.essentially_once_log_{id} (
             \"offset\" INTEGER PRIMARY KEY,
             appended_at INTEGER NOT NULL DEFAULT (CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)),
             key BLOB,
             headers BLOB,
             payload BLOB NOT NULL,
             producer TEXT,
             sequence INTEGER
         )"
    ))?;
    Ok((id, incarnation))
}

/// Runs slow work on another thread. The work completes even if the caller gives up.
async fn run_on_thread<T: Send + 'static>(
    log: &SqliteLog,
    verb: &str,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    on_a_thread(work).await.unwrap_or_else(|error| {
        let action = log.inner.shared.on(format!("{verb} log {}", log.inner.id));
        Err(Error::indeterminate(action, error))
    })
}

#[async_trait]
impl Log for SqliteLog {
    fn id(&self) -> &LogId {
        &self.inner.id
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let inner = &self.inner;
        let mut bytes = 0;
        for record in records {
            record.check_size(inner.shared.options.record_limit)?;
            bytes += record.size();
        }
        if records.is_empty() {
            return Ok(None);
        }
        let tx = inner
            .shared
            .begin_append(|| format!("append to log {}", inner.id))
            .await?;
        // No await from here to the commit on this thread, so a dropped future leaves no partial
        // append.
        let last = if records.len() <= INLINE_RECORDS && bytes <= INLINE_BYTES {
            inner.append(tx, records)?
        } else {
            let (inner, records) = (Arc::clone(inner), records.to_vec());
            run_on_thread(self, "append to", move || inner.append(tx, &records)).await?
        };
        Ok(Some(last))
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let status = self.inner.current_status("read").await?;
        self.inner.standing(from, Some(&status))?;
        let (log, action) = (Arc::clone(&self.inner), || format!("read log {}", self.inner.id));
        let cursor = self
            .inner
            .shared
            .cursor(action, |connection| Cursor::new(log, connection))
            .await?;
        Ok(Box::new(SqliteReader::new(Arc::clone(&self.inner), cursor, from.lo())))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        let status = self.inner.current_status("read bounds of").await?;
        Ok(Bounds {
            earliest: status.earliest.into(),
            end: status.end.into(),
        })
    }

    /// Exact, unless rows were deleted by hand.
    async fn count_from(&self, from: Offset) -> Result<Option<u64>, Error> {
        let status = self.inner.current_status("count records of").await?;
        let from = if from.hi() == 0 { from.lo() } else { u64::MAX };
        Ok(Some(status.end.saturating_sub(from.max(status.earliest))))
    }

    async fn durability(&self) -> Result<Durability, Error> {
        let action = || format!("read durability of log {}", self.inner.id);
        self.inner.shared.read(action, open::durability).await
    }
}

impl fmt::Debug for SqliteLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteLog")
            .field("id", &self.inner.id)
            .field("path", &self.inner.shared.path)
            .finish_non_exhaustive()
    }
}
