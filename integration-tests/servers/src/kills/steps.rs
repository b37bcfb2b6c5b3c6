//! Counts the steps of a run, and kills the server at one step.

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, Log, NewRecord, Offset, OffsetStore, Record, async_trait,
    backend::{Advance, Bounds, Durability, LogId, LogReader, Position, Source, Transaction},
};
use tokio::task::block_in_place;

use crate::Server;

/// When the server is killed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strike {
    /// The number of the step, counted from 1.
    pub(crate) step: usize,
    pub(crate) moment: Moment,
    /// The number of steps that must fail before the server restarts.
    pub(crate) failures: usize,
}

/// Whether the server is killed before or after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before it.
    Before,
    /// After it.
    After,
}

/// The steps of one run. Clones share the count.
#[derive(Clone)]
pub(crate) struct Steps {
    server: Arc<dyn Server>,
    strike: Strike,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    count: usize,
    struck: Option<&'static str>,
    failed: usize,
}

impl Steps {
    pub(crate) fn new(server: Arc<dyn Server>, strike: Strike) -> Self {
        Self {
            server,
            strike,
            state: Arc::default(),
        }
    }

    pub(crate) fn strike(&self) -> Strike {
        self.strike
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().count
    }

    /// The kind of step at which the server was killed, if any.
    pub(crate) fn struck(&self) -> Option<&'static str> {
        self.lock().struck
    }

    /// The number of steps that failed after the kill.
    pub(crate) fn failed(&self) -> usize {
        self.lock().failed
    }

    /// Starts the server again if it is still dead.
    pub(crate) fn revive(&self) -> Result<(), Source> {
        match self.server.is_running() {
            true => Ok(()),
            false => block_in_place(|| self.server.restart()),
        }
    }

    /// Counts a step and performs it.
    pub(crate) async fn step<T>(
        &self,
        kind: &'static str,
        act: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let number = {
            let mut state = self.lock();
            state.count += 1;
            state.count
        };
        let is_due = number == self.strike.step;
        if is_due && self.strike.moment == Moment::Before {
            self.kill(kind)?;
        }
        let result = act.await;
        if is_due && self.strike.moment == Moment::After {
            self.kill(kind)?;
        }
        if result.is_err() && self.fail() == self.strike.failures {
            self.revive()
                .map_err(|error| Error::failed("start the server again", error))?;
        }
        result
    }

    fn kill(&self, kind: &'static str) -> Result<(), Error> {
        self.lock().struck = Some(kind);
        let killed = block_in_place(|| match self.strike.failures {
            0 => self.server.restart(),
            _ => self.server.kill(),
        });
        killed.map_err(|error| Error::failed("kill the server", error))
    }

    fn fail(&self) -> usize {
        let mut state = self.lock();
        state.failed += 1;
        state.failed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A log, reader, store or transaction whose steps are counted.
pub(crate) struct Counted<T> {
    inner: T,
    steps: Steps,
}

impl<T> Counted<T> {
    pub(crate) fn new(inner: T, steps: &Steps) -> Self {
        let steps = steps.clone();
        Self { inner, steps }
    }
}

#[async_trait]
impl<L: Log> Log for Counted<L> {
    fn id(&self) -> &LogId {
        self.inner.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.steps.step("append", self.inner.append(records)).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let reader = self.steps.step("read", self.inner.read(from)).await?;
        Ok(Box::new(Counted::new(reader, &self.steps)))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.steps.step("bounds", self.inner.bounds()).await
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.steps.step("remove_before", self.inner.remove_before(offset)).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.steps.step("durability", self.inner.durability()).await
    }
}

#[async_trait]
impl LogReader for Counted<Box<dyn LogReader>> {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        self.steps.step("next", self.inner.next(max)).await
    }
}

#[async_trait]
impl<S: OffsetStore> OffsetStore for Counted<S> {
    type Tx = Counted<S::Tx>;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.steps.step("position", self.inner.position(consumer)).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<Self::Tx, Error> {
        let tx = self.steps.step("begin", self.inner.begin(consumer)).await?;
        Ok(Counted::new(tx, &self.steps))
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.steps.step("durability", self.inner.durability()).await
    }
}

#[async_trait]
impl<T: Transaction> Transaction for Counted<T> {
    async fn commit(self, advance: Advance) -> Result<(), Error> {
        self.steps.step("commit", self.inner.commit(advance)).await
    }

    async fn rollback(self) -> Result<(), Error> {
        self.steps.step("rollback", self.inner.rollback()).await
    }
}

#[async_trait]
impl<T: KeyValue> KeyValue for Counted<T> {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        self.steps.step("get", self.inner.get(key)).await
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.steps.step("put", self.inner.put(key, value)).await
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.steps.step("delete", self.inner.delete(key)).await
    }
}
