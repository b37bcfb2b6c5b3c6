//! Entries of a changelog as bytes.

use bytes::{BufMut as _, Bytes};
use essentially_once::backend::{Journal, Note, Owner, Revision};

use super::{
    letter_index::LettersChange,
    rule::{Commit, Token},
    sending::Sent,
    state::StateChange,
    wire::{Decoded, Reader, put_bytes, put_log, put_numbering, put_offset, put_revision, put_window},
};
use crate::log::packed;

/// The first bytes of every entry, in this version and all later ones.
const MAGIC: &[u8] = b"eo-entry";
/// The version of commits. A version before 0.2 stops at the first commit of version 2, and names
/// the version.
const VERSION: u8 = 2;
/// The version of marks, which every version reads, and of commits written before 0.2, without
/// epochs and owners.
const FIRST_VERSION: u8 = 1;
/// The version of commits that change dead letters. A process that cannot keep letters stops at the
/// first of them. Without such a commit it goes on, because all others keep their version.
const LETTERS_VERSION: u8 = 3;
/// The version of commits with a journal or an edited letter. A process that does not know them
/// stops at the first, so it neither ignores a pause nor loses an edit.
const JOURNAL_VERSION: u8 = 4;
/// The version of commits that send to outboxes. A process that does not know the counts of
/// outboxes stops at the first, so it never gives a number twice.
const OUTBOX_VERSION: u8 = 5;

const COMMIT: u8 = 1;
const MARK: u8 = 2;

/// An entry of a changelog.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "one at a time, taken apart as soon as it is parsed"
)]
pub(super) enum Entry {
    Commit(Commit<StateChange>),
    /// Changes nothing. A reader that gets its own mark back has read everything before it.
    Mark(Token),
}

/// What the bytes of a message are.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "one at a time, taken apart as soon as it is parsed"
)]
pub(super) enum Parsed {
    Entry(Entry),
    /// A message of another program, since it does not begin like an entry. Every version of this
    /// crate decides alike, so every reader ignores it.
    Foreign,
    /// Begins like an entry but cannot be decoded, for this reason. Ignoring it could lose a
    /// commit.
    Unreadable(&'static str),
}

/// Bytes of a mark.
pub(super) const MARK_LEN: usize = MAGIC.len() + 2 + size_of::<Token>();

pub(super) fn encode_mark(token: Token) -> Vec<u8> {
    header(FIRST_VERSION, MARK, token)
}

pub(super) fn encode_commit(commit: &Commit<StateChange>) -> Vec<u8> {
    let version = version(commit);
    let mut out = header(version, COMMIT, commit.token);
    out.put_u128(commit.parent);
    put_revision(&mut out, commit.expected);
    put_revision(&mut out, commit.revision);
    put_log(&mut out, &commit.log);
    put_offset(&mut out, commit.next);
    put_owner(&mut out, commit.owner);
    put_bytes(&mut out, &commit.note.encode());
    let change = &commit.change;
    out.put_u32(change.windows.len() as u32);
    for (producer, window) in &change.windows {
        put_window(&mut out, producer, window);
    }
    out.put_u32(change.forgotten.len() as u32);
    for numbering in &change.forgotten {
        put_numbering(&mut out, numbering);
    }
    out.put_u32(change.writes.len() as u32);
    for (key, value) in &change.writes {
        put_bytes(&mut out, key);
        out.put_u8(value.is_some().into());
        if let Some(value) = value {
            put_bytes(&mut out, value);
        }
    }
    out.put_u8(change.sent.is_some().into());
    if let Some(sent) = &change.sent {
        put_offset(&mut out, sent.before);
        put_bytes(&mut out, &sent.packed);
    }
    if version >= LETTERS_VERSION {
        change.letters.encode(&mut out);
    }
    if version >= JOURNAL_VERSION {
        out.put_u8(commit.journal.is_some().into());
        if let Some(journal) = &commit.journal {
            put_bytes(&mut out, &journal.encode());
        }
    }
    if let Some(sent) = &change.sent
        && version >= OUTBOX_VERSION
    {
        sent.encode_parts(&mut out);
    }
    out
}

/// The lowest version that holds the commit, so that older processes go on as long as they can.
fn version(commit: &Commit<StateChange>) -> u8 {
    let StateChange { letters, sent, .. } = &commit.change;
    if sent.as_ref().is_some_and(|sent| !sent.parts.is_empty()) {
        OUTBOX_VERSION
    } else if commit.journal.is_some() || letters.have_edits() {
        JOURNAL_VERSION
    } else if !letters.is_empty() {
        LETTERS_VERSION
    } else {
        VERSION
    }
}

/// 0 means none: nobody draws it.
pub(super) fn put_owner(out: &mut Vec<u8>, owner: Option<Owner>) {
    out.put_u128(owner.map_or(0, Owner::get));
}

pub(super) fn read_owner(reader: &mut Reader) -> Decoded<Option<Owner>> {
    let number = reader.u128()?;
    Ok((number != 0).then(|| Owner::new(number)))
}

pub(super) fn read_note(reader: &mut Reader) -> Decoded<Note> {
    Ok(Note::decode(&reader.bytes()?))
}

/// A journal that cannot be read may pause the consumer, so it is an error.
pub(super) fn read_journal(reader: &mut Reader) -> Decoded<Journal> {
    Journal::decode(reader.bytes()?)
}

fn header(version: u8, kind: u8, token: Token) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.put_u8(version);
    out.put_u8(kind);
    out.put_u128(token);
    out
}

