//! The transaction in which a handler's SQL runs. Its commit moves the position.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, Outbox,
    backend::{Advance, DeadLetters, Revision, Transaction, check_entry_size, check_size},
};
use tokio_postgres::{Row, error::SqlState};

use super::{
    state::{Known, Memory, State},
    statements::{self, log_of, revision_of, unsigned},
};
use crate::{
    connection::{Lease, Param, Part, Pool},
    error::Fault,
    log::sending::{Outboxes, Outgoing},
};

/// PostgreSQL cannot index a longer key.
const KEY_LIMIT: usize = 2_048;

/// The bytes and rows of a state that is read at once. The rows are one less than the limit of
/// [`SMALL_STATE`](statements::SMALL_STATE).
const SMALL_BYTES: i64 = 1024 * 1024;
const SMALL_ROWS: i64 = 10_000;

/// An open transaction on a session of its own. It begins with its first statement, so a handler
/// that only uses [`KeyValue`] without reading holds no lock while it runs.
///
/// Besides the portable [`KeyValue`] state, it runs SQL on your own tables, and
/// [sends](Outbox) records to [logs of the database](crate::PgLog#as-an-outbox). State and records
/// are staged in this process, and the commit sends them, the check of the position's revision and
/// `COMMIT` at once. A transaction that awaits no answer takes one round trip. The first
/// [`get`](KeyValue::get) takes one more, and the others none while the store
/// [remembers](crate::PgOptions::state_memory) the state. Each awaited statement takes one more, so
/// a handler that changes a row per record runs faster if it [queues](Self::queue) its statements,
/// and much faster if it gathers the changes of a batch and runs one statement for all of them in
/// [`Handler::flush`](essentially_once::Handler::flush).
///
/// SQL may use savepoints, which do not affect staged state and sent records, and change the
/// schema. It may not begin or end transactions. What it sets with `SET` outlives the transaction
/// and reaches other calls of this process, so use `SET LOCAL`.
///
/// After any error of a statement, PostgreSQL lets a transaction only be rolled back. Every later
/// operation then fails with the same kind of error, even if the handler ignored the first one, and
/// so does the commit.
pub struct PgTx {
    pub(super) session: Lease,
    pub(super) pool: Arc<Pool>,
    pub(super) consumer: ConsumerId,
    memory: Arc<Memory>,
    state: State,
    pub(super) outgoing: Outgoing,
    /// The first operation that failed. The handler may have ignored the error, so the transaction
    /// can only be rolled back.
    failed: Option<Failure>,
}

#[derive(Debug)]
struct Failure {
    is_transient: bool,
    text: String,
}

impl PgTx {
    pub(super) fn new(
        session: Lease,
        pool: Arc<Pool>,
        consumer: ConsumerId,
        memory: Arc<Memory>,
        outboxes: Arc<Outboxes>,
    ) -> Self {
        Self {
            session,
            pool,
            consumer,
            memory,
            state: State::default(),
            outgoing: Outgoing::new(outboxes),
            failed: None,
        }
    }

    /// Returns the consumer that this transaction belongs to.
    pub fn consumer(&self) -> &ConsumerId {
        &self.consumer
    }

    pub(super) fn action(&self, verb: &str) -> String {
        self.pool
            .on(format!("{verb} in a transaction of consumer {}", self.consumer))
    }

    /// The largest record, key or value, in bytes.
    pub(super) fn record_limit(&self) -> usize {
        self.pool.options.record_limit
    }

    /// Begins the transaction if no statement ran yet, after checking that it can go on.
    pub(super) fn ready(&mut self, verb: &str) -> Result<(), Error> {
        self.check_usable(verb)?;
        if self.session.is_in_transaction() {
            return Ok(());
        }
        let begin = self.pool.options.isolation.begin();
        let begun = self.session.begin(begin);
        begun.map_err(|fault| self.fail(verb, fault))
    }

    /// Refuses to continue after a failure.
    pub(super) fn check_usable(&self, verb: &str) -> Result<(), Error> {
        let Some(failure) = &self.failed else {
            return Ok(());
        };
        let cause = format!(
            "the transaction can only be rolled back, because an earlier operation in it failed: {}",
            failure.text
        );
        Err(match failure.is_transient {
            true => Error::unavailable(self.action(verb), cause),
            false => Error::failed(self.action(verb), cause),
        })
    }

    /// Builds the error of an operation after which the transaction can only be rolled back.
    pub(super) fn fail(&mut self, verb: &str, fault: Fault) -> Error {
        // A statement that was queued failed, and this one found out.
        let verb = match fault.part() {
            Some(Part::Native) => "run queued SQL",
            _ => verb,
        };
        let error = fault.of_read(self.action(verb));
        self.fail_with(error)
    }

    pub(super) fn fail_with(&mut self, error: Error) -> Error {
        self.failed.get_or_insert_with(|| Failure {
            is_transient: error.is_transient(),
            text: error.to_string(),
        });
        error
    }

