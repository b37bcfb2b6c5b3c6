//! Wraps the log, store and handler of one process, and injects faults.

use std::time::Duration;

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, Handler, HandlerError, KeyValue, Log, NewRecord, Offset, OffsetStore, Outbox, ReadState, Record,
    async_trait,
    backend::{
        Advance, Bounds, DeadLetter, DeadLetters, Durability, LogId, LogReader, Owner, Position, Pulse, Snapshot,
        Transaction,
    },
};

use super::control::{Failure, Operation, Process};

/// A log whose reads may fail as planned. Appends never do.
#[derive(Debug)]
pub struct FaultyLog<L> {
    inner: L,
    process: Process,
}

impl<L: Log> FaultyLog<L> {
    /// Wraps a log for a process.
    pub fn new(inner: L, process: &Process) -> Self {
        let process = process.clone();
        Self { inner, process }
    }
}

#[async_trait]
impl<L: Log> Log for FaultyLog<L> {
    fn id(&self) -> &LogId {
        self.inner.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.inner.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let inner = ask(&self.process, Operation::Read, self.inner.read(from)).await?;
        Ok(Box::new(FaultyReader {
            inner,
            process: self.process.clone(),
        }))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        ask(&self.process, Operation::Bounds, self.inner.bounds()).await
    }

    async fn readable_end(&self) -> Result<Offset, Error> {
        ask(&self.process, Operation::ReadableEnd, self.inner.readable_end()).await
    }

    /// Consumers never ask for it, so no fault strikes here.
    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        self.inner.tail(count).await
    }

    fn decode(&self, malformed: &Record) -> Option<Record> {
        self.inner.decode(malformed)
    }

    /// Consumers never remove records, so no fault strikes here.
    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.inner.remove_before(offset).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        ask(&self.process, Operation::Durability, self.inner.durability()).await
    }
}

struct FaultyReader {
    inner: Box<dyn LogReader>,
    process: Process,
}

#[async_trait]
impl LogReader for FaultyReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        ask(&self.process, Operation::Next, self.inner.next(max)).await
    }
}

/// A store whose operations may fail as planned, including those of its transactions.
#[derive(Debug)]
pub struct FaultyStore<S> {
    inner: S,
    process: Process,
}

impl<S: OffsetStore> FaultyStore<S> {
    /// Wraps a store for a process.
    pub fn new(inner: S, process: &Process) -> Self {
        let process = process.clone();
        Self { inner, process }
    }
}

#[async_trait]
impl<S: OffsetStore> OffsetStore for FaultyStore<S> {
    type Tx = FaultyTx<S::Tx>;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        ask(&self.process, Operation::Position, self.inner.position(consumer)).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<Self::Tx, Error> {
        let inner = ask(&self.process, Operation::Begin, self.inner.begin(consumer)).await?;
        Ok(FaultyTx {
            inner,
            process: self.process.clone(),
            has_failed: false,
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        ask(&self.process, Operation::Durability, self.inner.durability()).await
    }

    /// Consumers never list consumers, so no fault strikes here.
    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        self.inner.consumers().await
    }

    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        ask(&self.process, Operation::Pulse, self.inner.pulse(consumer)).await
    }

    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        let watch = self.inner.watch(consumer, seen, interval);
        ask(&self.process, Operation::Pulse, watch).await
    }

    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        ask(&self.process, Operation::Beat, self.inner.beat(consumer, owner)).await
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        ask(&self.process, Operation::Release, self.inner.release(consumer, owner)).await
    }
}

#[async_trait]
impl<S: ReadState> ReadState for FaultyStore<S> {
    /// Consumers never read state outside their transactions, so no fault strikes here.
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        self.inner.read_state(consumer, keys).await
    }
}

/// A transaction of a [`FaultyStore`].
#[derive(Debug)]
pub struct FaultyTx<T> {
    inner: T,
    process: Process,
    /// Whether a read or write failed in a way that allows only a rollback.
    has_failed: bool,
}

impl<T> FaultyTx<T> {
    /// Writes natively in the wrapped transaction.
    pub(super) async fn natively(&mut self, write: impl AsyncFnOnce(&mut T) -> Result<(), Error>) -> Result<(), Error> {
        ask(&self.process, Operation::Native, write(&mut self.inner)).await
    }

    /// The wrapped transaction, in which no fault strikes.
    pub(super) fn inner_mut(&mut self) -> &mut T {
        &mut self.inner
    }

    fn noting_failure<V>(&mut self, result: Result<V, Error>) -> Result<V, Error> {
        self.has_failed |= matches!(result, Err(Error::Unavailable { .. }));
        result
    }
}

