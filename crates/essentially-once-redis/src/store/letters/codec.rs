//! Letters as values of a hash, and as members of the indices.
//! [`RedisStore`](crate::RedisStore#dead-letters) documents both.

use std::{
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use essentially_once::{
    Offset, Origin, Record,
    backend::{DeadLetter, Edit, FetchBuffer, Numbering},
};

use crate::{
    log::shown,
    msgpack::{Chunk, Packed, pack},
};

const MARK: &[u8] = b"essentially-once";
const VERSION: &[u8] = b"1";
const HEADER: &[u8] = b"h:";

/// The length of a [`field`].
const FIELD_LEN: usize = 20 + 1 + 20;

/// An offset as text of a fixed length, whose order is that of the offsets.
pub(super) fn field(offset: Offset) -> String {
    format!("{:020}-{:020}", offset.hi(), offset.lo())
}

pub(super) fn parse_field(field: &[u8]) -> Option<Offset> {
    let (hi, lo) = str::from_utf8(field).ok()?.split_once('-')?;
    let is_number = |digits: &str| digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = |digits: &str| digits.parse().ok().filter(|_| is_number(digits));
    Some(Offset::new(number(hi)?, number(lo)?))
}

/// The member for a letter in the index by offset.
pub(super) fn member_by_offset(offset: Offset, key: Option<&[u8]>) -> Vec<u8> {
    let mut member = field(offset).into_bytes();
    if let Some(key) = key {
        member.push(b' ');
        member.extend(key);
    }
    member
}

/// The range in the index by offset that holds a letter's member.
pub(super) fn range_of(offset: Offset) -> [String; 2] {
    let field = field(offset);
    // A space or nothing follows the field, and this is the character after the space.
    [format!("[{field}"), format!("({field}!")]
}

/// The offset and key of a member in the index by offset.
pub(super) fn parse_member_by_offset(member: &[u8]) -> Option<(Offset, Option<Bytes>)> {
    let (field, rest) = member.split_at_checked(FIELD_LEN)?;
    let key = match rest {
        [] => None,
        [b' ', key @ ..] => Some(Bytes::copy_from_slice(key)),
        _ => return None,
    };
    Some((parse_field(field)?, key))
}

/// The start of the members for a key in the index by key. Zero bytes are escaped, so that the
/// order of the members is that of the keys, and then of the offsets.
pub(super) fn key_prefix(key: &[u8]) -> Vec<u8> {
    let mut prefix = Vec::with_capacity(key.len() + 1);
    for byte in key {
        match byte {
            0 => prefix.extend([0, 0xff]),
            byte => prefix.push(*byte),
        }
    }
    prefix.push(0);
    prefix
}

pub(super) fn parse_key_prefix(prefix: &[u8]) -> Option<Bytes> {
    let mut rest = prefix.strip_suffix(&[0])?.iter();
    let mut key = Vec::with_capacity(rest.len());
    while let Some(byte) = rest.next() {
        if *byte == 0 && rest.next() != Some(&0xff) {
            return None;
        }
        key.push(*byte);
    }
    Some(key.into())
}

/// The member for a letter in the index by key.
pub(super) fn member_by_key(offset: Offset, key: &[u8]) -> Vec<u8> {
    let mut member = key_prefix(key);
    member.extend(field(offset).bytes());
    member
}

/// The time in milliseconds since 1970, rounded down.
pub(super) fn millis(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_millis()).unwrap_or(i64::MAX),
        Err(before) => {
            let before = before.duration().as_nanos().div_ceil(1_000_000);
            i64::try_from(before).map_or(i64::MIN, |millis| -millis)
        }
    }
}

fn from_millis(millis: i64) -> Option<SystemTime> {
    let distance = Duration::from_millis(millis.unsigned_abs());
    match millis {
        ..0 => UNIX_EPOCH.checked_sub(distance),
        0.. => UNIX_EPOCH.checked_add(distance),
    }
}

/// The letter as it comes back: with times in milliseconds.
pub(super) fn rounded(mut letter: DeadLetter) -> DeadLetter {
    let round = |time: &mut SystemTime| *time = from_millis(millis(*time)).unwrap_or(*time);
    round(&mut letter.record.appended_at);
    round(&mut letter.parked_at);
    round(&mut letter.last_failed_at);
    letter.due.iter_mut().for_each(round);
    if let Some(edit) = &mut letter.edit {
        round(&mut edit.original.appended_at);
        round(&mut edit.at);
    }
    letter
}

