//! Compares a log with the records that a consumer applied: lost, doubled, reordered, or as
//! promised.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
};

use bytes::Bytes;
use essentially_once::{Error, Log, Offset, Origin, Record, backend::Position};

use crate::violation::Violation;

/// How many offsets of one kind a message names before it only counts the rest.
const NAMED: usize = 10;

/// One effect of a record, as found in the state that a handler wrote.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Applied {
    /// The record's offset.
    pub offset: Offset,
    /// The record's key.
    pub key: Option<Bytes>,
}

impl From<&Record> for Applied {
    fn from(record: &Record) -> Self {
        Self {
            offset: record.offset,
            key: record.key.clone(),
        }
    }
}

/// What a delivery promises, and so what [`Findings::judge`] tolerates.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Expectation {
    /// Every message was applied once, in the order of its key. State and position agree.
    EssentiallyOnce,
    /// No message was lost. Some may have been applied more than once.
    AtLeastOnce,
    /// No message was applied twice. Some may have been lost.
    AtMostOnce,
}

impl fmt::Display for Expectation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EssentiallyOnce => "essentially-once",
            Self::AtLeastOnce => "at-least-once",
            Self::AtMostOnce => "at-most-once",
        })
    }
}

/// Compares a log with the applied records. The state may live anywhere: in a table, a file, or
/// another service.
///
/// Records with the same [`Origin`] are one message that was sent more than once. Exactly one of
/// them must be applied. [Malformed](Record::malformed) records are not messages, because handlers
/// never get them.
///
/// ```
/// # use essentially_once::{Offset, Record};
/// use essentially_once_testkit::{Applied, Check, Expectation};
/// # let now = std::time::SystemTime::UNIX_EPOCH;
/// let records: Vec<Record> = (0..4).map(|n| Record::new(Offset::from(n), now, "")).collect();
/// // Read these from your database, in the order in which they were written.
/// let applied: Vec<Applied> = [0, 1, 1, 3].map(|n| Applied::from(&records[n])).into();
///
/// let findings = Check::new(&records, &applied).drained().findings();
/// assert_eq!(findings.lost, [Offset::from(2)]);
/// let violation = findings.judge(Expectation::AtMostOnce).unwrap_err();
/// assert_eq!(violation.to_string(), "not at-most-once: doubled: 1 (2x)");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Check<'a> {
    records: &'a [Record],
    applied: &'a [Applied],
    position: Option<Option<&'a Position>>,
    drained: bool,
}

impl<'a> Check<'a> {
    /// Creates a check of all `records` that the consumer should have seen, in log order, against
    /// everything it `applied`, in the order of application.
    pub fn new(records: &'a [Record], applied: &'a [Applied]) -> Self {
        Self {
            records,
            applied,
            position: None,
            drained: false,
        }
    }

    /// Adds the consumer's stored position, or `None` if it has no position. Read it while the
    /// consumer is idle.
    #[must_use]
    pub fn position(mut self, position: Option<&'a Position>) -> Self {
        self.position = Some(position);
        self
    }

    /// States that the consumer has reached the end of the log. Every message that was not applied
    /// is then lost.
    #[must_use]
    pub fn drained(mut self) -> Self {
        self.drained = true;
        self
    }

    /// Compares the log with the applied records.
    pub fn findings(&self) -> Findings {
        let mut findings = Findings::default();
        let mut messages = Messages::of(self.records);
        let mut highest_by_key: HashMap<&Bytes, Offset> = HashMap::new();
        for applied in self.applied {
            let Some(is_first) = messages.apply(applied) else {
                findings.phantom.push(applied.offset);
                continue;
            };
            if let Some(key) = applied.key.as_ref().filter(|_| is_first) {
                let highest = highest_by_key.entry(key).or_insert(applied.offset);
                if *highest > applied.offset {
                    findings.reordered.push(Reordered {
                        offset: applied.offset,
                        behind: *highest,
                    });
                }
                *highest = applied.offset.max(*highest);
            }
        }
        let next = self.position.map(|position| position.map_or(Offset::ZERO, |p| p.next));
        for message in messages.messages {
            let is_passed = next.is_some_and(|next| message.offset < next);
            match message.applied.len() {
                0 if message.malformed => {}
                0 => {
                    if is_passed {
                        findings.position_beyond_state.push(message.offset);
                    }
                    if is_passed || self.drained {
                        findings.lost.push(message.offset);
                    }
                }
                1 => {}
                times => findings.doubled.push(Doubled {
                    offset: message.offset,
                    times,
                    copies: BTreeSet::from_iter(message.applied).into_iter().collect(),
                }),
            }
        }
        if let Some(next) = next {
            let beyond = self.applied.iter().map(|applied| applied.offset);
            let beyond: BTreeSet<Offset> = beyond.filter(|offset| *offset >= next).collect();
            findings.state_beyond_position = beyond.into_iter().collect();
        }
        findings
    }
}

/// Reads all records that the log holds now.
///
/// # Errors
/// Those of [`Log::bounds`], [`Log::read`] and the reader. It waits forever if the log's last
/// record was removed without those before it.
pub async fn read_log(log: &dyn Log) -> Result<Vec<Record>, Error> {
    const FETCH: usize = 1_000;
    let bounds = log.bounds().await?;
    let mut records: Vec<Record> = Vec::new();
    if bounds.earliest == bounds.end {
        return Ok(records);
    }
    let mut reader = log.read(bounds.earliest).await?;
    while records.last().is_none_or(|last| last.offset.successor() < bounds.end) {
        records.extend(reader.next(FETCH).await?);
    }
    records.retain(|record| record.offset < bounds.end);
    Ok(records)
}

