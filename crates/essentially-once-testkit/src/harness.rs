//! What a backend's author provides, so that the kit can test it.

use std::{sync::Arc, time::Duration};

use essentially_once::{Error, KeyValue, Log, Offset, OffsetStore, ReadState, async_trait, backend::Source};

use crate::Cut;

/// Starts the backend under test. One harness serves all cases, each on a namespace of its own.
#[async_trait]
pub trait Harness: Send + Sync + 'static {
    /// What a case works with.
    type Backend: Backend;

    /// What the backend can do beyond the minimum. Each capability adds cases; without it they show as ignored, with the
    /// reason that stands here.
    fn capabilities(&self) -> Capabilities;

    /// A fresh backend: no log and no position of another namespace shows in it. `namespace` is a valid log or consumer name
    /// of up to 80 bytes: the name of the case. On a shared server, put it and something random in every name, since a case
    /// can run more than once.
    ///
    /// # Errors
    /// Whatever keeps the backend from starting; the case fails with it.
    async fn start(&self, namespace: &str) -> Result<Self::Backend, Source>;
}

/// What [`ReadState`] reads through, whichever type implements it.
pub type StateReader<S> = Arc<dyn ReadState<Tx = <S as OffsetStore>::Tx>>;

/// A request whose connection [`Backend::cut_next`] cuts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Request {
    /// [`Log::append`](essentially_once::Log::append).
    Append,
    /// [`Transaction::commit`](essentially_once::backend::Transaction::commit).
    Commit,
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

    /// Applies retention: removes at least the log's first record, and none at or after `before`. Capability `truncate`;
    /// with `truncate_all` it removes every record before `before`, even if none is left.
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

    /// Deletes the log, and does not create it again. Capability `delete`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn delete(&self, log: &str) -> Result<(), Source> {
        let _ = log;
        Err(UNSUPPORTED.into())
    }

    /// Deletes the one record at `offset`, wherever in the log it is. Capability `delete_record`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn delete_record(&self, log: &str, offset: Offset) -> Result<(), Source> {
        let _ = (log, offset);
        Err(UNSUPPORTED.into())
    }

    /// Makes the backend refuse a record with that payload from now on, as a full disk would: by a trigger, say, or a
    /// quota. The record is amid a batch. Whether the backend then refuses all of the batch, or keeps what it took before, is
    /// its own affair. Appends of other records must succeed. Capability `refuse`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn refuse(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        let _ = (log, payload);
        Err(UNSUPPORTED.into())
    }

    /// Cuts the connection of the next such request that a handle sends, before the request or before its reply. It replaces
    /// a cut that was not made. Only handles opened after the first call need to be affected: open them through a
    /// [`Proxy`](crate::Proxy) from then on, and arm it with [`Proxy::cut_at`](crate::Proxy::cut_at) and some bytes that such a
    /// request has and opening a handle has not. Capability `wire`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn cut_next(&self, request: Request, cut: Cut) -> Result<(), Source> {
        let _ = (request, cut);
        Err(UNSUPPORTED.into())
    }

    /// How many cuts of [`cut_next`](Self::cut_next) were made: [`Proxy::fired`](crate::Proxy::fired).
    fn cuts(&self) -> usize {
        0
    }

    /// Adds 1 to what the backend keeps natively under `name`, as part of the transaction: a row more, a number that is
    /// counted up, a message that is sent. It must not go through [`KeyValue`]. `name` has up to 120 bytes of letters,
    /// digits, `-` and `_`. Capability `native`.
    ///
    /// # Errors
    /// As of a native method that a handler calls.
    async fn native_put(&self, tx: &mut <Self::Store as OffsetStore>::Tx, name: &str) -> Result<(), Error> {
        let _ = (tx, name);
        Err(Error::failed("write natively", UNSUPPORTED))
    }

    /// How often [`native_put`](Self::native_put) took effect under that name, as everyone sees it outside any transaction.
    /// Capability `native`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn native_count(&self, name: &str) -> Result<u64, Source> {
        let _ = name;
        Err(UNSUPPORTED.into())
    }

    /// Opens what reads state without a transaction, on a handle of its own. Capability `read_state`.
    ///
    /// # Errors
    /// The case fails with it.
    async fn state_reader(&self) -> Result<StateReader<Self::Store>, Source> {
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
    /// [`Backend::truncate`] can remove all records that a log holds.
    pub truncate_all: Support,
    /// [`Backend::delete`] works, and a handle that is still open can tell that its log is gone. Without incarnations
    /// (see [`LogId`](essentially_once::backend::LogId)) it cannot, and the log of that name is the same log to everyone.
    pub delete: Support,
    /// [`Backend::delete_record`] works.
    pub delete_record: Support,
    /// [`Backend::refuse`] works.
    pub refuse: Support,
    /// [`Backend::cut_next`] works.
    pub wire: Support,
    /// [`Backend::native_put`] and [`Backend::native_count`] work. The fault runs then write natively too.
    pub native: Support,
    /// [`Backend::state_reader`] works.
    pub read_state: Support,
    /// The store keeps beats: [`OffsetStore::beat`] and [`OffsetStore::release`] are implemented.
    pub beats: Support,
    /// A commit takes some microseconds, so that a case may make more than 65,536 of them.
    pub commits_are_cheap: Support,
    /// [`Backend::append_malformed`] works.
    pub malformed: Support,
    /// [`Backend::append_foreign`] works.
    pub foreign: Support,
    /// The largest record that the log takes, in bytes, if it should be tested; choose a small limit where it can be set.
    pub record_limit: Option<usize>,
    /// The largest value that a `put` takes, in bytes, if it should be tested; choose a small limit where it can be set.
    pub value_limit: Option<usize>,
    /// The largest key that a `put` takes, in bytes, if it should be tested. At least 1,024.
    pub key_limit: Option<usize>,
    /// How long the names of logs may be that cases use, in bytes; less than 200 where the harness puts a prefix before them.
    pub log_name_bytes: usize,
    /// How often a case appends one record and waits until a reader has it; fewer where that takes long.
    pub paced_rounds: usize,
    /// How far the clock that [`appended_at`](essentially_once::Record::appended_at) is from may be from this process's.
    pub clock_skew: Duration,
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
            truncate_all: no,
            recreate: no,
            delete: no,
            delete_record: no,
            refuse: no,
            wire: no,
            native: no,
            read_state: no,
            beats: no,
            commits_are_cheap: no,
            malformed: no,
            foreign: no,
            record_limit: None,
            value_limit: None,
            key_limit: None,
            log_name_bytes: 200,
            paced_rounds: 2_000,
            clock_skew: Duration::from_secs(1),
            fault_plans: 60,
        }
    }
}
