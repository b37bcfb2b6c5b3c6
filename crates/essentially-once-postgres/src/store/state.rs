//! What a transaction knows of its consumer's state, and what it has changed. A commit sends all
//! changes at once.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use essentially_once::{ConsumerId, backend::Revision};

/// The most bytes of one statement. A message of the protocol has at most 1 GiB.
const STATEMENT_BYTES: usize = 32 * 1024 * 1024;

/// What an entry takes besides its bytes, more or less.
const ENTRY_BYTES: usize = 128;

/// The state of consumers that a store has read, as of a commit each. A transaction takes it, asks
/// for the revision of the position, and uses what it took only if they agree. It gives it back,
/// with its own changes if it has committed them.
#[derive(Debug)]
pub(super) struct Memory {
    limit: usize,
    known: Mutex<HashMap<ConsumerId, Known>>,
}

impl Memory {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            known: Mutex::default(),
        }
    }

    pub(super) fn take(&self, consumer: &ConsumerId) -> Option<Known> {
        self.lock().remove(consumer)
    }

    /// Keeps what is known, unless it has grown too large.
    pub(super) fn put_back(&self, consumer: &ConsumerId, known: Known) {
        if known.bytes <= self.limit {
            self.lock().insert(consumer.clone(), known);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ConsumerId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a consumer's state as one commit left it.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) revision: Revision,
    /// `None` for a key that is missing.
    entries: HashMap<Bytes, Option<Bytes>>,
    bytes: usize,
    /// Whether all other keys are missing.
    is_complete: bool,
}

impl Known {
    /// Knows nothing of the state at this revision.
    pub(super) fn at(revision: Revision) -> Self {
        Self {
            revision,
            entries: HashMap::new(),
            bytes: 0,
            is_complete: false,
        }
    }

    /// Knows that no keys exist but those that it has learned.
    pub(super) fn complete(&mut self) {
        self.is_complete = true;
    }

    /// The value of a key, or `None` if it has to be read.
    fn get(&self, key: &[u8]) -> Option<Option<Bytes>> {
        match self.entries.get(key) {
            None if self.is_complete => Some(None),
            known => known.cloned(),
        }
    }

    pub(super) fn learn(&mut self, key: &[u8], value: Option<Bytes>) {
        let size = |value: &Option<Bytes>| value.as_ref().map_or(0, Bytes::len);
        self.bytes += size(&value);
        match self.entries.get_mut(key) {
            Some(known) => {
                self.bytes -= size(known);
                *known = value;
            }
            None => {
                self.bytes += key.len() + ENTRY_BYTES;
                self.entries.insert(Bytes::copy_from_slice(key), value);
            }
        }
    }
}

/// What a transaction knows and has changed.
#[derive(Debug, Default)]
pub(super) struct State {
    /// `None` until the transaction reads.
    pub(super) known: Option<Known>,
    changes: HashMap<Bytes, Option<Bytes>>,
}

/// Keys and their values, for one statement.
pub(super) type Entries<'a> = (Vec<&'a [u8]>, Vec<&'a [u8]>);

impl State {
    /// The value of a key, or `None` if it has to be read.
    pub(super) fn get(&self, key: &[u8]) -> Option<Option<Bytes>> {
        let changed = self.changes.get(key).cloned();
        changed.or_else(|| self.known.as_ref()?.get(key))
    }

    /// Changes a key; `None` deletes it.
    pub(super) fn change(&mut self, key: &[u8], value: Option<Bytes>) {
        match self.changes.get_mut(key) {
            Some(changed) => *changed = value,
            None => drop(self.changes.insert(Bytes::copy_from_slice(key), value)),
        }
    }

    /// What is known after a commit that has set this revision.
    pub(super) fn committed(&mut self, revision: Revision) -> Option<Known> {
        let mut known = self.known.take()?;
        known.revision = revision;
        for (key, value) in self.changes.drain() {
            known.learn(&key, value);
        }
        Some(known)
    }

    /// The changed entries, in statements of a bounded size, and the deleted keys. They are in the
    /// order of the keys, in which rows lie next to each other.
    pub(super) fn changes(&self) -> (Vec<Entries<'_>>, Vec<&[u8]>) {
        let mut changed: Vec<_> = self.changes.iter().collect();
        changed.sort_unstable_by_key(|(key, _)| *key);
        let (mut puts, mut deletes): (Vec<Entries<'_>>, Vec<&[u8]>) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        for (key, value) in changed {
            let Some(value) = value else {
                deletes.push(key);
                continue;
            };
            let size = key.len() + value.len();
            if puts.is_empty() || bytes + size > STATEMENT_BYTES {
                puts.push(Entries::default());
                bytes = 0;
            }
            bytes += size;
            if let Some((keys, values)) = puts.last_mut() {
                keys.push(key);
                values.push(value);
            }
        }
        (puts, deletes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revision() -> Revision {
        Revision::NONE.next_epoch()
    }

    #[test]
    fn changes_are_the_last_ones_in_the_order_of_the_keys() {
        let mut state = State::default();
        let mut known = Known::at(revision());
        known.learn(b"read", Some("1".into()));
        known.learn(b"b", None);
        state.known = Some(known);
        for (key, value) in [
            ("b", Some("1")),
            ("a", Some("2")),
            ("c", Some("3")),
            ("c", None),
            ("b", Some("4")),
        ] {
            state.change(key.as_bytes(), value.map(Into::into));
        }
        assert_eq!(state.get(b"read"), Some(Some("1".into())));
        assert_eq!(state.get(b"c"), Some(None));
        assert_eq!(state.get(b"d"), None);
        let (puts, deletes) = state.changes();
        assert_eq!(puts, [(vec![&b"a"[..], b"b"], vec![&b"2"[..], b"4"])]);
        assert_eq!(deletes, [b"c"]);
    }

    #[test]
    fn a_commit_adds_its_changes_to_what_is_known() {
        let mut state = State::default();
        state.change(b"a", Some("1".into()));
        assert!(state.committed(revision()).is_none(), "nothing was read");
        let mut known = Known::at(revision());
        known.learn(b"a", Some("1".into()));
        known.complete();
        let mut state = State {
            known: Some(known),
            ..State::default()
        };
        assert_eq!(state.get(b"b"), Some(None), "all keys are known");
        state.change(b"a", None);
        state.change(b"b", Some("22".into()));
        let next = revision().next_count();
        let known = state.committed(next).expect("known");
        assert_eq!((known.revision, known.bytes), (next, 2 * ENTRY_BYTES + 4));
        assert_eq!(
            (known.get(b"a"), known.get(b"b")),
            (Some(None), Some(Some("22".into())))
        );
    }

    #[test]
    fn what_has_grown_too_large_is_forgotten() {
        let consumer = ConsumerId::new("c").expect("a name");
        let memory = Memory::new(ENTRY_BYTES + 10);
        let mut known = Known::at(revision());
        known.learn(b"a", Some("123456789".into()));
        memory.put_back(&consumer, known);
        let mut known = memory.take(&consumer).expect("kept");
        assert!(memory.take(&consumer).is_none(), "only one transaction has it");
        known.learn(b"a", Some("1234567890".into()));
        memory.put_back(&consumer, known);
        assert!(memory.take(&consumer).is_none());
    }

    #[test]
    fn large_values_are_sent_in_several_statements() {
        let mut state = State::default();
        for key in [b"a", b"b", b"c"] {
            state.change(key, Some(vec![0; STATEMENT_BYTES / 2].into()));
        }
        let (puts, _) = state.changes();
        assert_eq!(puts.iter().map(|(keys, _)| keys.len()).collect::<Vec<_>>(), [1, 1, 1]);
    }
}
