//! The store that keeps positions, and commits state in the same transaction.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    ConsumerId, Durability, Error, Journal, LogId, Note, Numbering, Offset, Outbox, Owner, Revision, Window,
    letters::DeadLetters, rt,
};

/// A consumer's place in its log, and what is committed with it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Position {
    /// The log that the position belongs to.
    pub log: LogId,
    /// The offset to continue at. Every record before it has taken effect.
    pub next: Offset,
    /// The revision that the next commit must expect. Every commit raises it.
    pub revision: Revision,
    /// The run of a consumer that committed last; `None` if that was a version before 0.2.
    pub owner: Option<Owner>,
    /// What the consumer loop notes about the records next to the position.
    pub note: Note,
    /// What operators did by hand.
    pub journal: Journal,
    /// The sequences seen of each producer, in any order.
    pub windows: Vec<(Numbering, Window)>,
}

impl Position {
    /// A position with no owner, an empty note, an empty journal and no windows. Set these fields
    /// on the result.
    pub fn new(log: LogId, next: Offset, revision: Revision) -> Self {
        Self {
            log,
            next,
            revision,
            owner: None,
            note: Note::default(),
            journal: Journal::default(),
            windows: Vec::new(),
        }
    }
}

/// Shows whether the owner of a position is alive. A pulse differs from an earlier one if the owner
/// has committed or [beaten](OffsetStore::beat) in between.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Pulse {
    /// The offset to go on at.
    pub next: Offset,
    /// The revision of the position; [`Revision::NONE`] if the consumer has no position.
    pub revision: Revision,
    /// The run of a consumer that committed last; `None` if it released the position, or if the
    /// consumer has no position.
    pub owner: Option<Owner>,
    /// A number that changes with every beat. Any commit may reset it.
    pub beats: u64,
}

impl Pulse {
    /// The pulse of a position with that number of beats.
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
    /// The log that the consumer reads.
    pub log: LogId,
    /// The offset to continue at. It may be before the stored one, since a `seek` can go back.
    pub next: Offset,
    /// The revision that this commit is based on; [`Revision::NONE`] if the consumer had no
    /// position.
    pub expected: Revision,
    /// The revision that this commit sets. The store keeps it unchanged and does no arithmetic on
    /// it.
    pub revision: Revision,
    /// Replaces the stored owner, even if it is `None`.
    pub owner: Option<Owner>,
    /// Replaces the stored note, even if it is empty.
    pub note: Note,
    /// Replaces the stored journal; `None` keeps it, as almost every commit does.
    pub journal: Option<Journal>,
    /// Windows to insert or replace. All other windows stay.
    pub windows: Vec<(Numbering, Window)>,
    /// Numberings whose windows to delete. None of them is also in `windows`.
    pub forgotten: Vec<Numbering>,
}

impl Advance {
    /// An advance with no owner, an empty note, and no changes to journal and windows. Set these
    /// fields on the result.
    pub fn new(log: LogId, next: Offset, expected: Revision, revision: Revision) -> Self {
        Self {
            log,
            next,
            expected,
            revision,
            owner: None,
            note: Note::default(),
            journal: None,
            windows: Vec::new(),
            forgotten: Vec::new(),
        }
    }

