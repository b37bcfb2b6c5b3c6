//! The store. It writes positions, windows and state in the transaction in which a handler's SQL
//! runs.

pub(crate) mod authorizer;
pub(crate) mod pulse;
pub(crate) mod schema;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, Offset, OffsetStore, ReadState,
    backend::{Advance, Durability, LogId, Owner, Passed, Position, Pulse, Revision, Snapshot, Transaction, Window},
};
use rusqlite::{Connection, OptionalExtension, Params, Row, Statement};
use tokio::time::{self, Instant};

use crate::{
    connection::open,
    connection::{Shared, WriteTx},
    error::{classify, is_handlers_mistake},
    log::codec::unsigned,
    store::pulse::BEAT_SQL,
};

/// How often to check whether another process wrote to the file.
const POLL: Duration = Duration::from_millis(10);

/// How long to pause after a commit of another consumer.
const NOT_OURS: Duration = Duration::from_millis(2);

/// How long a beat tries to get the write lock, and how often. The next beat is due a little later.
const BEAT_WITHIN: Duration = Duration::from_millis(200);
const BEAT_AGAIN: Duration = Duration::from_millis(5);

/// Long enough to mean never, and short enough to add to an instant.
const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Positions and state in a SQLite file. See [`Sqlite::store`](crate::Sqlite::store).
#[derive(Clone)]
pub struct SqliteStore {
    shared: Arc<Shared>,
}

impl SqliteStore {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn decode(&self, stored: Option<StoredPosition>, action: impl Fn() -> String) -> Result<Option<Position>, Error> {
        let Some((row, windows)) = stored else {
            return Ok(None);
        };
        let decoded = row.position().and_then(|mut position| {
            for (numbering, window) in windows {
                position.windows.push((numbering.parse()?, Window::decode(&window)?));
            }
            Ok(position)
        });
        decoded
            .map(Some)
            .map_err(|error| Error::failed(self.shared.on(action()), error))
    }
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore")
            .field("path", &self.shared.path)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl OffsetStore for SqliteStore {
    type Tx = SqliteTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        let action = || format!("read position of consumer {consumer}");
        let stored = self
            .shared
            .read(action, |connection| read_position(connection, consumer))
            .await?;
        self.decode(stored, action)
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<SqliteTx, Error> {
        let tx = self
            .shared
            .begin(|| format!("begin a transaction of consumer {consumer}"))
            .await?;
        Ok(SqliteTx {
            tx,
            shared: Arc::clone(&self.shared),
            consumer: consumer.clone(),
            failed: None,
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.shared.read(|| "read durability".into(), open::durability).await
    }

    /// A write lock that one transaction holds counts as a beat, because an owner that handles a
    /// record for long holds it and cannot write one.
    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        let action = || format!("read pulse of consumer {consumer}");
        let is_held = self.shared.place.holder().is_some();
        let seen = self
            .shared
            .observe(action, |observer| observer.look(consumer, is_held))
            .await?;
        let pulse = seen.map(|seen| seen.pulse()).transpose();
        let pulse = pulse.map_err(|error| Error::failed(self.shared.on(action()), error))?;
        Ok(pulse.unwrap_or_default())
    }

    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        let action = || format!("watch consumer {consumer}");
        let until = Instant::now() + interval.min(NEVER);
        let mut commits = self.shared.place.commits.subscribe();
        loop {
            // The version must be read before the pulse, so that a commit after the pulse changes
            // it.
            let version = self.shared.observe(action, |observer| observer.data_version()).await?;
            let pulse = self.pulse(consumer).await?;
            if pulse != *seen || Instant::now() >= until {
                return Ok(pulse);
            }
            loop {
                let poll = until.min(Instant::now() + POLL);
                // The sender outlives this call, so `Ok` always means a commit.
                let committed = time::timeout_at(poll, commits.changed()).await.is_ok();
                if committed
                    || Instant::now() >= until
                    || self.shared.observe(action, |observer| observer.data_version()).await? != version
                {
                    break;
                }
            }
            if Instant::now() < until && self.pulse(consumer).await? == *seen {
                time::sleep_until(until.min(Instant::now() + NOT_OURS)).await;
            }
        }
    }

    /// Writes as soon as the write lock is free, and gives up after a while. A lock that one
    /// transaction holds all that time is itself a sign of life. A lock that many transactions hold
    /// in turn is free between them.
    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let action = || format!("beat for consumer {consumer}");
        let given_up = Instant::now() + BEAT_WITHIN;
        let mut tx = loop {
            match self.shared.try_begin(action)? {
                Some(tx) => break tx,
                None if Instant::now() >= given_up => return Ok(()),
                None => time::sleep(BEAT_AGAIN).await,
            }
        };
        let owner = owner.to_string();
        tx.run_internal(BEAT_SQL, |statement| statement.execute((consumer.as_str(), &owner)))
            .map_err(|error| classify(self.shared.on(action()), error))?;
        tx.commit(|| self.shared.on(action()))
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let action = || format!("give up the position of consumer {consumer}");
        let owner = owner.to_string();
        // An owner that was overtaken writes nothing, so it must not wait for the write lock.
        let stored = self
            .shared
            .read(action, |connection| position_row(connection, consumer))
            .await?;
        if stored.is_none_or(|row| row.owner.as_deref() != Some(&*owner)) {
            return Ok(());
        }
        let mut tx = self.shared.begin(action).await?;
        let sql = "UPDATE main.essentially_once_consumers SET owner = NULL WHERE consumer = ?1 AND owner = ?2";
        tx.run_internal(sql, |statement| statement.execute((consumer.as_str(), &owner)))
            .map_err(|error| classify(self.shared.on(action()), error))?;
        tx.commit(|| self.shared.on(action()))
    }
}

