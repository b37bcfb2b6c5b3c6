//! The one consumer loop.

mod delivery;
mod duplicates;
mod read_ahead;
mod report;
mod resume;
mod seek;
mod session;

use std::{
    marker::PhantomData,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use self::{
    delivery::catch_panic,
    duplicates::Duplicates,
    report::Telemetry,
    session::{Failure, LookForSilent, Place, Session},
};
pub use self::{
    delivery::{AtLeastOnce, AtMostOnce, Delivery, EssentiallyOnce},
    report::Report,
    seek::seek,
};
use crate::{
    ConsumerId, Error, Handler, HandlerError, Log, Offset, OffsetStore, Owner, handler::HandlerErrorKind, rt,
    window::Windows,
};

/// Where a consumer without a position begins. Committed before the first record is handled, so that it is decided once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum StartAt {
    /// At the earliest record that the log still holds.
    #[default]
    Earliest,
    /// Behind the last record of now.
    Latest,
    /// At this offset.
    Offset(Offset),
}

/// Reads a log from its stored position and hands each record to a handler: the one loop for every backend and delivery.
///
/// The delivery is chosen by the constructor, and decides what the handler gets to write in:
///
/// | constructor | per batch | after a crash | the handler's `Tx` |
/// |---|---|---|---|
/// | [`essentially_once`](Consumer::essentially_once) | begin, handle each, commit all with the offset | each record took effect once | the store's |
/// | [`at_least_once`](Consumer::at_least_once) | handle each, commit the offset | some are handled again | `()` |
/// | [`at_most_once`](Consumer::at_most_once) | commit the offset, handle each | some are never handled | `()` |
///
/// The stored position is the only truth. Whatever goes wrong in a way that may pass (another instance committed first, the reply to a
/// commit was lost, the backend is unreachable), the consumer drops all it has in memory, calls [`Handler::reset`], pauses
/// (exponential backoff with jitter) and goes on from the stored position. Errors that will not pass end the run.
///
/// A record whose handling fails, by an error or a panic, is tried again alone: the transaction is rolled back, the records
/// before it are committed without it. When its [`retries`](Self::retries) are used up, or at once after
/// [`HandlerError::reject`](crate::HandlerError::reject), the run ends with [`Error::Unhandled`] and the position points to
/// the record. Under at-most-once it is reported as [`failed`](Report::failed) and passed over, since it must not be handled twice.
///
/// If a batch fails as a whole, in [`Handler::flush`] or when it is committed, its records are handled and committed one by
/// one until the culprit is known, which then counts as failed.
///
/// A record whose [`Origin`](crate::Origin) was seen before is a duplicate, made by a sender in doubt, and is dropped, with a
/// warning that names the producer. A malformed record is never taken for a duplicate.
///
/// Dropping a run's future is as safe as a crash: the transaction in hand is rolled back.
pub struct Consumer<S, H, D> {
    id: ConsumerId,
    log: Arc<dyn Log>,
    store: S,
    handler: H,
    settings: Settings,
    delivery: PhantomData<fn() -> D>,
}

struct Settings {
    start_at: StartAt,
    max_batch: usize,
    read_ahead_records: Option<usize>,
    read_ahead_bytes: usize,
    accept_volatile: bool,
    retries: u32,
    restart_limit: Option<u32>,
    min_pause: Duration,
    max_pause: Duration,
    forget_producers_after: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            start_at: StartAt::default(),
            max_batch: 100,
            read_ahead_records: None,
            read_ahead_bytes: 8 * 1024 * 1024,
            accept_volatile: false,
            retries: 10,
            restart_limit: None,
            min_pause: Duration::from_millis(10),
            max_pause: Duration::from_secs(10),
            forget_producers_after: Duration::from_secs(7 * 24 * 60 * 60),
        }
    }
}

