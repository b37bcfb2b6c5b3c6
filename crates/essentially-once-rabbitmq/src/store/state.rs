//! The state that the commits of one consumer make.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use bytes::Bytes;
use essentially_once::{
    Offset,
    backend::{Journal, Numbering, Window},
};
use tokio::sync::{Notify, futures::Notified};

use super::{
    letter_index::{Letters, LettersChange},
    rule::{Change, Fold},
    sending::{Outboxes, Sent},
};

/// About what an item costs in memory besides its bytes.
pub(super) const OVERHEAD: usize = 96;

/// The writes that a transaction has staged; `None` deletes.
pub(super) type Writes = BTreeMap<Bytes, Option<Bytes>>;

/// Windows, values, dead letters and outboxes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct State {
    windows: HashMap<Numbering, Window>,
    /// Keys and values share memory with nothing else, so that a copy of the map costs little.
    values: HashMap<Bytes, Bytes>,
    pub(super) letters: Letters,
    /// The end of the sent records: one past the last.
    pub(super) sent_end: Offset,
    pub(super) outboxes: Outboxes,
    /// About how much memory windows and values take.
    size: usize,
}

impl State {
    pub(super) fn windows(&self) -> impl ExactSizeIterator<Item = (&Numbering, &Window)> {
        self.windows.iter()
    }

    pub(super) fn values(&self) -> impl ExactSizeIterator<Item = (&[u8], &Bytes)> {
        self.values.iter().map(|(key, value)| (&**key, value))
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Bytes> {
        self.values.get(key)
    }

    /// About how much memory it takes.
    pub(super) fn size(&self) -> usize {
        self.size + self.letters.size() + self.outboxes.size()
    }

    /// The size after the change.
    pub(super) fn size_after(&self, change: &StateChange) -> usize {
        let mut size = self.size + self.letters.size_after(&change.letters) + self.outboxes.size();
        size += change.sent.as_ref().map_or(0, |sent| self.outboxes.growth(sent));
        for (numbering, _) in &change.windows {
            size += if self.windows.contains_key(numbering) {
                0
            } else {
                window_size(numbering)
            };
        }
        for (key, value) in &change.writes {
            size += value.as_ref().map_or(0, |value| value_size(key, value));
            size -= self.get(key).map_or(0, |old| value_size(key, old));
        }
        size
    }

    pub(super) fn set_window(&mut self, numbering: Numbering, window: Window) {
        let added = window_size(&numbering);
        if self.windows.insert(numbering, window).is_none() {
            self.size += added;
        }
    }

    fn forget(&mut self, numbering: &Numbering) {
        if self.windows.remove(numbering).is_some() {
            self.size -= window_size(numbering);
        }
    }

    /// Copies key and value. As parts of an entry they would keep all of it in memory.
    pub(super) fn put(&mut self, key: &[u8], value: &[u8]) {
        self.size += value_size(key, value);
        if let Some(old) = self
            .values
            .insert(Bytes::copy_from_slice(key), Bytes::copy_from_slice(value))
        {
            self.size -= value_size(key, &old);
        }
    }

    fn delete(&mut self, key: &[u8]) {
        if let Some(old) = self.values.remove(key) {
            self.size -= value_size(key, &old);
        }
    }
}

/// About how much memory a key and its value take.
pub(super) fn value_size(key: &[u8], value: &[u8]) -> usize {
    key.len() + value.len() + OVERHEAD
}

fn window_size(numbering: &Numbering) -> usize {
    numbering.to_string().len() + Window::ENCODED_LEN + OVERHEAD
}

/// About how much memory a journal takes.
pub(super) fn journal_size(journal: &Journal) -> usize {
    let entries = journal.entries().iter();
    entries
        .map(|entry| entry.by.len() + entry.reason.len() + OVERHEAD)
        .sum()
}

impl Fold<State> {
    /// About how much memory state and journal take.
    pub(super) fn size(&self) -> usize {
        self.state.size() + journal_size(&self.journal)
    }
}

/// What one commit changes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct StateChange {
    pub(super) windows: Vec<(Numbering, Window)>,
    pub(super) forgotten: Vec<Numbering>,
    /// Keys are unique.
    pub(super) writes: Vec<(Bytes, Option<Bytes>)>,
    pub(super) sent: Option<Sent>,
    pub(super) letters: LettersChange,
}

