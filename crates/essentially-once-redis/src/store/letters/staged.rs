//! What a transaction has staged, and the commands that write it.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    ops::{Deref, DerefMut},
};

use bytes::Bytes;
use essentially_once::{Offset, backend::DeadLetter};

use super::codec;
use crate::store::keys::LetterKeys;

/// Lua passes at most 8,000 arguments.
const PER_COMMAND: usize = 1_000;

/// The [`Contents`], which most transactions do not have. To them it is a null pointer, because
/// every commit moves its transaction several times.
#[derive(Default)]
pub(crate) struct Letters(Option<Box<Contents>>);

impl Deref for Letters {
    type Target = Contents;

    fn deref(&self) -> &Contents {
        static EMPTY: Contents = Contents::new();
        self.0.as_deref().unwrap_or(&EMPTY)
    }
}

impl DerefMut for Letters {
    fn deref_mut(&mut self) -> &mut Contents {
        self.0.get_or_insert_with(|| Box::new(Contents::new()))
    }
}

/// What a transaction has staged, and what it knows about the stored letters. It may rely on that,
/// because a commit that changes the stored letters fences it.
pub(crate) struct Contents {
    pub(super) staged: BTreeMap<Offset, Change>,
    /// The number of stored letters; `None` if it was not read yet.
    pub(super) stored: Option<u64>,
    /// Stored letters that a read has found or missed.
    pub(super) seen: BTreeMap<Offset, Option<Entry>>,
    /// All stored letters of a key before this offset are staged to change.
    pub(super) heads: BTreeMap<Bytes, Offset>,
    /// The bytes that a commit sends.
    bytes: usize,
}

/// A letter that a transaction changes. At least one of its sides exists.
pub(super) struct Change {
    pub(super) before: Option<Entry>,
    pub(super) after: Option<Staged>,
}

/// What the indices hold of a stored letter.
#[derive(Clone)]
pub(super) struct Entry {
    /// The [key](DeadLetter::key) of the letter.
    pub(super) key: Option<Bytes>,
}

/// A letter to store.
pub(super) struct Staged {
    pub(super) letter: DeadLetter,
    pub(super) value: Vec<u8>,
}

impl Change {
    fn key_before(&self) -> Option<&Bytes> {
        self.before.as_ref().and_then(|entry| entry.key.as_ref())
    }

    fn key_after(&self) -> Option<&Bytes> {
        self.letter().and_then(DeadLetter::key)
    }

    pub(super) fn letter(&self) -> Option<&DeadLetter> {
        self.after.as_ref().map(|staged| &staged.letter)
    }

    /// Whether the letter keeps its place in the indices by offset and by key.
    fn keeps_entry(&self) -> bool {
        self.before.is_some() && self.after.is_some() && self.key_before() == self.key_after()
    }

    /// About as many bytes as it takes in a commit.
    pub(super) fn size(&self) -> usize {
        let key = |key: Option<&Bytes>| 2 * key.map_or(0, Bytes::len);
        let value = self.after.as_ref().map_or(0, |staged| staged.value.len());
        value + key(self.key_before()) + key(self.key_after()) + 512
    }
}

/// A letter due earlier comes first, and of those due at one time, the one with the lowest offset.
pub(super) fn due_order(letter: &DeadLetter) -> (Option<i64>, Offset) {
    (letter.due.map(codec::millis), letter.record.offset)
}

