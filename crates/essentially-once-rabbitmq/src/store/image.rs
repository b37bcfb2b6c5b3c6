//! A fold as messages, so that a changelog need not be read from its first entry.
//!
//! A snapshot is cut into chunks, one per message. Each chunk names its snapshot, its index and the
//! snapshot's changelog offset, and carries a checksum. A snapshot is complete when all of its
//! chunks are there. It needs no other mark, and the chunks of several writers may be mixed.

use std::collections::HashMap;

use bytes::{BufMut as _, Bytes};
use essentially_once::backend::{Journal, Note, unique};

use super::{
    entry::{put_owner, read_journal, read_note, read_owner},
    letter_index::Letters,
    rule::Fold,
    sending::Outboxes,
    state::State,
    wire::{Decoded, Reader, put_bytes, put_log, put_offset, put_revision, put_window},
};

const MAGIC: &[u8] = b"eo-chunk";
const VERSION: u8 = 2;
/// The version of snapshots written before 0.2, without epochs and owners.
const FIRST_VERSION: u8 = 1;
/// The version of snapshots with dead letters. A process that cannot keep letters ignores them, and
/// then stops at the commits that parked the letters.
const LETTERS_VERSION: u8 = 3;
/// The version of snapshots with a journal or an edited letter. A process that does not know them
/// likewise stops at the commits that wrote them.
const JOURNAL_VERSION: u8 = 4;
/// The version of snapshots with outboxes. A process that does not know them likewise stops at the
/// commits that sent to them.
const OUTBOX_VERSION: u8 = 5;

/// Bytes of state in a chunk, unless the broker only takes smaller messages.
pub(super) const CHUNK: usize = 1024 * 1024;

/// Bytes of a chunk before its state.
pub(super) const CHUNK_HEAD: usize = MAGIC.len() + 1 + 16 + 8 + 3 * 4;

/// A snapshot that is ready to be written.
pub(super) struct Image {
    version: u8,
    id: u128,
    /// Entries before this offset of the changelog are in it.
    pub(super) offset: u64,
    body: Bytes,
}

impl Image {
    pub(super) fn new(fold: &Fold<State>) -> Self {
        let id = unique();
        let mut body = Vec::with_capacity(fold.size());
        put_fold(&mut body, fold);
        let version = version(fold);
        if version >= LETTERS_VERSION {
            fold.state.letters.encode(&mut body);
        }
        if version >= JOURNAL_VERSION {
            put_bytes(&mut body, &fold.journal.encode());
        }
        if version >= OUTBOX_VERSION {
            fold.state.outboxes.encode(&mut body);
        }
        Self {
            version,
            id,
            offset: fold.offset,
            body: body.into(),
        }
    }

    pub(super) fn size(&self) -> usize {
        self.body.len()
    }

    /// The messages of the snapshot, in order, each with `size` bytes of state.
    pub(super) fn chunks(&self, size: usize) -> impl Iterator<Item = Vec<u8>> {
        // A fold always has some bytes, so there is a chunk.
        let chunks = self.body.chunks(size);
        let count = chunks.len() as u32;
        (0..).zip(chunks).map(move |(index, part): (u32, _)| {
            let mut message = Vec::with_capacity(CHUNK_HEAD + part.len());
            message.put_slice(MAGIC);
            message.put_u8(self.version);
            message.put_u128(self.id);
            message.put_u64(self.offset);
            message.put_u32(index);
            message.put_u32(count);
            message.put_u32(crc32fast::hash(part));
            message.put_slice(part);
            message
        })
    }
}

/// One message of a snapshot.
#[cfg_attr(test, derive(Clone))]
pub(super) struct Chunk {
    version: u8,
    id: u128,
    pub(super) offset: u64,
    index: u32,
    pub(super) count: u32,
    part: Bytes,
}

