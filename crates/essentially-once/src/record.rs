//! Records and their offsets.

use std::{fmt, str::FromStr, sync::Arc, time::SystemTime};

use bytes::Bytes;

use crate::{Epoch, Error, Numbering, ProducerId};

/// A record's place in one log: opaque, ordered, and possibly sparse.
///
/// An offset has two numbers, because some backends count in two (a Redis stream id is `ms-seq`).
/// It is displayed and parsed as `lo` if `hi` is zero, and as `hi-lo` otherwise. Offsets of one log
/// can be compared, but the difference between two of them means nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Offset {
    hi: u64,
    lo: u64,
}

impl Offset {
    /// At or before every record of any log.
    pub const ZERO: Self = Self::new(0, 0);

    /// The greatest offset. No position can come after a record at this offset.
    pub const MAX: Self = Self::new(u64::MAX, u64::MAX);

    /// The offset with these two numbers. `hi` is the more significant one.
    pub const fn new(hi: u64, lo: u64) -> Self {
        Self { hi, lo }
    }

    /// The more significant number.
    pub const fn hi(self) -> u64 {
        self.hi
    }

    /// The less significant number.
    pub const fn lo(self) -> u64 {
        self.lo
    }

    /// The smallest offset after this one: where a reader continues after this record.
    /// [`MAX`](Self::MAX) has no successor and returns itself.
    pub const fn successor(self) -> Self {
        match (self.hi.checked_add(1), self.lo.checked_add(1)) {
            (_, Some(lo)) => Self { hi: self.hi, lo },
            (Some(hi), None) => Self { hi, lo: 0 },
            (None, None) => Self::MAX,
        }
    }
}

impl From<u64> for Offset {
    fn from(lo: u64) -> Self {
        Self { hi: 0, lo }
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.hi {
            0 => write!(f, "{}", self.lo),
            hi => write!(f, "{hi}-{}", self.lo),
        }
    }
}

impl fmt::Debug for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Offset({self})")
    }
}

impl FromStr for Offset {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let number = |digits: &str| {
            digits.parse::<u64>().map_err(|error| Error::InvalidSetting {
                setting: "offset",
                reason: format!("{text:?} is not an offset such as 12 or 1795792176303-0: {error}"),
            })
        };
        match text.split_once('-') {
            Some((hi, lo)) => Ok(Self::new(number(hi)?, number(lo)?)),
            None => Ok(Self::new(0, number(text)?)),
        }
    }
}

/// Who sent a record, and its number among all records that this producer sent to this log in one
/// [`Epoch`].
///
/// A sender in doubt sends the record again with the same origin, and the consumer drops it if it
/// has handled the record before. Numbers may start anywhere and have gaps. The span from the
/// lowest unconfirmed number to the highest appended one must not exceed
/// [`Window::SIZE`](crate::Window::SIZE).
///
/// Use [`Epoch::STABLE`] only if the numbers outlive the process. A process that starts numbering
/// from the beginning draws an [`Epoch::fresh`], so that consumers never mistake its new records
/// for duplicates of its old ones.
///
/// ```
/// # use essentially_once::{Epoch, NewRecord, Origin, ProducerId};
/// let (producer, epoch) = (ProducerId::new("web")?, Epoch::fresh());
/// let first = NewRecord::new("10248").origin(Origin::new(producer.clone(), epoch, 1));
/// let second = NewRecord::new("10249").origin(Origin::new(producer, epoch, 2));
/// # Ok::<(), essentially_once::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct Origin {
    /// The sender, and the epoch of its numbering.
    pub numbering: Numbering,
    /// The record's number.
    pub sequence: u64,
}

impl Origin {
    /// The origin with this producer, epoch and number.
    pub const fn new(producer: ProducerId, epoch: Epoch, sequence: u64) -> Self {
        Self {
            numbering: Numbering::new(producer, epoch),
            sequence,
        }
    }

    /// The origin with this numbering and number.
    pub const fn of(numbering: Numbering, sequence: u64) -> Self {
        Self { numbering, sequence }
    }
}

/// `billing#17:5`: the numbering, then the sequence.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.numbering, self.sequence)
    }
}

/// A named value that travels with a record. Names need not be unique, and headers keep their
/// order.
pub type Header = (String, Bytes);