impl<S: OffsetStore, H: Handler<S::Tx>> Consumer<S, H, EssentiallyOnce> {
    /// Commits what the handler writes to its transaction together with the offset: every record takes effect once.
    pub fn essentially_once(id: ConsumerId, log: impl Log + 'static, store: S, handler: H) -> Self {
        Self::new(id, log, store, handler)
    }
}

impl<S: OffsetStore, H: Handler<()>> Consumer<S, H, AtLeastOnce> {
    /// Commits the offset after handling: a crash between the two has records handled again.
    pub fn at_least_once(id: ConsumerId, log: impl Log + 'static, store: S, handler: H) -> Self {
        Self::new(id, log, store, handler)
    }
}

impl<S: OffsetStore, H: Handler<()>> Consumer<S, H, AtMostOnce> {
    /// Commits the offset before handling: a crash between the two leaves up to `max_batch` records unhandled.
    pub fn at_most_once(id: ConsumerId, log: impl Log + 'static, store: S, handler: H) -> Self {
        Self::new(id, log, store, handler)
    }
}

impl<S: OffsetStore, H: Handler<D::Tx>, D: Delivery<S>> Consumer<S, H, D> {
    fn new(id: ConsumerId, log: impl Log + 'static, store: S, handler: H) -> Self {
        Self {
            id,
            log: Arc::new(log),
            store,
            handler,
            settings: Settings::default(),
            delivery: PhantomData,
        }
    }

    /// Where to begin if the store has no position for this consumer; [`StartAt::Earliest`] unless set.
    #[must_use]
    pub fn start_at(mut self, start_at: StartAt) -> Self {
        self.settings.start_at = start_at;
        self
    }

    /// How many records are committed together at most; 100 unless set. It never waits for more than have arrived.
    #[must_use]
    pub fn max_batch(mut self, records: usize) -> Self {
        self.settings.max_batch = records;
        self
    }

    /// How much is read ahead of the handler at most: so many records, or so many bytes plus one fetch of the log.
    /// Sixteen batches but at least 8,192 records, and 8 MiB, unless set.
    #[must_use]
    pub fn read_ahead(mut self, records: usize, bytes: usize) -> Self {
        self.settings.read_ahead_records = Some(records);
        self.settings.read_ahead_bytes = bytes;
        self
    }

    /// Runs essentially-once even if the log or the store says that it forgets on a crash.
    #[must_use]
    pub fn accept_volatile(mut self) -> Self {
        self.settings.accept_volatile = true;
        self
    }

    /// How often a record is tried again before the run ends; 10 unless set. The pauses are those of
    /// [`backoff`](Self::backoff). A record that failed behind others in its batch is tried alone at least once.
    #[must_use]
    pub fn retries(mut self, retries: u32) -> Self {
        self.settings.retries = retries;
        self
    }