#[async_trait]
impl ReadState for SqliteStore {
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        let action = || format!("read state of consumer {consumer}");
        let read = |connection: &Connection| {
            let snapshot = connection.unchecked_transaction()?;
            let position = stored_position(&snapshot, consumer)?;
            let mut value = snapshot
                .prepare_cached("SELECT value FROM main.essentially_once_state WHERE consumer = ?1 AND key = ?2")?;
            let values = keys.iter().map(|key| {
                let value = value.query_row((consumer.as_str(), *key), bytes_of_first);
                value.optional()
            });
            Ok((position, values.collect::<rusqlite::Result<Vec<_>>>()?))
        };
        let (position, values) = self.shared.read(action, read).await?;
        Ok(Snapshot::new(self.decode(position, action)?, values))
    }
}

/// An open transaction on the file. It holds the file's write lock until it is committed, rolled
/// back or dropped.
///
/// Besides the portable [`KeyValue`] state, it runs SQL on your own tables, which other consumers
/// and programs can also see. Each statement is prepared once and cached, so pass values as
/// parameters instead of writing them into the text.
///
/// SQL may use savepoints and change the schema. It may not begin or end transactions, attach
/// databases, set pragmas (except `defer_foreign_keys`), or write to `sqlite_sequence` or this
/// crate's tables. It may read this crate's tables, but not reference them with a foreign key. No
/// name may begin with `essentially_once_`.
///
/// After an error of SQLite itself (disk, memory, a lock, a damaged file), every later operation
/// fails with the same kind of error, even if the handler ignored the first one. That includes the
/// commit. The same holds after SQLite itself rolls back, for example because of `INSERT OR
/// ROLLBACK`. A mistake in the SQL or a violated constraint fails only its own statement.
pub struct SqliteTx {
    tx: WriteTx,
    shared: Arc<Shared>,
    consumer: ConsumerId,
    /// The first operation that failed because of the backend. The handler may have ignored the
    /// error, so the transaction can only be rolled back.
    failed: Option<Failure>,
}

struct Failure {
    is_transient: bool,
    text: String,
}

