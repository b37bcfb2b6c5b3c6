//! One session: from loading the stored position to the first failure.

use std::{
    future::{Future, ready},
    mem,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;

use super::{
    Delivery, Report, Settings, StartAt,
    duplicates::Duplicates,
    heart::Heart,
    read_ahead::ReadAhead,
    report::Telemetry,
    resume::{compare, resume},
    seek::resolve,
    standby::{Silences, Watched},
};
use crate::{
    Advance, Bounds, ConsumerId, Durability, Error, Handler, HandlerError, Log, LogReader, Offset, OffsetStore, Owner,
    Passed, Position, Pulse, Record, Revision, Transaction,
    rt::{self, Instant},
    window::{Silence, Windows},
};

/// How often a running consumer checks for producers to forget.
const FORGET_EVERY: Duration = Duration::from_secs(60 * 60);

/// How often a consumer that waits for records checks whether its position was moved by hand.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// How often a consumer that waits for the last records of its run checks whether they still exist.
const LOOK_FOR_END_EVERY: Duration = Duration::from_millis(100);

/// How often the records behind the position are counted.
const COUNT_EVERY: Duration = Duration::from_secs(10);

/// How many times a new consumer tries to begin at the earliest record before it gives up the race
/// with retention.
const MAX_STARTS: usize = 10;

/// Why a session ended early.
#[derive(Debug)]
pub enum Failure {
    /// The run was stopped.
    Stopped,
    Backend(Error),
    Record(FailedRecord),
    /// Some record of a batch failed, up to and including this offset. Which one is not known.
    Batch(Offset, HandlerError),
}

/// A record that could not be handled.
#[derive(Debug)]
pub struct FailedRecord {
    pub(super) offset: Offset,
    pub(super) error: HandlerError,
    /// Whether it was the first of its batch, so that no record before it can have contributed to
    /// the failure.
    pub(super) is_first: bool,
    /// Whether the position points to it.
    pub(super) is_next: bool,
    /// The outcome to report if the error is fatal.
    pub(super) fatal_outcome: &'static str,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Backend(error)
    }
}

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
    /// The record that failed last, to be handled in a batch of its own.
    pub(super) alone: Option<Offset>,
    /// Records up to this one are handled individually, because one of them made its batch fail.
    pub(super) apart_until: Option<Offset>,
    pub(super) place: Place,
    pub(super) windows: Windows,
    /// When the current batch was taken.
    pub(super) now: SystemTime,
    pub(super) silent: LookForSilent,
    pub(super) counted: Option<Instant>,
}

/// The state of a run that outlives its sessions. It never decides which records are handled. Only
/// the stored position does.
#[derive(Default)]
pub(super) struct Run {
    pub(super) report: Report,
    pub(super) duplicates: Duplicates,
    pub(super) silences: Silences,
    /// The newest position that this run has seen, to detect a loss.
    seen: Option<Seen>,
    /// Commits whose replies were lost, all based on the same revision. At most one of them
    /// applies.
    unanswered: Vec<Unanswered>,
    /// The first position of a new consumer, until it receives a record.
    started_at: Option<(Revision, Offset)>,
    /// Whether retention has overtaken that position.
    is_overtaken: bool,
    /// When this instance last committed, or began to work on a batch.
    last_sign: Option<Instant>,
    /// Whether the stored position belongs to this run, as far as the run knows.
    is_owner: bool,
}