    /// Decides whether the position stored for `consumer` allows this commit (S2, S8). Returns the
    /// log to store: the stored one if this advance has no incarnation.
    ///
    /// This method only compares two values. A backend whose data is shared must make the decision
    /// part of the commit.
    ///
    /// # Errors
    /// [`Error::Fenced`] if the stored revision is not the expected one. Otherwise
    /// [`Error::WrongLog`] if the position belongs to another log.
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

/// Keeps the positions of consumers, and commits each one together with the state that a handler
/// staged.
///
/// # Contract
/// - **S1** Atomic: a commit applies both the staged state and the position, or neither, through
///   any crash.
/// - **S2** Fenced: if the stored revision is not the expected one, a commit fails with
///   [`Error::Fenced`] and applies nothing. The check is part of the commit, so no other commit can
///   come between. After a commit the stored revision is exactly the one in its [`Advance`].
/// - **S3** Durable: a commit returns `Ok` only when it survives a crash of this process and a
///   restart of the backend. A commit that stages nothing is as durable as any other.
/// - **S4** A dropped or rolled back transaction leaves no trace.
/// - **S5** If the outcome cannot be known, a commit fails with [`Error::Indeterminate`], and
///   `position` then reports the state of that moment. A commit that still arrives later is checked
///   like any other (S2). An adapter never retries a commit on its own, because its first try would
///   fence the second.
/// - **S6** A transaction reads its own writes. If a read or write in it fails with anything but
///   [`Error::TooLarge`], the transaction can only be rolled back: its commit fails and applies
///   nothing. A handler that ignores the error therefore cannot commit a result that it computed
///   without the value. The documentation of native methods says which of their errors are
///   harmless.
/// - **S7** Consumers never see each other's state or position.
/// - **S8** A position remembers its log. A commit for another log fails with [`Error::WrongLog`]
///   and applies nothing. If the revision differs too, the commit fails with [`Error::Fenced`]
///   instead, because the position may have changed its log since. An unknown incarnation never
///   overwrites a known one.
/// - **S9** `position` returns the revision, owner, note, journal and windows of one commit, never
///   parts of two. That commit is never older than one acknowledged before the call. It waits for
///   no open transaction.
/// - **S10** `pulse`, `watch`, `beat` and `release` are hints. They may be late, but they report
///   every change eventually. They change no revision and fence no transaction, and one owner's
///   beat or release has no effect on a position of another owner.
/// - **S11** If the store implements [`ReadState`], a snapshot shows one commit, never older than
///   one acknowledged before the call, and waits for no open transaction.
/// - **S12** An advance without a journal keeps the stored one, and one with a journal replaces it,
///   in the same commit as everything else.
/// - **S13** If `consumers` returns a list, the list has every consumer with a position once, in
///   the order of their names. It has each consumer whose first commit was acknowledged before the
///   call, and none that never committed. The call waits for no open transaction.
///
/// # Isolation
/// The backend decides what a transaction sees of commits by other instances of its consumer: a
/// snapshot, or the newest value at each read. Both are sound, because such a commit fences the
/// transaction. The backend's own isolation decides what a transaction sees of native data that
/// other consumers and programs write, and the backend's documentation describes it. An open
/// transaction may hold locks that keep others from writing (SQLite: the whole file), so a handler
/// should not wait for anything slow.
///
/// # Examples
/// A store that keeps only positions, in memory, for handlers that need no transaction:
///
/// ```
/// use std::{collections::HashMap, sync::{Arc, Mutex}};
///
/// use essentially_once::backend::{Advance, Durability, Position, Transaction};
/// use essentially_once::{ConsumerId, Error, OffsetStore, async_trait};
///
/// #[derive(Clone, Default)]
/// struct Positions(Arc<Mutex<HashMap<ConsumerId, Position>>>);
///
/// struct Tx {
///     store: Positions,
///     consumer: ConsumerId,
/// }
///
/// #[async_trait]
/// impl OffsetStore for Positions {
///     type Tx = Tx;
///
///     async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
///         Ok(self.0.lock().unwrap().get(consumer).cloned())
///     }
///
///     async fn begin(&self, consumer: &ConsumerId) -> Result<Tx, Error> {
///         Ok(Tx { store: self.clone(), consumer: consumer.clone() })
///     }
///
///     async fn durability(&self) -> Result<Durability, Error> {
///         Ok(Durability::Volatile("it keeps positions in memory; use a database".into()))
///     }
/// }
///
/// #[async_trait]
/// impl Transaction for Tx {
///     async fn commit(self, advance: Advance) -> Result<(), Error> {
///         // Checks and writes under one lock, so that no other commit comes between (S2).
///         let mut positions = self.store.0.lock().unwrap();
///         let stored = positions.get(&self.consumer);
///         let known = stored.map(|stored| (stored.revision, &stored.log));
///         let log = advance.check(&self.consumer, known)?;
///         let mut windows = stored.map(|stored| stored.windows.clone()).unwrap_or_default();
///         windows.retain(|(numbering, _)| {
///             let mut replaced = advance.windows.iter().map(|(replaced, _)| replaced);
///             !advance.forgotten.contains(numbering) && replaced.all(|other| other != numbering)
///         });
///         windows.extend(advance.windows);
///         let mut position = Position::new(log, advance.next, advance.revision);
///         (position.owner, position.note) = (advance.owner, advance.note);
///         position.journal = match (advance.journal, stored) {
///             (Some(journal), _) => journal,
///             (None, stored) => stored.map(|stored| stored.journal.clone()).unwrap_or_default(),
///         };
///         position.windows = windows;
///         positions.insert(self.consumer, position);
///         Ok(())
///     }
///
///     async fn rollback(self) -> Result<(), Error> {
///         Ok(())
///     }
/// }
///
/// # use essentially_once::{Consumer, Log, NewRecord, Record, handler_fn, memory::Memory};
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// # let log = Memory::new().log("orders")?;
/// # log.append(&[NewRecord::new("10248")]).await?;
/// # let store = Positions::default();
/// # for handled in [1, 0] {
/// #     let handler = handler_fn(|_: &Record, _: &mut ()| Box::pin(async { Ok(()) }));
/// #     let consumer = ConsumerId::new("shipping")?;
/// #     let run = Consumer::at_least_once(consumer, log.clone(), store.clone(), handler);
/// #     assert_eq!(run.run_until_caught_up().await?.handled, handled);
/// # }
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait OffsetStore: Send + Sync + 'static {
    /// The transaction that a handler writes to. It owns everything that it needs.
    type Tx: Transaction + 'static;

