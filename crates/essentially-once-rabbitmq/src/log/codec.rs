//! Records as AMQP messages. Any client can read ours, and we read those of any client. The crate's
//! documentation describes the format.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use essentially_once::{
    NewRecord, Offset, Origin, Record,
    backend::{FetchBudget, Header, Numbering},
};
use lapin::{
    BasicProperties,
    types::{AMQPValue, DecimalValue, FieldTable, ShortString},
};

use super::packed::{self, millis, time};
use crate::{
    connection::{deliveries::OFFSET, publisher::Message},
    options::LogOptions,
};

/// The prefix of our own headers.
const OWN: &str = "essentially-once-";
const KEY: &str = "essentially-once-key";
const PRODUCER: &str = "essentially-once-producer";
const SEQUENCE: &str = "essentially-once-sequence";
const TIME: &str = "essentially-once-time";
const ORDER: &str = "essentially-once-order";

/// The messages of one append.
pub(crate) fn encode_all(
    records: &[NewRecord],
    now: SystemTime,
    options: &LogOptions,
    headers_limit: usize,
) -> Vec<Message> {
    let Some(packing) = options.packed else {
        return records
            .iter()
            .map(|record| encode(record, now, headers_limit))
            .collect();
    };
    let mut messages = Vec::new();
    let mut rest = records;
    while !rest.is_empty() {
        let mut budget = FetchBudget::of(packing.bytes);
        let fits = |record: &&NewRecord| budget.admits(record.size());
        let count = rest.iter().take(packing.records).take_while(fits).count();
        let (message, after) = rest.split_at(count);
        messages.push(encode_packed(message, now, options.compressed));
        rest = after;
    }
    messages
}

/// One message for one record. The record is packed if its key and headers take more than
/// `headers_limit`.
fn encode(record: &NewRecord, now: SystemTime, headers_limit: usize) -> Message {
    match headers(record, now).filter(|headers| table_size(headers) <= headers_limit) {
        Some(headers) => Message {
            body: record.payload.clone(),
            properties: BasicProperties::default().with_headers(headers),
        },
        None => encode_packed(std::slice::from_ref(record), now, false),
    }
}

/// One message for all records.
fn encode_packed(records: &[NewRecord], now: SystemTime, compress: bool) -> Message {
    Message {
        body: packed::encode(records, now, compress),
        properties: BasicProperties::default().with_content_type(packed::CONTENT_TYPE.into()),
    }
}

/// The record's key, origin and headers as an AMQP table, if AMQP can express them.
fn headers(record: &NewRecord, now: SystemTime) -> Option<FieldTable> {
    let text = |bytes: &[u8]| AMQPValue::LongString(bytes.into());
    let mut table = BTreeMap::new();
    for (name, value) in &record.headers {
        if is_reserved(name)
            || table
                .insert(ShortString::try_new(name.as_str()).ok()?, text(value))
                .is_some()
        {
            return None;
        }
    }
    if !record.headers.is_sorted_by(|(a, _), (b, _)| a < b) {
        let place = |name: &String| table.keys().position(|key| key.as_str() == name);
        let places: Option<Vec<_>> = record
            .headers
            .iter()
            .map(|(name, _)| Some(place(name)?.to_string()))
            .collect();
        table.insert(ORDER.into(), text(places?.join(",").as_bytes()));
    }
    if let Some(key) = &record.key {
        table.insert(KEY.into(), text(key));
    }
    if let Some(origin) = &record.origin {
        table.insert(PRODUCER.into(), text(origin.numbering.to_string().as_bytes()));
        table.insert(SEQUENCE.into(), text(origin.sequence.to_string().as_bytes()));
    }
    table.insert(TIME.into(), text(millis(now).to_string().as_bytes()));
    Some(table.into())
}

/// The bytes of a table of byte strings.
fn table_size(headers: &FieldTable) -> usize {
    let size = |(name, value): (&ShortString, &AMQPValue)| {
        let value = match value {
            AMQPValue::LongString(text) => text.len(),
            _ => 0,
        };
        1 + name.as_str().len() + 1 + 4 + value
    };
    4 + headers.inner().iter().map(size).sum::<usize>()
}

