//! What operators did to a consumer by hand.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::{BufMut as _, Bytes};

use crate::{
    Offset,
    backend::{ByteReader, CutShort},
};

/// Who changes a consumer by hand, and why. Both are kept in its [`Journal`].
///
/// ```
/// # use essentially_once::consumer::Operator;
/// let by = Operator::new("ann@example.com").because("the parser is mended");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Operator {
    name: String,
    reason: String,
}

impl Operator {
    /// The most bytes of a name or a reason that a journal keeps. The rest is cut off.
    pub const TEXT_LIMIT: usize = 256;

    /// An operator who gives no reason. The name can be that of a person or of a program.
    pub fn new(name: impl AsRef<str>) -> Self {
        Self {
            name: cut(name.as_ref(), Self::TEXT_LIMIT),
            reason: String::new(),
        }
    }

    /// The same operator with a reason.
    #[must_use]
    pub fn because(self, reason: impl AsRef<str>) -> Self {
        Self {
            reason: cut(reason.as_ref(), Self::TEXT_LIMIT),
            ..self
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }
}

/// The newest actions of operators on a consumer. A store keeps it as bytes next to the position,
/// and need not look inside.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Journal {
    entries: Vec<JournalEntry>,
}

/// An action of an operator.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct JournalEntry {
    /// When it was, by the operator's clock, to the millisecond.
    pub at: SystemTime,
    /// Who did it.
    pub by: String,
    /// Why; empty if the operator gave no reason.
    pub reason: String,
    /// What was done.
    pub action: OperatorAction,
}

/// What an operator did.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum OperatorAction {
    /// Paused the consumer.
    Pause,
    /// Let the consumer continue.
    Resume,
    /// Moved the position.
    Seek {
        /// Where it was; [`Offset::ZERO`] if there was none.
        from: Offset,
        /// Where it is since.
        to: Offset,
        /// How many dead letters that removed.
        letters_removed: u64,
    },
    /// Moved the position past this record.
    Skip(Offset),
    /// Made dead letters due.
    Retry {
        /// The first of them.
        first: Offset,
        /// How many.
        letters: u64,
    },
    /// Removed dead letters.
    Discard {
        /// The first of them.
        first: Offset,
        /// How many.
        letters: u64,
    },
    /// Changed the dead letter at this offset.
    Edit(Offset),
}

/// The version of the encoding.
const VERSION: u8 = 1;

impl Journal {
    /// The most entries that a journal keeps.
    pub const LIMIT: usize = 100;

    /// The entries, oldest first.
    pub fn entries(&self) -> &[JournalEntry] {
        &self.entries
    }

    /// The entry that paused the consumer, if it is paused. No number of later entries drops it.
    pub fn paused(&self) -> Option<&JournalEntry> {
        let is_about_pausing = |entry: &&JournalEntry| entry.action.is_about_pausing();
        let last = self.entries.iter().rfind(is_about_pausing)?;
        (last.action == OperatorAction::Pause).then_some(last)
    }

    /// The same journal with one more entry. Beyond the limit it drops the oldest one.
    #[must_use]
    pub fn with(&self, by: &Operator, action: OperatorAction) -> Self {
        let mut entries = self.entries.clone();
        let kept = self.paused().cloned();
        while entries.len() >= Self::LIMIT {
            let oldest = entries.iter().position(|entry| Some(entry) != kept.as_ref());
            entries.remove(oldest.unwrap_or(0));
        }
        entries.push(JournalEntry {
            at: from_millis(millis(SystemTime::now())),
            by: by.name.clone(),
            reason: by.reason.clone(),
            action,
        });
        Self { entries }
    }

    /// The same journal after one more commit of the action that it ends with.
    #[must_use]
    pub(crate) fn continued(&self, by: &Operator, action: OperatorAction) -> Self {
        let mut before = self.clone();
        let last = before.entries.pop().filter(|last| last.by == by.name);
        match last.and_then(|last| last.action.joined_with(action)) {
            Some(joined) => before.with(by, joined),
            None => self.with(by, action),
        }
    }