impl Run {
    /// The offset of the newest position that this run has seen.
    pub(super) fn next(&self) -> Option<Offset> {
        self.seen.map(|seen| seen.next)
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

    pub(super) fn is_owner(&self) -> bool {
        self.is_owner
    }
}

/// The session's current position.
#[derive(Default)]
pub(super) struct Place {
    pub(super) next: Offset,
    passed: Option<Passed>,
    revision: Revision,
    /// Whether this session has committed, which opens an epoch.
    is_epoch_open: bool,
}

/// A position that a run has seen.
#[derive(Clone, Copy, Debug)]
struct Seen {
    revision: Revision,
    next: Offset,
}

/// A commit that may have been applied, and the counts to add if it was.
struct Unanswered {
    expected: Revision,
    revision: Revision,
    done: Done,
}

/// When to check for silent producers.
#[derive(Default)]
pub(super) struct LookForSilent {
    last: Option<Instant>,
    /// The log's bounds at the last check, and its time by this process's clock. The consumer first
    /// reads everything that the log held then.
    pending: Option<(Bounds, SystemTime)>,
}

impl<S: OffsetStore> Session<'_, S> {
    /// Runs until `stop`, or until the position reaches `until`. An `until` that is still `None` is
    /// set to the log's end.
    pub(super) async fn run<H: Handler<D::Tx>, D: Delivery<S>>(
        mut self,
        handler: &mut H,
        until: Option<&mut Option<Offset>>,
    ) -> Result<(), Failure> {
        self.heart.work();
        if D::NEEDS_DURABILITY && !self.settings.accept_volatile {
            self.check_durability().await?;
        }
        let mut until = match until {
            Some(Some(until)) => Some(*until),
            Some(unset) => Some(*unset.insert(self.or_stop(self.log.readable_end()).await?)),
            None => None,
        };
        let Some(reader) = self.load(until).await? else {
            return Ok(());
        };
        if until.is_some_and(|until| self.place.next >= until) {
            // Without a read, nothing else would detect a replaced log.
            return self.or_stop(compare(self.log, self.id, self.place.passed)).await;
        }
        let mut ahead = ReadAhead::spawn(
            reader,
            self.settings
                .read_ahead_records
                .unwrap_or_else(|| self.settings.max_batch.saturating_mul(16).max(8_192)),
            self.settings.read_ahead_bytes,
        );
        let result = self.consume::<H, D>(handler, &mut ahead, &mut until).await;
        ahead.end().await;
        result
    }

    async fn consume<H: Handler<D::Tx>, D: Delivery<S>>(
        &mut self,
        handler: &mut H,
        ahead: &mut ReadAhead,
        until: &mut Option<Offset>,
    ) -> Result<(), Failure> {
        let yields = rt::has_one_thread();
        // Records taken but not handled within the time limit of the previous batch.
        let mut left = Vec::new();
        while until.is_none_or(|until| self.place.next < until) {
            let mut batch = match left.is_empty() {
                true => match self.next_batch(ahead, until).await {
                    Ok(Some(batch)) => batch,
                    Ok(None) => break,
                    Err(failure) => return Err(self.explain_start(failure)),
                },
                false => mem::take(&mut left),
            };
            if self.stop.is_cancelled() {
                return Err(Failure::Stopped);
            }
            self.now = SystemTime::now();
            self.look_for_silent().await?;
            self.count_behind().await?;
            self.telemetry.waits(batch.first(), self.now);
            // From here on, retention may remove a record that was already tried, which must be
            // reported.
            self.run.started_at = None;
            self.split_off_unpassable(&mut batch, &mut left)?;
            let passed = D::deliver(self, handler, &batch).await?;
            if passed < batch.len() {
                left.splice(..0, batch.drain(passed..));
            }
            // A backend may never make the loop wait, and would then starve the other tasks of a
            // runtime with one thread.
            if yields {
                rt::yield_now().await;
            }
        }
        self.telemetry.waits(None, self.now);
        Ok(())
    }

    /// The greatest offset has no successor, so no position can come after a record there. The
    /// records before it are handled first.
    fn split_off_unpassable(&self, batch: &mut Vec<Record>, left: &mut Vec<Record>) -> Result<(), Failure> {
        match batch.len() {
            0 => {}
            _ if batch.last().is_none_or(|last| last.offset < Offset::MAX) => {}
            1 => {
                return Err(Failure::Backend(Error::failed(
                    format!("pass the record at {} of log {}", Offset::MAX, self.log.id()),
                    "this is the greatest offset, so no position can come after it; remove the record and append it to \
                     another log",
                )));
            }
            len => left.extend(batch.drain(len - 1..)),
        }
        Ok(())
    }

