//! Sending: what a transaction stages, what its entry says about the records, and the counts that
//! give them their numbers.
//!
//! A number is given when the entry is made, from the fold that the entry builds on. The entry
//! applies only if nothing came between. So the numbers of an outbox rise by one with each record,
//! and no other entry that applies has them. Readers take them from the entry and need no fold.

use std::{collections::BTreeMap, time::SystemTime};

use async_trait::async_trait;
use bytes::{BufMut as _, Bytes};
use essentially_once::{
    Epoch, Error, NewRecord, Offset, Origin, Outbox, ProducerId, Record,
    backend::{Numbering, check_unnumbered},
};

use super::{
    state::OVERHEAD,
    tx::RabbitTx,
    wire::{Decoded, Reader, put_bytes, put_offset},
};
use crate::log::packed;

/// What an entry takes for an outbox besides its name and its records: a producer of up to 200
/// bytes, lengths, and numbers.
const PART: usize = 256;

/// An outbox belongs to the consumer whose transaction this is. Another consumer that sends to an
/// outbox of the same name has its own. Read it with
/// [`RabbitStore::sent_to`](super::RabbitStore::sent_to). Its name, the consumer's and the prefix
/// are together limited to about 190 bytes.
///
/// The changelog keeps its last 512 MiB, whether or not a relay has read them.
/// [`RabbitStore::guard_outbox`](super::RabbitStore::guard_outbox) makes a commit fail before that
/// costs a record.
///
/// A record over [`record_limit`](crate::RabbitOptions::record_limit) is [`Error::TooLarge`], and
/// so is one that no longer fits the commit; see [`RabbitStore`](super::RabbitStore).
#[async_trait]
impl Outbox for RabbitTx {
    async fn send(&mut self, outbox: &str, record: NewRecord) -> Result<(), Error> {
        check_unnumbered(outbox, &record)?;
        let scope = &self.changelog.scope;
        record.check_size(scope.value_limit())?;
        let mut bytes = packed::size_bound(&record) + size_of::<u32>();
        if !self.staged.sent.outboxes.contains_key(outbox) {
            scope.outbox(outbox)?;
            bytes += outbox.len() + PART;
        }
        scope.check_staged_size(self.staged_bytes() + bytes)?;
        self.bytes += bytes;
        self.staged.sent.stage(outbox, record);
        Ok(())
    }
}

/// The records that a transaction has staged.
#[derive(Default)]
pub(super) struct StagedRecords {
    /// Of all outboxes, in the order of the calls.
    records: Vec<NewRecord>,
    /// The indexes of each outbox's records.
    outboxes: BTreeMap<String, Vec<u32>>,
}

impl StagedRecords {
    /// Whether a record is for that outbox.
    pub(super) fn are_for(&self, outbox: &str) -> bool {
        self.outboxes.contains_key(outbox)
    }

    fn stage(&mut self, outbox: &str, record: NewRecord) {
        let index = self.records.len() as u32;
        match self.outboxes.get_mut(outbox) {
            Some(indexes) => indexes.push(index),
            None => drop(self.outboxes.insert(outbox.to_owned(), vec![index])),
        }
        self.records.push(record);
    }

    /// What an entry that builds on these counts says. `before` is the end of all records sent so
    /// far, and `draw` makes the producer of a new outbox.
    pub(super) fn numbered(
        self,
        counts: &Outboxes,
        before: Offset,
        draw: impl Fn(&str) -> Result<ProducerId, Error>,
    ) -> Result<Option<Sent>, Error> {
        if self.records.is_empty() {
            return Ok(None);
        }
        let mut parts = Vec::with_capacity(self.outboxes.len());
        for (outbox, records) in self.outboxes {
            let part = match counts.outboxes.get(&outbox) {
                Some(count) => Part {
                    producer: count.producer.clone(),
                    first: count.next,
                    before: count.end,
                    outbox,
                    records,
                },
                None => Part {
                    producer: draw(&outbox)?,
                    first: 0,
                    before: Offset::ZERO,
                    outbox,
                    records,
                },
            };
            parts.push(part);
        }
        Ok(Some(Sent {
            before,
            packed: packed::encode(&self.records, SystemTime::now(), false),
            parts,
        }))
    }
}

/// Records that a commit sends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Sent {
    /// The end of the records sent before, to any outbox. A reader that has read up to there misses
    /// nothing.
    pub(super) before: Offset,
    /// As in a packed message, without origins. It was checked when the entry was decoded.
    pub(super) packed: Bytes,
    /// By the names of the outboxes. Empty in an entry of a version without outboxes, whose records
    /// have no origins.
    pub(super) parts: Vec<Part>,
}