/// A record as a log yields it.
///
/// The records of one fetch may share the memory of their bytes, about a megabyte. Copy what you
/// keep for long, for example with [`Bytes::copy_from_slice`].
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Record {
    /// The record's place in its log.
    pub offset: Offset,
    /// What the record is about. Records with equal keys keep their order everywhere.
    pub key: Option<Bytes>,
    /// Named values next to the payload.
    pub headers: Vec<Header>,
    /// The message itself, or the raw bytes of a [`malformed`](Self::malformed) entry.
    pub payload: Bytes,
    /// When the record was appended, by the backend's or the appender's clock, to the millisecond.
    pub appended_at: SystemTime,
    /// Who sent the record, if the sender set it.
    pub origin: Option<Origin>,
    /// Why the entry could not be decoded. A consumer never hands such a record to its handler.
    pub malformed: Option<Arc<str>>,
}

impl Record {
    /// A record with an offset, a time and a payload. Set the other fields on the result.
    pub fn new(offset: Offset, appended_at: SystemTime, payload: impl Into<Bytes>) -> Self {
        Self {
            offset,
            key: None,
            headers: Vec::new(),
            payload: payload.into(),
            appended_at,
            origin: None,
            malformed: None,
        }
    }

    /// The value of the first header with this name.
    pub fn header(&self, name: &str) -> Option<&Bytes> {
        find(&self.headers, name)
    }

    /// Bytes of key, headers (names and values) and payload together: what a log's record limit
    /// bounds.
    pub fn size(&self) -> usize {
        size(self.key.as_ref(), &self.headers, &self.payload)
    }
}

/// A record to append.
///
/// ```
/// # use essentially_once::NewRecord;
/// let record = NewRecord::new("10248,VINET,32.38").key("10248").header("source", "web");
/// assert_eq!(record.size(), 17 + 5 + 6 + 3);
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct NewRecord {
    /// What the record is about.
    pub key: Option<Bytes>,
    /// Named values next to the payload.
    pub headers: Vec<Header>,
    /// The message itself.
    pub payload: Bytes,
    /// Who sends the record. Set it so that consumers can drop duplicates.
    pub origin: Option<Origin>,
}

impl NewRecord {
    /// A record with this payload and no key, headers or origin.
    pub fn new(payload: impl Into<Bytes>) -> Self {
        Self {
            payload: payload.into(),
            ..Self::default()
        }
    }

    /// Sets the key.
    #[must_use]
    pub fn key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sets the origin.
    #[must_use]
    pub fn origin(mut self, origin: Origin) -> Self {
        self.origin = Some(origin);
        self
    }

    /// Bytes of key, headers (names and values) and payload together: what a log's record limit
    /// bounds.
    pub fn size(&self) -> usize {
        size(self.key.as_ref(), &self.headers, &self.payload)
    }

    /// Refuses a record over `limit` bytes. Adapters call it for every record before they append
    /// the first one.
    ///
    /// # Errors
    /// [`Error::TooLarge`] with the size and the limit.
    pub fn check_size(&self, limit: usize) -> Result<(), Error> {
        match self.size() {
            size if size <= limit => Ok(()),
            size => Err(Error::TooLarge {
                what: "record",
                size,
                limit,
            }),
        }
    }
}

/// A record with the content of one that a log yielded.
impl From<&Record> for NewRecord {
    fn from(record: &Record) -> Self {
        Self {
            key: record.key.clone(),
            headers: record.headers.clone(),
            payload: record.payload.clone(),
            origin: record.origin.clone(),
        }
    }
}

fn find<'a>(headers: &'a [Header], name: &str) -> Option<&'a Bytes> {
    headers.iter().find(|(n, _)| n == name).map(|(_, value)| value)
}

fn size(key: Option<&Bytes>, headers: &[Header], payload: &Bytes) -> usize {
    key.map_or(0, Bytes::len)
        + payload.len()
        + headers
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_order_by_hi_then_lo_and_round_trip_as_text() {
        let offsets = [
            Offset::ZERO,
            Offset::new(0, u64::MAX),
            Offset::new(1, 0),
            Offset::new(1_700_000_000_000, 3),
            Offset::new(u64::MAX, u64::MAX),
        ];
        assert!(offsets.is_sorted());
        for offset in offsets {
            assert_eq!(offset.to_string().parse::<Offset>().expect("round trip"), offset);
        }
        assert_eq!(Offset::new(1, u64::MAX).successor(), Offset::new(2, 0));
        for bad in ["", "-", "1-", "-1", "1-2-3", "x", "18446744073709551616"] {
            assert!(bad.parse::<Offset>().is_err(), "{bad:?}");
        }
    }
}
