//! What a backend's author implements so that the kit can test the backend.

use std::{sync::Arc, time::Duration};

use essentially_once::{
    ConsumerId, Error, KeyValue, Log, Offset, OffsetStore, ReadState, async_trait, backend::Source,
};

use crate::proxy::Cut;

/// Starts the backend under test. One harness serves all cases, each in its own namespace.
#[async_trait]
pub trait Harness: Send + Sync + 'static {
    /// The backend that a case works with.
    type Backend: Backend;

    /// What the backend can do beyond the minimum. Each capability adds cases. Without it, those
    /// cases show as ignored, with the reason given here.
    fn capabilities(&self) -> Capabilities;

    /// Starts a fresh backend, in which no log and no position of another namespace shows.
    ///
    /// `namespace` is the name of the case: a valid log or consumer name of up to 80 bytes. On a
    /// shared server, put it in every name, plus something random, since a case can run more than
    /// once.
    ///
    /// # Errors
    /// Any reason why the backend cannot start. The case fails with it.
    async fn start(&self, namespace: &str) -> Result<Self::Backend, Source>;
}

/// The type through which cases use [`ReadState`], whichever type implements it.
pub type StateReader<S> = Arc<dyn ReadState<Tx = <S as OffsetStore>::Tx>>;

/// A request whose connection [`Backend::cut_next`] cuts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Request {
    /// [`Log::append`](essentially_once::Log::append).
    Append,
    /// [`Transaction::commit`](essentially_once::backend::Transaction::commit).
    Commit,
}

