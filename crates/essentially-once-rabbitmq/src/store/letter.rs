//! One dead letter, in memory and as bytes.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::{BufMut as _, Bytes};
use essentially_once::{
    NewRecord, Offset, Record,
    backend::{DeadLetter, Edit},
};

use super::wire::{Decoded, Reader, put_bytes, put_offset};
use crate::log::packed;

/// About what a letter costs in memory besides its bytes. It is in up to three indexes.
const OVERHEAD: usize = 400;

/// A letter that is stored or staged. Its record stays encoded until the letter is read, since most
/// letters only wait.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Letter {
    pub(super) offset: Offset,
    /// The key by which letters keep their order, if the record has one that can be trusted.
    pub(super) key: Option<Bytes>,
    pub(super) status: Status,
    /// With its edit, if there is one.
    record: Bytes,
}

/// What tries change, which is everything but the record and its edit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Status {
    tries: u32,
    version: u64,
    /// Times are in milliseconds since 1970.
    parked_at: i64,
    last_failed_at: i64,
    pub(super) due: Option<i64>,
    first_reason: String,
    last_reason: String,
}

impl Letter {
    pub(super) fn new(letter: &DeadLetter) -> Self {
        Self {
            offset: letter.record.offset,
            key: letter.key().map(|key| Bytes::copy_from_slice(key)),
            status: Status::new(letter),
            record: encode_record(letter),
        }
    }

    /// The letter as it was parked. It can be decoded, because [`decode`](Self::decode) has tried.
    pub(super) fn read(&self) -> Decoded<DeadLetter> {
        let status = &self.status;
        let (record, edit) = decode_record(self.offset, &self.record)?;
        let mut letter = DeadLetter::new(record, status.tries, "", time(status.parked_at));
        letter.first_reason.clone_from(&status.first_reason);
        letter.last_reason.clone_from(&status.last_reason);
        letter.last_failed_at = time(status.last_failed_at);
        letter.due = status.due.map(time);
        letter.version = status.version;
        letter.edit = edit.map(Box::new);
        Ok(letter)
    }

    pub(super) fn is_edited(&self) -> bool {
        self.record.get(FLAGS_AT).is_some_and(|flags| flags & EDITED != 0)
    }

    /// Whether the other letter has the same record, edited alike.
    pub(super) fn has_record_of(&self, other: &Self) -> bool {
        self.record == other.record
    }

    /// The same record with another status. Both share the record's memory.
    pub(super) fn with(&self, status: Status) -> Self {
        Self {
            offset: self.offset,
            key: self.key.clone(),
            status,
            record: self.record.clone(),
        }
    }

    /// Copies the record. As a part of an entry it would keep all of it in memory.
    pub(super) fn detached(&self) -> Self {
        Self {
            record: Bytes::copy_from_slice(&self.record),
            ..self.clone()
        }
    }

    /// About how much memory it takes.
    pub(super) fn size(&self) -> usize {
        let key = self.key.as_ref().map_or(0, Bytes::len);
        key + self.status.text() + self.record.len() + OVERHEAD
    }

    /// The bytes of [`encode`](Self::encode).
    pub(super) fn encoded_len(&self) -> usize {
        16 + self.status.encoded_len() + 4 + self.record.len()
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put_offset(out, self.offset);
        self.status.encode(out);
        put_bytes(out, &self.record);
    }

    pub(super) fn decode(reader: &mut Reader) -> Decoded<Self> {
        let (offset, status, bytes) = (reader.offset()?, Status::decode(reader)?, reader.bytes()?);
        let (record, _) = decode_record(offset, &bytes)?;
        let key = record.key.filter(|_| record.malformed.is_none());
        Ok(Self {
            offset,
            key: key.map(|key| Bytes::copy_from_slice(&key)),
            status,
            record: bytes,
        })
    }
}