impl Chunk {
    /// Decodes a message, or says why it is not part of a snapshot.
    pub(super) fn decode(bytes: Bytes) -> Decoded<Self> {
        if !bytes.starts_with(MAGIC) {
            return Err("it is not part of a snapshot");
        }
        let mut reader = Reader::new(bytes.slice(MAGIC.len()..));
        let version = reader.u8()?;
        if !(FIRST_VERSION..=OUTBOX_VERSION).contains(&version) {
            return Err("it was written by another version of this crate");
        }
        let (id, offset) = (reader.u128()?, reader.u64()?);
        let (index, count) = (reader.u32()?, reader.u32()?);
        let checksum = reader.u32()?;
        let part = reader.rest().clone();
        if index >= count || crc32fast::hash(&part) != checksum {
            return Err("it is damaged");
        }
        Ok(Self {
            version,
            id,
            offset,
            index,
            count,
            part,
        })
    }
}

/// Puts chunks together. It keeps the parts of one snapshot at a time: of the last one that was
/// begun, since most incomplete snapshots stay incomplete.
#[derive(Default)]
pub(super) struct Assembly {
    /// If set, all other snapshots are ignored.
    only: Option<u128>,
    /// The number of chunks seen of each snapshot, and the stream offset of its first.
    begun: HashMap<u128, (u32, u64)>,
    kept: Option<(u128, Vec<Bytes>)>,
}

/// What a chunk completes.
pub(super) enum Added {
    Nothing,
    Whole(Whole),
    /// All chunks of a snapshot were seen, but another snapshot was begun between them. It must be
    /// read again, alone, from this stream offset.
    Scattered {
        id: u128,
        offset: u64,
        from: u64,
    },
}

/// All chunks of a snapshot.
pub(super) struct Whole {
    version: u8,
    pub(super) offset: u64,
    parts: Vec<Bytes>,
}

impl Assembly {
    /// Assembles that snapshot alone.
    pub(super) fn only(id: u128) -> Self {
        Self {
            only: Some(id),
            ..Self::default()
        }
    }

    /// Adds the next chunk, which is at that offset of the stream.
    pub(super) fn add(&mut self, at: u64, chunk: Chunk) -> Added {
        let (id, offset) = (chunk.id, chunk.offset);
        if self.only.is_some_and(|only| only != id) {
            return Added::Nothing;
        }
        if chunk.index == 0 {
            self.begun.insert(id, (0, at));
            self.kept = Some((id, Vec::new()));
        }
        // The chunks of one writer keep their order.
        let from = match self.begun.get_mut(&id) {
            Some((come, from)) if *come == chunk.index => {
                *come += 1;
                *from
            }
            _ => {
                self.forget(id);
                return Added::Nothing;
            }
        };
        if let Some((_, parts)) = self.kept.as_mut().filter(|(kept, _)| *kept == id) {
            parts.push(chunk.part);
        }
        if chunk.index + 1 < chunk.count {
            return Added::Nothing;
        }
        match self.forget(id) {
            Some(parts) => Added::Whole(Whole {
                version: chunk.version,
                offset,
                parts,
            }),
            None => Added::Scattered { id, offset, from },
        }
    }

    /// Returns the parts of the snapshot if they were kept.
    fn forget(&mut self, id: u128) -> Option<Vec<Bytes>> {
        self.begun.remove(&id);
        self.kept.take_if(|(kept, _)| *kept == id).map(|(_, parts)| parts)
    }
}

impl Whole {
    /// Decodes the fold. This takes time in proportion to the state.
    pub(super) fn read(self) -> Decoded<Fold<State>> {
        let Self { version, offset, parts } = self;
        let body = parts.concat();
        drop(parts);
        let fold = read_fold(version, body.into())?;
        match fold.offset == offset {
            true => Ok(fold),
            false => Err("its chunks and its body name different offsets"),
        }
    }
}

/// The lowest version that holds the fold.
fn version(fold: &Fold<State>) -> u8 {
    let State { letters, outboxes, .. } = &fold.state;
    if !outboxes.is_empty() {
        OUTBOX_VERSION
    } else if fold.journal != Journal::default() || letters.have_edits() {
        JOURNAL_VERSION
    } else if !letters.is_empty() {
        LETTERS_VERSION
    } else {
        VERSION
    }
}

