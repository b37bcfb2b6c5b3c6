//! Sends records to a log, for processes without a database.

mod batch;
mod lane;
mod queue;
mod report;
mod sender;
mod settings;

use std::{fmt, sync::Arc, time::Duration};

use tracing::Instrument;

use self::{lane::Lane, queue::Queue, settings::Settings};
pub use self::{
    report::{Report, Sequences},
    sender::{Sender, Sent},
};
use crate::{Epoch, Error, Log, Numbering, ProducerId, rt};

/// Appends records to a log so that a lost reply neither loses nor doubles one: for processes
/// without a database, such as a web server that passes orders on.
///
/// A reply that is lost leaves open whether the records are in the log, so they must be appended
/// again, and the log may then hold them twice. The producer numbers its records from 1 on, under
/// its name and an [`Epoch::fresh`], and appends them again with the same
/// [origins](crate::Origin). An essentially-once [`Consumer`](crate::Consumer) drops the
/// duplicates.
///
/// [`start`](Self::start) spawns the producer's task and returns a [`Sender`]. The task appends
/// what has queued up, in batches:
///
/// - After [`Error::Unavailable`] and [`Error::Indeterminate`], it appends the same records again,
///   in the same order, until the log confirms them. Pauses grow exponentially and have jitter.
///   [`give_up_after`](Self::give_up_after) sets a limit.
/// - After any other error, which means that nothing was appended, it bisects the batch. A record
///   that the log refuses alone fails with the log's error. All others are appended in order.
///   **Later records of the same key are still sent.** A sender for which that is wrong awaits each
///   [`Sent`] before it sends the next record of the key.
///
/// By default one append is in flight at a time, so the log has the records in the order in which
/// they were sent. Large batches make up for the wait. A record in doubt that was given up is the
/// exception: the backend may still append it, behind records that were sent later.
///
/// A record that is queued exists only in this process. A process that crashes loses what was not
/// confirmed. If a request must not be acknowledged before its record is safe, await the [`Sent`]
/// first. A sender with a database writes the record to it instead, in the transaction of its
/// change, and appends it from there.
///
/// # Examples
/// ```
/// use essentially_once::memory::{Memory, MemoryTx};
/// use essentially_once::{
///     Consumer, ConsumerId, KeyValue, NewRecord, Producer, ProducerId, Record, handler_fn,
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// let memory = Memory::new();
/// let orders = Producer::new(memory.log("orders")?, ProducerId::new("web")?).start()?;
///
/// // The first await ends when the record is queued, the second one when the log has it.
/// orders.send(NewRecord::new("10248").key("VINET")).await?.await?;
/// // This one is confirmed later.
/// orders.send(NewRecord::new("10249").key("TOMSP")).await?;
/// let report = orders.close().await;
/// assert_eq!((report.confirmed, report.failed.count(), report.in_doubt.count()), (2, 0, 0));
///
/// let ship = handler_fn(|order: &Record, tx: &mut MemoryTx| {
///     Box::pin(async move { Ok(tx.put(&order.payload, b"shipped").await?) })
/// });
/// let log = memory.log("orders")?;
/// let report = Consumer::essentially_once(ConsumerId::new("shipping")?, log, memory.store(), ship)
///     .accept_volatile() // the in-memory backend loses its data in a crash
///     .run_until_caught_up()
///     .await?;
/// assert_eq!(report.handled, 2);
/// # Ok(())
/// # }
/// ```
#[must_use = "a producer does nothing before `start`"]
pub struct Producer {
    log: Arc<dyn Log>,
    numbering: Numbering,
    settings: Settings,
}

impl Producer {
    /// A producer for this log, with a fresh epoch. Processes may share a name.
    pub fn new(log: impl Log + 'static, name: ProducerId) -> Self {
        Self {
            log: Arc::new(log),
            numbering: Numbering::new(name, Epoch::fresh()),
            settings: Settings::default(),
        }
    }