impl Status {
    fn new(letter: &DeadLetter) -> Self {
        Self {
            tries: letter.tries,
            version: letter.version,
            parked_at: millis(letter.parked_at),
            last_failed_at: millis(letter.last_failed_at),
            due: letter.due.map(millis),
            first_reason: letter.first_reason.clone(),
            last_reason: letter.last_reason.clone(),
        }
    }

    /// The bytes of the reasons.
    pub(super) fn text(&self) -> usize {
        self.first_reason.len() + self.last_reason.len()
    }

    /// The bytes of [`encode`](Self::encode).
    pub(super) fn encoded_len(&self) -> usize {
        let due = self.due.map_or(0, |_| 8);
        4 + 8 + 8 + 8 + 1 + due + 4 + 4 + self.text()
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.tries);
        out.put_u64(self.version);
        out.put_i64(self.parked_at);
        out.put_i64(self.last_failed_at);
        out.put_u8(self.due.is_some().into());
        if let Some(due) = self.due {
            out.put_i64(due);
        }
        put_bytes(out, self.first_reason.as_bytes());
        put_bytes(out, self.last_reason.as_bytes());
    }

    pub(super) fn decode(reader: &mut Reader) -> Decoded<Self> {
        Ok(Self {
            tries: reader.u32()?,
            version: reader.u64()?,
            parked_at: signed(reader)?,
            last_failed_at: signed(reader)?,
            due: match reader.u8()? {
                0 => None,
                1 => Some(signed(reader)?),
                _ => return Err("the flag of a letter's due time is neither 0 nor 1"),
            },
            first_reason: text(reader)?,
            last_reason: text(reader)?,
        })
    }
}

/// Where the flags of a record are: behind the time of append.
const FLAGS_AT: usize = 8;
const MALFORMED: u8 = 1;
/// In entries and snapshots of version 4 only.
const EDITED: u8 = 2;

/// The time of append, flags, why the record is malformed, how it was edited, and the rest as a
/// packed message.
fn encode_record(letter: &DeadLetter) -> Bytes {
    let DeadLetter { record, edit, .. } = letter;
    let mut new = NewRecord::new(record.payload.clone());
    new.key.clone_from(&record.key);
    new.headers.clone_from(&record.headers);
    new.origin.clone_from(&record.origin);
    let packed = packed::encode(&[new], UNIX_EPOCH, false);
    let malformed = record.malformed.as_deref();
    let edit = edit.as_ref().map(|edit| edit.encode());
    let more = malformed.map_or(0, str::len) + edit.as_ref().map_or(0, Vec::len);
    let mut out = Vec::with_capacity(17 + more + packed.len());
    out.put_i64(millis(record.appended_at));
    let flag = |is_set, flag| if is_set { flag } else { 0 };
    out.put_u8(flag(malformed.is_some(), MALFORMED) | flag(edit.is_some(), EDITED));
    if let Some(why) = malformed {
        put_bytes(&mut out, why.as_bytes());
    }
    if let Some(edit) = edit {
        put_bytes(&mut out, &edit);
    }
    out.put_slice(&packed);
    // Into memory of its own, without room for more.
    out.into_boxed_slice().into()
}

fn decode_record(offset: Offset, bytes: &Bytes) -> Decoded<(Record, Option<Edit>)> {
    let mut reader = Reader::new(bytes.clone());
    let appended_at = time(signed(&mut reader)?);
    let flags = reader.u8()?;
    if flags & !(MALFORMED | EDITED) != 0 {
        return Err("a letter has an unknown flag");
    }
    let malformed = match flags & MALFORMED {
        0 => None,
        _ => Some(Arc::from(text(&mut reader)?)),
    };
    let edit = match flags & EDITED {
        0 => None,
        _ => Some(reader.bytes()?),
    };
    let records = packed::decode(0, reader.rest()).map_err(|_| "the record of a letter is damaged")?;
    let [mut record] = <[Record; 1]>::try_from(records).map_err(|_| "a letter has more than one record")?;
    (record.offset, record.appended_at, record.malformed) = (offset, appended_at, malformed);
    let edit = edit.map(|edit| Edit::decode(edit, &record)).transpose()?;
    Ok((record, edit))
}

