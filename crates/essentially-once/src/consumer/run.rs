//! The state of a run, which outlives its sessions.

use super::{
    deaths::Suspicion, duplicates::Duplicates, letters::Parked, policy::Verdict, read_ahead::ReadAhead, report::Report,
    silences::Silences,
};
use crate::{Offset, Pulse, Revision, rt::Instant};

/// The state of a run that outlives its sessions. It never decides which records are handled. Only
/// the stored position does.
#[derive(Default)]
pub(super) struct Run {
    pub(super) report: Report,
    pub(super) duplicates: Duplicates,
    pub(super) silences: Silences,
    /// The newest position that this run has seen, to detect a loss.
    pub(super) seen: Option<Seen>,
    /// Commits whose replies were lost, all based on the same revision. At most one of them
    /// applies.
    pub(super) unanswered: Vec<Unanswered>,
    /// What the session before knew about dead letters.
    pub(super) parked: Parked,
    /// The revision at which it has no dead letters, for a delivery that refuses them.
    pub(super) no_letters_at: Option<Revision>,
    /// How often letters were tried with a commit.
    pub(super) letter_commits: u64,
    /// Whether a letter has ended the last session, so that records come first in the next.
    pub(super) records_first: bool,
    /// What was read ahead when a record failed, and the revision of the position at which it
    /// begins.
    pub(super) ahead: Option<(Revision, ReadAhead)>,
    /// What to do after the position was taken over.
    pub(super) suspicion: Suspicion,
    /// The record to go past, after its last try failed.
    pub(super) verdict: Option<Verdict>,
    /// The first position of a new consumer, until it receives a record.
    pub(super) started_at: Option<(Revision, Offset)>,
    /// Whether retention has overtaken that position.
    pub(super) is_overtaken: bool,
    /// When this instance last committed, or began to work on a batch.
    pub(super) last_sign: Option<Instant>,
    /// Whether the stored position belongs to this run, as far as the run knows.
    pub(super) is_owner: bool,
}

impl Run {
    /// The offset of the newest position that this run has seen.
    pub(super) fn next(&self) -> Option<Offset> {
        self.seen.map(|seen| seen.next)
    }

    /// The newest revision that this run has seen.
    pub(super) fn revision(&self) -> Option<Revision> {
        self.seen.map(|seen| seen.revision)
    }

    /// Records a pulse. Returns `false` if the position went back behind the newest one that this
    /// run has seen.
    pub(super) fn note(&mut self, pulse: &Pulse) -> bool {
        let Pulse { next, revision, .. } = *pulse;
        if self.seen.is_some_and(|seen| revision.is_lost_since(seen.revision)) {
            return false;
        }
        self.seen = Some(Seen { revision, next });
        self.report.next = Some(next);
        true
    }

    /// Ends the reading that a session has left. Does nothing if there is none.
    pub(super) async fn end_reading(&mut self) {
        if let Some((_, ahead)) = self.ahead.take() {
            ahead.end().await;
        }
    }

    pub(super) fn is_owner(&self) -> bool {
        self.is_owner
    }
}

/// A position that a run has seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) revision: Revision,
    pub(super) next: Offset,
}

/// A commit that may have been applied, and the counts to add if it was.
pub(super) struct Unanswered {
    pub(super) expected: Revision,
    pub(super) revision: Revision,
    pub(super) done: Done,
}

/// The counts of a batch.
#[derive(Clone, Copy, Default)]
pub(super) struct Done {
    pub(super) handled: u64,
    pub(super) duplicates: u64,
    pub(super) failed: u64,
    pub(super) parked: u64,
    /// From where to where retention made it jump.
    pub(super) jump: Option<(Offset, Offset)>,
}
