//! The transaction in which a handler's SQL runs. Its commit moves the position.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, NewRecord, Outbox,
    backend::{Advance, DeadLetters, Revision, Transaction, check_entry_size},
};
use rusqlite::{OptionalExtension, Params, Row, Statement};

use super::statements::{self, bytes_of_first, position_row};
use crate::{
    connection::{Connections, WriteTx},
    error::{classify, is_handlers_mistake},
    log::sending::{Outboxes, Outgoing},
};

/// An open transaction on the file. It holds the file's write lock until it is committed, rolled
/// back or dropped.
///
/// Besides the portable [`KeyValue`] state, it runs SQL on your own tables, which other consumers
/// and programs can also see. Each statement is prepared once and cached, so pass values as
/// parameters instead of writing them into the text.
///
/// It also [sends](Outbox) records to [logs of the file](crate::SqliteLog#as-an-outbox). Each
/// record costs one insert. Readers of this process wake at the commit, and those of others find
/// the records within about 10 ms, or 1 ms while records arrive. A rollback to a savepoint takes
/// back the records that were sent since it was set.
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
#[derive(Debug)]
pub struct SqliteTx {
    tx: WriteTx,
    connections: Arc<Connections>,
    consumer: ConsumerId,
    outgoing: Outgoing,
    /// The first operation that failed because of the backend. The handler may have ignored the
    /// error, so the transaction can only be rolled back.
    failed: Option<Failure>,
}

#[derive(Debug)]
struct Failure {
    is_transient: bool,
    text: String,
}

impl SqliteTx {
    pub(super) fn new(
        tx: WriteTx,
        connections: Arc<Connections>,
        consumer: ConsumerId,
        outboxes: Arc<Outboxes>,
    ) -> Self {
        Self {
            tx,
            connections,
            consumer,
            outgoing: Outgoing::new(outboxes),
            failed: None,
        }
    }

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
    /// let sql = "SELECT country FROM freight ORDER BY country";
    /// let countries: Vec<String> = tx.query(sql, [], |row| row.get(0))?;
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
        let mut may_undo = false;
        let result = self.tx.run_native(sql, |statement| {
            // Only statements that control transactions, and some pragmas, neither write nor have
            // columns. One of them is ROLLBACK TO.
            may_undo = statement.readonly() && statement.column_count() == 0;
            run(statement)
        });
        if may_undo {
            self.outgoing.look_again();
        }
        result.map_err(|error| match is_handlers_mistake(&error) {
            true => classify(self.action("run SQL"), error),
            false => self.fail("run SQL", error),
        })
    }

    /// Runs a statement of this crate with the consumer's name.
    pub(super) fn internal<T>(
        &mut self,
        sql: &str,
        verb: &str,
        run: impl FnOnce(&mut Statement<'_>, &str) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        let Self { tx, consumer, .. } = self;
        let result = tx.run_internal(sql, |statement| run(statement, consumer.as_str()));
        result.map_err(|error| self.fail(verb, error))
    }

    /// Whether the log's name is known to be valid.
    pub(super) fn has_sent_to(&self, log: &str) -> bool {
        self.outgoing.is_open(log)
    }

    /// Appends a record that the commit makes visible.
    pub(super) fn append(&mut self, log: &str, record: &NewRecord) -> Result<(), Error> {
        let Self {
            tx,
            connections,
            consumer,
            outgoing,
            ..
        } = self;
        let action = || connections.on(format!("send to log {log} in a transaction of consumer {consumer}"));
        let sent = outgoing.send(tx, connections, log, record, action);
        sent.map_err(|error| self.fail_with(error))
    }

    /// Builds the error of an operation after which the transaction can only be rolled back.
    fn fail(&mut self, verb: &str, error: rusqlite::Error) -> Error {
        let error = classify(self.action(verb), error);
        self.fail_with(error)
    }

    fn fail_with(&mut self, error: Error) -> Error {
        self.failed.get_or_insert_with(|| Failure {
            is_transient: matches!(error, Error::Unavailable { .. }),
            text: error.to_string(),
        });
        error
    }

    /// Refuses to continue after a failure, or without an open transaction. A statement that ran
    /// without one would be committed immediately.
    pub(super) fn check_usable(&self, verb: &str) -> Result<(), Error> {
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
            "SQLite rolled the transaction back after an earlier error (OR ROLLBACK, RAISE(ROLLBACK), a full disk), \
             so nothing of it was applied",
        ))
    }

    /// The largest record, key or value, in bytes.
    pub(super) fn record_limit(&self) -> usize {
        self.connections.options.record_limit
    }

    pub(super) fn action(&self, verb: &str) -> String {
        self.connections
            .on(format!("{verb} in a transaction of consumer {}", self.consumer))
    }

    /// Moves the position if it is at the revision and log that `advance` expects.
    fn advance(&mut self, advance: &Advance) -> Result<(), Error> {
        let (log, incarnation) = (advance.log.name(), advance.log.incarnation());
        let (hi, lo) = (advance.next.hi() as i64, advance.next.lo() as i64);
        let (epoch, count) = (advance.revision.epoch() as i64, advance.revision.count() as i64);
        let owner = advance.owner.map(|owner| owner.to_string());
        let note = advance.note.encode();
        let note = (!note.is_empty()).then_some(&note[..]);
        let expected = advance.expected;
        let moved = if expected == Revision::NONE {
            self.internal(statements::INSERT_POSITION, "commit", |statement, consumer| {
                statement.execute((consumer, log, incarnation, hi, lo, epoch, count, owner, note))
            })?
        } else {
            let based_on = (expected.epoch() as i64, expected.count() as i64);
            self.internal(statements::UPDATE_POSITION, "commit", |statement, consumer| {
                statement.execute((
                    consumer,
                    log,
                    incarnation,
                    hi,
                    lo,
                    epoch,
                    count,
                    owner,
                    note,
                    based_on.0,
                    based_on.1,
                ))
            })?
        };
        if moved == 0 {
            return Err(self.refusal(advance)?);
        }
        if let Some(journal) = &advance.journal {
            self.internal(statements::PUT_JOURNAL, "commit", |statement, consumer| {
                statement.execute((consumer, journal.encode()))
            })?;
        }
        for (numbering, window) in &advance.windows {
            self.internal(statements::PUT_WINDOW, "commit", |statement, consumer| {
                statement.execute((consumer, numbering.to_string(), &window.encode()[..]))
            })?;
        }
        for numbering in &advance.forgotten {
            self.internal(statements::DELETE_WINDOW, "commit", |statement, consumer| {
                statement.execute((consumer, numbering.to_string()))
            })?;
        }
        Ok(())
    }

    /// Explains why a position did not move: its revision or its log differs.
    fn refusal(&self, advance: &Advance) -> Result<Error, Error> {
        let stored = position_row(self.tx.connection(), &self.consumer)
            .map_err(|error| classify(self.action("commit"), error))?;
        let fenced = Error::Fenced {
            consumer: self.consumer.clone(),
            expected: advance.expected,
        };
        // A damaged name of a log must not hide that another instance has committed.
        let Some(row) = stored.filter(|row| row.revision == advance.expected) else {
            return Ok(fenced);
        };
        let log = row.log()?;
        Ok(advance
            .check(&self.consumer, Some((row.revision, &log)))
            .err()
            .unwrap_or(fenced))
    }
}

