//! The store: positions, windows and state, written in the transaction that a handler's SQL runs in.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    Advance, ConsumerId, Durability, Error, KeyValue, LogId, Offset, OffsetStore, Position, ProducerId, Transaction,
    Window,
};
use rusqlite::{Connection, OptionalExtension, Params, Row, Statement};

use crate::{
    connect,
    error::classify,
    shared::{Shared, WriteTx},
};

/// Positions and state in a SQLite file; see [`Sqlite::store`](crate::Sqlite::store).
#[derive(Clone)]
pub struct SqliteStore {
    shared: Arc<Shared>,
}

impl SqliteStore {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
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
        let Some((row, windows)) = stored else {
            return Ok(None);
        };
        let windows = windows
            .into_iter()
            .map(|(producer, window)| Ok((ProducerId::new(producer)?, Window::decode(&window)?)))
            .collect::<Result<_, Error>>()
            .map_err(|error| Error::failed(self.shared.on(action()), error))?;
        Ok(Some(Position {
            log: row.log()?,
            next: Offset::new(row.next_hi as u64, row.next_lo as u64),
            revision: row.revision as u64,
            windows,
        }))
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
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.shared.read(|| "read durability".into(), connect::durability).await
    }
}

/// An open transaction on the file. It holds the file's write lock until it is committed, rolled back or dropped.
///
/// Besides the portable [`KeyValue`] state it takes SQL on tables of your own, which other consumers and programs see as well.
/// Statements are prepared once and kept, so give values as parameters rather than in the text. SQL may use savepoints and
/// change the schema. It may not begin or end transactions, attach databases, set pragmas (except `defer_foreign_keys`) or write
/// to `sqlite_sequence` and the tables of this crate. It may read those tables, but not refer to them by foreign key, and no
/// name may begin with `essentially_once_`. Should SQLite roll back by itself, as `INSERT OR ROLLBACK` makes it do, everything after that
/// fails, the commit included.
pub struct SqliteTx {
    tx: WriteTx,
    shared: Arc<Shared>,
    consumer: ConsumerId,
}

impl SqliteTx {
    /// Runs a statement that returns no rows, and tells how many rows it changed.
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
    /// [`Error::Failed`] for a mistake in the SQL, a violated constraint, or more than one statement; [`Error::Unavailable`].
    /// [`sqlite_error`](crate::sqlite_error) tells them apart. The transaction can go on, unless
    /// SQLite rolled it back; what a statement did that returned rows, and failed for that, stays in it.
    pub fn execute(&mut self, sql: &str, params: impl Params) -> Result<usize, Error> {
        self.native(sql, |statement| statement.execute(params))
    }

    /// Runs a statement and returns what `row` makes of each row.
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
    /// As [`execute`](Self::execute), and whatever `row` fails with, as [`Error::Failed`].
    pub fn query<T>(
        &mut self,
        sql: &str,
        params: impl Params,
        row: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, Error> {
        self.native(sql, |statement| statement.query_map(params, row)?.collect())
    }

    /// Runs a statement and returns what `row` makes of the first row, if there is one.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    pub fn query_one<T>(
        &mut self,
        sql: &str,
        params: impl Params,
        row: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>, Error> {
        self.native(sql, |statement| statement.query_row(params, row).optional())
    }

    /// The consumer whose transaction this is.
    pub fn consumer(&self) -> &ConsumerId {
        &self.consumer
    }

    fn native<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        self.check_open()?;
        let result = self.tx.run_native(sql, run);
        result.map_err(|error| classify(self.action("run SQL"), error))
    }

