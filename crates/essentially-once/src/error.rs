//! What can go wrong, in kinds that a caller can act on.

use std::{error, fmt};

use crate::{ConsumerId, LogId, Offset, Revision};

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
///
/// The text names every cause in the chain beneath an error, each once, so `source()` is always `None`: what prints a whole
/// chain prints nothing twice. [`cause`](Self::cause) gives the cause itself.
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
        /// The revision this transaction was based on; [`Revision::NONE`] means that there was no position.
        expected: Revision,
    },

    /// The position of a running consumer vanished or went back: the store lost commits that it had acknowledged.
    #[error(
        "consumer {consumer}: its position was at revision {seen} and {}: the store lost commits that it had acknowledged \
         (deleted, restored from an older copy, failed over), so records could be skipped or handled twice; compare the \
         state with the log, then start the consumer again to go on from what is stored, or `seek` it first",
        gone_to(found)
    )]
    PositionLost {
        /// The consumer.
        consumer: ConsumerId,
        /// The highest revision that this run has seen.
        seen: Revision,
        /// The revision that is stored now; `None` if there is no position.
        found: Option<Revision>,
    },

    /// The record at the offset that the consumer passed last is not the one that it read there.
    #[error(
        "log {log}: the record at offset {offset} is not the one that consumer {consumer} handled there: the log was \
         restored from an older copy, or replaced, and has grown since: find out which of its records are new, then `seek` \
         the consumer to the first of them. If only the way in which records are decoded has changed, `seek` it to the offset behind this record"
    )]
    LogChanged {
        /// The consumer.
        consumer: ConsumerId,
        /// The log.
        log: LogId,
        /// The offset of the record that was compared.
        offset: Offset,
    },

    /// It may have happened or not: the reply was lost.
    ///
    /// After a commit, [`OffsetStore::position`](crate::OffsetStore::position) tells the truth. After an append, any prefix
    /// of the records may be in the log: append again with the same origins, and consumers drop what came twice.
    #[error("{action}: the outcome is unknown, it may have happened or not: {}", Chain(cause))]
    Indeterminate {
        /// What was attempted, and on what.
        action: String,
        /// Why the outcome is unknown.
        cause: Source,
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
    #[error("{action}: not done, for now: {}", Chain(cause))]
    Unavailable {
        /// What was attempted, and on what.
        action: String,
        /// Why it did not happen.
        cause: Source,
    },

    /// It did not happen and will not without a change: wrong rights, a full disk, a damaged or unknown format.
    #[error("{action}: {}", Chain(cause))]
    Failed {
        /// What was attempted, and on what.
        action: String,
        /// Why it cannot be done, and what to change.
        cause: Source,
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
    #[error(
        "consumer {consumer}, log {log}, offset {offset}: {outcome} (tried {attempts}x): {}",
        Chain(cause)
    )]
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
        cause: Source,
    },
}

impl Error {
    /// An [`Error::Failed`]: it did not happen and will not without a change.
    pub fn failed(action: impl Into<String>, cause: impl Into<Source>) -> Self {
        Self::Failed {
            action: action.into(),
            cause: cause.into(),
        }
    }

    /// An [`Error::Unavailable`]: it did not happen but may if tried again.
    pub fn unavailable(action: impl Into<String>, cause: impl Into<Source>) -> Self {
        Self::Unavailable {
            action: action.into(),
            cause: cause.into(),
        }
    }

    /// An [`Error::Indeterminate`]: it may have happened or not.
    pub fn indeterminate(action: impl Into<String>, cause: impl Into<Source>) -> Self {
        Self::Indeterminate {
            action: action.into(),
            cause: cause.into(),
        }
    }

    /// Whether going back to the stored position and trying again may help. The consumer does so by itself.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Fenced { .. } | Self::Indeterminate { .. } | Self::Unavailable { .. }
        )
    }

    /// What lies beneath an [`Indeterminate`](Self::Indeterminate), [`Unavailable`](Self::Unavailable),
    /// [`Failed`](Self::Failed) or [`Unhandled`](Self::Unhandled), to be downcast.
    pub fn cause(&self) -> Option<&(dyn error::Error + Send + Sync + 'static)> {
        match self {
            Self::Indeterminate { cause, .. }
            | Self::Unavailable { cause, .. }
            | Self::Failed { cause, .. }
            | Self::Unhandled { cause, .. } => Some(&**cause),
            _ => None,
        }
    }
}

fn gone_to(found: &Option<Revision>) -> String {
    match found {
        Some(revision) => format!("is at {revision} now"),
        None => "is gone".into(),
    }
}

/// An error and its causes, outermost first. A cause whose text an error above it already has is left out, since some
/// libraries name it in both places.
pub(crate) struct Chain<'a>(pub(crate) &'a Source);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.to_string();
        f.write_str(&shown)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            if !shown.contains(&text) {
                write!(f, ": {text}")?;
                shown.push_str(&text);
            }
            next = cause.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    /// As `tokio_postgres::Error` is: its text does not say what its source says.
    #[derive(Debug, thiserror::Error)]
    #[error("db error")]
    struct Terse(#[source] Verbose);

    /// As many errors are: its text repeats that of its source.
    #[derive(Debug, thiserror::Error)]
    #[error("column is missing: {0}")]
    struct Verbose(#[source] std::num::ParseIntError);

    #[test]
    fn every_cause_is_shown_once() {
        let number = "x".parse::<u32>().expect_err("not a number");
        let error = Error::failed("read orders", Terse(Verbose(number)));
        let shown = "read orders: db error: column is missing: invalid digit found in string";
        assert_eq!(error.to_string(), shown);
        assert!(error.source().is_none(), "what prints the chain would print it twice");
        assert!(error.cause().is_some_and(|cause| cause.is::<Terse>()));

        let outer = Error::unavailable("consume", error);
        assert_eq!(outer.to_string(), format!("consume: not done, for now: {shown}"));
        assert!(outer.cause().is_some_and(|cause| cause.is::<Error>()));
    }
}