    /// The journal as bytes for a store to keep; empty if it has no entries.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if !self.entries.is_empty() {
            bytes.put_u8(VERSION);
        }
        for entry in &self.entries {
            let (kind, [first, second], count) = entry.action.parts();
            bytes.put_u64(millis(entry.at));
            bytes.put_u8(kind);
            put_offset(&mut bytes, first);
            put_offset(&mut bytes, second);
            bytes.put_u64(count);
            put_bytes(&mut bytes, entry.by.as_bytes());
            put_bytes(&mut bytes, entry.reason.as_bytes());
        }
        bytes
    }

    /// Decodes the bytes of [`encode`](Self::encode).
    ///
    /// # Errors
    /// What is wrong with the bytes. A store must then refuse the position, since the consumer may
    /// be paused.
    pub fn decode(bytes: impl Into<Bytes>) -> Result<Self, &'static str> {
        let mut reader = ByteReader::new(bytes.into());
        if reader.is_empty() {
            return Ok(Self::default());
        }
        if reader.u8()? != VERSION {
            return Err("the journal has a version that this program does not support; use a newer one");
        }
        let mut entries = Vec::new();
        while !reader.is_empty() {
            let (at, kind) = (from_millis(reader.u64()?), reader.u8()?);
            let offsets = [read_offset(&mut reader)?, read_offset(&mut reader)?];
            entries.push(JournalEntry {
                at,
                action: OperatorAction::of_parts(kind, offsets, reader.u64()?)?,
                by: read_text(&mut reader)?,
                reason: read_text(&mut reader)?,
            });
        }
        Ok(Self { entries })
    }
}

/// `ann discarded the letter at 7: sent twice`
impl fmt::Display for JournalEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.by, self.action)?;
        match &*self.reason {
            "" => Ok(()),
            reason => write!(f, ": {reason}"),
        }
    }
}

/// What was done, in the past tense.
impl fmt::Display for OperatorAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pause => f.write_str("paused the consumer"),
            Self::Resume => f.write_str("resumed the consumer"),
            Self::Seek {
                from,
                to,
                letters_removed,
            } => {
                match from == to {
                    true => write!(f, "set the position to {to} again")?,
                    false => write!(f, "moved the position from {from} to {to}")?,
                }
                match letters_removed {
                    0 => Ok(()),
                    1 => f.write_str(" and removed 1 letter"),
                    letters => write!(f, " and removed {letters} letters"),
                }
            }
            Self::Skip(offset) => write!(f, "skipped the record at {offset}"),
            Self::Retry { first, letters: 1 } => write!(f, "retried the letter at {first}"),
            Self::Retry { first, letters } => write!(f, "retried {letters} letters from {first} on"),
            Self::Discard { first, letters: 1 } => write!(f, "discarded the letter at {first}"),
            Self::Discard { first, letters } => write!(f, "discarded {letters} letters from {first} on"),
            Self::Edit(offset) => write!(f, "edited the letter at {offset}"),
        }
    }
}

impl OperatorAction {
    const fn is_about_pausing(self) -> bool {
        matches!(self, Self::Pause | Self::Resume)
    }

