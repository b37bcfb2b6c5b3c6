//! Dead letters: records that a consumer set aside, and where a store keeps them.

use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::{BufMut as _, Bytes};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    Error, NewRecord, Offset, Operator, Origin, Record,
    backend::ByteReader,
    journal::{self, from_millis, millis, put_bytes, read_text},
};

/// A record that a consumer could not handle and set aside, in the commit that moved its position
/// past the record.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The record as the log yielded it, or as an operator changed it. Its offset identifies the
    /// letter.
    pub record: Record,
    /// How often the record was tried in vain, where the deaths of instances together count as one
    /// try; 0 if it was set aside because earlier records of its key were.
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
    /// How an operator changed the record; `None` if nobody did.
    pub edit: Option<Box<Edit>>,
    /// Whether the store cannot read the letter, because it is damaged or of a newer version. Its
    /// reasons then say why. Offset and key are those of the letter, if the store knows the key,
    /// and the rest is empty.
    ///
    /// Such a letter is not tried, and later letters of its key wait behind it. A `seek` to its
    /// offset or before it reads the record from the log again, and an operator can discard it.
    pub unreadable: bool,
}

/// A change to the record of a letter. A store keeps it as bytes, and need not look inside.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Edit {
    /// The record as the log yielded it.
    pub original: Record,
    /// Who changed it last.
    pub by: String,
    /// Why; empty if the operator gave no reason.
    pub reason: String,
    /// When, by the operator's clock, to the millisecond.
    pub at: SystemTime,
}

impl Edit {
    /// The version of the encoding.
    const VERSION: u8 = 1;

    /// The bytes of the original record and the texts together.
    pub fn size(&self) -> usize {
        self.original.size() + self.by.len() + self.reason.len()
    }

    /// The edit as bytes for a store to keep, without the offset and the append time of the record,
    /// which the letter's own record has too.
    pub fn encode(&self) -> Vec<u8> {
        let Record {
            key,
            headers,
            payload,
            origin,
            malformed,
            ..
        } = &self.original;
        let mut bytes = Vec::with_capacity(self.size() + 100);
        bytes.put_u8(Self::VERSION);
        bytes.put_u64(millis(self.at));
        put_bytes(&mut bytes, self.by.as_bytes());
        put_bytes(&mut bytes, self.reason.as_bytes());
        put_bytes(&mut bytes, payload);
        put_option(&mut bytes, key.as_deref());
        put_option(&mut bytes, malformed.as_deref().map(str::as_bytes));
        let numbering = origin.as_ref().map(|origin| origin.numbering.to_string());
        put_option(&mut bytes, numbering.as_deref().map(str::as_bytes));
        bytes.put_u64(origin.as_ref().map_or(0, |origin| origin.sequence));
        for (name, value) in headers {
            put_bytes(&mut bytes, name.as_bytes());
            put_bytes(&mut bytes, value);
        }
        bytes
    }

    /// Decodes the bytes of [`encode`](Self::encode), for the letter of this record.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: impl Into<Bytes>, record: &Record) -> Result<Self, &'static str> {
        let mut reader = ByteReader::new(bytes.into());
        if reader.u8()? != Self::VERSION {
            return Err("its edit has a version that this program does not support; use a newer one");
        }
        let at = from_millis(reader.u64()?);
        let (by, reason) = (read_text(&mut reader)?, read_text(&mut reader)?);
        let mut original = Record::new(record.offset, record.appended_at, reader.bytes()?);
        original.key = read_option(&mut reader)?;
        let text = |bytes: Option<Bytes>| bytes.map(|bytes| String::from_utf8(bytes.into())).transpose();
        let not_text = |_| "a text in its edit is not UTF-8";
        original.malformed = text(read_option(&mut reader)?).map_err(not_text)?.map(Into::into);
        let numbering = text(read_option(&mut reader)?).map_err(not_text)?;
        let sequence = reader.u64()?;
        if let Some(numbering) = numbering {
            let numbering = numbering.parse().map_err(|_| "the origin in its edit is invalid")?;
            original.origin = Some(Origin::of(numbering, sequence));
        }
        while !reader.is_empty() {
            original.headers.push((read_text(&mut reader)?, reader.bytes()?));
        }
        Ok(Self {
            original,
            by,
            reason,
            at,
        })
    }
}

fn put_option(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    out.put_u8(bytes.is_some().into());
    if let Some(bytes) = bytes {
        put_bytes(out, bytes);
    }
}

