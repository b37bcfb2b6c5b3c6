//! What a consumer did: the report of a run, and the metrics while it runs.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use metrics::{Counter, Gauge, Histogram, Unit};

use crate::{ConsumerId, Offset, Record};

/// What one run of a consumer did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// Records handled. Under essentially-once, those whose effects were committed.
    pub handled: u64,
    /// Records dropped because their origin was seen before.
    pub duplicates: u64,
    /// Records passed over because their handler failed or they could not be decoded: under
    /// at-most-once, or by [`OnFailure::Skip`](super::OnFailure::Skip).
    pub failed: u64,
    /// Records set aside as [dead letters](super::dead_letters).
    pub parked: u64,
    /// Failed calls of the handler, and records that could not be decoded, counted at each try.
    pub failed_tries: u64,
    /// Commits of the position.
    pub commits: u64,
    /// How often another instance, or a change of the position by hand, committed first.
    pub fenced: u64,
    /// How often the consumer went back to its stored position.
    pub restarts: u64,
    /// How often log and store went back together, as when a server that holds both fails over to a
    /// replica that is behind. Whatever both lost had no lasting effect, so the consumer continues
    /// from the stored position.
    pub rewound: u64,
    /// How often retention had removed unhandled records, and the consumer
    /// [skipped to the earliest one](super::OnTruncated::SkipToEarliest).
    pub truncated: u64,
    /// The positions before and after the last of these skips.
    pub skipped_to_earliest: Option<(Offset, Offset)>,
    /// The committed position: the offset at which a new run continues. `None` if it was never
    /// known.
    pub next: Option<Offset>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = |count: u64, one: &str, several: &str| match count {
            1 => format!("1 {one}"),
            count => format!("{count} {several}"),
        };
        let duplicates = counted(self.duplicates, "duplicate", "duplicates");
        let commits = counted(self.commits, "commit", "commits");
        let restarts = counted(self.restarts, "restart", "restarts");
        write!(
            f,
            "{} handled, {duplicates}, {} failed, {commits}, {} fenced, {restarts}",
            self.handled, self.failed, self.fenced
        )?;
        if self.failed_tries > 0 {
            write!(f, ", {}", counted(self.failed_tries, "failed try", "failed tries"))?;
        }
        if self.parked > 0 {
            write!(f, ", {} set aside", self.parked)?;
        }
        if self.rewound > 0 {
            write!(f, ", {} rewound", self.rewound)?;
        }
        if let Some((from, to)) = self.skipped_to_earliest {
            let times = counted(self.truncated, "time", "times");
            write!(f, ", {times} truncated, last from {from} to {to}")?;
        }
        match self.next {
            Some(next) => write!(f, ", next offset {next}"),
            None => Ok(()),
        }
    }
}

/// The metrics of one consumer, labelled with its name and delivery, in the process's recorder
/// (crate `metrics`).
pub(super) struct Telemetry {
    pub(super) handled: Counter,
    pub(super) duplicates: Counter,
    pub(super) failed: Counter,
    pub(super) parked: Counter,
    pub(super) failed_tries: Counter,
    pub(super) commits: Counter,
    pub(super) fenced: Counter,
    pub(super) restarts: Counter,
    pub(super) rewound: Counter,
    pub(super) truncated: Counter,
    commit_seconds: Histogram,
    lag_seconds: Histogram,
    running: Gauge,
    standby: Gauge,
    paused: Gauge,
    last_commit: Gauge,
    oldest_waiting: Gauge,
    records_behind: Gauge,
    pub(super) dead_letters: Gauge,
}