    /// Runs a statement of this crate, and returns its rows.
    pub(super) async fn own(&mut self, sql: &'static str, verb: &str, params: &[Param<'_>]) -> Result<Vec<Row>, Error> {
        self.ready(verb)?;
        let rows = self.pool.within(self.session.query_own(sql, params)).await;
        rows.map_err(|fault| self.fail(verb, fault))
    }

    /// Runs a statement of this crate, and returns how many rows it changed.
    pub(super) async fn change(&mut self, sql: &'static str, verb: &str, params: &[Param<'_>]) -> Result<u64, Error> {
        self.ready(verb)?;
        let changed = self.pool.within(self.session.execute_own(sql, params)).await;
        changed.map_err(|fault| self.fail(verb, fault))
    }

    /// Sends everything that the commit consists of, but not `COMMIT` itself. The position is
    /// first, so that a transaction that is too late changes nothing else, and waits for no other
    /// lock.
    async fn stage(&mut self, advance: &Advance) -> Result<(), Fault> {
        let Self {
            session,
            consumer,
            state,
            outgoing,
            ..
        } = self;
        let consumer: &str = consumer.as_str();
        let (log, incarnation) = (advance.log.name(), advance.log.incarnation());
        let (hi, lo) = (advance.next.hi() as i64, advance.next.lo() as i64);
        let (epoch, count) = (advance.revision.epoch() as i64, advance.revision.count() as i64);
        let owner = advance.owner.map(|owner| owner.to_string());
        let note = advance.note.encode();
        let note = (!note.is_empty()).then_some(&note[..]);
        let journal = advance.journal.as_ref().map(|journal| journal.encode());
        let (expected_epoch, expected_count) = (advance.expected.epoch() as i64, advance.expected.count() as i64);
        let mut params: Vec<Param<'_>> = vec![
            &consumer,
            &log,
            &incarnation,
            &hi,
            &lo,
            &epoch,
            &count,
            &owner,
            &note,
            &journal,
        ];
        let fence = match advance.expected {
            Revision::NONE => statements::INSERT_POSITION,
            _ => {
                params.extend([&expected_epoch as Param<'_>, &expected_count]);
                statements::UPDATE_POSITION
            }
        };
        let statement = session.own(fence).await?;
        session.send(Part::Fence, &statement, &params).await?;
        if !advance.windows.is_empty() {
            let producers: Vec<String> = advance
                .windows
                .iter()
                .map(|(numbering, _)| numbering.to_string())
                .collect();
            let windows: Vec<_> = advance.windows.iter().map(|(_, window)| window.encode()).collect();
            let windows: Vec<&[u8]> = windows.iter().map(|window| &window[..]).collect();
            let statement = session.own(statements::PUT_WINDOWS).await?;
            session
                .send(Part::Staged, &statement, &[&consumer, &producers, &windows])
                .await?;
        }
        if !advance.forgotten.is_empty() {
            let producers: Vec<String> = advance.forgotten.iter().map(ToString::to_string).collect();
            let statement = session.own(statements::DELETE_WINDOWS).await?;
            session.send(Part::Staged, &statement, &[&consumer, &producers]).await?;
        }
        let (puts, deletes) = state.changes();
        for (keys, values) in &puts {
            let statement = session.own(statements::PUT_VALUES).await?;
            session
                .send(Part::Staged, &statement, &[&consumer, keys, values])
                .await?;
        }
        if !deletes.is_empty() {
            let statement = session.own(statements::DELETE_VALUES).await?;
            session.send(Part::Staged, &statement, &[&consumer, &deletes]).await?;
        }
        outgoing.send_all(session).await
    }

    /// Explains why a position did not move: its revision or its log differs.
    async fn refusal(&mut self, advance: &Advance, fault: Fault) -> Error {
        let (pool, consumer, action) = (Arc::clone(&self.pool), self.consumer.clone(), self.action("commit"));
        let is_refused = fault.code() == Some(&SqlState::DIVISION_BY_ZERO);
        let stored = async {
            let mut session = pool.take(|| action.clone()).await?;
            let name = consumer.as_str();
            let rows = pool.within(session.query_own(statements::POSITION, &[&name])).await;
            rows.map_err(|fault| fault.of_read(&*action))
        };
        let rows = match stored.await {
            Ok(rows) => rows,
            Err(error) if is_refused => return error,
            Err(_) => return fault.of_write(action),
        };
        let fenced = Error::Fenced {
            consumer: consumer.clone(),
            expected: advance.expected,
        };
        // A damaged name of a log must not hide that another instance has committed.
        let revision = rows.first().map_or(Ok(Revision::NONE), revision_of);
        let log = rows.first().map(log_of).transpose();
        match (revision, log) {
            (Ok(revision), _) if revision != advance.expected => fenced,
            (Ok(revision), Ok(log)) => match advance.check(&consumer, log.as_ref().map(|log| (revision, log))) {
                Err(error) => error,
                Ok(_) if is_refused => fenced,
                Ok(_) => fault.of_write(action),
            },
            (Err(error), _) | (_, Err(error)) => Error::failed(action, error),
        }
    }
}

#[async_trait]
impl Transaction for PgTx {
    const KEEPS_DEAD_LETTERS: bool = true;