    /// The consumer's position; `None` if it never committed. Dropping the future has no effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error>;

    /// Opens a transaction for the consumer's state and position. Dropping the future has no
    /// effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn begin(&self, consumer: &ConsumerId) -> Result<Self::Tx, Error>;

    /// Whether commits survive a crash, with the backend's current settings.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn durability(&self) -> Result<Durability, Error>;

    /// The consumers that have a position in this store, sorted by name; `None` if the store cannot
    /// list them, which is the default.
    ///
    /// For operators and monitoring. It may read a name for each consumer. Dropping the future has
    /// no effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`]. [`Error::Failed`], also if a stored name is not a valid
    /// [`ConsumerId`], which the error names.
    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        Ok(None)
    }

    /// Shows whether the owner of the position is alive. A standby calls it about ten times a
    /// second.
    ///
    /// It waits for no writer and writes nothing. It may lag behind the newest commit for a moment,
    /// but it reports every commit and beat eventually. The default uses
    /// [`position`](Self::position) and has no beats. Dropping the future has no effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        Ok(Pulse::new(self.position(consumer).await?.as_ref(), 0))
    }

    /// Waits until the pulse differs from `seen`, and returns it. It may also return early, with
    /// the same pulse.
    ///
    /// A store that is notified of changes returns at once. Other stores check every `interval`.
    /// The default checks once, after `interval`. Cancel-safe. Poll the future or drop it: while it
    /// is neither, it may hold up other calls of the store.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        let _ = seen;
        rt::sleep(interval).await;
        self.pulse(consumer).await
    }

    /// Shows that `owner` is alive while it does not commit: it may be handling a slow record, or
    /// pausing before it tries one again. Standbys then leave it the position.
    ///
    /// A beat is only a hint. It changes nothing but [`Pulse::beats`], and it fences no
    /// transaction. It has no effect if the position has another owner or does not exist. It need
    /// not survive a crash. The default does nothing, so a standby takes over from an owner that
    /// does not commit for `standby_after`. If the future is dropped, the beat may or may not take
    /// effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let _ = (consumer, owner);
        Ok(())
    }

    /// Releases the position: the stored owner becomes `None` if it is `owner`, so that a standby
    /// takes over at once.
    ///
    /// Like a beat, it is only a hint, changes nothing else, and fences no transaction. The default
    /// does nothing, so a standby takes over after `standby_after`. If the future is dropped, the
    /// release may or may not take effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`], [`Error::Indeterminate`].
    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let _ = (consumer, owner);
        Ok(())
    }
}

