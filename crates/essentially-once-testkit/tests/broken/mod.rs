//! The in-memory backend, broken on purpose. An explorer that finds nothing here proves nothing
//! elsewhere.

pub(crate) mod letters;

use std::{
    collections::HashMap,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use essentially_once::{
    ConsumerId, Epoch, Error, KeyValue, Log, NewRecord, Offset, OffsetStore, Origin, Outbox, ProducerId, async_trait,
    backend::{Advance, Bounds, Durability, LogId, LogReader, Position, Revision, Source, Transaction},
    memory::{Memory, MemoryStore, MemoryTx},
};
use essentially_once_testkit::{Backend, Capabilities, Harness, Support};

/// What is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flaw {
    /// A commit succeeds whatever the stored revision is.
    AnyRevision,
    /// `put` takes effect immediately, outside the transaction.
    Leaky,
    /// Windows are not kept with the position.
    ForgottenWindows,
    /// A native write takes effect immediately, outside the transaction.
    NativeAtOnce,
    /// A native write takes effect although its commit is fenced.
    NativeUnfenced,
    /// A record is sent immediately, outside the transaction.
    SentAtOnce,
    /// A record is sent although its commit is fenced.
    SentUnfenced,
    /// A reader that does not begin at the start skips a record.
    Skipping,
}

/// A harness for a backend with this flaw.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Broken(pub(crate) Flaw);

#[async_trait]
impl Harness for Broken {
    type Backend = BrokenMemory;

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::minimal();
        if matches!(self.0, Flaw::NativeAtOnce | Flaw::NativeUnfenced) {
            capabilities.native = Support::Yes;
        }
        if matches!(self.0, Flaw::SentAtOnce | Flaw::SentUnfenced) {
            capabilities.outbox = Support::Yes;
        }
        capabilities
    }

    async fn start(&self, _: &str) -> Result<BrokenMemory, Source> {
        Ok(BrokenMemory {
            flaw: self.0,
            memory: Memory::new(),
            leaked: Leaked::default(),
            written: Written::default(),
        })
    }
}

pub(crate) struct BrokenMemory {
    flaw: Flaw,
    memory: Memory,
    leaked: Leaked,
    written: Written,
}

#[async_trait]
impl Backend for BrokenMemory {
    type Store = BrokenStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        let log = self.memory.log(name)?;
        match self.flaw {
            Flaw::Skipping => Ok(Arc::new(SkippingLog(log, AtomicBool::new(false)))),
            _ => Ok(Arc::new(log)),
        }
    }

    async fn store(&self) -> Result<BrokenStore, Error> {
        Ok(BrokenStore {
            flaw: self.flaw,
            inner: self.memory.store(),
            memory: self.memory.clone(),
            leaked: self.leaked.clone(),
            written: self.written.clone(),
        })
    }

    async fn outbox(&self, log: &str) -> Result<Arc<dyn Log>, Error> {
        Backend::log(self, log).await
    }

    async fn native_put(&self, tx: &mut BrokenTx, name: &str) -> Result<(), Error> {
        tx.native.push(name.to_owned());
        if self.flaw == Flaw::NativeAtOnce {
            self.written.apply(&mut tx.native);
        }
        Ok(())
    }

    async fn native_count(&self, name: &str) -> Result<u64, Source> {
        Ok(self.written.lock().get(name).copied().unwrap_or_default())
    }
}

/// Values that were put outside the transaction.
#[derive(Clone, Default)]
struct Leaked(Arc<Mutex<HashMap<Vec<u8>, Vec<u8>>>>);

impl Leaked {
    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How often each name was written natively.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<HashMap<String, u64>>>);

impl Written {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, names: &mut Vec<String>) {
        for name in names.drain(..) {
            *self.lock().entry(name).or_default() += 1;
        }
    }
}

pub(crate) struct BrokenStore {
    flaw: Flaw,
    inner: MemoryStore,
    memory: Memory,
    leaked: Leaked,
    written: Written,
}

