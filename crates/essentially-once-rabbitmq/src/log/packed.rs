//! Many records in one message. The crate's documentation describes the format, byte by byte.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, BufMut, Bytes};
use essentially_once::{
    NewRecord, Offset, Origin, Record,
    backend::{Header, NumberingCache},
};

/// The content type of a message with many records.
pub(crate) const CONTENT_TYPE: &str = "application/vnd.essentially-once.packed";

/// Bytes before the records.
const HEAD: usize = 22;

/// The bytes that a message may hold before compression: the largest message of RabbitMQ. The limit
/// keeps a forged message from taking all memory.
const UNPACKED: usize = 128 * 1024 * 1024;

/// LZ4 expands a byte to at most this many.
const EXPANSION: usize = 255;

const COMPRESSED: u8 = 1;
const KEY: u8 = 1;
const ORIGIN: u8 = 2;
const HEADERS: u8 = 4;

/// Milliseconds since 1970; 0 before.
pub(super) fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// The inverse of [`millis`].
pub(super) fn time(millis: u64) -> SystemTime {
    UNIX_EPOCH
        .checked_add(Duration::from_millis(millis))
        .unwrap_or(UNIX_EPOCH)
}

/// Packs the records. They must fit a message.
pub(crate) fn encode(records: &[NewRecord], now: SystemTime, compress: bool) -> Bytes {
    let size = records.iter().map(|record| record.size() + 16).sum::<usize>();
    let mut body = Vec::with_capacity(HEAD + size);
    body.put_slice(b"EOPK");
    body.put_u8(1);
    body.put_u8(0);
    body.put_u32(records.len() as u32);
    body.put_u64(millis(now));
    body.put_u32(0);
    for record in records {
        put_record(&mut body, record);
    }
    let length = body.len() - HEAD;
    body[18..HEAD].copy_from_slice(&(length as u32).to_be_bytes());
    if compress {
        let compressed = lz4_flex::block::compress(&body[HEAD..]);
        if compressed.len() < length {
            body[5] = COMPRESSED;
            body.truncate(HEAD);
            body.extend_from_slice(&compressed);
        }
    }
    body.into()
}

/// The bytes that [`encode`] takes at most for a record among others.
pub(crate) fn size_bound(record: &NewRecord) -> usize {
    const VARINT: usize = 10;
    let origin = record.origin.as_ref();
    record.size()
        + origin.map_or(0, |origin| origin.numbering.to_string().len())
        + 2 * VARINT * record.headers.len()
        + 6 * VARINT
}

fn put_record(body: &mut Vec<u8>, record: &NewRecord) {
    let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
    body.put_u8(
        flag(record.key.is_some(), KEY)
            | flag(record.origin.is_some(), ORIGIN)
            | flag(!record.headers.is_empty(), HEADERS),
    );
    if let Some(key) = &record.key {
        put_bytes(body, key);
    }
    if let Some(origin) = &record.origin {
        put_bytes(body, origin.numbering.to_string().as_bytes());
        put_varint(body, origin.sequence);
    }
    if !record.headers.is_empty() {
        put_varint(body, record.headers.len() as u64);
        for (name, value) in &record.headers {
            put_bytes(body, name.as_bytes());
            put_bytes(body, value);
        }
    }
    put_bytes(body, &record.payload);
}

fn put_bytes(body: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(body, bytes.len() as u64);
    body.put_slice(bytes);
}

fn put_varint(body: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        body.put_u8(number as u8 | 0x80);
        number >>= 7;
    }
    body.put_u8(number as u8);
}

/// The number of records in a message that can be decoded.
pub(crate) fn count(body: &[u8]) -> u64 {
    body.get(6..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |count| u32::from_be_bytes(*count).into())
}

/// The records of the message at that stream offset, or why it cannot be decoded. They share the
/// memory of the body.
pub(crate) fn decode(offset: u64, body: &Bytes) -> Result<Vec<Record>, String> {
    let mut head = body.clone();
    if head.len() < HEAD {
        return Err(format!("a packed message of {} bytes is cut short", head.len()));
    }
    if &head.split_to(4)[..] != b"EOPK" {
        return Err("it claims to be packed but does not begin with EOPK".into());
    }
    let (version, flags) = (head.get_u8(), head.get_u8());
    if version != 1 || flags & !COMPRESSED != 0 {
        return Err(format!(
            "packed version {version} with flags {flags} is unknown to this version; upgrade essentially-once-rabbitmq"
        ));
    }
    let (count, appended_at, length) = (head.get_u32() as usize, time(head.get_u64()), head.get_u32() as usize);
    let mut input = match flags {
        COMPRESSED => Input(expand(&head, length)?),
        _ => Input(head),
    };
    // The smallest record takes two bytes, so this bounds the allocation below.
    if input.0.len() != length || count == 0 || count > length / 2 {
        return Err(format!(
            "{count} packed records in {length} bytes do not match the {} bytes in the message",
            input.0.len()
        ));
    }
    let mut records = Vec::with_capacity(count);
    let mut numberings = NumberingCache::new();
    for index in 0..count {
        let read = input.record(Offset::new(offset, index as u64), appended_at, &mut numberings);
        records.push(read.ok_or_else(|| format!("packed record {index} of {count} cannot be decoded"))?);
    }
    match input.0.is_empty() {
        true => Ok(records),
        false => Err(format!("{} bytes follow the last packed record", input.0.len())),
    }
}