/// Names with a meaning to us, to the broker, or to our readers.
fn is_reserved(name: &str) -> bool {
    name.is_empty()
        || matches!(name, "CC" | "BCC")
        || [OWN, "x-stream-", "amqp."]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

/// The records of a message. One that cannot be decoded yields a malformed record with the raw
/// body.
pub(crate) fn decode(offset: u64, properties: &BasicProperties, body: Bytes) -> Vec<Record> {
    if properties
        .content_type()
        .as_ref()
        .is_some_and(|kind| kind.as_str() == packed::CONTENT_TYPE)
    {
        return packed::decode(offset, &body).unwrap_or_else(|why| {
            let mut record = Record::new(Offset::new(offset, 0), UNIX_EPOCH, body);
            record.malformed = Some(why.into());
            vec![record]
        });
    }
    let seconds = properties.timestamp().unwrap_or(0);
    let mut record = Record::new(Offset::new(offset, 0), time(seconds.saturating_mul(1_000)), body);
    if let Err(why) = read_headers(&mut record, properties) {
        record.key = None;
        record.origin = None;
        record.headers.clear();
        record.malformed = Some(why.into());
    }
    vec![record]
}

fn read_headers(record: &mut Record, properties: &BasicProperties) -> Result<(), String> {
    let (mut producer, mut sequence, mut order) = (None, None, None);
    for (name, value) in properties.headers().iter().flatten() {
        let name = name.as_str();
        if name == OFFSET {
            continue;
        }
        let bytes = shown(value);
        let number = || digits(&bytes).ok_or_else(|| format!("header {name} is not a number: {bytes:?}"));
        match name {
            KEY => record.key = Some(bytes),
            PRODUCER => producer = Some(name_of(&bytes)?),
            SEQUENCE => sequence = Some(number()?),
            TIME => record.appended_at = time(number()?),
            ORDER => order = Some(bytes),
            _ if name.starts_with(OWN) => {
                return Err(format!(
                    "header {name} is unknown to this version; upgrade essentially-once-rabbitmq"
                ));
            }
            _ => record.headers.push((name.to_owned(), bytes)),
        }
    }
    record.origin = match (producer, sequence) {
        (Some(numbering), Some(sequence)) => {
            let numbering: Numbering = numbering;
            Some(Origin::new(numbering.producer().clone(), numbering.epoch(), sequence))
        }
        (None, None) => None,
        _ => return Err(format!("one of the headers {PRODUCER} and {SEQUENCE} is missing")),
    };
    if let Some(order) = order {
        let headers = std::mem::take(&mut record.headers);
        record.headers =
            ordered(headers, &order).ok_or_else(|| format!("header {ORDER} does not match the headers: {order:?}"))?;
    }
    record.headers.extend(shown_properties(properties));
    Ok(())
}

fn name_of(bytes: &[u8]) -> Result<Numbering, String> {
    let name = std::str::from_utf8(bytes).map_err(|error| format!("header {PRODUCER}: {error}"))?;
    name.parse().map_err(|error: essentially_once::Error| error.to_string())
}

fn digits(bytes: &[u8]) -> Option<u64> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// Puts the headers into the order that the places give.
fn ordered(headers: Vec<Header>, places: &[u8]) -> Option<Vec<Header>> {
    let mut left: Vec<_> = headers.into_iter().map(Some).collect();
    let places = places.split(|byte| *byte == b',');
    let ordered: Option<Vec<_>> = places
        .map(|place| left.get_mut(digits(place)? as usize)?.take())
        .collect();
    ordered.filter(|_| left.iter().all(Option::is_none))
}

fn shown(value: &AMQPValue) -> Bytes {
    let text = match value {
        AMQPValue::LongString(text) => return Bytes::copy_from_slice(text.as_bytes()),
        AMQPValue::ByteArray(bytes) => return Bytes::copy_from_slice(bytes.as_slice()),
        AMQPValue::ShortString(text) => text.to_string(),
        AMQPValue::Boolean(value) => value.to_string(),
        AMQPValue::ShortShortInt(value) => value.to_string(),
        AMQPValue::ShortShortUInt(value) => value.to_string(),
        AMQPValue::ShortInt(value) => value.to_string(),
        AMQPValue::ShortUInt(value) => value.to_string(),
        AMQPValue::LongInt(value) => value.to_string(),
        AMQPValue::LongUInt(value) => value.to_string(),
        AMQPValue::LongLongInt(value) => value.to_string(),
        AMQPValue::Float(value) => value.to_string(),
        AMQPValue::Double(value) => value.to_string(),
        AMQPValue::Timestamp(value) => value.to_string(),
        AMQPValue::DecimalValue(DecimalValue { scale, value }) => format!("{value}e-{scale}"),
        AMQPValue::Void => String::new(),
        // Brokers drop these when they store a message in a stream. If one arrives anyway, it is
        // shown as lapin prints it.
        AMQPValue::FieldArray(array) => format!("{array:?}"),
        AMQPValue::FieldTable(table) => format!("{table:?}"),
    };
    text.into()
}

fn shown_properties(properties: &BasicProperties) -> impl Iterator<Item = Header> {
    let text = |name: &str, value: &Option<ShortString>| {
        value.as_ref().map(|value| {
            (
                format!("amqp.{name}"),
                Bytes::copy_from_slice(value.as_str().as_bytes()),
            )
        })
    };
    let priority = properties
        .priority()
        .map(|priority| ("amqp.priority".to_owned(), priority.to_string().into()));
    [
        text("content-type", properties.content_type()),
        text("content-encoding", properties.content_encoding()),
        priority,
        text("correlation-id", properties.correlation_id()),
        text("reply-to", properties.reply_to()),
        text("expiration", properties.expiration()),
        text("message-id", properties.message_id()),
        text("type", properties.kind()),
        text("user-id", properties.user_id()),
        text("app-id", properties.app_id()),
    ]
    .into_iter()
    .flatten()
}

#[cfg(test)]
pub(crate) mod tests {
    use essentially_once::{Epoch, ProducerId};
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    const LIMIT: usize = 32 * 1024;

    prop_compose! {
        pub(crate) fn any_record()(
            key in option::of(vec(any::<u8>(), 0..20)),
            headers in vec(("[a-c]{0,2}|essentially-once-key|CC|naïve", vec(any::<u8>(), 0..10)), 0..5),
            payload in vec(any::<u8>(), 0..50),
            origin in option::of(("[a-z]{1,3}", prop_oneof![Just(0), any::<u64>()], any::<u64>())),
        ) -> NewRecord {
            let mut record = NewRecord::new(payload);
            record.key = key.map(Into::into);
            record.headers = headers.into_iter().map(|(name, value)| (name, value.into())).collect();
            record.origin = origin.map(|(producer, epoch, sequence)| {
                let producer = ProducerId::new(producer).expect("a valid name");
                Origin::new(producer, Epoch::new(epoch), sequence)
            });
            record
        }
    }

    fn any_value() -> impl Strategy<Value = AMQPValue> {
        prop_oneof![
            vec(any::<u8>(), 0..10).prop_map(|bytes| AMQPValue::LongString(bytes.into())),
            "[0-9,]{0,5}".prop_map(|text| AMQPValue::LongString(text.into())),
            any::<i64>().prop_map(AMQPValue::LongLongInt),
            any::<u64>().prop_map(AMQPValue::Timestamp),
            any::<bool>().prop_map(AMQPValue::Boolean),
            Just(AMQPValue::Void),
        ]
    }

    proptest! {
        #[test]
        fn records_come_back_as_they_were(new in any_record()) {
            let message = encode(&new, time(1_234), LIMIT);
            let read = decode(9, &message.properties, message.body);
            prop_assert_eq!(read.len(), 1);
            let read = &read[0];
            prop_assert_eq!((&read.key, &read.headers, &read.payload, &read.origin), (&new.key, &new.headers, &new.payload, &new.origin));
            prop_assert_eq!((read.offset, read.appended_at, &read.malformed), (Offset::new(9, 0), time(1_234), &None));
        }

        #[test]
        fn no_headers_make_it_panic(
            headers in vec(("essentially-once-(key|producer|sequence|time|order|else)|[a-c]", any_value()), 0..6),
            timestamp: u64,
            body in vec(any::<u8>(), 0..20),
        ) {
            let table: BTreeMap<_, _> = headers.into_iter().map(|(name, value)| (name.into(), value)).collect();
            let properties = BasicProperties::default().with_headers(table.into()).with_timestamp(timestamp);
            let read = decode(0, &properties, body.clone().into());
            prop_assert_eq!(read.len(), 1);
            prop_assert_eq!(&read[0].payload[..], &body[..]);
        }
    }

    #[test]
    fn common_records_are_readable_by_any_client() {
        let sorted = NewRecord::new("").key("k").header("a", "1").header("b", "2");
        let unsorted = NewRecord::new("")
            .header("b", "1")
            .header("a", "2")
            .header("x-request-id", "3");
        for record in [NewRecord::new(""), sorted, unsorted] {
            assert!(
                encode(&record, UNIX_EPOCH, LIMIT).properties.content_type().is_none(),
                "{record:?}"
            );
        }
        let twice = NewRecord::new("").header("a", "1").header("a", "2");
        let large = NewRecord::new("").key(vec![0; LIMIT + 1]);
        for record in [twice, large, NewRecord::new("").header("x".repeat(256), "")] {
            assert!(
                encode(&record, UNIX_EPOCH, LIMIT).properties.content_type().is_some(),
                "{record:?}"
            );
        }
    }
}
