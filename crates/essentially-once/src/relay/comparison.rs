//! Whether a destination holds other records under the numbers that a relay is about to send.
//!
//! An outbox that was restored from an older copy gives old numbers to new records. Receivers would
//! drop those as duplicates. So the relay looks at what the destination holds of these numbers: the
//! same record is one that it sent before a crash, another one ends the run.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use crate::{
    Epoch, Error, Log, NewRecord, Offset, Origin,
    backend::{LogId, Numbering, Window},
    passed::content_digest,
};

/// How many of the destination's last records the first look reads. If as many records of other
/// senders follow those of this outbox, it does not find them.
const FIRST_LOOK: u64 = 1_024;

/// By how much each further look is longer.
const GROWTH: u64 = 8;

/// What a destination holds of the numbers not yet passed.
#[derive(Default)]
pub(super) struct Comparison {
    /// A numbering is here once it was looked for, even if nothing was found.
    held: Found,
}

/// Why a record must not be sent.
#[derive(Debug)]
pub(super) struct Conflict {
    origin: Origin,
    log: LogId,
    /// A number far above this one that was sent before; `None` if this number itself has another
    /// record.
    highest: Option<u64>,
}

impl Conflict {
    /// Whether the record comes too late for receivers to take it.
    pub(super) fn is_late(&self) -> bool {
        self.highest.is_some()
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { origin, log, highest } = self;
        match highest {
            None => write!(
                f,
                "log {log} holds another record with the origin {origin}; the outbox was probably restored from an \
                 older copy. Give the records from this offset on a new producer with `Relay::new_producer_from`, or \
                 `seek` past those that were sent before"
            ),
            Some(highest) => write!(
                f,
                "log {log} was sent number {highest} of its producer before {origin}, so receivers would drop the \
                 record as a duplicate; send its content as a new record, or, if the outbox was restored from an older \
                 copy, give the records from this offset on a new producer with `Relay::new_producer_from`"
            ),
        }
    }
}

impl std::error::Error for Conflict {}

impl Comparison {
    /// Looks for the numbers of these records, unless that was done for their numberings before.
    ///
    /// A log that may be written but not read cannot be compared.
    ///
    /// # Errors
    /// Those of the log that a later look may not have. They say nothing about the records.
    pub(super) async fn look(&mut self, log: &dyn Log, records: &[NewRecord]) -> Result<(), Error> {
        let mut lowest: HashMap<&Numbering, u64> = HashMap::new();
        for (numbering, records) in by_numbering(records) {
            // A fresh epoch was never used before.
            if numbering.epoch() == Epoch::STABLE && !self.held.contains_key(numbering) {
                let least = numbers(records).min().unwrap_or(u64::MAX);
                let lowest = lowest.entry(numbering).or_insert(least);
                *lowest = least.min(*lowest);
            }
        }
        if lowest.is_empty() {
            return Ok(());
        }
        let found = match find(log, &lowest).await {
            // Retention was faster than the reader.
            Err(error @ (Error::Truncated { .. } | Error::OutOfRange { .. })) => {
                return Err(Error::unavailable(format!("compare with log {}", log.id()), error));
            }
            Err(error @ Error::Failed { .. }) => {
                tracing::warn!(log = %log.id(), %error, "the relay cannot read its destination, so it sends without \
                    comparing; if its outbox was restored from an older copy, receivers will drop new records");
                nothing(&lowest)
            }
            found => found?,
        };
        self.held.extend(found);
        Ok(())
    }

    /// Checks the records against what was found.
    pub(super) fn check(&self, log: &LogId, records: &[NewRecord]) -> Result<(), Conflict> {
        for (numbering, records) in by_numbering(records) {
            let Some(held) = self.held.get(numbering) else { continue };
            for (record, number) in records.iter().zip(numbers(records)) {
                let is_late = |highest: &u64| highest.saturating_sub(number) > Window::SIZE;
                let highest = match held.digests.get(&number) {
                    Some(digest) if *digest == digest_of(record) => continue,
                    Some(_) => None,
                    None => match held.highest(number).filter(is_late) {
                        None => continue,
                        highest => highest,
                    },
                };
                return Err(Conflict {
                    origin: Origin::of(numbering.clone(), number),
                    log: log.clone(),
                    highest,
                });
            }
        }
        Ok(())
    }

    /// Notes that the records were sent.
    pub(super) fn sent(&mut self, records: &[NewRecord]) {
        for (numbering, records) in by_numbering(records) {
            if let Some(held) = self.held.get_mut(numbering)
                && let Some(last) = numbers(records).max()
            {
                held.sent = held.sent.max(Some(last));
                if !held.digests.is_empty() {
                    held.digests = held.digests.split_off(&last.saturating_add(1));
                }
            }
        }
    }

    /// The records of the last batch come again, one by one.
    pub(super) fn go_back(&mut self) {
        self.held.values_mut().for_each(|held| held.sent = None);
    }
}

/// The records in their order, those in a row that have one numbering together, and none without.
fn by_numbering(records: &[NewRecord]) -> impl Iterator<Item = (&Numbering, &[NewRecord])> {
    let runs = records.chunk_by(|one, next| numbering(one) == numbering(next));
    runs.filter_map(|run| Some((numbering(run.first()?)?, run)))
}

