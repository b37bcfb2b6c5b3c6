//! A fold as messages, so that a changelog need not be read from its first entry.
//!
//! A snapshot is cut into chunks, one a message. Each names its snapshot, its place in it and the changelog's offset that the
//! snapshot stands for, and carries a checksum. A snapshot is complete when all its chunks are there: no other mark is needed, and
//! those of several writers may come mixed.

use std::collections::HashMap;

use bytes::{BufMut as _, Bytes};

use super::{
    fold::Fold,
    state::State,
    wire::{Decoded, Reader, put_bytes, put_log, put_offset, put_window},
};

const MAGIC: &[u8] = b"eo-chunk";
const VERSION: u8 = 1;

/// Bytes of state in a chunk, unless the broker takes only smaller messages.
pub(super) const CHUNK: usize = 1024 * 1024;

/// Bytes of a chunk before its state.
pub(super) const CHUNK_HEAD: usize = MAGIC.len() + 1 + 16 + 8 + 3 * 4;

/// A snapshot that is ready to be written.
pub(super) struct Image {
    id: u128,
    /// Entries before this offset of the changelog are in it.
    pub(super) offset: u64,
    body: Bytes,
}

impl Image {
    pub(super) fn new(fold: &Fold<State>) -> Self {
        let id = u128::from(fastrand::u64(..)) << 64 | u128::from(fastrand::u64(..));
        let mut body = Vec::with_capacity(fold.state.size());
        put_fold(&mut body, fold);
        Self {
            id,
            offset: fold.offset,
            body: body.into(),
        }
    }

    pub(super) fn size(&self) -> usize {
        self.body.len()
    }

