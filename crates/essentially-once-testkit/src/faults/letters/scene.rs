//! One run of a plan with dead letters: a log, a consumer, handlers in trouble, operators, and the
//! verdict.

use std::{future::pending, time::Duration};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Epoch, Error, Log, NewRecord, Offset, OffsetStore, Origin, ProducerId,
    Record,
    backend::DeadLetter,
    consumer::{DeadLetterOptions, EssentiallyOnce, dead_letters},
};

use super::{
    check::Check,
    history::{self, Chronicler, NotingStore},
    operator::{Desk, Verb},
    trouble::{TroubleKind, TroubledHandler, Troubles},
};
use crate::{
    checker::read_log,
    faults::{
        control::{Faults, Process},
        driver::drive,
        plan::Plan,
        scene::{is_volatile, patiently},
        wrappers::{FaultyHandler, FaultyLog, FaultyStore},
    },
    harness::Backend,
    violation::{Violation, ensure},
};

/// How often a record is tried again before it is set aside. An operator's retry tries it once.
const RETRIES: u32 = 1;

/// How often to see whether a consumer has caught up, if its store cannot tell.
const WATCH_EVERY: Duration = Duration::from_millis(5);

/// What the error of a run says that a pause ended.
const PAUSED: &str = ": it is paused, by ";

/// What the clock of the plan needs.
#[derive(Clone, Copy)]
pub(in crate::faults) struct Times {
    /// The consumer's shortest and longest backoff.
    pub(in crate::faults) pauses: (Duration, Duration),
    /// How long a handler may take for a record, if one hangs.
    pub(in crate::faults) record_time_limit: Duration,
    /// When a successor takes over from a process that died of a record.
    pub(in crate::faults) standby_after: Duration,
    /// How long a consumer stays frozen at most. Forever if `None`.
    pub(in crate::faults) patience: Option<Duration>,
}

/// A log with dead letters.
pub(in crate::faults) struct LetterScene<'b, B> {
    pub(in crate::faults) backend: &'b B,
    /// The name of the log and of the consumer.
    pub(in crate::faults) name: String,
    pub(in crate::faults) max_batch: usize,
    pub(in crate::faults) times: Times,
}

/// What the consumers of a run share.
struct Stage {
    consumer: ConsumerId,
    records: Vec<Record>,
    troubles: Troubles,
    accept_volatile: bool,
}

