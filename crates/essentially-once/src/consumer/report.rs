//! What a consumer did: the report of a run, and the metrics while it runs.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use metrics::{Counter, Histogram};

use crate::{ConsumerId, Offset, Record};

/// What one run of a consumer did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// Records handled; under essentially-once, those whose effects were committed.
    pub handled: u64,
    /// Records dropped because their origin was seen before.
    pub duplicates: u64,
    /// Records given up under at-most-once: their handler failed, or they could not be decoded.
    pub failed: u64,
    /// Commits of the position.
    pub commits: u64,
    /// Commits refused because another instance was first.
    pub fenced: u64,
    /// How often the consumer went back to its stored position.
    pub restarts: u64,
    /// How often log and store were found to have gone back together, as when a server that holds both fails over to a
    /// replica that is behind. What both have lost had no lasting effect, so the consumer goes on from the stored position.
    pub rewound: u64,
    /// The committed position: the offset at which a new run goes on. `None` if it was never known.
    pub next: Option<Offset>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} handled, {} duplicates, {} failed, {} commits, {} fenced, {} restarts",
            self.handled, self.duplicates, self.failed, self.commits, self.fenced, self.restarts
        )?;
        if self.rewound > 0 {
            write!(f, ", {} rewound", self.rewound)?;
        }
        match self.next {
            Some(next) => write!(f, ", next offset {next}"),
            None => Ok(()),
        }
    }
}

/// The metrics of one consumer, labelled with its name and delivery, in the process's recorder (crate `metrics`).
pub(super) struct Telemetry {
    pub(super) handled: Counter,
    pub(super) duplicates: Counter,
    pub(super) failed: Counter,
    pub(super) commits: Counter,
    pub(super) fenced: Counter,
    pub(super) restarts: Counter,
    pub(super) rewound: Counter,
    commit_seconds: Histogram,
    lag_seconds: Histogram,
}

impl Telemetry {
    pub(super) fn new(consumer: &ConsumerId, delivery: &'static str) -> Self {
        let labels = [
            ("consumer", consumer.as_str().to_owned()),
            ("delivery", delivery.to_owned()),
        ];
        let counter = |name: &'static str| metrics::counter!(name, &labels);
        let histogram = |name: &'static str| metrics::histogram!(name, &labels);
        Self {
            handled: counter("essentially_once_handled_total"),
            duplicates: counter("essentially_once_duplicates_total"),
            failed: counter("essentially_once_failed_total"),
            commits: counter("essentially_once_commits_total"),
            fenced: counter("essentially_once_fenced_total"),
            restarts: counter("essentially_once_restarts_total"),
            rewound: counter("essentially_once_rewound_total"),
            commit_seconds: histogram("essentially_once_commit_seconds"),
            lag_seconds: histogram("essentially_once_lag_seconds"),
        }
    }

    pub(super) fn committed(&self, took: Duration) {
        self.commits.increment(1);
        self.commit_seconds.record(took);
    }

    /// How long the batch's oldest record has been in the log.
    pub(super) fn lag(&self, oldest: &Record) {
        let age = SystemTime::now().duration_since(oldest.appended_at);
        self.lag_seconds.record(age.unwrap_or_default());
    }
}
