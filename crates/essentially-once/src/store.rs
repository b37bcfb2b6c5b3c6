//! The store that keeps positions, and state in the same transaction.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{ConsumerId, Durability, Error, LogId, Numbering, Offset, Owner, Passed, Revision, Window, rt};

/// Where a consumer stands.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Position {
    /// The log it belongs to.
    pub log: LogId,
    /// The offset to go on at: everything before it has taken effect.
    pub next: Offset,
    /// What the next commit must expect; every commit raises it.
    pub revision: Revision,
    /// The run of a consumer that committed last; `None` where a version before 0.2 did.
    pub owner: Option<Owner>,
    /// The last record that was passed; `None` where none was yet, and after the position was moved by hand.
    pub passed: Option<Passed>,
    /// What was seen of each producer, in any order.
    pub windows: Vec<(Numbering, Window)>,
}

impl Position {
    /// A position with no owner, no passed record and no windows; set the other fields on it.
    pub const fn new(log: LogId, next: Offset, revision: Revision) -> Self {
        Self {
            log,
            next,
            revision,
            owner: None,
            passed: None,
            windows: Vec::new(),
        }
    }
}

/// What shows that the owner of a position lives: it differs from an earlier pulse whenever the owner has committed or
/// [beaten](OffsetStore::beat) since.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Pulse {
    /// The offset to go on at.
    pub next: Offset,
    /// The revision of the position; [`Revision::NONE`] where there is none.
    pub revision: Revision,
    /// The run of a consumer that committed last; `None` where it gave the position up, or where there is none.
    pub owner: Option<Owner>,
    /// A number that changes with every beat. It may start over at any commit.
    pub beats: u64,
}

impl Pulse {
    /// The pulse of a position, where that many beats have been counted.
    pub fn new(position: Option<&Position>, beats: u64) -> Self {
        position.map_or_else(Self::default, |position| Self {
            next: position.next,
            revision: position.revision,
            owner: position.owner,
            beats,
        })
    }
}

/// How a commit moves a position.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Advance {
    /// The log that is being read.
    pub log: LogId,
    /// The offset to go on at. It may be before the stored one: a `seek` goes back.
    pub next: Offset,
    /// The revision this commit is based on; [`Revision::NONE`] where there was no position.
    pub expected: Revision,
    /// The revision that this commit makes. The store keeps it as it is, and does no arithmetic on it.
    pub revision: Revision,
    /// Replaces the stored owner, also by `None`.
    pub owner: Option<Owner>,
    /// Replaces the stored mark of the last record, also by `None`.
    pub passed: Option<Passed>,
    /// Windows to insert or replace; all others stay.
    pub windows: Vec<(Numbering, Window)>,
    /// Numberings whose windows to delete; none of them is in `windows`.
    pub forgotten: Vec<Numbering>,
}

impl Advance {
    /// An advance with no owner, no passed record and no change of windows; set the other fields on it.
    pub const fn new(log: LogId, next: Offset, expected: Revision, revision: Revision) -> Self {
        Self {
            log,
            next,
            expected,
            revision,
            owner: None,
            passed: None,
            windows: Vec::new(),
            forgotten: Vec::new(),
        }
    }

    /// Decides whether the position stored for `consumer` lets this advance be committed (S2, S8). Returns the log to store:
    /// the stored one where this advance knows no incarnation.
    ///
    /// It compares two values. A backend that shares its data must make the decision part of the commit.
    ///
    /// # Errors
    /// [`Error::Fenced`] if the stored revision is not the expected one, otherwise [`Error::WrongLog`] if the position
    /// belongs to another log.
    pub fn check(&self, consumer: &ConsumerId, stored: Option<(Revision, &LogId)>) -> Result<LogId, Error> {
        let revision = stored.map_or(Revision::NONE, |(revision, _)| revision);
        if revision != self.expected {
            return Err(Error::Fenced {
                consumer: consumer.clone(),
                expected: self.expected,
            });
        }
        match stored {
            Some((_, log)) if !log.is_same_log(&self.log) => Err(Error::WrongLog {
                consumer: consumer.clone(),
                stored: log.clone(),
                given: self.log.clone(),
            }),
            Some((_, log)) if self.log.incarnation().is_none() => Ok(log.clone()),
            _ => Ok(self.log.clone()),
        }
    }
}

