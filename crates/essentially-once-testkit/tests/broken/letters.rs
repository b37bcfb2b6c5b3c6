//! The in-memory backend with dead letters of its own, broken on purpose.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, Log, Offset, OffsetStore, async_trait,
    backend::{Advance, DeadLetter, DeadLetters, Durability, Position, Revision, Source, Transaction},
    memory::{Memory, MemoryStore, MemoryTx},
};
use essentially_once_testkit::{Backend, Capabilities, Harness};

/// What is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LetterFlaw {
    /// Nothing.
    None,
    /// A letter is parked at once, outside the transaction.
    ParkedAtOnce,
    /// A commit moves the position and parks nothing.
    NotParked,
    /// A letter is removed although its commit failed.
    RemovedInVain,
    /// When the first letter of a key leaves, the next one does not count as due.
    NextNotDue,
    /// Moving the position back removes no letters.
    KeptOnSeek,
    /// A commit that changes letters and moves nothing is not fenced.
    Unfenced,
}

/// A harness for a backend with this flaw.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BrokenLetters(pub(crate) LetterFlaw);

#[async_trait]
impl Harness for BrokenLetters {
    type Backend = BrokenLettersMemory;

    fn capabilities(&self) -> Capabilities {
        Capabilities::minimal()
    }

    async fn start(&self, _: &str) -> Result<BrokenLettersMemory, Source> {
        Ok(BrokenLettersMemory {
            flaw: self.0,
            memory: Memory::new(),
            kept: Kept::default(),
        })
    }
}

pub(crate) struct BrokenLettersMemory {
    flaw: LetterFlaw,
    memory: Memory,
    kept: Kept,
}

#[async_trait]
impl Backend for BrokenLettersMemory {
    type Store = BrokenLettersStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.memory.log(name)?))
    }

    async fn store(&self) -> Result<BrokenLettersStore, Error> {
        Ok(BrokenLettersStore {
            flaw: self.flaw,
            inner: self.memory.store(),
            kept: self.kept.clone(),
        })
    }
}

/// The letters of the only consumer.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Letters>>);

type Letters = BTreeMap<Offset, DeadLetter>;
type Staged = BTreeMap<Offset, Option<DeadLetter>>;

impl Kept {
    fn lock(&self) -> MutexGuard<'_, Letters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Applies what was staged: a letter, or `None` for one that was removed.
fn apply(letters: &mut Letters, staged: Staged) {
    for (offset, letter) in staged {
        match letter {
            Some(letter) => letters.insert(offset, letter),
            None => letters.remove(&offset),
        };
    }
}

pub(crate) struct BrokenLettersStore {
    flaw: LetterFlaw,
    inner: MemoryStore,
    kept: Kept,
}

#[async_trait]
impl OffsetStore for BrokenLettersStore {
    type Tx = BrokenLettersTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.inner.position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<BrokenLettersTx, Error> {
        Ok(BrokenLettersTx {
            flaw: self.flaw,
            inner: self.inner.begin(consumer).await?,
            store: self.inner.clone(),
            consumer: consumer.clone(),
            kept: self.kept.clone(),
            staged: BTreeMap::new(),
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.inner.durability().await
    }
}

pub(crate) struct BrokenLettersTx {
    flaw: LetterFlaw,
    inner: MemoryTx,
    store: MemoryStore,
    consumer: ConsumerId,
    kept: Kept,
    staged: Staged,
}

impl BrokenLettersTx {
    /// The letters as this transaction sees them.
    fn letters(&self) -> Letters {
        let mut letters = self.kept.lock().clone();
        apply(&mut letters, self.staged.clone());
        letters
    }
}

#[async_trait]
impl Transaction for BrokenLettersTx {
    const KEEPS_DEAD_LETTERS: bool = true;

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        Some(self)
    }

    async fn commit(mut self, mut advance: Advance) -> Result<(), Error> {
        let position = self.store.position(&self.consumer).await?;
        let moves = position.as_ref().map(|position| position.next) != Some(advance.next);
        if self.flaw == LetterFlaw::Unfenced && !moves && !self.staged.is_empty() {
            advance.expected = position.map_or(Revision::NONE, |position| position.revision);
        }
        let committed = self.inner.commit(advance).await;
        match self.flaw {
            LetterFlaw::NotParked if moves => self.staged.retain(|_, letter| letter.is_none()),
            LetterFlaw::RemovedInVain if committed.is_err() => self.staged.retain(|_, letter| letter.is_none()),
            _ if committed.is_err() => self.staged.clear(),
            _ => {}
        }
        apply(&mut self.kept.lock(), self.staged);
        committed
    }

    async fn rollback(self) -> Result<(), Error> {
        self.inner.rollback().await
    }
}

#[async_trait]
impl DeadLetters for BrokenLettersTx {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        let offset = letter.record.offset;
        match self.flaw {
            LetterFlaw::ParkedAtOnce => drop(self.kept.lock().insert(offset, letter.clone())),
            _ => drop(self.staged.insert(offset, Some(letter.clone()))),
        }
        Ok(())
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        let existed = self.letters().contains_key(&offset);
        self.staged.insert(offset, None);
        Ok(existed)
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        if self.flaw == LetterFlaw::KeptOnSeek {
            return Ok(0);
        }
        let removed = self.letters().split_off(&offset);
        self.staged.extend(removed.keys().map(|offset| (*offset, None)));
        Ok(removed.len() as u64)
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        Ok(self.letters().remove(&offset))
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        let mut letters = self.letters().into_values();
        Ok(letters.find(|letter| letter.key().is_some_and(|of| of == key)))
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        let mut letters = self.letters();
        if self.flaw == LetterFlaw::NextNotDue {
            let kept = self.kept.lock().clone();
            letters.retain(|offset, _| kept.get(offset).is_some_and(|letter| letter.due.is_some()));
        }
        let due = letters.into_values().filter(|letter| letter.due.is_some());
        Ok(due.min_by_key(|letter| (letter.due, letter.record.offset)))
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let letters = self.letters().into_values();
        let later = letters.filter(|letter| after.is_none_or(|after| letter.record.offset > after));
        Ok(later.take(limit).collect())
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        let mut counts: BTreeMap<Bytes, u64> = BTreeMap::new();
        for letter in self.letters().into_values() {
            if let Some(key) = letter.key() {
                *counts.entry(key.clone()).or_default() += 1;
            }
        }
        let later = counts
            .into_iter()
            .filter(|(key, _)| after.is_none_or(|after| **key > *after));
        Ok(later.take(limit).collect())
    }

    async fn total(&mut self) -> Result<u64, Error> {
        Ok(self.letters().len() as u64)
    }
}

#[async_trait]
impl KeyValue for BrokenLettersTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        self.inner.get(key).await
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.inner.put(key, value).await
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.inner.delete(key).await
    }
}