    /// One action for both, if both change letters in the same way.
    fn joined_with(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Retry { first, letters }, Self::Retry { first: f, letters: l }) => Some(Self::Retry {
                first: first.min(f),
                letters: letters.saturating_add(l),
            }),
            (Self::Discard { first, letters }, Self::Discard { first: f, letters: l }) => Some(Self::Discard {
                first: first.min(f),
                letters: letters.saturating_add(l),
            }),
            _ => None,
        }
    }

    const fn parts(self) -> (u8, [Offset; 2], u64) {
        let none = Offset::ZERO;
        match self {
            Self::Pause => (1, [none; 2], 0),
            Self::Resume => (2, [none; 2], 0),
            Self::Seek {
                from,
                to,
                letters_removed,
            } => (3, [from, to], letters_removed),
            Self::Skip(offset) => (4, [offset, none], 0),
            Self::Retry { first, letters } => (5, [first, none], letters),
            Self::Discard { first, letters } => (6, [first, none], letters),
            Self::Edit(offset) => (7, [offset, none], 0),
        }
    }

    const fn of_parts(kind: u8, [first, second]: [Offset; 2], count: u64) -> Result<Self, &'static str> {
        Ok(match kind {
            1 => Self::Pause,
            2 => Self::Resume,
            3 => Self::Seek {
                from: first,
                to: second,
                letters_removed: count,
            },
            4 => Self::Skip(first),
            5 => Self::Retry { first, letters: count },
            // Before 0.2 was released, an entry was about one letter and had no count.
            6 => Self::Discard {
                first,
                letters: if count == 0 { 1 } else { count },
            },
            7 => Self::Edit(first),
            _ => return Err("the journal has an action that this program does not know; use a newer one"),
        })
    }
}

/// The start of a text, cut between characters and marked if anything is missing.
pub(crate) fn cut(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    let mark = '…';
    let end = text.floor_char_boundary(limit - mark.len_utf8());
    format!("{}{mark}", &text[..end])
}

pub(crate) fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn from_millis(millis: u64) -> SystemTime {
    UNIX_EPOCH
        .checked_add(Duration::from_millis(millis))
        .unwrap_or(UNIX_EPOCH)
}

pub(crate) fn put_offset(out: &mut Vec<u8>, offset: Offset) {
    out.put_u64(offset.hi());
    out.put_u64(offset.lo());
}

pub(crate) fn read_offset(reader: &mut ByteReader) -> Result<Offset, CutShort> {
    Ok(Offset::new(reader.u64()?, reader.u64()?))
}

/// Puts a byte string with its length in front.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.put_u32(bytes.len() as u32);
    out.put_slice(bytes);
}