fn read_option(reader: &mut ByteReader) -> Result<Option<Bytes>, &'static str> {
    match reader.u8()? {
        0 => Ok(None),
        1 => Ok(Some(reader.bytes()?)),
        _ => Err("a flag in its edit is neither 0 nor 1"),
    }
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
            edit: None,
            unreadable: false,
        }
    }

    /// What a store returns in place of a letter that it [cannot read](Self::unreadable), with its
    /// key if the store knows it. The [version](Self::version) comes from what is stored, so that
    /// operators do not discard what they have not seen.
    pub fn damaged(offset: Offset, key: Option<Bytes>, why: &str, stored: &[u8]) -> Self {
        let mut record = Record::new(offset, UNIX_EPOCH, Bytes::new());
        record.key = key;
        Self {
            unreadable: true,
            version: xxh3_64(stored),
            ..Self::new(record, 0, why, UNIX_EPOCH)
        }
    }

    /// The key whose letters keep their order. A malformed record has none, because its key cannot
    /// be trusted.
    pub fn key(&self) -> Option<&Bytes> {
        trusted_key(&self.record)
    }

    /// The bytes of the record, the reasons and the edit together.
    pub fn size(&self) -> usize {
        let edit = self.edit.as_ref().map_or(0, |edit| edit.size());
        self.record.size() + self.first_reason.len() + self.last_reason.len() + edit
    }

    /// Whether the other letter has the same record, edited alike. A store takes the changes of
    /// such a letter even if it would not take the letter any more.
    pub fn has_record_of(&self, other: &Self) -> bool {
        (&self.record, &self.edit) == (&other.record, &other.edit)
    }

    /// The record as the log yielded it.
    pub(crate) fn original(&self) -> &Record {
        self.edit.as_ref().map_or(&self.record, |edit| &edit.original)
    }

    /// Replaces the content of the record: key, headers, payload and origin. A record that was
    /// malformed no longer is.
    pub fn edit(&mut self, new: NewRecord, by: &Operator) {
        let mut record = Record::new(self.record.offset, self.record.appended_at, new.payload);
        (record.key, record.headers, record.origin) = (new.key, new.headers, new.origin);
        let edit = Edit {
            original: self.original().clone(),
            by: by.name().to_owned(),
            reason: by.reason().to_owned(),
            at: from_millis(millis(SystemTime::now())),
        };
        (self.record, self.edit) = (record, Some(Box::new(edit)));
        self.version = self.version.saturating_add(1);
    }

    pub(crate) fn set_last_reason(&mut self, reason: &str) {
        self.last_reason = cut(reason);
    }

    pub(crate) fn take_reasons_of(&mut self, other: Self) {
        (self.first_reason, self.last_reason) = (other.first_reason, other.last_reason);
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
        self.version = self.version.saturating_add(1);
    }
}

/// The key of a record that can be decoded.
pub(crate) fn trusted_key(record: &Record) -> Option<&Bytes> {
    record.key.as_ref().filter(|_| record.malformed.is_none())
}

fn cut(reason: &str) -> String {
    journal::cut(reason, DeadLetter::REASON_LIMIT)
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
///   byte, times to the millisecond, and the edit.
/// - **D3** [`head`](Self::head) and [`counts`](Self::counts) compare keys to the byte. They leave
///   out letters without a [key](DeadLetter::key).
/// - **D4** Consumers never see each other's letters (S7).
/// - **D5** A letter that the store cannot read hides no other. It comes back
///   [unreadable](DeadLetter::unreadable) in its place, counts like any other, and can be removed.
///   [`first_due`](Self::first_due) passes over it. A store that reads all letters of a commit at
///   once, and that stops at one that it cannot read, is exempt.
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
    /// the records that it holds as values, unless they were edited.
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
    fn long_reasons_are_cut() {
        let record = || Record::new(0.into(), SystemTime::UNIX_EPOCH, "x");
        let letter = DeadLetter::new(record(), 1, &"ü".repeat(600), SystemTime::UNIX_EPOCH);
        assert!(letter.first_reason.len() <= DeadLetter::REASON_LIMIT);
        let short = DeadLetter::new(record(), 1, "short", SystemTime::UNIX_EPOCH);
        assert_eq!(short.first_reason, "short");
    }

    #[test]
    fn edits_round_trip_as_bytes_and_keep_the_first_original() {
        let mut record = Record::new(Offset::new(1, 2), SystemTime::UNIX_EPOCH, "garbage");
        record.malformed = Some("größer".into());
        record.headers = vec![("a".into(), "1".into()), ("a".into(), "".into())];
        let mut letter = DeadLetter::new(record.clone(), 1, "why", SystemTime::UNIX_EPOCH);
        let origin: Origin = Origin::of("web#7".parse().expect("a numbering"), 9);
        let edited = NewRecord::new("10248").key("Chile").origin(origin);
        letter.edit(edited.clone(), &Operator::new("ann").because("a typing error"));
        letter.edit(NewRecord { key: None, ..edited }, &Operator::new("bob"));
        let edit = letter.edit.clone().expect("an edit");
        assert_eq!((&edit.original, &*edit.by, letter.version), (&record, "bob", 3));
        let bytes = edit.encode();
        assert_eq!(Edit::decode(bytes.clone(), &letter.record), Ok(*edit));
        for length in 0..bytes.len() {
            let cut = Edit::decode(bytes[..length].to_vec(), &letter.record);
            assert!(
                cut.is_err() || cut.is_ok_and(|cut| cut.original.headers.len() < 2),
                "{length} bytes"
            );
        }
        let of_an_edited = DeadLetter::new(letter.record.clone(), 1, "why", SystemTime::UNIX_EPOCH);
        letter.edit = None;
        assert_eq!(letter.size(), of_an_edited.size());
    }
}
