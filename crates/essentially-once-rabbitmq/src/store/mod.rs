//! The store: a changelog stream per consumer, folded in memory.
//!
//! RabbitMQ has no database and no transaction over more than one message. But every reader of a
//! stream sees the same order. So a commit is *one message* with the new position and all changes
//! of the state, and the order decides. Of two entries that make the same revision, the first one
//! in the stream applies, for every reader (`rule.rs`). A writer reads its own entry back to learn
//! which one it was.

mod changelog;
mod cover;
mod entry;
mod fold;
#[cfg(test)]
mod model;
pub(crate) mod names;
mod recover;
mod sent;
mod snapshot;
mod snapshots;
mod state;
mod wire;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, NewRecord, OffsetStore, ReadState,
    backend::{Advance, Durability, Owner, Position, Pulse, Revision, Snapshot, Transaction},
};

pub use self::sent::RabbitSent;
use self::{
    changelog::Changelog,
    state::{Writes, value_size},
};
use crate::{Rabbit, server::Server};

const MIB: usize = 1024 * 1024;

/// The largest state. The streams of the snapshots have room for a few of this size.
const STATE_MAX: usize = 256 * MIB;

/// What an entry takes besides staged changes if few producers are read at a time. If it takes
/// more, the commit fails.
const HEAD: usize = 1024;

/// The largest entry. The changelog's retention relies on it.
const ENTRY_MAX: usize = 32 * MIB;

/// What an entry may take besides its largest value.
const BESIDE_VALUE: usize = 64 * 1024;

impl Rabbit {
    /// The store. Every call returns a handle that reads the state for itself. Clones of one handle
    /// share what they have read.
    pub fn store(&self) -> RabbitStore {
        let record_limit = self.server.options.record_limit.min(ENTRY_MAX - BESIDE_VALUE);
        RabbitStore {
            server: Arc::clone(&self.server),
            limits: Limits {
                value: record_limit,
                entry: (record_limit + BESIDE_VALUE).max(8 * MIB),
                state: STATE_MAX,
                snapshot_after: 8 * MIB as u64,
            },
            consumers: Arc::default(),
        }
    }
}

/// Limits of one handle, in bytes.
#[derive(Clone, Copy, Debug)]
struct Limits {
    value: usize,
    entry: usize,
    state: usize,
    snapshot_after: u64,
}

/// Positions and state in streams; see [`Rabbit::store`].
///
/// Each consumer has up to three streams, created when they are first needed, with as many replicas
/// as the [options](crate::RabbitOptions::replicas) say. `<prefix>.<consumer>.changelog` has one
/// message per commit. `<prefix>.<consumer>.snapshots.a` and `.b` hold snapshots. Dots in the
/// prefix are doubled, so that no two consumers share a stream.
///
/// Streams are heavy, and every consumer has its own. This store is meant for dozens of consumers.
/// With a thousand it works, and each takes 50 ms to start. Leave the retention of the streams
/// alone: a policy that shortens them can lose the state. The store detects the loss when it reads
/// the state, and fails with [`Error::Failed`] and `state lost`.
///
/// # State is held in memory
/// Every handle that is used for a consumer keeps all of the consumer's state in memory. It reads
/// the state on first use, from a snapshot and the entries after it. The store is meant for up to
/// about a hundred megabytes or a million keys. The most is [`state_limit`](Self::state_limit),
/// beyond which a `put` is refused. Larger state belongs in a database.
///
/// # What a commit means
/// It returns `Ok` when more than half of the replicas have its message and it came first. RabbitMQ
/// does not wait for disks. An acknowledged commit survives a crash of this process and of a
/// broker's process. But a single node, or more than half of them at once, can lose the last
/// moments when the *machine* loses power.
///
/// A commit takes one message. All changes and all records that it [sends](RabbitTx::send) are
/// together limited to the larger of 8 MiB and [`record_limit`](crate::RabbitOptions::record_limit)
/// plus 64 KiB, and never exceed 32 MiB. A `put` or `send` that no longer fits fails with
/// [`Error::TooLarge`] for a `transaction`. If the handler passes that error on, the consumer
/// commits the records before this one and handles it again in a transaction of its own.
///
/// # Standbys
/// Beats and releases are small marks in the changelog. [`watch`](OffsetStore::watch) and
/// [`pulse`](OffsetStore::pulse) follow the changelog as [`begin`](OffsetStore::begin) does, with
/// the state in memory, and write nothing.
///
/// # Reading
/// [`position`](OffsetStore::position) writes a small mark to the changelog and reads up to it, so
/// that the result is never older than the call. It needs the right to write.
/// [`begin`](OffsetStore::begin) does the same unless this handle has just committed or read the
/// position. If another handle commits later, the transaction has read outdated values, and its
/// commit is `Fenced`.
///
/// # Foreign and damaged messages
/// The store ignores a message in a changelog that does not begin like an entry of this crate, and
/// logs a warning. A message that begins like one but cannot be read (because it is damaged or of a
/// later version) could be a commit. It stops the consumer with [`Error::Failed`], which names the
/// stream and the offset. The store ignores a damaged or incomplete snapshot and uses an older one.
#[derive(Clone)]
pub struct RabbitStore {
    server: Arc<Server>,
    limits: Limits,
    consumers: Arc<Mutex<HashMap<ConsumerId, Arc<Changelog>>>>,
}