/// What a [`Check`] found. Offsets are those of the log. A message sent more than once is named by
/// its first record.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Findings {
    /// Messages never applied, although the position is past them or the log is drained.
    pub lost: Vec<Offset>,
    /// Messages applied more than once.
    pub doubled: Vec<Doubled>,
    /// Records first applied after a later record of the same key. Records without a key have no
    /// order.
    pub reordered: Vec<Reordered>,
    /// Applied offsets that the log does not hold, or holds with another key.
    pub phantom: Vec<Offset>,
    /// Messages never applied, although the position is past them. Of those in `lost`, no consumer
    /// will return to these.
    pub position_beyond_state: Vec<Offset>,
    /// Applied offsets at or past the position.
    pub state_beyond_position: Vec<Offset>,
}

/// A message that was applied more than once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Doubled {
    /// Its first record.
    pub offset: Offset,
    /// How many times it was applied.
    pub times: usize,
    /// Which of its records were applied. More than one if the sender sent it again.
    pub copies: Vec<Offset>,
}

/// A record that was applied too late.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reordered {
    /// The earlier record.
    pub offset: Offset,
    /// The later record of the same key that was applied before it.
    pub behind: Offset,
}

impl Findings {
    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Compares the findings with a promise:
    ///
    /// - essentially-once allows no findings.
    /// - at-least-once allows no lost message and no phantom.
    /// - at-most-once allows no doubled message and no phantom.
    ///
    /// # Errors
    /// The findings that break the promise, with their offsets.
    pub fn judge(&self, expectation: Expectation) -> Result<(), Violation> {
        let breach = match expectation {
            Expectation::EssentiallyOnce => self.clone(),
            Expectation::AtLeastOnce => Self {
                lost: self.lost.clone(),
                phantom: self.phantom.clone(),
                ..Self::default()
            },
            Expectation::AtMostOnce => Self {
                doubled: self.doubled.clone(),
                phantom: self.phantom.clone(),
                ..Self::default()
            },
        };
        if breach.is_empty() {
            return Ok(());
        }
        Err(Violation::new(format!("not {expectation}: {breach}")))
    }
}

/// Lists all findings by kind, with up to ten offsets each and the number of the others.
impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [
            ("lost", list(&self.lost)),
            ("doubled", list(&self.doubled)),
            ("reordered", list(&self.reordered)),
            ("phantom", list(&self.phantom)),
            ("position beyond state", list(&self.position_beyond_state)),
            ("state beyond position", list(&self.state_beyond_position)),
        ];
        let mut found = kinds.iter().filter(|(_, offsets)| !offsets.is_empty());
        let Some((kind, offsets)) = found.next() else {
            return f.write_str("nothing found");
        };
        write!(f, "{kind}: {offsets}")?;
        found.try_for_each(|(kind, offsets)| write!(f, "; {kind}: {offsets}"))
    }
}

/// Shows the offset and the count, plus the copies if there is more than one: `3 (2x, as 3 and 5)`.
impl fmt::Display for Doubled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offset, times, copies } = self;
        match copies.as_slice() {
            [_] => write!(f, "{offset} ({times}x)"),
            copies => write!(f, "{offset} ({times}x, as {})", list(copies)),
        }
    }
}

impl fmt::Display for Reordered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} after {}", self.offset, self.behind)
    }
}

fn list(items: &[impl fmt::Display]) -> String {
    let named: Vec<String> = items.iter().take(NAMED).map(ToString::to_string).collect();
    let named = named.join(", ");
    match items.len().checked_sub(NAMED) {
        Some(more @ 1..) => format!("{named} and {more} more"),
        _ => named,
    }
}

/// A log's messages, and how often each was applied.
struct Messages<'a> {
    messages: Vec<Message>,
    /// By offset: the record's key and its index in `messages`.
    records: HashMap<Offset, (Option<&'a Bytes>, usize)>,
}

struct Message {
    offset: Offset,
    malformed: bool,
    applied: Vec<Offset>,
}

impl<'a> Messages<'a> {
    fn of(log: &'a [Record]) -> Self {
        let mut messages: Vec<Message> = Vec::new();
        let mut records = HashMap::new();
        let mut by_origin: HashMap<&Origin, usize> = HashMap::new();
        for record in log {
            let new = messages.len();
            let index = match &record.origin {
                Some(origin) => *by_origin.entry(origin).or_insert(new),
                None => new,
            };
            if index == new {
                messages.push(Message {
                    offset: record.offset,
                    malformed: record.malformed.is_some(),
                    applied: Vec::new(),
                });
            }
            records.insert(record.offset, (record.key.as_ref(), index));
        }
        Self { messages, records }
    }

    /// Notes an application. Returns whether it is the message's first, or `None` if the log has no
    /// such record.
    fn apply(&mut self, applied: &Applied) -> Option<bool> {
        let (key, index) = self.records.get(&applied.offset)?;
        if *key != applied.key.as_ref() {
            return None;
        }
        let message = &mut self.messages[*index];
        message.applied.push(applied.offset);
        Some(message.applied.len() == 1)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests;
