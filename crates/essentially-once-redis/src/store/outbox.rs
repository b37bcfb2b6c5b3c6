//! Records that a transaction sends. They are checked and staged here. `commit.lua` numbers and
//! appends them.

use std::collections::BTreeMap;

use async_trait::async_trait;
use essentially_once::{
    Epoch, Error, NewRecord, Origin, Outbox, ProducerId,
    backend::{LogId, check_unnumbered, new_producer},
};

use crate::{
    error::printable,
    log::{arguments, check, encode, largest_value, producer_at, weight},
    store::{
        keys::{Ours, outbox_numbers},
        layout::Items,
        tx::RedisTx,
    },
};

#[async_trait]
impl Outbox for RedisTx {
    /// `log` is the key of the log's stream: a name as for [`Redis::log`](crate::Redis::log), in
    /// which braces may mark a hash tag, as in `{shipping}:shipped`.
    ///
    /// Fails with [`Error::Failed`] as well if a command of the transaction names the key, or if in
    /// a cluster the key does not contain the consumer's [`hash_tag`](RedisTx::hash_tag).
    async fn send(&mut self, log: &str, mut record: NewRecord) -> Result<(), Error> {
        let new = match self.outgoing.producer(log) {
            Some(_) => None,
            None => Some(self.open(log)?),
        };
        check_unnumbered(log, &record)?;
        check(&self.link, &record, || self.send_action(log))?;
        let producer = new.as_ref().map(|new| &new.producer);
        let producer = producer.or_else(|| self.outgoing.producer(log)).cloned();
        // The script puts the stored producer and the number into its place.
        record.origin = producer.map(|producer| Origin::new(producer, Epoch::STABLE, 0));
        self.check_room(weight(&record))?;
        self.largest = self.largest.max(largest_value(&record));
        self.outgoing.add(log, new, record);
        Ok(())
    }
}

impl RedisTx {
    /// Checks whether the commit can append to this stream, as far as that is known before it.
    fn open(&self, log: &str) -> Result<Sending, Error> {
        let name = name_of(log)?;
        let prefix = &self.link.server.options.prefix;
        if Ours::parse(prefix, log.as_bytes()).is_some() {
            let why = "the key is one of this crate's own; choose another name";
            return Err(Error::failed(self.send_action(log), why));
        }
        if self.staged.keys.contains_key(log.as_bytes()) {
            let why = "a command of this transaction changes the stream; run it in another transaction";
            return Err(Error::failed(self.send_action(log), why));
        }
        if !self.is_in_slot(log.as_bytes()) {
            let tag = self.hash_tag();
            let advised = format!("{tag}:{}", name.name());
            let why = format!(
                "in a cluster, the outboxes of a consumer must be in its hash slot, so their names must contain {tag}; {log} \
                 does not; send to {advised}, and open it with `LogOptions::stream({advised:?})`"
            );
            return Err(Error::failed(self.send_action(log), why));
        }
        Ok(Sending {
            numbers: outbox_numbers(prefix, log),
            producer: new_producer(name.name())?,
            records: Vec::new(),
            arguments: 0,
        })
    }

    fn send_action(&self, log: &str) -> String {
        self.action(&format!("send a record to log {}", printable(log.as_bytes())))
    }
}

/// The records to send.
#[derive(Default)]
pub(crate) struct Outgoing {
    /// By the key of the stream.
    outboxes: BTreeMap<String, Sending>,
    len: usize,
    bytes: usize,
}

/// The records for one outbox.
struct Sending {
    /// The key of the hash with its numbers.
    numbers: String,
    /// Its producer if it is new.
    producer: ProducerId,
    records: Vec<NewRecord>,
    /// The number of arguments that the records take.
    arguments: usize,
}

/// The number of arguments in front of the records of an outbox, and in front of each record.
const OUTBOX_ARGUMENTS: usize = 5;
const RECORD_ARGUMENTS: usize = 2;

impl Outgoing {
    pub(crate) fn is_empty(&self) -> bool {
        self.outboxes.is_empty()
    }

