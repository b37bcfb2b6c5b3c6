//! The user's code: what is done with a record.

use std::{fmt, future::Future, pin::Pin};

use async_trait::async_trait;

use crate::{
    Record,
    error::{Chain, Source},
};

/// Your code, called with each record.
///
/// Under essentially-once, `Tx` is the store's transaction, and everything written through it takes
/// effect together with the offset. Under the other deliveries `Tx` is `()`, because they have no
/// transaction to write to.
///
/// A consumer calls the handler again with the same record whenever the earlier call did not end in
/// a commit. Effects outside the transaction then happen again.
///
/// [`handler_fn`] makes a handler from a closure.
#[async_trait]
pub trait Handler<Tx: Send>: Send {
    /// Handles one record. Dropping the future must be harmless, since a crash does the same.
    ///
    /// # Errors
    /// Any error returned with `?` means [`HandlerError::retry`]. [`HandlerError::reject`] and
    /// [`HandlerError::fatal`] are more specific.
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError>;

    /// Writes what the handler has gathered, such as one statement with a row for each record. The
    /// consumer calls it after the last record of a batch, before the commit. Everything gathered
    /// since the last commit or reset belongs to this transaction.
    ///
    /// Under at-least-once the consumer calls it before it commits the offset, and under
    /// at-most-once after it has handled the batch.
    ///
    /// # Errors
    /// As for [`handle`](Self::handle), except that any record of the batch may be the cause. The
    /// consumer rolls the batch back and handles its records individually until it finds the
    /// culprit.
    async fn flush(&mut self, tx: &mut Tx) -> Result<(), HandlerError> {
        let _ = tx;
        Ok(())
    }

    /// Called when the consumer goes back to its stored position. Drop everything that was cached
    /// or gathered since the last commit.
    async fn reset(&mut self) {}
}

/// Passes the futures on without boxing them again.
impl<Tx: Send, H: Handler<Tx> + ?Sized> Handler<Tx> for Box<H> {
    fn handle<'h, 'r, 't, 'f>(&'h mut self, record: &'r Record, tx: &'t mut Tx) -> HandlerFuture<'f>
    where
        'h: 'f,
        'r: 'f,
        't: 'f,
        Self: 'f,
    {
        (**self).handle(record, tx)
    }

    fn flush<'h, 't, 'f>(&'h mut self, tx: &'t mut Tx) -> HandlerFuture<'f>
    where
        'h: 'f,
        't: 'f,
        Self: 'f,
    {
        (**self).flush(tx)
    }

    fn reset<'h, 'f>(&'h mut self) -> Pin<Box<dyn Future<Output = ()> + Send + 'f>>
    where
        'h: 'f,
        Self: 'f,
    {
        (**self).reset()
    }
}

/// The boxed future that a closure for [`handler_fn`] returns.
pub type HandlerFuture<'a> = Pin<Box<dyn Future<Output = Result<(), HandlerError>> + Send + 'a>>;

/// Makes a [`Handler`] from a closure that returns a boxed future.
///
/// Closures need `Box::pin`, because stable Rust cannot yet require the future of an async closure
/// to be `Send`.
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

/// A closure as a handler. See [`handler_fn`].
#[derive(Clone, Copy, Debug)]
pub struct HandlerFn<F>(F);

/// Returns the closure's future without boxing it again.
impl<Tx, F> Handler<Tx> for HandlerFn<F>
where
    Tx: Send,
    F: for<'a> FnMut(&'a Record, &'a mut Tx) -> HandlerFuture<'a> + Send,
{
    fn handle<'h, 'r, 't, 'f>(&'h mut self, record: &'r Record, tx: &'t mut Tx) -> HandlerFuture<'f>
    where
        'h: 'f,
        'r: 'f,
        't: 'f,
        Self: 'f,
    {
        (self.0)(record, tx)
    }
}

/// Why a record was not handled, and what the consumer does about it.
///
/// `?` turns any error into [`retry`](Self::retry). Like `anyhow::Error`, this type therefore does
/// not implement `std::error::Error` itself.
///
/// If the chain of causes contains a transient [`Error`](crate::Error), the failure counts as the
/// backend's and not as the record's. A wrapper that hides the error from its chain
/// (`#[error(transparent)]`) defeats this. Name the error as a `#[source]` instead.
///
/// ```
/// use essentially_once::{HandlerError, Record, consumer::HandlerErrorKind};
///
/// fn ship(record: &Record, is_carrier_up: bool) -> Result<(), HandlerError> {
///     let order = std::str::from_utf8(&record.payload).map_err(HandlerError::reject)?;
///     let _: u64 = order.parse().map_err(HandlerError::reject)?; // no retry helps
///     if !is_carrier_up {
///         return Err(HandlerError::retry("the carrier does not answer"));
///     }
///     std::fs::metadata("/")?; // any other error: retry
///     Ok(())
/// }
///
/// let record = |payload| Record::new(0.into(), std::time::SystemTime::now(), payload);
/// let error = ship(&record("garbage"), true).unwrap_err();
/// assert_eq!(error.kind(), HandlerErrorKind::Reject);
/// let error = ship(&record("10248"), false).unwrap_err();
/// assert_eq!(error.kind(), HandlerErrorKind::Retry);
/// ```
pub struct HandlerError {
    pub(crate) kind: HandlerErrorKind,
    pub(crate) source: Source,
}

/// What the consumer does about a [`HandlerError`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum HandlerErrorKind {
    /// The consumer tries the record again after a pause.
    Retry,
    /// The record can never be handled, and the consumer does not try it again.
    Reject,
    /// The consumer stops.
    Fatal,
}

impl HandlerError {
    /// Another try may succeed. The consumer goes back to its stored position and tries again after
    /// a pause.
    pub fn retry(source: impl Into<Source>) -> Self {
        Self::new(HandlerErrorKind::Retry, source)
    }

    /// This record can never be handled (poison). The consumer does not try it again, unless its
    /// policy is to stop: it then first commits the records before this one in its batch, and tries
    /// it alone. A handler that gathers writes for [`flush`](Handler::flush) judges by those too,
    /// since they are not in the transaction yet.
    pub fn reject(source: impl Into<Source>) -> Self {
        Self::new(HandlerErrorKind::Reject, source)
    }

    /// The handler cannot continue at all. The consumer stops at once, even if another instance has
    /// handled the record first.
    pub fn fatal(source: impl Into<Source>) -> Self {
        Self::new(HandlerErrorKind::Fatal, source)
    }

    /// The error that the handler returned or that the consumer found, to be downcast.
    pub fn cause(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        &*self.source
    }

    /// What the consumer does about it.
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