impl SqliteTx {
    /// Runs a statement that returns no rows, and returns the number of rows it changed.
    ///
    /// ```
    /// # use essentially_once::Error;
    /// # use essentially_once_sqlite::SqliteTx;
    /// # fn example(tx: &mut SqliteTx) -> Result<(), Error> {
    /// tx.execute("UPDATE freight SET shipped = shipped + 1 WHERE country = ?1", ["Brazil"])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Failed`] for a mistake in the SQL, a violated constraint, or more than one
    /// statement. [`Error::Unavailable`] if SQLite cannot run it now.
    /// [`sqlite_error`](crate::sqlite_error) returns the cause. The transaction can continue after
    /// a mistake or a violated constraint, unless SQLite rolled it back. A statement that returns
    /// rows fails, but its changes stay in the transaction.
    pub fn execute(&mut self, sql: &str, params: impl Params) -> Result<usize, Error> {
        self.native(sql, |statement| statement.execute(params))
    }

    /// Runs a statement, and returns the results of `row` for all rows.
    ///
    /// ```
    /// # use essentially_once::Error;
    /// # use essentially_once_sqlite::SqliteTx;
    /// # fn example(tx: &mut SqliteTx) -> Result<(), Error> {
    /// let countries: Vec<String> = tx.query("SELECT country FROM freight ORDER BY country", [], |row| row.get(0))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Like [`execute`](Self::execute). An error from `row` becomes [`Error::Failed`].
    pub fn query<T>(
        &mut self,
        sql: &str,
        params: impl Params,
        row: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, Error> {
        self.native(sql, |statement| statement.query_map(params, row)?.collect())
    }

    /// Runs a statement, and returns the result of `row` for the first row, or `None` if there are
    /// no rows.
    ///
    /// # Errors
    /// Like [`query`](Self::query).
    pub fn query_one<T>(
        &mut self,
        sql: &str,
        params: impl Params,
        row: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>, Error> {
        self.native(sql, |statement| statement.query_row(params, row).optional())
    }

    /// Returns the consumer that this transaction belongs to.
    pub fn consumer(&self) -> &ConsumerId {
        &self.consumer
    }

    fn native<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        self.check_usable("run SQL")?;
        let result = self.tx.run_native(sql, run);
        result.map_err(|error| match is_handlers_mistake(&error) {
            true => classify(self.action("run SQL"), error),
            false => self.fail("run SQL", error),
        })
    }

    /// Runs a statement of this crate with the consumer's name.
    fn internal<T>(
        &mut self,
        sql: &str,
        verb: &str,
        run: impl FnOnce(&mut Statement<'_>, &str) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        let Self { tx, consumer, .. } = self;
        let result = tx.run_internal(sql, |statement| run(statement, consumer.as_str()));
        result.map_err(|error| self.fail(verb, error))
    }

    /// Builds the error of an operation after which the transaction can only be rolled back.
    fn fail(&mut self, verb: &str, error: rusqlite::Error) -> Error {
        let error = classify(self.action(verb), error);
        self.failed.get_or_insert_with(|| Failure {
            is_transient: matches!(error, Error::Unavailable { .. }),
            text: error.to_string(),
        });
        error
    }

    /// Refuses to continue after a failure, or without an open transaction. A statement that ran
    /// without one would be committed immediately.
    fn check_usable(&self, verb: &str) -> Result<(), Error> {
        if let Some(failure) = &self.failed {
            let cause = format!(
                "the transaction can only be rolled back, because an earlier operation in it failed: {}",
                failure.text
            );
            return Err(match failure.is_transient {
                true => Error::unavailable(self.action(verb), cause),
                false => Error::failed(self.action(verb), cause),
            });
        }
        if self.tx.is_open() {
            return Ok(());
        }
        Err(Error::failed(
            self.action(verb),
            "SQLite rolled the transaction back after an earlier error (OR ROLLBACK, RAISE(ROLLBACK), a full disk), so nothing \
             of it was applied",
        ))
    }

    fn check_size(&self, what: &'static str, bytes: &[u8]) -> Result<(), Error> {
        match (bytes.len(), self.shared.options.record_limit) {
            (size, limit) if size > limit => Err(Error::TooLarge { what, size, limit }),
            _ => Ok(()),
        }
    }

    fn action(&self, verb: &str) -> String {
        self.shared
            .on(format!("{verb} in a transaction of consumer {}", self.consumer))
    }

    /// Moves the position if it is at the revision and log that `advance` expects.
    fn advance(&mut self, advance: &Advance) -> Result<(), Error> {
        let (log, incarnation) = (advance.log.name(), advance.log.incarnation());
        let (hi, lo) = (advance.next.hi() as i64, advance.next.lo() as i64);
        let (epoch, count) = (advance.revision.epoch() as i64, advance.revision.count() as i64);
        let owner = advance.owner.map(|owner| owner.to_string());
        let passed = advance.passed.map(|passed| passed.encode());
        let passed = passed.as_ref().map(<[u8; _]>::as_slice);
        let expected = advance.expected;
        let moved = if expected == Revision::NONE {
            let sql = "INSERT INTO main.essentially_once_consumers \
                     (consumer, log, incarnation, next_hi, next_lo, epoch, count, owner, passed) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT (consumer) DO NOTHING";
            self.internal(sql, "commit", |statement, consumer| {
                statement.execute((consumer, log, incarnation, hi, lo, epoch, count, owner, passed))
            })?
        } else {
            let sql = "UPDATE main.essentially_once_consumers \
                 SET incarnation = coalesce(?3, incarnation), next_hi = ?4, next_lo = ?5, epoch = ?6, count = ?7, \
                     owner = ?8, passed = ?9 \
                 WHERE consumer = ?1 AND epoch = ?10 AND count = ?11 AND log = ?2 \
                     AND (incarnation = ?3 OR incarnation IS NULL OR ?3 IS NULL)";
            let based_on = (expected.epoch() as i64, expected.count() as i64);
            self.internal(sql, "commit", |statement, consumer| {
                statement.execute((
                    consumer,
                    log,
                    incarnation,
                    hi,
                    lo,
                    epoch,
                    count,
                    owner,
                    passed,
                    based_on.0,
                    based_on.1,
                ))
            })?
        };
        if moved == 0 {
            return Err(self.refusal(advance)?);
        }
        for (numbering, window) in &advance.windows {
            let sql = "INSERT INTO main.essentially_once_windows (consumer, producer, \"window\") VALUES (?1, ?2, ?3) \
                 ON CONFLICT (consumer, producer) DO UPDATE SET \"window\" = excluded.\"window\"";
            self.internal(sql, "commit", |statement, consumer| {
                statement.execute((consumer, numbering.to_string(), &window.encode()[..]))
            })?;
        }
        for numbering in &advance.forgotten {
            let sql = "DELETE FROM main.essentially_once_windows WHERE consumer = ?1 AND producer = ?2";
            self.internal(sql, "commit", |statement, consumer| {
                statement.execute((consumer, numbering.to_string()))
            })?;
        }
        Ok(())
    }

    /// Explains why a position did not move: its revision or its log differs.
    fn refusal(&self, advance: &Advance) -> Result<Error, Error> {
        let stored = position_row(self.tx.connection(), &self.consumer)
            .map_err(|error| classify(self.action("commit"), error))?;
        if let Some(row) = stored
            && row.revision == advance.expected
        {
            return Ok(Error::WrongLog {
                consumer: self.consumer.clone(),
                stored: row.log()?,
                given: advance.log.clone(),
            });
        }
        Ok(Error::Fenced {
            consumer: self.consumer.clone(),
            expected: advance.expected,
        })
    }
}

impl fmt::Debug for SqliteTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteTx")
            .field("consumer", &self.consumer)
            .field("path", &self.shared.path)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transaction for SqliteTx {
    async fn commit(mut self, advance: Advance) -> Result<(), Error> {
        self.check_usable("commit")?;
        self.advance(&advance)?;
        let (shared, consumer) = (self.shared, self.consumer);
        self.tx
            .commit(|| shared.on(format!("commit a transaction of consumer {consumer}")))
    }

    async fn rollback(self) -> Result<(), Error> {
        let (shared, consumer) = (self.shared, self.consumer);
        self.tx
            .rollback(|| shared.on(format!("roll back a transaction of consumer {consumer}")))
    }
}

#[async_trait]
impl KeyValue for SqliteTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        self.check_usable("get a key")?;
        let sql = "SELECT value FROM main.essentially_once_state WHERE consumer = ?1 AND key = ?2";
        self.internal(sql, "get a key", |statement, consumer| {
            statement.query_row((consumer, key), bytes_of_first).optional()
        })
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.check_usable("put a key")?;
        self.check_size("key", key)?;
        self.check_size("value", value)?;
        let sql = "INSERT INTO main.essentially_once_state (consumer, key, value) VALUES (?1, ?2, ?3) \
             ON CONFLICT (consumer, key) DO UPDATE SET value = excluded.value";
        self.internal(sql, "put a key", |statement, consumer| {
            statement.execute((consumer, key, value))
        })?;
        Ok(())
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.check_usable("delete a key")?;
        let sql = "DELETE FROM main.essentially_once_state WHERE consumer = ?1 AND key = ?2";
        self.internal(sql, "delete a key", |statement, consumer| {
            statement.execute((consumer, key))
        })?;
        Ok(())
    }
}