pub(super) fn encode(letter: &DeadLetter) -> Vec<u8> {
    let DeadLetter { record, .. } = letter;
    let mut fields = Fields::with_capacity(letter.size() + 16 * record.headers.len() + 512);
    fields.put(MARK, VERSION);
    fields.put(b"tries", letter.tries.to_string());
    fields.put(b"first_reason", &letter.first_reason);
    fields.put(b"last_reason", &letter.last_reason);
    fields.put(b"parked_at", millis(letter.parked_at).to_string());
    fields.put(b"last_failed_at", millis(letter.last_failed_at).to_string());
    if let Some(due) = letter.due {
        fields.put(b"due", millis(due).to_string());
    }
    fields.put(b"version", letter.version.to_string());
    fields.put(b"appended_at", millis(record.appended_at).to_string());
    if let Some(malformed) = &record.malformed {
        fields.put(b"malformed", &**malformed);
    }
    if let Some(key) = &record.key {
        fields.put(b"key", key);
    }
    if let Some(origin) = &record.origin {
        fields.put(b"producer", origin.numbering.to_string());
        fields.put(b"sequence", origin.sequence.to_string());
    }
    if let Some(edit) = &letter.edit {
        fields.put(b"edit", edit.encode());
    }
    for (name, value) in &record.headers {
        fields.put(&[HEADER, name.as_bytes()].concat(), value);
    }
    fields.put(b"payload", &record.payload);
    fields.finish()
}

/// A packed array of fields and values.
struct Fields {
    packed: Vec<u8>,
    count: u32,
}

impl Fields {
    /// The head of an array with a length of 4 bytes, which is known at the end.
    const HEAD: [u8; 5] = [0xdd, 0, 0, 0, 0];

    fn with_capacity(bytes: usize) -> Self {
        let mut packed = Vec::with_capacity(bytes);
        packed.extend(Self::HEAD);
        Self { packed, count: 0 }
    }

    fn put(&mut self, name: &[u8], value: impl AsRef<[u8]>) {
        pack::string(&mut self.packed, name);
        pack::string(&mut self.packed, value.as_ref());
        self.count += 2;
    }

    fn finish(mut self) -> Vec<u8> {
        self.packed[1..Self::HEAD.len()].copy_from_slice(&self.count.to_be_bytes());
        self.packed
    }
}

/// Decodes the letter at an offset, or says what is wrong with the value.
pub(super) fn decode(offset: Offset, value: Vec<u8>) -> Result<DeadLetter, String> {
    let chunk = Chunk(value.into());
    let mut copies = FetchBuffer::default();
    let mut take = |part| chunk.take(part, &mut copies);
    let pairs = unpack(&chunk.0).ok_or("it is not a packed array of fields and values")?;
    let pairs = match &pairs[..] {
        [(MARK, VERSION), pairs @ ..] => pairs,
        [(MARK, version), ..] => return Err(format!("its version is {}, not 1", shown(version))),
        _ => return Err("its first field is not \"essentially-once\"".into()),
    };
    let (mut fields, mut headers) = (Found::default(), Vec::new());
    for (name, value) in pairs {
        match name.strip_prefix(HEADER) {
            Some(header) => headers.push((text("header name", header)?.to_owned(), take(value))),
            None => fields.note(name, value)?,
        }
    }
    let mut record = Record::new(offset, fields.time("appended_at")?, take(fields.get("payload")?));
    record.key = fields.find("key").map(&mut take);
    record.headers = headers;
    record.malformed = fields.find_text("malformed")?.map(Into::into);
    record.origin = match fields.find_text("producer")? {
        None => None,
        Some(producer) => {
            let numbering: Numbering = producer.parse().map_err(|error| format!("{error}"))?;
            Some(Origin::of(numbering, fields.number("sequence")?))
        }
    };
    let edit = fields.find("edit").map(|edit| Edit::decode(take(edit), &record));
    let edit = edit.transpose()?;
    let mut letter = DeadLetter::new(record, fields.number("tries")?, "", fields.time("parked_at")?);
    letter.first_reason = fields.text("first_reason")?.to_owned();
    letter.last_reason = fields.text("last_reason")?.to_owned();
    letter.last_failed_at = fields.time("last_failed_at")?;
    letter.due = match fields.find("due") {
        None => None,
        Some(_) => Some(fields.time("due")?),
    };
    letter.version = fields.number("version")?;
    letter.edit = edit.map(Box::new);
    Ok(letter)
}

fn unpack(packed: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut reading = Packed::new(packed);
    let length = reading.array().filter(|length| length % 2 == 0)?;
    let mut pairs = Vec::new();
    for _ in 0..length / 2 {
        pairs.push((reading.string()?, reading.string()?));
    }
    reading.is_empty().then_some(pairs)
}

