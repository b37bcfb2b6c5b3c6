//! The three deliveries: in which order a batch is handled and its offset committed.

use std::{
    any::Any,
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    task::Poll,
};

use async_trait::async_trait;

use super::session::{Done, FailedRecord, Failure, Session};
use crate::{Handler, HandlerError, Offset, OffsetStore, Record, Transaction, handler::HandlerErrorKind};

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
        let (done, next, failed) = handle_each(session, handler, batch, &mut tx).await;
        if let Some(failed) = failed {
            if let Err(error) = tx.rollback().await {
                tracing::warn!(%error, "rollback failed; the backend discards the transaction by itself");
            }
            session.check_current().await?;
            return Err(failed);
        }
        if let Some(next) = next {
            session.commit(tx, next).await?;
            session.count(done, batch);
        }
        Ok(())
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
        let (done, next, failed) = handle_each(session, handler, batch, &mut ()).await;
        session.count(done, batch);
        if let Some(next) = next {
            let tx = session.begin().await?;
            session.commit(tx, next).await?;
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

/// Handles the batch up to a failure or a stop. Returns what was done, the offset behind it, and the failure.
async fn handle_each<S, Tx, H>(
    session: &mut Session<'_, S>,
    handler: &mut H,
    batch: &[Record],
    tx: &mut Tx,
) -> (Done, Option<Offset>, Option<Failure>)
where
    S: OffsetStore,
    Tx: Send,
    H: Handler<Tx>,
{
    let mut done = Done::default();
    let mut next = None;
    for record in batch {
        if next.is_some() && session.stop.is_cancelled() {
            break;
        }
        if session.windows.is_seen(record) {
            session.drop_duplicate(record);
            done.duplicates += 1;
        } else {
            match handle(handler, record, tx).await {
                Ok(()) => {
                    session.windows.mark(record);
                    done.handled += 1;
                }
                Err(error) => {
                    let failure = FailedRecord {
                        offset: record.offset,
                        error,
                        is_first: next.is_none(),
                        fatal_outcome: NOTHING_MOVED,
                    };
                    return (done, next, Some(failure.classify()));
                }
            }
        }
        next = Some(record.offset.successor());
    }
    (done, next, None)
}

impl FailedRecord {
    /// A backend in trouble is not the record's fault, even if the handler was the one to notice.
    fn classify(mut self) -> Failure {
        if self.error.kind == HandlerErrorKind::Retry {
            match self.error.source.downcast::<crate::Error>() {
                Ok(error) if error.is_transient() => return Failure::Backend(*error),
                Ok(error) => self.error.source = error,
                Err(source) => self.error.source = source,
            }
        }
        Failure::Record(self)
    }
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
            if session.windows.is_seen(record) {
                session.drop_duplicate(record);
            } else {
                session.windows.mark(record);
                fresh.push(record);
            }
        }
        let Some(tx) = session.begin_unless_stopped().await? else {
            return Ok(());
        };
        session.commit(tx, last.offset.successor()).await?;
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
