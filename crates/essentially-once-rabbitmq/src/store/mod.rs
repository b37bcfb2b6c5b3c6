//! The store: a changelog stream per consumer, folded in memory.
//!
//! RabbitMQ has no database and no transaction over more than one message. But every reader of a
//! stream sees the same order. So a commit is *one message* with the new position and all changes
//! of the state, and the order decides. Of two entries that make the same revision, the first one
//! in the stream applies, for every reader (`rule.rs`). A writer reads its own entry back to learn
//! which one it was.

mod backlog;
mod changelog;
mod entry;
mod guard;
mod hints;
mod image;
mod letter;
mod letter_index;
mod letters;
#[cfg(test)]
mod model;
pub(crate) mod names;
mod outbox;
mod replica;
mod rule;
mod scope;
mod sending;
mod snapshot_policy;
mod snapshots;
mod state;
mod turns;
mod tx;
mod wire;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use essentially_once::{
    ConsumerId, Error, OffsetStore, ReadState,
    backend::{Durability, LogId, Owner, Position, Pulse, Snapshot},
};

use self::{
    changelog::Changelog,
    guard::Guard,
    names::Kind,
    scope::{Limits, Scope},
};
pub use self::{outbox::RabbitSent, tx::RabbitTx};
use crate::connection::server::Server;

/// Positions and state in streams; see [`Rabbit::store`](crate::Rabbit::store).
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
/// Dead letters are part of the state: every such handle keeps all letters of the consumer in
/// memory, with their records. Each takes the bytes of its record and reasons, and about 400 more.
/// An edited letter also takes those of the original. At [`state_limit`](Self::state_limit) the run
/// ends with an error. Choose
/// [`DeadLetterOptions::limit`](essentially_once::consumer::DeadLetterOptions::limit) accordingly:
/// a thousand letters of 100 kB already take a hundred megabytes.
///
/// # What a commit means
/// It returns `Ok` when more than half of the replicas have its message and it came first. RabbitMQ
/// does not wait for disks. An acknowledged commit survives a crash of this process and of a
/// broker's process. But a single node, or more than half of them at once, can lose the last
/// moments when the *machine* loses power.
///
/// A commit takes one message. All changes, all letters that it parks, and all records that it
/// [sends](essentially_once::Outbox::send) are together limited to the larger of 8 MiB and
/// [`record_limit`](crate::RabbitOptions::record_limit) plus 64 KiB, and never exceed 32 MiB. A
/// `put`, `send` or letter that no longer fits fails with [`Error::TooLarge`] for a `transaction`.
/// If the handler passes that error on, the consumer commits the records before this one and
/// handles it again in a transaction of its own. A letter that is parked again with the same record
/// takes only its status, at most a few kilobytes.
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
/// # Operators beside a busy consumer
/// Of two commits that are under way, only the first one counts. So that an operator gets through
/// to a consumer that commits all the time, a handle whose commit came too late announces the next
/// one with a mark, and the consumer waits for it, for at most 100 ms.
///
/// # Listing consumers
/// AMQP has no command that lists streams, so [`consumers`](OffsetStore::consumers) returns `None`.
/// The management interface of the broker shows the changelogs, one per consumer.
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
    guards: Vec<Guard>,
    consumers: Arc<Mutex<HashMap<ConsumerId, Arc<Changelog>>>>,
}

impl RabbitStore {
    pub(crate) fn new(server: Arc<Server>) -> Self {
        let limits = Limits::new(server.options.record_limit);
        Self {
            server,
            limits,
            guards: Vec::new(),
            consumers: Arc::default(),
        }
    }

    /// The most state that a consumer may have, in bytes of memory: keys, values, windows, and
    /// about 96 bytes for each, dead letters with their edits, the journal of operators, and the
    /// names of outboxes, which are never removed. At
    /// most 256 MiB, which is the default. A `put`, letter or commit that would exceed it fails
    /// with [`Error::Failed`], unless only the journal grows. State that is already larger can
    /// still be read and deleted.
    ///
    /// With a limit over 256 MiB, every call fails with [`Error::InvalidSetting`].
    #[must_use]
    pub fn state_limit(mut self, bytes: usize) -> Self {
        self.limits.state = bytes;
        self.with_limits()
    }

