//! What a consumer does with a record that it cannot handle, and with records that are gone.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use crate::{Error, HandlerError, HandlerErrorKind, Offset, Record, Revision, Tried};

/// What a consumer does with a record that it cannot handle. See
/// [`Consumer::on_failure`](super::Consumer::on_failure).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum OnFailure {
    /// The run ends with [`Error::Unhandled`], and the position points to the record.
    #[default]
    Stop,
    /// The consumer goes past the record without its effects, logs a warning with the reason, and
    /// counts the record as [`failed`](super::Report::failed). Its origin is marked as seen, so
    /// that the record is dropped if it is sent again. A malformed record marks nothing.
    Skip,
    /// The consumer sets the record aside as a [dead letter](super::dead_letters), in the commit
    /// that moves its position past the record. Later records of its key follow it, so that they
    /// keep their order. Needs [`Consumer::dead_letters`](super::Consumer::dead_letters); without
    /// it, the run ends.
    DeadLetter,
}

/// What a consumer does if retention removed records that it had not handled. See
/// [`Consumer::on_truncated`](super::Consumer::on_truncated).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum OnTruncated {
    /// The run ends with [`Error::Truncated`].
    #[default]
    Stop,
    /// The consumer commits the log's earliest offset as its position and continues there. It logs
    /// a warning with both offsets and counts the [truncation](super::Report::truncated).
    SkipToEarliest,
}

/// A record that could not be handled, for [`Consumer::on_failure_with`].
///
/// [`Consumer::on_failure_with`]: super::Consumer::on_failure_with
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct FailedRecord<'a> {
    /// The record.
    pub record: &'a Record,
    /// The handler's last error, or why the record could not be decoded.
    pub error: &'a HandlerError,
    /// How often the record was tried, by earlier runs too unless one ended because of it.
    pub tries: u32,
    /// How many instances in a row ended while they handled this record, without an error; 0 if the
    /// handler failed. The record then cannot be skipped: [`OnFailure::Skip`] ends the run.
    pub deaths: u32,
}

/// Chooses what to do with a record after its last try.
#[derive(Clone)]
pub(super) struct Rule(Arc<dyn Fn(&FailedRecord<'_>) -> OnFailure + Send + Sync>);

impl Rule {
    pub(super) fn new(rule: impl Fn(&FailedRecord<'_>) -> OnFailure + Send + Sync + 'static) -> Self {
        Self(Arc::new(rule))
    }

    /// A rule that panics stops the consumer.
    pub(super) fn choose(&self, failed: &FailedRecord<'_>) -> OnFailure {
        catch_unwind(AssertUnwindSafe(|| (self.0)(failed))).unwrap_or_else(|_| {
            tracing::error!(offset = %failed.record.offset, "the rule of `on_failure_with` panicked; stopping");
            OnFailure::Stop
        })
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rule(..)")
    }
}

/// The decision to go past a record, to be carried out by the next session.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) offset: Offset,
    /// The revision of the position when the record failed. If another instance has committed
    /// since, the record may succeed now, so the verdict no longer counts.
    pub(super) revision: Revision,
    pub(super) sentence: Sentence,
    /// What to report.
    pub(super) error: Error,
}

/// What a verdict does with the record.
#[derive(Debug)]
pub(super) enum Sentence {
    Skip,
    Park {
        tried: Tried,
        /// What the last error was.
        last_reason: String,
        kind: HandlerErrorKind,
    },
}
