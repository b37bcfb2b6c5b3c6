//! One session: from loading the stored position to the first failure.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio_util::sync::CancellationToken;

use super::{
    Delivery, Report, Settings, StartAt, duplicates::Duplicates, read_ahead::ReadAhead, report::Telemetry,
    resume::resume, seek::resolve,
};
use crate::{
    Advance, Bounds, ConsumerId, Durability, Error, Handler, HandlerError, Log, LogReader, Offset, OffsetStore, Owner,
    Passed, Position, Record, Revision, Transaction, rt,
    window::{Silence, Windows},
};

/// How often a running consumer looks for producers to forget.
const FORGET_EVERY: Duration = Duration::from_secs(60 * 60);

/// Why a session ended early.
#[derive(Debug)]
pub enum Failure {
    Backend(Error),
    Record(FailedRecord),
    /// Some record of a batch, up to that offset; which one is not known.
    Batch(Offset, HandlerError),
}

/// A record that could not be handled.
#[derive(Debug)]
pub struct FailedRecord {
    pub(super) offset: Offset,
    pub(super) error: HandlerError,
    /// Whether everything before it is committed.
    pub(super) is_first: bool,
    /// What to say of it if the error is fatal.
    pub(super) fatal_outcome: &'static str,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Backend(error)
    }
}

/// What a session works with. All that it learns is dropped with it: only the stored position outlives a failure.
pub struct Session<'a, S> {
    pub(super) id: &'a ConsumerId,
    pub(super) log: &'a Arc<dyn Log>,
    pub(super) store: &'a S,
    pub(super) settings: &'a Settings,
    pub(super) stop: &'a CancellationToken,
    pub(super) telemetry: &'a Telemetry,
    pub(super) report: &'a mut Report,
    pub(super) duplicates: &'a mut Duplicates,
    /// The newest position that this run has seen; it outlives the session, so that a loss is noticed.
    pub(super) seen: &'a mut Option<Seen>,
    pub(super) owner: Owner,
    /// The record that failed last, to be handled in a batch of its own.
    pub(super) alone: Option<Offset>,
    /// Records up to this one are handled one by one: one of them made its batch fail.
    pub(super) apart_until: Option<Offset>,
    pub(super) place: Place,
    pub(super) windows: Windows,
    /// When the batch in hand was taken.
    pub(super) now: SystemTime,
    pub(super) silent: LookForSilent,
}

/// Where the session stands.
#[derive(Default)]
pub(super) struct Place {
    pub(super) next: Offset,
    revision: Revision,
    /// Whether this session has committed, and thereby opened an epoch.
    is_epoch_open: bool,
}

/// A position as a run has seen it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    revision: Revision,
    passed: Option<Passed>,
}

/// When to look for silent producers.
#[derive(Default)]
pub(super) struct LookForSilent {
    last: Option<Instant>,
    /// What the log held then, and when by this process's clock: what was in the log is to be read first.
    pending: Option<(Bounds, SystemTime)>,
}

