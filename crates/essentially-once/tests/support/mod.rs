//! A scripted backend: it counts the steps of the loop and fails at a chosen step in a chosen way.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, Handler, HandlerError, KeyValue, Log, NewRecord, Offset, OffsetStore, Record,
    backend::{
        Advance, Bounds, DeadLetter, DeadLetters, Durability, LogId, LogReader, Note, Owner, Position, Pulse, Revision,
        Transaction,
    },
    memory::{Memory, MemoryLog, MemoryStore, MemoryTx},
};

/// A step of the loop that can fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Bounds,
    Read,
    Next,
    Position,
    Begin,
    Handle,
    Commit,
}

/// How the step fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It did not happen, and a later try may succeed.
    Before,
    /// It happened, and the reply was lost.
    After,
    /// Another instance commits first.
    Overtaken,
    Truncated,
    OutOfRange,
    /// It did not happen, and no later try succeeds.
    Permanent,
    Panic,
    /// It never ends.
    Hang,
    /// It happened, and its reply never comes.
    HangAfter,
    /// The position no longer exists.
    Gone,
    /// The position went back to an earlier one.
    WentBack,
}

/// Faults by step and by how often the step was taken before. Log, store and handler share them.
#[derive(Clone, Default)]
pub struct Script {
    /// How many letters one transaction takes; 0 for any number.
    pub letters_per_commit: Arc<AtomicU64>,
    /// Whether letters that are there cannot be removed.
    pub keeps_letters: Arc<AtomicBool>,
    faults: Arc<Mutex<VecDeque<(Step, u64, Fault)>>>,
    counts: Arc<[AtomicU64; 7]>,
}

impl Script {
    /// Fails the `nth` execution of `step`, counted from 0.
    pub fn fail(self, step: Step, nth: u64, fault: Fault) -> Self {
        self.faults.lock().unwrap().push_back((step, nth, fault));
        self
    }

    fn take(&self, step: Step) -> Option<Fault> {
        let count = self.counts[step as usize].fetch_add(1, Ordering::SeqCst);
        let mut faults = self.faults.lock().unwrap();
        let index = faults.iter().position(|(s, nth, _)| (*s, *nth) == (step, count))?;
        faults.remove(index).map(|(_, _, fault)| fault)
    }

    pub fn taken(&self, step: Step) -> u64 {
        self.counts[step as usize].load(Ordering::SeqCst)
    }

    /// Asserts that every scripted fault occurred. A test whose fault never occurs proves nothing.
    pub fn assert_all_struck(&self) {
        let left = self.faults.lock().unwrap();
        assert!(left.is_empty(), "never struck: {left:?}");
    }
}

pub fn log_id() -> LogId {
    LogId::new("orders").unwrap()
}

fn error(fault: Fault, step: Step) -> Error {
    let log = log_id();
    let (requested, earliest, end) = (Offset::from(1), Offset::from(9), Offset::ZERO);
    match fault {
        Fault::Before => Error::unavailable(format!("{step:?}"), "scripted"),
        Fault::After => Error::indeterminate(format!("{step:?}"), "scripted"),
        Fault::Truncated => Error::Truncated {
            log,
            requested,
            earliest,
        },
        Fault::OutOfRange => Error::OutOfRange { log, requested, end },
        Fault::Permanent => Error::failed(format!("{step:?}"), "scripted"),
        Fault::Panic => panic!("scripted panic"),
        Fault::Overtaken | Fault::Hang | Fault::HangAfter | Fault::Gone | Fault::WentBack => {
            unreachable!("not an error")
        }
    }
}

pub struct Backend {
    pub memory: Memory,
    pub script: Script,
    /// The record that cannot be decoded.
    pub malformed: Option<Offset>,
    /// How many of the last records were deleted individually.
    pub deleted: Arc<AtomicU64>,
}

