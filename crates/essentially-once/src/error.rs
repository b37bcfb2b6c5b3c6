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
///   [`PartiallyApplied`](Self::PartiallyApplied) says "in part". After every other error of a log
///   or store, nothing was appended, applied or moved.
/// - *Is it worth trying again?* [`is_transient`](Self::is_transient) answers.
///
/// The text of an error names every cause beneath it, each one once. `source()` is therefore always
/// `None`, and a reporter that prints the whole chain prints nothing twice. [`cause`](Self::cause)
/// returns the cause itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Retention removed the requested record. This reader has lost records.
    #[error(
        "log {log}: retention removed offset {requested}, and the earliest offset left is {earliest}; this reader has lost \
         the records in between. Keep more of the log, or `seek` the consumer to continue"
    )]
    Truncated {
        /// The log.
        log: LogId,
        /// Where the reader wanted to continue.
        requested: Offset,
        /// The earliest offset that it can still read.
        earliest: Offset,
    },

    /// The requested offset is past the log's end. The log was recreated or lost its tail.
    #[error(
        "log {log}: offset {requested} is past the end {end}; the log was recreated or lost its tail (restored from a \
         backup, failed over). Check the log, then `seek` the consumer to continue"
    )]
    OutOfRange {
        /// The log.
        log: LogId,
        /// Where the reader wanted to continue.
        requested: Offset,
        /// One past the log's last record.
        end: Offset,
    },

    /// The consumer's stored position belongs to another log than the one in use.
    #[error(
        "consumer {consumer}: its position belongs to log {stored}, not to log {given}; run it on {stored}, or choose \
         another consumer name for {given}"
    )]
    WrongLog {
        /// The consumer.
        consumer: ConsumerId,
        /// The log that the position remembers.
        stored: LogId,
        /// The log that the consumer was used with.
        given: LogId,
    },

    /// Another instance of the consumer committed first. Nothing of this transaction was applied.
    #[error(
        "consumer {consumer}: another instance or an operator has committed since revision {expected}; nothing of this \
         transaction was applied"
    )]
    Fenced {
        /// The consumer.
        consumer: ConsumerId,
        /// The revision that this transaction was based on. [`Revision::NONE`] means that no
        /// position existed.
        expected: Revision,
    },

    /// The position of a running consumer vanished or went back: the store lost commits that it had
    /// acknowledged.
    #[error(
        "consumer {consumer}: its position was at revision {seen} and {}; the store lost commits that it had acknowledged \
         (deleted, restored from an older copy, failed over), so the consumer could skip records or handle them twice. \
         Compare the state with the log, then start the consumer again to continue from the stored position, or `seek` it \
         first",
        gone_to(found)
    )]
    PositionLost {
        /// The consumer.
        consumer: ConsumerId,
        /// The highest revision that this run has seen.
        seen: Revision,
        /// The revision that the store holds now; `None` if it holds no position.
        found: Option<Revision>,
    },

    /// The record at the offset that the consumer passed last differs from the record that it read
    /// there.
    #[error(
        "log {log}: the record at offset {offset} is not the one that consumer {consumer} handled there; the log was \
         restored from an older copy, or replaced, and has grown since. Find its first new record and `seek` the consumer \
         to it. If only the decoding of records has changed, `seek` the consumer to the offset after this record"
    )]
    LogChanged {
        /// The consumer.
        consumer: ConsumerId,
        /// The log.
        log: LogId,
        /// The offset of the record that was compared.
        offset: Offset,
    },

    /// The reply was lost, so it may or may not have happened.
    ///
    /// After a commit, [`OffsetStore::position`](crate::OffsetStore::position) reports what
    /// happened. After an append, any prefix of the records may be in the log. Append again with
    /// the same origins, and consumers drop the duplicates.
    #[error(
        "{action}: the outcome is unknown, it may or may not have happened: {}",
        Chain(cause)
    )]
    Indeterminate {
        /// What was attempted, and on what.
        action: String,
        /// Why the outcome is unknown.
        cause: Source,
    },

    /// A backend that cannot roll back failed in the middle of a transaction. It applied a part of
    /// the transaction and did not move the position.
    ///
    /// Handling the record again would apply that part twice, so the consumer stays blocked until
    /// someone has repaired the data and confirmed it. The adapter's documentation says how.
    #[error(
        "consumer {consumer}: its transaction was applied in part, and its position did not move: {done}; {remedy}"
    )]
    PartiallyApplied {
        /// The consumer.
        consumer: ConsumerId,
        /// What was applied, what failed, and why.
        done: String,
        /// How to continue.
        remedy: String,
    },

    /// It did not happen, but another try may succeed: busy, disconnected, or timed out before it
    /// was sent.
    #[error("{action}: unavailable: {}", Chain(cause))]
    Unavailable {
        /// What was attempted, and on what.
        action: String,
        /// Why it did not happen.
        cause: Source,
    },

    /// It did not happen, and another try fails too until something changes: missing rights, a full
    /// disk, a damaged or unknown format.
    #[error("{action}: {}", Chain(cause))]
    Failed {
        /// What was attempted, and on what.
        action: String,
        /// Why it failed, and what to change.
        cause: Source,
    },

    /// Something is over its size limit. Nothing was appended or staged.
    #[error(
        "a {what} of {size} bytes is over the limit of {limit} bytes; raise the backend's limit, or store the data elsewhere \
         and send a reference"
    )]
    TooLarge {
        /// What is too large: `record`, `key`, `value`.
        what: &'static str,
        /// Its size in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },

    /// Essentially-once was requested on a backend that loses acknowledged data in a crash.
    #[error(
        "{what} is volatile, so essentially-once does not hold across a crash: {why}. Change that, or call \
         `.accept_volatile()`"
    )]
    Volatile {
        /// Which part: `log orders`, `store of consumer shipping`.
        what: String,
        /// What is missing, with the name of the setting to change.
        why: String,
    },

    /// A name breaks the rule for names.
    #[error("{kind} name {name:?}: {reason}")]
    InvalidName {
        /// What the name is for.
        kind: &'static str,
        /// The first 60 characters of the name.
        name: String,
        /// The rule that it breaks.
        reason: String,
    },

    /// A setting has a value that cannot be used.
    #[error("{setting}: {reason}")]
    InvalidSetting {
        /// The setting.
        setting: &'static str,
        /// Why its value is refused, with the bound that it breaks.
        reason: String,
    },

    /// A record could not be handled, and the consumer stopped at it.
    #[error(
        "consumer {consumer}, log {log}, offset {offset}: {outcome} (attempts: {attempts}): {}",
        Chain(cause)
    )]
    Unhandled {
        /// The consumer.
        consumer: ConsumerId,
        /// The log.
        log: LogId,
        /// The record's offset.
        offset: Offset,
        /// What happened to the record, and where the position is.
        outcome: &'static str,
        /// How often the record was tried, by earlier runs too unless one ended because of it.
        attempts: u32,
        /// The handler's error, or why the record could not be decoded.
        cause: Source,
    },
}