    /// Runs a statement of ours, given the consumer's name.
    fn internal<T>(
        &mut self,
        sql: &str,
        verb: &str,
        run: impl FnOnce(&mut Statement<'_>, &str) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        let Self { tx, consumer, .. } = self;
        let result = tx.run_internal(sql, |statement| run(statement, consumer.as_str()));
        result.map_err(|error| classify(self.action(verb), error))
    }

    /// Without an open transaction, whatever runs next would be committed on the spot.
    fn check_open(&self) -> Result<(), Error> {
        if self.tx.is_open() {
            return Ok(());
        }
        Err(Error::failed(
            self.action("go on"),
            "SQLite rolled the transaction back after an earlier error (OR ROLLBACK, RAISE(ROLLBACK), a full disk); nothing \
             of it is applied",
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

    /// Moves the position, if it is where `advance` says.
    fn advance(&mut self, advance: &Advance) -> Result<(), Error> {
        let (log, incarnation) = (advance.log.name(), advance.log.incarnation());
        let (hi, lo) = (advance.next.hi() as i64, advance.next.lo() as i64);
        let revision = advance.expected_revision as i64;
        let sql = if advance.expected_revision == 0 {
            "INSERT INTO main.essentially_once_positions (consumer, log, incarnation, next_hi, next_lo, revision) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6 + 1) ON CONFLICT (consumer) DO NOTHING"
        } else {
            "UPDATE main.essentially_once_positions \
                 SET incarnation = coalesce(?3, incarnation), next_hi = ?4, next_lo = ?5, revision = revision + 1 \
                 WHERE consumer = ?1 AND revision = ?6 AND log = ?2 \
                     AND (incarnation = ?3 OR incarnation IS NULL OR ?3 IS NULL)"
        };
        if self.internal(sql, "commit", |statement, consumer| {
            statement.execute((consumer, log, incarnation, hi, lo, revision))
        })? == 0
        {
            return Err(self.refusal(advance)?);
        }
        for (producer, window) in &advance.windows {
            let sql = "INSERT INTO main.essentially_once_windows (consumer, producer, \"window\") VALUES (?1, ?2, ?3) \
                 ON CONFLICT (consumer, producer) DO UPDATE SET \"window\" = excluded.\"window\"";
            self.internal(sql, "commit", |statement, consumer| {
                statement.execute((consumer, producer.as_str(), &window.encode()[..]))
            })?;
        }
        for producer in &advance.forgotten {
            let sql = "DELETE FROM main.essentially_once_windows WHERE consumer = ?1 AND producer = ?2";
            self.internal(sql, "commit", |statement, consumer| {
                statement.execute((consumer, producer.as_str()))
            })?;
        }
        Ok(())
    }

    /// Why a position did not move: another revision, or else another log.
    fn refusal(&self, advance: &Advance) -> Result<Error, Error> {
        let stored = position_row(self.tx.connection(), &self.consumer)
            .map_err(|error| classify(self.action("commit"), error))?;
        if let Some(row) = stored
            && row.revision as u64 == advance.expected_revision
        {
            return Ok(Error::WrongLog {
                consumer: self.consumer.clone(),
                stored: row.log()?,
                given: advance.log.clone(),
            });
        }
        Ok(Error::Fenced {
            consumer: self.consumer.clone(),
            expected: advance.expected_revision,
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
        self.check_open()?;
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
        self.check_open()?;
        let sql = "SELECT value FROM main.essentially_once_state WHERE consumer = ?1 AND key = ?2";
        self.internal(sql, "get a key", |statement, consumer| {
            let value = |row: &Row<'_>| Ok(Bytes::copy_from_slice(row.get_ref(0)?.as_bytes()?));
            statement.query_row((consumer, key), value).optional()
        })
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.check_open()?;
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
        self.check_open()?;
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
    next_hi: i64,
    next_lo: i64,
    revision: i64,
}

impl PositionRow {
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
        .prepare_cached("SELECT log, incarnation, next_hi, next_lo, revision FROM main.essentially_once_positions WHERE consumer = ?1")?
        .query_row([consumer.as_str()], |row| {
            Ok(PositionRow {
                log: row.get(0)?,
                incarnation: row.get(1)?,
                next_hi: row.get(2)?,
                next_lo: row.get(3)?,
                revision: row.get(4)?,
            })
        })
        .optional()
}

type StoredPosition = (PositionRow, Vec<(String, Vec<u8>)>);

/// The position and its windows as of one moment.
fn read_position(connection: &Connection, consumer: &ConsumerId) -> rusqlite::Result<Option<StoredPosition>> {
    let snapshot = connection.unchecked_transaction()?;
    let Some(row) = position_row(&snapshot, consumer)? else {
        return Ok(None);
    };
    let windows = snapshot
        .prepare_cached("SELECT producer, \"window\" FROM main.essentially_once_windows WHERE consumer = ?1")?
        .query_map([consumer.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Some((row, windows)))
}