pub(super) fn parse(bytes: Bytes) -> Parsed {
    if !bytes.starts_with(MAGIC) {
        return Parsed::Foreign;
    }
    decode(bytes.slice(MAGIC.len()..)).map_or_else(Parsed::Unreadable, Parsed::Entry)
}

fn decode(bytes: Bytes) -> Decoded<Entry> {
    let mut reader = Reader::new(bytes);
    let version = reader.u8()?;
    if !(FIRST_VERSION..=OUTBOX_VERSION).contains(&version) {
        return Err("it was written by another version of this crate; use that version or a later one");
    }
    let (kind, token) = (reader.u8()?, reader.u128()?);
    let entry = match kind {
        COMMIT => Entry::Commit(decode_commit(&mut reader, version, token)?),
        MARK => Entry::Mark(token),
        _ => return Err("it is of an unknown kind"),
    };
    reader.finish()?;
    Ok(entry)
}

fn decode_commit(reader: &mut Reader, version: u8, token: Token) -> Decoded<Commit<StateChange>> {
    let parent = reader.u128()?;
    let (expected, revision) = match version {
        FIRST_VERSION => {
            let revision = reader.revision(version)?;
            let before = revision.count().checked_sub(1).ok_or("it makes revision 0")?;
            (Revision::new(0, before), revision)
        }
        _ => (reader.revision(version)?, reader.revision(version)?),
    };
    let (log, next) = (reader.log()?, reader.offset()?);
    let (owner, note) = match version {
        FIRST_VERSION => (None, Note::default()),
        _ => (read_owner(reader)?, read_note(reader)?),
    };
    let mut change = StateChange {
        windows: reader.list(|reader| reader.window(version))?,
        forgotten: reader.list(Reader::numbering)?,
        writes: reader.list(|reader| {
            let key = reader.bytes()?;
            match reader.u8()? {
                0 => Ok((key, None)),
                1 => Ok((key, Some(reader.bytes()?))),
                _ => Err("a write is neither a put nor a delete"),
            }
        })?,
        sent: match reader.u8()? {
            0 => None,
            1 => Some(decode_sent(reader)?),
            _ => return Err("the flag of its sent records is neither 0 nor 1"),
        },
        letters: match version {
            LETTERS_VERSION.. => LettersChange::decode(reader)?,
            _ => LettersChange::default(),
        },
    };
    let has_journal = match version {
        JOURNAL_VERSION.. => reader.u8()?,
        _ => 0,
    };
    let journal = match has_journal {
        0 => None,
        1 => Some(read_journal(reader)?),
        _ => return Err("the flag of its journal is neither 0 nor 1"),
    };
    if version >= OUTBOX_VERSION {
        let sent = change.sent.as_mut().ok_or("it sends nothing to an outbox")?;
        sent.decode_parts(reader)?;
    }
    Ok(Commit {
        token,
        parent,
        expected,
        revision,
        log,
        next,
        owner,
        note,
        journal,
        change,
    })
}

fn decode_sent(reader: &mut Reader) -> Decoded<Sent> {
    let sent = Sent {
        before: reader.offset()?,
        packed: reader.bytes()?,
        parts: Vec::new(),
    };
    match packed::decode(0, &sent.packed) {
        Ok(_) => Ok(sent),
        Err(_) => Err("its sent records are damaged"),
    }
}

#[cfg(test)]
pub(super) mod fixtures;

#[cfg(test)]
pub(super) mod tests {
    use std::{sync::Arc, time::SystemTime};

    use essentially_once::{
        Epoch, Offset, ProducerId, Record,
        backend::{LogId, Numbering, Tried, Window},
        consumer::{Operator, OperatorAction},
    };
    use proptest::{collection::vec, option, prelude::*};

    use super::{
        super::{
            letter::{Letter, tests::dead_letter},
            sending::tests::sent,
        },
        *,
    };

    fn numbering() -> impl Strategy<Value = Numbering> {
        ("[a-z][a-z0-9]{0,8}", any::<u64>())
            .prop_map(|(name, epoch)| Numbering::new(ProducerId::new(name).expect("name"), Epoch::new(epoch)))
    }

    pub(in super::super) fn revision() -> impl Strategy<Value = Revision> {
        any::<(u64, u64)>().prop_map(|(epoch, count)| Revision::new(epoch, count))
    }

    pub(in super::super) fn owner() -> impl Strategy<Value = Option<Owner>> {
        option::of((1..=u128::MAX).prop_map(Owner::new))
    }

