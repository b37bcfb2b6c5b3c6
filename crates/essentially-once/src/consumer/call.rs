//! Calls of the handler: their time limits, their panics, and what a stop does to them.

use std::{
    any::Any,
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::session::Session;
use crate::{Handler, HandlerError, OffsetStore, Record, handler::HandlerFuture, rt};

/// Whether a handler that is still running is cut off when the run is stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// Its future is dropped after the grace period, and its transaction is rolled back, as in a
    /// crash.
    AfterGrace,
    /// It finishes, because nothing would undo its effects so far.
    Never,
}

/// Why a call of the handler did not succeed.
pub(super) enum Interrupted {
    Failed(HandlerError),
    /// The run was stopped, and the handler did not finish in time.
    Stopped,
}

/// Calls the handler. A panic in it is a failure like any other, and it never gets a malformed
/// record.
pub(super) async fn handle<S: OffsetStore, Tx: Send, H: Handler<Tx>>(
    session: &mut Session<'_, S>,
    handler: &mut H,
    record: &Record,
    tx: &mut Tx,
    cut: Cut,
) -> Result<(), Interrupted> {
    if let Some(reason) = &record.malformed {
        session.count_failed_try();
        return Err(Interrupted::Failed(HandlerError::reject(format!(
            "the entry could not be decoded: {reason}"
        ))));
    }
    let limit = session.settings.record_time_limit;
    call(session, limit, cut, || handler.handle(record, tx)).await
}

/// Calls the handler's `flush`. A panic in it is a failure too.
pub(super) async fn flush<S: OffsetStore, Tx: Send, H: Handler<Tx>>(
    session: &mut Session<'_, S>,
    handler: &mut H,
    tx: &mut Tx,
    cut: Cut,
) -> Result<(), Interrupted> {
    call(session, None, cut, || handler.flush(tx)).await
}

/// Calls the handler's `reset`. A panic in it amounts to a reset that did nothing. The handler's
/// next error counts as usual.
pub(super) async fn reset<Tx: Send, H: Handler<Tx>>(handler: &mut H) {
    let call = pin!(async move { handler.reset().await });
    if let Err(error) = catch_panic(call).await {
        tracing::error!(%error, "resetting the handler failed");
    }
}

/// What a call of the handler returned, or that it panicked.
type Called = Result<Result<(), HandlerError>, HandlerError>;

async fn call<'f, S: OffsetStore>(
    session: &mut Session<'_, S>,
    limit: Option<Duration>,
    cut: Cut,
    begin: impl FnOnce() -> HandlerFuture<'f> + Send,
) -> Result<(), Interrupted> {
    // A handler that is not an async function may panic before it returns a future.
    let mut future = match catch_unwind(AssertUnwindSafe(begin)) {
        Ok(future) => future,
        Err(panic) => {
            session.count_failed_try();
            return Err(Interrupted::Failed(panicked(panic)));
        }
    };
    // Most calls end at their first poll, and then need neither a timer nor a look at the stop.
    match poll_fn(|context| Poll::Ready(poll_once(future.as_mut(), context))).await {
        Poll::Ready(Ok(Ok(()))) => Ok(()),
        first => go_on(session, limit, cut, future, first).await,
    }
}

/// Waits for a call, of which this is the result of the first poll.
async fn go_on<S: OffsetStore>(
    session: &mut Session<'_, S>,
    limit: Option<Duration>,
    cut: Cut,
    mut future: HandlerFuture<'_>,
    first: Poll<Called>,
) -> Result<(), Interrupted> {
    let mut first = Some(first);
    let rest = poll_fn(|context| first.take().unwrap_or_else(|| poll_once(future.as_mut(), context)));
    let limited = rt::within(limit, rest);
    let (stop, grace) = (session.stop, session.settings.stop_grace);
    let result = tokio::select! {
        biased;
        result = limited => result,
        () = grace_is_over(stop, grace), if cut == Cut::AfterGrace => {
            tracing::warn!(?grace, "the run was stopped and the handler did not finish in time; rolling its transaction back");
            return Err(Interrupted::Stopped);
        }
    };
    let error = match result {
        Some(Ok(Ok(()))) => return Ok(()),
        Some(Ok(Err(error)) | Err(error)) => error,
        None => HandlerError::retry(format!(
            "the handler did not finish within its time limit of {:?}",
            limit.unwrap_or_default()
        )),
    };
    session.count_failed_try();
    Err(Interrupted::Failed(error))
}

pub(super) async fn grace_is_over(stop: &CancellationToken, grace: Duration) {
    stop.cancelled().await;
    rt::sleep(grace).await;
}

/// Polls a future and turns a panic in it into an error. Make the calls inside the future, so that
/// a panic before the first await is caught too.
pub(super) async fn catch_panic<T>(mut future: Pin<&mut (impl Future<Output = T> + Send)>) -> Result<T, HandlerError> {
    poll_fn(|context| poll_once(future.as_mut(), context)).await
}

fn poll_once<T>(
    future: Pin<&mut (impl Future<Output = T> + Send + ?Sized)>,
    context: &mut Context<'_>,
) -> Poll<Result<T, HandlerError>> {
    match catch_unwind(AssertUnwindSafe(|| future.poll(context))) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(panicked(panic))),
    }
}

fn panicked(panic: Box<dyn Any + Send>) -> HandlerError {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    HandlerError::retry(format!("the handler panicked: {message}"))
}