    /// Its messages, in order, each with so many bytes of state.
    pub(super) fn chunks(&self, size: usize) -> impl Iterator<Item = Vec<u8>> {
        // A fold is never without bytes, so there is a chunk.
        let chunks = self.body.chunks(size);
        let count = chunks.len() as u32;
        (0..).zip(chunks).map(move |(index, part): (u32, _)| {
            let mut message = Vec::with_capacity(CHUNK_HEAD + part.len());
            message.put_slice(MAGIC);
            message.put_u8(VERSION);
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
pub(super) struct Chunk {
    id: u128,
    pub(super) offset: u64,
    index: u32,
    pub(super) count: u32,
    part: Bytes,
}

impl Chunk {
    /// Reads a message, or tells why it is none of a snapshot.
    pub(super) fn decode(bytes: Bytes) -> Decoded<Self> {
        if !bytes.starts_with(MAGIC) {
            return Err("it is no part of a snapshot");
        }
        let mut reader = Reader::new(bytes.slice(MAGIC.len()..));
        if reader.u8()? != VERSION {
            return Err("it was written by another version of this crate");
        }
        let (id, offset) = (reader.u128()?, reader.u64()?);
        let (index, count) = (reader.u32()?, reader.u32()?);
        let checksum = reader.u32()?;
        let part = reader.rest();
        if index >= count || crc32fast::hash(&part) != checksum {
            return Err("it is damaged");
        }
        Ok(Self {
            id,
            offset,
            index,
            count,
            part,
        })
    }
}

/// Puts chunks together.
#[derive(Default)]
pub(super) struct Assembly {
    open: HashMap<u128, Vec<Chunk>>,
}

impl Assembly {
    /// Takes the next chunk, and returns the fold that it completes.
    pub(super) fn add(&mut self, chunk: Chunk) -> Option<Decoded<Fold<State>>> {
        let (id, count, offset) = (chunk.id, chunk.count, chunk.offset);
        let parts = self.open.entry(id).or_default();
        // One writer's chunks keep their order.
        if chunk.index as usize != parts.len() {
            self.open.remove(&id);
            return None;
        }
        parts.push(chunk);
        if parts.len() < count as usize {
            return None;
        }
        let parts = self.open.remove(&id)?;
        let body = parts.iter().map(|chunk| &chunk.part[..]).collect::<Vec<_>>().concat();
        drop(parts);
        Some(read_fold(body.into()).and_then(|fold| {
            if fold.offset == offset {
                Ok(fold)
            } else {
                Err("its chunks name another offset than its body")
            }
        }))
    }
}

fn put_fold(out: &mut Vec<u8>, fold: &Fold<State>) {
    out.put_u64(fold.offset);
    out.put_u64(fold.revision);
    out.put_u128(fold.token);
    out.put_u8(fold.place.is_some().into());
    if let Some((log, next)) = &fold.place {
        put_log(out, log);
        put_offset(out, *next);
    }
    put_offset(out, fold.state.sent_end);
    out.put_u32(fold.state.windows().len() as u32);
    for (producer, window) in fold.state.windows() {
        put_window(out, producer, window);
    }
    out.put_u32(fold.state.values().len() as u32);
    for (key, value) in fold.state.values() {
        put_bytes(out, key);
        put_bytes(out, value);
    }
}

fn read_fold(bytes: Bytes) -> Decoded<Fold<State>> {
    let mut reader = Reader::new(bytes);
    let (offset, revision, token) = (reader.u64()?, reader.u64()?, reader.u128()?);
    let place = match reader.u8()? {
        0 => None,
        1 => Some((reader.log()?, reader.offset()?)),
        _ => return Err("its position is neither there nor absent"),
    };
    let mut state = State::default();
    state.sent_end = reader.offset()?;
    for _ in 0..reader.u32()? {
        let (producer, window) = reader.window()?;
        state.set_window(producer, window);
    }
    for _ in 0..reader.u32()? {
        let (key, value) = (reader.bytes()?, reader.bytes()?);
        state.put(&key, &value);
    }
    reader.finish()?;
    Ok(Fold {
        offset,
        revision,
        token,
        place,
        state,
    })
}

#[cfg(test)]
mod tests {
    use essentially_once::Offset;
    use proptest::{collection::vec, option, prelude::*};

    use super::{
        super::{
            entry::tests::{change, log},
            fold::Change as _,
        },
        *,
    };

    prop_compose! {
        fn fold()(
            numbers in any::<(u64, u64, u128)>(),
            place in option::of((log(), any::<(u64, u64)>())),
            changes in vec(change(), 0..4),
        ) -> Fold<State> {
            let mut state = State::default();
            for change in changes {
                change.apply(numbers.0, &mut state);
            }
            let place = place.map(|(log, (hi, lo))| (log, Offset::new(hi, lo)));
            Fold { offset: numbers.0, revision: numbers.1, token: numbers.2, place, state }
        }
    }

    fn chunks(image: &Image) -> Vec<Chunk> {
        image
            .chunks(CHUNK)
            .map(|chunk| Chunk::decode(chunk.into()).expect("decodes"))
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn snapshots_round_trip(fold in fold()) {
            let mut assembly = Assembly::default();
            let read = chunks(&Image::new(&fold)).into_iter().find_map(|chunk| assembly.add(chunk));
            prop_assert_eq!(read, Some(Ok(fold)));
        }

        #[test]
        fn damage_is_seen(fold in fold(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let image = Image::new(&fold);
            let mut message = image.chunks(CHUNK).next().expect("a chunk");
            let at = at.index(message.len());
            message[at] ^= flip;
            // Of its header, a wrong id or offset is not damage that a chunk shows; the offset stands in the body again.
            if let Ok(chunk) = Chunk::decode(message.into())
                && let Some(Ok(read)) = Assembly::default().add(chunk)
            {
                prop_assert_eq!(read, fold);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
            let _ = Chunk::decode(bytes.clone().into());
            let _ = Chunk::decode([MAGIC, &[VERSION], &bytes].concat().into());
            let _ = read_fold(bytes.into());
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
        let mut assembly = Assembly::default();
        let mixed = chunks(&one)
            .into_iter()
            .zip(chunks(&two))
            .flat_map(|(one, two)| [one, two]);
        let read: Vec<_> = mixed.filter_map(|chunk| assembly.add(chunk)).collect();
        assert_eq!(read, [Ok(fold.clone()), Ok(fold.clone())]);
        for missing in 0..3 {
            let mut cut = chunks(&one);
            cut.remove(missing);
            assert!(
                cut.into_iter().all(|chunk| assembly.add(chunk).is_none()),
                "chunk {missing} is missing"
            );
        }
    }
}
