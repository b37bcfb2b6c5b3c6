//! Compares what was done to records with what was promised.

use std::collections::{BTreeMap, HashSet};

use essentially_once::{Offset, Origin, Record, backend::DeadLetter};

use super::{history::Done, operator::EDIT};
use crate::violation::{CaseResult, ensure};

/// What a consumer, its handlers and its operators did.
pub(super) struct Check<'a> {
    /// The log.
    pub(super) records: &'a [Record],
    /// What took effect, in order.
    pub(super) history: &'a [Done],
    /// Where the position is now.
    pub(super) next: Offset,
    /// The letters that are left.
    pub(super) letters: &'a [DeadLetter],
}

impl Check<'_> {
    /// Follows the history. Each record that the position passes is owed one effect, unless it is a
    /// duplicate or an operator skipped it. Handling or discarding pays it. What is still owed in
    /// the end must be a letter, and each letter must be owed.
    pub(super) fn judge(&self) -> CaseResult {
        let mut book = Book::default();
        let mut from = Offset::ZERO;
        let mut history = self.history;
        loop {
            let until_move = history.iter().position(|done| matches!(done, Done::Moved { .. }));
            let (stretch, rest) = history.split_at(until_move.unwrap_or(history.len()));
            let moved = match rest.first() {
                Some(Done::Moved { from, to }) => Some((*from, *to)),
                _ => None,
            };
            book.pass(self.records, from..moved.map_or(self.next, |(from, _)| from), stretch);
            stretch.iter().try_for_each(|done| book.follow(done, self.records))?;
            let Some((_, to)) = moved else { break };
            if moved.is_some_and(|(from, to)| to < from) {
                book.go_back(to);
            }
            (from, history) = (to, &rest[1..]);
        }
        self.compare_with_letters(&book)
    }

    fn compare_with_letters(&self, book: &Book) -> CaseResult {
        for letter in self.letters {
            let (offset, payload) = (letter.record.offset, &letter.record.payload);
            let owed = book.owed.get(&offset);
            ensure!(
                owed.is_some(),
                "the record at {offset} is a dead letter, although {}",
                book.fate(offset)
            );
            ensure!(
                owed.is_some_and(|owed| owed.payload.as_bytes() == payload),
                "the dead letter at {offset} holds {payload:?} instead of {:?}",
                owed.map(|owed| &owed.payload)
            );
        }
        let kept: HashSet<Offset> = self.letters.iter().map(|letter| letter.record.offset).collect();
        let lost = book.owed.keys().find(|offset| !kept.contains(offset));
        ensure!(
            lost.is_none(),
            "lost: the record at {} was neither handled nor set aside, and the position is {}",
            lost.map(ToString::to_string).unwrap_or_default(),
            self.next
        );
        Ok(())
    }
}

/// Which records are owed an effect.
#[derive(Default)]
struct Book {
    owed: BTreeMap<Offset, Owed>,
    /// The origins that the position has passed since it last went back.
    seen: HashSet<Origin>,
    /// What happened to records that are owed nothing more.
    fates: BTreeMap<Offset, &'static str>,
}

struct Owed {
    key: Option<bytes::Bytes>,
    payload: String,
}

impl Book {
    /// The position passes these records, one after the other.
    fn pass(&mut self, records: &[Record], range: std::ops::Range<Offset>, stretch: &[Done]) {
        for record in records.iter().filter(|record| range.contains(&record.offset)) {
            let is_duplicate = record
                .origin
                .as_ref()
                .is_some_and(|origin| !self.seen.insert(origin.clone()));
            let fate = match stretch.contains(&Done::Skipped(record.offset)) {
                true => "an operator skipped it",
                false if is_duplicate => "it is a duplicate",
                false => {
                    let payload = String::from_utf8_lossy(&record.payload).into_owned();
                    let key = record.key.clone();
                    self.owed.insert(record.offset, Owed { key, payload });
                    continue;
                }
            };
            self.fates.insert(record.offset, fate);
        }
    }

    fn follow(&mut self, done: &Done, records: &[Record]) -> CaseResult {
        match done {
            Done::Handled(offset, payload) => {
                ensure!(
                    records.iter().any(|record| record.offset == *offset),
                    "phantom: a record at {offset} was handled, which the log does not hold"
                );
                let Some(owed) = self.owed.remove(offset) else {
                    return Err(crate::Violation::new(format!(
                        "doubled: the record at {offset} was handled, although {}",
                        self.fate(*offset)
                    )));
                };
                ensure!(
                    owed.payload == *payload,
                    "the record at {offset} was handled as {payload:?} instead of {:?}",
                    owed.payload
                );
                let earlier = self
                    .owed
                    .range(..*offset)
                    .find(|(_, other)| owed.key.is_some() && other.key == owed.key);
                ensure!(
                    earlier.is_none(),
                    "reordered: the record at {offset} was handled before the one at {} of its key",
                    earlier.map(|(offset, _)| offset.to_string()).unwrap_or_default()
                );
                self.fates.insert(*offset, "it was handled before");
            }
            Done::Discarded(offset) => {
                ensure!(
                    self.owed.remove(offset).is_some(),
                    "the record at {offset} was a dead letter that an operator discarded, although {}",
                    self.fate(*offset)
                );
                self.fates.insert(*offset, "an operator discarded it");
            }
            Done::Edited(offset) => match self.owed.get_mut(offset) {
                Some(owed) => owed.payload.push_str(EDIT),
                None => {
                    return Err(crate::Violation::new(format!(
                        "the record at {offset} was a dead letter that an operator edited, although {}",
                        self.fate(*offset)
                    )));
                }
            },
            Done::Skipped(_) | Done::Moved { .. } => {}
        }
        Ok(())
    }

    /// Records from there on will be handled again. Producers are forgotten.
    fn go_back(&mut self, to: Offset) {
        self.owed.split_off(&to);
        self.fates.split_off(&to);
        self.seen.clear();
    }

    fn fate(&self, offset: Offset) -> &'static str {
        self.fates
            .get(&offset)
            .copied()
            .unwrap_or("the position has not passed it")
    }
}

#[cfg(test)]
mod tests;