#[async_trait]
impl OffsetStore for BrokenStore {
    type Tx = BrokenTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.inner.position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<BrokenTx, Error> {
        Ok(BrokenTx {
            flaw: self.flaw,
            inner: self.inner.begin(consumer).await?,
            store: self.inner.clone(),
            consumer: consumer.clone(),
            leaked: self.leaked.clone(),
            written: self.written.clone(),
            native: Vec::new(),
            memory: self.memory.clone(),
            sent: Vec::new(),
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.inner.durability().await
    }
}

pub(crate) struct BrokenTx {
    flaw: Flaw,
    inner: MemoryTx,
    store: MemoryStore,
    consumer: ConsumerId,
    leaked: Leaked,
    written: Written,
    /// The names under which this transaction wrote natively.
    native: Vec<String>,
    memory: Memory,
    /// The records to send, each with its outbox.
    sent: Vec<(String, NewRecord)>,
}

/// Numbers the records, but appends them apart from the commit.
async fn append(memory: &Memory, sent: Vec<(String, NewRecord)>) -> Result<(), Error> {
    for (log, record) in sent {
        let log = memory.log(&log)?;
        let number = log.bounds().await?.end.lo();
        let origin = Origin::new(ProducerId::new(log.id().name())?, Epoch::STABLE, number);
        log.append(&[record.origin(origin)]).await?;
    }
    Ok(())
}

#[async_trait]
impl Outbox for BrokenTx {
    async fn send(&mut self, log: &str, record: NewRecord) -> Result<(), Error> {
        self.sent.push((log.to_owned(), record));
        match self.flaw {
            Flaw::SentAtOnce => append(&self.memory, mem::take(&mut self.sent)).await,
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Transaction for BrokenTx {
    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        Some(self)
    }

    async fn commit(mut self, mut advance: Advance) -> Result<(), Error> {
        match self.flaw {
            Flaw::AnyRevision => {
                let position = self.store.position(&self.consumer).await?;
                advance.expected = position.map_or(Revision::NONE, |position| position.revision);
            }
            Flaw::ForgottenWindows => advance.windows.clear(),
            Flaw::Leaky
            | Flaw::Skipping
            | Flaw::NativeAtOnce
            | Flaw::NativeUnfenced
            | Flaw::SentAtOnce
            | Flaw::SentUnfenced => {}
        }
        let sent = mem::take(&mut self.sent);
        let committed = self.inner.commit(advance).await;
        if committed.is_ok() || self.flaw == Flaw::NativeUnfenced {
            self.written.apply(&mut self.native);
        }
        if committed.is_ok() || self.flaw == Flaw::SentUnfenced {
            append(&self.memory, sent).await?;
        }
        committed
    }

    async fn rollback(self) -> Result<(), Error> {
        self.inner.rollback().await
    }
}

#[async_trait]
impl KeyValue for BrokenTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<bytes::Bytes>, Error> {
        if let Some(leaked) = self.leaked.lock().get(key) {
            return Ok(Some(leaked.clone().into()));
        }
        self.inner.get(key).await
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        if self.flaw == Flaw::Leaky {
            self.leaked.lock().insert(key.to_vec(), value.to_vec());
            return Ok(());
        }
        self.inner.put(key, value).await
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.inner.delete(key).await
    }
}

/// A log whose readers skip a record, except for the first reader of each handle.
struct SkippingLog<L>(L, AtomicBool);

#[async_trait]
impl<L: Log> Log for SkippingLog<L> {
    fn id(&self) -> &LogId {
        self.0.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.0.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        if !self.1.swap(true, Ordering::SeqCst) {
            return self.0.read(from).await;
        }
        // Skips the record after the one that a consumer compares with its position.
        let skipped = from.successor().successor();
        self.0.read(skipped.min(self.0.bounds().await?.end)).await
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.0.bounds().await
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.0.remove_before(offset).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.0.durability().await
    }
}
