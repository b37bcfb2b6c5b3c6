//! What a position notes about the records on either side of it.

use bytes::{BufMut as _, Bytes};

use crate::{
    Offset, Owner, Record,
    backend::ByteReader,
    journal::{cut, put_offset, read_offset},
    letters::DeadLetter,
    passed::Passed,
};

/// What the consumer loop notes about a position: the last record that it passed, how often it
/// tried the next one in vain, and what it had in hand. A store keeps it as bytes, and need not
/// look inside.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Note {
    passed: Option<Passed>,
    /// Rare, and therefore not in line.
    trouble: Option<Box<Trouble>>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
struct Trouble {
    tried: Option<Tried>,
    in_hand: InHand,
}

/// The tries of a record that has not been passed.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Tried {
    offset: Offset,
    tries: u32,
    first_reason: Box<str>,
}

/// What a session handles alone, because the process of the one before may have died of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct InHand {
    /// The record at the position, whose offset counts as the position's.
    pub(crate) record: Option<Mark>,
    /// A dead letter.
    pub(crate) letter: Option<Mark>,
}

/// A record or letter in hand.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Mark {
    pub(crate) offset: Offset,
    /// How many sessions in a row have had it in hand, the current one included.
    pub(crate) sessions: u32,
    /// The run of the current session.
    pub(crate) by: Owner,
}

/// The version of notes without tries and marks. Their bytes are those of [`Passed`].
const PASSED_ONLY: u8 = 1;
/// The version of notes with tries and without marks.
const WITH_TRIES: u8 = 2;
/// The version of notes with marks.
const WITH_MARKS: u8 = 3;

/// In a note with marks, whether it has tries and which marks it has.
const HAS_TRIES: u8 = 1;
const HAS_RECORD: u8 = 2;
const HAS_LETTER: u8 = 4;

impl Note {
    /// The note of a position that follows this record. A malformed record leaves an empty note,
    /// because a later version may decode it differently.
    pub fn after(record: &Record) -> Self {
        Self {
            passed: record.malformed.is_none().then(|| Passed::new(record)),
            trouble: None,
        }
    }

    /// The same note with tries of a later record, or without any.
    #[must_use]
    pub fn with_tried(&self, tried: Option<Tried>) -> Self {
        self.with(tried, self.in_hand())
    }

    /// The same note with other marks.
    #[must_use]
    pub(crate) fn with_in_hand(&self, in_hand: InHand) -> Self {
        self.with(self.tried().cloned(), in_hand)
    }

    /// The same note with other tries and marks.
    #[must_use]
    pub(crate) fn with(&self, tried: Option<Tried>, in_hand: InHand) -> Self {
        let trouble = Trouble { tried, in_hand };
        Self {
            passed: self.passed,
            trouble: (trouble != Trouble::default()).then(|| Box::new(trouble)),
        }
    }

    pub(crate) const fn passed(&self) -> Option<Passed> {
        self.passed
    }

    /// The offset of the last record that the position passed.
    pub fn passed_offset(&self) -> Option<Offset> {
        self.passed.map(|passed| passed.offset())
    }

    /// The tries of the next record, if one failed.
    pub fn tried(&self) -> Option<&Tried> {
        self.trouble.as_ref()?.tried.as_ref()
    }

    /// Whether it has tries or marks.
    pub(crate) const fn has_trouble(&self) -> bool {
        self.trouble.is_some()
    }

    pub(crate) fn in_hand(&self) -> InHand {
        self.trouble
            .as_ref()
            .map_or_else(InHand::default, |trouble| trouble.in_hand)
    }

    /// The note as bytes for a store to keep; empty if it notes nothing.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some(trouble) = &self.trouble {
            trouble.encode(&mut bytes);
        }
        if let Some(passed) = &self.passed {
            bytes.put_slice(&passed.encode());
        }
        bytes
    }

    /// Decodes the bytes of [`encode`](Self::encode). If another version wrote them, or if they are
    /// damaged, it logs a warning and returns an empty note. The consumer then does not compare the
    /// log with the position, and counts tries from zero.
    pub fn decode(bytes: &[u8]) -> Self {
        let decoded = match bytes.first() {
            None => return Self::default(),
            Some(&PASSED_ONLY) => Ok(None),
            Some(&version @ (WITH_TRIES | WITH_MARKS)) => Trouble::decode(version, &bytes[1..]).map(Some),
            Some(_) => Err("its version is not supported"),
        };
        let decoded = decoded.and_then(|trouble| {
            let (trouble, passed) = match trouble {
                None => (None, Bytes::copy_from_slice(bytes)),
                Some((trouble, passed)) => (Some(Box::new(trouble)), passed),
            };
            let passed = match passed.is_empty() {
                true => None,
                false => Some(Passed::decode(&passed).ok_or("the record that it passed is damaged")?),
            };
            Ok(Self { passed, trouble })
        });
        decoded.unwrap_or_else(|why| {
            tracing::warn!(
                why,
                length = bytes.len(),
                version = ?bytes.first(),
                "cannot read the note of the position, so the consumer cannot compare the log with it, and counts tries \
                 from zero"
            );
            Self::default()
        })
    }
}

impl Trouble {
    fn encode(&self, bytes: &mut Vec<u8>) {
        let Self {
            tried,
            in_hand: InHand { record, letter },
        } = self;
        if record.is_none() && letter.is_none() {
            bytes.put_u8(WITH_TRIES);
        } else {
            let has = |flag, present| if present { flag } else { 0 };
            bytes.put_u8(WITH_MARKS);
            bytes.put_u8(
                has(HAS_TRIES, tried.is_some()) | has(HAS_RECORD, record.is_some()) | has(HAS_LETTER, letter.is_some()),
            );
        }
        if let Some(tried) = tried {
            put_offset(bytes, tried.offset);
            bytes.put_u32(tried.tries);
            bytes.put_u16(tried.first_reason.len() as u16);
            bytes.put_slice(tried.first_reason.as_bytes());
        }
        for mark in [record, letter].into_iter().flatten() {
            put_offset(bytes, mark.offset);
            bytes.put_u32(mark.sessions);
            bytes.put_u128(mark.by.get());
        }
    }

