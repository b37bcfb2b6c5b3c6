//! The log that is read: append-only, totally ordered, durable.

use std::sync::Arc;

use async_trait::async_trait;

use crate::{Error, LogId, NewRecord, Offset, Record};

/// What a log still holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// The earliest offset that can be read; equal to `end` where the log holds nothing.
    pub earliest: Offset,
    /// One past the last record: the [successor](Offset::successor) of its offset, or of the last one ever there.
    pub end: Offset,
}

impl Bounds {
    /// Checks that a reader can start at `from`, which is the case from [`earliest`](Self::earliest) to
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

/// Whether what a backend acknowledges survives a crash of the process and a restart of the backend.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Durability {
    /// It does.
    Durable,
    /// It does not; the text says why and names the setting to change.
    Volatile(String),
    /// The backend does not let itself be asked; the text says why.
    Unknown(String),
}

/// One partition of a log. The core reads it; services append to it.
///
/// # Contract
/// - **L1** `append` returns `Ok` only when the records survive a crash of this process and a restart of the backend.
/// - **L2** There is one total order, the same for every reader; one appender's records keep their order.
/// - **L3** A reader never skips a record that becomes visible later: no hole fills in behind it.
/// - **L4** `read(o)` yields exactly the records at or after `o`.
/// - **L5** Below the earliest retained offset reading fails with [`Error::Truncated`], past the end with
///   [`Error::OutOfRange`], from `read` or the first `next`: never something else silently, and never silence for ever.
///   Reading at the end itself waits for the next record.
/// - **L6** `next` is cancel-safe: a dropped future loses no record and repeats none.
/// - **L7** A failed `append` says what is there: nothing, or with [`Error::Indeterminate`] an unknown prefix of the records.
/// - **L8** A record over the size limit is refused with [`Error::TooLarge`] before anything is appended.
/// - **L9** An entry that cannot be decoded is yielded in its place, as a record with its raw bytes and
///   [`malformed`](Record::malformed) set: never skipped, and never an error that blocks the log.
/// - **L10** A handle belongs to the log that it opened. After that log was deleted, an append through the handle fails, or
///   is deleted with the log; it never creates the log again, and never shows in a log created later under the same name. A
///   backend without incarnations cannot tell the two logs apart and is exempt; its documentation says so.
#[async_trait]
pub trait Log: Send + Sync {
    /// The log's name, and its incarnation where the backend keeps one. The same at every call.
    fn id(&self) -> &LogId;

    /// Appends the records in order and returns the last one's offset, where the backend tells it.
    ///
    /// - Empty input appends nothing and returns `Ok(None)`.
    /// - Dropping the future leaves the outcome unknown, as [`Error::Indeterminate`] does.
    /// - A repeated call appends again: only an [`Origin`](crate::Origin) lets consumers drop what came twice.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Unavailable`] and [`Error::Failed`] when nothing was appended;
    /// [`Error::Indeterminate`] when any prefix may have been.
    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error>;

    /// Opens a reader at `from`, which need not be a record's offset: it begins at the first record not before it.
    ///
    /// # Errors
    /// [`Error::Truncated`] and [`Error::OutOfRange`] as L5 says; [`Error::Unavailable`], [`Error::Failed`].
    /// Dropping the future has no effect on the log.
    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error>;

    /// What the log holds now.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn bounds(&self) -> Result<Bounds, Error>;

    /// One past the last record that can still be read: [`Bounds::end`], unless the log's last records were deleted one by
    /// one. `run_until_caught_up` asks it, so as not to wait for a record that is gone.
    ///
    /// Unless implemented it is the end, which is right where records are only ever removed from the front.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn readable_end(&self) -> Result<Offset, Error> {
        Ok(self.bounds().await?.end)
    }

    /// About how many records lie at or after `from`, where that costs little; `None` unless implemented. A metric of the
    /// consumer shows it.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn count_from(&self, from: Offset) -> Result<Option<u64>, Error> {
        let _ = from;
        Ok(None)
    }

    /// Whether appended records survive a crash, as the backend is set up now.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    async fn durability(&self) -> Result<Durability, Error>;
}

/// A reader's place in a log.
#[async_trait]
pub trait LogReader: Send {
    /// Waits until at least one record is there and returns the next ones in order: at least one, never more than `max`,
    /// and about a megabyte at most unless a single record is larger.
    ///
    /// - Cancel-safe: a call whose future is dropped loses no record and repeats none.
    /// - After an error the reader is spent: open a new one.
    ///
    /// # Errors
    /// [`Error::Truncated`] when retention overtook the reader, [`Error::OutOfRange`] when the log lost its tail;
    /// [`Error::Unavailable`], [`Error::Failed`].
    ///
    /// # Panics
    /// It may panic if `max` is 0.
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

    async fn durability(&self) -> Result<Durability, Error> {
        (**self).durability().await
    }
}
