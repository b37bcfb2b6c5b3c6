//! The three deliveries: in which order a batch is handled and its offset committed.

use std::{
    any::Any,
    future::{Future, poll_fn},
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    task::Poll,
};

use async_trait::async_trait;

use super::session::{Done, FailedRecord, Failure, Session};
use crate::{Error, Handler, HandlerError, Offset, OffsetStore, Record, Transaction, handler::HandlerErrorKind};

/// How a consumer orders handling and committing: one of [`EssentiallyOnce`], [`AtLeastOnce`] and [`AtMostOnce`].
#[async_trait]
pub trait Delivery<S: OffsetStore>: sealed::Sealed + 'static {
    /// What a handler gets to write in.
    type Tx: Send;

    #[doc(hidden)]
    const NAME: &'static str;

    #[doc(hidden)]
    const NEEDS_DURABILITY: bool;

    #[doc(hidden)]
    async fn deliver<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
        batch: &[Record],
    ) -> Result<(), Failure>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::EssentiallyOnce {}
    impl Sealed for super::AtLeastOnce {}
    impl Sealed for super::AtMostOnce {}
}

/// Effects and offset in one commit.
#[derive(Debug)]
pub enum EssentiallyOnce {}

/// The offset after the effects.
#[derive(Debug)]
pub enum AtLeastOnce {}

/// The offset before the effects.
#[derive(Debug)]
pub enum AtMostOnce {}

const NOTHING_MOVED: &str = "a fatal error; the position points to this record or one before it";

#[async_trait]
impl<S: OffsetStore> Delivery<S> for EssentiallyOnce {
    type Tx = S::Tx;

    const NAME: &'static str = "essentially-once";
    const NEEDS_DURABILITY: bool = true;