impl Telemetry {
    /// Sets the metrics of a run that begins. Dropping this marks the run as ended.
    pub(super) fn new(consumer: &ConsumerId, delivery: &'static str) -> Self {
        let labels = [
            ("consumer", consumer.as_str().to_owned()),
            ("delivery", delivery.to_owned()),
        ];
        let counter = |name: &'static str, description: &'static str| {
            metrics::describe_counter!(name, Unit::Count, description);
            metrics::counter!(name, &labels)
        };
        let histogram = |name: &'static str, description: &'static str| {
            metrics::describe_histogram!(name, Unit::Seconds, description);
            metrics::histogram!(name, &labels)
        };
        let gauge = |name: &'static str, unit, description: &'static str| {
            metrics::describe_gauge!(name, unit, description);
            metrics::gauge!(name, &labels)
        };
        let telemetry = Self {
            handled: counter("essentially_once_handled_total", "Records handled"),
            duplicates: counter(
                "essentially_once_duplicates_total",
                "Records dropped because their origin was seen before",
            ),
            failed: counter(
                "essentially_once_failed_total",
                "Records passed over because they could not be handled",
            ),
            parked: counter("essentially_once_parked_total", "Records set aside as dead letters"),
            failed_tries: counter(
                "essentially_once_failed_tries_total",
                "Failed calls of the handler, and records that could not be decoded",
            ),
            commits: counter("essentially_once_commits_total", "Commits of the position"),
            fenced: counter(
                "essentially_once_fenced_total",
                "Times that another instance, or a change by hand, committed first",
            ),
            restarts: counter(
                "essentially_once_restarts_total",
                "Times that the consumer went back to its stored position",
            ),
            rewound: counter(
                "essentially_once_rewound_total",
                "Times that log and store went back together",
            ),
            truncated: counter(
                "essentially_once_truncated_total",
                "Times that retention had removed unhandled records and the consumer skipped to the earliest one",
            ),
            commit_seconds: histogram("essentially_once_commit_seconds", "Duration of commits"),
            lag_seconds: histogram(
                "essentially_once_lag_seconds",
                "Time from the append of a batch's oldest record to its commit",
            ),
            running: gauge(
                "essentially_once_running",
                Unit::Count,
                "1 while the consumer runs, active or standing by; 0 after it has ended",
            ),
            standby: gauge(
                "essentially_once_standby",
                Unit::Count,
                "1 while another instance is active and this one stands by",
            ),
            paused: gauge(
                "essentially_once_paused",
                Unit::Count,
                "1 while this instance waits because an operator has paused its consumer",
            ),
            last_commit: gauge(
                "essentially_once_last_commit_timestamp_seconds",
                Unit::Seconds,
                "Unix time of the last commit",
            ),
            oldest_waiting: gauge(
                "essentially_once_oldest_waiting_timestamp_seconds",
                Unit::Seconds,
                "Unix time at which the oldest unhandled record was appended, or read if its append time is unknown; 0 if no \
                 record waits",
            ),
            records_behind: gauge(
                "essentially_once_records_behind",
                Unit::Count,
                "Records behind the position, if the log can count them; measured every ten seconds",
            ),
            dead_letters: gauge(
                "essentially_once_dead_letters",
                Unit::Count,
                "Dead letters of the consumer",
            ),
        };
        telemetry.running.set(1.0);
        telemetry.standby.set(0.0);
        telemetry.paused.set(0.0);
        telemetry
    }

    /// Marks the instance as standing by until the result is dropped.
    pub(super) fn stand_by(&self) -> Waiting<'_> {
        self.wait(&self.standby)
    }

    /// Marks the instance as paused until the result is dropped.
    pub(super) fn pause(&self) -> Waiting<'_> {
        self.wait(&self.paused)
    }

    fn wait<'a>(&self, state: &'a Gauge) -> Waiting<'a> {
        state.set(1.0);
        self.oldest_waiting.set(0.0);
        Waiting(state)
    }

    pub(super) fn committed(&self, took: Duration) {
        self.commits.increment(1);
        self.commit_seconds.record(took);
        self.last_commit.set(unix_seconds(SystemTime::now()));
    }

    /// Reports the oldest unhandled record, taken at `now`; `None` if all are handled.
    pub(super) fn waits(&self, oldest: Option<&Record>, now: SystemTime) {
        let since = oldest.map(|oldest| appended_at(oldest).unwrap_or(now));
        self.oldest_waiting.set(since.map_or(0.0, unix_seconds));
        if oldest.is_none() {
            self.records_behind.set(0.0);
        }
    }

    pub(super) fn behind(&self, records: u64) {
        self.records_behind.set(records as f64);
    }

    /// Reports how long the batch's oldest record has been in the log.
    pub(super) fn lag(&self, oldest: &Record) {
        if let Some(appended_at) = appended_at(oldest) {
            let age = SystemTime::now().duration_since(appended_at);
            self.lag_seconds.record(age.unwrap_or_default());
        }
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        self.running.set(0.0);
    }
}

/// Ends a state of waiting.
pub(super) struct Waiting<'a>(&'a Gauge);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(0.0);
    }
}

/// When the record was appended, if the log knows.
fn appended_at(record: &Record) -> Option<SystemTime> {
    Some(record.appended_at).filter(|time| *time > UNIX_EPOCH)
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_agree_with_their_nouns() {
        let mut report = Report {
            commits: 1,
            restarts: 1,
            failed_tries: 1,
            ..Report::default()
        };
        let text = "0 handled, 0 duplicates, 0 failed, 1 commit, 0 fenced, 1 restart, 1 failed try";
        assert_eq!(report.to_string(), text);
        (report.commits, report.failed_tries) = (2, 2);
        assert!(report.to_string().contains("2 commits"), "{report}");
        assert!(report.to_string().ends_with("2 failed tries"), "{report}");
    }
}