    /// Allows this many appends in flight, and gives up the order of the records. The default is 1,
    /// which keeps the order, and the value must be from 1 to 1,024.
    ///
    /// Use it if a batch per round trip is too slow and the order does not matter. The log may
    /// refuse or lose one append and accept the next one, so records of one key change places too.
    ///
    /// The records in flight never span more than the 1,024 sequences that a consumer's
    /// [`Window`](crate::backend::Window) tracks. While one append fails again and again, the
    /// others therefore wait for it sooner or later.
    pub fn unordered(mut self, depth: usize) -> Self {
        self.settings.depth = depth;
        self
    }

    /// The most records of one append. The default is 1,024, divided by the depth of
    /// [`unordered`](Self::unordered), and the value must be from 1 to 1,024. An append never waits
    /// for more records than have queued up.
    pub fn max_batch(mut self, records: usize) -> Self {
        self.settings.max_batch = Some(records);
        self
    }

    /// The most bytes of one append, by [`NewRecord::size`](crate::NewRecord::size). The default is
    /// 1 MiB, and the value must be at least 1. A single record may exceed the limit.
    pub fn max_batch_bytes(mut self, bytes: usize) -> Self {
        self.settings.max_batch_bytes = bytes;
        self
    }

    /// How many records may be queued or in flight before [`Sender::send`] waits. The default is
    /// 8,192, and the value must be from 1 to 2^32 - 1.
    pub fn queue_records(mut self, records: usize) -> Self {
        self.settings.queue_records = records;
        self
    }

    /// How many bytes of records may be queued or in flight before [`Sender::send`] waits, by
    /// [`NewRecord::size`](crate::NewRecord::size). The default is 4 MiB, and the value must be
    /// from 1 to 2^32 - 1. A larger record waits until the queue is empty.
    pub fn queue_bytes(mut self, bytes: usize) -> Self {
        self.settings.queue_bytes = bytes;
        self
    }

    /// The pause before records are appended again. The default is 10 ms, and the value must not
    /// exceed [`max_backoff`](Self::max_backoff). Pauses double, with up to 100 % jitter, and reset
    /// after an append that the log confirms or refuses.
    pub fn min_backoff(mut self, pause: Duration) -> Self {
        self.settings.backoff.shortest = pause;
        self
    }

    /// The longest pause before records are appended again, without jitter. The default is 10 s,
    /// and the value must not be below [`min_backoff`](Self::min_backoff).
    pub fn max_backoff(mut self, pause: Duration) -> Self {
        self.settings.backoff.longest = pause;
        self
    }

    /// Gives up on a record that is neither confirmed nor refused this long after it was queued.
    /// The default is no limit, and zero is refused.
    ///
    /// The record fails with [`Error::Indeterminate`] if the outcome of an append is unknown or the
    /// log has not answered yet, and with [`Error::Unavailable`] otherwise. An append in which no
    /// other record is left is dropped. Later records are still sent. To send a record that was
    /// given up again may double it, because it gets another number.
    pub fn give_up_after(mut self, time: Duration) -> Self {
        self.settings.give_up_after = Some(time);
        self
    }

    /// The name and the epoch under which the records are numbered.
    pub const fn numbering(&self) -> &Numbering {
        &self.numbering
    }

    /// Spawns the producer's task, or one for each append in flight if
    /// [`unordered`](Self::unordered).
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] if a setting is out of its bounds.
    ///
    /// # Panics
    /// If it is called outside of a Tokio runtime.
    pub fn start(self) -> Result<Sender, Error> {
        let Self {
            log,
            numbering,
            settings,
        } = self;
        settings.check()?;
        let span = tracing::info_span!("producer", producer = %numbering, log = %log.id());
        let queue = Arc::new(Queue::new(numbering, log.id().clone(), &settings));
        let sender = Sender::new(Arc::clone(&queue));
        for _ in 0..settings.depth {
            let lane = Lane::new(Arc::clone(&log), Arc::clone(&queue), &settings);
            rt::spawn(lane.run().instrument(span.clone()));
        }
        Ok(sender)
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("numbering", &self.numbering)
            .field("log", self.log.id())
            .finish_non_exhaustive()
    }
}