fn put_fold(out: &mut Vec<u8>, fold: &Fold<State>) {
    out.put_u64(fold.offset);
    put_revision(out, fold.revision);
    out.put_u128(fold.token);
    out.put_u8(fold.place.is_some().into());
    if let Some((log, next)) = &fold.place {
        put_log(out, log);
        put_offset(out, *next);
    }
    put_owner(out, fold.owner);
    put_bytes(out, &fold.note.encode());
    put_offset(out, fold.state.sent_end);
    out.put_u32(fold.state.windows().len() as u32);
    for (numbering, window) in fold.state.windows() {
        put_window(out, numbering, window);
    }
    out.put_u32(fold.state.values().len() as u32);
    for (key, value) in fold.state.values() {
        put_bytes(out, key);
        put_bytes(out, value);
    }
}

fn read_fold(version: u8, bytes: Bytes) -> Decoded<Fold<State>> {
    let mut reader = Reader::new(bytes);
    let (offset, revision, token) = (reader.u64()?, reader.revision(version)?, reader.u128()?);
    let place = match reader.u8()? {
        0 => None,
        1 => Some((reader.log()?, reader.offset()?)),
        _ => return Err("the flag of its position is neither 0 nor 1"),
    };
    let (owner, note) = match version {
        FIRST_VERSION => (None, Note::default()),
        _ => (read_owner(&mut reader)?, read_note(&mut reader)?),
    };
    let mut state = State::default();
    state.sent_end = reader.offset()?;
    for _ in 0..reader.u32()? {
        let (numbering, window) = reader.window(version)?;
        state.set_window(numbering, window);
    }
    for _ in 0..reader.u32()? {
        let (key, value) = (reader.bytes()?, reader.bytes()?);
        state.put(&key, &value);
    }
    if version >= LETTERS_VERSION {
        state.letters = Letters::decode(&mut reader)?;
    }
    let journal = match version {
        JOURNAL_VERSION.. => read_journal(&mut reader)?,
        _ => Journal::default(),
    };
    if version >= OUTBOX_VERSION {
        state.outboxes = Outboxes::decode(&mut reader)?;
    }
    reader.finish()?;
    Ok(Fold {
        offset,
        revision,
        token,
        place,
        owner,
        beats: 0,
        note,
        journal,
        state,
    })
}

#[cfg(test)]
mod tests {
    use essentially_once::{
        Offset,
        consumer::{Operator, OperatorAction},
    };
    use proptest::{collection::vec, option, prelude::*};

    use super::{
        super::{
            entry::{
                fixtures::bodies,
                tests::{change, journal, log, note, owner, revision},
            },
            rule::Change as _,
            sending::tests::part,
        },
        *,
    };

    prop_compose! {
        fn fold()(
            numbers in any::<(u64, u128)>(),
            place in option::of((log(), any::<(u64, u64)>())),
            revision in revision(),
            (owner, note, journal) in (owner(), note(), journal()),
            changes in vec(change(), 0..4),
        ) -> Fold<State> {
            let mut state = State::default();
            for change in changes {
                change.apply(numbers.0, &mut state);
            }
            let place = place.map(|(log, (hi, lo))| (log, Offset::new(hi, lo)));
            Fold { offset: numbers.0, revision, token: numbers.1, place, owner, beats: 0, note, journal, state }
        }
    }

    fn chunks(image: &Image) -> Vec<Chunk> {
        image
            .chunks(CHUNK)
            .map(|chunk| Chunk::decode(chunk.into()).expect("decodes"))
            .collect()
    }

