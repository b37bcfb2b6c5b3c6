//! An in-memory backend for tests and examples, and the reference for the meaning of the traits. It
//! loses everything when the process ends, and reports itself as volatile.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Notify, watch};

use crate::{
    Advance, Bounds, ConsumerId, Durability, Epoch, Error, KeyValue, Log, LogId, LogReader, NewRecord, Numbering,
    Offset, OffsetStore, Origin, Outbox, Owner, Position, Pulse, ReadState, Record, Snapshot, Transaction, Window,
    backend::{FetchBudget, check_entry_size, check_size, check_unnumbered, new_producer},
    letters::{DeadLetter, DeadLetters},
};

/// The largest record, key or value that the backend accepts, in bytes.
pub const SIZE_LIMIT: usize = 16 * 1024 * 1024;

/// Records that [`Log::remove_before`] removes while it holds the lock.
const REMOVE_CHUNK: u64 = 10_000;

/// A letter has two reasons in addition to its record.
const LETTER_LIMIT: usize = SIZE_LIMIT + 2 * DeadLetter::REASON_LIMIT;

/// Logs and a store in the memory of this process. Clones share them.
#[derive(Clone, Default)]
pub struct Memory {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    logs: Mutex<HashMap<String, MemoryLog>>,
    consumers: Mutex<HashMap<ConsumerId, Stored>>,
    /// Wakes all watchers, whichever consumer they watch.
    changed: Notify,
}

#[derive(Default)]
struct Stored {
    position: Option<Position>,
    windows: HashMap<Numbering, Window>,
    state: BTreeMap<Bytes, Bytes>,
    letters: BTreeMap<Offset, DeadLetter>,
    beats: u64,
}

impl Stored {
    fn position(&self) -> Option<Position> {
        let mut position = self.position.clone()?;
        position.windows = self.windows.clone().into_iter().collect();
        Some(position)
    }

    /// The position, if `owner` owns it.
    fn owned_by(&mut self, owner: Owner) -> Option<&mut Position> {
        self.position.as_mut().filter(|position| position.owner == Some(owner))
    }
}

impl Memory {
    /// An empty backend.
    pub fn new() -> Self {
        Self::default()
    }

    /// The log with this name. The first call creates it empty.
    ///
    /// # Errors
    /// [`Error::InvalidName`].
    pub fn log(&self, name: &str) -> Result<MemoryLog, Error> {
        let id = LogId::new(name)?;
        let mut logs = lock(&self.shared.logs);
        Ok(logs
            .entry(name.to_owned())
            .or_insert_with(|| MemoryLog::new(id))
            .clone())
    }

    /// The store.
    pub fn store(&self) -> MemoryStore {
        MemoryStore {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").finish_non_exhaustive()
    }
}

/// A panic while one of these locks is held leaves no partial change, so poisoning is ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn volatile() -> Durability {
    Durability::Volatile("the in-memory backend loses its data when the process ends; use an adapter crate".into())
}

/// A log in memory. See [`Memory::log`]. Offsets are dense and begin at 0.
#[derive(Clone)]
pub struct MemoryLog {
    id: LogId,
    records: Arc<Mutex<Records>>,
    /// One past the last record, to wake waiting readers.
    end: Arc<watch::Sender<u64>>,
}

#[derive(Default)]
struct Records {
    earliest: u64,
    retained: VecDeque<Record>,
    /// Who sends the records of an outbox, which are numbered by their offsets.
    sender: Option<Numbering>,
}

impl Records {
    fn end(&self) -> u64 {
        self.earliest + self.retained.len() as u64
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            earliest: self.earliest.into(),
            end: self.end().into(),
        }
    }

    /// Removes the records before `earliest`, and returns their number.
    fn remove_before(&mut self, earliest: u64) -> u64 {
        let earliest = earliest.clamp(self.earliest, self.end());
        let removed = earliest - self.earliest;
        self.retained.drain(..removed as usize);
        self.earliest = earliest;
        removed
    }

    /// Appends records, which keep their origins unless `number` gives them one.
    fn push(&mut self, new: &[NewRecord], number: impl Fn(u64) -> Option<Origin>) {
        let appended_at = SystemTime::now();
        for (offset, new) in (self.end()..).zip(new) {
            let mut record = Record::new(offset.into(), appended_at, new.payload.clone());
            record.key.clone_from(&new.key);
            record.headers.clone_from(&new.headers);
            record.origin = number(offset).or_else(|| new.origin.clone());
            self.retained.push_back(record);
        }
    }
}