impl Error {
    /// An [`Error::Failed`]: it did not happen, and another try fails too until something changes.
    pub fn failed(action: impl Into<String>, cause: impl Into<Source>) -> Self {
        Self::Failed {
            action: action.into(),
            cause: cause.into(),
        }
    }

    /// An [`Error::Unavailable`]: it did not happen, but another try may succeed.
    pub fn unavailable(action: impl Into<String>, cause: impl Into<Source>) -> Self {
        Self::Unavailable {
            action: action.into(),
            cause: cause.into(),
        }
    }

    /// An [`Error::Indeterminate`]: it may or may not have happened.
    pub fn indeterminate(action: impl Into<String>, cause: impl Into<Source>) -> Self {
        Self::Indeterminate {
            action: action.into(),
            cause: cause.into(),
        }
    }

    /// Whether going back to the stored position and trying again may help. The consumer does so on
    /// its own.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Fenced { .. } | Self::Indeterminate { .. } | Self::Unavailable { .. }
        )
    }

    /// The cause of an [`Indeterminate`](Self::Indeterminate), [`Unavailable`](Self::Unavailable),
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
        Some(revision) => format!("is now at {revision}"),
        None => "no longer exists".into(),
    }
}

/// An error and its causes, outermost first. Leaves out a cause if the text of an outer error
/// already contains it, since some libraries name a cause in both places.
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

    /// Like `tokio_postgres::Error`: its text does not include its source.
    #[derive(Debug, thiserror::Error)]
    #[error("db error")]
    struct Terse(#[source] Verbose);

    /// Like many errors: its text includes its source.
    #[derive(Debug, thiserror::Error)]
    #[error("column is missing: {0}")]
    struct Verbose(#[source] std::num::ParseIntError);

    #[test]
    fn every_cause_is_shown_once() {
        let number = "x".parse::<u32>().expect_err("not a number");
        let error = Error::failed("read orders", Terse(Verbose(number)));
        let shown = "read orders: db error: column is missing: invalid digit found in string";
        assert_eq!(error.to_string(), shown);
        assert!(error.source().is_none(), "a reporter would print the cause twice");
        assert!(error.cause().is_some_and(|cause| cause.is::<Terse>()));

        let outer = Error::unavailable("consume", error);
        assert_eq!(outer.to_string(), format!("consume: unavailable: {shown}"));
        assert!(outer.cause().is_some_and(|cause| cause.is::<Error>()));
    }
}
