//! The consumer loop.

mod call;
mod consume;
pub mod dead_letters;
mod deaths;
mod delivery;
mod duplicates;
mod failure;
mod heart;
mod key_filter;
mod letter_decoding;
mod letter_filter;
mod letter_sweeps;
mod letter_tries;
mod letter_verbs;
mod letters;
mod letters_at_least_once;
mod load;
mod pausing;
mod policy;
mod read_ahead;
mod remove_passed;
mod report;
mod resume;
mod run;
mod seek;
mod session;
mod settings;
mod silences;
mod skip;
mod standby;
mod supervisor;
mod verbs;

use std::{
    marker::PhantomData,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use self::{
    call::reset,
    heart::Heart,
    letters::Parked,
    policy::Rule,
    report::Telemetry,
    run::Run,
    session::{LookForSilent, Place, Session},
    settings::Settings,
    supervisor::Supervisor,
    verbs::unmoved,
};
pub use self::{
    delivery::{AtLeastOnce, AtMostOnce, Delivery, EssentiallyOnce, Retrying},
    letters::DeadLetterOptions,
    pausing::{pause, resume},
    policy::{FailedRecord, OnFailure, OnTruncated},
    remove_passed::remove_passed,
    report::Report,
    seek::{SeekPlan, StartAt, plan_seek, seek, seek_as_planned},
    skip::{plan_skip, skip},
};
use crate::{
    ConsumerId, Error, Handler, Log, OffsetStore, Owner, Revision, Transaction, backend::within_run,
    letters::DeadLetters, note::InHand, rt, window::Windows,
};
pub use crate::{
    handler::{HandlerErrorKind, HandlerFn, HandlerFuture},
    journal::{JournalEntry, Operator, OperatorAction},
};

/// How long the end of a run waits for the store to release the position.
const RELEASE_LIMIT: Duration = Duration::from_millis(75);

/// Reads a log from its stored position and passes each record to a handler: one loop for every
/// backend and every delivery.
///
/// The constructor chooses the delivery, which decides what the handler can write to:
///
/// | constructor | per batch | after a crash | the handler's `Tx` |
/// |---|---|---|---|
/// | [`essentially_once`](Consumer::essentially_once) | begin, handle each, commit all with the offset | each record took effect once | the store's |
/// | [`at_least_once`](Consumer::at_least_once) | handle each, commit the offset | some are handled again | `()` |
/// | [`at_most_once`](Consumer::at_most_once) | commit the offset, handle each | some are never handled | `()` |
///
/// The stored position is the only truth. After a failure that may pass (another instance committed
/// first, the reply to a commit was lost, the backend is unreachable), the consumer drops
/// everything that it holds in memory, calls [`Handler::reset`], pauses (exponential backoff with
/// jitter) and continues from the stored position. Any other error ends the run.
///
/// A record whose handling fails, with an error or a panic, is tried again alone. The consumer
/// rolls the transaction back and commits the records before the failed one without it. Once the
/// record's [`retries`](Self::retries) are used up, or at once after
/// [`HandlerError::reject`](crate::HandlerError::reject), the run ends with [`Error::Unhandled`]
/// and the position points to the record. Under at-most-once a record must not be handled twice, so
/// the consumer passes over it and reports it as [`failed`](Report::failed).
///
/// [`on_failure`](Self::on_failure) can also skip the record, or set it aside as a
/// [dead letter](Self::dead_letters), and go on.
///
/// If a batch fails as a whole, in [`Handler::flush`] or at its commit, the consumer handles and
/// commits its records individually until it finds the culprit, which then counts as failed.
///
/// A record whose [`Origin`](crate::Origin) was seen before is a duplicate from a sender in doubt.
/// The consumer drops it and logs a warning with the producer's name. It never treats a malformed
/// record as a duplicate.
///
/// Dropping a run's future is as safe as a crash: the open transaction is rolled back.
///
/// # Examples
///
/// ```
/// use essentially_once::memory::{Memory, MemoryTx};
/// use essentially_once::{
///     CancellationToken, Consumer, ConsumerId, KeyValue, Log, NewRecord, Record, handler_fn,
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// let memory = Memory::new();
/// let log = memory.log("orders")?;
/// log.append(&[NewRecord::new("10248"), NewRecord::new("10249")]).await?;
///
/// let stop = CancellationToken::new(); // a service cancels it on SIGTERM
/// let on_last = stop.clone();
/// let ship = handler_fn(move |record: &Record, tx: &mut MemoryTx| {
///     let on_last = on_last.clone();
///     Box::pin(async move {
///         tx.put(&record.payload, b"shipped").await?;
///         if record.payload == "10249" {
///             on_last.cancel();
///         }
///         Ok(())
///     })
/// });
/// let report = Consumer::essentially_once(ConsumerId::new("shipping")?, log, memory.store(), ship)
///     .max_batch(500)
///     .retries(3)
///     .accept_volatile() // the in-memory backend loses its data in a crash
///     .run_until(stop)
///     .await?;
/// assert_eq!(report.handled, 2);
/// # Ok(())
/// # }
/// ```
pub struct Consumer<S, H, D> {
    id: ConsumerId,
    log: Arc<dyn Log>,
    store: Arc<S>,
    handler: H,
    settings: Settings,
    delivery: PhantomData<fn() -> D>,
}

impl<S: OffsetStore, H: Handler<S::Tx>> Consumer<S, H, EssentiallyOnce> {
    /// Commits the handler's writes to its transaction together with the offset: every record takes
    /// effect once.
    pub fn essentially_once(id: ConsumerId, log: impl Log + 'static, store: S, handler: H) -> Self {
        Self::new(id, log, store, handler)
    }
}

impl<S: OffsetStore, H: Handler<()>> Consumer<S, H, AtLeastOnce> {
    /// Commits the offset after handling: after a crash between the two, records are handled again.
    pub fn at_least_once(id: ConsumerId, log: impl Log + 'static, store: S, handler: H) -> Self {
        Self::new(id, log, store, handler)
    }
}

impl<S: OffsetStore, H: Handler<()>> Consumer<S, H, AtMostOnce> {
    /// Commits the offset before handling: a crash between the two leaves up to `max_batch` records
    /// unhandled.
    pub fn at_most_once(id: ConsumerId, log: impl Log + 'static, store: S, handler: H) -> Self {
        Self::new(id, log, store, handler)
    }
}

impl<S: OffsetStore, H: Handler<D::Tx>, D: Delivery<S>> Consumer<S, H, D> {
    fn new(id: ConsumerId, log: impl Log + 'static, store: S, handler: H) -> Self {
        Self {
            id,
            log: Arc::new(log),
            store: Arc::new(store),
            handler,
            settings: Settings::default(),
            delivery: PhantomData,
        }
    }

    /// Where to begin if the store has no position for this consumer. The default is
    /// [`StartAt::Earliest`].
    #[must_use]
    pub fn start_at(mut self, start_at: StartAt) -> Self {
        self.settings.start_at = start_at;
        self
    }

    /// The most records that one commit covers. The default is 1,000, and the value must be at
    /// least 1. A batch never waits for more records than have arrived.
    #[must_use]
    pub fn max_batch(mut self, records: usize) -> Self {
        self.settings.max_batch = records;
        self
    }

    /// How many records to read ahead of the handler. The default is sixteen batches but at least
    /// 8,192, and the value must be at least 1.
    #[must_use]
    pub fn read_ahead_records(mut self, records: usize) -> Self {
        self.settings.read_ahead_records = Some(records);
        self
    }

    /// How many bytes of records a consumer holds, plus one fetch of the log. The default is 4 MiB,
    /// and the value must be at least 1. Half of the bytes are for the current batch, which has
    /// fewer than [`max_batch`](Self::max_batch) records if they are large, and half are for
    /// records read ahead. Reading stops at this limit or at
    /// [`read_ahead_records`](Self::read_ahead_records), whichever comes first. A single record may
    /// exceed the limit.
    #[must_use]
    pub fn read_ahead_bytes(mut self, bytes: usize) -> Self {
        self.settings.read_ahead_bytes = bytes;
        self
    }

    /// Runs essentially-once even if the log or the store reports that it loses data in a crash.
    #[must_use]
    pub fn accept_volatile(mut self) -> Self {
        self.settings.accept_volatile = true;
        self
    }

    /// How often to try a record again before [`on_failure`](Self::on_failure) decides about it.
    /// The default is 10. [`min_backoff`](Self::min_backoff) and [`max_backoff`](Self::max_backoff)
    /// set the pauses. A record that failed behind others in its batch is tried alone at least
    /// once, unless the handler rejects it.
    ///
    /// Each failed try is committed with the position. Tries therefore count across crashes,
    /// restarts and instances, until the record is passed or the run ends because of it.
    #[must_use]
    pub fn retries(mut self, retries: u32) -> Self {
        self.settings.retries = retries;
        self
    }

    /// How many instances in a row may die while they handle a record. The default is 3.
    ///
    /// An instance that dies leaves no error, and the next one would die of the same record. After
    /// taking over from an instance that did not end cleanly, this one therefore handles up to
    /// [`max_batch`](Self::max_batch) records alone, and commits beforehand which one it has in
    /// hand. If that many such instances in a row end in this way with the same record in hand, the
    /// record counts as failed, whoever ended them, and [`on_failure`](Self::on_failure) decides
    /// between a stop and a dead letter. A dead letter then waits for an operator. Restarts within
    /// a run do not count, nor does an instance that lost the position to another one and lives.
    ///
    /// At-most-once ignores this setting, because it never tries a record twice. So does an
    /// instance with [`standby_after`](Self::standby_after) zero.
    #[must_use]
    pub fn max_deaths(mut self, deaths: u32) -> Self {
        self.settings.max_deaths = deaths;
        self
    }

    /// The pause before the first restart. The default is 10 ms, and the value must not exceed
    /// [`max_backoff`](Self::max_backoff). Pauses double, with up to 100 % jitter, and reset after
    /// a commit.
    #[must_use]
    pub fn min_backoff(mut self, pause: Duration) -> Self {
        self.settings.backoff.shortest = pause;
        self
    }

    /// The longest pause before a restart, without jitter. The default is 10 s, and the value must
    /// not be below [`min_backoff`](Self::min_backoff).
    #[must_use]
    pub fn max_backoff(mut self, pause: Duration) -> Self {
        self.settings.backoff.longest = pause;
        self
    }

    /// Ends the run with the last error after this many restarts without a commit in between. The
    /// default is no limit.
    #[must_use]
    pub fn restart_limit(mut self, restarts: u32) -> Self {
        self.settings.restart_limit = Some(restarts);
        self
    }

    /// Forgets a producer's window after this time. The default is 7 days.
    ///
    /// Its last record must have been read that long ago by this process's clock, *and* appended
    /// that long before the newest record by the appenders' clocks, *and* must no longer be in the
    /// log. If the producer sends a record again after that, it counts as new. Producers in the
    /// stable epoch are never forgotten. These include all producers that version 0.1 has seen.
    #[must_use]
    pub fn forget_producers_after(mut self, time: Duration) -> Self {
        self.settings.forget_producers_after = time;
        self
    }

    /// How long handling a batch may take after its transaction began. The default is 100 ms.
    ///
    /// If one more record and the commit would exceed the limit, by the average of the records
    /// before it and by the last commit, the consumer commits those and moves the rest to the next
    /// batch. A slow commit counts for at most half of the limit. A batch holds at least one
    /// record, however long that takes. The consumer looks at the clock after each record, or after
    /// every eighth while they take less than 1/128 of the limit. An open transaction may keep
    /// others from writing, and a commit shows standbys that this instance is alive. At-most-once
    /// commits first and ignores this limit. [`Duration::MAX`] means no limit.
    #[must_use]
    pub fn batch_time_limit(mut self, limit: Duration) -> Self {
        self.settings.batch_time_limit = limit;
        self
    }

    /// How long the handler may take for one record. The default is no limit, and zero is refused.
    /// At the limit the consumer drops the handler's future, and the record counts as failed. A
    /// handler that blocks its thread cannot be interrupted.
    #[must_use]
    pub fn record_time_limit(mut self, limit: Duration) -> Self {
        self.settings.record_time_limit = Some(limit);
        self
    }

    /// How long a handler may continue after the run is stopped. The default is 10 s.
    ///
    /// Under essentially-once the consumer then drops the handler's future and rolls the
    /// transaction back. Under at-least-once and at-most-once it finishes the current record, since
    /// nothing would undo the effects so far. At-most-once then passes over the rest of its batch.
    /// A handler that blocks its thread cannot be interrupted.
    #[must_use]
    pub fn stop_grace(mut self, grace: Duration) -> Self {
        self.settings.stop_grace = grace;
        self
    }

    /// How long the active instance of this consumer may show no sign of life, while records wait,
    /// before this instance takes over. The default is 1 s. With zero this instance never stands
    /// by: it takes over at once, and an active instance is fenced. With [`Duration::MAX`] it never
    /// takes over.
    ///
    /// A commit is a sign of life. An instance that handles a slow record, or pauses before it
    /// tries one again, gives a sign four times in that time, if its [store](OffsetStore::beat)
    /// keeps them and its runtime has a thread for it. A handler that blocks the only thread gives
    /// no sign. A standby becomes more patient with an instance that was silent for long and was
    /// still alive. Which instance is active never decides what is committed. The revision of the
    /// position does.
    #[must_use]
    pub fn standby_after(mut self, silence: Duration) -> Self {
        self.settings.standby_after = silence;
        self
    }

    /// What to do if retention removed records before the consumer handled them. The default is
    /// [`OnTruncated::Stop`].
    #[must_use]
    pub fn on_truncated(mut self, action: OnTruncated) -> Self {
        self.settings.on_truncated = action;
        self
    }

    /// Runs until an error ends it. See [`run_until`](Self::run_until).
    ///
    /// # Errors
    /// As for [`run_until`](Self::run_until).
    pub async fn run(self) -> Result<Report, Error> {
        self.supervise(CancellationToken::new(), false).await
    }

    /// Runs until this instance or another active one has handled every record that the log held
    /// when the run began. It does not wait for records that are deleted in the meantime.
    ///
    /// # Errors
    /// As for [`run_until`](Self::run_until).
    pub async fn run_until_caught_up(self) -> Result<Report, Error> {
        self.supervise(CancellationToken::new(), true).await
    }

    /// Runs until `stop` is cancelled. It then finishes the current record, within
    /// [`stop_grace`](Self::stop_grace), and commits the handled records. Everything else that it
    /// does or waits for ends at once.
    ///
    /// # Errors
    /// - [`Error::Unhandled`]: a record could not be handled.
    /// - [`Error::Truncated`], [`Error::OutOfRange`], [`Error::LogChanged`], [`Error::WrongLog`]:
    ///   the position does not fit the log. [`seek`] can resolve the first three.
    /// - [`Error::PositionLost`]: the store lost commits that this run had seen.
    /// - [`Error::Volatile`]: essentially-once was requested on a backend that loses acknowledged
    ///   data in a crash.
    /// - [`Error::InvalidSetting`]: a setting is out of its bounds.
    /// - [`Error::Failed`], or any other error of the backend that another try does not resolve.
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
        self.settings.check()?;
        let owner = Owner::draw();
        let heart = Heart::spawn(&self.store, &self.id, owner, self.settings.standby_after);
        let mut run = Run::default();
        let sessions = self.run_sessions(&mut run, owner, &heart, stop, until_caught_up);
        let result = within_run(owner, sessions).await;
        run.end_reading().await;
        heart.end().await;
        if let (Err(Error::Unhandled { .. }), Some(revision)) = (&result, run.revision()) {
            forget_tries(&*self.store, &self.id, revision).await;
        }
        if run.is_owner() {
            release(&*self.store, &self.id, owner).await;
        }
        result.map(|()| run.report)
    }

    /// Restarts until the run is stopped, has caught up, or fails.
    async fn run_sessions(
        &mut self,
        run: &mut Run,
        owner: Owner,
        heart: &Heart,
        stop: &CancellationToken,
        until_caught_up: bool,
    ) -> Result<(), Error> {
        let telemetry = Telemetry::new(&self.id, D::NAME);
        let mut supervisor = Supervisor::new(&self.id, &self.log, &self.settings);
        let mut caught_up_at = None;
        loop {
            let (next, letter_commits) = (run.next(), run.letter_commits);
            supervisor.forget_culprit_before(next);
            let session = Session {
                id: &self.id,
                log: &self.log,
                store: &*self.store,
                settings: &self.settings,
                stop,
                telemetry: &telemetry,
                heart,
                run,
                owner,
                tried: supervisor.culprit.clone(),
                apart_until: supervisor.apart_until,
                place: Place::default(),
                windows: Windows::default(),
                parked: Parked::default(),
                to_park: None,
                began: SystemTime::now(),
                cut_off: None,
                now: SystemTime::UNIX_EPOCH,
                commit_time: Duration::ZERO,
                silent: LookForSilent::default(),
                counted: None,
            };
            let target = until_caught_up.then_some(&mut caught_up_at);
            let Err(failure) = session.run::<H, D>(&mut self.handler, target).await else {
                return Ok(());
            };
            // The reloaded position counts too, because the commit whose reply was lost may have
            // been applied.
            if run.next() != next || run.letter_commits != letter_commits {
                supervisor.made_progress();
            }
            let Some(pause) = supervisor.judge(failure, &telemetry, run)? else {
                return Ok(());
            };
            let going_back = async {
                reset(&mut self.handler).await;
                // Even the shortest sleep takes a tick of the runtime's timer, a millisecond.
                if !pause.is_zero() {
                    rt::sleep(pause).await;
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = going_back => {}
            }
        }
    }
}

impl<S: OffsetStore, H, D: Retrying> Consumer<S, H, D>
where
    S::Tx: DeadLetters,
{
    /// Sets records that cannot be handled aside as [dead letters](dead_letters), in the commit
    /// that moves the position past them, and goes on. Later records of a key that has letters
    /// are set aside too, so that every key keeps its order.
    ///
    /// To set only some records aside, also call [`on_failure_with`](Self::on_failure_with).
    /// Without it, the consumer sets every record aside that it cannot handle.
    ///
    /// Letters that are in the store already are respected and tried when they are due, even
    /// without this option, but a standby takes over because of a due letter only with it.
    ///
    /// Under at-least-once a letter is handled and then removed, so a crash in between makes it be
    /// handled again. At-most-once has no dead letters, because it never tries a record twice.
    #[must_use]
    pub fn dead_letters(mut self, options: DeadLetterOptions) -> Self {
        self.settings.letters = Some(options);
        self
    }
}

impl<S, H, D: Retrying> Consumer<S, H, D> {
    /// What to do with a record that cannot be handled: its [`retries`](Self::retries) are used up,
    /// the handler [rejected](crate::HandlerError::reject) it, or it could not be decoded. The
    /// default is [`OnFailure::Stop`], and [`OnFailure::DeadLetter`] with
    /// [`dead_letters`](Consumer::dead_letters). A [fatal](crate::HandlerError::fatal) error always
    /// ends the run.
    ///
    /// At-most-once has no such choice, because it never tries a record twice.
    #[must_use]
    pub fn on_failure(self, action: OnFailure) -> Self {
        self.on_failure_with(move |_| action)
    }

    /// Like [`on_failure`](Self::on_failure), with a function that chooses for each record. If it
    /// panics, the run ends. It is called again if the record is tried again, which happens if the
    /// records before it are committed first or if the process dies.
    ///
    /// ```
    /// use essentially_once::consumer::{HandlerErrorKind, OnFailure};
    /// # use essentially_once::{Consumer, ConsumerId, Log, NewRecord, Record, handler_fn};
    /// # use essentially_once::{HandlerError, memory::{Memory, MemoryTx}};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), essentially_once::Error> {
    /// # let memory = Memory::new();
    /// # let log = memory.log("orders")?;
    /// # log.append(&[NewRecord::new("10248"), NewRecord::new("garbage")]).await?;
    /// # let ship = handler_fn(|record: &Record, _: &mut MemoryTx| {
    /// #     Box::pin(async move {
    /// #         let order = std::str::from_utf8(&record.payload)?;
    /// #         order.parse::<u64>().map_err(HandlerError::reject)?;
    /// #         Ok(())
    /// #     })
    /// # });
    /// # let id = ConsumerId::new("shipping")?;
    /// let report = Consumer::essentially_once(id, log, memory.store(), ship)
    ///     .on_failure_with(|failed| match failed.error.kind() {
    ///         HandlerErrorKind::Reject => OnFailure::Skip, // garbage
    ///         _ => OnFailure::Stop, // perhaps an outage
    ///     })
    /// #   .accept_volatile()
    ///     .run_until_caught_up()
    ///     .await?;
    /// assert_eq!((report.handled, report.failed), (1, 1));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn on_failure_with(mut self, rule: impl Fn(&FailedRecord<'_>) -> OnFailure + Send + Sync + 'static) -> Self {
        self.settings.on_failure = Some(Rule::new(rule));
        self
    }
}

/// Gives the next run all tries of the record that ended this one. Otherwise it only has the last,
/// or none.
async fn forget_tries<S: OffsetStore>(store: &S, id: &ConsumerId, seen: Revision) {
    let forget = async {
        let tx = store.begin(id).await?;
        match store.position(id).await? {
            Some(position) if position.revision == seen && position.note.has_trouble() => {
                let note = position.note.with(None, InHand::default());
                let mut advance = unmoved(&position);
                advance.note = note;
                tx.commit(advance).await
            }
            _ => tx.rollback().await,
        }
    };
    match rt::within(Some(RELEASE_LIMIT), forget).await {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::debug!(%error, "could not forget the tries of the record that ended the run"),
        None => tracing::debug!("could not forget the tries of the record that ended the run in time"),
    }
}

/// Lets a standby take over at once. Without it, the standby takes over a little later.
async fn release<S: OffsetStore>(store: &S, id: &ConsumerId, owner: Owner) {
    match rt::within(Some(RELEASE_LIMIT), store.release(id, owner)).await {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            tracing::debug!(%error, "could not release the position; a standby takes over a little later");
        }
        None => tracing::debug!("could not release the position in time; a standby takes over a little later"),
    }
}
