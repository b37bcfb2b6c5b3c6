//! Dead letters: records that a consumer set aside, and where a store keeps them.

use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;

use crate::{Error, Offset, Record};

/// A record that a consumer could not handle and set aside, in the commit that moved its position
/// past the record.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The record as the log yielded it. Its offset identifies the letter.
    pub record: Record,
    /// How often the record was tried; 0 if it was set aside because earlier records of its key
    /// were.
    pub tries: u32,
    /// Why the first try failed, or why the record was never tried.
    pub first_reason: String,
    /// Why the last try failed.
    pub last_reason: String,
    /// When the record was set aside.
    pub parked_at: SystemTime,
    /// When the last try failed.
    pub last_failed_at: SystemTime,
    /// When the consumer tries the letter again. `None` if it waits for an operator, or for earlier
    /// letters of its key.
    pub due: Option<SystemTime>,
    /// Rises with every change of the letter.
    pub version: u64,
}

impl DeadLetter {
    /// The most bytes of a reason that a letter keeps.
    pub const REASON_LIMIT: usize = 1024;

    /// The letter of a record that was tried `tries` times, the last time in vain for `reason`.
    /// Cuts the reason to [`REASON_LIMIT`](Self::REASON_LIMIT).
    pub fn new(record: Record, tries: u32, reason: &str, now: SystemTime) -> Self {
        let reason = cut(reason);
        Self {
            record,
            tries,
            first_reason: reason.clone(),
            last_reason: reason,
            parked_at: now,
            last_failed_at: now,
            due: None,
            version: 1,
        }
    }

    /// The key whose letters keep their order. A malformed record has none, because its key cannot
    /// be trusted.
    pub fn key(&self) -> Option<&Bytes> {
        trusted_key(&self.record)
    }

    /// The bytes of the record and the reasons together.
    pub fn size(&self) -> usize {
        self.record.size() + self.first_reason.len() + self.last_reason.len()
    }

    pub(crate) fn set_last_reason(&mut self, reason: &str) {
        self.last_reason = cut(reason);
    }

    /// Notes that another try failed.
    pub(crate) fn failed_again(&mut self, reason: &str, now: SystemTime, due: Option<SystemTime>) {
        if self.tries == 0 {
            self.first_reason = cut(reason);
        }
        self.tries = self.tries.saturating_add(1);
        self.last_reason = cut(reason);
        self.last_failed_at = now;
        self.set_due(due);
    }

    pub(crate) fn set_due(&mut self, due: Option<SystemTime>) {
        self.due = due;
        self.version += 1;
    }
}

/// The key of a record that can be decoded.
pub(crate) fn trusted_key(record: &Record) -> Option<&Bytes> {
    record.key.as_ref().filter(|_| record.malformed.is_none())
}

pub(crate) fn cut(reason: &str) -> String {
    if reason.len() <= DeadLetter::REASON_LIMIT {
        return reason.to_owned();
    }
    let mark = '…';
    let end = reason.floor_char_boundary(DeadLetter::REASON_LIMIT - mark.len_utf8());
    format!("{}{mark}", &reason[..end])
}

/// The dead letters of a transaction's consumer. What this trait changes is staged like the rest of
/// the transaction, and read within it.
///
/// It is for backends, the consumer loop and the functions in
/// [`consumer::dead_letters`](crate::consumer::dead_letters). A handler must not change letters:
/// the loop knows which keys have some, and a letter that the handler parks or removes makes that
/// wrong.
///
/// A letter is identified by its record's offset. Letters are ordered by offset.
///
/// # Contract
/// - **D1** Letters are part of the transaction: its commit applies their changes together with the
///   position and the state, or none of them, and it sees its own changes (S1, S2, S4, S6).
/// - **D2** A letter comes back as it was parked: every field of the record, both reasons to the
///   byte, and times to the millisecond.
/// - **D3** [`head`](Self::head) and [`counts`](Self::counts) compare keys to the byte. They leave
///   out letters without a [key](DeadLetter::key).
/// - **D4** Consumers never see each other's letters (S7).
///
/// # Errors
/// All methods return [`Error::Unavailable`] or [`Error::Failed`] if the backend is in trouble. The
/// transaction can then only be rolled back.
#[async_trait]
pub trait DeadLetters: Send {
    /// Stages a letter. It replaces the letter with the same offset.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the store cannot hold the letter. Every store holds the letters of
    /// the records that it holds as values.
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error>;

    /// Removes a letter. Returns whether it existed.
    async fn remove(&mut self, offset: Offset) -> Result<bool, Error>;

    /// Removes the letters at and after an offset, and returns their number.
    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error>;

    /// The letter at an offset.
    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error>;

    /// The first letter of a key.
    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error>;

    /// The letter that is due first, or the one with the lowest offset of those.
    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error>;

    /// Up to `limit` letters after an offset, or from the first one on.
    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error>;

    /// The number of letters of each key, for up to `limit` keys after a key, or from the first one
    /// on. Keys are ordered by their bytes.
    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error>;

    /// The number of all letters, with and without a key.
    async fn total(&mut self) -> Result<u64, Error>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_reasons_are_cut_between_characters() {
        let record = || Record::new(0.into(), SystemTime::UNIX_EPOCH, "x");
        let letter = DeadLetter::new(record(), 1, &"ü".repeat(600), SystemTime::UNIX_EPOCH);
        assert!(letter.first_reason.len() <= DeadLetter::REASON_LIMIT);
        assert!(letter.first_reason.ends_with("ü…"), "{}", letter.first_reason);
        let short = DeadLetter::new(record(), 1, "short", SystemTime::UNIX_EPOCH);
        assert_eq!(short.first_reason, "short");
    }
}
