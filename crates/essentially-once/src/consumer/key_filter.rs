//! A filter in front of the keys that have letters.

use xxhash_rust::xxh3::xxh3_64;

/// Tells most keys that are not in a set from those that are, in two bits of one word of a table
/// with at least 16 bits per key: a blocked Bloom filter (Putze, Sanders and Singler 2007, "Cache-,
/// hash- and space-efficient Bloom filters"). A question costs at most one cache miss. A million
/// keys take 4 MiB.
#[derive(Default)]
pub(super) struct KeyFilter {
    /// Their number is a power of two, or zero.
    words: Vec<u64>,
}

impl KeyFilter {
    const BITS_PER_KEY: usize = 16;

    /// A filter for these keys and as many more.
    pub(super) fn of<'a>(keys: impl ExactSizeIterator<Item = &'a [u8]>) -> Self {
        let bits = (2 * keys.len().max(32))
            .saturating_mul(Self::BITS_PER_KEY)
            .next_power_of_two();
        let mut filter = Self {
            words: vec![0; bits / 64],
        };
        for key in keys {
            filter.insert(key);
        }
        filter
    }

    /// Whether the filter has room for that many keys.
    pub(super) fn has_room(&self, keys: usize) -> bool {
        keys.saturating_mul(Self::BITS_PER_KEY) <= self.words.len() * 64
    }

    pub(super) fn insert(&mut self, key: &[u8]) {
        let (word, bits) = self.place(key);
        self.words[word] |= bits;
    }

    /// `false` if the key was certainly never inserted.
    pub(super) fn may_hold(&self, key: &[u8]) -> bool {
        if self.words.is_empty() {
            return false;
        }
        let (word, bits) = self.place(key);
        self.words[word] & bits == bits
    }

    fn place(&self, key: &[u8]) -> (usize, u64) {
        let hash = xxh3_64(key);
        let word = (hash >> 32) as usize & (self.words.len() - 1);
        (word, 1 << (hash % 64) | 1 << (hash / 64 % 64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_held_and_few_others_are() {
        let keys: Vec<String> = (0..10_000).map(|n| format!("key {n}")).collect();
        let (first, more) = keys.split_at(6_000);
        let mut filter = KeyFilter::of(first.iter().map(String::as_bytes));
        for key in more {
            filter.insert(key.as_bytes());
        }
        assert!(keys.iter().all(|key| filter.may_hold(key.as_bytes())));
        let others = (0..10_000)
            .filter(|n| filter.may_hold(format!("other {n}").as_bytes()))
            .count();
        assert!(others < 300, "{others} of 10,000");
        assert!(!filter.has_room(100_000));
        assert!(!KeyFilter::default().may_hold(b"key 1"));
    }
}