    /// The first and the longest pause before a restart, 10 ms and 10 s unless set. Each is twice the one before, a commit
    /// starts over, and to each comes up to as much again at random.
    #[must_use]
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.settings.min_pause = first;
        self.settings.max_pause = longest;
        self
    }

    /// Ends the run with the last error after that many restarts without a commit between them; never unless set.
    #[must_use]
    pub fn restart_limit(mut self, restarts: u32) -> Self {
        self.settings.restart_limit = Some(restarts);
        self
    }

    /// Forgets a producer's window when it sent nothing for so long, by the append times of the records read, and the log holds
    /// none of the records read from it any more; 7 days unless set. A record that it sends again later than that counts as new.
    #[must_use]
    pub fn forget_producers_after(mut self, time: Duration) -> Self {
        self.settings.forget_producers_after = time;
        self
    }

    /// Runs until an error ends it; see [`run_until`](Self::run_until).
    ///
    /// # Errors
    /// As for [`run_until`](Self::run_until).
    pub async fn run(self) -> Result<Report, Error> {
        self.supervise(CancellationToken::new(), false).await
    }

    /// Runs until everything is handled that the log held when the run began.
    ///
    /// # Errors
    /// As for [`run_until`](Self::run_until).
    pub async fn run_until_caught_up(self) -> Result<Report, Error> {
        self.supervise(CancellationToken::new(), true).await
    }

    /// Runs until `stop` is cancelled: the record in hand is finished, and what was handled is committed.
    ///
    /// # Errors
    /// - [`Error::Unhandled`]: a record cannot be handled.
    /// - [`Error::Truncated`], [`Error::OutOfRange`], [`Error::LogChanged`], [`Error::WrongLog`]: the position does not fit
    ///   the log; [`seek`] can mend the first three.
    /// - [`Error::PositionLost`]: the store lost commits that this run had seen.
    /// - [`Error::Volatile`]: essentially-once was asked of a backend that forgets.
    /// - [`Error::InvalidSetting`], and [`Error::Failed`] or any other error of the backend that trying again will not mend.
    pub async fn run_until(self, stop: CancellationToken) -> Result<Report, Error> {
        self.supervise(stop, false).await
    }

    async fn supervise(self, stop: CancellationToken, until_caught_up: bool) -> Result<Report, Error> {
        let span = tracing::info_span!("consumer", consumer = %self.id, log = %self.log.id(), delivery = D::NAME);
        async {
            let result = self.restart_until_done(&stop, until_caught_up).await;
            match &result {
                Ok(report) => tracing::info!(%report, "stopped"),
                Err(error) => tracing::error!(%error, "stopped by an error"),
            }
            result
        }
        .instrument(span)
        .await
    }

    async fn restart_until_done(mut self, stop: &CancellationToken, until_caught_up: bool) -> Result<Report, Error> {
        self.check_settings()?;
        let telemetry = Telemetry::new(&self.id, D::NAME);
        let mut report = Report::default();
        let mut supervisor = Supervisor::new(&self);
        let (mut duplicates, mut seen) = (Duplicates::default(), None);
        let owner = Owner::draw();
        let mut caught_up_at = None;
        loop {
            let commits = report.commits;
            let session = Session {
                id: &self.id,
                log: &self.log,
                store: &self.store,
                settings: &self.settings,
                stop,
                telemetry: &telemetry,
                report: &mut report,
                duplicates: &mut duplicates,
                seen: &mut seen,
                owner,
                alone: supervisor.culprit.as_ref().map(|culprit| culprit.offset),
                apart_until: supervisor.apart_until,
                place: Place::default(),
                windows: Windows::default(),
                now: SystemTime::UNIX_EPOCH,
                silent: LookForSilent::default(),
            };
            let target = until_caught_up.then_some(&mut caught_up_at);
            let Err(failure) = session.run::<H, D>(&mut self.handler, target).await else {
                return Ok(report);
            };
            if report.commits > commits {
                supervisor.made_progress();
            }
            let pause = supervisor.judge(failure, &telemetry, &mut report)?;
            self.reset_handler().await;
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(report),
                () = rt::sleep(pause) => {}
            }
        }
    }

    /// A panic here is as good as a reset that did nothing: the handler's next error counts as usual.
    async fn reset_handler(&mut self) {
        let handler = &mut self.handler;
        if let Err(error) = catch_panic(pin!(async move { handler.reset().await })).await {
            tracing::error!(%error, "the handler could not be reset");
        }
    }

    fn check_settings(&self) -> Result<(), Error> {
        let zero = |setting, value: usize| match value {
            0 => Err(Error::InvalidSetting {
                setting,
                reason: "it must be at least 1".into(),
            }),
            _ => Ok(()),
        };
        zero("max_batch", self.settings.max_batch)?;
        zero("read_ahead records", self.settings.read_ahead_records.unwrap_or(1))?;
        zero("read_ahead bytes", self.settings.read_ahead_bytes)?;
        if self.settings.min_pause > self.settings.max_pause {
            return Err(Error::InvalidSetting {
                setting: "backoff",
                reason: "the first pause is longer than the longest".into(),
            });
        }
        Ok(())
    }
}

