//! Messages that earlier versions wrote. See `tests/fixtures`.

use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};

use crate::support::Stranger;

/// A message of a fixture.
pub(crate) struct Message {
    stream: &'static str,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Vec<u8>,
}

pub(crate) fn messages(fixture: &'static str, stream: &str) -> Vec<Message> {
    let all = fixture.trim().split("\n\n").map(parse);
    let messages: Vec<_> = all.filter(|message| message.stream == stream).collect();
    assert!(!messages.is_empty(), "the fixture has no stream {stream}");
    messages
}

fn parse(block: &'static str) -> Message {
    let (mut stream, mut body, mut kind, mut headers) = ("", vec![], None, FieldTable::default());
    for line in block.lines() {
        let (field, value) = line.split_once(' ').unwrap_or((line, ""));
        match field {
            "stream" => stream = value,
            "content-type" => kind = Some(value),
            "header" => {
                let (name, value) = value.split_once(' ').expect("a name and a value");
                headers.insert(name.into(), AMQPValue::LongString(bytes(value).into()));
            }
            "body" => body = bytes(value),
            _ => panic!("an unknown line: {line}"),
        }
    }
    let mut properties = BasicProperties::default().with_headers(headers);
    if let Some(kind) = kind {
        properties = properties.with_content_type(kind.into());
    }
    Message {
        stream,
        properties,
        body,
    }
}

fn bytes(digits: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal digits");
    (0..digits.len()).step_by(2).map(byte).collect()
}

/// Copies one stream of a fixture to another stream.
pub(crate) async fn copy(fixture: &'static str, stranger: &Stranger, from: &str, to: &str) {
    for message in messages(fixture, from) {
        stranger.publish_with(to, &message.body, message.properties).await;
    }
}