    /// How many bytes of changelog follow a snapshot before the next one is written in the
    /// background. 8 MiB by default. Each entry counts a kilobyte more than its size. If the state
    /// is larger than this, the size of the state counts instead, up to 64 MiB. Fewer bytes make
    /// starting faster and cost more writing.
    ///
    /// With more than 64 MiB, every call fails with [`Error::InvalidSetting`].
    ///
    /// A snapshot that fails is tried again later. If snapshots keep failing until 128 MiB of
    /// changelog are not covered, commits wait for one and fail with its error. The broker's
    /// retention might otherwise remove entries that are still needed.
    #[must_use]
    pub fn snapshot_after(mut self, bytes: u64) -> Self {
        self.limits.snapshot_after = bytes;
        self.with_limits()
    }

    /// Writes a snapshot of a consumer's state now, with the commits of all handles and processes,
    /// for instance before a planned restart, and returns when it is complete. This is optional,
    /// since [`snapshot_after`](Self::snapshot_after) triggers snapshots.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Failed`]. The state does not change.
    pub async fn snapshot(&self, consumer: &ConsumerId) -> Result<(), Error> {
        self.changelog(consumer)?.snapshot().await
    }

    /// The records that the commits of a consumer [sent](essentially_once::Outbox::send) to this
    /// outbox, as a log, for instance for a [`Relay`](essentially_once::relay::Relay). It is empty
    /// as long as no commit sent to the outbox.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] if prefix and consumer do not make a valid name, and
    /// [`Error::InvalidName`] if they do not together with the outbox.
    pub fn sent_to(&self, consumer: &ConsumerId, outbox: &str) -> Result<RabbitSent, Error> {
        let changelog = self.changelog(consumer)?;
        let id = changelog.scope.outbox(outbox)?;
        Ok(RabbitSent::new(changelog, id, Some(outbox)))
    }

    /// The records that the commits of a consumer sent, to any outbox, in the order of commits and
    /// calls. Those that a version without outboxes sent are among them. They have no origin.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] and [`Error::InvalidName`] if prefix and consumer do not make a
    /// valid name.
    pub fn sent(&self, consumer: &ConsumerId) -> Result<RabbitSent, Error> {
        let name = names::name(&self.server.options.prefix, consumer, Kind::Sent);
        Ok(RabbitSent::new(self.changelog(consumer)?, LogId::new(name)?, None))
    }

    /// What [`sent_to`](Self::sent_to) or [`sent`](Self::sent) returns under this name, as a
    /// relay's position has it; `None` if it is no such name with this store's prefix.
    ///
    /// # Errors
    /// Those of these two.
    pub fn sent_named(&self, log: &str) -> Result<Option<RabbitSent>, Error> {
        let prefix = &self.server.options.prefix;
        if let Some((found, consumer, Kind::Sent)) = names::parse(log)
            && found == *prefix
        {
            return self.sent(&consumer).map(Some);
        }
        match names::parse_outbox(log) {
            Some((found, consumer, outbox)) if found == *prefix => self.sent_to(&consumer, &outbox).map(Some),
            _ => Ok(None),
        }
    }