struct PositionRow {
    log: String,
    incarnation: Option<String>,
    next: Offset,
    revision: Revision,
    owner: Option<String>,
    passed: Option<Vec<u8>>,
}

impl PositionRow {
    /// Returns the position without its windows.
    fn position(&self) -> Result<Position, Error> {
        let mut position = Position::new(self.log()?, self.next, self.revision);
        position.owner = self.owner.as_deref().map(str::parse).transpose()?;
        position.passed = self.passed.as_deref().and_then(Passed::decode);
        Ok(position)
    }

    fn log(&self) -> Result<LogId, Error> {
        let id = LogId::new(&self.log)?;
        match &self.incarnation {
            Some(incarnation) => id.with_incarnation(incarnation),
            None => Ok(id),
        }
    }
}

fn position_row(connection: &Connection, consumer: &ConsumerId) -> rusqlite::Result<Option<PositionRow>> {
    connection
        .prepare_cached(
            "SELECT log, incarnation, next_hi, next_lo, epoch, count, owner, passed \
             FROM main.essentially_once_consumers WHERE consumer = ?1",
        )?
        .query_row([consumer.as_str()], |row| {
            Ok(PositionRow {
                log: row.get(0)?,
                incarnation: row.get(1)?,
                next: Offset::new(unsigned(row, 2)?, unsigned(row, 3)?),
                revision: Revision::new(unsigned(row, 4)?, unsigned(row, 5)?),
                owner: row.get(6)?,
                passed: row.get(7)?,
            })
        })
        .optional()
}