impl MemoryLog {
    fn new(id: LogId) -> Self {
        Self {
            id,
            records: Arc::default(),
            end: Arc::new(watch::Sender::new(0)),
        }
    }

    /// Removes all records before `earliest`, as retention does.
    pub fn truncate(&self, earliest: Offset) {
        let mut records = lock(&self.records);
        records.remove_before(earliest.lo());
    }

    /// Appends records of a commit.
    fn send(&self, new: &[NewRecord]) -> Result<(), Error> {
        let mut records = lock(&self.records);
        let sender = match &records.sender {
            Some(sender) => sender.clone(),
            None => Numbering::new(new_producer(self.id.name())?, Epoch::STABLE),
        };
        records.sender = Some(sender.clone());
        records.push(new, |offset| Some(Origin::of(sender.clone(), offset)));
        self.end.send_replace(records.end());
        Ok(())
    }

    /// The records from `from` on, or the error if `from` is out of bounds.
    fn fetch(&self, from: Offset, max: usize) -> Result<Vec<Record>, Error> {
        let records = lock(&self.records);
        records.bounds().check(&self.id, from)?;
        let start = (from.lo() - records.earliest) as usize;
        let mut budget = FetchBudget::new();
        let fitting = records.retained.range(start..).take(max);
        let count = fitting.take_while(|record| budget.admits(record.size())).count();
        Ok(records.retained.range(start..start + count).cloned().collect())
    }
}

impl fmt::Debug for MemoryLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryLog")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Log for MemoryLog {
    fn id(&self) -> &LogId {
        &self.id
    }

    async fn append(&self, new: &[NewRecord]) -> Result<Option<Offset>, Error> {
        for record in new {
            record.check_size(SIZE_LIMIT)?;
        }
        let Some(last) = new.len().checked_sub(1) else {
            return Ok(None);
        };
        let end = {
            let mut records = lock(&self.records);
            let first = records.end();
            records.push(new, |_| None);
            // Sent under the lock, so that the end never goes back for readers.
            self.end.send_replace(records.end());
            first + last as u64
        };
        Ok(Some(end.into()))
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        self.fetch(from, 0)?;
        Ok(Box::new(MemoryReader {
            log: self.clone(),
            end: self.end.subscribe(),
            next: from.lo(),
        }))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        Ok(lock(&self.records).bounds())
    }

    async fn count_from(&self, from: Offset) -> Result<Option<u64>, Error> {
        let records = lock(&self.records);
        Ok(Some(records.end().saturating_sub(from.lo().max(records.earliest))))
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        let mut total = 0;
        loop {
            let mut records = lock(&self.records);
            let bounds = records.bounds();
            // The end never goes back, so this fails before anything is removed.
            bounds.check(&self.id, offset.max(bounds.earliest))?;
            let chunk = records.earliest.saturating_add(REMOVE_CHUNK);
            total += records.remove_before(offset.lo().min(chunk));
            if chunk >= offset.lo() {
                return Ok(total);
            }
        }
    }

    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        let records = lock(&self.records);
        let from = records.end().saturating_sub(count).max(records.earliest);
        Ok(Some(from.into()))
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(volatile())
    }
}

struct MemoryReader {
    log: MemoryLog,
    end: watch::Receiver<u64>,
    next: u64,
}

#[async_trait]
impl LogReader for MemoryReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        let next = self.next;
        loop {
            let records = self.log.fetch(next.into(), max)?;
            if !records.is_empty() {
                // This is the only change of state, and no await follows it, so a dropped call
                // changed nothing.
                self.next += records.len() as u64;
                return Ok(records);
            }
            // Never fails: the log holds the sender, and this reader holds the log.
            let _ = self.end.wait_for(|end| *end > next).await;
        }
    }
}