#[async_trait]
impl Transaction for SqliteTx {
    const KEEPS_DEAD_LETTERS: bool = true;

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        Some(self)
    }

    async fn commit(mut self, advance: Advance) -> Result<(), Error> {
        self.check_usable("commit")?;
        self.advance(&advance)?;
        self.outgoing
            .finish(self.tx.connection())
            .map_err(|error| classify(self.action("commit"), error))?;
        let (connections, consumer) = (self.connections, self.consumer);
        self.tx
            .commit(|| connections.on(format!("commit a transaction of consumer {consumer}")))?;
        self.outgoing.wake_readers();
        Ok(())
    }

    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        Some(self)
    }

    async fn rollback(self) -> Result<(), Error> {
        let (connections, consumer) = (self.connections, self.consumer);
        self.tx
            .rollback(|| connections.on(format!("roll back a transaction of consumer {consumer}")))
    }
}

#[async_trait]
impl KeyValue for SqliteTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        self.check_usable("get a key")?;
        self.internal(statements::GET_VALUE, "get a key", |statement, consumer| {
            statement.query_row((consumer, key), bytes_of_first).optional()
        })
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.check_usable("put a key")?;
        check_entry_size(key, value, self.connections.options.record_limit)?;
        self.internal(statements::PUT_VALUE, "put a key", |statement, consumer| {
            statement.execute((consumer, key, value))
        })?;
        Ok(())
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.check_usable("delete a key")?;
        self.internal(statements::DELETE_VALUE, "delete a key", |statement, consumer| {
            statement.execute((consumer, key))
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use essentially_once::{Log, OffsetStore};

    use super::*;
    use crate::Sqlite;

    const TABLE: &str = "CREATE TABLE t (x)";

    async fn open() -> (tempfile::TempDir, Sqlite, Arc<AtomicBool>) {
        let folder = tempfile::tempdir().expect("folder");
        let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
        let interrupt = sqlite.connections.interruptible().await;
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
    async fn a_damaged_log_name_does_not_hide_that_a_commit_is_fenced() {
        let (folder, sqlite, _) = open().await;
        let (tx, stale) = staged(&sqlite).await;
        tx.rollback().await.expect("rollback");
        let tool = rusqlite::Connection::open(folder.path().join("a.db")).expect("another connection");
        tool.execute("UPDATE essentially_once_consumers SET log = '', count = count + 7", [])
            .expect("damage");
        let tx = sqlite
            .store()
            .begin(&ConsumerId::new("c").expect("name"))
            .await
            .expect("begin");
        let error = tx.commit(stale).await.expect_err("refused");
        assert!(matches!(error, Error::Fenced { .. }), "{error:?}");
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
    async fn a_send_that_failed_and_was_ignored_keeps_the_transaction_from_committing() {
        for known in [true, false] {
            let (_folder, sqlite, interrupt) = open().await;
            let (mut tx, advance) = staged(&sqlite).await;
            if known {
                tx.send("out", NewRecord::new("a")).await.expect("send");
            }
            interrupt.store(true, Ordering::Relaxed);
            let ignored = tx.send("out", NewRecord::new("b")).await;
            interrupt.store(false, Ordering::Relaxed);
            assert!(matches!(ignored, Err(Error::Unavailable { .. })), "{ignored:?}");
            let error = tx.send("out", NewRecord::new("c")).await.expect_err("refused");
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            let error = tx.commit(advance.clone()).await.expect_err("refused");
            assert!(error.to_string().contains("send to log out"), "{error}");
            let out = sqlite.log("out").await.expect("log");
            assert_eq!(out.bounds().await.expect("bounds").end, 0.into());
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
