//! Warnings about dropped duplicates, limited in rate.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{Numbering, Origin};

/// The shortest time between two warnings.
const EVERY: Duration = Duration::from_secs(10);

/// How many producers one warning names.
const NAMED: usize = 5;

/// The duplicates dropped since the last warning. Dropping this logs a warning about the rest.
#[derive(Default)]
pub(super) struct Duplicates {
    warned: Option<Instant>,
    dropped: BTreeMap<Numbering, Dropped>,
}

#[derive(Default)]
struct Dropped {
    count: u64,
    /// Duplicates too old to know whether they were handled.
    below_window: u64,
    last: u64,
}

impl Duplicates {
    /// Counts a duplicate, and logs a warning unless the last one was a moment ago.
    pub(super) fn note(&mut self, origin: &Origin, is_below_window: bool) {
        let dropped = self.dropped.entry(origin.numbering.clone()).or_default();
        dropped.count += 1;
        dropped.below_window += u64::from(is_below_window);
        dropped.last = origin.sequence;
        if self.warned.is_none_or(|warned| warned.elapsed() >= EVERY) {
            self.warn();
            self.warned = Some(Instant::now());
        }
    }

    fn warn(&mut self) {
        let dropped = std::mem::take(&mut self.dropped);
        for (numbering, dropped) in dropped.iter().take(NAMED) {
            let Dropped {
                count,
                below_window,
                last,
            } = dropped;
            tracing::warn!(
                producer = %numbering,
                count,
                last_sequence = last,
                "dropped records that their producer sent twice"
            );
            if *below_window > 0 {
                tracing::warn!(
                    producer = %numbering,
                    count = below_window,
                    "some of the dropped records are more than a window below the highest sequence, so they may not have been \
                     handled; a producer that starts numbering again needs a new epoch (`Epoch::fresh`)"
                );
            }
        }
        if let Some(more) = dropped.len().checked_sub(NAMED).filter(|more| *more > 0) {
            let count: u64 = dropped.values().skip(NAMED).map(|dropped| dropped.count).sum();
            tracing::warn!(
                producers = more,
                count,
                "dropped records that more producers sent twice"
            );
        }
    }
}

impl Drop for Duplicates {
    fn drop(&mut self) {
        if !self.dropped.is_empty() {
            self.warn();
        }
    }
}