/// The fields of a letter.
#[derive(Default)]
struct Found<'a>([Option<&'a [u8]>; Found::NAMES.len()]);

impl<'a> Found<'a> {
    const NAMES: [&'static str; 14] = [
        "tries",
        "first_reason",
        "last_reason",
        "parked_at",
        "last_failed_at",
        "due",
        "version",
        "appended_at",
        "malformed",
        "key",
        "producer",
        "sequence",
        "edit",
        "payload",
    ];

    fn note(&mut self, name: &[u8], value: &'a [u8]) -> Result<(), String> {
        // A later version may add a field that must not be lost.
        let at = Self::NAMES.iter().position(|known| known.as_bytes() == name);
        let at = at.ok_or_else(|| format!("field {} is unknown", shown(name)))?;
        match self.0[at].replace(value) {
            None => Ok(()),
            Some(_) => Err(format!("field {} appears twice", shown(name))),
        }
    }

    fn find(&self, name: &str) -> Option<&'a [u8]> {
        let at = Self::NAMES.iter().position(|known| *known == name)?;
        self.0[at]
    }

    fn get(&self, name: &str) -> Result<&'a [u8], String> {
        self.find(name).ok_or_else(|| format!("field {name:?} is missing"))
    }

    fn find_text(&self, name: &str) -> Result<Option<&'a str>, String> {
        self.find(name).map(|value| text(name, value)).transpose()
    }

    fn text(&self, name: &str) -> Result<&'a str, String> {
        text(name, self.get(name)?)
    }

    fn number<T: FromStr>(&self, name: &str) -> Result<T, String> {
        let text = self.text(name)?;
        text.parse().map_err(|_| format!("{name} {text:?} is not a number"))
    }

    fn time(&self, name: &str) -> Result<SystemTime, String> {
        let millis: i64 = self.number(name)?;
        from_millis(millis).ok_or_else(|| format!("{name} {millis} is out of range"))
    }
}

fn text<'a>(what: &str, bytes: &'a [u8]) -> Result<&'a str, String> {
    str::from_utf8(bytes).map_err(|_| format!("{what} {} is not UTF-8", shown(bytes)))
}

#[cfg(test)]
mod tests {
    use essentially_once::{Epoch, NewRecord, ProducerId, consumer::Operator};
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    fn any_key() -> impl Strategy<Value = Vec<u8>> {
        vec(prop_oneof![Just(0), Just(1), Just(b'0'), Just(0xff), any::<u8>()], 0..5)
    }

    fn any_offset() -> impl Strategy<Value = Offset> {
        let number = || prop_oneof![0..3_u64, any::<u64>(), Just(u64::MAX)];
        (number(), number()).prop_map(|(hi, lo)| Offset::new(hi, lo))
    }

    fn any_time() -> impl Strategy<Value = SystemTime> {
        (-100_000_000_000_000..100_000_000_000_000_i64).prop_map(|millis| from_millis(millis).expect("in range"))
    }

    fn any_letter() -> impl Strategy<Value = DeadLetter> {
        let bytes = || vec(any::<u8>(), 0..300);
        let origin = option::of(("[a-z0-9][a-zA-Z0-9._:/@+=-]{0,20}", any::<u64>(), any::<u64>()));
        let record = (
            any_offset(),
            any_time(),
            option::of(any_key()),
            vec((any::<String>(), bytes()), 0..20),
            bytes(),
            origin,
            option::of(any::<String>()),
        );
        let record = record.prop_map(|(offset, time, key, headers, payload, origin, malformed)| {
            let mut record = Record::new(offset, time, payload);
            record.key = key.map(Bytes::from);
            record.headers = headers.into_iter().map(|(name, value)| (name, value.into())).collect();
            record.malformed = malformed.map(Into::into);
            record.origin = origin.map(|(producer, epoch, sequence)| {
                let producer = ProducerId::new(producer).expect("a valid name");
                Origin::new(producer, Epoch::new(epoch), sequence)
            });
            record
        });
        let reasons = (any::<String>(), any::<String>());
        let times = (any_time(), any_time(), option::of(any_time()));
        let letter =
            (record, any::<u32>(), reasons, times, 0..u64::MAX).prop_map(|(record, tries, reasons, times, version)| {
                let mut letter = DeadLetter::new(record, tries, "", times.0);
                (letter.first_reason, letter.last_reason) = reasons;
                (letter.last_failed_at, letter.due) = (times.1, times.2);
                letter.version = version;
                letter
            });
        (letter, option::of((any::<String>(), bytes()))).prop_map(|(mut letter, edited)| {
            if let Some((by, payload)) = edited {
                let version = letter.version;
                letter.edit(NewRecord::new(payload), &Operator::new(by));
                letter.version = version;
            }
            letter
        })
    }

