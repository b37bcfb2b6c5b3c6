use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use essentially_once::{ConsumerId, Error, KeyValue, OffsetStore, async_trait, backend::{Advance, Durability, Numbering, Position, Revision, Transaction, Window}};

use crate::{lock, volatile};

#[derive(Default)]
struct Stored {
    position: Option<Position>,
    windows: HashMap<Numbering, Window>,
    state: HashMap<Vec<u8>, Bytes>,
}

#[derive(Clone)]
pub struct MineStore {
    fences: bool,
    consumers: Arc<Mutex<HashMap<ConsumerId, Stored>>>,
}

impl MineStore {
    pub(crate) fn new(fences: bool) -> Self {
        Self {
            fences,
            consumers: Arc::default(),
        }
    }
}

#[async_trait]
impl OffsetStore for MineStore {
    type Tx = MineTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        let consumers = lock(&self.consumers);
        Ok(consumers.get(consumer).and_then(|stored| {
            let mut position = stored.position.clone()?;
            position.windows = stored.windows.clone().into_iter().collect();
            Some(position)
        }))
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<MineTx, Error> {
        Ok(MineTx {
            store: self.clone(),
            consumer: consumer.clone(),
            staged: HashMap::new(),
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(volatile())
    }
}

pub struct MineTx {
    store: MineStore,
    consumer: ConsumerId,
    staged: HashMap<Vec<u8>, Option<Bytes>>,
}

#[async_trait]
impl Transaction for MineTx {
    async fn commit(self, advance: Advance) -> Result<(), Error> {
        let mut consumers = lock(&self.store.consumers);
        let stored = consumers.entry(self.consumer.clone()).or_default();
        let revision = stored.position.as_ref().map_or(Revision::NONE, |position| position.revision);
        if self.store.fences && revision != advance.expected {
            return Err(Error::Fenced {
                consumer: self.consumer,
                expected: advance.expected,
            });
        }
        let mut log = advance.log;
        if let Some(position) = &stored.position {
            if !position.log.is_same_log(&log) {
                return Err(Error::WrongLog {
                    consumer: self.consumer,
                    stored: position.log.clone(),
                    given: log,
                });
            }
            if log.incarnation().is_none() {
                log = position.log.clone();
            }
        }
        for (key, value) in self.staged {
            match value {
                Some(value) => stored.state.insert(key, value),
                None => stored.state.remove(&key),
            };
        }
        stored.windows.extend(advance.windows);
        stored
            .windows
            .retain(|numbering, _| !advance.forgotten.contains(numbering));
        let mut position = Position::new(log, advance.next, advance.revision);
        position.owner = advance.owner;
        position.note = advance.note;
        let before = stored.position.take().map(|position| position.journal);
        position.journal = advance.journal.or(before).unwrap_or_default();
        stored.position = Some(position);
        Ok(())
    }

    async fn rollback(self) -> Result<(), Error> {
        Ok(())
    }
}

#[async_trait]
impl KeyValue for MineTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        if let Some(staged) = self.staged.get(key) {
            return Ok(staged.clone());
        }
        let consumers = lock(&self.store.consumers);
        Ok(consumers
            .get(&self.consumer)
            .and_then(|stored| stored.state.get(key).cloned()))
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.staged.insert(key.into(), Some(Bytes::copy_from_slice(value)));
        Ok(())
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.staged.insert(key.into(), None);
        Ok(())
    }
}