pub(crate) fn read_text(reader: &mut ByteReader) -> Result<String, &'static str> {
    String::from_utf8(reader.bytes()?.into()).map_err(|_| "a text in it is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ann() -> Operator {
        Operator::new("ann").because("größer")
    }

    fn discard(first: u64, letters: u64) -> OperatorAction {
        let first = first.into();
        OperatorAction::Discard { first, letters }
    }

    fn actions() -> [OperatorAction; 7] {
        let offset = Offset::new(1, u64::MAX);
        [
            OperatorAction::Pause,
            OperatorAction::Resume,
            OperatorAction::Seek {
                from: offset,
                to: Offset::ZERO,
                letters_removed: 3,
            },
            OperatorAction::Skip(offset),
            OperatorAction::Retry {
                first: offset,
                letters: 2,
            },
            OperatorAction::Discard {
                first: offset,
                letters: 4,
            },
            OperatorAction::Edit(offset),
        ]
    }

    #[test]
    fn journals_round_trip_as_bytes() {
        let mut journal = Journal::default();
        assert!(journal.encode().is_empty());
        for action in actions() {
            assert_eq!(Journal::decode(journal.encode()).as_ref(), Ok(&journal));
            journal = journal.with(&ann(), action);
        }
        let bytes = journal.encode();
        assert_eq!(Journal::decode(bytes.clone()), Ok(journal));
        for length in 2..bytes.len() {
            let cut = Journal::decode(bytes[..length].to_vec());
            assert!(
                cut.is_err() || cut.is_ok_and(|cut| cut.entries.len() < 7),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn entries_can_be_read() {
        let entries = Journal::default()
            .with(&ann(), discard(7, 1))
            .with(&Operator::new("bob"), discard(8, 20))
            .with(&Operator::new("bob"), OperatorAction::Pause);
        let texts: Vec<_> = entries.entries.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "ann discarded the letter at 7: größer",
                "bob discarded 20 letters from 8 on",
                "bob paused the consumer"
            ]
        );
        for (to, letters_removed, text) in [
            (5, 0, "moved the position from 8 to 5"),
            (5, 1, "moved the position from 8 to 5 and removed 1 letter"),
            (5, 2, "moved the position from 8 to 5 and removed 2 letters"),
            (8, 0, "set the position to 8 again"),
        ] {
            let (from, to) = (8.into(), Offset::from(to));
            let seek = OperatorAction::Seek {
                from,
                to,
                letters_removed,
            };
            assert_eq!(seek.to_string(), text);
        }
    }

    #[test]
    fn a_discard_without_a_count_is_of_one_letter() {
        let mut stored = vec![VERSION];
        stored.extend(1_700_000_000_000u64.to_be_bytes());
        stored.push(6);
        stored.extend([0; 8]);
        stored.extend(7u64.to_be_bytes());
        // No second offset, and no count.
        stored.extend([0; 24]);
        stored.extend(b"\0\0\0\x03ann\0\0\0\0");
        let journal = Journal::decode(stored).expect("an entry of an earlier program");
        let [entry] = journal.entries() else {
            panic!("{journal:?}")
        };
        assert_eq!((entry.action, &*entry.by), (discard(7, 1), "ann"));
    }

    #[test]
    fn another_version_and_an_unknown_action_are_refused() {
        let mut bytes = Journal::default().with(&ann(), OperatorAction::Pause).encode();
        bytes[9] = 99;
        assert!(Journal::decode(bytes.clone()).is_err_and(|why| why.contains("action")));
        bytes[0] = 2;
        assert!(Journal::decode(bytes).is_err_and(|why| why.contains("version")));
    }

    #[test]
    fn a_full_journal_drops_its_oldest_entries_but_not_the_pause() {
        let mut journal = Journal::default().with(&ann(), OperatorAction::Skip(0.into()));
        journal = journal.with(&ann(), OperatorAction::Pause);
        for offset in 0..2 * Journal::LIMIT as u64 {
            journal = journal.with(&ann(), discard(offset, 1));
            assert!(journal.paused().is_some());
        }
        assert_eq!(journal.entries.len(), Journal::LIMIT);
        assert_eq!(journal.entries[0].action, OperatorAction::Pause);
        assert_eq!(journal.entries[1].action, discard(101, 1));
        journal = journal.with(&ann(), OperatorAction::Resume);
        assert_eq!(journal.paused(), None);
        journal = journal.with(&ann(), OperatorAction::Skip(0.into()));
        assert_eq!(journal.entries[0].action, discard(102, 1));
    }

    #[test]
    fn a_change_of_many_letters_is_one_entry() {
        let retry = |first: u64, letters| OperatorAction::Retry {
            first: first.into(),
            letters,
        };
        let journal = Journal::default()
            .with(&ann(), retry(3, 1_000))
            .continued(&ann(), retry(7, 500));
        let journal = journal.with(&ann(), retry(9, 1));
        let after_another = journal
            .with(&ann(), OperatorAction::Pause)
            .continued(&ann(), retry(11, 1));
        let actions: Vec<_> = after_another.entries.iter().map(|entry| entry.action).collect();
        assert_eq!(
            actions,
            [retry(3, 1_500), retry(9, 1), OperatorAction::Pause, retry(11, 1)]
        );
        // Later parts may begin before earlier ones.
        let journal = Journal::default()
            .with(&ann(), discard(51, 50))
            .continued(&ann(), discard(2, 49))
            .continued(&ann(), retry(1, 1));
        let actions: Vec<_> = journal.entries.iter().map(|entry| entry.action).collect();
        assert_eq!(actions, [discard(2, 99), retry(1, 1)]);
        let of_another = journal.continued(&Operator::new("bob"), retry(2, 1));
        assert_eq!(of_another.entries.len(), 3);
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let operator = Operator::new("ü".repeat(600)).because("short");
        assert!(operator.name.len() <= Operator::TEXT_LIMIT);
        assert!(operator.name.ends_with("ü…"), "{}", operator.name);
        assert_eq!(operator.reason, "short");
    }
}