    async fn commit(mut self, advance: Advance) -> Result<(), Error> {
        self.ready("commit")?;
        // What the handler read must be what the commit is based on.
        let read = self.state.known.as_ref().map(|known| known.revision);
        if read.is_some_and(|read| read != advance.expected) {
            return Err(Error::Fenced {
                consumer: self.consumer.clone(),
                expected: advance.expected,
            });
        }
        let pool = Arc::clone(&self.pool);
        if let Err(fault) = pool.within(self.stage(&advance)).await {
            return Err(match fault.part() {
                Some(part) => self.explain(part, &advance, fault).await,
                None => self.fail("commit", fault),
            });
        }
        if let Err(fault) = self.session.commit() {
            return Err(self.fail("commit", fault));
        }
        match pool.within(self.session.wait()).await {
            Ok(()) => {
                self.outgoing.committed(&pool);
                self.state.known = self.state.committed(advance.revision);
                Ok(())
            }
            Err(fault) => Err(match fault.part() {
                Some(part) => self.explain(part, &advance, fault).await,
                None => fault.of_write(self.action("commit")),
            }),
        }
    }

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        Some(self)
    }

    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        Some(self)
    }

    async fn rollback(mut self) -> Result<(), Error> {
        let pool = Arc::clone(&self.pool);
        let rolled_back = pool.within(self.session.rollback()).await;
        rolled_back.map_err(|fault| fault.of_read(self.action("roll back")))
    }
}

impl PgTx {
    /// Finds out what is known of the state. If the store remembers it as of the newest commit, or
    /// if there is not much of it, the transaction needs no more round trips to read.
    async fn look(&mut self) -> Result<Known, Error> {
        const VERB: &str = "read the state";
        let consumer = self.consumer.clone();
        let name = consumer.as_str();
        let rows = self.own(statements::REVISION, VERB, &[&name]).await?;
        let damaged = |error| Error::failed(self.action(VERB), error);
        let revision = match rows.first() {
            Some(row) => Revision::new(unsigned(row, 0).map_err(damaged)?, unsigned(row, 1).map_err(damaged)?),
            None => Revision::NONE,
        };
        if let Some(known) = self.memory.take(&consumer)
            && known.revision == revision
        {
            return Ok(known);
        }
        let mut known = Known::at(revision);
        if self.pool.options.state_memory == 0 {
            return Ok(known);
        }
        let rows = self.own(statements::SMALL_STATE, VERB, &[&name, &SMALL_BYTES]).await?;
        let total = rows.first().map_or(0, |row| row.get::<_, i64>(2));
        for row in &rows {
            known.learn(row.get(0), Some(Bytes::copy_from_slice(row.get(1))));
        }
        if total == rows.len() as i64 && total <= SMALL_ROWS {
            known.complete();
        }
        Ok(known)
    }

    /// Explains why a part of the commit failed.
    async fn explain(&mut self, part: Part, advance: &Advance, fault: Fault) -> Error {
        let code = fault.code();
        let is_refused = code == Some(&SqlState::DIVISION_BY_ZERO);
        let is_conflict = code == Some(&SqlState::T_R_SERIALIZATION_FAILURE);
        match part {
            Part::Fence if is_refused || is_conflict => self.refusal(advance, fault).await,
            Part::Send(place) if is_refused => {
                let cause = format!(
                    "log {} was deleted or recreated after this store opened it; the next attempt opens it again",
                    self.outgoing.forget(place)
                );
                Error::unavailable(self.action("commit"), cause)
            }
            Part::Native => fault.of_write(self.action("run queued SQL")),
            _ => fault.of_write(self.action("commit")),
        }
    }
}

#[async_trait]
impl KeyValue for PgTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        const VERB: &str = "get a key";
        self.check_usable(VERB)?;
        if self.state.known.is_none() && self.state.get(key).is_none() {
            let known = self.look().await?;
            self.state.known = Some(known);
        }
        if let Some(known) = self.state.get(key) {
            return Ok(known);
        }
        let consumer = self.consumer.clone();
        let rows = self
            .own(statements::GET_VALUE, VERB, &[&consumer.as_str(), &key])
            .await?;
        let value = rows.first().map(|row| Bytes::copy_from_slice(row.get(0)));
        if let Some(known) = &mut self.state.known {
            known.learn(key, value.clone());
        }
        Ok(value)
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.check_usable("put a key")?;
        check_size("key", key.len(), KEY_LIMIT)?;
        check_entry_size(key, value, self.record_limit())?;
        self.state.change(key, Some(Bytes::copy_from_slice(value)));
        Ok(())
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.check_usable("delete a key")?;
        self.state.change(key, None);
        Ok(())
    }
}

/// What was read stays known to the store, which compares the revision before it is used again.
impl Drop for PgTx {
    fn drop(&mut self) {
        if let Some(known) = self.state.known.take() {
            self.memory.put_back(&self.consumer, known);
        }
    }
}

impl std::fmt::Debug for PgTx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PgTx")
            .field("consumer", &self.consumer)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