fn numbering(record: &NewRecord) -> Option<&Numbering> {
    record.origin.as_ref().map(|origin| &origin.numbering)
}

fn numbers(run: &[NewRecord]) -> impl Iterator<Item = u64> {
    run.iter().filter_map(|record| Some(record.origin.as_ref()?.sequence))
}

fn digest_of(record: &NewRecord) -> u128 {
    content_digest(record.key.as_ref(), &record.headers, &record.payload)
}

type Found = HashMap<Numbering, Held>;

/// What was found of one numbering.
#[derive(Default)]
struct Held {
    /// The digests of the records, by number.
    digests: BTreeMap<u64, u128>,
    /// The lowest number seen. Retention may have removed those below.
    reach: Option<u64>,
    /// The highest number that this relay has sent since.
    sent: Option<u64>,
}

impl Held {
    /// The highest number that receivers may have seen instead of this one, which was not found.
    fn highest(&self, number: u64) -> Option<u64> {
        let found = self.digests.last_key_value().map(|(highest, _)| *highest);
        found
            .filter(|_| self.reach.is_some_and(|reach| reach <= number))
            .max(self.sent)
    }
}

fn nothing(lowest: &HashMap<&Numbering, u64>) -> Found {
    let numberings = lowest.keys().map(|numbering| (*numbering).clone());
    numberings.map(|numbering| (numbering, Held::default())).collect()
}

/// Reads back until the lowest number of each numbering was found, or a lower one.
///
/// A numbering of which the first look finds nothing is taken for new to this log, so that a relay
/// does not read a whole log before it sends its first record.
async fn find(log: &dyn Log, lowest: &HashMap<&Numbering, u64>) -> Result<Found, Error> {
    // A broker may take long to tell that it holds nothing, so it is asked once.
    if log.bounds().await?.end == Offset::ZERO {
        return Ok(nothing(lowest));
    }
    let mut count = FIRST_LOOK;
    loop {
        let Some(from) = log.tail(count).await? else {
            tracing::debug!(log = %log.id(), "the log cannot tell where its last records begin, so the relay does not \
                compare what it sends with them");
            return Ok(nothing(lowest));
        };
        let (found, is_complete) = read(log, from, lowest).await?;
        if is_complete || from <= log.bounds().await?.earliest {
            return Ok(found);
        }
        count = count.saturating_mul(GROWTH);
    }
}

/// What the log holds from an offset on, and whether that is all that `find` needs.
async fn read(log: &dyn Log, from: Offset, lowest: &HashMap<&Numbering, u64>) -> Result<(Found, bool), Error> {
    let mut found = nothing(lowest);
    let (mut next, end) = (from, log.readable_end().await?);
    if next < end {
        let mut reader = log.read(from).await?;
        while next < end {
            for record in reader.next(1_000).await? {
                next = record.offset.successor();
                let Some(origin) = record.origin.as_ref().filter(|_| record.malformed.is_none()) else {
                    continue;
                };
                let (Some(lowest), Some(held)) = (lowest.get(&origin.numbering), found.get_mut(&origin.numbering))
                else {
                    continue;
                };
                held.reach = Some(held.reach.map_or(origin.sequence, |reach| reach.min(origin.sequence)));
                if origin.sequence >= *lowest {
                    // Of several copies, receivers handled the first one.
                    let digest = || content_digest(record.key.as_ref(), &record.headers, &record.payload);
                    held.digests.entry(origin.sequence).or_insert_with(digest);
                }
            }
        }
    }
    let reaches = |(numbering, held): (&Numbering, &Held)| held.reach.is_none_or(|reach| reach <= lowest[numbering]);
    let is_complete = found.iter().all(reaches);
    Ok((found, is_complete))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ProducerId, memory::Memory};

    fn records(numbers: std::ops::Range<u64>) -> Vec<NewRecord> {
        let producer = ProducerId::new("orders").expect("name");
        let record = |n: u64| NewRecord::new(n.to_string()).origin(Origin::new(producer.clone(), Epoch::STABLE, n));
        numbers.map(record).collect()
    }

    #[tokio::test]
    async fn what_was_sent_meanwhile_makes_a_record_late() -> Result<(), Error> {
        let log = Memory::new().log("bus")?;
        let (id, mut comparison) = (log.id().clone(), Comparison::default());
        let last = 5 + Window::SIZE;
        comparison.look(&log, &records(6..7)).await?;
        comparison.sent(&records(6..last + 1));
        assert!(
            comparison.check(&id, &records(5..6)).is_ok(),
            "the window reaches back to it"
        );
        comparison.sent(&records(last + 1..last + 2));
        let conflict = comparison.check(&id, &records(5..6)).expect_err("late");
        assert_eq!((conflict.is_late(), conflict.highest), (true, Some(last + 1)));
        comparison.go_back();
        assert!(
            comparison.check(&id, &records(5..6)).is_ok(),
            "a batch that comes again is not late"
        );
        Ok(())
    }
}
