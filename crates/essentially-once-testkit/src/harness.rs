//! What a backend's author provides, so that the kit can test it.

use std::sync::Arc;

use essentially_once::{Error, KeyValue, Log, Offset, OffsetStore, Source, async_trait};

/// Starts the backend under test. One harness serves all cases, each on a namespace of its own.
#[async_trait]
pub trait Harness: Send + Sync + 'static {
    /// What a case works with.
    type Backend: Backend;

    /// What the backend can do beyond the minimum. Each capability adds cases; without it they show as ignored, with the
    /// reason that stands here.
    fn capabilities(&self) -> Capabilities;

    /// A fresh backend: no log and no position of another namespace shows in it. `namespace` is a valid log or consumer name
    /// of up to 80 bytes, unique within the run; on a shared server, put it and something random in every name.
    ///
    /// # Errors
    /// Whatever keeps the backend from starting; the case fails with it.
    async fn start(&self, namespace: &str) -> Result<Self::Backend, Source>;
}

/// One case's own backend. Dropping it cleans up after the case, failed or not.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// The store under test.
    type Store: OffsetStore<Tx: KeyValue> + 'static;

    /// Opens the log of that name, creating it at the first call. Each call gives a handle of its own, as to another process.
    ///
    /// # Errors
    /// As the backend says.
    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error>;

    /// Opens the store. Each call gives a handle of its own, as to another process.
    ///
    /// # Errors
    /// As the backend says.
    async fn store(&self) -> Result<Self::Store, Error>;

    /// Restarts the backend, as hard as can be: whatever it did not keep durably is gone. Called while appends and commits
    /// are under way. Handles given out before may fail from now on. Capability `restart`.
    ///
    /// # Errors
    /// If it did not come up again; the case fails with it.
    async fn restart(&self) -> Result<(), Source> {
        Err(UNSUPPORTED.into())
    }

    /// Applies retention: removes at least the log's first record, and none at or after `before`. Capability `truncate`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn truncate(&self, log: &str, before: Offset) -> Result<(), Source> {
        let _ = (log, before);
        Err(UNSUPPORTED.into())
    }

    /// Deletes the log and creates it again, empty, under the same name. Capability `recreate`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn recreate(&self, log: &str) -> Result<(), Source> {
        let _ = log;
        Err(UNSUPPORTED.into())
    }

    /// Appends an entry that looks like this crate's own but cannot be decoded, and returns its raw bytes: those that the payload
    /// of the yielded record must hold. Choose some that are no text. Capability `malformed`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn append_malformed(&self, log: &str) -> Result<Vec<u8>, Source> {
        let _ = log;
        Err(UNSUPPORTED.into())
    }

    /// Appends `payload` as someone would who does not know this crate. Capability `foreign`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn append_foreign(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        let _ = (log, payload);
        Err(UNSUPPORTED.into())
    }
}

const UNSUPPORTED: &str = "the harness claims a capability whose method it does not implement";

/// Whether the backend can do something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Support {
    /// It can: the cases run.
    Yes,
    /// It cannot, for this reason: the cases show as ignored.
    No(&'static str),
}

/// What a backend can do beyond the minimum. Start from [`Capabilities::minimal`] and say more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Capabilities {
    /// It has a log of its own. A harness for a mere store lends the in-memory one.
    pub log: Support,
    /// It has a store of its own. A harness for a mere log lends the in-memory one.
    pub store: Support,
    /// [`Backend::restart`] works.
    pub restart: Support,
    /// [`Backend::restart`] works while a transaction is open, and reads of that transaction then fail at first.
    pub restart_amid_transaction: Support,
    /// [`Backend::truncate`] works.
    pub truncate: Support,
    /// [`Backend::recreate`] works.
    pub recreate: Support,
    /// [`Backend::append_malformed`] works.
    pub malformed: Support,
    /// [`Backend::append_foreign`] works.
    pub foreign: Support,
    /// The largest record that the log takes, in bytes, if it should be tested; choose a small limit where it can be set.
    pub record_limit: Option<usize>,
    /// The largest value that a `put` takes, in bytes, if it should be tested; choose a small limit where it can be set.
    pub value_limit: Option<usize>,
    /// How many plans of faults each run samples for each delivery; fewer where a handle takes long to open.
    pub fault_plans: usize,
}

impl Capabilities {
    /// A log and a store, and nothing else.
    pub fn minimal() -> Self {
        let no = Support::No("the harness does not say that it can");
        Self {
            log: Support::Yes,
            store: Support::Yes,
            restart: no,
            restart_amid_transaction: no,
            truncate: no,
            recreate: no,
            malformed: no,
            foreign: no,
            record_limit: None,
            value_limit: None,
            fault_plans: 60,
        }
    }
}