impl Settings {
    fn backoff(&self) -> ExponentialBuilder {
        ExponentialBuilder::default()
            .with_min_delay(self.min_pause)
            .with_max_delay(self.max_pause)
            .with_jitter()
            .without_max_times()
    }
}

/// Decides after each failure between another try and the end.
struct Supervisor {
    id: ConsumerId,
    log: Arc<dyn Log>,
    retries: u32,
    restart_limit: Option<u32>,
    backoff: ExponentialBuilder,
    pauses: ExponentialBackoff,
    restarts_without_commit: u32,
    culprit: Option<Culprit>,
    /// Records up to this one are handled one by one.
    apart_until: Option<Offset>,
}

/// The record that failed last.
struct Culprit {
    offset: Offset,
    attempts: u32,
}

impl Supervisor {
    fn new<S, H, D>(consumer: &Consumer<S, H, D>) -> Self {
        let backoff = consumer.settings.backoff();
        Self {
            id: consumer.id.clone(),
            log: Arc::clone(&consumer.log),
            retries: consumer.settings.retries,
            restart_limit: consumer.settings.restart_limit,
            backoff,
            pauses: backoff.build(),
            restarts_without_commit: 0,
            culprit: None,
            apart_until: None,
        }
    }

    fn made_progress(&mut self) {
        self.pauses = self.backoff.build();
        self.restarts_without_commit = 0;
    }

    /// How long to pause before the next try, or the error that ends the run.
    fn judge(&mut self, failure: Failure, telemetry: &Telemetry, report: &mut Report) -> Result<Duration, Error> {
        let (error, pauses) = match failure {
            Failure::Backend(error) if error.is_transient() => {
                if matches!(error, Error::Fenced { .. }) {
                    report.fenced += 1;
                    telemetry.fenced.increment(1);
                }
                (error, true)
            }
            Failure::Backend(error) => return Err(error),
            Failure::Record(failed) => {
                let attempts = match &self.culprit {
                    Some(culprit) if culprit.offset == failed.offset => culprit.attempts + 1,
                    _ => 1,
                };
                self.culprit = Some(Culprit {
                    offset: failed.offset,
                    attempts,
                });
                let outcome = match failed.error.kind {
                    HandlerErrorKind::Fatal => Some(failed.fatal_outcome),
                    HandlerErrorKind::Reject if failed.is_first => Some("rejected; the position points to this record"),
                    HandlerErrorKind::Retry if failed.is_first && attempts > self.retries => {
                        Some("not handled, no retry is left; the position points to this record")
                    }
                    _ => None,
                };
                let error = self.unhandled(failed.offset, outcome.unwrap_or("not handled"), attempts, failed.error);
                if outcome.is_some() {
                    return Err(error);
                }
                // Behind others in its batch: those are committed first, without delay, and then this one is tried alone.
                (error, failed.is_first)
            }
            Failure::Batch(until, error) => {
                self.apart_until = Some(until);
                let outcome =
                    "this record or one before it in its batch made the batch fail; they are tried one by one";
                (self.unhandled(until, outcome, 1, error), false)
            }
        };
        self.restarts_without_commit += 1;
        if self
            .restart_limit
            .is_some_and(|limit| self.restarts_without_commit > limit)
        {
            return Err(error);
        }
        report.restarts += 1;
        telemetry.restarts.increment(1);
        let pause = if pauses {
            self.pauses.next().unwrap_or_default()
        } else {
            Duration::ZERO
        };
        tracing::warn!(%error, ?pause, "going back to the stored position");
        Ok(pause)
    }

    fn unhandled(&self, offset: Offset, outcome: &'static str, attempts: u32, error: HandlerError) -> Error {
        Error::Unhandled {
            consumer: self.id.clone(),
            log: self.log.id().clone(),
            offset,
            outcome,
            attempts,
            cause: error.source,
        }
    }
}
