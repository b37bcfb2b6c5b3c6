//! Records as stream entries and back. [`RedisLog`](crate::RedisLog#wire-format) documents the
//! format.
//!
//! An entry is a list of fields and values. Our own entries begin with [`MARK`] and a [`VERSION`].
//! Every entry decodes to a record. An invalid entry becomes a malformed record with all its fields
//! and values as payload.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use essentially_once::{
    NewRecord, Offset, Origin, Record,
    backend::{FetchBuffer, NumberingCache},
};

use crate::msgpack::{Chunk, Packed};

const MARK: &[u8] = b"essentially-once";
const VERSION: &[u8] = b"1";
const KEY: &[u8] = b"key";
const PAYLOAD: &[u8] = b"payload";
const PRODUCER: &[u8] = b"producer";
const SEQUENCE: &[u8] = b"sequence";
const HEADER: &[u8] = b"h:";

/// The end of the year 9999, in milliseconds. Ids can hold later times, which many libraries cannot
/// format or add to.
const LAST_TIME: u64 = 253_402_300_799_999;

/// The number of fields and values that [`encode`] makes of a record.
pub(crate) fn arguments(record: &NewRecord) -> usize {
    let key = if record.key.is_some() { 2 } else { 0 };
    let origin = if record.origin.is_some() { 4 } else { 0 };
    2 + key + origin + 2 * record.headers.len() + 2
}

/// The index of the producer among the fields and values of a record with an origin, from 0. Two
/// after it is the sequence.
pub(crate) fn producer_at(record: &NewRecord) -> usize {
    if record.key.is_some() { 5 } else { 3 }
}

/// Passes the fields and values of a record's entry to `put`, in order.
pub(crate) fn encode(record: &NewRecord, mut put: impl FnMut(&[u8])) {
    put(MARK);
    put(VERSION);
    if let Some(key) = &record.key {
        put(KEY);
        put(key);
    }
    if let Some(origin) = &record.origin {
        put(PRODUCER);
        put(origin.numbering.to_string().as_bytes());
        put(SEQUENCE);
        put(origin.sequence.to_string().as_bytes());
    }
    for (name, value) in &record.headers {
        put(&[HEADER, name.as_bytes()].concat());
        put(value);
    }
    put(PAYLOAD);
    put(&record.payload);
}

/// Decodes entries.
pub(crate) struct Decoder {
    /// The fields of other programs' entries that hold payload and key.
    payload_field: Vec<u8>,
    key_field: Vec<u8>,
    numberings: NumberingCache,
    /// The bytes of the records of one fetch.
    copies: FetchBuffer,
}

impl Decoder {
    pub(crate) fn new(payload_field: &str, key_field: &str) -> Self {
        Self {
            payload_field: payload_field.into(),
            key_field: key_field.into(),
            numberings: NumberingCache::new(),
            copies: FetchBuffer::default(),
        }
    }

    /// The records of packed `XRANGE` entries, `[[id, [field, value, ...]], ...]`; `None` if they
    /// have another form.
    pub(crate) fn entries(&mut self, packed: Vec<u8>) -> Option<Vec<Record>> {
        let chunk = Chunk(packed.into());
        self.copies = FetchBuffer::with_capacity(self.copies.copied());
        let mut reading = Packed::new(&chunk.0);
        let count = reading.array()?;
        let mut records = Vec::with_capacity(count.min(chunk.0.len()));
        let mut fields = Vec::new();
        for _ in 0..count {
            let 2 = reading.array()? else { return None };
            let offset = parse_id(reading.string()?)?;
            fields.clear();
            for _ in 0..reading.array()? {
                fields.push(reading.string()?);
            }
            records.push(self.record(&chunk, offset, &fields));
        }
        reading.is_empty().then_some(records)
    }

    fn record(&mut self, chunk: &Chunk, offset: Offset, fields: &[&[u8]]) -> Record {
        let time = UNIX_EPOCH + Duration::from_millis(offset.hi().min(LAST_TIME));
        let decoded = match fields.first() {
            Some(first) if *first == MARK => self.own(chunk, offset, time, fields),
            _ => self.foreign(chunk, offset, time, fields),
        };
        decoded.unwrap_or_else(|reason| {
            let mut record = Record::new(offset, time, raw(fields));
            record.malformed = Some(reason.into());
            record
        })
    }