    pub(in super::super) fn note() -> impl Strategy<Value = Note> {
        let passed = option::of(any::<(u64, u64)>());
        (passed, option::of((any::<(u64, u64)>(), ".{0,9}"))).prop_map(|(passed, tried)| {
            let record = |(hi, lo)| Record::new(Offset::new(hi, lo), SystemTime::UNIX_EPOCH, "payload");
            let note = passed.map_or_else(Note::default, |passed| Note::after(&record(passed)));
            note.with_tried(tried.map(|((hi, lo), reason)| Tried::new(Offset::new(hi, lo), &reason)))
        })
    }

    pub(in super::super) fn journal() -> impl Strategy<Value = Journal> {
        let action = prop_oneof![
            Just(OperatorAction::Pause),
            Just(OperatorAction::Resume),
            any::<u64>().prop_map(|offset| OperatorAction::Skip(offset.into())),
        ];
        vec(("[a-zü]{0,9}", "[a-zü]{0,9}", action), 0..3).prop_map(|entries| {
            let add = |journal: Journal, (by, why, action)| journal.with(&Operator::new(by).because(why), action);
            entries
                .into_iter()
                .fold(Journal::default(), |journal, (by, why, action): (String, String, _)| {
                    add(journal, (by, why, action))
                })
        })
    }

    fn bytes() -> impl Strategy<Value = Bytes> {
        vec(any::<u8>(), 0..40).prop_map(Bytes::from)
    }

    pub(in super::super) fn change() -> impl Strategy<Value = StateChange> {
        let windows = vec((numbering(), any::<u64>().prop_map(Window::new)), 0..4);
        let writes = vec((bytes(), option::of(bytes())), 0..6);
        (windows, vec(numbering(), 0..3), writes, option::of(sent()), letters()).prop_map(
            |(windows, forgotten, writes, sent, letters)| StateChange {
                windows,
                forgotten,
                writes,
                sent,
                letters,
            },
        )
    }

    /// Often nothing, as in most commits.
    fn letters() -> impl Strategy<Value = LettersChange> {
        let letter = || dead_letter().prop_map(|letter| Arc::new(Letter::new(&letter)));
        let changes = (
            option::of((0u64..2, 0u64..6)),
            vec((0u64..2, 0u64..6), 0..2),
            vec(letter(), 0..2),
            vec(letter(), 0..3),
        );
        let offset = |(hi, lo)| Offset::new(hi, lo);
        option::of(changes).prop_map(move |changes| {
            let Some((removed_from, removed, updated, parked)) = changes else {
                return LettersChange::default();
            };
            LettersChange {
                removed_from: removed_from.map(offset),
                removed: removed.into_iter().map(offset).collect(),
                updated: updated
                    .into_iter()
                    .map(|letter| (letter.offset, letter.status.clone()))
                    .collect(),
                parked,
            }
        })
    }

    pub(in super::super) fn log() -> impl Strategy<Value = LogId> {
        ("[a-z]{1,9}", option::of("[a-z0-9]{1,9}")).prop_map(|(name, incarnation)| {
            let log = LogId::new(name).expect("name");
            match incarnation {
                Some(incarnation) => log.with_incarnation(incarnation).expect("name"),
                None => log,
            }
        })
    }

    prop_compose! {
        fn commit()(
            token in any::<u128>(),
            parent in any::<u128>(),
            (expected, revision) in (revision(), revision()),
            log in log(),
            next in any::<(u64, u64)>(),
            (owner, note) in (owner(), note()),
            journal in option::of(journal()),
            change in change(),
        ) -> Commit<StateChange> {
            let next = Offset::new(next.0, next.1);
            Commit { token, parent, expected, revision, log, next, owner, note, journal, change }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn entries_round_trip(commit in commit(), token in any::<u128>()) {
            let encoded = Bytes::from(encode_commit(&commit));
            prop_assert_eq!(parse(encoded.clone()), Parsed::Entry(Entry::Commit(commit)));
            prop_assert_eq!(parse(encode_mark(token).into()), Parsed::Entry(Entry::Mark(token)));
            for cut in MAGIC.len()..encoded.len() {
                prop_assert!(matches!(parse(encoded.slice(..cut)), Parsed::Unreadable(_)), "cut at {}", cut);
            }
            let longer = [&encoded[..], b"x"].concat();
            prop_assert!(matches!(parse(longer.into()), Parsed::Unreadable(_)));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
            let _ = parse(bytes.clone().into());
            for version in FIRST_VERSION..=OUTBOX_VERSION {
                for kind in [COMMIT, MARK] {
                    let _ = parse([header(version, kind, 1), bytes.clone()].concat().into());
                }
            }
        }

        #[test]
        fn a_damaged_byte_never_panics(commit in commit(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut encoded = encode_commit(&commit);
            let at = at.index(encoded.len());
            encoded[at] = byte;
            let _ = parse(encoded.into());
        }
    }

    #[test]
    fn what_is_not_ours_is_foreign_and_another_version_is_not() {
        for foreign in ["", "eo-entr", "hello"] {
            assert_eq!(parse(foreign.into()), Parsed::Foreign, "{foreign:?}");
        }
        let mut newer = encode_mark(1);
        newer[MAGIC.len()] = OUTBOX_VERSION + 1;
        assert!(matches!(parse(newer.into()), Parsed::Unreadable(why) if why.contains("version")));
    }
}
