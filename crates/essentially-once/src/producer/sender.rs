//! What a process holds of a running producer.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::sync::oneshot;

use super::{
    queue::{Queue, TASK_ENDED},
    report::Report,
};
use crate::{Error, NewRecord, Numbering, Origin};

/// Sends records through a running [`Producer`](super::Producer). Clones share the producer.
///
/// Call [`close`](Self::close) before the process ends. If the last `Sender` is dropped without it
/// while records are not confirmed, a warning with their number is logged, and the producer's task
/// sends them in the background. It ends when none is left, which may take as long as the log is
/// unavailable. If the runtime ends first, each record that is left fails, in doubt if an append
/// may have got through, and a warning is logged for those whose [`Sent`] was dropped.
#[derive(Clone)]
pub struct Sender(Arc<Handle>);

/// Closes the queue when the last sender is dropped.
struct Handle(Arc<Queue>);

impl Sender {
    pub(super) fn new(queue: Arc<Queue>) -> Self {
        Self(Arc::new(Handle(queue)))
    }

    fn queue(&self) -> &Queue {
        &self.0.0
    }

    /// The name and the epoch under which the records are numbered, for logs and for support.
    pub fn numbering(&self) -> &Numbering {
        &self.queue().numbering
    }

    /// Queues the record, and waits while the queue is full. Await the returned [`Sent`] to learn
    /// that the log has the record.
    ///
    /// Records are numbered in the order in which calls of `send` complete. By default they are
    /// appended in that order. The record is not returned if it fails later, so keep a clone if you
    /// mean to send it elsewhere. Cloning copies no payload.
    ///
    /// Cancel-safe: if the future is dropped before it completes, the record was not queued and
    /// will not be sent.
    ///
    /// # Errors
    /// [`Error::Failed`] if the record already has an [`Origin`], or if the producer was closed or
    /// has ended. The record was then not queued.
    pub async fn send(&self, record: NewRecord) -> Result<Sent, Error> {
        self.queue().push(record).await
    }

    /// Waits until each record that was queued before this call is confirmed or has failed. Records
    /// that are queued meanwhile do not prolong it.
    ///
    /// Returns what became of all records so far. Without
    /// [`give_up_after`](super::Producer::give_up_after), it waits for as long as the log is
    /// unavailable.
    ///
    /// Cancel-safe: dropping the future has no effect on the records.
    pub async fn flush(&self) -> Report {
        self.queue().flush().await
    }

    /// Refuses further records, waits until all that were queued are confirmed or have failed, and
    /// ends the producer's task.
    ///
    /// Returns what became of all records. A call of [`send`](Self::send) that waits for room fails
    /// and queues nothing. A second call of `close` waits as well and returns the same.
    ///
    /// If the future is dropped, the producer is closed, and its task goes on with the queued
    /// records. So a time limit around this call is safe, and [`report`](Self::report) then says
    /// which records are not confirmed:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use essentially_once::{NewRecord, Producer, ProducerId, memory::Memory};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), essentially_once::Error> {
    /// # let log = Memory::new().log("orders")?;
    /// # let sender = Producer::new(log, ProducerId::new("web")?).start()?;
    /// # sender.send(NewRecord::new("10248")).await?;
    /// let report = match tokio::time::timeout(Duration::from_secs(20), sender.close()).await {
    ///     Ok(report) => report,
    ///     Err(_) => sender.report(),
    /// };
    /// assert_eq!((report.confirmed, report.waiting.count()), (1, 0), "{report}");
    /// # Ok(())
    /// # }
    /// ```
    pub async fn close(&self) -> Report {
        self.queue().close();
        self.queue().ended().await
    }

    /// What became of all records so far.
    pub fn report(&self) -> Report {
        self.queue().report()
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("numbering", self.numbering())
            .field("log", &self.queue().log)
            .finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
        let waiting = self.0.report().waiting;
        if waiting.count() > 0 {
            tracing::warn!(
                producer = %self.0.numbering,
                log = %self.0.log,
                unconfirmed = waiting.count(),
                sequences = %waiting,
                "the producer was dropped before its records were confirmed; it goes on in the background, and loses them \
                 if the process ends first. Call `close` and await it"
            );
        }
    }
}

/// The result of one record, as a future.
///
/// It resolves to `Ok` once the log has confirmed the record: the record survives a crash, as far
/// as the log's contract (L1 of [`Log`](crate::Log)) promises. Dropping it has no effect on the
/// record. If the record then is not confirmed, a warning is logged.
///
/// # Errors
/// - [`Error::Indeterminate`] if the record may or may not be in the log: its time was over while
///   the outcome was unknown, the log refused it after an earlier reply had been lost, or the
///   producer's task ended during an append.
/// - [`Error::Unavailable`] if its time was over or the task ended, and it is not in the log.
/// - [`Error::TooLarge`], [`Error::Failed`] and others if the log refused it.
///
/// # Panics
/// If it is polled again after it has resolved.
pub struct Sent {
    origin: Origin,
    result: oneshot::Receiver<Result<(), Error>>,
}

impl Sent {
    pub(super) const fn new(origin: Origin, result: oneshot::Receiver<Result<(), Error>>) -> Self {
        Self { origin, result }
    }

    /// The record's origin. Its sequence is the number by which a [`Report`] names the record.
    pub const fn origin(&self) -> &Origin {
        &self.origin
    }
}

impl Future for Sent {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let result = ready!(Pin::new(&mut self.result).poll(context));
        Poll::Ready(result.unwrap_or_else(|_| {
            let action = format!("send record {}", self.origin);
            Err(Error::indeterminate(action, TASK_ENDED))
        }))
    }
}

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sent")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}
