//! What can go wrong, in kinds that a caller can act on.

use crate::{ConsumerId, LogId, Offset};

/// The cause beneath an [`Error`].
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// What failed, on what, and what to do about it.
///
/// Two questions decide what a caller does next, and every variant answers both:
///
/// - *Did it happen?* Only [`Indeterminate`](Self::Indeterminate) leaves that open, and only
///   [`PartiallyApplied`](Self::PartiallyApplied) says "in part". After every other error of a log or store, nothing was appended,
///   applied or moved.
/// - *Is it worth trying again?* [`is_transient`](Self::is_transient) says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The wanted record was removed by retention: records were lost to this reader.
    #[error(
        "log {log}: offset {requested} was removed by retention, the earliest record left is {earliest}; \
         the records between are lost to this reader: keep more of the log, or `seek` the consumer to go on"
    )]
    Truncated {
        /// The log.
        log: LogId,
        /// Where the reader wanted to go on.
        requested: Offset,
        /// The earliest offset it still can read.
        earliest: Offset,
    },

    /// The wanted offset is past the log's end: the log was created anew or lost its tail.
    #[error(
        "log {log}: offset {requested} is past the end {end}; the log was created anew or lost its tail \
         (restored from a backup, failed over): check it, then `seek` the consumer to go on"
    )]
    OutOfRange {
        /// The log.
        log: LogId,
        /// Where the reader wanted to go on.
        requested: Offset,
        /// One past the log's last record.
        end: Offset,
    },

    /// The consumer's stored position belongs to another log than the one it is opened on.
    #[error(
        "consumer {consumer}: its position belongs to log {stored}, not to {given}; \
         open it on that log, or choose another consumer name for this one"
    )]
    WrongLog {
        /// The consumer.
        consumer: ConsumerId,
        /// The log that the position remembers.
        stored: LogId,
        /// The log it was used with.
        given: LogId,
    },

    /// Another instance of the consumer committed first; nothing of this transaction was applied.
    #[error(
        "consumer {consumer}: another instance committed since revision {expected}; nothing of this transaction was applied"
    )]
    Fenced {
        /// The consumer.
        consumer: ConsumerId,
        /// The revision this transaction was based on; 0 means that there was no position.
        expected: u64,
    },

    /// It may have happened or not: the reply was lost.
    ///
    /// After a commit, [`OffsetStore::position`](crate::OffsetStore::position) tells the truth. After an append, any prefix
    /// of the records may be in the log: append again with the same origins, and consumers drop what came twice.
    #[error("{action}: the outcome is unknown, it may have happened or not: {source}")]
    Indeterminate {
        /// What was attempted, and on what.
        action: String,
        /// Why the outcome is unknown.
        source: Source,
    },

    /// A backend that cannot roll back failed in the middle: a part of the transaction was applied, and the position did not
    /// move. Handling the record again would double that part, so the consumer stays blocked until someone has repaired the data and
    /// says so; the adapter tells how.
    #[error(
        "consumer {consumer}: its transaction was applied in part, and its position did not move: {done}; {remedy}"
    )]
    PartiallyApplied {
        /// The consumer.
        consumer: ConsumerId,
        /// What was applied, what failed, and why.
        done: String,
        /// How to go on.
        remedy: String,
    },

    /// It did not happen, but may work if tried again: busy, disconnected, timed out before it was sent.
    #[error("{action}: not done, for now: {source}")]
    Unavailable {
        /// What was attempted, and on what.
        action: String,
        /// Why it did not happen.
        source: Source,
    },

    /// It did not happen and will not without a change: wrong rights, a full disk, a damaged or unknown format.
    #[error("{action}: {source}")]
    Failed {
        /// What was attempted, and on what.
        action: String,
        /// Why it cannot be done, and what to change.
        source: Source,
    },

    /// Something is over its size limit; nothing was appended or staged.
    #[error(
        "a {what} of {size} bytes is over the limit of {limit}; raise the backend's limit, or keep the data elsewhere and send a reference"
    )]
    TooLarge {
        /// What is too large: `record`, `key`, `value`.
        what: &'static str,
        /// Its size in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },

    /// Essentially-once was asked of a backend that forgets on a crash.
    #[error(
        "{what} is volatile, so essentially-once cannot hold across a crash: {why}; change that, or call `.accept_volatile()`"
    )]
    Volatile {
        /// Which part: `log orders`, `store of consumer shipping`.
        what: String,
        /// What is missing, naming the setting to change.
        why: String,
    },

    /// A name breaks the rule for names.
    #[error("{kind} name {name:?}: {reason}")]
    InvalidName {
        /// What was to be named.
        kind: &'static str,
        /// The name, cut to its first 60 characters.
        name: String,
        /// The rule it breaks.
        reason: String,
    },

    /// A setting has a value that makes no sense.
    #[error("{setting}: {reason}")]
    InvalidSetting {
        /// The setting.
        setting: &'static str,
        /// Why its value is refused.
        reason: String,
    },

    /// A record could not be handled, and the consumer stopped there.
    #[error("consumer {consumer}, log {log}, offset {offset}: {outcome} (tried {attempts}x): {source}")]
    Unhandled {
        /// The consumer.
        consumer: ConsumerId,
        /// The log.
        log: LogId,
        /// The record's offset.
        offset: Offset,
        /// What became of the record, and where the position stands.
        outcome: &'static str,
        /// How often it was tried in this run.
        attempts: u32,
        /// What the handler said, or why the record could not be decoded.
        source: Source,
    },
}

impl Error {
    /// An [`Error::Failed`]: it did not happen and will not without a change.
    pub fn failed(action: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::Failed {
            action: action.into(),
            source: source.into(),
        }
    }

    /// An [`Error::Unavailable`]: it did not happen but may if tried again.
    pub fn unavailable(action: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::Unavailable {
            action: action.into(),
            source: source.into(),
        }
    }

    /// An [`Error::Indeterminate`]: it may have happened or not.
    pub fn indeterminate(action: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::Indeterminate {
            action: action.into(),
            source: source.into(),
        }
    }

    /// Whether going back to the stored position and trying again may help. The consumer does so by itself.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Fenced { .. } | Self::Indeterminate { .. } | Self::Unavailable { .. }
        )
    }
}