    /// The snapshots in the chunks. Scattered ones are read again.
    fn read_all(mut assembly: Assembly, chunks: Vec<Chunk>) -> Vec<Decoded<Fold<State>>> {
        let mut read = Vec::new();
        for (at, chunk) in (0..).zip(&chunks) {
            match assembly.add(at, chunk.clone()) {
                Added::Nothing => {}
                Added::Whole(whole) => read.push(whole.read()),
                Added::Scattered { id, from, .. } => {
                    let again = chunks[from as usize..].to_vec();
                    read.extend(read_all(Assembly::only(id), again));
                }
            }
        }
        read
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn snapshots_round_trip(fold in fold()) {
            let read = read_all(Assembly::default(), chunks(&Image::new(&fold)));
            prop_assert_eq!(read, [Ok(fold)]);
        }

        #[test]
        fn damage_is_seen(fold in fold(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let image = Image::new(&fold);
            let mut message = image.chunks(CHUNK).next().expect("a chunk");
            let at = at.index(message.len());
            message[at] ^= flip;
            // A wrong id or offset in the header is not damage that a chunk detects. The body
            // repeats the offset.
            if let Ok(chunk) = Chunk::decode(message.into())
                && let Added::Whole(whole) = Assembly::default().add(0, chunk)
                && let Ok(read) = whole.read()
            {
                prop_assert_eq!(read, fold);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
            let _ = Chunk::decode(bytes.clone().into());
            let _ = Chunk::decode([MAGIC, &[VERSION], &bytes].concat().into());
            for version in FIRST_VERSION..=OUTBOX_VERSION {
                let _ = read_fold(version, bytes.clone().into());
            }
        }
    }

    /// So a process of an earlier state of 0.2 can read them.
    #[test]
    fn snapshots_without_newer_parts_are_encoded_as_they_were() {
        for (fixture, version) in [
            (include_str!("../../tests/fixtures/version-2.txt"), VERSION),
            (include_str!("../../tests/fixtures/version-3.txt"), LETTERS_VERSION),
            (include_str!("../../tests/fixtures/version-4.txt"), JOURNAL_VERSION),
        ] {
            let body = bodies(fixture)
                .find(|body| body.starts_with(MAGIC))
                .expect("a snapshot");
            let chunk = Chunk::decode(body.into()).expect("decodes");
            let (bytes, count) = (chunk.part.len(), chunk.count);
            assert_eq!((chunk.version, count), (version, 1));
            let Added::Whole(whole) = Assembly::default().add(0, chunk) else {
                panic!("it is not whole")
            };
            let mut fold = whole.read().expect("a fold");
            let again = Image::new(&fold);
            assert_eq!((again.version, again.size()), (version, bytes));
            fold.journal = fold.journal.with(&Operator::new("ann"), OperatorAction::Pause);
            let paused = Image::new(&fold);
            assert_eq!(paused.version, JOURNAL_VERSION);
            assert_eq!(read_all(Assembly::default(), chunks(&paused)), [Ok(fold.clone())]);
            fold.journal = Journal::default();
            fold.state.outboxes.apply(7, vec![part("billing", &[0])]);
            let sending = Image::new(&fold);
            assert_eq!(sending.version, OUTBOX_VERSION);
            assert_eq!(read_all(Assembly::default(), chunks(&sending)), [Ok(fold)]);
        }
    }

    #[test]
    fn chunks_of_two_writers_may_come_mixed_and_a_lost_one_is_missed() {
        let mut fold = Fold::<State>::default();
        for key in 0..5u8 {
            fold.state.put(&[key], &vec![key; CHUNK / 2]);
        }
        let (one, two) = (Image::new(&fold), Image::new(&fold));
        assert!(one.size() > 2 * CHUNK);
        let mixed = || {
            chunks(&one)
                .into_iter()
                .zip(chunks(&two))
                .flat_map(|(one, two)| [one, two])
                .collect()
        };
        assert_eq!(
            read_all(Assembly::default(), mixed()),
            [Ok(fold.clone()), Ok(fold.clone())]
        );
        for missing in 0..3 {
            let mut cut = chunks(&one);
            cut.remove(missing);
            assert!(
                read_all(Assembly::default(), cut).is_empty(),
                "chunk {missing} is missing"
            );
        }
    }

    #[test]
    fn of_snapshots_that_are_not_complete_only_the_last_is_kept() {
        let mut fold = Fold::<State>::default();
        for key in 0..5u8 {
            fold.state.put(&[key], &vec![key; CHUNK / 2]);
        }
        let mut assembly = Assembly::default();
        for round in 0..10 {
            let mut chunks = chunks(&Image::new(&fold));
            chunks.pop();
            for (at, chunk) in (round * 10..).zip(chunks) {
                assert!(matches!(assembly.add(at, chunk), Added::Nothing));
            }
            let kept: usize = assembly.kept.iter().flat_map(|(_, parts)| parts).map(Bytes::len).sum();
            assert_eq!(kept, 2 * CHUNK);
        }
        assert_eq!(read_all(assembly, chunks(&Image::new(&fold))), [Ok(fold)]);
    }
}