    /// The number of records.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// About as many bytes as they take in a commit.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The number of arguments that they take in a commit.
    pub(crate) fn arguments(&self) -> usize {
        let outboxes = self.outboxes.values();
        outboxes.map(|sending| OUTBOX_ARGUMENTS + sending.arguments).sum()
    }

    /// Whether records go to this stream.
    pub(crate) fn is_open(&self, stream: &[u8]) -> bool {
        !self.is_empty() && str::from_utf8(stream).is_ok_and(|stream| self.outboxes.contains_key(stream))
    }

    /// The keys that the commit uses.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        let outboxes = self.outboxes.iter();
        outboxes.flat_map(|(stream, sending)| [stream.as_str(), &sending.numbers])
    }

    fn producer(&self, stream: &str) -> Option<&ProducerId> {
        self.outboxes.get(stream).map(|sending| &sending.producer)
    }

    /// Stages a record, to a stream that is open or `new`.
    fn add(&mut self, stream: &str, new: Option<Sending>, record: NewRecord) {
        if let Some(new) = new {
            self.bytes += 2 * stream.len() + 2 * new.numbers.len() + new.producer.as_str().len();
            self.outboxes.insert(stream.into(), new);
        }
        if let Some(sending) = self.outboxes.get_mut(stream) {
            self.len += 1;
            self.bytes += weight(&record);
            sending.arguments += RECORD_ARGUMENTS + arguments(&record);
            sending.records.push(record);
        }
    }

    pub(crate) fn lay_out(&self, items: &mut Items<'_>) {
        for (stream, sending) in &self.outboxes {
            items
                .push(stream)
                .push(&sending.numbers)
                .push(sending.producer.as_str());
            items.push(sending.records.len()).push(sending.arguments);
            for record in &sending.records {
                let place = producer_at(record);
                items.push(arguments(record)).push(place);
                let mut index = 0;
                encode(record, |argument| {
                    let is_origin = index == place || index == place + 2;
                    items.push(if is_origin { b"" } else { argument });
                    index += 1;
                });
            }
        }
    }
}

/// The log in the stream with this key. Its name has no braces.
fn name_of(key: &str) -> Result<LogId, Error> {
    let tagged = key.split_once('{').and_then(|(before, rest)| {
        let (tag, after) = rest.split_once('}')?;
        (!tag.is_empty()).then(|| [before, tag, after].concat())
    });
    LogId::new(tagged.as_deref().unwrap_or(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_named_like_a_log_with_or_without_a_hash_tag() {
        for (key, name) in [
            ("out", "out"),
            ("{shipping}:out", "shipping:out"),
            ("a{b}c", "abc"),
            ("{whole}", "whole"),
        ] {
            assert_eq!(name_of(key).expect(key).name(), name);
        }
        for key in [
            "",
            "two words",
            "{",
            "}",
            "{}",
            "a{}b",
            "a}b{c",
            "{a}{b}",
            "{{a}}",
            "{a",
            "-{a}",
            "ä",
        ] {
            assert!(matches!(name_of(key), Err(Error::InvalidName { .. })), "{key:?}");
        }
        let longest = format!("{{{}}}", "a".repeat(200));
        assert_eq!(name_of(&longest).expect("200 bytes").name().len(), 200);
    }

    /// The script writes into the places of producer and sequence.
    #[test]
    fn the_places_of_the_origin_are_where_the_script_writes() {
        let origin = Origin::new("web".parse().expect("a name"), Epoch::STABLE, 7);
        let plain = NewRecord::new("x").header("producer", "1").origin(origin);
        for record in [plain.clone(), plain.clone().key("producer"), plain.key("")] {
            let mut fields: Vec<Vec<u8>> = Vec::new();
            encode(&record, |field| fields.push(field.to_vec()));
            let place = producer_at(&record);
            assert_eq!(fields[place - 1..][..4], [&b"producer"[..], b"web", b"sequence", b"7"]);
            assert_eq!(fields.len(), arguments(&record));
        }
    }
}