    /// Returns the rest of the bytes too.
    fn decode(version: u8, bytes: &[u8]) -> Result<(Self, Bytes), &'static str> {
        let mut reader = ByteReader::new(Bytes::copy_from_slice(bytes));
        let flags = match version {
            WITH_TRIES => HAS_TRIES,
            _ => reader.u8()?,
        };
        if flags > HAS_TRIES | HAS_RECORD | HAS_LETTER {
            return Err("it has an unknown flag");
        }
        let mut trouble = Self::default();
        if flags & HAS_TRIES != 0 {
            trouble.tried = Some(Tried::decode(&mut reader)?);
        }
        if flags & HAS_RECORD != 0 {
            trouble.in_hand.record = Some(Mark::decode(&mut reader)?);
        }
        if flags & HAS_LETTER != 0 {
            trouble.in_hand.letter = Some(Mark::decode(&mut reader)?);
        }
        Ok((trouble, reader.rest().clone()))
    }
}

impl Mark {
    fn decode(reader: &mut ByteReader) -> Result<Self, &'static str> {
        Ok(Self {
            offset: read_offset(reader)?,
            sessions: reader.u32()?,
            by: Owner::new(reader.u128()?),
        })
    }
}

impl Tried {
    /// The first try of the record at `offset` failed for this reason. Cuts it to 1,024 bytes.
    pub fn new(offset: Offset, reason: &str) -> Self {
        Self {
            offset,
            tries: 1,
            first_reason: cut(reason, DeadLetter::REASON_LIMIT).into(),
        }
    }

    /// One more try failed.
    #[must_use]
    pub fn again(self) -> Self {
        Self {
            tries: self.tries.saturating_add(1),
            ..self
        }
    }

    /// The offset of the record.
    pub const fn offset(&self) -> Offset {
        self.offset
    }

    /// How many tries failed.
    pub const fn tries(&self) -> u32 {
        self.tries
    }

    /// Why the first try failed.
    pub fn first_reason(&self) -> &str {
        &self.first_reason
    }

    fn decode(reader: &mut ByteReader) -> Result<Self, &'static str> {
        let (offset, tries) = (read_offset(reader)?, reader.u32()?);
        let length = u16::from_be_bytes(reader.array()?);
        let first_reason = reader.take(length.into())?;
        let first_reason = str::from_utf8(&first_reason).map_err(|_| "a reason in it is not UTF-8")?;
        Ok(Self {
            offset,
            tries,
            first_reason: first_reason.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn record() -> Record {
        Record::new(7.into(), UNIX_EPOCH, "payload")
    }

    fn tried() -> Tried {
        Tried::new(Offset::new(1, u64::MAX), "größer").again()
    }

    fn in_hand() -> InHand {
        let mark = |offset: u64| Mark {
            offset: offset.into(),
            sessions: 3,
            by: Owner::new(u128::MAX - 1),
        };
        InHand {
            record: Some(mark(8)),
            letter: Some(mark(2)),
        }
    }

    #[test]
    fn notes_round_trip_as_bytes() {
        let letter = InHand {
            record: None,
            ..in_hand()
        };
        for note in [
            Note::default(),
            Note::after(&record()),
            Note::default().with_tried(Some(tried())),
            Note::after(&record()).with_tried(Some(tried())),
            Note::after(&record()).with_tried(Some(Tried::new(0.into(), ""))),
            Note::after(&record()).with_in_hand(in_hand()),
            Note::default().with_in_hand(letter),
            Note::after(&record()).with_in_hand(in_hand()).with_tried(Some(tried())),
        ] {
            assert_eq!(Note::decode(&note.encode()), note);
        }
        assert!(Note::default().encode().is_empty());
        let long = Tried::new(0.into(), &"x".repeat(100_000));
        assert!(Note::default().with_tried(Some(long)).encode().len() < 1_100);
        let marked = Note::after(&record()).with_in_hand(in_hand());
        assert_eq!(marked.with_in_hand(InHand::default()), Note::after(&record()));
    }

    /// Notes without tries are read by processes that know no others.
    #[test]
    fn a_note_without_tries_has_the_bytes_of_version_1() {
        assert_eq!(Note::after(&record()).encode()[..], Passed::new(&record()).encode()[..]);
        assert_eq!(Note::default().with_tried(Some(tried())).encode()[0], 2);
    }

    #[test]
    fn what_cannot_be_read_is_an_empty_note() {
        for note in [
            Note::after(&record()).with_tried(Some(tried())),
            Note::after(&record()).with_tried(Some(tried())).with_in_hand(in_hand()),
        ] {
            let bytes = note.encode();
            for length in 1..bytes.len() {
                // The passed record is optional, so a note may end before it.
                let decoded = Note::decode(&bytes[..length]);
                assert!(decoded.passed().is_none(), "{length} bytes: {decoded:?}");
            }
            for version in [0, 4, 255] {
                let mut other = bytes.clone();
                other[0] = version;
                assert_eq!(Note::decode(&other), Note::default());
            }
        }
    }

    #[test]
    fn a_malformed_record_leaves_no_note() {
        let mut malformed = record();
        malformed.malformed = Some("why".into());
        assert_eq!(Note::after(&malformed), Note::default());
    }
}