/// The backend of one case. Dropping it cleans up after the case, even a failed one.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// The store under test.
    type Store: OffsetStore<Tx: KeyValue> + 'static;

    /// Opens the log of that name, and creates it on the first call. Each call returns a separate
    /// handle, as another process would have it.
    ///
    /// # Errors
    /// Those of the backend.
    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error>;

    /// Opens the store. Each call returns a separate handle, as another process would have it.
    ///
    /// # Errors
    /// Those of the backend.
    async fn store(&self) -> Result<Self::Store, Error>;

    /// Restarts the backend as abruptly as possible: everything that it did not store durably is
    /// lost. Cases call this while appends and commits are in progress. Handles opened earlier may
    /// fail from now on. Capability `restart`.
    ///
    /// # Errors
    /// If the backend does not come up again. The case fails with it.
    async fn restart(&self) -> Result<(), Source> {
        Err(UNSUPPORTED.into())
    }

    /// Applies retention: removes at least the log's first record, and none at or after `before`.
    /// With `truncate_all`, it removes every record before `before`, even if no record is left.
    /// With `outbox`, `log` may also be an outbox. Capability `truncate`.
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

    /// Deletes the log and does not create it again. Capability `delete`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn delete(&self, log: &str) -> Result<(), Source> {
        let _ = log;
        Err(UNSUPPORTED.into())
    }

    /// Deletes the one record at `offset`, wherever it is in the log. Capability `delete_record`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn delete_record(&self, log: &str, offset: Offset) -> Result<(), Source> {
        let _ = (log, offset);
        Err(UNSUPPORTED.into())
    }

    /// Makes the backend refuse a record with that payload from now on, as a full disk would. A
    /// trigger or a quota can do it. The record is in the middle of a batch. The backend may then
    /// refuse the whole batch, or keep the records before it. Appends of other records must
    /// succeed. Capability `refuse`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn refuse(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        let _ = (log, payload);
        Err(UNSUPPORTED.into())
    }

    /// Cuts the connection on which a handle sends the next request of this kind, before the
    /// request or before its reply. It replaces a cut that has not been made.
    ///
    /// Only handles opened after the first call need to be affected. Open them through a
    /// [`Proxy`](crate::Proxy) from then on. Arm the proxy with
    /// [`Proxy::cut_at`](crate::Proxy::cut_at) and some bytes that the request contains, but
    /// opening a handle does not. Capability `wire`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn cut_next(&self, request: Request, cut: Cut) -> Result<(), Source> {
        let _ = (request, cut);
        Err(UNSUPPORTED.into())
    }

    /// The number of cuts made by [`cut_next`](Self::cut_next):
    /// [`Proxy::fired`](crate::Proxy::fired).
    fn cuts(&self) -> usize {
        0
    }

    /// Adds 1 to what the backend keeps natively under `name`, as part of the transaction. Examples
    /// are one more row, an incremented number, or a sent message. It must not go through
    /// [`KeyValue`]. `name` has up to 120 bytes of letters, digits, `-` and `_`. Capability
    /// `native`.
    ///
    /// # Errors
    /// Those of a native method that a handler calls.
    async fn native_put(&self, tx: &mut <Self::Store as OffsetStore>::Tx, name: &str) -> Result<(), Error> {
        let _ = (tx, name);
        Err(Error::failed("write natively", UNSUPPORTED))
    }

    /// How often [`native_put`](Self::native_put) took effect under that name, as visible outside
    /// any transaction. Capability `native`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn native_count(&self, name: &str) -> Result<u64, Source> {
        let _ = name;
        Err(UNSUPPORTED.into())
    }

    /// Opens a separate handle that reads state without a transaction. Capability `read_state`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn state_reader(&self) -> Result<StateReader<Self::Store>, Source> {
        Err(UNSUPPORTED.into())
    }

    /// Appends an entry that looks like this crate's own but cannot be decoded. Returns its raw
    /// bytes, which the yielded record must have as its payload. Choose bytes that are not valid
    /// UTF-8. Capability `malformed`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn append_malformed(&self, log: &str) -> Result<Vec<u8>, Source> {
        let _ = log;
        Err(UNSUPPORTED.into())
    }

    /// Damages the stored dead letter at `offset` so that the store cannot read it any more. What
    /// the store knows of its key and its due time stays. Capability `damage_letter`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn damage_letter(&self, consumer: &ConsumerId, offset: Offset) -> Result<(), Source> {
        let _ = (consumer, offset);
        Err(UNSUPPORTED.into())
    }

    /// Opens the outbox of that name for reading. Each call returns a separate handle, as another
    /// process would have it. Cases call this only after a commit has sent to the outbox.
    /// Capability `outbox`.
    ///
    /// # Errors
    /// Those of the backend.
    async fn outbox(&self, log: &str) -> Result<Arc<dyn Log>, Error> {
        let _ = log;
        Err(Error::failed("open an outbox", UNSUPPORTED))
    }

    /// Opens the outbox of that name to which commits of this consumer send. Override it, instead
    /// of [`outbox`](Self::outbox), where each consumer has outboxes of its own. Capability
    /// `outbox`.
    ///
    /// # Errors
    /// Those of the backend.
    async fn outbox_of(&self, consumer: &ConsumerId, log: &str) -> Result<Arc<dyn Log>, Error> {
        let _ = consumer;
        self.outbox(log).await
    }

    /// The name that a transaction sends to, for the outbox that [`outbox`](Self::outbox) opens
    /// under `log`. They differ if the harness adds a prefix, as on a shared server. Capability
    /// `outbox`.
    fn outbox_name(&self, log: &str) -> String {
        log.to_owned()
    }

    /// Appends `payload` as a program that does not use this crate would. Capability `foreign`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn append_foreign(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        let _ = (log, payload);
        Err(UNSUPPORTED.into())
    }
}

const UNSUPPORTED: &str = "the harness claims a capability but does not implement its method";

/// Whether the backend can do something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Support {
    /// It can. The cases run.
    Yes,
    /// It cannot, for this reason. The cases show as ignored.
    No(&'static str),
}