    fn own(&mut self, chunk: &Chunk, offset: Offset, time: SystemTime, fields: &[&[u8]]) -> Result<Record, String> {
        let (pairs, []) = fields.as_chunks::<2>() else {
            return Err("its last field has no value".into());
        };
        let (mut key, mut payload, mut producer, mut sequence) = (None, None, None, None);
        let mut headers = 0;
        for (index, [name, value]) in pairs.iter().enumerate() {
            let known = match *name {
                MARK if index == 0 && *value == VERSION => continue,
                MARK if index == 0 => return Err(format!("its version is {}, not 1", shown(value))),
                PAYLOAD => &mut payload,
                KEY => &mut key,
                PRODUCER => &mut producer,
                SEQUENCE => &mut sequence,
                name => {
                    let header = name
                        .strip_prefix(HEADER)
                        .ok_or_else(|| format!("field {} is unknown", shown(name)))?;
                    str::from_utf8(header).map_err(|_| format!("header name {} is not UTF-8", shown(header)))?;
                    headers += 1;
                    continue;
                }
            };
            if known.replace(index).is_some() {
                return Err(format!("field {} appears twice", shown(name)));
            }
        }
        let payload = payload.ok_or("it has no payload field")?;
        let origin = match (producer, sequence) {
            (None, None) => None,
            (Some(producer), Some(sequence)) => Some(self.origin(pairs[producer][1], pairs[sequence][1])?),
            _ => return Err("it has only one of the fields \"producer\" and \"sequence\"".into()),
        };
        let mut record = Record::new(offset, time, chunk.take(pairs[payload][1], &mut self.copies));
        record.key = key.map(|key| chunk.take(pairs[key][1], &mut self.copies));
        record.origin = origin;
        if headers > 0 {
            record.headers.reserve_exact(headers);
            for [name, value] in pairs {
                if let Some(name) = name.strip_prefix(HEADER) {
                    let value = chunk.take(value, &mut self.copies);
                    record.headers.push((String::from_utf8_lossy(name).into_owned(), value));
                }
            }
        }
        Ok(record)
    }

    fn origin(&mut self, producer: &[u8], sequence: &[u8]) -> Result<Origin, String> {
        let number = str::from_utf8(sequence)
            .ok()
            .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok())
            .ok_or_else(|| format!("sequence {} is not a number below 2^64", shown(sequence)))?;
        let numbering = self.numberings.parse(producer)?;
        Ok(Origin::new(numbering.producer().clone(), numbering.epoch(), number))
    }

    fn foreign(&mut self, chunk: &Chunk, offset: Offset, time: SystemTime, fields: &[&[u8]]) -> Result<Record, String> {
        let (pairs, []) = fields.as_chunks::<2>() else {
            return Err("its last field has no value".into());
        };
        if let Some([name, _]) = pairs.iter().find(|[name, _]| str::from_utf8(name).is_err()) {
            return Err(format!("field name {} is not UTF-8", shown(name)));
        }
        let mut record = Record::new(offset, time, Bytes::new());
        let mut has_payload = false;
        for [name, value] in pairs {
            if !has_payload && *name == self.payload_field {
                record.payload = chunk.take(value, &mut self.copies);
                has_payload = true;
            } else if record.key.is_none() && *name == self.key_field {
                record.key = Some(chunk.take(value, &mut self.copies));
            } else {
                let name = String::from_utf8_lossy(name).into_owned();
                record.headers.push((name, chunk.take(value, &mut self.copies)));
            }
        }
        Ok(record)
    }
}

/// Parses a stream id, `<milliseconds>-<sequence>`.
pub(crate) fn parse_id(id: &[u8]) -> Option<Offset> {
    let (hi, lo) = str::from_utf8(id).ok()?.split_once('-')?;
    Some(Offset::new(hi.parse().ok()?, lo.parse().ok()?))
}

/// All fields and values, as a RESP array of bulk strings.
fn raw(fields: &[&[u8]]) -> Vec<u8> {
    let mut raw = format!("*{}\r\n", fields.len()).into_bytes();
    for field in fields {
        raw.extend(format!("${}\r\n", field.len()).bytes());
        raw.extend(*field);
        raw.extend(b"\r\n");
    }
    raw
}

