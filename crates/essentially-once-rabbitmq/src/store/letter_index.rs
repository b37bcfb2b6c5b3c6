//! The dead letters of one consumer, indexed by offset, by key and by due time.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use bytes::{BufMut as _, Bytes};
use essentially_once::Offset;

use super::{
    letter::{Letter, Status},
    wire::{Decoded, Reader, put_offset},
};

/// Letters in memory. Every read takes time in proportion to what it returns.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Letters {
    letters: BTreeMap<Offset, Arc<Letter>>,
    keys: BTreeMap<Bytes, BTreeSet<Offset>>,
    due: BTreeSet<(i64, Offset)>,
    /// About how much memory they take.
    size: usize,
}

impl Letters {
    pub(super) fn len(&self) -> usize {
        self.letters.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.letters.is_empty()
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn get(&self, offset: Offset) -> Option<&Arc<Letter>> {
        self.letters.get(&offset)
    }

    /// The letters at and after an offset.
    pub(super) fn from(&self, offset: Offset) -> impl Iterator<Item = &Arc<Letter>> {
        self.letters.range(offset..).map(|(_, letter)| letter)
    }

    /// The letters after an offset, or all.
    pub(super) fn after(&self, offset: Option<Offset>) -> impl Iterator<Item = &Arc<Letter>> {
        let from = offset.map_or(Bound::Unbounded, Bound::Excluded);
        let after = self.letters.range((from, Bound::Unbounded));
        after.map(|(_, letter)| letter)
    }

    /// The offsets of a key's letters, in order.
    pub(super) fn of_key(&self, key: &[u8]) -> impl Iterator<Item = Offset> {
        self.keys.get(key).into_iter().flatten().copied()
    }

    /// The keys after a key, or all, with the number of their letters.
    pub(super) fn keys_after(&self, key: Option<&[u8]>) -> impl Iterator<Item = (&Bytes, usize)> {
        let from = key.map_or(Bound::Unbounded, Bound::Excluded);
        let after = self.keys.range::<[u8], _>((from, Bound::Unbounded));
        after.map(|(key, offsets)| (key, offsets.len()))
    }

    /// The letters that are due at some time, in the order of those times.
    pub(super) fn due(&self) -> impl Iterator<Item = (i64, Offset)> {
        self.due.iter().copied()
    }

    /// Replaces the letter with the same offset.
    pub(super) fn insert(&mut self, letter: Arc<Letter>) {
        self.remove(letter.offset);
        self.size += letter.size();
        if let Some(key) = &letter.key {
            self.keys.entry(key.clone()).or_default().insert(letter.offset);
        }
        if let Some(due) = letter.status.due {
            self.due.insert((due, letter.offset));
        }
        self.letters.insert(letter.offset, letter);
    }

    pub(super) fn remove(&mut self, offset: Offset) -> Option<Arc<Letter>> {
        let letter = self.letters.remove(&offset)?;
        self.size -= letter.size();
        if let Some(key) = &letter.key
            && let Some(offsets) = self.keys.get_mut(key)
        {
            offsets.remove(&offset);
            if offsets.is_empty() {
                self.keys.remove(key);
            }
        }
        if let Some(due) = letter.status.due {
            self.due.remove(&(due, offset));
        }
        Some(letter)
    }

    /// Whether an operator edited any of them.
    pub(super) fn have_edits(&self) -> bool {
        self.letters.values().any(|letter| letter.is_edited())
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.len() as u32);
        for letter in self.letters.values() {
            letter.encode(out);
        }
    }

    pub(super) fn decode(reader: &mut Reader) -> Decoded<Self> {
        let mut letters = Self::default();
        for _ in 0..reader.u32()? {
            letters.insert(Arc::new(Letter::decode(reader)?.detached()));
        }
        Ok(letters)
    }

    pub(super) fn apply(&mut self, change: LettersChange) {
        if let Some(from) = change.removed_from {
            let removed: Vec<_> = self.from(from).map(|letter| letter.offset).collect();
            for offset in removed {
                self.remove(offset);
            }
        }
        for offset in change.removed {
            self.remove(offset);
        }
        for (offset, status) in change.updated {
            // Its writer had read the same letters, so it exists.
            if let Some(letter) = self.get(offset) {
                self.insert(Arc::new(letter.with(status)));
            }
        }
        for letter in change.parked {
            self.insert(Arc::new(letter.detached()));
        }
    }

    /// The size after the change.
    pub(super) fn size_after(&self, change: &LettersChange) -> usize {
        let mut size = self.size;
        if let Some(from) = change.removed_from {
            size -= self.from(from).map(|letter| letter.size()).sum::<usize>();
        }
        let is_left = |offset: &Offset| change.removed_from.is_none_or(|from| *offset < from);
        let parked = change.parked.iter().map(|letter| letter.offset);
        let replaced = change.removed.iter().copied().chain(parked).filter(is_left);
        let replaced = replaced.filter_map(|offset| self.get(offset));
        size -= replaced.map(|letter| letter.size()).sum::<usize>();
        for (offset, status) in &change.updated {
            size += status.text();
            size -= self.get(*offset).map_or(0, |letter| letter.status.text());
        }
        size + change.parked.iter().map(|letter| letter.size()).sum::<usize>()
    }
}

/// What one commit changes, in the order in which it applies. No offset is in two of its lists.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct LettersChange {
    /// Removes the letters at and after this offset.
    pub(super) removed_from: Option<Offset>,
    pub(super) removed: Vec<Offset>,
    /// Letters that keep their record. Not to repeat it makes a try of a large one cheap.
    pub(super) updated: Vec<(Offset, Status)>,
    pub(super) parked: Vec<Arc<Letter>>,
}

impl LettersChange {
    pub(super) fn is_empty(&self) -> bool {
        self.removed_from.is_none() && self.removed.is_empty() && self.updated.is_empty() && self.parked.is_empty()
    }

    /// Whether it parks letters that an operator edited.
    pub(super) fn have_edits(&self) -> bool {
        self.parked.iter().any(|letter| letter.is_edited())
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(self.removed_from.is_some().into());
        if let Some(from) = self.removed_from {
            put_offset(out, from);
        }
        out.put_u32(self.removed.len() as u32);
        for offset in &self.removed {
            put_offset(out, *offset);
        }
        out.put_u32(self.updated.len() as u32);
        for (offset, status) in &self.updated {
            put_offset(out, *offset);
            status.encode(out);
        }
        out.put_u32(self.parked.len() as u32);
        for letter in &self.parked {
            letter.encode(out);
        }
    }

    pub(super) fn decode(reader: &mut Reader) -> Decoded<Self> {
        Ok(Self {
            removed_from: match reader.u8()? {
                0 => None,
                1 => Some(reader.offset()?),
                _ => return Err("the flag of its removed letters is neither 0 nor 1"),
            },
            removed: reader.list(Reader::offset)?,
            updated: reader.list(|reader| Ok((reader.offset()?, Status::decode(reader)?)))?,
            parked: reader.list(|reader| Letter::decode(reader).map(Arc::new))?,
        })
    }
}
