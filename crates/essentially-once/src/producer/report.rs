//! What a producer reports: counts, sequences, and metrics.

use std::{fmt, ops::RangeInclusive};

use metrics::{Counter, Gauge, Unit};

use crate::{Error, LogId, Numbering};

/// What became of the records that a producer was given.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// Records that the log confirmed.
    pub confirmed: u64,
    /// Records that are not in the log.
    pub failed: Sequences,
    /// Records that may or may not be in the log.
    pub in_doubt: Sequences,
    /// Records that are still queued or being appended. None are left after
    /// [`Sender::close`](super::Sender::close).
    pub waiting: Sequences,
}

impl Report {
    pub(super) fn count(&mut self, sequence: u64, result: &Result<(), Error>) {
        match result {
            Ok(()) => self.confirmed += 1,
            Err(Error::Indeterminate { .. }) => self.in_doubt.add(sequence),
            Err(_) => self.failed.add(sequence),
        }
    }
}

/// `8 confirmed, 2 failed (4, 7), 0 in doubt, 0 waiting`
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} confirmed", self.confirmed)?;
        for (sequences, state) in [
            (&self.failed, "failed"),
            (&self.in_doubt, "in doubt"),
            (&self.waiting, "waiting"),
        ] {
            write!(f, ", {} {state}{}", sequences.count, Ranges(sequences))?;
        }
        Ok(())
    }
}

/// Numbers of records, as in [`Origin::sequence`](crate::Origin::sequence).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sequences {
    count: u64,
    ranges: Vec<RangeInclusive<u64>>,
}

impl Sequences {
    /// How many ranges are kept at most. This bounds the memory of a producer that runs for months.
    const MAX_RANGES: usize = 1_024;

    /// How many records there are.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The records' numbers, in the order in which the producer learned of their fate. If there are
    /// more than 1,024 ranges, only the last ones are kept.
    pub fn ranges(&self) -> &[RangeInclusive<u64>] {
        &self.ranges
    }

    pub(super) fn add(&mut self, sequence: u64) {
        self.count += 1;
        if let Some(last) = self.ranges.last_mut()
            && last.end().checked_add(1) == Some(sequence)
        {
            *last = *last.start()..=sequence;
            return;
        }
        if self.ranges.len() == Self::MAX_RANGES {
            self.ranges.remove(0);
        }
        self.ranges.push(sequence..=sequence);
    }
}

/// `4 (1, 5-7)`: the count, then the first ten ranges.
impl fmt::Display for Sequences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.count, Ranges(self))
    }
}

/// ` (1, 5-7)`, or nothing.
struct Ranges<'a>(&'a Sequences);

impl fmt::Display for Ranges<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 10;
        let ranges = &self.0.ranges;
        for (index, range) in ranges.iter().take(SHOWN).enumerate() {
            f.write_str(if index == 0 { " (" } else { ", " })?;
            match (range.start(), range.end()) {
                (start, end) if start == end => write!(f, "{start}")?,
                (start, end) => write!(f, "{start}-{end}")?,
            }
        }
        match ranges.len() {
            0 => Ok(()),
            1..=SHOWN => f.write_str(")"),
            _ => f.write_str(", ...)"),
        }
    }
}

/// The metrics of one producer, labelled with its name and its log's, in the process's recorder
/// (crate `metrics`).
pub(super) struct Telemetry {
    confirmed: Counter,
    failed: Counter,
    in_doubt: Counter,
    resent: Counter,
    waiting: Gauge,
}

impl Telemetry {
    pub(super) fn new(numbering: &Numbering, log: &LogId) -> Self {
        let labels = [
            ("producer", numbering.producer().as_str().to_owned()),
            ("log", log.name().to_owned()),
        ];
        let counter = |name: &'static str, description: &'static str| {
            metrics::describe_counter!(name, Unit::Count, description);
            metrics::counter!(name, &labels)
        };
        let waiting = "essentially_once_producer_waiting";
        metrics::describe_gauge!(
            waiting,
            Unit::Count,
            "Records that were sent and are neither confirmed nor failed"
        );
        Self {
            confirmed: counter(
                "essentially_once_producer_confirmed_total",
                "Records that the log confirmed",
            ),
            failed: counter(
                "essentially_once_producer_failed_total",
                "Records that could not be appended",
            ),
            in_doubt: counter(
                "essentially_once_producer_in_doubt_total",
                "Records given up although they may be in the log",
            ),
            resent: counter(
                "essentially_once_producer_resent_total",
                "Records appended again after a failed append, counted at each try",
            ),
            waiting: metrics::gauge!(waiting, &labels),
        }
    }

    // The gauge is only ever moved, so producers with equal labels add up.
    pub(super) fn queued(&self) {
        self.waiting.increment(1.0);
    }

    pub(super) fn resolved(&self, result: &Result<(), Error>) {
        self.waiting.decrement(1.0);
        match result {
            Ok(()) => self.confirmed.increment(1),
            Err(Error::Indeterminate { .. }) => self.in_doubt.increment(1),
            Err(_) => self.failed.increment(1),
        }
    }

    pub(super) fn resent(&self, records: usize) {
        self.resent.increment(records as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_kept_as_ranges_and_their_memory_is_bounded() {
        let mut sequences = Sequences::default();
        assert_eq!(sequences.to_string(), "0");
        for sequence in [5, 6, 7, 1, 3] {
            sequences.add(sequence);
        }
        assert_eq!(sequences.to_string(), "5 (5-7, 1, 3)");
        for sequence in (10..30_000).step_by(2) {
            sequences.add(sequence);
        }
        assert_eq!(sequences.count(), 5 + 14_995);
        assert_eq!(sequences.ranges().len(), 1_024);
        assert_eq!(sequences.ranges().last(), Some(&(29_998..=29_998)));
        assert!(sequences.to_string().ends_with(", ...)"), "{sequences}");
    }
}