impl RabbitStore {
    /// The most state that a consumer may have, in bytes of memory: keys, values, windows, and
    /// about 96 bytes for each. At most 256 MiB, which is the default. A `put` or commit that would
    /// exceed it fails with [`Error::Failed`]. State that is already larger can still be read and
    /// deleted.
    #[must_use]
    pub fn state_limit(mut self, bytes: usize) -> Self {
        self.limits.state = bytes.min(STATE_MAX);
        self.with_limits()
    }

    /// How many bytes of changelog follow a snapshot before the next one is written in the
    /// background. 8 MiB by default. Each entry counts a kilobyte more than its size. If the state
    /// is larger than this, the size of the state counts instead, up to 64 MiB. Fewer bytes make
    /// starting faster and cost more writing.
    ///
    /// A snapshot that fails is tried again later. If snapshots keep failing until 128 MiB of
    /// changelog are not covered, commits wait for one and fail with its error. The broker's
    /// retention might otherwise remove entries that are still needed.
    #[must_use]
    pub fn snapshot_after(mut self, bytes: u64) -> Self {
        self.limits.snapshot_after = bytes;
        self.with_limits()
    }

    /// Writes a snapshot of a consumer's state now, for instance before a planned restart, and
    /// returns when it is complete. This is optional, since
    /// [`snapshot_after`](Self::snapshot_after) triggers snapshots.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Failed`]. The state does not change.
    pub async fn snapshot(&self, consumer: &ConsumerId) -> Result<(), Error> {
        self.changelog(consumer)?.snapshot_now().await
    }

    /// Starts with no changelogs: the limits apply to those opened from now on.
    fn with_limits(mut self) -> Self {
        self.consumers = Arc::default();
        self
    }

    fn changelog(&self, consumer: &ConsumerId) -> Result<Arc<Changelog>, Error> {
        names::check_length(&self.server.options.prefix, self.server.vhost(), consumer)?;
        let mut consumers = self.consumers.lock().unwrap_or_else(PoisonError::into_inner);
        let changelog = || Arc::new(Changelog::new(&self.server, consumer, self.limits));
        Ok(Arc::clone(consumers.entry(consumer.clone()).or_insert_with(changelog)))
    }
}

impl fmt::Debug for RabbitStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitStore")
            .field("server", &self.server.to_string())
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl OffsetStore for RabbitStore {
    type Tx = RabbitTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.changelog(consumer)?.position().await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<RabbitTx, Error> {
        let changelog = self.changelog(consumer)?;
        let based_on = changelog.begin().await?;
        Ok(RabbitTx {
            changelog,
            based_on,
            writes: Writes::new(),
            growth: 0,
            staged: 0,
            sent: Vec::new(),
            failure: None,
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(Durability::Durable)
    }

    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        self.changelog(consumer)?.pulse().await
    }

    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        self.changelog(consumer)?.watch(seen, interval).await
    }

    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        self.changelog(consumer)?.beat(owner).await
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        self.changelog(consumer)?.release(owner).await
    }
}

