//! The user's code: what is done with a record.

use std::{fmt, future::Future, pin::Pin};

use async_trait::async_trait;

use crate::{
    Record,
    error::{Chain, Source},
};

/// Does something with each record. For essentially-once `Tx` is the store's transaction, and whatever is written through it
/// takes effect together with the offset; for the other deliveries `Tx` is `()`, since there is no transaction to write in.
///
/// A handler may be called again with a record it has seen, whenever the earlier call did not end in a commit. What it does
/// outside the transaction is then done again.
#[async_trait]
pub trait Handler<Tx: Send>: Send {
    /// Handles one record. Dropping the future must be harmless: that is what a crash does.
    ///
    /// # Errors
    /// Any error through `?` means [`HandlerError::retry`]; [`HandlerError::reject`] and [`HandlerError::fatal`] say more.
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError>;

    /// Called after the last record of a batch, before its commit: writes what the handler gathered, such as one statement
    /// with a row for each record. Whatever was gathered since the last commit or reset belongs to this transaction.
    ///
    /// Under at-least-once it is called before the offset is committed, and under at-most-once after the batch was handled.
    ///
    /// # Errors
    /// As for [`handle`](Self::handle), except that the error may be any record's: the batch is rolled back, and its records
    /// are handled one by one until the culprit is known.
    async fn flush(&mut self, tx: &mut Tx) -> Result<(), HandlerError> {
        let _ = tx;
        Ok(())
    }

    /// The consumer went back to its stored position: drop what was cached or gathered since the last commit.
    async fn reset(&mut self) {}
}

#[async_trait]
impl<Tx: Send, H: Handler<Tx> + ?Sized> Handler<Tx> for Box<H> {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        (**self).handle(record, tx).await
    }

    async fn flush(&mut self, tx: &mut Tx) -> Result<(), HandlerError> {
        (**self).flush(tx).await
    }

    async fn reset(&mut self) {
        (**self).reset().await;
    }
}

/// What a handler's future looks like to [`handler_fn`].
pub type HandlerFuture<'a> = Pin<Box<dyn Future<Output = Result<(), HandlerError>> + Send + 'a>>;

/// Makes a [`Handler`] of a closure that returns a boxed future.
///
/// ```
/// # use essentially_once::{KeyValue, Record, handler_fn, memory::Memory, OffsetStore};
/// # fn check<Tx: Send>(_: impl essentially_once::Handler<Tx>) {}
/// # fn example<Tx: KeyValue>() {
/// let handler = handler_fn(|record: &Record, tx: &mut Tx| {
///     Box::pin(async move {
///         tx.put(b"last", &record.payload).await?;
///         Ok(())
///     })
/// });
/// # check(handler);
/// # }
/// ```
pub fn handler_fn<Tx, F>(function: F) -> HandlerFn<F>
where
    Tx: Send,
    F: for<'a> FnMut(&'a Record, &'a mut Tx) -> HandlerFuture<'a> + Send,
{
    HandlerFn(function)
}

/// A closure as a handler; see [`handler_fn`].
#[derive(Clone, Copy, Debug)]
pub struct HandlerFn<F>(F);

#[async_trait]
impl<Tx, F> Handler<Tx> for HandlerFn<F>
where
    Tx: Send,
    F: for<'a> FnMut(&'a Record, &'a mut Tx) -> HandlerFuture<'a> + Send,
{
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        (self.0)(record, tx).await
    }
}

/// Why a record was not handled, and what follows.
///
/// Any error becomes [`retry`](Self::retry) through `?`. For that it is, like `anyhow::Error`, not a `std::error::Error`
/// itself. If a transient [`Error`](crate::Error) of the backend is anywhere in the chain of causes, the failure counts as the
/// backend's and not as the record's. A wrapper that hides it from its chain (`#[error(transparent)]`) defeats that; name it
/// as a `#[source]`.
pub struct HandlerError {
    pub(crate) kind: HandlerErrorKind,
    pub(crate) source: Source,
}

/// What follows from a [`HandlerError`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum HandlerErrorKind {
    /// The record is tried again after a pause.
    Retry,
    /// The record can never be handled.
    Reject,
    /// The consumer stops.
    Fatal,
}

impl HandlerError {
    /// It may work later: the consumer goes back to its stored position and tries again after a pause.
    pub fn retry(source: impl Into<Source>) -> Self {
        Self::new(HandlerErrorKind::Retry, source)
    }

    /// This record can never be handled (poison): trying again is no use.
    pub fn reject(source: impl Into<Source>) -> Self {
        Self::new(HandlerErrorKind::Reject, source)
    }

    /// Nothing can be handled any more: the consumer stops at once, even if another instance has handled the record first.
    pub fn fatal(source: impl Into<Source>) -> Self {
        Self::new(HandlerErrorKind::Fatal, source)
    }

    /// What follows from it.
    pub const fn kind(&self) -> HandlerErrorKind {
        self.kind
    }

    fn new(kind: HandlerErrorKind, source: impl Into<Source>) -> Self {
        Self {
            kind,
            source: source.into(),
        }
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::retry(error)
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Chain(&self.source).fmt(f)
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HandlerError::{:?}({})", self.kind, Chain(&self.source))
    }
}