/// The records that a commit sends to one outbox.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Part {
    pub(super) outbox: String,
    pub(super) producer: ProducerId,
    /// The sequence of its first record.
    pub(super) first: u64,
    /// The end of the outbox before this commit.
    pub(super) before: Offset,
    /// The indexes of its records, in order.
    pub(super) records: Vec<u32>,
}

impl Sent {
    /// One past the last record. The entry is at that offset of the changelog.
    pub(super) fn end(&self, offset: u64) -> Offset {
        Offset::new(offset, packed::count(&self.packed))
    }

    /// The end before this commit and after it, of one outbox or of all records; `None` if the
    /// commit sends nothing to the outbox.
    pub(super) fn ends(&self, offset: u64, outbox: Option<&str>) -> Option<(Offset, Offset)> {
        match outbox {
            None => Some((self.before, self.end(offset))),
            Some(outbox) => self.part(outbox).map(|part| (part.before, part.end(offset))),
        }
    }

    /// The records, of one outbox or all.
    pub(super) fn records(&self, offset: u64, outbox: Option<&str>) -> Result<Vec<Record>, String> {
        let mut records = packed::decode(offset, &self.packed)?;
        for part in &self.parts {
            let numbering = Numbering::new(part.producer.clone(), Epoch::STABLE);
            for (index, sequence) in part.records.iter().zip(part.first..) {
                if let Some(record) = records.get_mut(*index as usize) {
                    record.origin = Some(Origin::of(numbering.clone(), sequence));
                }
            }
        }
        let Some(outbox) = outbox else { return Ok(records) };
        let own = self.part(outbox).map_or(&[][..], |part| &part.records);
        records.retain(|record| own.binary_search(&(record.offset.lo() as u32)).is_ok());
        Ok(records)
    }

    fn part(&self, outbox: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.outbox == outbox)
    }

    pub(super) fn encode_parts(&self, out: &mut Vec<u8>) {
        out.put_u32(self.parts.len() as u32);
        for part in &self.parts {
            put_bytes(out, part.outbox.as_bytes());
            put_bytes(out, part.producer.as_str().as_bytes());
            out.put_u64(part.first);
            put_offset(out, part.before);
            out.put_u32(part.records.len() as u32);
            for index in &part.records {
                out.put_u32(*index);
            }
        }
    }

    /// Decodes the parts. Each record must belong to exactly one.
    pub(super) fn decode_parts(&mut self, reader: &mut Reader) -> Decoded<()> {
        self.parts = reader.list(Part::decode)?;
        if !self.parts.is_sorted_by(|one, next| one.outbox < next.outbox) {
            return Err("it names an outbox twice or out of order");
        }
        let mut is_numbered = vec![false; packed::count(&self.packed) as usize];
        for index in self.parts.iter().flat_map(|part| &part.records) {
            match is_numbered.get_mut(*index as usize) {
                Some(is_numbered) if !*is_numbered => *is_numbered = true,
                _ => return Err("it numbers a record twice, or one that it does not send"),
            }
        }
        match is_numbered.iter().all(|is_numbered| *is_numbered) {
            true => Ok(()),
            false => Err("it sends a record to no outbox"),
        }
    }
}

impl Part {
    fn decode(reader: &mut Reader) -> Decoded<Self> {
        let part = Self {
            outbox: text(reader)?,
            producer: producer(reader)?,
            first: reader.u64()?,
            before: reader.offset()?,
            records: reader.list(|reader| Ok(reader.u32()?))?,
        };
        if part.records.is_empty() || !part.records.is_sorted_by(|one, next| one < next) {
            return Err("the records of an outbox are missing or out of order");
        }
        match part.first.checked_add(part.records.len() as u64) {
            Some(_) => Ok(part),
            None => Err("the numbers of an outbox do not end"),
        }
    }

    fn end(&self, offset: u64) -> Offset {
        let last = self.records.last().copied().unwrap_or_default();
        Offset::new(offset, u64::from(last) + 1)
    }
}

/// The outboxes of a consumer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Outboxes {
    outboxes: BTreeMap<String, Count>,
    /// About how much memory they take.
    size: usize,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Count {
    producer: ProducerId,
    /// The sequence of the next record.
    next: u64,
    /// One past the offset of the last record.
    end: Offset,
}

impl Outboxes {
    pub(super) fn is_empty(&self) -> bool {
        self.outboxes.is_empty()
    }