/// Reads the state of consumers outside a transaction, for services that show what a consumer has
/// computed from its log.
///
/// # Isolation
/// One call sees one commit: the position and all values are as that commit left them, never parts
/// of two. This is the newest commit, or one that was in progress during the call, and never older
/// than a commit acknowledged before the call. Two calls may see two commits. Compare the revisions
/// of their positions to find out.
///
/// # Examples
/// ```
/// use essentially_once::memory::{Memory, MemoryTx};
/// use essentially_once::{
///     Consumer, ConsumerId, KeyValue, Log, NewRecord, ReadState, Record, handler_fn,
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// let memory = Memory::new();
/// let (log, store) = (memory.log("orders")?, memory.store());
/// log.append(&[NewRecord::new("10248")]).await?;
/// let shipping = ConsumerId::new("shipping")?;
/// let ship = handler_fn(|record: &Record, tx: &mut MemoryTx| {
///     Box::pin(async move { Ok(tx.put(&record.payload, b"shipped").await?) })
/// });
/// let consumer = Consumer::essentially_once(shipping.clone(), log, store.clone(), ship);
/// consumer.accept_volatile().run_until_caught_up().await?;
///
/// let snapshot = store.read_state(&shipping, &[b"10248".as_slice(), b"10249"]).await?;
/// assert_eq!(snapshot.values[0].as_deref(), Some(&b"shipped"[..]));
/// assert_eq!(snapshot.values[1], None);
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait ReadState: OffsetStore {
    /// The consumer's position and the values of `keys`, in the order of the keys.
    ///
    /// It waits for no open transaction, and no transaction waits for it. Dropping the future has
    /// no effect.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error>;
}

/// A consumer's position and some of its state, as one commit left them; see [`ReadState`].
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Snapshot {
    /// The consumer's position; `None` if it never committed.
    pub position: Option<Position>,
    /// The values of the requested keys, in the order of the request.
    pub values: Vec<Option<Bytes>>,
}

impl Snapshot {
    /// A snapshot of that position and those values.
    pub const fn new(position: Option<Position>, values: Vec<Option<Bytes>>) -> Self {
        Self { position, values }
    }
}

/// State changes that are not applied yet. A commit takes the new position, so neither is ever
/// applied without the other.
#[async_trait]
pub trait Transaction: Send + Sized {
    /// Whether [`dead_letters`](Self::dead_letters) returns something. A consumer then looks for
    /// letters when a session begins.
    const KEEPS_DEAD_LETTERS: bool = false;

    /// Applies the staged changes and the new position together, or neither.
    ///
    /// Dropping the future leaves the outcome unknown, as [`Error::Indeterminate`] does.
    ///
    /// # Errors
    /// [`Error::Fenced`], [`Error::WrongLog`], [`Error::Unavailable`] and [`Error::Failed`] if
    /// nothing was applied. [`Error::Indeterminate`] if the outcome is not known.
    /// [`Error::PartiallyApplied`] if a backend that cannot roll back failed in the middle of the
    /// handler's native commands.
    async fn commit(self, advance: Advance) -> Result<(), Error>;

    /// The consumer's dead letters; `None` if the store cannot keep any, which is the default.
    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        None
    }

    /// Where the transaction sends records; `None` if the store has no outboxes, which is the
    /// default.
    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        None
    }

    /// Discards the staged changes. Dropping the transaction does the same.
    ///
    /// # Errors
    /// An error reports that the backend is in trouble. The staged changes are discarded in any
    /// case.
    async fn rollback(self) -> Result<(), Error>;
}

/// Portable state: a handler written against this trait runs on every store. Each consumer has its
/// own key space.
///
/// Every backend accepts keys of up to 1,024 bytes and values of up to 64 KiB, with any content,
/// including the empty key and the empty value. Its documentation states the limits that it has
/// beyond that.
///
/// # Errors of native methods
/// A transaction may offer more than this trait. Such a method returns a transient [`Error`] (see
/// [`Error::is_transient`]) if the backend is in trouble, and the consumer goes back to its stored
/// position. Any other error counts as a failure of the record whose handler returns it.
#[async_trait]
pub trait KeyValue: Transaction {
    /// The value of `key`, including this transaction's own changes.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`]. After either, the transaction can only be rolled
    /// back (S6).
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error>;

    /// Sets `key` to `value`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the backend cannot hold the entry; nothing is staged then. Otherwise
    /// as for `get`.
    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error>;

    /// Removes `key`. Removing a missing key is not an error.
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

    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        (**self).consumers().await
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
