//! The log that a consumer reads: append-only, totally ordered, durable.

use std::sync::Arc;

use async_trait::async_trait;

use crate::{Error, LogId, NewRecord, Offset, Record};

/// The range of offsets that a log still holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// The earliest offset that can be read. Equal to `end` if the log is empty.
    pub earliest: Offset,
    /// One past the last record: the [successor](Offset::successor) of its offset. If the log is
    /// empty, the successor of the last offset that it ever held.
    pub end: Offset,
}

impl Bounds {
    /// Checks that a reader can start at `from`: anywhere from [`earliest`](Self::earliest) to
    /// [`end`](Self::end), both included.
    ///
    /// # Errors
    /// [`Error::Truncated`] below the earliest record, [`Error::OutOfRange`] past the end.
    pub fn check(&self, log: &LogId, from: Offset) -> Result<(), Error> {
        if from < self.earliest {
            return Err(Error::Truncated {
                log: log.clone(),
                requested: from,
                earliest: self.earliest,
            });
        }
        if from > self.end {
            return Err(Error::OutOfRange {
                log: log.clone(),
                requested: from,
                end: self.end,
            });
        }
        Ok(())
    }
}

/// Whether acknowledged data survives a crash of the process and a restart of the backend.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Durability {
    /// It survives.
    Durable,
    /// It does not survive. The text says why and names the setting to change.
    Volatile(String),
    /// The backend offers no way to find out. The text says why.
    Unknown(String),
}