/// Positions and state in memory. See [`Memory::store`]. Clones share them.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").finish_non_exhaustive()
    }
}

#[async_trait]
impl OffsetStore for MemoryStore {
    type Tx = MemoryTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        let consumers = lock(&self.shared.consumers);
        Ok(consumers.get(consumer).and_then(Stored::position))
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<MemoryTx, Error> {
        Ok(MemoryTx {
            shared: Arc::clone(&self.shared),
            consumer: consumer.clone(),
            staged: BTreeMap::new(),
            letters: BTreeMap::new(),
            sent: Vec::new(),
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(volatile())
    }

    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        let consumers = lock(&self.shared.consumers);
        let with_position = consumers.iter().filter(|(_, stored)| stored.position.is_some());
        let mut names: Vec<_> = with_position.map(|(consumer, _)| consumer.clone()).collect();
        names.sort_unstable();
        Ok(Some(names))
    }

    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        let consumers = lock(&self.shared.consumers);
        Ok(consumers.get(consumer).map_or_else(Pulse::default, |stored| {
            Pulse::new(stored.position.as_ref(), stored.beats)
        }))
    }

    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, _: Duration) -> Result<Pulse, Error> {
        loop {
            let changed = self.shared.changed.notified();
            let pulse = self.pulse(consumer).await?;
            if pulse != *seen {
                return Ok(pulse);
            }
            changed.await;
        }
    }

    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let mut consumers = lock(&self.shared.consumers);
        if let Some(stored) = consumers.get_mut(consumer)
            && stored.owned_by(owner).is_some()
        {
            stored.beats += 1;
            self.shared.changed.notify_waiters();
        }
        Ok(())
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let mut consumers = lock(&self.shared.consumers);
        if let Some(position) = consumers.get_mut(consumer).and_then(|stored| stored.owned_by(owner)) {
            position.owner = None;
            self.shared.changed.notify_waiters();
        }
        Ok(())
    }
}

#[async_trait]
impl ReadState for MemoryStore {
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        let consumers = lock(&self.shared.consumers);
        let stored = consumers.get(consumer);
        let values = keys
            .iter()
            .map(|key| stored.and_then(|stored| stored.state.get(*key).cloned()))
            .collect();
        Ok(Snapshot::new(stored.and_then(Stored::position), values))
    }
}

/// A transaction in memory. It takes no lock until it commits, so that transactions race as they do
/// between machines.
pub struct MemoryTx {
    shared: Arc<Shared>,
    consumer: ConsumerId,
    /// The values to write; `None` deletes the key.
    staged: BTreeMap<Bytes, Option<Bytes>>,
    /// The letters to write; `None` removes the letter.
    letters: BTreeMap<Offset, Option<DeadLetter>>,
    /// The records to send, in order, each with its log.
    sent: Vec<(MemoryLog, NewRecord)>,
}

impl MemoryTx {
    /// What `read` makes of the letters as this transaction sees them.
    fn with_letters<T>(&self, read: impl FnOnce(&BTreeMap<Offset, DeadLetter>) -> T) -> T {
        let consumers = lock(&self.shared.consumers);
        let stored = consumers.get(&self.consumer).map(|stored| &stored.letters);
        match stored {
            Some(letters) if self.letters.is_empty() => read(letters),
            stored => {
                let mut letters = stored.cloned().unwrap_or_default();
                stage(&mut letters, self.letters.clone());
                read(&letters)
            }
        }
    }
}

fn stage(letters: &mut BTreeMap<Offset, DeadLetter>, staged: BTreeMap<Offset, Option<DeadLetter>>) {
    for (offset, letter) in staged {
        match letter {
            Some(letter) => letters.insert(offset, letter),
            None => letters.remove(&offset),
        };
    }
}

