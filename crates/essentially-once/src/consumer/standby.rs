use std::{
    future::pending,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{failure::Failure, session::Session, settings::Settings};
use crate::{
    Error, Log, LogReader, Offset, OffsetStore, Position, Revision,
    rt::{self, Instant},
};

/// How many times a standby checks within the silence that makes it take over.
const LOOKS: u32 = 10;

/// Why a standby stopped watching.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Watched {
    /// The position has reached the end of this run.
    CaughtUp,
    /// The position must be loaded again: its owner released it, or it vanished or went back.
    Changed,
    /// Records or dead letters wait, and the owner has shown no sign of life since this revision.
    Silent(Revision),
}

impl<S: OffsetStore> Session<'_, S> {
    /// Watches the owner of `position` until this instance has a reason to continue on its own.
    ///
    /// Silence counts only while records wait or a dead letter is due, and only from one check to
    /// the next: an instance that was suspended has not observed the time of its suspension.
    pub(super) async fn stand_by(
        &mut self,
        position: &Position,
        mut until: Option<Offset>,
    ) -> Result<Watched, Failure> {
        tracing::info!(revision = %position.revision, "another instance is active; standing by");
        self.heart.rest();
        let _standby = self.telemetry.stand_by();
        // Only the active instance reports them.
        self.telemetry.dead_letters.set(0.0);
        let (store, id, standby_after) = (self.store, self.id, self.settings.standby_after);
        let step = (standby_after / LOOKS).max(Duration::from_millis(1));
        let mut pulse = self.or_stop(store.pulse(id)).await?;
        let mut records = Waiting::new(pulse.next);
        let mut letters = Letters::default();
        let mut silence = Duration::ZERO;
        let mut last_look = Instant::now();
        loop {
            if pulse.owner.is_none_or(|owner| owner == self.owner) || !self.run.note(&pulse) {
                return Ok(Watched::Changed);
            }
            let seen = pulse;
            let mut watching = store.watch(id, &seen, step);
            pulse = loop {
                let has_caught_up = until.is_some_and(|until| seen.next >= until);
                if letters.must_look(self.settings, has_caught_up) {
                    // A watch that is not polled may hold up other calls.
                    drop(watching);
                    letters.first_due = Some(self.first_due().await?);
                    watching = store.watch(id, &seen, step);
                }
                if has_caught_up && !letters.is_due() {
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
                    letters.quiet = letters.quiet.saturating_add(since_last_look);
                    if !letters.is_due() {
                        continue;
                    }
                }
                silence = silence.saturating_add(since_last_look.min(step.saturating_mul(2)));
                if silence >= self.run.silences.limit(standby_after) {
                    drop(watching);
                    let now = self.or_stop(store.pulse(id)).await?;
                    if now != seen {
                        break now;
                    }
                    tracing::warn!(
                        ?silence,
                        revision = %seen.revision,
                        "records or dead letters wait and the active instance shows no sign of life; taking over"
                    );
                    return Ok(Watched::Silent(seen.revision));
                }
            };
            if !silence.is_zero() {
                self.run.silences.remember(silence, standby_after);
                silence = Duration::ZERO;
            }
            letters = Letters::default();
            if pulse.next != seen.next {
                records = Waiting::new(pulse.next);
            }
        }
    }
}

/// What a standby knows about the dead letters at the position that it sees.
#[derive(Default)]
struct Letters {
    /// How long that position has not moved and no records have waited.
    quiet: Duration,
    /// When the first letter is due; `None` if nobody has looked.
    first_due: Option<Option<SystemTime>>,
}

impl Letters {
    /// Whether to look for letters, which opens a transaction and may wait for the active instance:
    /// when nothing else is left to do, or after a long quiet.
    fn must_look(&self, settings: &Settings, has_caught_up: bool) -> bool {
        let is_quiet = self.quiet >= settings.standby_after.saturating_mul(LOOKS);
        settings.letters.is_some()
            && settings.standby_after != Duration::MAX
            && self.first_due.is_none()
            && (has_caught_up || is_quiet)
    }

    fn is_due(&self) -> bool {
        let due = self.first_due.flatten();
        due.is_some_and(|due| due <= SystemTime::now())
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