    /// About how much memory they take.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// By how much the records make them grow.
    pub(super) fn growth(&self, sent: &Sent) -> usize {
        let is_new = |part: &&Part| !self.outboxes.contains_key(&part.outbox);
        let new = sent.parts.iter().filter(is_new);
        new.map(|part| size_of_outbox(&part.outbox, &part.producer)).sum()
    }

    /// One past the last record of the outbox; zero if it has none.
    pub(super) fn end(&self, outbox: &str) -> Offset {
        self.outboxes.get(outbox).map_or(Offset::ZERO, |count| count.end)
    }

    /// Counts the records of the entry at `offset` of the changelog.
    pub(super) fn apply(&mut self, offset: u64, parts: Vec<Part>) {
        for part in parts {
            let count = Count {
                next: part.first.saturating_add(part.records.len() as u64),
                end: part.end(offset),
                producer: part.producer,
            };
            self.set(part.outbox, count);
        }
    }

    fn set(&mut self, outbox: String, count: Count) {
        self.size += size_of_outbox(&outbox, &count.producer);
        if let Some(old) = self.outboxes.get(&outbox) {
            self.size -= size_of_outbox(&outbox, &old.producer);
        }
        self.outboxes.insert(outbox, count);
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.outboxes.len() as u32);
        for (outbox, count) in &self.outboxes {
            put_bytes(out, outbox.as_bytes());
            put_bytes(out, count.producer.as_str().as_bytes());
            out.put_u64(count.next);
            put_offset(out, count.end);
        }
    }

    pub(super) fn decode(reader: &mut Reader) -> Decoded<Self> {
        let mut outboxes = Self::default();
        for _ in 0..reader.u32()? {
            let outbox = text(reader)?;
            let count = Count {
                producer: producer(reader)?,
                next: reader.u64()?,
                end: reader.offset()?,
            };
            outboxes.set(outbox, count);
        }
        Ok(outboxes)
    }
}

fn size_of_outbox(outbox: &str, producer: &ProducerId) -> usize {
    outbox.len() + producer.as_str().len() + OVERHEAD
}

fn text(reader: &mut Reader) -> Decoded<String> {
    let bytes = reader.bytes()?;
    let text = str::from_utf8(&bytes).map_err(|_| "the name of an outbox or its producer is not UTF-8")?;
    Ok(text.to_owned())
}

