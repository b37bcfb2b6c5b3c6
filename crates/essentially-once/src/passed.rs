//! The mark of the last record that a position passed.

use std::time::UNIX_EPOCH;

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3Default;

use crate::{Offset, Record, record::Header};

/// The last record that a position passed: its offset, and a digest of its content.
///
/// A log that is restored from an older copy, or replaced by another one of the same name, may grow
/// past a consumer's position before the consumer reads it again. The digest then shows that the
/// record at that offset is not the one that the consumer read there.
///
/// The digest is 128 bits of XXH3 (<https://github.com/Cyan4973/xxHash>, specification 0.2) over
/// the offset, the append time in milliseconds, the origin, the key, the headers and the payload,
/// each prefixed with its length. It detects accidents, not forgery.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Passed {
    offset: Offset,
    digest: u128,
}

impl Passed {
    /// The length of [`encode`](Self::encode) in bytes.
    pub(crate) const ENCODED_LEN: usize = 1 + 8 + 8 + 16;

    /// Covers the encoding and the digest, so that digests computed in different ways are never
    /// compared.
    const VERSION: u8 = 1;

    /// The mark of this record.
    pub(crate) fn new(record: &Record) -> Self {
        Self {
            offset: record.offset,
            digest: digest(record),
        }
    }

    /// The offset of the record.
    pub(crate) const fn offset(&self) -> Offset {
        self.offset
    }

    /// Whether `record` is the one that was passed; `false` for a record at another offset.
    pub(crate) fn is(&self, record: &Record) -> bool {
        self.offset == record.offset && self.digest == digest(record)
    }

    /// The value as bytes for a store to keep: a version, then big-endian numbers.
    pub(crate) fn encode(&self) -> [u8; Self::ENCODED_LEN] {
        let mut bytes = [0; Self::ENCODED_LEN];
        bytes[0] = Self::VERSION;
        bytes[1..9].copy_from_slice(&self.offset.hi().to_be_bytes());
        bytes[9..17].copy_from_slice(&self.offset.lo().to_be_bytes());
        bytes[17..].copy_from_slice(&self.digest.to_be_bytes());
        bytes
    }

    /// Decodes the bytes of [`encode`](Self::encode). Returns `None` if they have another version
    /// or length.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (Some((&Self::VERSION, rest)), Self::ENCODED_LEN) = (bytes.split_first(), bytes.len()) else {
            return None;
        };
        let number = |range: std::ops::Range<usize>| {
            rest[range]
                .iter()
                .fold(0, |number: u128, byte| number << 8 | u128::from(*byte))
        };
        Some(Self {
            offset: Offset::new(number(0..8) as u64, number(8..16) as u64),
            digest: number(16..32),
        })
    }
}

fn digest(record: &Record) -> u128 {
    let mut hasher = Xxh3Default::new();
    number(&mut hasher, record.offset.hi());
    number(&mut hasher, record.offset.lo());
    let millis = record
        .appended_at
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis());
    number(&mut hasher, u64::try_from(millis).unwrap_or(u64::MAX));
    number(&mut hasher, record.origin.is_some().into());
    if let Some(origin) = &record.origin {
        bytes(&mut hasher, origin.numbering.producer().as_str().as_bytes());
        number(&mut hasher, origin.numbering.epoch().get());
        number(&mut hasher, origin.sequence);
    }
    update_content(&mut hasher, record.key.as_ref(), &record.headers, &record.payload);
    hasher.digest128()
}

/// A digest of what a record says, wherever it is and whoever sent it.
pub(crate) fn content_digest(key: Option<&Bytes>, headers: &[Header], payload: &[u8]) -> u128 {
    let mut hasher = Xxh3Default::new();
    update_content(&mut hasher, key, headers, payload);
    hasher.digest128()
}

fn update_content(hasher: &mut Xxh3Default, key: Option<&Bytes>, headers: &[Header], payload: &[u8]) {
    number(hasher, key.is_some().into());
    if let Some(key) = key {
        bytes(hasher, key);
    }
    number(hasher, headers.len() as u64);
    for (name, value) in headers {
        bytes(hasher, name.as_bytes());
        bytes(hasher, value);
    }
    bytes(hasher, payload);
}

fn number(hasher: &mut Xxh3Default, number: u64) {
    hasher.update(&number.to_be_bytes());
}

fn bytes(hasher: &mut Xxh3Default, bytes: &[u8]) {
    number(hasher, bytes.len() as u64);
    hasher.update(bytes);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Epoch, Origin, ProducerId};

    fn record() -> Record {
        let mut record = Record::new(
            7.into(),
            UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            "payload",
        );
        record.key = Some("key".into());
        record.headers = vec![("name".into(), "value".into())];
        record.origin = Some(Origin::new(ProducerId::new("web").expect("name"), Epoch::new(3), 9));
        record
    }

    #[test]
    fn every_part_of_a_record_counts() {
        let passed = Passed::new(&record());
        assert!(passed.is(&record()));
        let changes: [fn(&mut Record); 9] = [
            |record| record.offset = 8.into(),
            |record| record.appended_at += Duration::from_millis(1),
            |record| record.origin = None,
            |record| record.origin = Some(Origin::new(ProducerId::new("web").expect("name"), Epoch::new(4), 9)),
            |record| record.key = None,
            |record| record.key = Some("".into()),
            |record| record.headers = vec![("namev".into(), "alue".into())],
            |record| record.headers.clear(),
            |record| record.payload = "payloae".into(),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut other = record();
            change(&mut other);
            assert!(!passed.is(&other), "change {number}");
        }
    }

    /// Positions outlive versions of this crate, so the digest of a record never changes under the
    /// same version number.
    #[test]
    fn the_digest_is_what_it_was() {
        assert_eq!(
            format!("{:032x}", Passed::new(&record()).digest),
            "fdd1b325cb816c66f3c68e480b135eba"
        );
    }

    #[test]
    fn passed_round_trips_as_bytes() {
        let passed = Passed::new(&record());
        assert_eq!(Passed::decode(&passed.encode()), Some(passed));
        let mut later = passed.encode();
        later[0] = 2;
        assert_eq!(Passed::decode(&later), None);
        assert_eq!(Passed::decode(&[]), None);
        assert_eq!(Passed::decode(&passed.encode()[..32]), None);
    }
}