impl<S: OffsetStore> Session<'_, S> {
    /// Runs until `stop`, or until the position reaches `until`, which is set to the log's end if it is still `None`.
    pub(super) async fn run<H: Handler<D::Tx>, D: Delivery<S>>(
        mut self,
        handler: &mut H,
        until: Option<&mut Option<Offset>>,
    ) -> Result<(), Failure> {
        if D::NEEDS_DURABILITY && !self.settings.accept_volatile {
            self.check_durability().await?;
        }
        let until = match until {
            Some(Some(until)) => Some(*until),
            Some(unset) => Some(*unset.insert(self.log.bounds().await?.end)),
            None => None,
        };
        let mut ahead = ReadAhead::spawn(
            self.load().await?,
            self.settings
                .read_ahead_records
                .unwrap_or_else(|| self.settings.max_batch.saturating_mul(16).max(8_192)),
            self.settings.read_ahead_bytes,
        );
        let yields = rt::has_one_thread();
        while until.is_none_or(|until| self.place.next < until) {
            let is_apart = self.apart_until.is_some_and(|until| self.place.next <= until);
            let max = if is_apart { 1 } else { self.settings.max_batch };
            let batch = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                batch = ahead.take(max, self.alone) => batch?,
            };
            self.now = SystemTime::now();
            self.look_for_silent().await?;
            D::deliver(&mut self, handler, &batch).await?;
            // A backend may never make the loop wait, and on a runtime of one thread other tasks want their turn.
            if yields {
                rt::yield_now().await;
            }
        }
        Ok(())
    }

    async fn check_durability(&self) -> Result<(), Error> {
        let parts = [
            (format!("log {}", self.log.id()), self.log.durability().await?),
            (
                format!("the store of consumer {}", self.id),
                self.store.durability().await?,
            ),
        ];
        for (what, durability) in parts {
            match durability {
                Durability::Durable => {}
                Durability::Volatile(why) => return Err(Error::Volatile { what, why }),
                Durability::Unknown(why) => tracing::warn!(%what, %why, "durability is unknown"),
            }
        }
        Ok(())
    }

    /// Loads the stored position and opens a reader there.
    async fn load(&mut self) -> Result<Box<dyn LogReader>, Error> {
        let stored = self.store.position(self.id).await?;
        self.check_not_lost(stored.as_ref()).await?;
        let Some(position) = stored else {
            return self.load_first().await;
        };
        if !position.log.is_same_log(self.log.id()) {
            return Err(Error::WrongLog {
                consumer: self.id.clone(),
                stored: position.log,
                given: self.log.id().clone(),
            });
        }
        let Position {
            next,
            revision,
            passed,
            windows,
            ..
        } = position;
        tracing::debug!(%next, %revision, "loaded the position");
        self.place = Place {
            next,
            revision,
            is_epoch_open: false,
        };
        *self.seen = Some(Seen { revision, passed });
        self.windows = Windows::new(windows);
        self.report.next = Some(next);
        resume(self.log, self.id, passed, next).await
    }

    /// Fails if the store lost commits that this run has seen, unless the log lost what they were made of, too.
    async fn check_not_lost(&mut self, stored: Option<&Position>) -> Result<(), Error> {
        let Some(seen) = *self.seen else {
            return Ok(());
        };
        let found = stored.map(|position| position.revision);
        if found.is_some_and(|found| found >= seen.revision) {
            return Ok(());
        }
        // Without a position, any other start would pass over records whose effects the store has lost.
        let can_go_on = found.is_some() || self.settings.start_at == StartAt::Earliest;
        let went_back_together = match seen.passed {
            Some(passed) if can_go_on => self.has_lost(passed).await?,
            _ => false,
        };
        if !went_back_together {
            return Err(Error::PositionLost {
                consumer: self.id.clone(),
                seen: seen.revision,
                found,
            });
        }
        tracing::warn!(
            seen = %seen.revision,
            found = ?found,
            "position and log went back together, as in a fail-over; going on from the stored position"
        );
        self.report.rewound += 1;
        self.telemetry.rewound.increment(1);
        Ok(())
    }

    /// Whether the log ends before a record that this run has read. Once it has grown past that place, a missing record may
    /// as well have been deleted, which says nothing about what was lost.
    async fn has_lost(&self, passed: Passed) -> Result<bool, Error> {
        Ok(self.log.bounds().await?.end <= passed.offset())
    }

    /// Opens a reader where the settings say, and then commits that place as the first position.
    async fn load_first(&mut self) -> Result<Box<dyn LogReader>, Error> {
        let next = resolve(self.log, self.settings.start_at).await?;
        let reader = self.log.read(next).await?;
        let tx = self.begin().await?;
        self.commit_at(tx, next, None).await?;
        Ok(reader)
    }

    /// Begins to look for silent producers now and then.
    async fn look_for_silent(&mut self) -> Result<(), Error> {
        if self.silent.last.is_none_or(|last| last.elapsed() > FORGET_EVERY) && !self.windows.is_empty() {
            self.silent.last = Some(Instant::now());
            self.silent.pending = Some((self.log.bounds().await?, self.now));
        }
        Ok(())
    }

    /// Forgets silent producers, if with `last` everything is read that the log held when this began to look.
    fn forget_silent(&mut self, last: &Record) {
        let Some((bounds, now)) = self
            .silent
            .pending
            .take_if(|(bounds, _)| last.offset.successor() >= bounds.end)
        else {
            return;
        };
        let limit = self.settings.forget_producers_after;
        let silence = Silence::new(limit, now, last.appended_at, bounds.earliest);
        self.windows.forget_silent(&silence);
    }

    pub(super) async fn begin(&self) -> Result<S::Tx, Error> {
        self.store.begin(self.id).await
    }

    /// Begins a transaction, unless the consumer is stopped while it waits for one.
    pub(super) async fn begin_unless_stopped(&self) -> Result<Option<S::Tx>, Error> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Ok(None),
            tx = self.begin() => tx.map(Some),
        }
    }

    /// Fails if another instance committed since the position was loaded. What a handler said of a record then counts for
    /// nothing: it may have judged by the other's effects.
    pub(super) async fn check_current(&self) -> Result<(), Error> {
        let stored = self.store.position(self.id).await?;
        match stored.map_or(Revision::NONE, |position| position.revision) {
            revision if revision == self.place.revision => Ok(()),
            _ => Err(Error::Fenced {
                consumer: self.id.clone(),
                expected: self.place.revision,
            }),
        }
    }

    /// Drops a record that was seen before, with a warning now and then.
    pub(super) fn drop_duplicate(&mut self, record: &Record) {
        if let Some(origin) = &record.origin {
            tracing::debug!(offset = %record.offset, %origin, "dropped a duplicate");
            self.duplicates.note(origin, self.windows.is_below(origin));
        }
        self.windows.mark(record, self.now);
    }

    /// Commits the transaction with the position behind that record.
    pub(super) async fn commit(&mut self, tx: S::Tx, last: &Record) -> Result<(), Error> {
        self.forget_silent(last);
        self.commit_at(tx, last.offset.successor(), Some(Passed::new(last)))
            .await
    }

    async fn commit_at(&mut self, tx: S::Tx, next: Offset, passed: Option<Passed>) -> Result<(), Error> {
        let expected = self.place.revision;
        let revision = match self.place.is_epoch_open {
            true => expected.next_count(),
            false => expected.next_epoch(),
        };
        let mut advance = Advance::new(self.log.id().clone(), next, expected, revision);
        advance.owner = Some(self.owner);
        advance.passed = passed;
        (advance.windows, advance.forgotten) = self.windows.take_changes();
        let started = Instant::now();
        tx.commit(advance).await?;
        self.place = Place {
            next,
            revision,
            is_epoch_open: true,
        };
        *self.seen = Some(Seen { revision, passed });
        self.report.next = Some(next);
        self.report.commits += 1;
        self.telemetry.committed(started.elapsed());
        tracing::trace!(%next, %revision, "committed");
        Ok(())
    }

    /// Counts what a batch came to.
    pub(super) fn count(&mut self, done: Done, batch: &[Record]) {
        self.report.handled += done.handled;
        self.report.duplicates += done.duplicates;
        self.report.failed += done.failed;
        self.telemetry.handled.increment(done.handled);
        self.telemetry.duplicates.increment(done.duplicates);
        self.telemetry.failed.increment(done.failed);
        if let Some(oldest) = batch.first() {
            self.telemetry.lag(oldest);
        }
    }
}

/// What a batch came to.
#[derive(Default)]
pub(super) struct Done {
    pub(super) handled: u64,
    pub(super) duplicates: u64,
    pub(super) failed: u64,
}
