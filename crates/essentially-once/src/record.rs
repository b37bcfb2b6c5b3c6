//! What a log holds: records and their offsets.

use std::{fmt, str::FromStr, sync::Arc, time::SystemTime};

use bytes::Bytes;

use crate::{Epoch, Error, Numbering, ProducerId};

/// A record's place in one log: opaque, ordered, and possibly sparse.
///
/// Two numbers, because some backends count in two (a Redis stream id is `ms-seq`). Shown and parsed as `lo` where `hi` is
/// zero, as `hi-lo` otherwise. Offsets of one log can be compared; a difference between two of them means nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Offset {
    hi: u64,
    lo: u64,
}

impl Offset {
    /// At or before every record of any log.
    pub const ZERO: Self = Self::new(0, 0);

    /// The greatest offset. No position can be behind a record there.
    pub const MAX: Self = Self::new(u64::MAX, u64::MAX);

    /// The offset of the two numbers; `hi` counts more.
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

    /// The smallest offset after this one: where a reader goes on that has seen this record. [`MAX`](Self::MAX) has none, and
    /// is its own.
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
                reason: format!("{text:?} is not `lo` or `hi-lo`: {error}"),
            })
        };
        match text.split_once('-') {
            Some((hi, lo)) => Ok(Self::new(number(hi)?, number(lo)?)),
            None => Ok(Self::new(0, number(text)?)),
        }
    }
}

/// Who sent a record, and its number among all that this producer sent to this log in one [`Epoch`].
///
/// A sender in doubt sends again with the same origin, and the consumer drops what it has handled before. Numbers may start
/// anywhere and have gaps, but the span from the lowest unconfirmed to the highest appended must not exceed
/// [`Window::SIZE`](crate::Window::SIZE).
///
/// Take [`Epoch::STABLE`] only if the numbers outlive the process. A process that numbers from the beginning at each start
/// draws an [`Epoch::fresh`], so that its new records are never taken for duplicates of its old ones.
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
    /// The sender, and which of its numberings this is.
    pub numbering: Numbering,
    /// The record's number.
    pub sequence: u64,
}

impl Origin {
    /// The origin of that producer, epoch and number.
    pub const fn new(producer: ProducerId, epoch: Epoch, sequence: u64) -> Self {
        Self {
            numbering: Numbering::new(producer, epoch),
            sequence,
        }
    }

    /// The origin of that numbering and number.
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

/// A named value that travels with a record. Names need not be unique; their order is kept.
pub type Header = (String, Bytes);

/// A record as a log yields it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Record {
    /// Where it stands in its log.
    pub offset: Offset,
    /// What it is about; records with equal keys keep their order everywhere.
    pub key: Option<Bytes>,
    /// Named values beside the payload.
    pub headers: Vec<Header>,
    /// The message itself; for a [`malformed`](Self::malformed) entry its raw bytes.
    pub payload: Bytes,
    /// When the backend took it in, by the backend's or the appender's clock, to the millisecond.
    pub appended_at: SystemTime,
    /// Who sent it, if the sender said so.
    pub origin: Option<Origin>,
    /// Why the entry could not be decoded. A consumer never hands such a record to its handler.
    pub malformed: Option<Arc<str>>,
}

impl Record {
    /// A record with nothing but a place, a time and a payload; set the other fields on it.
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

    /// The first header of that name.
    pub fn header(&self, name: &str) -> Option<&Bytes> {
        find(&self.headers, name)
    }

    /// Bytes of key, headers (names and values) and payload together: what a log's record limit bounds.
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
    /// What it is about.
    pub key: Option<Bytes>,
    /// Named values beside the payload.
    pub headers: Vec<Header>,
    /// The message itself.
    pub payload: Bytes,
    /// Who sends it; set it to let consumers drop what was sent twice.
    pub origin: Option<Origin>,
}

impl NewRecord {
    /// A record with that payload, and no key, headers or origin.
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

    /// Bytes of key, headers (names and values) and payload together: what a log's record limit bounds.
    pub fn size(&self) -> usize {
        size(self.key.as_ref(), &self.headers, &self.payload)
    }

    /// Refuses a record above `limit` bytes: adapters call it on every record before they append the first.
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
