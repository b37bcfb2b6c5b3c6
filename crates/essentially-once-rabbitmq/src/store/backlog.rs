//! How many bytes of the changelog follow the first record that a relay has not passed on.
//!
//! The broker removes what lies too many bytes back. So a handle counts the bytes of the messages
//! that it reads, and notes where commits sent to a guarded outbox.

use std::collections::VecDeque;

use essentially_once::Offset;

/// Older parts of a backlog are over the limit whatever their size, in limits.
const KEPT: i64 = 2;

/// A backlog is measured to this part of the limit, so that few places are noted.
const GRAINS: i64 = 64;

/// How far a relay is behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Behind {
    /// It has passed on every record.
    Nothing,
    /// About this many bytes follow the first record that it has not passed on: at least as many,
    /// and at most a grain more.
    Bytes(u64),
    /// At least this many bytes. The record lies before what was counted.
    AtLeast(u64),
}

/// The bytes of a changelog, as far as this handle has counted them.
#[derive(Default)]
pub(super) struct Backlogs {
    /// The offset of the next message to count; `None` before the first use.
    next: Option<u64>,
    /// The bytes counted so far.
    bytes: i64,
    grain: i64,
    outboxes: Vec<Backlog>,
}

/// The records of one outbox.
struct Backlog {
    name: String,
    /// One past its last record.
    end: Offset,
    /// The offset from which on its records are noted.
    known: u64,
    /// The count at that offset.
    known_at: i64,
    runs: VecDeque<Run>,
}

/// Messages, up to a grain of bytes, from one on that sends to the outbox.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Run {
    /// The end of the outbox before the first of them.
    before: Offset,
    /// The count before the first of them.
    at: i64,
}

/// The messages before those of a backlog, from any offset on.
pub(super) struct Earlier {
    bytes: i64,
    grain: i64,
    runs: Vec<Run>,
}