fn expand(compressed: &[u8], length: usize) -> Result<Bytes, String> {
    if length > UNPACKED || length > compressed.len().saturating_mul(EXPANSION) {
        return Err(format!("{} compressed bytes claim to be {length}", compressed.len()));
    }
    match lz4_flex::block::decompress(compressed, length) {
        Ok(expanded) => Ok(expanded.into()),
        Err(error) => Err(format!("it cannot be decompressed: {error}")),
    }
}

/// The rest of the bytes to decode.
struct Input(Bytes);

impl Input {
    fn record(&mut self, offset: Offset, at: SystemTime, numberings: &mut NumberingCache) -> Option<Record> {
        let flags = self.byte()?;
        if flags & !(KEY | ORIGIN | HEADERS) != 0 {
            return None;
        }
        let mut record = Record::new(offset, at, Bytes::new());
        if flags & KEY != 0 {
            record.key = Some(self.bytes()?);
        }
        if flags & ORIGIN != 0 {
            record.origin = Some(self.origin(numberings)?);
        }
        if flags & HEADERS != 0 {
            let count = self.varint()?;
            for _ in 0..count {
                record.headers.push(self.header()?);
            }
        }
        record.payload = self.bytes()?;
        Some(record)
    }

    fn origin(&mut self, numberings: &mut NumberingCache) -> Option<Origin> {
        let numbering = numberings.parse(&self.bytes()?).ok()?;
        let (producer, epoch) = (numbering.producer().clone(), numbering.epoch());
        Some(Origin::new(producer, epoch, self.varint()?))
    }

    fn header(&mut self) -> Option<Header> {
        let name = std::str::from_utf8(&self.bytes()?).ok()?.to_owned();
        Some((name, self.bytes()?))
    }

    fn bytes(&mut self) -> Option<Bytes> {
        let length = usize::try_from(self.varint()?).ok()?;
        (length <= self.0.len()).then(|| self.0.split_to(length))
    }

    fn varint(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn byte(&mut self) -> Option<u8> {
        self.0.has_remaining().then(|| self.0.get_u8())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::log::codec::tests::any_record;

    fn same(new: &NewRecord, read: &Record) -> bool {
        (&new.key, &new.headers, &new.payload, &new.origin) == (&read.key, &read.headers, &read.payload, &read.origin)
    }

    proptest! {
        #[test]
        fn records_come_back_as_they_were(records in vec(any_record(), 1..20), compress: bool) {
            let read = decode(7, &encode(&records, time(5), compress)).expect("decodes");
            prop_assert_eq!(read.len(), records.len());
            for (index, (new, read)) in records.iter().zip(&read).enumerate() {
                prop_assert!(same(new, read), "{:?} {:?}", new, read);
                prop_assert_eq!(read.offset, Offset::new(7, index as u64));
                prop_assert_eq!(read.appended_at, time(5));
            }
        }

        #[test]
        fn no_bytes_make_it_panic(body in vec(any::<u8>(), 0..200)) {
            let _ = decode(0, &body.into());
        }

        #[test]
        fn no_damage_makes_it_panic(records in vec(any_record(), 1..5), compress: bool, at: usize, to: u8, cut: usize) {
            let mut body = encode(&records, UNIX_EPOCH, compress).to_vec();
            let length = body.len();
            body[at % length] = to;
            let _ = decode(0, &body.clone().into());
            body.truncate(cut % length);
            prop_assert!(decode(0, &body.into()).is_err());
        }
    }

    #[test]
    fn a_forged_size_takes_no_memory() {
        let mut body = b"EOPK\x01\x01".to_vec();
        body.put_u32(1);
        body.put_u64(0);
        body.put_u32(u32::MAX);
        body.extend([0; 100]);
        assert!(decode(0, &body.into()).expect_err("too large").contains("claim"));
    }
}