    /// Refuses commits of a consumer before the broker's retention reaches a record of this outbox
    /// that its relay has not passed on. `relays` is the store, of any backend, in which the relay
    /// keeps its position.
    ///
    /// The changelog keeps its last 512 MiB, whatever a relay has read. A guard counts the bytes of
    /// changelog that follow the first record that the relay has not passed on: all messages, with
    /// a kilobyte more for each than its size. The broker stores less than that and removes whole
    /// segments, so the count is on the safe side. Above
    /// [`unrelayed_limit`](Self::unrelayed_limit), a commit that sends to the outbox fails with
    /// [`Error::Unavailable`], and nothing is published. The consumer goes back to its position,
    /// counts no failed try, and goes on by itself once the relay has caught up. Commits that do
    /// not send to the outbox fail at one and a half times the limit, because they bring retention
    /// closer, too.
    ///
    /// - Name the guard on each handle that commits. A handle without it refuses nothing.
    /// - An outbox with several relays takes a guard for each. A relay may also read
    ///   [`sent`](Self::sent). A relay that has no position yet has passed nothing on.
    /// - The handle reads the relay's position at its first commit, whenever another eighth of the
    ///   limit was written, and before it refuses a commit. It logs a warning if the relay is
    ///   further behind than half the limit.
    /// - If the position cannot be read, the handle logs a warning and counts from the last known
    ///   one, or from the first record if it knows none. A refusal then includes the reason.
    /// - If the relay is behind the snapshot with which the handle starts, the first commit reads
    ///   the changelog from the relay's position on. That is at most 512 MiB, and 200 MB took 4
    ///   seconds in a build without optimization.
    /// - Marks are not refused, since a relay cannot read without them. Beats,
    ///   [`position`](OffsetStore::position) and [`read_state`](ReadState::read_state) write one
    ///   each, of 200 to 400 bytes. At least 100 MiB are left for them, which one mark a second
    ///   fills in three days. Bring the relay back before.
    ///
    /// A commit fails with [`Error::WrongLog`] if the relay's position belongs to another log.
    ///
    /// Call it before the handle is used. Afterwards, the handle reads the state again.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] and [`Error::InvalidName`] as for [`sent_to`](Self::sent_to).
    ///
    /// # Examples
    /// ```no_run
    /// # use essentially_once::{ConsumerId, OffsetStore};
    /// # use essentially_once_rabbitmq::Rabbit;
    /// # fn open(rabbit: &Rabbit, relays: impl OffsetStore) -> Result<(), essentially_once::Error> {
    /// let (orders, relay) = (ConsumerId::new("orders")?, ConsumerId::new("orders-relay")?);
    /// let store = rabbit.store().guard_outbox(&orders, "events", relay, relays)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn guard_outbox(
        mut self,
        consumer: &ConsumerId,
        outbox: &str,
        relay: ConsumerId,
        relays: impl OffsetStore,
    ) -> Result<Self, Error> {
        let logs = [self.sent_to(consumer, outbox)?.id, self.sent(consumer)?.id];
        self.guards.push(Guard::new(consumer, outbox, logs, relay, relays));
        Ok(self.with_limits())
    }

    /// How many bytes of changelog may follow a record of a
    /// [guarded outbox](Self::guard_outbox) that its relay has not passed on. From 1 to 256 MiB.
    /// The default is 256 MiB.
    ///
    /// With another limit, every call fails with [`Error::InvalidSetting`].
    #[must_use]
    pub fn unrelayed_limit(mut self, bytes: u64) -> Self {
        self.limits.unrelayed = bytes;
        self.with_limits()
    }

    /// Starts with no changelogs: limits and guards apply to those opened from now on.
    fn with_limits(mut self) -> Self {
        self.consumers = Arc::default();
        self
    }

    fn changelog(&self, consumer: &ConsumerId) -> Result<Arc<Changelog>, Error> {
        self.limits.check()?;
        names::check_length(&self.server.options.prefix, self.server.vhost(), consumer)?;
        let mut consumers = self.consumers.lock().unwrap_or_else(PoisonError::into_inner);
        let changelog = || {
            let guards = self.guards.iter().filter(|guard| guard.consumer == *consumer);
            let scope = Scope::new(&self.server, consumer, self.limits);
            Arc::new(Changelog::new(scope, guards.cloned().collect()))
        };
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
        Ok(RabbitTx::new(changelog, based_on))
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
