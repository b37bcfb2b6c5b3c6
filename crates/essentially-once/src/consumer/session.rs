//! A session: what it works with, its commits and its counts.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;

use super::{
    call::grace_is_over,
    failure::Failure,
    heart::Heart,
    letters::Parked,
    report::Telemetry,
    run::{Done, Run, Seen, Unanswered},
    settings::Settings,
};
use crate::{
    Advance, Bounds, ConsumerId, Error, HandlerError, HandlerErrorKind, Log, Note, Numbering, Offset, OffsetStore,
    Owner, Record, Revision, Transaction, Tried, Window,
    letters::DeadLetter,
    rt::Instant,
    window::{Silence, Windows},
};

/// How often a running consumer checks for producers to forget.
const FORGET_EVERY: Duration = Duration::from_secs(60 * 60);

/// How often the records behind the position are counted.
const COUNT_EVERY: Duration = Duration::from_secs(10);

/// What a session works with. Everything that a session learns is dropped with it: only the stored
/// position outlives a failure.
pub struct Session<'a, S> {
    pub(super) id: &'a ConsumerId,
    pub(super) log: &'a Arc<dyn Log>,
    pub(super) store: &'a S,
    pub(super) settings: &'a Settings,
    pub(super) stop: &'a CancellationToken,
    pub(super) telemetry: &'a Telemetry,
    pub(super) heart: &'a Heart,
    pub(super) run: &'a mut Run,
    pub(super) owner: Owner,
    /// The tries of the record that failed last, which is handled in a batch of its own.
    pub(super) tried: Option<Tried>,
    /// Records up to this one are handled individually, because one of them made its batch fail.
    pub(super) apart_until: Option<Offset>,
    pub(super) place: Place,
    pub(super) windows: Windows,
    pub(super) parked: Parked,
    /// The letter to park with the next commit, for a delivery that handles outside of
    /// transactions.
    pub(super) to_park: Option<DeadLetter>,
    /// When the session began.
    pub(super) began: SystemTime,
    /// While a run that has caught up tries its letters: those due up to then.
    pub(super) cut_off: Option<SystemTime>,
    /// When the current batch was taken.
    pub(super) now: SystemTime,
    /// How long the last commit took.
    pub(super) commit_time: Duration,
    pub(super) silent: LookForSilent,
    pub(super) counted: Option<Instant>,
}

/// The session's current position.
#[derive(Default)]
pub(super) struct Place {
    pub(super) next: Offset,
    pub(super) note: Note,
    pub(super) revision: Revision,
    /// Whether this session has committed, which opens an epoch.
    pub(super) is_epoch_open: bool,
}

/// Windows to store, and numberings to forget.
type Marks = (Vec<(Numbering, Window)>, Vec<Numbering>);

/// When to check for silent producers.
#[derive(Default)]
pub(super) struct LookForSilent {
    last: Option<Instant>,
    /// The log's bounds at the last check, and its time by this process's clock. The consumer first
    /// reads everything that the log held then.
    pending: Option<(Bounds, SystemTime)>,
}