#[async_trait]
impl<T: Transaction> Transaction for FaultyTx<T> {
    const KEEPS_DEAD_LETTERS: bool = T::KEEPS_DEAD_LETTERS;

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        T::KEEPS_DEAD_LETTERS.then_some(self)
    }

    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        self.inner.outbox().is_some().then_some(self)
    }

    async fn commit(self, advance: Advance) -> Result<(), Error> {
        if self.has_failed && self.process.tests_handler() {
            return Err(Error::unavailable(
                "commit",
                "a read or write of the transaction failed, so it can only be rolled back",
            ));
        }
        self.process
            .operate(Operation::Commit, self.inner.commit(advance), |failure| match failure {
                Failure::NotDone => not_done(Operation::Commit),
                Failure::ReplyLost => Error::indeterminate("commit", "a planned fault: the reply was lost"),
            })
            .await
    }

    async fn rollback(self) -> Result<(), Error> {
        ask(&self.process, Operation::Rollback, self.inner.rollback()).await
    }
}

#[async_trait]
impl<T: Transaction> Outbox for FaultyTx<T> {
    async fn send(&mut self, log: &str, record: NewRecord) -> Result<(), Error> {
        let outbox = self.inner.outbox();
        let outbox = outbox.ok_or_else(|| Error::failed("send", "the wrapped transaction has no outboxes"))?;
        let sent = ask(&self.process, Operation::Send, outbox.send(log, record)).await;
        self.process.touch_outbox(log);
        self.noting_failure(sent)
    }
}

#[async_trait]
impl<T: Transaction> DeadLetters for FaultyTx<T> {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        let letters = letters(&mut self.inner)?;
        ask(&self.process, Operation::Letters, letters.park(letter)).await
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        let letters = letters(&mut self.inner)?;
        ask(&self.process, Operation::Letters, letters.remove(offset)).await
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        let letters = letters(&mut self.inner)?;
        ask(&self.process, Operation::Letters, letters.remove_from(offset)).await
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        let letters = letters(&mut self.inner)?;
        ask(&self.process, Operation::Letters, letters.letter(offset)).await
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        let letters = letters(&mut self.inner)?;
        ask(&self.process, Operation::Letters, letters.head(key)).await
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        let letters = letters(&mut self.inner)?;
        ask(&self.process, Operation::Letters, letters.first_due()).await
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let letters = letters(&mut self.inner)?;
        ask(&self.process, Operation::Letters, letters.list(after, limit)).await
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        let letters = letters(&mut self.inner)?;
        ask(&self.process, Operation::Letters, letters.counts(after, limit)).await
    }

    async fn total(&mut self) -> Result<u64, Error> {
        let letters = letters(&mut self.inner)?;
        ask(&self.process, Operation::Letters, letters.total()).await
    }
}

fn letters<T: Transaction>(tx: &mut T) -> Result<&mut dyn DeadLetters, Error> {
    tx.dead_letters()
        .ok_or_else(|| Error::failed("use dead letters", "the wrapped transaction keeps none"))
}

#[async_trait]
impl<T: KeyValue> KeyValue for FaultyTx<T> {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        let value = ask(&self.process, Operation::Get, self.inner.get(key)).await;
        self.noting_failure(value)
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        let written = ask(&self.process, Operation::Put, self.inner.put(key, value)).await;
        self.process.touch_key(key);
        self.noting_failure(written)
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        let deleted = ask(&self.process, Operation::Delete, self.inner.delete(key)).await;
        self.noting_failure(deleted)
    }
}

/// A handler whose calls may fail as planned.
#[derive(Debug)]
pub struct FaultyHandler<H> {
    inner: H,
    process: Process,
}

impl<H> FaultyHandler<H> {
    /// Wraps a handler for a process.
    pub fn new(inner: H, process: &Process) -> Self {
        let process = process.clone();
        Self { inner, process }
    }
}

#[async_trait]
impl<Tx: Send, H: Handler<Tx>> Handler<Tx> for FaultyHandler<H> {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        // A closure runs when it is called, which a fault may forestall.
        let act = async { self.inner.handle(record, tx).await };
        self.process
            .operate(Operation::Handle, act, |failure| failed(Operation::Handle, failure))
            .await
    }

    async fn flush(&mut self, tx: &mut Tx) -> Result<(), HandlerError> {
        let act = async { self.inner.flush(tx).await };
        if !self.process.tests_handler() {
            return act.await;
        }
        self.process
            .operate(Operation::Flush, act, |failure| failed(Operation::Flush, failure))
            .await
    }

    async fn reset(&mut self) {
        self.inner.reset().await;
    }
}

fn failed(operation: Operation, failure: Failure) -> HandlerError {
    match failure {
        // The backend fails, and the handler notices it first.
        Failure::NotDone => not_done(operation).into(),
        // The record itself fails, so the consumer handles it alone.
        Failure::ReplyLost => HandlerError::retry("a planned fault after the handler did its work"),
    }
}

/// An operation whose reply can be lost without leaving doubt. Repeating it returns the same
/// answer.
async fn ask<T>(
    process: &Process,
    operation: Operation,
    act: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    process.operate(operation, act, |_| not_done(operation)).await
}

fn not_done(operation: Operation) -> Error {
    Error::unavailable(format!("{operation:?}"), "a planned fault")
}
