//! What a position notes about the records on either side of it.

use crate::{Offset, Record, journal::cut, letters::DeadLetter, passed::Passed};

/// What the consumer loop notes about a position: the last record that it passed, and how often it
/// tried the next one in vain. A store keeps it as bytes, and need not look inside.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Note {
    passed: Option<Passed>,
    /// Rare, and therefore not in line.
    tried: Option<Box<Tried>>,
}

/// The tries of a record that has not been passed.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Tried {
    offset: Offset,
    tries: u32,
    first_reason: Box<str>,
}

/// The version of notes without tries. Their bytes are those of [`Passed`].
const PASSED_ONLY: u8 = 1;
/// The version of notes with tries.
const WITH_TRIES: u8 = 2;

impl Note {
    /// The note of a position that follows this record. A malformed record leaves an empty note,
    /// because a later version may decode it differently.
    pub fn after(record: &Record) -> Self {
        Self {
            passed: record.malformed.is_none().then(|| Passed::new(record)),
            tried: None,
        }
    }

    /// The same note with tries of a later record, or without any.
    #[must_use]
    pub fn with_tried(&self, tried: Option<Tried>) -> Self {
        Self {
            passed: self.passed,
            tried: tried.map(Box::new),
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
        self.tried.as_deref()
    }

    /// The note as bytes for a store to keep; empty if it notes nothing.
    pub fn encode(&self) -> Vec<u8> {
        let passed = self.passed.map(|passed| passed.encode());
        let passed = passed.as_ref().map_or(&[][..], |bytes| &bytes[..]);
        let Some(tried) = &self.tried else {
            return passed.to_vec();
        };
        let reason = tried.first_reason.as_bytes();
        let mut bytes = vec![WITH_TRIES];
        bytes.extend(tried.offset.hi().to_be_bytes());
        bytes.extend(tried.offset.lo().to_be_bytes());
        bytes.extend(tried.tries.to_be_bytes());
        bytes.extend((reason.len() as u16).to_be_bytes());
        bytes.extend(reason);
        bytes.extend(passed);
        bytes
    }

    /// Decodes the bytes of [`encode`](Self::encode). If another version wrote them, or if they are
    /// damaged, it logs a warning and returns an empty note. The consumer then does not compare the
    /// log with the position, and counts tries from zero.
    pub fn decode(bytes: &[u8]) -> Self {
        let decoded = match bytes.first() {
            None => return Self::default(),
            Some(&PASSED_ONLY) => Passed::decode(bytes).map(|passed| Self {
                passed: Some(passed),
                tried: None,
            }),
            Some(&WITH_TRIES) => decode_with_tries(&bytes[1..]),
            Some(_) => None,
        };
        decoded.unwrap_or_else(|| {
            tracing::warn!(
                length = bytes.len(),
                version = ?bytes.first(),
                "cannot read the note of the position, so the consumer cannot compare the log with it, and counts tries \
                 from zero"
            );
            Self::default()
        })
    }
}

fn decode_with_tries(mut bytes: &[u8]) -> Option<Note> {
    let mut take = |len: usize| bytes.split_off(..len);
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
    let offset = Offset::new(number(take(8)?), number(take(8)?));
    let (tries, length) = (number(take(4)?), number(take(2)?));
    let tried = Tried {
        offset,
        tries: u32::try_from(tries).ok()?,
        first_reason: str::from_utf8(take(usize::try_from(length).ok()?)?).ok()?.into(),
    };
    let passed = match bytes {
        [] => None,
        bytes => Some(Passed::decode(bytes)?),
    };
    Some(Note {
        passed,
        tried: Some(Box::new(tried)),
    })
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

    #[test]
    fn marks_round_trip_as_bytes() {
        for note in [
            Note::default(),
            Note::after(&record()),
            Note::default().with_tried(Some(tried())),
            Note::after(&record()).with_tried(Some(tried())),
            Note::after(&record()).with_tried(Some(Tried::new(0.into(), ""))),
        ] {
            assert_eq!(Note::decode(&note.encode()), note);
        }
        assert!(Note::default().encode().is_empty());
        let long = Tried::new(0.into(), &"x".repeat(100_000));
        assert!(Note::default().with_tried(Some(long)).encode().len() < 1_100);
    }

    /// Marks without tries are read by processes that know no others.
    #[test]
    fn a_mark_without_tries_has_the_bytes_of_version_1() {
        assert_eq!(Note::after(&record()).encode()[..], Passed::new(&record()).encode()[..]);
    }

    #[test]
    fn what_cannot_be_read_is_an_empty_mark() {
        let bytes = Note::after(&record()).with_tried(Some(tried())).encode();
        for length in 1..bytes.len() {
            // The passed record is optional, so a note may end before it.
            let decoded = Note::decode(&bytes[..length]);
            assert!(decoded.passed().is_none(), "{length} bytes: {decoded:?}");
        }
        for version in [0, 3, 255] {
            let mut other = bytes.clone();
            other[0] = version;
            assert_eq!(Note::decode(&other), Note::default());
        }
    }

    #[test]
    fn a_malformed_record_leaves_no_mark() {
        let mut malformed = record();
        malformed.malformed = Some("why".into());
        assert_eq!(Note::after(&malformed), Note::default());
    }
}