impl Contents {
    const fn new() -> Self {
        Self {
            staged: BTreeMap::new(),
            stored: None,
            seen: BTreeMap::new(),
            heads: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// Whether a commit changes any letters.
    pub(crate) fn is_empty(&self) -> bool {
        self.staged.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.staged.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Stages a change in place of an earlier one.
    pub(super) fn set(&mut self, offset: Offset, change: Change) {
        if let Some(old) = self.staged.remove(&offset) {
            self.bytes -= old.size();
        }
        if change.before.is_some() || change.after.is_some() {
            self.bytes += change.size();
            self.staged.insert(offset, change);
        }
    }

    pub(super) fn see(&mut self, letter: &DeadLetter) {
        // A copy, because a slice would keep the whole letter in memory.
        let key = letter.key().map(|key| Bytes::copy_from_slice(key));
        self.seen.insert(letter.record.offset, Some(Entry { key }));
    }

    /// What a read or change before has shown about a stored letter.
    pub(super) fn known(&self, offset: Offset) -> Option<Option<Entry>> {
        match self.staged.get(&offset) {
            Some(change) => Some(change.before.clone()),
            None if self.stored == Some(0) => Some(None),
            None => self.seen.get(&offset).cloned(),
        }
    }

    pub(super) fn staged_head(&self, key: &[u8]) -> Option<&DeadLetter> {
        let mut letters = self.staged.values().filter_map(Change::letter);
        letters.find(|letter| letter.key().is_some_and(|other| other == key))
    }

    /// By how much the changes raise the number of letters of each key.
    pub(super) fn changed_counts(&self) -> BTreeMap<Bytes, i64> {
        let mut counts = BTreeMap::new();
        for change in self.staged.values() {
            for (key, by) in [(change.key_before(), -1), (change.key_after(), 1)] {
                if let Some(key) = key {
                    *counts.entry(key.clone()).or_default() += by;
                }
            }
        }
        counts
    }

    /// The commands that apply the changes. Those that free memory come first, so that a commit
    /// that removes letters also works while the server is out of memory.
    pub(crate) fn writes<'a>(&'a self, keys: &'a LetterKeys) -> Vec<Write<'a>> {
        let mut writes = [
            Write::new("HDEL", &keys.values, 1),
            Write::new("ZREM", &keys.by_offset, 1),
            Write::new("ZREM", &keys.by_key, 1),
            Write::new("ZREM", &keys.due, 1),
            Write::new("HSET", &keys.values, 2),
            Write::new("ZADD", &keys.by_offset, 2),
            Write::new("ZADD", &keys.by_key, 2),
            Write::new("ZADD", &keys.due, 2),
        ];
        let [
            hdel,
            zrem_offset,
            zrem_key,
            zrem_due,
            hset,
            zadd_offset,
            zadd_key,
            zadd_due,
        ] = &mut writes;
        for (offset, change) in &self.staged {
            let field = codec::field(*offset).into_bytes();
            let due = change.letter().and_then(|letter| letter.due).map(codec::millis);
            match due {
                Some(due) => zadd_due.push([due.to_string().into_bytes(), field.clone()]),
                None if change.before.is_some() => zrem_due.push([field.clone()]),
                None => {}
            }
            if !change.keeps_entry() {
                if change.before.is_some() {
                    let key = change.key_before();
                    zrem_offset.push([codec::member_by_offset(*offset, key.map(|key| &key[..]))]);
                    zrem_key.push(key.map(|key| codec::member_by_key(*offset, key)));
                }
                if change.after.is_some() {
                    let key = change.key_after();
                    let member = codec::member_by_offset(*offset, key.map(|key| &key[..]));
                    zadd_offset.push([b"0".to_vec(), member]);
                    zadd_key.push(
                        key.into_iter()
                            .flat_map(|key| [b"0".to_vec(), codec::member_by_key(*offset, key)]),
                    );
                }
            }
            match &change.after {
                Some(staged) => {
                    hset.push([field]);
                    hset.arguments.push(Cow::Borrowed(&staged.value));
                }
                None => hdel.push([field]),
            }
        }
        writes.into_iter().filter(|write| !write.arguments.is_empty()).collect()
    }
}

/// A command with any number of arguments.
pub(crate) struct Write<'a> {
    pub(crate) verb: &'static str,
    pub(crate) key: &'a str,
    /// The number of arguments that belong together.
    step: usize,
    arguments: Vec<Cow<'a, [u8]>>,
}

impl<'a> Write<'a> {
    const fn new(verb: &'static str, key: &'a str, step: usize) -> Self {
        Self {
            verb,
            key,
            step,
            arguments: Vec::new(),
        }
    }

    fn push(&mut self, arguments: impl IntoIterator<Item = Vec<u8>>) {
        self.arguments.extend(arguments.into_iter().map(Cow::Owned));
    }

    /// The arguments of each command.
    pub(crate) fn commands(&self) -> impl Iterator<Item = &[Cow<'a, [u8]>]> {
        self.arguments.chunks(PER_COMMAND * self.step)
    }
}
