//! The state that a transaction has read and changed. A commit sends all changes at once.

use std::collections::HashMap;

use bytes::Bytes;

/// The most bytes of one statement. A message of the protocol has at most 1 GiB.
const STATEMENT_BYTES: usize = 32 * 1024 * 1024;

/// What a transaction knows of its consumer's state.
#[derive(Debug, Default)]
pub(super) struct Staged {
    entries: HashMap<Bytes, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// `None` if the key is missing.
    value: Option<Bytes>,
    is_changed: bool,
}

/// Keys and their values, for one statement.
pub(super) type Entries<'a> = (Vec<&'a [u8]>, Vec<&'a [u8]>);

impl Staged {
    /// The value of a key, or `None` if this transaction has neither read nor changed it.
    pub(super) fn get(&self, key: &[u8]) -> Option<Option<Bytes>> {
        self.entries.get(key).map(|entry| entry.value.clone())
    }

    /// Notes what was read.
    pub(super) fn learn(&mut self, key: &[u8], value: Option<Bytes>) {
        let is_changed = false;
        self.entries
            .insert(Bytes::copy_from_slice(key), Entry { value, is_changed });
    }

    /// Changes a key; `None` deletes it.
    pub(super) fn change(&mut self, key: &[u8], value: Option<Bytes>) {
        let is_changed = true;
        match self.entries.get_mut(key) {
            Some(entry) => *entry = Entry { value, is_changed },
            None => drop(
                self.entries
                    .insert(Bytes::copy_from_slice(key), Entry { value, is_changed }),
            ),
        }
    }

    /// The changed entries, in statements of a bounded size, and the deleted keys. They are in the
    /// order of the keys, in which rows lie next to each other.
    pub(super) fn changes(&self) -> (Vec<Entries<'_>>, Vec<&[u8]>) {
        let mut changed: Vec<_> = self.entries.iter().filter(|(_, entry)| entry.is_changed).collect();
        changed.sort_unstable_by_key(|(key, _)| *key);
        let (mut puts, mut deletes): (Vec<Entries<'_>>, Vec<&[u8]>) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        for (key, entry) in changed {
            let Some(value) = &entry.value else {
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

    #[test]
    fn changes_are_the_last_ones_in_the_order_of_the_keys() {
        let mut staged = Staged::default();
        staged.learn(b"read", Some("1".into()));
        staged.learn(b"b", None);
        for (key, value) in [
            ("b", Some("1")),
            ("a", Some("2")),
            ("c", Some("3")),
            ("c", None),
            ("b", Some("4")),
        ] {
            staged.change(key.as_bytes(), value.map(Into::into));
        }
        assert_eq!(staged.get(b"c"), Some(None));
        assert_eq!(staged.get(b"d"), None);
        let (puts, deletes) = staged.changes();
        assert_eq!(puts, [(vec![&b"a"[..], b"b"], vec![&b"2"[..], b"4"])]);
        assert_eq!(deletes, [b"c"]);
    }

    #[test]
    fn large_values_are_sent_in_several_statements() {
        let mut staged = Staged::default();
        for key in [b"a", b"b", b"c"] {
            staged.change(key, Some(vec![0; STATEMENT_BYTES / 2].into()));
        }
        let (puts, _) = staged.changes();
        assert_eq!(puts.iter().map(|(keys, _)| keys.len()).collect::<Vec<_>>(), [1, 1, 1]);
    }
}
