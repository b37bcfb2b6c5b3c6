//! Why a session ended early, and whose fault it was.

use crate::{Error, HandlerError, HandlerErrorKind, Offset, Record, Revision, Tried};

/// Why a session ended early.
#[derive(Debug)]
pub enum Failure {
    /// The run was stopped.
    Stopped,
    Backend(Error),
    /// A record cannot become a letter, at least not in this transaction, which is as it was.
    Refused(Error),
    Record(Box<RecordFailure>),
    /// Some record of a batch failed, up to and including this offset. Which one is not known.
    Batch(Offset, HandlerError),
}

/// A record whose handling failed.
#[derive(Debug)]
pub struct RecordFailure {
    pub(super) record: Record,
    pub(super) error: HandlerError,
    /// How often the record was tried, this time included.
    pub(super) tried: Tried,
    /// The revision of the position at that moment.
    pub(super) revision: Revision,
    /// Whether it was the first of its batch, so that no record before it can have contributed to
    /// the failure.
    pub(super) is_first: bool,
    /// Whether the position points to it.
    pub(super) is_next: bool,
    /// How many instances may have died of it; 0 if the handler failed.
    pub(super) deaths: u32,
    /// The outcome to report if the error is fatal.
    pub(super) fatal_outcome: &'static str,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Backend(error)
    }
}

impl Failure {
    pub(super) fn is_fatal(&self) -> bool {
        matches!(self, Self::Record(failed) if failed.error.kind == HandlerErrorKind::Fatal)
    }
}

/// The error as the failure of the record at `offset`, or else the backend's error: a backend in
/// trouble is not the record's fault, even if the handler noticed it first and wrapped its error.
pub(super) fn not_the_backends(error: HandlerError, offset: Offset) -> Result<HandlerError, Error> {
    if error.kind != HandlerErrorKind::Retry || !is_caused_by_backend(&*error.source) {
        return Ok(error);
    }
    Err(match error.source.downcast::<Error>() {
        Ok(error) if error.is_transient() => *error,
        Ok(error) => Error::unavailable(format!("handle the record at {offset}"), error),
        Err(source) => Error::unavailable(format!("handle the record at {offset}"), source),
    })
}

fn is_caused_by_backend(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        next = match error.downcast_ref::<Error>() {
            Some(error) if error.is_transient() => return true,
            // `source()` is `None`, so follow its cause instead.
            Some(error) => error.cause().map(|cause| cause as &(dyn std::error::Error + 'static)),
            None => error.source(),
        };
    }
    false
}
