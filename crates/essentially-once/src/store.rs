//! The store that keeps positions, and state in the same transaction.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::{ConsumerId, Durability, Error, LogId, Offset, ProducerId, Window};

/// Where a consumer stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Position {
    /// The log it belongs to.
    pub log: LogId,
    /// The offset to go on at: everything before it has taken effect.
    pub next: Offset,
    /// How often this position was committed; the first commit makes it 1.
    pub revision: u64,
    /// What was seen of each producer, in any order.
    pub windows: Vec<(ProducerId, Window)>,
}

/// How a commit moves a position.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Advance {
    /// The log that is being read.
    pub log: LogId,
    /// The offset to go on at. It may be before the stored one: a `seek` goes back.
    pub next: Offset,
    /// The revision this commit is based on; 0 where there was no position. The commit makes it one more.
    pub expected_revision: u64,
    /// Windows to insert or replace; all others stay.
    pub windows: Vec<(ProducerId, Window)>,
    /// Producers whose windows to delete; none of them is in `windows`.
    pub forgotten: Vec<ProducerId>,
}

/// Keeps the positions of consumers, and commits them together with what a handler staged.
///
/// # Contract
/// - **S1** Atomic: staged state and position are applied together or neither is, through any crash.
/// - **S2** Fenced: if the stored revision is not the expected one, a commit fails with [`Error::Fenced`] and applies nothing.
///   The check is part of the commit: nothing can come between.
/// - **S3** Durable: a commit returns `Ok` only when it survives a crash of this process and a restart of the backend.
/// - **S4** A dropped or rolled back transaction leaves no trace.
/// - **S5** Where the outcome cannot be known, a commit fails with [`Error::Indeterminate`], and `position` then tells the
///   truth of that moment. A commit that still arrives later is checked like any other (S2). An adapter never retries a
///   commit by itself: it would be fenced by its own first try.
/// - **S6** A transaction reads its own writes.
/// - **S7** Consumers never see each other's state or position.
/// - **S8** A position remembers its log: a commit for another one fails with [`Error::WrongLog`] and applies nothing.
#[async_trait]
pub trait OffsetStore: Send + Sync {
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
}

/// State changes that are not yet there. Committing takes the new position: one cannot be had without the other.
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
#[async_trait]
pub trait KeyValue: Transaction {
    /// The value of `key`, as this transaction left it.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`]. The transaction can then only be rolled back.
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
}