impl Backend {
    /// A log of `records` payloads `0`, `1`, ... and an empty store.
    pub async fn new(records: u64, script: Script) -> Self {
        let memory = Memory::new();
        let records: Vec<NewRecord> = (0..records).map(|n| NewRecord::new(n.to_string())).collect();
        memory.log("orders").unwrap().append(&records).await.unwrap();
        Self::of(memory, script)
    }

    pub fn of(memory: Memory, script: Script) -> Self {
        Self {
            memory,
            script,
            malformed: None,
            deleted: Arc::default(),
        }
    }

    pub fn memory_log(&self) -> MemoryLog {
        self.memory.log("orders").unwrap()
    }

    pub fn log(&self) -> ScriptedLog {
        ScriptedLog {
            inner: self.memory_log(),
            script: self.script.clone(),
            malformed: self.malformed,
            deleted: Arc::clone(&self.deleted),
        }
    }

    pub fn store(&self) -> ScriptedStore {
        ScriptedStore {
            inner: self.memory.store(),
            script: self.script.clone(),
        }
    }

    /// A handler that counts each record under its payload, in the state.
    pub fn counter(&self) -> Counter {
        Counter {
            script: self.script.clone(),
            ..Counter::default()
        }
    }

    pub async fn position(&self, consumer: &ConsumerId) -> Option<Position> {
        self.memory.store().position(consumer).await.unwrap()
    }

    /// How often each of the first `records` payloads was counted in the state.
    pub async fn counts(&self, consumer: &ConsumerId, records: u64) -> Vec<u64> {
        let mut tx = self.memory.store().begin(consumer).await.unwrap();
        let mut counts = Vec::new();
        for n in 0..records {
            counts.push(count(&mut tx, n.to_string().as_bytes()).await.unwrap());
        }
        counts
    }
}

pub struct ScriptedLog {
    inner: MemoryLog,
    script: Script,
    malformed: Option<Offset>,
    deleted: Arc<AtomicU64>,
}

impl ScriptedLog {
    fn clone_log(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            script: self.script.clone(),
            malformed: self.malformed,
            deleted: Arc::clone(&self.deleted),
        }
    }
}

struct ScriptedReader {
    inner: Box<dyn LogReader>,
    script: Script,
    malformed: Option<Offset>,
    log: ScriptedLog,
}

#[async_trait]
impl Log for ScriptedLog {
    fn id(&self) -> &LogId {
        self.inner.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.inner.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        match self.script.take(Step::Read) {
            Some(Fault::Hang) => std::future::pending().await,
            Some(fault) => Err(error(fault, Step::Read)),
            None => Ok(Box::new(ScriptedReader {
                inner: self.inner.read(from).await?,
                script: self.script.clone(),
                malformed: self.malformed,
                log: self.clone_log(),
            })),
        }
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        match self.script.take(Step::Bounds) {
            Some(Fault::Hang) => std::future::pending().await,
            Some(fault) => Err(error(fault, Step::Bounds)),
            None => self.inner.bounds().await,
        }
    }

    async fn readable_end(&self) -> Result<Offset, Error> {
        let end = self.inner.bounds().await?.end;
        Ok(end.lo().saturating_sub(self.deleted.load(Ordering::SeqCst)).into())
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.inner.remove_before(offset).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(Durability::Durable)
    }
}

#[async_trait]
impl LogReader for ScriptedReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        match self.script.take(Step::Next) {
            Some(Fault::Hang) => std::future::pending().await,
            Some(fault) => Err(error(fault, Step::Next)),
            None => {
                let mut records = self.inner.next(max).await?;
                let end = self.log.readable_end().await?;
                records.retain(|record| record.offset < end);
                if records.is_empty() {
                    std::future::pending::<()>().await;
                }
                for record in records
                    .iter_mut()
                    .filter(|record| Some(record.offset) == self.malformed)
                {
                    record.malformed = Some("scripted".into());
                }
                Ok(records)
            }
        }
    }
}

pub struct ScriptedStore {
    inner: MemoryStore,
    script: Script,
}

