//! Watches the active instance, and takes over when it shows no sign of life.

use std::{collections::VecDeque, future::pending, sync::Arc, time::Duration};

use super::session::{Failure, Session};
use crate::{
    Error, Log, LogReader, Offset, OffsetStore, Position, Revision,
    rt::{self, Instant},
};

/// How many times a standby checks within the silence that makes it take over.
const LOOKS: u32 = 10;

/// By which factor the next silence must exceed the longest recent silence of a live owner.
const MARGIN: u32 = 3;

/// How many silences are remembered.
const REMEMBERED: usize = 16;

/// The longest silence to remember, as a multiple of `standby_after`.
const LONGEST: u32 = 60;

/// Why a standby stopped watching.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Watched {
    /// The position has reached the end of this run.
    CaughtUp,
    /// The position must be loaded again: its owner released it, or it vanished or went back.
    Changed,
    /// Records wait, and the owner has shown no sign of life since this revision.
    Silent(Revision),
}

/// How long the owners of a position were silent while they were alive. It belongs to a run, and
/// outlives its sessions.
#[derive(Debug, Default)]
pub(super) struct Silences {
    recent: VecDeque<Duration>,
}

impl Silences {
    /// Remembers how long a live owner was silent. Caps outliers, such as the time of a suspension.
    pub(super) fn remember(&mut self, silence: Duration, standby_after: Duration) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent
            .push_back(silence.min(standby_after.saturating_mul(LONGEST)));
    }

    /// How long an owner must be silent to count as dead.
    pub(super) fn limit(&self, standby_after: Duration) -> Duration {
        let longest = self.recent.iter().max().copied().unwrap_or_default();
        standby_after.max(longest.saturating_mul(MARGIN))
    }
}

impl<S: OffsetStore> Session<'_, S> {
    /// Watches the owner of `position` until this instance has a reason to continue on its own.
    ///
    /// Silence counts only while records wait, and only from one check to the next: an instance
    /// that was suspended has not observed the time of its suspension.
    pub(super) async fn stand_by(
        &mut self,
        position: &Position,
        mut until: Option<Offset>,
    ) -> Result<Watched, Failure> {
        tracing::info!(revision = %position.revision, "another instance is active; standing by");
        self.heart.rest();
        let _standby = self.telemetry.stand_by();
        let (store, id, standby_after) = (self.store, self.id, self.settings.standby_after);
        let step = (standby_after / LOOKS).max(Duration::from_millis(1));
        let mut pulse = self.or_stop(store.pulse(id)).await?;
        let mut records = Waiting::new(pulse.next);
        let mut silence = Duration::ZERO;
        let mut last_look = Instant::now();
        loop {
            if pulse.owner.is_none_or(|owner| owner == self.owner) || !self.run.note(&pulse) {
                return Ok(Watched::Changed);
            }
            let seen = pulse;
            let mut watching = store.watch(id, &seen, step);
            pulse = loop {
                if until.is_some_and(|until| seen.next >= until) {
                    return Ok(Watched::CaughtUp);
                }
                tokio::select! {
                    biased;
                    () = self.stop.cancelled() => return Err(Failure::Stopped),
                    () = rt::sleep(step.saturating_sub(last_look.elapsed())) => {}
                    changed = &mut watching => match changed? {
                        same if same == seen => {
                            watching = store.watch(id, &seen, step);
                            continue;
                        }
                        changed => break changed,
                    },
                    () = records.arrive() => continue,
                }
                let since_last_look = last_look.elapsed();
                last_look = Instant::now();
                if !records.have_arrived {
                    self.unless_stopped(records.look(self.log)).await?;
                    if let Some(until) = &mut until {
                        *until = self.or_stop(self.log.readable_end()).await?.min(*until);
                    }
                    continue;
                }
                silence = silence.saturating_add(since_last_look.min(step.saturating_mul(2)));
                if silence >= self.run.silences.limit(standby_after) {
                    let now = self.or_stop(store.pulse(id)).await?;
                    if now != seen {
                        break now;
                    }
                    tracing::warn!(
                        ?silence,
                        revision = %seen.revision,
                        "records wait and the active instance shows no sign of life; taking over"
                    );
                    return Ok(Watched::Silent(seen.revision));
                }
            };
            if !silence.is_zero() {
                self.run.silences.remember(silence, standby_after);
                silence = Duration::ZERO;
            }
            if pulse.next != seen.next {
                records = Waiting::new(pulse.next);
            }
        }
    }
}

/// Whether records wait behind a position.
struct Waiting {
    next: Offset,
    reader: Option<Box<dyn LogReader>>,
    have_arrived: bool,
}

impl Waiting {
    fn new(next: Offset) -> Self {
        Self {
            next,
            reader: None,
            have_arrived: false,
        }
    }

    /// Opens a reader, once the position has not moved for a step. A busy owner needs no second
    /// reader.
    async fn look(&mut self, log: &Arc<dyn Log>) {
        if self.reader.is_none() {
            match log.read(self.next).await {
                Ok(reader) => self.reader = Some(reader),
                Err(error) => self.give_up(&error),
            }
        }
    }

    /// Waits until the first record behind the position has arrived. Cancel-safe.
    async fn arrive(&mut self) {
        match &mut self.reader {
            Some(reader) if !self.have_arrived => match reader.next(1).await {
                Ok(_) => {
                    self.have_arrived = true;
                    self.reader = None;
                }
                Err(error) => self.give_up(&error),
            },
            _ => pending().await,
        }
    }

    /// The active instance reports a log that it cannot read. A standby that takes over does the
    /// same.
    fn give_up(&mut self, error: &Error) {
        tracing::debug!(%error, "this standby cannot read the log");
        self.reader = None;
        self.have_arrived = !error.is_transient();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn patience_grows_with_the_silences_of_the_living_and_fades_with_them() {
        let mut silences = Silences::default();
        assert_eq!(silences.limit(SECOND), SECOND);
        silences.remember(5 * SECOND, SECOND);
        assert_eq!(silences.limit(SECOND), 15 * SECOND);
        for _ in 0..REMEMBERED {
            silences.remember(SECOND / 10, SECOND);
        }
        assert_eq!(silences.limit(SECOND), SECOND);
    }

    #[test]
    fn an_hour_of_suspension_does_not_make_a_standby_wait_for_hours() {
        let mut silences = Silences::default();
        silences.remember(3_600 * SECOND, SECOND);
        assert_eq!(silences.limit(SECOND), MARGIN * LONGEST * SECOND);
    }
}