impl fmt::Debug for MemoryTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryTx")
            .field("consumer", &self.consumer)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transaction for MemoryTx {
    const KEEPS_DEAD_LETTERS: bool = true;

    async fn commit(self, advance: Advance) -> Result<(), Error> {
        let mut consumers = lock(&self.shared.consumers);
        let stored = consumers.entry(self.consumer.clone()).or_default();
        let position = stored.position.as_ref();
        let log = advance.check(
            &self.consumer,
            position.map(|position| (position.revision, &position.log)),
        )?;
        for (key, value) in self.staged {
            match value {
                Some(value) => stored.state.insert(key, value),
                None => stored.state.remove(&key),
            };
        }
        stage(&mut stored.letters, self.letters);
        stored.windows.extend(advance.windows);
        for numbering in &advance.forgotten {
            stored.windows.remove(numbering);
        }
        let mut position = Position::new(log, advance.next, advance.revision);
        position.owner = advance.owner;
        position.note = advance.note;
        let before = stored.position.take();
        let journal = advance.journal.or_else(|| before.map(|before| before.journal));
        position.journal = journal.unwrap_or_default();
        stored.position = Some(position);
        for (log, record) in self.sent {
            log.send(&[record])?;
        }
        self.shared.changed.notify_waiters();
        Ok(())
    }

    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        Some(self)
    }

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        Some(self)
    }

    async fn rollback(self) -> Result<(), Error> {
        Ok(())
    }
}

#[async_trait]
impl DeadLetters for MemoryTx {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        check_size("dead letter", letter.size(), LETTER_LIMIT)?;
        self.letters.insert(letter.record.offset, Some(letter.clone()));
        Ok(())
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        let existed = self.with_letters(|letters| letters.contains_key(&offset));
        self.letters.insert(offset, None);
        Ok(existed)
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        let removed: Vec<Offset> = self.with_letters(|letters| letters.range(offset..).map(|(at, _)| *at).collect());
        self.letters.extend(removed.iter().map(|at| (*at, None)));
        Ok(removed.len() as u64)
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        Ok(self.with_letters(|letters| letters.get(&offset).cloned()))
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        Ok(self.with_letters(|letters| {
            let mut of_key = letters.values().filter(|letter| letter.key().is_some_and(|k| k == key));
            of_key.next().cloned()
        }))
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        Ok(self.with_letters(|letters| {
            let due = letters.values().filter(|letter| letter.due.is_some());
            due.min_by_key(|letter| (letter.due, letter.record.offset)).cloned()
        }))
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        Ok(self.with_letters(|letters| {
            let after = letters.range((from, Bound::Unbounded));
            after.take(limit).map(|(_, letter)| letter.clone()).collect()
        }))
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        let counts = self.with_letters(|letters| {
            let mut counts = BTreeMap::<Bytes, u64>::new();
            for key in letters.values().filter_map(DeadLetter::key) {
                *counts.entry(key.clone()).or_default() += 1;
            }
            counts
        });
        let after = counts
            .into_iter()
            .filter(|(key, _)| after.is_none_or(|after| **key > *after));
        Ok(after.take(limit).collect())
    }

    async fn total(&mut self) -> Result<u64, Error> {
        Ok(self.with_letters(|letters| letters.len() as u64))
    }
}

#[async_trait]
impl Outbox for MemoryTx {
    async fn send(&mut self, log: &str, record: NewRecord) -> Result<(), Error> {
        check_unnumbered(log, &record)?;
        record.check_size(SIZE_LIMIT)?;
        let memory = Memory {
            shared: Arc::clone(&self.shared),
        };
        self.sent.push((memory.log(log)?, record));
        Ok(())
    }
}

#[async_trait]
impl KeyValue for MemoryTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        if let Some(staged) = self.staged.get(key) {
            return Ok(staged.clone());
        }
        let consumers = lock(&self.shared.consumers);
        Ok(consumers
            .get(&self.consumer)
            .and_then(|stored| stored.state.get(key).cloned()))
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        check_entry_size(key, value, SIZE_LIMIT)?;
        self.staged
            .insert(Bytes::copy_from_slice(key), Some(Bytes::copy_from_slice(value)));
        Ok(())
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.staged.insert(Bytes::copy_from_slice(key), None);
        Ok(())
    }
}