impl<B: Backend> LetterScene<'_, B> {
    pub(in crate::faults) async fn play(&self, faults: &Faults, plan: &Plan) -> Result<(), Violation> {
        let log = self.backend.log(&self.name).await?;
        log.append(&messages()?).await?;
        let records = read_log(&*log).await?;
        let mut stage = Stage {
            consumer: ConsumerId::new(&self.name)?,
            troubles: Troubles::new(plan.troubles(), &records),
            records,
            accept_volatile: is_volatile(log.durability().await?)
                || is_volatile(self.backend.store().await?.durability().await?),
        };
        drive(
            faults,
            self.times.patience,
            |process| Box::pin(self.consume(&stage, process)),
            |process, verb| Box::pin(self.operate(&stage, process, verb)),
        )
        .await?;
        self.judge(&stage, "after the faults").await?;
        stage.troubles = Troubles::default();
        self.consume_cleanly(&stage).await?;
        let letters = self.judge(&stage, "after a healthy run").await?;
        let next = self
            .backend
            .store()
            .await?
            .position(&stage.consumer)
            .await?
            .map(|position| position.next);
        ensure!(
            next > stage.records.last().map(|last| last.offset),
            "the consumers had caught up, but the position is {next:?}"
        );
        let due = letters.iter().find(|letter| letter.due.is_some());
        ensure!(
            due.is_none(),
            "the letter at {} is due, and a healthy run did not try it",
            due.map(|letter| letter.record.offset.to_string()).unwrap_or_default()
        );
        let retry = self.act(&stage, without_faults(), Verb::RetryAll);
        retry.await?;
        self.consume_cleanly(&stage).await?;
        let letters = self
            .judge(&stage, "after a healthy run that retried all letters")
            .await?;
        let left: Vec<String> = letters.iter().map(|letter| letter.record.offset.to_string()).collect();
        ensure!(
            left.is_empty(),
            "letters are left after a healthy run that retried all: {}",
            left.join(", ")
        );
        Ok(())
    }

    async fn consume_cleanly(&self, stage: &Stage) -> Result<(), Violation> {
        let consumed = self.consume(stage, without_faults()).await;
        consumed.map_err(|error| Violation::new(format!("a healthy consumer gave up: {error}")))
    }

    /// Runs one consumer on its own handles until it has caught up. A paused one is resumed, and
    /// one that was stopped is started again.
    async fn consume(&self, stage: &Stage, process: Process) -> Result<(), Error> {
        let mut may_be_stopped = stage.troubles.holds(TroubleKind::HangsUntilStopped);
        loop {
            let ended = match may_be_stopped {
                true => self.run_until_stopped(stage, &process).await,
                false => {
                    let stop = CancellationToken::new();
                    let consumer = self.consumer(stage, &process, stop.clone()).await?;
                    tokio::select! {
                        biased;
                        ended = consumer.run_until_caught_up() => ended.map(drop),
                        // Its handler hangs, and nothing but dropping ends such a run.
                        () = stop.cancelled() => continue,
                    }
                }
            };
            match ended {
                Ok(()) if may_be_stopped => may_be_stopped = false,
                Ok(()) => return Ok(()),
                // Another process may have had it resumed first.
                Err(error) if error.to_string().contains(PAUSED) => {
                    let _ = self.act(stage, process.clone(), Verb::Resume).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Runs one consumer until its handler hangs and it is stopped, or until it has caught up.
    async fn run_until_stopped(&self, stage: &Stage, process: &Process) -> Result<(), Error> {
        let stop = CancellationToken::new();
        let consumer = self.consumer(stage, process, stop.clone()).await?;
        let caught_up = async {
            self.catches_up(stage).await?;
            stop.cancel();
            pending().await
        };
        tokio::select! {
            biased;
            ended = consumer.run_until(stop.clone()) => ended.map(drop),
            failed = caught_up => failed,
        }
    }

    /// Waits until the consumer has handled every record, or is paused.
    async fn catches_up(&self, stage: &Stage) -> Result<(), Error> {
        let store = patiently(|| self.backend.store()).await?;
        let last = stage.records.last().map(|record| record.offset);
        loop {
            // A broker may refuse for a moment while the consumer creates its stream.
            let pulse = patiently(|| store.pulse(&stage.consumer)).await?;
            let position = patiently(|| store.position(&stage.consumer)).await?;
            let is_paused = position
                .as_ref()
                .is_some_and(|position| position.journal.paused().is_some());
            if is_paused || position.map(|position| position.next) > last {
                return Ok(());
            }
            patiently(|| store.watch(&stage.consumer, &pulse, WATCH_EVERY)).await?;
        }
    }

    async fn consumer(
        &self,
        stage: &Stage,
        process: &Process,
        stop: CancellationToken,
    ) -> Result<Consumer<FaultyStore<B::Store>, impl essentially_once::Handler<FaultyTxOf<B>>, EssentiallyOnce>, Error>
    {
        let log = FaultyLog::new(patiently(|| self.backend.log(&self.name)).await?, process);
        let store = FaultyStore::new(patiently(|| self.backend.store()).await?, process);
        let handler = TroubledHandler {
            inner: Chronicler,
            troubles: stage.troubles.clone(),
            process: process.clone(),
            stop,
        };
        let handler = FaultyHandler::new(handler, process);
        let (first, longest) = self.times.pauses;
        let standby_after = match stage.troubles.holds(TroubleKind::Kills) {
            true => self.times.standby_after,
            // Zombies should be fenced at their commits. Nobody should wait for them.
            false => Duration::ZERO,
        };
        let mut consumer = Consumer::essentially_once(stage.consumer.clone(), log, store, handler)
            .dead_letters(DeadLetterOptions::new())
            .retries(RETRIES)
            .max_deaths(1)
            .max_batch(self.max_batch)
            // As small as possible, so that reading and handling alternate and more faults fall
            // between them.
            .read_ahead_records(self.max_batch)
            .read_ahead_bytes(1024 * 1024)
            .min_backoff(first)
            .max_backoff(longest)
            .stop_grace(Duration::ZERO)
            .standby_after(standby_after);
        if stage.troubles.holds(TroubleKind::Hangs) {
            consumer = consumer.record_time_limit(self.times.record_time_limit);
        }
        if stage.accept_volatile {
            consumer = consumer.accept_volatile();
        }
        Ok(consumer)
    }

    /// Lets an operator act. A refusal is none of the consumer's promises.
    async fn operate(&self, stage: &Stage, process: Process, verb: Verb) -> Result<(), Error> {
        let _ = self.act(stage, process, verb).await;
        Ok(())
    }

    async fn act(&self, stage: &Stage, process: Process, verb: Verb) -> Result<(), Error> {
        let log = FaultyLog::new(patiently(|| self.backend.log(&self.name)).await?, &process);
        let store = FaultyStore::new(patiently(|| self.backend.store()).await?, &process);
        let offsets: Vec<Offset> = stage.records.iter().map(|record| record.offset).collect();
        let desk = Desk {
            consumer: &stage.consumer,
            log: &log,
            store: &NotingStore(store),
            offsets: &offsets,
        };
        desk.act(verb).await
    }

    /// Returns the letters that are left.
    async fn judge(&self, stage: &Stage, when: &str) -> Result<Vec<DeadLetter>, Violation> {
        let store = FaultyStore::new(self.backend.store().await?, &without_faults());
        let position = store.position(&stage.consumer).await?;
        let letters = dead_letters::list(&stage.consumer, &store, None, 100).await?;
        let next = position.map_or(Offset::ZERO, |position| position.next);
        let check = Check {
            records: &stage.records,
            history: &history::read(&store, &stage.consumer).await?,
            next,
            letters: &letters,
        };
        check
            .judge()
            .map_err(|found| Violation::new(format!("{when}: {found}")))?;
        Ok(letters)
    }
}

type FaultyTxOf<B> = crate::faults::FaultyTx<<<B as Backend>::Store as OffsetStore>::Tx>;

fn without_faults() -> Process {
    Faults::new(Plan::none()).take_turns().process()
}

/// Two keys and a record without one. Two messages are sent twice: one at once, and one when the
/// first copy may be a letter already.
fn messages() -> Result<Vec<NewRecord>, Error> {
    let (sender, epoch) = (ProducerId::new("sender")?, Epoch::fresh());
    let origin = |sequence| Origin::new(sender.clone(), epoch, sequence);
    Ok(vec![
        NewRecord::new("a0").key("a").origin(origin(1)),
        NewRecord::new("b0").key("b"),
        NewRecord::new("a0").key("a").origin(origin(1)),
        NewRecord::new("a1").key("a").origin(origin(2)),
        NewRecord::new("none"),
        NewRecord::new("a1").key("a").origin(origin(2)),
        NewRecord::new("a2").key("a"),
    ])
}