    /// Waits for records. Returns `None` if none is left before `until`.
    async fn next_batch(
        &mut self,
        ahead: &mut ReadAhead,
        until: &mut Option<Offset>,
    ) -> Result<Option<Vec<Record>>, Failure> {
        let is_apart = self.apart_until.is_some_and(|until| self.place.next <= until);
        let max = if is_apart { 1 } else { self.settings.max_batch };
        let mut taking = pin!(ahead.take(max, self.alone));
        // Records that have already arrived need neither a timer nor a look at the position.
        tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(Failure::Stopped),
            batch = &mut taking => return Ok(Some(batch?)),
            () = ready(()) => {}
        }
        self.heart.rest();
        // Silence means nothing while the consumer waits for records.
        self.run.last_sign = None;
        self.telemetry.waits(None, self.now);
        let mut pulse = Pulse {
            next: self.place.next,
            revision: self.place.revision,
            owner: Some(self.owner),
            beats: 0,
        };
        let batch = loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(Failure::Stopped),
                batch = &mut taking => break batch?,
                seen = watch(self.store, self.id, &pulse), if until.is_none() => {
                    pulse = seen;
                    // The pulse may only be late, so the position itself decides.
                    if pulse.revision != self.place.revision {
                        self.check_current().await?;
                    }
                }
                () = rt::sleep(LOOK_FOR_END_EVERY), if until.is_some() => {
                    let end = self.or_stop(self.log.readable_end()).await?;
                    if self.place.next >= *until.insert(until.map_or(end, |until| until.min(end))) {
                        return Ok(None);
                    }
                }
            }
        };
        self.heart.work();
        self.run.last_sign = Some(Instant::now());
        Ok(Some(batch))
    }

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

    async fn check_durability(&self) -> Result<(), Failure> {
        let parts = [
            (
                format!("log {}", self.log.id()),
                self.or_stop(self.log.durability()).await?,
            ),
            (
                format!("store of consumer {}", self.id),
                self.or_stop(self.store.durability()).await?,
            ),
        ];
        for (what, durability) in parts {
            match durability {
                Durability::Durable => {}
                Durability::Volatile(why) => return Err(Error::Volatile { what, why }.into()),
                Durability::Unknown(why) => tracing::warn!(%what, %why, "cannot find out whether this is durable"),
            }
        }
        Ok(())
    }

    /// Loads the stored position and opens a reader there. Returns `None` if another instance has
    /// brought the position to `until`.
    async fn load(&mut self, until: Option<Offset>) -> Result<Option<Box<dyn LogReader>>, Failure> {
        let mut has_stood_by = false;
        let mut silent_since = None;
        loop {
            let stored = self.or_stop(self.store.position(self.id)).await?;
            self.check_not_lost(stored.as_ref()).await?;
            let Some(position) = stored else {
                (self.run.started_at, self.run.is_overtaken) = (None, false);
                return Ok(Some(self.start().await?));
            };
            if !position.log.is_same_log(self.log.id()) {
                return Err(Failure::Backend(Error::WrongLog {
                    consumer: self.id.clone(),
                    stored: position.log,
                    given: self.log.id().clone(),
                }));
            }
            self.run.seen = Some(Seen {
                revision: position.revision,
                next: position.next,
            });
            self.count_unanswered(&position);
            self.run.is_owner = position.owner == Some(self.owner);
            let has_other_owner = position.owner.is_some_and(|owner| owner != self.owner);
            if has_other_owner
                && !self.settings.standby_after.is_zero()
                && silent_since.take() != Some(position.revision)
            {
                if let Some(last_sign) = self.run.last_sign.take() {
                    // This instance was displaced although it was alive: it was silent for longer
                    // than a standby tolerates.
                    let silence = last_sign.elapsed();
                    self.run.silences.remember(silence, self.settings.standby_after);
                }
                has_stood_by = true;
                match self.stand_by(&position, until).await? {
                    Watched::CaughtUp => return Ok(None),
                    Watched::Silent(revision) => silent_since = Some(revision),
                    Watched::Changed => {}
                }
                self.heart.work();
                continue;
            }
            return self.go_on(position, has_stood_by).await.map(Some);
        }
    }

    /// Opens a reader at the position. An instance that stood by first takes ownership of the
    /// position, so that neither the former owner nor another standby handles the same records in
    /// vain.
    async fn go_on(&mut self, position: Position, has_stood_by: bool) -> Result<Box<dyn LogReader>, Failure> {
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
            passed,
            revision,
            is_epoch_open: false,
        };
        self.run.report.next = Some(next);
        self.windows = Windows::new(windows);
        if mem::take(&mut self.run.is_overtaken) && self.is_at_start() {
            return self.start().await;
        }
        let reader = match self.or_stop(resume(self.log, self.id, passed, next)).await {
            Err(Failure::Backend(Error::Truncated { .. })) if self.is_at_start() => return self.start().await,
            reader => reader?,
        };
        if has_stood_by {
            let tx = self.begin().await?;
            self.commit_at(tx, next, passed, Done::default()).await?;
        }
        Ok(reader)
    }

    /// Fails if the store lost commits that this run has seen, unless the log lost their records
    /// too.
    async fn check_not_lost(&mut self, stored: Option<&Position>) -> Result<(), Failure> {
        let Some(seen) = self.run.seen else {
            return Ok(());
        };
        let found = stored.map(|position| position.revision);
        if found.is_some_and(|found| !found.is_lost_since(seen.revision)) {
            return Ok(());
        }
        // Without a position, any other start would pass over records whose effects the store has
        // lost. Once the log has grown past the newest position that this run has seen, missing
        // records may also have been deleted.
        let can_go_on = found.is_some() || self.settings.start_at == StartAt::Earliest;
        let went_back_together = can_go_on && self.or_stop(self.log.bounds()).await?.end < seen.next;
        if !went_back_together {
            return Err(Failure::Backend(Error::PositionLost {
                consumer: self.id.clone(),
                seen: seen.revision,
                found,
            }));
        }
        tracing::warn!(
            seen = %seen.revision,
            found = ?found,
            "position and log went back together, as in a failover; continuing from the stored position"
        );
        self.run.report.rewound += 1;
        self.telemetry.rewound.increment(1);
        Ok(())
    }

    /// Whether this is the first position of a new consumer that has not received a record yet.
    fn is_at_start(&self) -> bool {
        self.run.started_at == Some((self.place.revision, self.place.next))
    }

    /// Opens a reader at the configured start, and then commits that place as the first position.
    /// It begins again if retention overtakes the place meanwhile, or has overtaken the first
    /// position of a consumer that has not received a record yet.
    async fn start(&mut self) -> Result<Box<dyn LogReader>, Failure> {
        let mut starts = 1;
        let (next, reader) = loop {
            let next = self.or_stop(resolve(self.log, self.settings.start_at)).await?;
            match self.or_stop(self.log.read(next)).await {
                Err(Failure::Backend(error @ Error::Truncated { .. }))
                    if self.settings.start_at == StartAt::Earliest =>
                {
                    if starts == MAX_STARTS {
                        return Err(Failure::Backend(Error::unavailable(
                            "begin at the earliest record",
                            error,
                        )));
                    }
                    starts += 1;
                }
                reader => break (next, reader?),
            }
        };
        if let Some((_, overtaken)) = self.run.started_at {
            if next <= overtaken {
                return Err(Failure::Backend(Error::unavailable(
                    format!("begin at the earliest record of log {}", self.log.id()),
                    format!("the log reports {next} as its earliest offset and as removed"),
                )));
            }
            tracing::warn!(%overtaken, %next, "retention overtook this new consumer before its first record; starting over");
        }
        let tx = self.begin().await?;
        self.commit_at(tx, next, None, Done::default()).await?;
        if self.settings.start_at == StartAt::Earliest {
            self.run.started_at = Some((self.place.revision, next));
        }
        Ok(reader)
    }

    /// A new consumer that retention overtakes before its first record starts over, because it
    /// asked for the earliest one.
    fn explain_start(&mut self, failure: Failure) -> Failure {
        match failure {
            Failure::Backend(error @ Error::Truncated { .. }) if self.is_at_start() => {
                self.run.is_overtaken = true;
                Failure::Backend(Error::unavailable("begin at the earliest record", error))
            }
            failure => failure,
        }
    }

    /// Counts the commit whose reply was lost, if it made the stored position. If the position is
    /// still the one before that commit, the commit may yet arrive.
    fn count_unanswered(&mut self, position: &Position) {
        let unanswered = mem::take(&mut self.run.unanswered);
        for commit in unanswered {
            if commit.expected == position.revision {
                self.run.unanswered.push(commit);
            } else if (commit.revision, Some(self.owner)) == (position.revision, position.owner) {
                let Unanswered { revision, done, .. } = commit;
                tracing::debug!(%revision, "a commit whose reply was lost was applied");
                if done.failed > 0 {
                    let unhandled = done.failed;
                    tracing::warn!(
                        unhandled,
                        "passing over records: their offset is committed, and they were not handled"
                    );
                }
                self.run.report.commits += 1;
                self.telemetry.commits.increment(1);
                self.count(done, &[]);
            }
        }
    }

    /// Starts a check for silent producers now and then.
    async fn look_for_silent(&mut self) -> Result<(), Failure> {
        if self.silent.last.is_none_or(|last| last.elapsed() > FORGET_EVERY) && !self.windows.is_empty() {
            self.silent.last = Some(Instant::now());
            self.silent.pending = Some((self.or_stop(self.log.bounds()).await?, self.now));
        }
        Ok(())
    }

    /// Counts the records behind the position now and then, if the log can.
    async fn count_behind(&mut self) -> Result<(), Failure> {
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
        let Place { next, passed, .. } = self.place;
        Ok(self.commit_at(tx, next, passed, Done::default()).await?)
    }

    /// Drops a record that was seen before, and logs a warning now and then.
    pub(super) fn drop_duplicate(&mut self, record: &Record) {
        if let Some(origin) = &record.origin {
            tracing::debug!(offset = %record.offset, %origin, "dropped a duplicate");
            self.run.duplicates.note(origin, self.windows.is_below(origin));
        }
        self.windows.mark(record, self.now);
    }

    /// Commits the transaction with the position after `last`. If the reply is lost, `done` is
    /// counted once the position shows that the commit was applied.
    pub(super) async fn commit(&mut self, tx: S::Tx, last: &Record, done: Done) -> Result<(), Error> {
        self.forget_silent(last);
        // A later version may decode a malformed record, and its digest then differs.
        let passed = last.malformed.is_none().then(|| Passed::new(last));
        self.commit_at(tx, last.offset.successor(), passed, done).await
    }

    async fn commit_at(&mut self, tx: S::Tx, next: Offset, passed: Option<Passed>, done: Done) -> Result<(), Error> {
        let expected = self.place.revision;
        let revision = match self.place.is_epoch_open {
            true => expected.next_count(),
            false => expected.fresh_epoch(),
        };
        let mut advance = Advance::new(self.log.id().clone(), next, expected, revision);
        advance.owner = Some(self.owner);
        advance.passed = passed;
        (advance.windows, advance.forgotten) = self.windows.take_changes();
        let started = Instant::now();
        if let Err(error) = tx.commit(advance).await {
            if matches!(error, Error::Indeterminate { .. }) {
                self.run.unanswered.push(Unanswered {
                    expected,
                    revision,
                    done,
                });
            }
            return Err(error);
        }
        let now = Instant::now();
        self.place = Place {
            next,
            passed,
            revision,
            is_epoch_open: true,
        };
        self.run.seen = Some(Seen { revision, next });
        self.run.unanswered.clear();
        self.run.is_owner = true;
        self.run.last_sign = Some(now);
        self.run.report.next = Some(next);
        self.run.report.commits += 1;
        self.heart.committed();
        self.telemetry.committed(now - started);
        tracing::trace!(%next, %revision, "committed");
        Ok(())
    }

    /// Adds a batch to the counts.
    pub(super) fn count(&mut self, done: Done, batch: &[Record]) {
        let report = &mut self.run.report;
        report.handled += done.handled;
        report.duplicates += done.duplicates;
        report.failed += done.failed;
        self.telemetry.handled.increment(done.handled);
        self.telemetry.duplicates.increment(done.duplicates);
        self.telemetry.failed.increment(done.failed);
        if let Some(oldest) = batch.first() {
            self.telemetry.lag(oldest);
        }
    }

    /// Counts a failed try.
    pub(super) fn count_failed_try(&mut self) {
        self.run.report.failed_tries += 1;
        self.telemetry.failed_tries.increment(1);
    }
}

/// Waits for a change of the position. A consumer that only waits ignores errors of the store.
async fn watch<S: OffsetStore>(store: &S, id: &ConsumerId, seen: &Pulse) -> Pulse {
    match store.watch(id, seen, WATCH_EVERY).await {
        Ok(pulse) => pulse,
        Err(error) => {
            tracing::debug!(%error, "could not watch the position");
            rt::sleep(WATCH_EVERY).await;
            *seen
        }
    }
}

/// The counts of a batch.
#[derive(Clone, Copy, Default)]
pub(super) struct Done {
    pub(super) handled: u64,
    pub(super) duplicates: u64,
    pub(super) failed: u64,
}
