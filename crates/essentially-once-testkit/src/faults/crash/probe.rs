//! What a handler does outside its transaction, and the instances of the handler.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use essentially_once::{Handler, HandlerError, Offset, Record, async_trait};

use super::Make;
use crate::faults::FaultyTx;

/// Counts the calls that a handler makes outside its transaction, such as HTTP requests. Clones
/// count together.
///
/// Hand it to the fake client that the handler uses in the test. Each instance of the handler gets
/// its own probe, which knows the record in hand. A call is identified by its name and its record.
///
/// ```
/// use essentially_once_testkit::Probe;
///
/// struct FakeMail(Probe);
///
/// impl FakeMail {
///     async fn send(&self, _to: &str) {
///         self.0.call("POST /mail");
///     }
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Probe {
    calls: Arc<Mutex<Calls>>,
    in_hand: Arc<Mutex<Option<Offset>>>,
}

/// A call, and how often it was made.
pub(super) type Calls = BTreeMap<Call, usize>;

/// A call outside the transaction.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Call {
    pub(super) name: String,
    pub(super) about: About,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum About {
    Record(Offset),
    /// Made by [`Handler::flush`], for the records of a batch.
    Batch,
    Named(String),
}

impl Probe {
    pub(super) fn new() -> Self {
        Self {
            calls: Arc::default(),
            in_hand: Arc::default(),
        }
    }

    /// Counts a call of this name for the record in hand. In `flush`, where no single record is in
    /// hand, it is a call for a batch. Use [`call_about`](Self::call_about) there.
    pub fn call(&self, name: &str) {
        let about = lock(&self.in_hand).map_or(About::Batch, About::Record);
        self.count(name, about);
    }

    /// Counts a call of this name about something other than the record in hand, such as an order.
    pub fn call_about(&self, name: &str, about: impl fmt::Display) {
        self.count(name, About::Named(about.to_string()));
    }

    /// The probe of another instance in the same run.
    pub(super) fn of_instance(&self) -> Self {
        Self {
            calls: Arc::clone(&self.calls),
            in_hand: Arc::default(),
        }
    }

    pub(super) fn calls(&self) -> Calls {
        lock(&self.calls).clone()
    }

    fn count(&self, name: &str, about: About) {
        let name = name.to_owned();
        *lock(&self.calls).entry(Call { name, about }).or_default() += 1;
    }

    fn hold(&self, record: Option<Offset>) {
        *lock(&self.in_hand) = record;
    }
}

/// A panic while one of these locks is held leaves no partial change, so poisoning is ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `POST /mail for record 3`.
impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.about {
            About::Record(offset) => write!(f, "{} for record {offset}", self.name),
            About::Batch => write!(f, "{} in `flush`", self.name),
            About::Named(about) => write!(f, "{} about {about}", self.name),
        }
    }
}

/// The handler of one started process.
pub(super) struct Instance<T> {
    make: Make<T>,
    probe: Probe,
    handler: Box<dyn Handler<FaultyTx<T>>>,
    /// Whether a rollback makes a new handler instead of calling `reset`.
    is_renewed: bool,
}

impl<T> Instance<T> {
    pub(super) fn new(make: &Make<T>, run: &Probe, is_renewed: bool) -> Self {
        let probe = run.of_instance();
        Self {
            handler: make(&probe),
            make: Arc::clone(make),
            probe,
            is_renewed,
        }
    }
}

#[async_trait]
impl<T: Send> Handler<FaultyTx<T>> for Instance<T> {
    async fn handle(&mut self, record: &Record, tx: &mut FaultyTx<T>) -> Result<(), HandlerError> {
        self.probe.hold(Some(record.offset));
        let handled = self.handler.handle(record, tx).await;
        self.probe.hold(None);
        handled
    }

    async fn flush(&mut self, tx: &mut FaultyTx<T>) -> Result<(), HandlerError> {
        // A dropped call of `handle` leaves its record in hand.
        self.probe.hold(None);
        self.handler.flush(tx).await
    }

    async fn reset(&mut self) {
        match self.is_renewed {
            true => self.handler = (self.make)(&self.probe),
            false => self.handler.reset().await,
        }
    }
}

/// A handler for the store's own transactions. No fault strikes inside it.
pub(super) struct Native<H>(pub(super) H);

#[async_trait]
impl<T: Send, H: Handler<T>> Handler<FaultyTx<T>> for Native<H> {
    async fn handle(&mut self, record: &Record, tx: &mut FaultyTx<T>) -> Result<(), HandlerError> {
        self.0.handle(record, tx.inner_mut()).await
    }

    async fn flush(&mut self, tx: &mut FaultyTx<T>) -> Result<(), HandlerError> {
        self.0.flush(tx.inner_mut()).await
    }

    async fn reset(&mut self) {
        self.0.reset().await;
    }
}