/// A call costs as much as [`position`](OffsetStore::position). The first one reads all of the
/// consumer's state into this process's memory, and each one writes a mark to the changelog, which
/// needs the right to write. To show values often, keep one handle and read all keys in one call.
#[async_trait]
impl ReadState for RabbitStore {
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        self.changelog(consumer)?.read_state(keys).await
    }
}

/// The bytes of a write in an entry.
fn write_size(key: &[u8], value: Option<&[u8]>) -> usize {
    4 + key.len() + 1 + value.map_or(0, |value| 4 + value.len())
}

/// What a handler stages. Nothing leaves this process before the commit, and nothing is locked.
///
/// After an error other than [`Error::TooLarge`], the transaction can only be rolled back. A commit
/// then fails with that error and applies nothing, even if the handler ignored it.
pub struct RabbitTx {
    changelog: Arc<Changelog>,
    /// The revision that it reads.
    based_on: Revision,
    writes: Writes,
    /// By how much the writes make the state grow.
    growth: isize,
    /// About how many bytes of the commit's message the writes and the sent records take.
    staged: usize,
    sent: Vec<NewRecord>,
    /// The first error of an operation.
    failure: Option<String>,
}

impl RabbitTx {
    /// The consumer whose transaction this is.
    pub fn consumer(&self) -> &ConsumerId {
        &self.changelog.consumer
    }

    fn read(&self, key: &[u8]) -> Option<Bytes> {
        match self.writes.get(key) {
            Some(staged) => staged.clone(),
            None => self.changelog.fold().state.get(key).cloned(),
        }
    }

    fn stage_put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        let limit = self.changelog.value_limit();
        for (what, size) in [("key", key.len()), ("value", value.len())] {
            if size > limit {
                return Err(Error::TooLarge { what, size, limit });
            }
        }
        let before = match self.writes.get(key) {
            Some(write) => write_size(key, write.as_deref()),
            None => 0,
        };
        let staged = self.staged - before + write_size(key, Some(value));
        self.changelog.check_entry_size(staged)?;
        let stored = self.changelog.fold().state.size();
        let growth = self.growth + value_size(key, value) as isize - self.size_of(key);
        let (before, after) = (
            stored.saturating_add_signed(self.growth),
            stored.saturating_add_signed(growth),
        );
        self.changelog.check_state_size(before, after)?;
        (self.growth, self.staged) = (growth, staged);
        self.writes
            .insert(Bytes::copy_from_slice(key), Some(Bytes::copy_from_slice(value)));
        Ok(())
    }

    /// Keeps the transaction from committing without the failed operation. The handler may have
    /// ignored the error.
    fn remember(&mut self, error: Error) -> Error {
        if !matches!(error, Error::TooLarge { .. }) {
            self.failure.get_or_insert_with(|| error.to_string());
        }
        error
    }

    fn size_of(&self, key: &[u8]) -> isize {
        self.read(key).map_or(0, |value| value_size(key, &value)) as isize
    }
}

impl fmt::Debug for RabbitTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitTx")
            .field("consumer", self.consumer())
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transaction for RabbitTx {
    async fn commit(self, advance: Advance) -> Result<(), Error> {
        let Self {
            changelog, based_on, ..
        } = self;
        if let Some(failure) = self.failure {
            return Err(Error::failed(
                changelog.on("commit of"),
                format!("nothing was applied because an operation in the transaction failed: {failure}"),
            ));
        }
        changelog.commit(based_on, self.writes, self.sent, advance).await
    }

    async fn rollback(self) -> Result<(), Error> {
        Ok(())
    }
}

#[async_trait]
impl KeyValue for RabbitTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        Ok(self.read(key))
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.stage_put(key, value).map_err(|error| self.remember(error))
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.growth -= self.size_of(key);
        let before = self.writes.insert(Bytes::copy_from_slice(key), None);
        self.staged += write_size(key, None);
        self.staged -= before.map_or(0, |write| write_size(key, write.as_deref()));
        Ok(())
    }
}