impl Change for StateChange {
    type State = State;

    fn apply(self, offset: u64, state: &mut State) {
        if let Some(sent) = self.sent {
            state.sent_end = sent.end(offset);
            state.outboxes.apply(offset, sent.parts);
        }
        for (numbering, window) in self.windows {
            state.set_window(numbering, window);
        }
        for numbering in &self.forgotten {
            state.forget(numbering);
        }
        for (key, value) in self.writes {
            match value {
                Some(value) => state.put(&key, &value),
                None => state.delete(&key),
            }
        }
        state.letters.apply(self.letters);
    }
}

/// The fold of one handle. It is always a true prefix of the changelog, and only the handle's
/// reader changes it.
#[derive(Clone, Default)]
pub(super) struct SharedFold {
    inner: Arc<Watched>,
}

#[derive(Default)]
struct Watched {
    fold: RwLock<Fold<State>>,
    changed: Notify,
}

impl SharedFold {
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Fold<State>> {
        self.inner.fold.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Fold<State>> {
        self.inner.fold.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes tasks that wait for a change.
    pub(super) fn notify(&self) {
        self.inner.changed.notify_waiters();
    }

    /// Completes at the next [`notify`](Self::notify).
    pub(super) fn changed(&self) -> Notified<'_> {
        self.inner.changed.notified()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::sending::tests::part, *};

    #[test]
    fn the_journal_counts() {
        use essentially_once::consumer::{Operator, OperatorAction};

        let mut fold = Fold::<State>::default();
        assert_eq!(fold.size(), 0);
        fold.state.put(b"k", b"1");
        let by = Operator::new("ann").because("größer");
        fold.journal = fold.journal.with(&by, OperatorAction::Pause);
        assert_eq!(fold.size(), fold.state.size() + 3 + 8 + OVERHEAD);
    }

    #[test]
    fn outboxes_count() {
        let mut state = State::default();
        for (offset, outboxes) in [(0, ["a", "b"]), (1, ["b", "c"])] {
            let sent = Sent {
                before: Offset::ZERO,
                packed: Bytes::new(),
                parts: outboxes.iter().map(|outbox| part(outbox, &[0])).collect(),
            };
            let change = StateChange {
                sent: Some(sent),
                ..StateChange::default()
            };
            let expected = state.size_after(&change);
            change.apply(offset, &mut state);
            assert_eq!(state.size(), expected);
        }
        assert_eq!(state.size(), 3 * ("a".len() + "a@1".len() + OVERHEAD));
    }

    #[test]
    fn the_size_follows_every_change() {
        let (a, b): (Numbering, Numbering) = ("a#7".parse().expect("numbering"), "b".parse().expect("numbering"));
        let write = |key: &'static str, value: Option<&'static str>| (Bytes::from(key), value.map(Bytes::from));
        let mut state = State::default();
        for (windows, forgotten, writes) in [
            (
                vec![&a, &b],
                vec![],
                vec![write("k", Some("1")), write("l", Some("22"))],
            ),
            (vec![&a], vec![], vec![write("k", Some("333")), write("absent", None)]),
            (
                vec![],
                vec![a.clone(), a.clone()],
                vec![write("k", None), write("", Some(""))],
            ),
        ] {
            let windows = windows
                .into_iter()
                .map(|numbering| (numbering.clone(), Window::new(7)))
                .collect();
            let change = StateChange {
                windows,
                forgotten: forgotten.clone(),
                writes,
                ..StateChange::default()
            };
            let expected = state.size_after(&change);
            change.apply(0, &mut state);
            // What is forgotten does not count beforehand: it only ever makes room.
            assert_eq!(
                state.size(),
                expected - if forgotten.is_empty() { 0 } else { window_size(&a) }
            );
        }
        let actual: usize = state.values().map(|(key, value)| value_size(key, value)).sum::<usize>()
            + state
                .windows()
                .map(|(numbering, _)| window_size(numbering))
                .sum::<usize>();
        assert_eq!(state.size(), actual);
        assert_eq!(state.get(b"l").map(|value| &value[..]), Some(&b"22"[..]));
    }
}
