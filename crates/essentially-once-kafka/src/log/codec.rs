//! Records as Kafka messages. [`KafkaLog`](crate::KafkaLog#format) describes the format.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, UNIX_EPOCH},
};

use essentially_once::{
    NewRecord, Offset, Origin, Record,
    backend::{FetchBuffer, Header as RecordHeader, NumberingCache},
};
use rdkafka::message::{Header, Headers as _, Message, OwnedHeaders};

/// The prefix of our own headers.
const OWN: &str = "essentially-once-";
const PRODUCER: &str = "essentially-once-producer";
const SEQUENCE: &str = "essentially-once-sequence";
const HEADER: &str = "essentially-once-header";

/// The headers of a message with this record, if it has any.
pub(super) fn headers(record: &NewRecord) -> Option<OwnedHeaders> {
    if record.origin.is_none() && record.headers.is_empty() {
        return None;
    }
    let mut headers = OwnedHeaders::new_with_capacity(record.headers.len() + 2);
    let mut insert = |key: &str, value: &[u8]| {
        headers = std::mem::replace(&mut headers, OwnedHeaders::new_with_capacity(0)).insert(Header {
            key,
            value: Some(value),
        });
    };
    if let Some(origin) = &record.origin {
        insert(PRODUCER, origin.numbering.to_string().as_bytes());
        insert(SEQUENCE, origin.sequence.to_string().as_bytes());
    }
    for (name, value) in &record.headers {
        // The client library ends a name at a zero byte.
        if name.is_empty() || name.starts_with(OWN) || name.contains('\0') {
            let mut packed = format!("{}:{name}", name.len()).into_bytes();
            packed.extend_from_slice(value);
            insert(HEADER, &packed);
        } else {
            insert(name, value);
        }
    }
    Some(headers)
}

/// Decodes the messages of one fetch.
#[derive(Default)]
pub(super) struct Decoder {
    buffer: FetchBuffer,
    numberings: NumberingCache,
}

impl Decoder {
    /// Begins the next fetch.
    pub(super) fn begin(&mut self) {
        self.buffer = FetchBuffer::with_capacity(self.buffer.copied());
    }

    /// The record in a message. One that cannot be decoded is malformed, with the payload as its
    /// bytes.
    pub(super) fn record(&mut self, message: &impl Message) -> Record {
        let millis = message
            .timestamp()
            .to_millis()
            .and_then(|millis| u64::try_from(millis).ok());
        let appended_at = UNIX_EPOCH + Duration::from_millis(millis.unwrap_or(0));
        let payload = message.payload().map(|payload| self.buffer.copy(payload));
        let mut record = Record::new(offset_of(message), appended_at, payload.unwrap_or_default());
        // The client library panics at a header whose name is not UTF-8.
        let read = catch_unwind(AssertUnwindSafe(|| self.read_headers(&mut record, message)));
        match read.unwrap_or_else(|_| Err("the name of a header is not UTF-8".into())) {
            Ok(()) => record.key = message.key().map(|key| self.buffer.copy(key)),
            Err(why) => {
                record.origin = None;
                record.headers.clear();
                record.malformed = Some(why.into());
            }
        }
        record
    }

    fn read_headers(&mut self, record: &mut Record, message: &impl Message) -> Result<(), String> {
        let (mut producer, mut sequence) = (None, None);
        let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
        for Header { key, value } in headers {
            let value = value.unwrap_or_default();
            let text = || std::str::from_utf8(value).map_err(|error| format!("header {key}: {error}"));
            match key {
                PRODUCER => producer = Some(self.numberings.parse(value)?),
                SEQUENCE => sequence = Some(number(text()?).ok_or_else(|| format!("header {key} is not a number"))?),
                HEADER => record
                    .headers
                    .push(self.unpack(value).ok_or_else(|| format!("header {key} is cut short"))?),
                _ if key.starts_with(OWN) => {
                    return Err(format!(
                        "header {key} is unknown to this version; upgrade essentially-once-kafka"
                    ));
                }
                _ => record.headers.push((key.to_owned(), self.buffer.copy(value))),
            }
        }
        record.origin = match (producer, sequence) {
            (Some(numbering), Some(sequence)) => Some(Origin::of(numbering, sequence)),
            (None, None) => None,
            _ => return Err(format!("one of the headers {PRODUCER} and {SEQUENCE} is missing")),
        };
        Ok(())
    }

    /// The name and the value of a header whose name Kafka's clients or we could not take.
    fn unpack(&mut self, packed: &[u8]) -> Option<RecordHeader> {
        let colon = packed.iter().position(|byte| *byte == b':')?;
        let (length, rest) = (std::str::from_utf8(&packed[..colon]).ok()?, &packed[colon + 1..]);
        let (name, value) = rest.split_at_checked(usize::try_from(number(length)?).ok()?)?;
        Some((std::str::from_utf8(name).ok()?.to_owned(), self.buffer.copy(value)))
    }
}

pub(super) fn offset_of(message: &impl Message) -> Offset {
    u64::try_from(message.offset()).unwrap_or(0).into()
}

/// A decimal number without a sign.
fn number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use rdkafka::{Timestamp, message::Headers};

    use super::*;

    /// A message whose only header the client library panics at.
    struct Panicking;

    impl Headers for Panicking {
        fn count(&self) -> usize {
            1
        }

        fn try_get(&self, _: usize) -> Option<Header<'_, &[u8]>> {
            panic!("the name is not UTF-8, as this test wants it")
        }
    }

    impl Message for Panicking {
        type Headers = Self;

        fn key(&self) -> Option<&[u8]> {
            Some(b"k")
        }

        fn payload(&self) -> Option<&[u8]> {
            Some(b"p")
        }

        #[allow(unsafe_code, reason = "the trait declares it so")]
        unsafe fn payload_mut(&mut self) -> Option<&mut [u8]> {
            None
        }

        fn topic(&self) -> &str {
            "orders"
        }

        fn partition(&self) -> i32 {
            0
        }

        fn offset(&self) -> i64 {
            7
        }

        fn timestamp(&self) -> Timestamp {
            Timestamp::NotAvailable
        }

        fn headers(&self) -> Option<&Self> {
            Some(self)
        }
    }

    #[test]
    fn a_header_that_the_library_cannot_read_makes_a_malformed_record() {
        let record = Decoder::default().record(&Panicking);
        assert_eq!((record.offset, &record.payload[..]), (7.into(), &b"p"[..]));
        assert!(record.malformed.is_some_and(|why| why.contains("UTF-8")));
    }

    #[test]
    fn packed_headers_that_are_cut_short_are_not_read() {
        let mut decoder = Decoder::default();
        let mut unpack = |packed| decoder.unpack(packed);
        assert_eq!(unpack(b"3:a:bc"), Some(("a:b".into(), "c".into())));
        assert_eq!(unpack(b"0:"), Some((String::new(), Bytes::new())));
        for packed in ["", ":", "3", "3:ab", "-1:a", "+1:a", "99999999999999999999999:a"] {
            assert_eq!(unpack(packed.as_bytes()), None, "{packed}");
        }
        assert_eq!(unpack(b"1:\xff"), None);
    }
}