/// Keeps the positions of consumers, and commits them together with what a handler staged.
///
/// # Contract
/// - **S1** Atomic: staged state and position are applied together or neither is, through any crash.
/// - **S2** Fenced: if the stored revision is not the expected one, a commit fails with [`Error::Fenced`] and applies nothing.
///   The check is part of the commit: nothing can come between. Afterwards the stored revision is exactly the one that the
///   [`Advance`] names.
/// - **S3** Durable: a commit returns `Ok` only when it survives a crash of this process and a restart of the backend. A
///   commit that stages nothing is as durable as any other.
/// - **S4** A dropped or rolled back transaction leaves no trace.
/// - **S5** Where the outcome cannot be known, a commit fails with [`Error::Indeterminate`], and `position` then reports the
///   truth of that moment. A commit that still arrives later is checked like any other (S2). An adapter never retries a
///   commit by itself: it would be fenced by its own first try.
/// - **S6** A transaction reads its own writes. A transaction in which a read or write failed with anything but
///   [`Error::TooLarge`] can only be rolled back: its commit fails and applies nothing, so that a handler which ignores the
///   error cannot commit what it computed without the value. Native methods say in their documentation which of their
///   errors are harmless.
/// - **S7** Consumers never see each other's state or position.
/// - **S8** A position remembers its log: a commit for another one fails with [`Error::WrongLog`] and applies nothing. Where
///   the revision differs too, [`Error::Fenced`] wins: the position may have changed its log since. A known incarnation is
///   never overwritten by an unknown one.
/// - **S9** `position` returns revision, owner, passed record and windows of one commit, never parts of two, and never an
///   older commit than one that was acknowledged before the call.
/// - **S10** `pulse`, `watch`, `beat` and `release` are hints. They may be late, but they miss no change for good. They change
///   no revision and fence nobody, and one owner's beat or release has no effect on the position of another.
/// - **S11** Where the store implements [`ReadState`], a snapshot is of one commit, never older than one that was acknowledged
///   before the call, and waits for no open transaction.
///
/// # Isolation
/// What a transaction sees of commits by other instances of its consumer is up to the backend: a snapshot, or each read
/// the newest value. Both are sound, because such a commit fences the transaction. What it sees of other consumers' and
/// programs' native data is the backend's own isolation, and its documentation says which that is. An open transaction may
/// hold locks that keep others from writing (SQLite: the whole file), so a handler should not wait for anything slow.
#[async_trait]
pub trait OffsetStore: Send + Sync + 'static {
    /// The transaction that a handler writes in. It owns what it needs.
    type Tx: Transaction + 'static;

    /// Where the consumer stands; `None` if it never committed. Dropping the future has no effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error>;

    /// Opens a transaction for the consumer's state and position. Dropping the future has no effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn begin(&self, consumer: &ConsumerId) -> Result<Self::Tx, Error>;

    /// Whether commits survive a crash, as the backend is set up now.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn durability(&self) -> Result<Durability, Error>;

    /// What shows whether the owner of the position lives. A standby asks about ten times a second.
    ///
    /// It waits for no writer and writes nothing. It may lag behind the newest commit for a moment, but it reports every
    /// commit and beat in the end. Unless implemented it is made of [`position`](Self::position), without beats. Dropping
    /// the future has no effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        Ok(Pulse::new(self.position(consumer).await?.as_ref(), 0))
    }

    /// Waits until the pulse differs from `seen`, and returns it. It may also return early, with the same pulse.
    ///
    /// A store that learns of changes by itself returns at once; one that has to look does so every `interval`. Unless
    /// implemented it looks once, after `interval`. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        let _ = seen;
        rt::sleep(interval).await;
        self.pulse(consumer).await
    }

    /// Shows that `owner` lives, in times when it does not commit: it handles a record for long, or pauses before it tries
    /// one again. Standbys then leave it the position.
    ///
    /// A beat is only a hint. It has no effect where the position has another owner or does not exist, it changes nothing
    /// but [`Pulse::beats`], and it fences nobody. It need not survive a crash. Unless implemented it does nothing, and a
    /// standby takes over from an owner that does not commit for `standby_after`.
    /// Dropping the future has no effect, or that of a beat.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let _ = (consumer, owner);
        Ok(())
    }

    /// Gives the position up: the stored owner becomes `None` if it is `owner`, so that a standby takes over at once.
    ///
    /// Like a beat it is only a hint, changes nothing else, and fences nobody. Unless implemented it does nothing, and a
    /// standby takes over after `standby_after`. Dropping the future leaves open whether
    /// it happened.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`], [`Error::Indeterminate`].
    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let _ = (consumer, owner);
        Ok(())
    }
}