#[async_trait]
impl OffsetStore for ScriptedStore {
    type Tx = ScriptedTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        match self.script.take(Step::Position) {
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Gone) => Ok(None),
            Some(Fault::WentBack) => Ok(Some(Position::new(log_id(), Offset::ZERO, Revision::NONE.next_epoch()))),
            Some(fault) => Err(error(fault, Step::Position)),
            None => self.inner.position(consumer).await,
        }
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<ScriptedTx, Error> {
        match self.script.take(Step::Begin) {
            Some(Fault::Hang) => std::future::pending().await,
            Some(fault) => Err(error(fault, Step::Begin)),
            None => Ok(ScriptedTx {
                inner: self.inner.begin(consumer).await?,
                consumer: consumer.clone(),
                store: self.inner.clone(),
                script: self.script.clone(),
                refuse_commit: false,
                is_broken: false,
                letters: 0,
                commit_time: Duration::ZERO,
            }),
        }
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(Durability::Durable)
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

pub struct ScriptedTx {
    inner: MemoryTx,
    consumer: ConsumerId,
    store: MemoryStore,
    script: Script,
    /// Set to fail the commit, as after a statement that only the commit checks.
    pub refuse_commit: bool,
    /// Set once a read or write failed and the handler ignored it. What follows fails (S6).
    pub is_broken: bool,
    letters: u64,
    /// How long the commit takes.
    pub commit_time: Duration,
}

impl ScriptedTx {
    fn check(&self) -> Result<(), Error> {
        match self.is_broken {
            true => Err(Error::failed("use the transaction", "a read in it failed before")),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Transaction for ScriptedTx {
    const KEEPS_DEAD_LETTERS: bool = true;

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        Some(self)
    }

    async fn commit(self, advance: Advance) -> Result<(), Error> {
        if self.refuse_commit {
            return Err(Error::failed("commit", "refused at the commit"));
        }
        self.check()?;
        tokio::time::sleep(self.commit_time).await;
        match self.script.take(Step::Commit) {
            None => self.inner.commit(advance).await,
            Some(Fault::After) => {
                self.inner.commit(advance).await?;
                Err(error(Fault::After, Step::Commit))
            }
            Some(Fault::Overtaken) => {
                // The other instance is correct too: it handled the same record, which is the first
                // of the batch here.
                let mut other = self.store.begin(&self.consumer).await?;
                let next = advance_by_one(&self.store, &self.consumer, &mut other).await;
                let mut overtaking = advance.clone();
                overtaking.next = next;
                overtaking.note = Note::default();
                overtaking.revision = advance.expected.next_epoch();
                other.commit(overtaking).await?;
                self.inner.commit(advance).await
            }
            Some(Fault::HangAfter) => {
                self.inner.commit(advance).await?;
                std::future::pending().await
            }
            Some(fault) => Err(error(fault, Step::Commit)),
        }
    }

    async fn rollback(self) -> Result<(), Error> {
        self.inner.rollback().await
    }
}

#[async_trait]
impl DeadLetters for ScriptedTx {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        self.check()?;
        let limit = self.script.letters_per_commit.load(Ordering::SeqCst);
        if limit > 0 && self.letters == limit {
            return Err(Error::TooLarge {
                what: "transaction",
                size: limit as usize + 1,
                limit: limit as usize,
            });
        }
        self.letters += 1;
        self.inner.park(letter).await
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        self.check()?;
        if self.script.keeps_letters.load(Ordering::SeqCst) {
            return Ok(false);
        }
        self.inner.remove(offset).await
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        self.check()?;
        self.inner.remove_from(offset).await
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        self.check()?;
        self.inner.letter(offset).await
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        self.check()?;
        self.inner.head(key).await
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        self.check()?;
        self.inner.first_due().await
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        self.check()?;
        self.inner.list(after, limit).await
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        self.check()?;
        self.inner.counts(after, limit).await
    }

    async fn total(&mut self) -> Result<u64, Error> {
        self.check()?;
        self.inner.total().await
    }
}

async fn advance_by_one(store: &MemoryStore, consumer: &ConsumerId, tx: &mut MemoryTx) -> Offset {
    match store.position(consumer).await.unwrap() {
        Some(position) => {
            let key = position.next.to_string();
            let before = count(tx, key.as_bytes()).await.unwrap();
            tx.put(key.as_bytes(), &(before + 1).to_be_bytes()).await.unwrap();
            position.next.successor()
        }
        None => Offset::ZERO,
    }
}

#[async_trait]
impl KeyValue for ScriptedTx {
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

async fn count<Tx: KeyValue>(tx: &mut Tx, key: &[u8]) -> Result<u64, Error> {
    let value = tx.get(key).await?;
    Ok(value.map_or(0, |value| u64::from_be_bytes(value[..].try_into().unwrap())))
}

/// Adds one to the count under this key.
pub async fn count_one<Tx: KeyValue>(tx: &mut Tx, key: &[u8]) -> Result<(), Error> {
    let before = count(tx, key).await?;
    tx.put(key, &(before + 1).to_be_bytes()).await
}

/// Counts each record under its payload, in the state (essentially-once) or in memory (the other
/// deliveries).
#[derive(Default, Clone)]
pub struct Counter {
    script: Script,
    pub in_memory: Arc<Mutex<Vec<String>>>,
    pub resets: Arc<AtomicU64>,
    /// Payloads to reject.
    pub poison: Vec<&'static str>,
    /// Payloads that are fatal.
    pub fatal: Vec<&'static str>,
}

impl Counter {
    fn check(&self, record: &Record) -> Result<(), HandlerError> {
        let payload = std::str::from_utf8(&record.payload)?;
        if self.poison.contains(&payload) {
            return Err(HandlerError::reject("poison"));
        }
        if self.fatal.contains(&payload) {
            return Err(HandlerError::fatal("fatal"));
        }
        handler_fault(&self.script)
    }
}

/// The error that the script has for this call of a handler.
pub fn handler_fault(script: &Script) -> Result<(), HandlerError> {
    match script.take(Step::Handle) {
        Some(Fault::Permanent) => Err(HandlerError::retry("scripted")),
        Some(fault) => Err(error(fault, Step::Handle).into()),
        None => Ok(()),
    }
}

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Counter {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let before = count(tx, &record.payload).await?;
        tx.put(&record.payload, &(before + 1).to_be_bytes()).await?;
        self.check(record)
    }

    async fn reset(&mut self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

/// The same counter without a transaction.
pub struct InMemory(pub Counter);

#[async_trait]
impl Handler<()> for InMemory {
    async fn handle(&mut self, record: &Record, (): &mut ()) -> Result<(), HandlerError> {
        self.0.check(record)?;
        let payload = String::from_utf8(record.payload.to_vec())?;
        self.0.in_memory.lock().unwrap().push(payload);
        Ok(())
    }
}

/// A log that holds exactly this record.
pub struct OneRecord(pub Record);

struct OneRecordReader(Option<Record>);

#[async_trait]
impl Log for OneRecord {
    fn id(&self) -> &LogId {
        static ID: std::sync::OnceLock<LogId> = std::sync::OnceLock::new();
        ID.get_or_init(log_id)
    }

    async fn append(&self, _: &[NewRecord]) -> Result<Option<Offset>, Error> {
        Err(Error::failed("append", "this log holds exactly one record"))
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let record = Some(self.0.clone()).filter(|record| record.offset >= from);
        Ok(Box::new(OneRecordReader(record)))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        Ok(Bounds {
            earliest: self.0.offset,
            end: self.0.offset.successor(),
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(Durability::Durable)
    }
}

#[async_trait]
impl LogReader for OneRecordReader {
    async fn next(&mut self, _: usize) -> Result<Vec<Record>, Error> {
        match self.0.take() {
            Some(record) => Ok(vec![record]),
            None => std::future::pending().await,
        }
    }
}
