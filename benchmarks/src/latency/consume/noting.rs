//! Notes when the transaction of each record was committed. A handler never hears of a commit, so
//! the store is wrapped.

use std::time::Duration;

use essentially_once::{
    ConsumerId, Error, Handler, HandlerError, OffsetStore, Outbox, Record, async_trait,
    backend::{Advance, DeadLetters, Durability, Owner, Position, Pulse, Transaction},
};

use crate::latency::timing::{Arrivals, number};

/// A store that notes the records of each commit when it returns.
pub(super) struct NotingStore<S> {
    inner: S,
    arrivals: Arrivals,
}

impl<S: OffsetStore> NotingStore<S> {
    pub(super) fn new(inner: S, arrivals: Arrivals) -> Self {
        Self { inner, arrivals }
    }
}

#[async_trait]
impl<S: OffsetStore> OffsetStore for NotingStore<S> {
    type Tx = NotingTx<S::Tx>;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.inner.position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<Self::Tx, Error> {
        Ok(NotingTx {
            inner: self.inner.begin(consumer).await?,
            arrivals: self.arrivals.clone(),
            handled: Vec::new(),
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.inner.durability().await
    }

    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        self.inner.consumers().await
    }

    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        self.inner.pulse(consumer).await
    }

    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        self.inner.watch(consumer, seen, interval).await
    }

    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        self.inner.beat(consumer, owner).await
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        self.inner.release(consumer, owner).await
    }
}

pub(super) struct NotingTx<T> {
    inner: T,
    arrivals: Arrivals,
    /// The numbers of the records that its commit covers.
    handled: Vec<usize>,
}

#[async_trait]
impl<T: Transaction> Transaction for NotingTx<T> {
    const KEEPS_DEAD_LETTERS: bool = T::KEEPS_DEAD_LETTERS;

    async fn commit(self, advance: Advance) -> Result<(), Error> {
        self.inner.commit(advance).await?;
        self.arrivals.note(self.handled);
        Ok(())
    }

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        self.inner.dead_letters()
    }

    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        self.inner.outbox()
    }

    async fn rollback(self) -> Result<(), Error> {
        self.inner.rollback().await
    }
}

/// A handler whose transaction knows the numbers of its records.
pub(super) struct NotingHandler<H>(pub(super) H);

#[async_trait]
impl<T: Transaction, H: Handler<T>> Handler<NotingTx<T>> for NotingHandler<H> {
    async fn handle(&mut self, record: &Record, tx: &mut NotingTx<T>) -> Result<(), HandlerError> {
        self.0.handle(record, &mut tx.inner).await?;
        tx.handled.push(number(&record.payload));
        Ok(())
    }

    async fn flush(&mut self, tx: &mut NotingTx<T>) -> Result<(), HandlerError> {
        self.0.flush(&mut tx.inner).await
    }

    async fn reset(&mut self) {
        self.0.reset().await;
    }
}