/// What a backend can do beyond the minimum. Start from [`Capabilities::minimal`] and add to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Capabilities {
    /// The backend has its own log. The harness of a store-only backend lends the in-memory log.
    pub log: Support,
    /// The backend has its own store. The harness of a log-only backend lends the in-memory store.
    pub store: Support,
    /// [`Backend::restart`] works.
    pub restart: Support,
    /// [`Backend::restart`] works while a transaction is open, and that transaction's reads fail at
    /// first after it.
    pub restart_amid_transaction: Support,
    /// [`Backend::truncate`] works.
    pub truncate: Support,
    /// [`Backend::recreate`] works.
    pub recreate: Support,
    /// [`Backend::truncate`] can remove all records of a log.
    pub truncate_all: Support,
    /// [`Backend::delete`] works, and an open handle can detect that its log is gone. A backend
    /// without incarnations (see [`LogId`](essentially_once::backend::LogId)) cannot detect it,
    /// because every log of that name looks like the same log.
    pub delete: Support,
    /// [`Backend::delete_record`] works.
    pub delete_record: Support,
    /// The log implements [`Log::remove_before`].
    pub remove_before: Support,
    /// [`Backend::refuse`] works.
    pub refuse: Support,
    /// [`Backend::cut_next`] works.
    pub wire: Support,
    /// [`Backend::native_put`] and [`Backend::native_count`] work. The fault runs then also write
    /// natively.
    pub native: Support,
    /// [`Backend::state_reader`] works.
    pub read_state: Support,
    /// The store lists its consumers: [`OffsetStore::consumers`] does not return `None`.
    pub consumers: Support,
    /// The store keeps beats: it implements [`OffsetStore::beat`] and [`OffsetStore::release`].
    pub beats: Support,
    /// A commit takes a few microseconds, so a case may make more than 65,536 of them.
    pub commits_are_cheap: Support,
    /// [`Backend::append_malformed`] works.
    pub malformed: Support,
    /// [`Backend::append_foreign`] works.
    pub foreign: Support,
    /// The log can tell where its last records begin: [`Log::tail`] does not return `None`.
    pub tail: Support,
    /// [`Backend::damage_letter`] works.
    pub damage_letter: Support,
    /// The store's transactions send records: [`Transaction::outbox`] returns something, and
    /// [`Backend::outbox`] works. The fault runs then also send records.
    ///
    /// [`Transaction::outbox`]: essentially_once::backend::Transaction::outbox
    pub outbox: Support,
    /// Consumers share an outbox. `No` where the backend documents that each consumer has outboxes
    /// of its own.
    pub shared_outboxes: Support,
    /// The largest record that the log accepts, in bytes, if it should be tested. Where the limit
    /// can be set, choose a small one.
    pub record_limit: Option<usize>,
    /// The largest value that a `put` accepts, in bytes, if it should be tested. Where the limit
    /// can be set, choose a small one.
    pub value_limit: Option<usize>,
    /// The largest key that a `put` accepts, in bytes, if it should be tested. At least 1,024.
    pub key_limit: Option<usize>,
    /// The longest log name that cases may use, in bytes. Less than 200 if the harness adds a
    /// prefix.
    pub log_name_bytes: usize,
    /// How many consumers a case has at once. Use fewer where each takes much of the server.
    pub many_consumers: u64,
    /// How often a case appends one record and waits until a reader has it. Use fewer rounds where
    /// that takes long.
    pub paced_rounds: usize,
    /// The largest difference between this process's clock and the clock that sets
    /// [`appended_at`](essentially_once::Record::appended_at).
    pub clock_skew: Duration,
    /// How often a case restarts the backend while work is in progress. Use fewer where it takes
    /// many seconds.
    pub restarts: u32,
    /// How many fault plans each run samples for each delivery. Use fewer where a handle takes long
    /// to open.
    pub fault_plans: usize,
}

impl Capabilities {
    /// A backend with a log and a store, and no other capability.
    pub fn minimal() -> Self {
        let no = Support::No("the harness does not claim this capability");
        Self {
            log: Support::Yes,
            store: Support::Yes,
            restart: no,
            restart_amid_transaction: no,
            truncate: no,
            truncate_all: no,
            recreate: no,
            delete: no,
            delete_record: no,
            remove_before: no,
            refuse: no,
            wire: no,
            native: no,
            read_state: no,
            consumers: no,
            beats: no,
            commits_are_cheap: no,
            malformed: no,
            foreign: no,
            tail: no,
            damage_letter: no,
            outbox: no,
            shared_outboxes: no,
            record_limit: None,
            value_limit: None,
            key_limit: None,
            log_name_bytes: 200,
            many_consumers: 1_000,
            paced_rounds: 2_000,
            clock_skew: Duration::from_secs(1),
            restarts: 4,
            fault_plans: 60,
        }
    }
}