/// The start of arbitrary bytes, for an error message.
pub(crate) fn shown(bytes: &[u8]) -> String {
    match bytes.split_at_checked(40) {
        Some((head, rest)) if !rest.is_empty() => format!("{:?}...", String::from_utf8_lossy(head)),
        _ => format!("{:?}", String::from_utf8_lossy(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use essentially_once::{Epoch, ProducerId};
    use proptest::{collection::vec, option, prelude::*};

    use super::*;
    use crate::msgpack::pack;

    fn decode(fields: &[&[u8]]) -> Record {
        decode_at("1700000000000-3", fields)
    }

    fn decode_at(id: &str, fields: &[&[u8]]) -> Record {
        let mut packed = Vec::new();
        pack::array(&mut packed, 1);
        pack::array(&mut packed, 2);
        pack::string(&mut packed, id.as_bytes());
        pack::array(&mut packed, fields.len());
        for field in fields {
            pack::string(&mut packed, field);
        }
        let records = Decoder::new("payload", "key").entries(packed).expect("entries");
        let [record] = <[Record; 1]>::try_from(records).expect("an entry");
        record
    }

    fn encoded(record: &NewRecord) -> Vec<Vec<u8>> {
        let mut fields = Vec::new();
        encode(record, |field| fields.push(field.to_vec()));
        fields
    }

    fn decoded(fields: &[Vec<u8>]) -> Record {
        decode(&fields.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    fn any_record() -> impl Strategy<Value = NewRecord> {
        let bytes = || vec(any::<u8>(), 0..20);
        let epoch = prop_oneof![Just(0), any::<u64>()];
        let producer = option::of(("[a-z0-9][a-zA-Z0-9._:/@+=-]{0,20}", epoch, any::<u64>()));
        (
            option::of(bytes()),
            vec((any::<String>(), bytes()), 0..4),
            bytes(),
            producer,
        )
            .prop_map(|(key, headers, payload, origin)| {
                let mut record = NewRecord::new(payload);
                record.key = key.map(Bytes::from);
                record.headers = headers.into_iter().map(|(name, value)| (name, value.into())).collect();
                record.origin = origin.map(|(producer, epoch, sequence)| {
                    let producer = ProducerId::new(producer).expect("a valid name");
                    Origin::new(producer, Epoch::new(epoch), sequence)
                });
                record
            })
    }

    /// Fields with a meaning, mixed with arbitrary ones.
    fn any_fields() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let known = [MARK, VERSION, KEY, PAYLOAD, PRODUCER, SEQUENCE, b"h:a", b"7"];
        let field = prop_oneof![
            proptest::sample::select(known.to_vec()).prop_map(<[u8]>::to_vec),
            vec(any::<u8>(), 0..6)
        ];
        vec(field, 0..12)
    }

    proptest! {
        #[test]
        fn what_was_encoded_decodes_to_the_same(new in any_record()) {
            let fields = encoded(&new);
            prop_assert_eq!(fields.len(), arguments(&new));
            let record = decoded(&fields);
            prop_assert_eq!(&record.malformed, &None);
            prop_assert_eq!((record.key, record.headers, record.payload, record.origin),
                (new.key, new.headers, new.payload, new.origin));
        }

        #[test]
        fn any_fields_decode_to_a_record_with_nothing_lost(fields in any_fields(), own in any::<bool>()) {
            let mut fields = fields;
            if own {
                fields.splice(0..0, [MARK.to_vec(), VERSION.to_vec()]);
            }
            let record = decoded(&fields);
            if record.malformed.is_some() {
                let values: Vec<_> = fields.iter().map(Vec::as_slice).collect();
                prop_assert_eq!(record.payload, raw(&values));
            } else {
                let named = record.key.iter().len() + record.headers.len();
                prop_assert!(named <= fields.len() / 2);
            }
        }
    }

    #[test]
    fn malformed_entries_say_why_and_keep_all_bytes() {
        for (fields, reason) in [
            (
                &[&b"essentially-once"[..], b"2", b"payload", b"x"][..],
                "version is \"2\"",
            ),
            (&[b"essentially-once", b"1"], "no payload"),
            (
                &[b"essentially-once", b"1", b"payload", b"x", b"payload", b"y"],
                "\"payload\" appears twice",
            ),
            (
                &[b"essentially-once", b"1", b"payload", b"x", b"essentially-once", b"1"],
                "\"essentially-once\" is unknown",
            ),
            (
                &[b"essentially-once", b"1", b"payload", b"x", b"colour", b"red"],
                "\"colour\" is unknown",
            ),
            (
                &[b"essentially-once", b"1", b"payload", b"x", b"h:\xFF", b"red"],
                "is not UTF-8",
            ),
            (
                &[b"essentially-once", b"1", b"payload", b"x", b"producer", b"p"],
                "only one",
            ),
            (
                &[
                    b"essentially-once",
                    b"1",
                    b"payload",
                    b"x",
                    b"producer",
                    b"p",
                    b"sequence",
                    b"-1",
                ],
                "\"-1\" is not a number",
            ),
            (
                &[
                    b"essentially-once",
                    b"1",
                    b"payload",
                    b"x",
                    b"producer",
                    b"p",
                    b"sequence",
                    b"+1",
                ],
                "\"+1\" is not a number",
            ),
            (
                &[
                    b"essentially-once",
                    b"1",
                    b"payload",
                    b"x",
                    b"producer",
                    b"p",
                    b"sequence",
                    b"",
                ],
                "\"\" is not a number",
            ),
            (
                &[
                    b"essentially-once",
                    b"1",
                    b"payload",
                    b"x",
                    b"producer",
                    b"p",
                    b"sequence",
                    b"18446744073709551616",
                ],
                "is not a number below 2^64",
            ),
            (
                &[
                    b"essentially-once",
                    b"1",
                    b"payload",
                    b"x",
                    b"producer",
                    b"a b",
                    b"sequence",
                    b"1",
                ],
                "not allowed",
            ),
            // Each numbering has one spelling, so a duplicate cannot pass under another.
            (
                &[
                    b"essentially-once",
                    b"1",
                    b"payload",
                    b"x",
                    b"producer",
                    b"web#0",
                    b"sequence",
                    b"1",
                ],
                "not an epoch",
            ),
            (
                &[
                    b"essentially-once",
                    b"1",
                    b"payload",
                    b"x",
                    b"producer",
                    b"web#01",
                    b"sequence",
                    b"1",
                ],
                "not an epoch",
            ),
            (&[b"\xFF", b"x"], "is not UTF-8"),
            (&[b"payload"], "no value"),
        ] {
            let record = decode(fields);
            let found = record.malformed.expect(reason);
            assert!(found.contains(reason), "{found}, expected {reason}");
            assert_eq!(record.payload, raw(fields));
        }
        assert_eq!(raw(&[b"a", b"\r\n"]), b"*2\r\n$1\r\na\r\n$2\r\n\r\n\r\n");
    }

    #[test]
    fn foreign_fields_are_headers_but_for_the_first_payload_and_key() {
        let record = decode(&[
            b"a", b"1", b"payload", b"x", b"key", b"k", b"a", b"2", b"payload", b"y", b"key", b"l",
        ]);
        assert_eq!(
            (&record.payload[..], record.key.as_deref()),
            (&b"x"[..], Some(&b"k"[..]))
        );
        let headers: Vec<_> = record
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), &value[..]))
            .collect();
        let expected: [(&str, &[u8]); 4] = [("a", b"1"), ("a", b"2"), ("payload", b"y"), ("key", b"l")];
        assert_eq!(headers, expected);
        let empty = decode(&[b"only", b"a header"]);
        assert!(empty.payload.is_empty() && empty.malformed.is_none());
        assert_eq!(
            decode(&[b"a", b"1", b"essentially-once", b"1"]).headers.len(),
            2,
            "the mark only counts as the first field"
        );
    }

    #[test]
    fn any_id_has_a_time() {
        for (id, seconds) in [
            ("5-0", 0),
            ("1700000000000-3", 1_700_000_000),
            ("18446744073709551615-0", 253_402_300_799),
        ] {
            let record = decode_at(id, &[]);
            let since = record.appended_at.duration_since(UNIX_EPOCH).expect("after 1970");
            assert_eq!(since.as_secs(), seconds, "{id}");
        }
        assert_eq!(Decoder::new("p", "k").entries(b"\xc0".to_vec()), None);
    }
}