impl Backlogs {
    pub(super) fn new(outboxes: impl Iterator<Item = String>, limit: u64) -> Self {
        let empty = |name| Backlog {
            name,
            end: Offset::ZERO,
            known: 0,
            known_at: 0,
            runs: VecDeque::new(),
        };
        Self {
            next: None,
            bytes: 0,
            grain: (limit as i64 / GRAINS).max(1),
            outboxes: outboxes.map(empty).collect(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.outboxes.is_empty()
    }

    /// The bytes counted so far.
    pub(super) fn bytes(&self) -> i64 {
        self.bytes
    }

    /// Messages from `offset` on are counted next. `end` is the end of an outbox there. Returns
    /// whether counting starts over, since some were not read.
    pub(super) fn go_on_at(&mut self, offset: u64, end: impl Fn(&str) -> Offset) -> bool {
        if self.next.is_some_and(|next| offset <= next) {
            return false;
        }
        self.start_over(offset, end);
        true
    }

    /// All messages up to `offset` were counted. Returns whether counting starts over, since the
    /// changelog has lost some that were counted.
    pub(super) fn have_reached(&mut self, offset: u64, end: impl Fn(&str) -> Offset) -> bool {
        let agrees = |backlog: &Backlog| backlog.end == end(&backlog.name);
        if self.next == Some(offset) && self.outboxes.iter().all(agrees) {
            return false;
        }
        self.start_over(offset, end);
        true
    }

    fn start_over(&mut self, offset: u64, end: impl Fn(&str) -> Offset) {
        (self.next, self.bytes) = (Some(offset), 0);
        for backlog in &mut self.outboxes {
            (backlog.end, backlog.known, backlog.known_at) = (end(&backlog.name), offset, 0);
            backlog.runs.clear();
        }
    }

    /// Counts the message at `offset`, unless it was counted before. `end` is the end of an outbox
    /// after it.
    pub(super) fn count(&mut self, offset: u64, bytes: u64, end: impl Fn(&str) -> Offset) {
        if self.next.is_some_and(|next| offset < next) {
            return;
        }
        let oldest = self.bytes - KEPT * GRAINS * self.grain;
        for backlog in &mut self.outboxes {
            let end = end(&backlog.name);
            if end == backlog.end {
                continue;
            }
            let run = Run {
                before: backlog.end,
                at: self.bytes,
            };
            if backlog
                .runs
                .back()
                .is_none_or(|last| starts_run(*last, run.at, self.grain))
            {
                backlog.runs.push_back(run);
            }
            while backlog.runs.get(1).is_some_and(|second| second.at < oldest) {
                backlog.runs.pop_front();
            }
            backlog.end = end;
        }
        (self.next, self.bytes) = (Some(offset + 1), self.bytes + bytes as i64);
    }

    /// How far a relay is behind that has passed on the outbox's records up to `passed`.
    pub(super) fn behind(&self, outbox: usize, passed: Offset) -> Behind {
        let backlog = &self.outboxes[outbox];
        if passed >= backlog.end {
            return Behind::Nothing;
        }
        let started = backlog.runs.partition_point(|run| run.before <= passed);
        let first = started
            .checked_sub(1)
            .or_else(|| (!backlog.runs.is_empty()).then_some(0));
        let at = first.map_or(backlog.known_at, |first| backlog.runs[first].at);
        let bytes = (self.bytes - at).unsigned_abs();
        match started > 0 || passed.hi() >= backlog.known {
            true => Behind::Bytes(bytes),
            false => Behind::AtLeast(bytes),
        }
    }

    /// The offset from which on the records of the outbox are noted.
    pub(super) fn known(&self, outbox: usize) -> u64 {
        self.outboxes[outbox].known
    }

    pub(super) fn earlier(&self) -> Earlier {
        Earlier {
            bytes: 0,
            grain: self.grain,
            runs: Vec::new(),
        }
    }

    /// Adds the messages from `from` on that come before those noted, if these still begin at
    /// `known`.
    pub(super) fn prepend(&mut self, outbox: usize, from: u64, known: u64, earlier: &Earlier) -> bool {
        let backlog = &mut self.outboxes[outbox];
        if backlog.known != known {
            return false;
        }
        let begin = backlog.known_at - earlier.bytes;
        for run in earlier.runs.iter().rev() {
            backlog.runs.push_front(Run {
                before: run.before,
                at: begin + run.at,
            });
        }
        (backlog.known, backlog.known_at) = (from, begin);
        true
    }
}

impl Earlier {
    /// Counts the next message. `before` is where the outbox ended before it, if it sends to it.
    pub(super) fn count(&mut self, bytes: u64, before: Option<Offset>) {
        if let Some(before) = before
            && self
                .runs
                .last()
                .is_none_or(|last| starts_run(*last, self.bytes, self.grain))
        {
            self.runs.push(Run { before, at: self.bytes });
        }
        self.bytes += bytes as i64;
    }
}

fn starts_run(last: Run, at: i64, grain: i64) -> bool {
    at - last.at >= grain
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const LIMIT: u64 = 6_400;
    const GRAIN: u64 = LIMIT / GRAINS as u64;

    /// A changelog: the size of each message, and how many records it sends to the outbox.
    type Messages = Vec<(u64, u64)>;

    /// The ends of the outbox before each message, and after the last one.
    fn ends(messages: &Messages) -> Vec<Offset> {
        let mut ends = vec![Offset::ZERO];
        for (offset, (_, records)) in messages.iter().enumerate() {
            let last = ends[offset];
            ends.push(if *records == 0 {
                last
            } else {
                Offset::new(offset as u64, *records)
            });
        }
        ends
    }

    /// The backlog of a handle that has read the messages from `from` on.
    fn read(messages: &Messages, from: usize) -> Backlogs {
        let ends = ends(messages);
        let mut backlogs = Backlogs::new(["a".to_owned()].into_iter(), LIMIT);
        assert!(backlogs.go_on_at(from as u64, |_| ends[from]));
        for (offset, (bytes, _)) in messages.iter().enumerate().skip(from) {
            backlogs.count(offset as u64, *bytes, |_| ends[offset + 1]);
        }
        assert!(!backlogs.have_reached(messages.len() as u64, |_| ends[messages.len()]));
        backlogs
    }

    fn scan(backlogs: &mut Backlogs, messages: &Messages, from: u64) {
        let (ends, known) = (ends(messages), backlogs.known(0));
        let mut earlier = backlogs.earlier();
        for offset in from..known {
            let (bytes, records) = messages[offset as usize];
            earlier.count(bytes, (records > 0).then_some(ends[offset as usize]));
        }
        assert!(backlogs.prepend(0, from, known, &earlier));
    }

    /// The bytes from the first record on that a relay has not passed on.
    fn expected(messages: &Messages, passed: Offset) -> Option<u64> {
        let first = messages
            .iter()
            .enumerate()
            .position(|(offset, (_, records))| *records > 0 && Offset::new(offset as u64, *records) > passed)?;
        Some(messages[first..].iter().map(|(bytes, _)| bytes).sum())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_backlog_is_never_measured_too_small(
            messages in vec((1u64..900, prop_oneof![Just(0), Just(0), 1u64..4]), 1..60),
            from in any::<prop::sample::Index>(),
            passed in (0u64..61, 0u64..4),
        ) {
            let from = from.index(messages.len() + 1);
            let passed = Offset::new(passed.0, passed.1);
            let mut backlogs = read(&messages, from);
            let expected = expected(&messages, passed);
            if let Behind::AtLeast(bytes) = backlogs.behind(0, passed) {
                prop_assert!(expected.is_some_and(|expected| bytes <= expected), "{bytes} of {expected:?}");
                scan(&mut backlogs, &messages, passed.hi());
            }
            match (backlogs.behind(0, passed), expected) {
                (Behind::Nothing, None) => {}
                // A large one is over the limit in any case.
                (Behind::Bytes(bytes), Some(expected)) if bytes.min(expected) > LIMIT * 3 / 2 => {}
                (Behind::Bytes(bytes), Some(expected)) => {
                    let grain = GRAIN + 900;
                    prop_assert!((expected..=expected + grain).contains(&bytes), "{bytes}, not {expected}");
                }
                wrong => prop_assert!(false, "{wrong:?}"),
            }
        }
    }

    #[test]
    fn what_was_counted_survives_another_load() {
        let messages: Messages = vec![(1_000, 1); 6];
        let (mut backlogs, ends) = (read(&messages, 0), ends(&messages));
        // From a snapshot at offset 2. The first four messages there were counted.
        assert!(!backlogs.go_on_at(2, |_| ends[2]));
        for offset in 2..6 {
            backlogs.count(offset, 1_000, |_| ends[offset as usize + 1]);
        }
        assert!(!backlogs.have_reached(6, |_| ends[6]));
        assert_eq!(backlogs.behind(0, Offset::ZERO), Behind::Bytes(6_000));
        assert_eq!(backlogs.behind(0, Offset::new(3, 1)), Behind::Bytes(2_000));
        // From one that another handle wrote, past what this handle has read.
        assert!(backlogs.go_on_at(7, |_| Offset::new(6, 1)));
        assert_eq!(backlogs.behind(0, Offset::new(3, 1)), Behind::AtLeast(0));
        assert_eq!(backlogs.behind(0, Offset::new(6, 1)), Behind::Nothing);
    }

    #[test]
    fn a_changelog_that_lost_its_tail_is_counted_again() {
        let messages: Messages = vec![(1_000, 1); 6];
        let (mut backlogs, ends) = (read(&messages, 0), ends(&messages));
        assert!(!backlogs.go_on_at(0, |_| ends[0]));
        assert!(backlogs.have_reached(4, |_| ends[4]));
        assert_eq!(backlogs.behind(0, ends[4]), Behind::Nothing);
        assert_eq!(backlogs.behind(0, ends[3]), Behind::AtLeast(0));
    }

    #[test]
    fn records_that_are_gone_count_as_far_behind() {
        let messages: Messages = vec![(1_000, 1); 40];
        let backlogs = read(&messages, 0);
        assert!(backlogs.outboxes[0].runs.len() < 20, "old runs are kept");
        let Behind::Bytes(bytes) = backlogs.behind(0, Offset::ZERO) else {
            panic!("{:?}", backlogs.behind(0, Offset::ZERO))
        };
        assert!(bytes > 3 * LIMIT / 2, "{bytes}");
    }
}
