//! What the commits of one consumer add up to.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use essentially_once::{Offset, ProducerId, Window};

use super::fold::Change;
use crate::packed;

/// About what an item costs in memory besides its bytes.
const OVERHEAD: usize = 96;

/// What a transaction has staged; `None` deletes.
pub(super) type Writes = BTreeMap<Bytes, Option<Bytes>>;

/// Windows and values.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct State {
    windows: HashMap<ProducerId, Window>,
    values: HashMap<Box<[u8]>, Bytes>,
    /// Where what commits have sent ends: one past the last record.
    pub(super) sent_end: Offset,
    /// What they take up, about.
    size: usize,
}

impl State {
    pub(super) fn windows(&self) -> impl ExactSizeIterator<Item = (&ProducerId, &Window)> {
        self.windows.iter()
    }

    pub(super) fn values(&self) -> impl ExactSizeIterator<Item = (&[u8], &Bytes)> {
        self.values.iter().map(|(key, value)| (&**key, value))
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Bytes> {
        self.values.get(key)
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// What it takes up after the change.
    pub(super) fn size_after(&self, change: &StateChange) -> usize {
        let mut size = self.size;
        for (producer, _) in &change.windows {
            size += if self.windows.contains_key(producer) {
                0
            } else {
                window_size(producer)
            };
        }
        for (key, value) in &change.writes {
            size += value.as_ref().map_or(0, |value| value_size(key, value));
            size -= self.get(key).map_or(0, |old| value_size(key, old));
        }
        size
    }

    pub(super) fn set_window(&mut self, producer: ProducerId, window: Window) {
        let added = window_size(&producer);
        if self.windows.insert(producer, window).is_none() {
            self.size += added;
        }
    }

    fn forget(&mut self, producer: &ProducerId) {
        if self.windows.remove(producer).is_some() {
            self.size -= window_size(producer);
        }
    }

    /// Copies key and value: as parts of an entry they would keep all of it in memory.
    pub(super) fn put(&mut self, key: &[u8], value: &[u8]) {
        self.size += value_size(key, value);
        if let Some(old) = self.values.insert(key.into(), Bytes::copy_from_slice(value)) {
            self.size -= value_size(key, &old);
        }
    }

    fn delete(&mut self, key: &[u8]) {
        if let Some(old) = self.values.remove(key) {
            self.size -= value_size(key, &old);
        }
    }
}

/// About what a key and its value take up.
pub(super) fn value_size(key: &[u8], value: &[u8]) -> usize {
    key.len() + value.len() + OVERHEAD
}

fn window_size(producer: &ProducerId) -> usize {
    producer.as_str().len() + Window::ENCODED_LEN + OVERHEAD
}

/// What one commit changes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct StateChange {
    pub(super) windows: Vec<(ProducerId, Window)>,
    pub(super) forgotten: Vec<ProducerId>,
    /// Keys are unique.
    pub(super) writes: Vec<(Bytes, Option<Bytes>)>,
    pub(super) sent: Option<Sent>,
}

/// Records that a commit sends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Sent {
    /// The end of what was sent before: who has read up to there misses nothing.
    pub(super) before: Offset,
    /// As in a packed message, which was seen to be sound.
    pub(super) packed: Bytes,
}

impl Change for StateChange {
    type State = State;

    fn apply(self, offset: u64, state: &mut State) {
        if let Some(sent) = self.sent {
            state.sent_end = Offset::new(offset, packed::count(&sent.packed));
        }
        for (producer, window) in self.windows {
            state.set_window(producer, window);
        }
        for producer in &self.forgotten {
            state.forget(producer);
        }
        for (key, value) in self.writes {
            match value {
                Some(value) => state.put(&key, &value),
                None => state.delete(&key),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_follows_every_change() {
        let (a, b) = (ProducerId::new("a").expect("name"), ProducerId::new("b").expect("name"));
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
                .map(|producer| (producer.clone(), Window::new(7)))
                .collect();
            let change = StateChange {
                windows,
                forgotten: forgotten.clone(),
                writes,
                sent: None,
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
                .map(|(producer, _)| window_size(producer))
                .sum::<usize>();
        assert_eq!(state.size(), actual);
        assert_eq!(state.get(b"l").map(|value| &value[..]), Some(&b"22"[..]));
    }
}