/// One partition of a log. The core reads it, and services append to it.
///
/// # Contract
/// - **L1** `append` returns `Ok` only when the records survive a crash of this process and a
///   restart of the backend.
/// - **L2** All readers see the same total order, and it keeps the order of each appender's
///   records.
/// - **L3** A reader never skips a record that becomes visible later. Holes behind a reader are
///   never filled.
/// - **L4** `read(o)` yields exactly the records at or after `o`.
/// - **L5** Reading below the earliest retained offset fails with [`Error::Truncated`], and reading
///   past the end fails with [`Error::OutOfRange`]. Either `read` or the first `next` returns the
///   error. Reading there never silently yields other records, and never waits forever. Reading at
///   the end itself waits for the next record.
/// - **L6** `next` is cancel-safe: dropping its future loses no record and repeats none.
/// - **L7** A failed `append` says what the log now holds: none of the records, or, with
///   [`Error::Indeterminate`], an unknown prefix of them.
/// - **L8** `append` refuses a record over the size limit with [`Error::TooLarge`] before it
///   appends anything.
/// - **L9** A reader yields an entry that cannot be decoded in its place, as a record with its raw
///   bytes and [`malformed`](Record::malformed) set. It never skips the entry, and never blocks the
///   log with an error.
/// - **L10** A handle belongs to the log that it opened. If that log is deleted, an append through
///   the handle fails, or its records are deleted with the log. The append never recreates the log,
///   and its records never show in a later log of the same name. A backend without incarnations
///   cannot distinguish the two logs and is exempt. Its documentation says so.
/// - **L11** `remove_before(o)` removes the records before `o`, and never one at or after it. From
///   then on, reading at a removed record or before one fails with [`Error::Truncated`]. No later
///   record gets an offset that a removed record had, and an outbox uses no number again. A log
///   that removes records only by its retention is exempt.
/// - **L12** From the offset that `tail(n)` returns, a reader yields the last `n` records, or all
///   if the log holds fewer. Where offsets are not dense, the number may be inexact. A log that
///   cannot tell returns `None`.
///
/// # Examples
/// ```
/// use essentially_once::memory::Memory;
/// use essentially_once::{Epoch, Log, NewRecord, Offset, Origin, ProducerId, backend::LogReader};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// let log = Memory::new().log("orders")?;
/// let (web, epoch) = (ProducerId::new("web")?, Epoch::fresh());
/// let order = NewRecord::new("10248").key("VINET").origin(Origin::new(web, epoch, 1));
/// log.append(&[order.clone()]).await?;
/// // If the reply is lost, append again. Consumers drop the duplicate by its origin.
/// log.append(&[order]).await?;
///
/// let mut reader = log.read(Offset::ZERO).await?;
/// let records = reader.next(100).await?;
/// assert_eq!(records.len(), 2);
/// assert_eq!(records[0].origin, records[1].origin);
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait Log: Send + Sync {
    /// The log's name, and its incarnation if the backend keeps one. Every call returns the same
    /// value.
    fn id(&self) -> &LogId;

    /// Appends the records in order and returns the last one's offset, if the backend reports it.
    ///
    /// - Empty input appends nothing and returns `Ok(None)`.
    /// - Dropping the future leaves the outcome unknown, as [`Error::Indeterminate`] does.
    /// - A repeated call appends the records again. Consumers can drop the duplicates only if the
    ///   records have an [`Origin`](crate::Origin).
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Unavailable`] and [`Error::Failed`] if nothing was appended.
    /// [`Error::Indeterminate`] if any prefix of the records may have been.
    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error>;

    /// Opens a reader at `from`, which need not be a record's offset. The reader begins at the
    /// first record at or after it.
    ///
    /// Dropping the future has no effect on the log.
    ///
    /// # Errors
    /// [`Error::Truncated`] and [`Error::OutOfRange`] as in L5; [`Error::Unavailable`],
    /// [`Error::Failed`].
    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error>;

    /// The range of offsets that the log holds now.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn bounds(&self) -> Result<Bounds, Error>;

    /// One past the last record that can still be read. This is [`Bounds::end`], unless the log's
    /// last records were deleted individually. `run_until_caught_up` uses it so that it does not
    /// wait for a deleted record.
    ///
    /// The default returns the end, which is correct if records are only ever removed from the
    /// front.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn readable_end(&self) -> Result<Offset, Error> {
        Ok(self.bounds().await?.end)
    }

    /// The approximate number of records at or after `from`, if it is cheap to find out. A metric
    /// of the consumer shows it. The default returns `None`.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn count_from(&self, from: Offset) -> Result<Option<u64>, Error> {
        let _ = from;
        Ok(None)
    }

    /// Where the last `count` records begin, or the earliest record if the log holds fewer; the end
    /// for a `count` of 0. The number is inexact where records were deleted individually, where
    /// one message holds several, and where the backend leaves out offsets.
    ///
    /// A [`Relay`](crate::relay::Relay) uses it to compare what it sends with what the log holds.
    /// The default returns `None`: the log cannot tell without reading all of it. A wrapper that
    /// yields other records than were appended through it also returns `None`.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        let _ = count;
        Ok(None)
    }

    /// Decodes a malformed record again that this log has yielded, when its dead letter is tried
    /// again. Returns the record with the same offset, or `None` if it still cannot be decoded.
    ///
    /// It is for logs whose settings decide what can be decoded: one with keys for signatures or
    /// encryption decodes more of them after a key was added. A wrapper must pass the call on. The
    /// default returns `None`.
    fn decode(&self, malformed: &Record) -> Option<Record> {
        let _ = malformed;
        None
    }

    /// Removes the records before `offset`, which need not be a record's offset, and returns how
    /// many it removed. For an outbox, [`remove_passed`](crate::consumer::remove_passed) finds the
    /// offset.
    ///
    /// - Removes nothing if `offset` is at or below the earliest record.
    /// - Removes bounded numbers of records at a time, so that appends and reads go on meanwhile,
    ///   and looks only at the records that it removes.
    /// - Dropping the future may leave some of the records in place. Call it again to remove them.
    ///
    /// The default is for logs that cannot do this. It fails with [`Error::Failed`]. A wrapper must
    /// pass the call on.
    ///
    /// # Errors
    /// - [`Error::OutOfRange`] if `offset` is past the end. Nothing was removed.
    /// - [`Error::Unavailable`], [`Error::Failed`] and [`Error::Indeterminate`]. Some of the
    ///   records may have been removed.
    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        Err(Error::failed(
            format!("remove the records before {offset} from log {}", self.id()),
            "this log removes records only by its retention; set a retention that keeps what its readers need",
        ))
    }

    /// Whether appended records survive a crash, with the backend's current settings.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn durability(&self) -> Result<Durability, Error>;
}

/// A reader's place in a log.
#[async_trait]
pub trait LogReader: Send {
    /// Waits for at least one record and returns the next records in order: at least one, and no
    /// more than `max`. A call also returns no more than about a megabyte, unless a single record
    /// is larger.
    ///
    /// - Cancel-safe: dropping the future loses no record and repeats none.
    /// - A reader that has returned an error cannot be used again. Open a new one.
    ///
    /// # Errors
    /// [`Error::Truncated`] if retention overtook the reader, [`Error::OutOfRange`] if the log lost
    /// its tail; [`Error::Unavailable`], [`Error::Failed`].
    ///
    /// # Panics
    /// Implementations may panic if `max` is 0.
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error>;
}

#[async_trait]
impl<L: Log + ?Sized> Log for Arc<L> {
    fn id(&self) -> &LogId {
        (**self).id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        (**self).append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        (**self).read(from).await
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        (**self).bounds().await
    }

    async fn readable_end(&self) -> Result<Offset, Error> {
        (**self).readable_end().await
    }

    async fn count_from(&self, from: Offset) -> Result<Option<u64>, Error> {
        (**self).count_from(from).await
    }

    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        (**self).tail(count).await
    }

    fn decode(&self, malformed: &Record) -> Option<Record> {
        (**self).decode(malformed)
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        (**self).remove_before(offset).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        (**self).durability().await
    }
}