fn producer(reader: &mut Reader) -> Decoded<ProducerId> {
    ProducerId::new(text(reader)?).map_err(|_| "the producer of an outbox breaks the rule for names")
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;

    use essentially_once::backend::new_producer;
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    /// To outboxes, or as an earlier version sent.
    pub(in super::super) fn sent() -> impl Strategy<Value = Sent> {
        let records = vec((vec(any::<u8>(), 0..40), 0usize..3), 1..6);
        let outboxes = option::of(vec((0..u64::MAX / 2, any::<(u64, u64)>()), 3));
        (any::<(u64, u64)>(), records, outboxes).prop_map(|((hi, lo), records, outboxes)| {
            let part = |(outbox, (first, (hi, lo)))| Part {
                outbox: format!("outbox-{outbox}"),
                producer: ProducerId::new(format!("outbox-{outbox}@{first}")).expect("name"),
                first,
                before: Offset::new(hi, lo),
                records: (0..)
                    .zip(&records)
                    .filter_map(|(index, (_, to))| (*to == outbox).then_some(index))
                    .collect(),
            };
            let mut parts: Vec<_> = outboxes.into_iter().flatten().enumerate().map(part).collect();
            parts.retain(|part| !part.records.is_empty());
            let records: Vec<_> = records
                .iter()
                .map(|(payload, _)| NewRecord::new(payload.clone()))
                .collect();
            Sent {
                before: Offset::new(hi, lo),
                packed: packed::encode(&records, SystemTime::UNIX_EPOCH, false),
                parts,
            }
        })
    }

    pub(in super::super) fn part(outbox: &str, records: &[u32]) -> Part {
        Part {
            outbox: outbox.into(),
            producer: ProducerId::new(format!("{outbox}@1")).expect("name"),
            first: 7,
            before: Offset::ZERO,
            records: records.to_vec(),
        }
    }

    /// Commits these records, each to the outbox of that number, as the entry at `offset`.
    fn send(counts: &mut Outboxes, offset: u64, before: Offset, to: &[u8]) -> Option<Sent> {
        let mut staged = StagedRecords::default();
        for (index, outbox) in to.iter().enumerate() {
            staged.stage(&format!("o{outbox}"), NewRecord::new(format!("{offset}.{index}")));
        }
        let sent = staged.numbered(counts, before, new_producer).expect("valid names");
        if let Some(sent) = &sent {
            let expected = counts.size() + counts.growth(sent);
            counts.apply(offset, sent.parts.clone());
            assert_eq!(counts.size(), expected);
        }
        sent
    }

    fn decoded(sent: &Sent, parts: &[Part]) -> Decoded<Vec<Part>> {
        let (mut forged, mut bytes) = (sent.clone(), Vec::new());
        forged.parts = parts.to_vec();
        forged.encode_parts(&mut bytes);
        let mut reader = Reader::new(bytes.into());
        forged.decode_parts(&mut reader)?;
        reader.finish()?;
        Ok(forged.parts)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_records_of_each_outbox_are_numbered_without_gaps(commits in vec(vec(0u8..3, 0..6), 1..8)) {
            let (mut counts, mut end) = (Outboxes::default(), Offset::ZERO);
            let mut read: BTreeMap<u8, (Vec<Record>, Offset)> = BTreeMap::new();
            let mut all = Vec::new();
            for (offset, to) in (0..).zip(&commits) {
                let Some(sent) = send(&mut counts, offset, end, to) else {
                    prop_assert!(to.is_empty());
                    continue;
                };
                prop_assert_eq!(decoded(&sent, &sent.parts), Ok(sent.parts.clone()));
                prop_assert_eq!(sent.ends(offset, None), Some((end, sent.end(offset))));
                end = sent.end(offset);
                all.extend(sent.records(offset, None).expect("decodes"));
                for outbox in 0..3 {
                    let (name, (records, before)) = (format!("o{outbox}"), read.entry(outbox).or_default());
                    let ends = sent.ends(offset, Some(&name));
                    prop_assert_eq!(ends.is_some(), to.contains(&outbox));
                    let found = sent.records(offset, Some(&name)).expect("decodes");
                    if let Some((from, end)) = ends {
                        prop_assert_eq!(from, *before);
                        prop_assert_eq!(found.last().map(|last| last.offset.successor()), Some(end));
                        *before = end;
                    }
                    records.extend(found);
                    prop_assert_eq!(counts.end(&name), *before);
                }
            }
            let mut producers = Vec::new();
            for (records, _) in read.values() {
                let numbering = records.first().and_then(|first| Some(first.origin.as_ref()?.numbering.clone()));
                for (n, record) in (0..).zip(records) {
                    prop_assert_eq!(&record.origin, &numbering.clone().map(|numbering| Origin::of(numbering, n)));
                }
                producers.extend(numbering);
                let own: Vec<_> = all.iter().filter(|record| records.contains(record)).collect();
                prop_assert!(own.into_iter().eq(records), "all records have the order of the outbox");
            }
            let distinct: HashSet<_> = producers.iter().collect();
            prop_assert_eq!(distinct.len(), producers.len());
            prop_assert!(producers.iter().all(|numbering| numbering.epoch() == Epoch::STABLE));
            prop_assert_eq!(all.len(), read.values().map(|(records, _)| records.len()).sum::<usize>());
            let mut bytes = Vec::new();
            counts.encode(&mut bytes);
            let mut reader = Reader::new(bytes.into());
            prop_assert_eq!(Outboxes::decode(&mut reader), Ok(counts));
            prop_assert_eq!(reader.finish(), Ok(()));
        }
    }

    #[test]
    fn forged_parts_are_refused() {
        let sent = send(&mut Outboxes::default(), 0, Offset::ZERO, &[0, 1, 0]).expect("some");
        let forged = |change: fn(&mut Vec<Part>)| {
            let mut parts = sent.parts.clone();
            change(&mut parts);
            decoded(&sent, &parts).expect_err("refused")
        };
        for (why, change) in [
            ("to no outbox", (|parts| drop(parts.pop())) as fn(&mut Vec<Part>)),
            ("a record twice", |parts| parts[1].records = vec![0]),
            ("that it does not send", |parts| parts[1].records = vec![3]),
            ("missing or out of order", |parts| parts[0].records = vec![2, 0]),
            ("missing or out of order", |parts| parts[0].records.clear()),
            ("an outbox twice", |parts| parts[1].outbox = "o0".into()),
            ("out of order", |parts| parts.reverse()),
            ("do not end", |parts| parts[0].first = u64::MAX),
        ] {
            let error = forged(change);
            assert!(error.contains(why), "{error}, not {why}");
        }
    }
}