    proptest! {
        #[test]
        fn what_was_encoded_decodes_to_the_same(letter in any_letter()) {
            prop_assert_eq!(decode(letter.record.offset, encode(&letter)), Ok(letter.clone()));
            prop_assert_eq!(rounded(letter.clone()), letter);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in vec(any::<u8>(), 0..100), letter in any_letter(), cut in any::<usize>()) {
            let _ = decode(Offset::ZERO, bytes);
            let mut encoded = encode(&letter);
            encoded.truncate(cut % encoded.len());
            prop_assert!(decode(letter.record.offset, encoded).is_err());
        }

        #[test]
        fn members_are_ordered_by_key_and_offset(a in (any_key(), any_offset()), b in (any_key(), any_offset())) {
            let [by_key_a, by_key_b] = [&a, &b].map(|(key, offset)| member_by_key(*offset, key));
            prop_assert_eq!(by_key_a.cmp(&by_key_b), a.cmp(&b));
            let [by_offset_a, by_offset_b] = [&a, &b].map(|(key, offset)| member_by_offset(*offset, Some(key)));
            prop_assert_eq!(by_offset_a.cmp(&by_offset_b), (a.1, &a.0).cmp(&(b.1, &b.0)));
            let (start, end) = by_key_a.split_at(by_key_a.len() - FIELD_LEN);
            prop_assert_eq!(parse_key_prefix(start), Some(a.0.clone().into()));
            prop_assert_eq!(parse_field(end), Some(a.1));
            prop_assert_eq!(parse_member_by_offset(&by_offset_a), Some((a.1, Some(a.0.into()))));
            prop_assert_eq!(parse_member_by_offset(&member_by_offset(a.1, None)), Some((a.1, None)));
        }
    }

    #[test]
    fn a_damaged_letter_says_what_is_wrong() {
        let mut record = Record::new(Offset::new(5, 1), UNIX_EPOCH, "x");
        record.headers.push(("a".into(), Bytes::from_static(b"1")));
        let good = encode(&DeadLetter::new(record, 1, "why", UNIX_EPOCH));
        let replaced = |from: &[u8], to: &[u8]| {
            let at = good
                .windows(from.len())
                .position(|window| window == from)
                .expect("it is there");
            [&good[..at], to, &good[at + from.len()..]].concat()
        };
        let string = |text: &str| {
            let mut packed = Vec::new();
            pack::string(&mut packed, text.as_bytes());
            packed
        };
        let version = [string("essentially-once"), string("1")].concat();
        for (value, reason) in [
            (Vec::new(), "not a packed array"),
            ([&good[..], b"x"].concat(), "not a packed array"),
            (vec![0x80], "not a packed array"),
            (vec![0x90], "first field is not"),
            (
                replaced(&version, &[string("essentially-once"), string("2")].concat()),
                "version is \"2\", not 1",
            ),
            (replaced(&string("tries"), &string("treis")), "\"treis\" is unknown"),
            (replaced(&string("payload"), &string("key")), "\"payload\" is missing"),
            (
                replaced(&string("parked_at"), &string("appended_at")),
                "\"appended_at\" appears twice",
            ),
            (
                replaced(
                    &[string("tries"), string("1")].concat(),
                    &[string("tries"), string("-1")].concat(),
                ),
                "tries \"-1\" is not a number",
            ),
            (replaced(&string("h:a"), &[0xa3, b'h', b':', 0xff]), "is not UTF-8"),
            (replaced(&string("h:a"), &string("edit")), "its edit has a version"),
            (
                replaced(&string("why"), &[0xa1, 0xff]),
                "first_reason \"\u{fffd}\" is not UTF-8",
            ),
        ] {
            let error = decode(Offset::ZERO, value).expect_err(reason);
            assert!(error.contains(reason), "{error}, expected {reason}");
        }
    }

    #[test]
    fn times_are_rounded_down_to_the_millisecond() {
        for (micros, expected) in [(0, 0), (1_999, 1), (-1, -1), (-1_000, -1), (-1_001, -2)] {
            let distance = Duration::from_micros(i64::unsigned_abs(micros));
            let time = if micros < 0 {
                UNIX_EPOCH - distance
            } else {
                UNIX_EPOCH + distance
            };
            assert_eq!(millis(time), expected, "{micros}");
        }
    }
}