/// Reads the state of consumers outside a transaction, for services that show what a consumer has made of its log.
///
/// # Isolation
/// One call sees one commit: the position and all values are as that commit left them, never parts of two. It is the newest
/// commit or one that was under way during the call, and never older than a commit acknowledged before the call. Two calls
/// may see two commits; compare the revisions of their positions to tell.
#[async_trait]
pub trait ReadState: OffsetStore {
    /// The consumer's position and the values of `keys`, in the order of the keys.
    ///
    /// It waits for no open transaction, and makes none wait. Dropping the future has no effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error>;
}

/// A consumer's position and some of its state, as one commit left them; see [`ReadState`].
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Snapshot {
    /// Where the consumer stood; `None` if it never committed.
    pub position: Option<Position>,
    /// The values of the keys that were asked for, in that order.
    pub values: Vec<Option<Bytes>>,
}

impl Snapshot {
    /// A snapshot of those.
    pub const fn new(position: Option<Position>, values: Vec<Option<Bytes>>) -> Self {
        Self { position, values }
    }
}

/// State changes that are not applied yet. Committing takes the new position, so neither is ever applied without the other.
#[async_trait]
pub trait Transaction: Send + Sized {
    /// Applies what was staged and the new position together, or neither.
    ///
    /// Dropping the future leaves the outcome unknown, as [`Error::Indeterminate`] does.
    ///
    /// # Errors
    /// [`Error::Fenced`], [`Error::WrongLog`], [`Error::Unavailable`] and [`Error::Failed`] when nothing was applied;
    /// [`Error::Indeterminate`] when it is not known; [`Error::PartiallyApplied`] where a backend that cannot roll back failed in the
    /// middle of native commands of the handler's.
    async fn commit(self, advance: Advance) -> Result<(), Error>;

    /// Discards what was staged; dropping the transaction does the same.
    ///
    /// # Errors
    /// None that matters: what was staged is gone in any case. An error says that the backend is in trouble.
    async fn rollback(self) -> Result<(), Error>;
}

/// Portable state: a handler written against it runs on every store. Each consumer has a key space of its own.
///
/// Every backend takes keys of up to 1,024 bytes and values of up to 64 KiB, whatever bytes they hold, the empty key and the
/// empty value included; what it takes beyond that is in its documentation.
///
/// # Errors of native methods
/// A transaction may offer more than this trait. Its methods return a transient [`Error`] (see [`Error::is_transient`]) for
/// trouble of the backend, on which a consumer goes back to its stored position; every other error counts as a failure of the
/// record whose handler returns it.
#[async_trait]
pub trait KeyValue: Transaction {
    /// The value of `key`, as this transaction left it.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`]. The transaction can then only be rolled back (S6).
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error>;

    /// Sets `key` to `value`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when the backend cannot hold it, and nothing was staged; else as for `get`.
    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error>;

    /// Removes `key`; no error if it is not there.
    ///
    /// # Errors
    /// As for `get`.
    async fn delete(&mut self, key: &[u8]) -> Result<(), Error>;
}

#[async_trait]
impl<S: OffsetStore + ?Sized> OffsetStore for Arc<S> {
    type Tx = S::Tx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        (**self).position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<Self::Tx, Error> {
        (**self).begin(consumer).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        (**self).durability().await
    }

    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        (**self).pulse(consumer).await
    }

    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        (**self).watch(consumer, seen, interval).await
    }

    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        (**self).beat(consumer, owner).await
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        (**self).release(consumer, owner).await
    }
}

#[async_trait]
impl<S: ReadState + ?Sized> ReadState for Arc<S> {
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        (**self).read_state(consumer, keys).await
    }
}