type StoredPosition = (PositionRow, Vec<(String, Vec<u8>)>);

fn bytes_of_first(row: &Row<'_>) -> rusqlite::Result<Bytes> {
    Ok(Bytes::copy_from_slice(row.get_ref(0)?.as_bytes()?))
}

/// Reads the position and its windows in one read transaction.
fn read_position(connection: &Connection, consumer: &ConsumerId) -> rusqlite::Result<Option<StoredPosition>> {
    let snapshot = connection.unchecked_transaction()?;
    stored_position(&snapshot, consumer)
}

/// Reads the position and its windows within the caller's transaction.
fn stored_position(connection: &Connection, consumer: &ConsumerId) -> rusqlite::Result<Option<StoredPosition>> {
    let Some(row) = position_row(connection, consumer)? else {
        return Ok(None);
    };
    let windows = connection
        .prepare_cached("SELECT producer, \"window\" FROM main.essentially_once_windows WHERE consumer = ?1")?
        .query_map([consumer.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Some((row, windows)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use essentially_once::Log;

    use super::*;
    use crate::Sqlite;

    const TABLE: &str = "CREATE TABLE t (x)";

    async fn open() -> (tempfile::TempDir, Sqlite, Arc<AtomicBool>) {
        let folder = tempfile::tempdir().expect("folder");
        let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
        let interrupt = sqlite.shared.interruptible().await;
        (folder, sqlite, interrupt)
    }

    /// Commits a first position. Returns a transaction with a staged write, and the advance to
    /// commit it with.
    async fn staged(sqlite: &Sqlite) -> (SqliteTx, Advance) {
        let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
        let consumer = ConsumerId::new("c").expect("name");
        let first = Revision::NONE.next_epoch();
        let advance = Advance::new(log.id().clone(), 1.into(), Revision::NONE, first);
        let mut tx = store.begin(&consumer).await.expect("begin");
        tx.execute(TABLE, []).expect("create");
        tx.put(b"k", b"1").await.expect("put");
        tx.commit(advance).await.expect("commit");
        let mut tx = store.begin(&consumer).await.expect("begin");
        tx.put(b"k", b"2").await.expect("put");
        (tx, Advance::new(log.id().clone(), 1.into(), first, first.next_count()))
    }

    #[tokio::test]
    async fn a_read_that_failed_and_was_ignored_keeps_the_transaction_from_committing() {
        let (_folder, sqlite, interrupt) = open().await;
        let (mut tx, advance) = staged(&sqlite).await;
        interrupt.store(true, Ordering::Relaxed);
        let ignored = tx.get(b"k").await.ok().flatten();
        interrupt.store(false, Ordering::Relaxed);
        assert_eq!(ignored, None);
        let error = tx.put(b"count", b"1").await.expect_err("only rolled back");
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        let error = tx.commit(advance.clone()).await.expect_err("refused");
        assert!(matches!(error, Error::Unavailable { .. }), "transient: {error:?}");
        let text = error.to_string();
        assert!(text.contains("get a key") && text.contains("interrupted"), "{text}");
        let store = sqlite.store();
        let mut tx = store.begin(&ConsumerId::new("c").expect("name")).await.expect("begin");
        assert_eq!(tx.get(b"k").await.expect("get").as_deref(), Some(&b"1"[..]));
        tx.commit(advance).await.expect("a new transaction commits");
    }

    #[tokio::test]
    async fn sql_that_was_interrupted_keeps_the_transaction_from_committing() {
        for sql in ["SELECT count(*) FROM t", "INSERT INTO t VALUES (1)"] {
            let (_folder, sqlite, interrupt) = open().await;
            let (mut tx, advance) = staged(&sqlite).await;
            interrupt.store(true, Ordering::Relaxed);
            let ignored = tx.query(sql, [], |_| Ok(())).ok();
            interrupt.store(false, Ordering::Relaxed);
            assert_eq!(ignored, None);
            let error = tx.query("SELECT 1", [], |_| Ok(())).expect_err("only rolled back");
            assert!(matches!(error, Error::Unavailable { .. }), "{sql}: {error:?}");
            let error = tx.commit(advance).await.expect_err("refused");
            assert!(
                matches!(error, Error::Unavailable { .. }) && error.to_string().contains("run SQL"),
                "{sql}: {error:?}"
            );
        }
    }

    #[tokio::test]
    async fn put_and_delete_that_failed_keep_the_transaction_from_committing() {
        for put in [true, false] {
            let (_folder, sqlite, interrupt) = open().await;
            let (mut tx, advance) = staged(&sqlite).await;
            interrupt.store(true, Ordering::Relaxed);
            let ignored = match put {
                true => tx.put(b"k", b"3").await,
                false => tx.delete(b"k").await,
            };
            interrupt.store(false, Ordering::Relaxed);
            assert!(ignored.is_err());
            assert!(matches!(tx.commit(advance).await, Err(Error::Unavailable { .. })));
        }
    }
}