impl<S: OffsetStore> Session<'_, S> {
    /// The action's result. If the run is stopped first, the action is dropped.
    pub(super) async fn unless_stopped<T>(&self, action: impl Future<Output = T>) -> Result<T, Failure> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(Failure::Stopped),
            result = action => Ok(result),
        }
    }

    /// The same for an action that may fail.
    pub(super) async fn or_stop<T>(&self, action: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
        Ok(self.unless_stopped(action).await??)
    }

    /// The result of an action in a transaction that a handler has used. If the run is stopped, it
    /// has as long as the handler has.
    pub(super) async fn within_grace<T>(&self, action: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
        tokio::select! {
            biased;
            result = action => Ok(result?),
            () = grace_is_over(self.stop, self.settings.stop_grace) => Err(Failure::Stopped),
        }
    }

    pub(super) async fn begin(&self) -> Result<S::Tx, Failure> {
        self.or_stop(self.store.begin(self.id)).await
    }

    fn fenced(&self) -> Error {
        Error::Fenced {
            consumer: self.id.clone(),
            expected: self.place.revision,
        }
    }

    /// Fails if another instance has committed since the position was loaded. The handler's verdict
    /// on a record then does not count, because it may be based on the other instance's effects.
    pub(super) async fn check_current(&self) -> Result<(), Failure> {
        let stored = self.or_stop(self.store.position(self.id)).await?;
        match stored.map_or(Revision::NONE, |position| position.revision) {
            revision if revision == self.place.revision => Ok(()),
            _ => Err(self.fenced().into()),
        }
    }

    /// Whether a commit that stages nothing and moves nothing is possible. If it fails, the backend
    /// is to blame for the failed commit, and not its records.
    pub(super) async fn can_commit(&mut self) -> Result<(), Failure> {
        let tx = self.begin().await?;
        Ok(self.commit_unmoved(tx, Done::default()).await?)
    }

    /// Decides whether a commit was refused because of its records: a deferred constraint or a
    /// queued statement. The handler caused the error, but only the commit reports it.
    pub(super) async fn blame_for_commit(&mut self, error: Error) -> Result<HandlerError, Failure> {
        self.parked.discard();
        self.check_current().await?;
        self.count_failed_try();
        if matches!(error, Error::Failed { .. })
            && let Err(refusal) = self.can_commit().await
        {
            // No record is to blame for a full disk or a revoked right.
            return Err(match refusal {
                Failure::Backend(Error::Failed { .. }) => Failure::Backend(error),
                refusal => refusal,
            });
        }
        Ok(HandlerError::retry(error))
    }

    /// Commits the transaction with the position after `last`. If the reply is lost, `done` is
    /// counted once the position shows that the commit was applied.
    pub(super) async fn commit(&mut self, tx: S::Tx, last: &Record, done: Done) -> Result<(), Error> {
        self.forget_silent(last);
        let tried = self.tried.clone().filter(|tried| tried.offset() > last.offset);
        let next = last.offset.successor();
        if let Some(verdict) = self.run.verdict.as_ref().filter(|verdict| verdict.offset < next) {
            // Before the commit, whose reply may be lost.
            tracing::warn!(error = %verdict.error, "going past a record");
        }
        let note = Note::after(last).with(tried.clone(), self.in_hand_after_records());
        self.commit_at(tx, next, note, done).await?;
        self.tried = tried;
        Ok(())
    }

    /// Commits the transaction with the position where it is.
    pub(super) async fn commit_unmoved(&mut self, tx: S::Tx, done: Done) -> Result<(), Error> {
        self.commit_at(tx, self.place.next, self.place.note.clone(), done).await
    }

    /// Counts a failed try of a record.
    pub(super) fn tried_again(&mut self, offset: Offset, error: &HandlerError) -> Tried {
        let tried = match self.tried.take() {
            Some(tried) if tried.offset() == offset => tried.again(),
            _ => Tried::new(offset, &error.to_string()),
        };
        self.tried.insert(tried).clone()
    }

    /// Commits that the next record was tried in vain, if it is tried again, so that its tries
    /// survive a restart. To standbys this is a sign of life.
    pub(super) async fn commit_try(&mut self, failed: Failure) -> Result<Failure, Failure> {
        let Failure::Record(mut failed) = failed else {
            return Ok(failed);
        };
        let is_last = failed.error.kind != HandlerErrorKind::Retry || failed.tried.tries() > self.settings.retries;
        if failed.is_next && !is_last {
            let note = self.place.note.with_tried(Some(failed.tried.clone()));
            let tx = self.begin().await?;
            self.commit_at(tx, self.place.next, note, Done::default()).await?;
            failed.revision = self.place.revision;
        }
        Ok(Failure::Record(failed))
    }

    pub(super) async fn commit_at(&mut self, tx: S::Tx, next: Offset, note: Note, done: Done) -> Result<(), Error> {
        let marks = match next == self.place.next {
            // The marks of records that were rolled back must not be stored without them.
            true => Marks::default(),
            false => self.windows.take_changes(),
        };
        self.commit_with(tx, next, note, marks, done).await
    }

    /// Commits the transaction and the marks of origins, with the position where it is.
    pub(super) async fn commit_marks(&mut self, tx: S::Tx, note: Note, done: Done) -> Result<(), Error> {
        let marks = self.windows.take_changes();
        self.commit_with(tx, self.place.next, note, marks, done).await
    }

    async fn commit_with(
        &mut self,
        tx: S::Tx,
        next: Offset,
        note: Note,
        marks: Marks,
        done: Done,
    ) -> Result<(), Error> {
        let expected = self.place.revision;
        let revision = match self.place.is_epoch_open {
            true => expected.next_count(),
            false => expected.fresh_epoch(),
        };
        let mut advance = Advance::new(self.log.id().clone(), next, expected, revision);
        advance.owner = Some(self.owner);
        advance.note = note.clone();
        (advance.windows, advance.forgotten) = marks;
        let started = Instant::now();
        if let Err(error) = tx.commit(advance).await {
            self.parked.discard();
            if matches!(error, Error::Indeterminate { .. }) {
                self.run.unanswered.push(Unanswered {
                    expected,
                    revision,
                    done,
                });
            }
            return Err(error);
        }
        // It only counted at the revision before.
        self.run.verdict = None;
        let now = Instant::now();
        self.place = Place {
            next,
            note,
            revision,
            is_epoch_open: true,
        };
        self.parked.commit(revision);
        if self.run.no_letters_at == Some(expected) {
            self.run.no_letters_at = Some(revision);
        }
        self.run.seen = Some(Seen { revision, next });
        self.run.unanswered.clear();
        self.run.is_owner = true;
        self.run.last_sign = Some(now);
        self.run.report.next = Some(next);
        self.run.report.commits += 1;
        self.heart.committed();
        self.commit_time = now - started;
        self.telemetry.committed(self.commit_time);
        tracing::trace!(%next, %revision, "committed");
        Ok(())
    }

    /// Drops a record that was seen before, and logs a warning now and then.
    pub(super) fn drop_duplicate(&mut self, record: &Record) {
        if let Some(origin) = &record.origin {
            tracing::debug!(offset = %record.offset, %origin, "dropped a duplicate");
            self.run.duplicates.note(origin, self.windows.is_below(origin));
        }
        self.windows.mark(record, self.now);
    }

    /// Adds a batch to the counts.
    pub(super) fn count(&mut self, done: Done, batch: &[Record]) {
        let report = &mut self.run.report;
        report.handled += done.handled;
        report.duplicates += done.duplicates;
        report.failed += done.failed;
        report.parked += done.parked;
        if let Some(jump) = done.jump {
            report.truncated += 1;
            report.skipped_to_earliest = Some(jump);
            self.telemetry.truncated.increment(1);
        }
        self.telemetry.handled.increment(done.handled);
        self.telemetry.duplicates.increment(done.duplicates);
        self.telemetry.failed.increment(done.failed);
        self.telemetry.parked.increment(done.parked);
        self.telemetry.dead_letters.set(self.parked.total() as f64);
        if let Some(oldest) = batch.first() {
            self.telemetry.lag(oldest);
        }
    }

    /// Counts a failed try.
    pub(super) fn count_failed_try(&mut self) {
        self.run.report.failed_tries += 1;
        self.telemetry.failed_tries.increment(1);
    }

    /// Counts the records behind the position now and then, if the log can.
    pub(super) async fn count_behind(&mut self) -> Result<(), Failure> {
        if self.counted.is_none_or(|counted| counted.elapsed() > COUNT_EVERY) {
            self.counted = Some(Instant::now());
            match self.unless_stopped(self.log.count_from(self.place.next)).await? {
                Ok(Some(records)) => self.telemetry.behind(records),
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "could not count the records behind the position"),
            }
        }
        Ok(())
    }

    /// Starts a check for silent producers now and then.
    pub(super) async fn look_for_silent(&mut self) -> Result<(), Failure> {
        if self.silent.last.is_none_or(|last| last.elapsed() > FORGET_EVERY) && !self.windows.is_empty() {
            self.silent.last = Some(Instant::now());
            self.silent.pending = Some((self.or_stop(self.log.bounds()).await?, self.now));
        }
        Ok(())
    }

    /// Forgets silent producers, if the session has read everything that the log held when the
    /// check began. `last` is the last record read.
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
}