fn text(reader: &mut Reader) -> Decoded<String> {
    let bytes = reader.bytes()?;
    let text = str::from_utf8(&bytes).map_err(|_| "a reason is not UTF-8")?;
    Ok(text.to_owned())
}

fn signed(reader: &mut Reader) -> Decoded<i64> {
    Ok(reader.u64()?.cast_signed())
}

/// Rounded down, so that times keep their order.
fn millis(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(before) => {
            let before = before.duration().as_nanos().div_ceil(1_000_000);
            i64::try_from(before).map_or(i64::MIN, |before| -before)
        }
    }
}

fn time(millis: i64) -> SystemTime {
    let span = Duration::from_millis(millis.unsigned_abs());
    let time = match millis {
        ..0 => UNIX_EPOCH.checked_sub(span),
        0.. => UNIX_EPOCH.checked_add(span),
    };
    time.unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
pub(super) mod tests {
    use essentially_once::consumer::Operator;
    use proptest::{collection::vec, option, prelude::*};

    use super::*;
    use crate::log::codec::tests::any_record;

    prop_compose! {
        /// A letter at a low offset, so that letters meet.
        pub(in super::super) fn dead_letter()(
            (hi, lo) in (0u64..2, 0u64..6),
            new in any_record(),
            key in option::of(vec(0u8..2, 0..2)),
            malformed in option::of("[a-z]{0,4}"),
            (tries, version) in any::<(u32, u64)>(),
            times in any::<[i32; 3]>(),
            due in option::of(0i64..4),
            reasons in ("[a-zü]{0,9}", "[a-zü]{0,9}"),
            edited in option::of(("[a-z]{0,4}", any_record())),
        ) -> DeadLetter {
            let [appended_at, parked_at, last_failed_at] = times.map(|millis| time(millis.into()));
            let mut record = Record::new(Offset::new(hi, lo), appended_at, new.payload);
            record.key = key.map(Bytes::from);
            (record.headers, record.origin) = (new.headers, new.origin);
            record.malformed = malformed.map(Arc::from);
            let mut letter = DeadLetter::new(record, tries, &reasons.0, parked_at);
            (letter.last_reason, letter.last_failed_at) = (reasons.1, last_failed_at);
            letter.due = due.map(time);
            if let Some((by, new)) = edited {
                letter.edit(new, &Operator::new(by));
            }
            letter.version = version;
            letter
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn letters_come_back_as_they_were(parked in dead_letter()) {
            let letter = Letter::new(&parked);
            prop_assert_eq!(letter.read(), Ok(parked.clone()));
            prop_assert_eq!(&letter.key, &parked.key().cloned());
            let mut encoded = Vec::new();
            letter.encode(&mut encoded);
            prop_assert_eq!(encoded.len(), letter.encoded_len());
            prop_assert_eq!(letter.is_edited(), parked.edit.is_some());
            let decoded = Letter::decode(&mut Reader::new(encoded.into()));
            prop_assert_eq!(decoded, Ok(letter));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
            let _ = Letter::decode(&mut Reader::new(bytes.clone().into()));
            let _ = decode_record(Offset::ZERO, &bytes.into());
        }
    }

    #[test]
    fn times_are_rounded_down_and_stay_in_range() {
        let nanos = Duration::from_nanos(1);
        for (exact, rounded) in [
            (UNIX_EPOCH - nanos, -1),
            (UNIX_EPOCH, 0),
            (UNIX_EPOCH + Duration::from_millis(1) - nanos, 0),
            (UNIX_EPOCH + Duration::from_millis(1), 1),
        ] {
            assert_eq!(millis(exact), rounded, "{exact:?}");
        }
        for extreme in [i64::MIN, i64::MAX] {
            let _ = time(extreme);
        }
    }
}