    async fn deliver<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
        batch: &[Record],
    ) -> Result<(), Failure> {
        let Some(mut tx) = session.begin_unless_stopped().await? else {
            return Ok(());
        };
        let (done, passed, mut failed) = handle_each(session, handler, batch, &mut tx).await;
        if failed.is_none() && done.handled > 0 {
            let flushed = flush(handler, &mut tx).await;
            failed = flushed.err().map(|error| batch_failure(passed, error));
        }
        if let Some(failed) = failed {
            if let Err(error) = tx.rollback().await {
                tracing::warn!(%error, "rollback failed; the backend discards the transaction by itself");
            }
            session.check_current().await?;
            return Err(failed);
        }
        let Some(last) = passed.last() else {
            return Ok(());
        };
        match session.commit(tx, last).await {
            Ok(()) => {
                session.count(done, batch);
                Ok(())
            }
            // A deferred constraint, a statement that was only queued: the handler's doing, which only the commit reports.
            Err(error) if done.handled > 0 && matches!(error, Error::Failed { .. } | Error::TooLarge { .. }) => {
                session.check_current().await?;
                Err(batch_failure(passed, HandlerError::retry(error)))
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[async_trait]
impl<S: OffsetStore> Delivery<S> for AtLeastOnce {
    type Tx = ();

    const NAME: &'static str = "at-least-once";
    const NEEDS_DURABILITY: bool = false;

    async fn deliver<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
        batch: &[Record],
    ) -> Result<(), Failure> {
        let (done, passed, failed) = handle_each(session, handler, batch, &mut ()).await;
        if done.handled > 0
            && let Err(error) = flush(handler, &mut ()).await
        {
            session.check_current().await?;
            return Err(batch_failure(passed, error));
        }
        session.count(done, batch);
        if let Some(last) = passed.last() {
            let tx = session.begin().await?;
            session.commit(tx, last).await?;
        } else if failed.is_some() {
            session.check_current().await?;
        }
        match failed {
            // What came before it is committed, so that it is not done twice for this one's sake.
            Some(Failure::Record(failed)) => Err(Failure::Record(FailedRecord {
                is_first: true,
                ..failed
            })),
            Some(failed) => Err(failed),
            None => Ok(()),
        }
    }
}

/// Handles the batch up to a failure or a stop. Returns what was done, the records that were passed, and the failure.
async fn handle_each<'b, S, Tx, H>(
    session: &mut Session<'_, S>,
    handler: &mut H,
    batch: &'b [Record],
    tx: &mut Tx,
) -> (Done, &'b [Record], Option<Failure>)
where
    S: OffsetStore,
    Tx: Send,
    H: Handler<Tx>,
{
    let mut done = Done::default();
    for (index, record) in batch.iter().enumerate() {
        if index > 0 && session.stop.is_cancelled() {
            return (done, &batch[..index], None);
        }
        if is_duplicate(session, record) {
            session.drop_duplicate(record);
            done.duplicates += 1;
            continue;
        }
        match handle(handler, record, tx).await {
            Ok(()) => {
                session.windows.mark(record, session.now);
                done.handled += 1;
            }
            Err(error) => {
                let failure = FailedRecord {
                    offset: record.offset,
                    error,
                    is_first: index == 0,
                    fatal_outcome: NOTHING_MOVED,
                };
                return (done, &batch[..index], Some(failure.classify()));
            }
        }
    }
    (done, batch, None)
}

/// Whether the record was handled before. A malformed one never was, whatever its origin says: it may be the broken copy of
/// a record that is sent again whole.
fn is_duplicate<S>(session: &Session<'_, S>, record: &Record) -> bool {
    let origin = record.origin.as_ref().filter(|_| record.malformed.is_none());
    origin.is_some_and(|origin| session.windows.is_seen(origin))
}

/// The failure of these records together: of the only one, or of one that is to be found.
fn batch_failure(passed: &[Record], error: HandlerError) -> Failure {
    let (Some(first), Some(last)) = (passed.first(), passed.last()) else {
        return Failure::Batch(Offset::ZERO, error);
    };
    let failed = FailedRecord {
        offset: first.offset,
        error,
        is_first: true,
        fatal_outcome: NOTHING_MOVED,
    };
    match failed.classify() {
        Failure::Record(failed) if passed.len() > 1 && failed.error.kind != HandlerErrorKind::Fatal => {
            Failure::Batch(last.offset, failed.error)
        }
        failure => failure,
    }
}

impl FailedRecord {
    /// A backend in trouble is not the record's fault, even if the handler was the one to notice and wrapped its error.
    fn classify(mut self) -> Failure {
        if self.error.kind == HandlerErrorKind::Retry {
            match self.error.source.downcast::<Error>() {
                Ok(error) if error.is_transient() => return Failure::Backend(*error),
                Ok(error) => self.error.source = error,
                Err(source) if is_caused_by_backend(&*source) => {
                    return Failure::Backend(Error::unavailable(
                        format!("handle the record at {}", self.offset),
                        source,
                    ));
                }
                Err(source) => self.error.source = source,
            }
        }
        Failure::Record(self)
    }
}

fn is_caused_by_backend(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = error.source();
    while let Some(cause) = next {
        if cause.downcast_ref::<Error>().is_some_and(Error::is_transient) {
            return true;
        }
        next = cause.source();
    }
    false
}

#[async_trait]
impl<S: OffsetStore> Delivery<S> for AtMostOnce {
    type Tx = ();

    const NAME: &'static str = "at-most-once";
    const NEEDS_DURABILITY: bool = false;

    async fn deliver<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
        batch: &[Record],
    ) -> Result<(), Failure> {
        let Some(last) = batch.last() else {
            return Ok(());
        };
        let mut fresh = Vec::with_capacity(batch.len());
        for record in batch {
            if is_duplicate(session, record) {
                session.drop_duplicate(record);
                continue;
            }
            // A malformed record marks nothing, so that it can be sent again whole.
            if record.malformed.is_none() {
                session.windows.mark(record, session.now);
            }
            fresh.push(record);
        }
        let Some(tx) = session.begin_unless_stopped().await? else {
            return Ok(());
        };
        session.commit(tx, last).await?;
        let mut done = Done {
            duplicates: (batch.len() - fresh.len()) as u64,
            ..Done::default()
        };
        let mut fatal = None;
        for (index, record) in fresh.iter().enumerate() {
            let Err(error) = handle(handler, record, &mut ()).await else {
                done.handled += 1;
                continue;
            };
            done.failed += 1;
            tracing::warn!(offset = %record.offset, %error, "not handled, and passed over: at-most-once does not try again");
            if error.kind == HandlerErrorKind::Fatal {
                let unhandled = (fresh.len() - index - 1) as u64;
                done.failed += unhandled;
                tracing::warn!(
                    unhandled,
                    "records behind a fatal error are passed over too: their offset is committed"
                );
                fatal = Some(FailedRecord {
                    offset: record.offset,
                    error,
                    is_first: true,
                    fatal_outcome: "a fatal error; the position is past this record and the rest of its batch, which were not handled",
                });
                break;
            }
        }
        if done.handled > 0
            && let Err(error) = flush(handler, &mut ()).await
        {
            let unwritten = mem::take(&mut done.handled);
            done.failed += unwritten;
            tracing::warn!(unwritten, %error, "the batch was not flushed, and is passed over: at-most-once does not try again");
            if error.kind == HandlerErrorKind::Fatal && fatal.is_none() {
                fatal = Some(FailedRecord {
                    offset: last.offset,
                    error,
                    is_first: true,
                    fatal_outcome: "a fatal error after the batch that ends with this record; the position is past it",
                });
            }
        }
        session.count(done, batch);
        fatal.map_or(Ok(()), |fatal| Err(Failure::Record(fatal)))
    }
}

/// Calls the handler; a panic in it is a failure like any other, and a malformed record never gets there.
async fn handle<Tx: Send, H: Handler<Tx>>(handler: &mut H, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
    if let Some(reason) = &record.malformed {
        return Err(HandlerError::reject(format!(
            "the entry could not be decoded: {reason}"
        )));
    }
    let call = pin!(async move { handler.handle(record, tx).await });
    catch_panic(call).await.unwrap_or_else(Err)
}

/// Calls the handler's flush; a panic in it is a failure too.
async fn flush<Tx: Send, H: Handler<Tx>>(handler: &mut H, tx: &mut Tx) -> Result<(), HandlerError> {
    let call = pin!(async move { handler.flush(tx).await });
    catch_panic(call).await.unwrap_or_else(Err)
}

/// Polls a future, with a panic in it as an error. The future makes its calls within, so that a panic before the first await
/// is caught too.
pub(super) async fn catch_panic<T>(mut future: Pin<&mut (impl Future<Output = T> + Send)>) -> Result<T, HandlerError> {
    poll_fn(
        |context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(panicked(panic))),
        },
    )
    .await
}

fn panicked(panic: Box<dyn Any + Send>) -> HandlerError {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    HandlerError::retry(format!("the handler panicked: {message}"))
}
