//! One run of a plan: a log, a consumer, what it did, and the verdict.

use std::{future::Future, time::Duration};

use essentially_once::{
    Consumer, ConsumerId, Epoch, Error, Handler, HandlerError, Log, NewRecord, Offset, OffsetStore, Origin, ProducerId,
    Record, async_trait, backend::Durability, consumer::Delivery,
};
use tokio::time::sleep;

use super::{
    control::{Faults, Process},
    driver::drive,
    plan::Plan,
    wrappers::{FaultyHandler, FaultyLog, FaultyStore, FaultyTx},
};
use crate::{
    cases::{
        common::payloads,
        outbox::{found_of, outbox},
        outbox_numbers::continued,
    },
    checker::{Applied, Check, Expectation, read_log},
    harness::Backend,
    ledger::{Ledger, MemoryLedger, read_ledger},
    violation::Violation,
};

pub(super) struct Scene<'b, B> {
    pub(super) backend: &'b B,
    /// The name of the log and of the consumer.
    pub(super) name: String,
    pub(super) delivery: Expectation,
    pub(super) max_batch: usize,
    /// The consumer's shortest and longest backoff.
    pub(super) pauses: (Duration, Duration),
    /// How long a consumer stays frozen at most. Forever if `None`.
    pub(super) patience: Option<Duration>,
    /// Whether handlers also write natively.
    pub(super) is_native: bool,
    /// Whether handlers also send a record.
    pub(super) sends: bool,
}

/// What the consumers of a run share.
struct Stage {
    consumer: ConsumerId,
    /// Holds the effects of the deliveries without a transaction.
    ledger: MemoryLedger,
    accept_volatile: bool,
}

impl<B: Backend> Scene<'_, B> {
    pub(super) async fn play(&self, faults: &Faults) -> Result<(), Violation> {
        let log = self.backend.log(&self.name).await?;
        log.append(&messages()?).await?;
        let records = read_log(&*log).await?;
        let stage = Stage {
            consumer: ConsumerId::new(&self.name)?,
            ledger: MemoryLedger::new(),
            accept_volatile: is_volatile(log.durability().await?)
                || is_volatile(self.backend.store().await?.durability().await?),
        };
        drive(
            faults,
            self.patience,
            |process| Box::pin(self.consume(&stage, process)),
            |_, _| Box::pin(async { Err(Error::failed("call an operator", "this run has no dead letters")) }),
        )
        .await?;
        self.judge(&stage, &records, false).await?;
        let clean = Faults::new(Plan::none());
        self.consume(&stage, clean.process())
            .await
            .map_err(|error| Violation::new(format!("one more consumer, without faults, gave up: {error}")))?;
        self.judge(&stage, &records, true).await
    }

    /// Runs one consumer on its own handles until it has caught up.
    async fn consume(&self, stage: &Stage, process: Process) -> Result<(), Error> {
        let process = &process;
        let log = FaultyLog::new(patiently(|| self.backend.log(&self.name)).await?, process);
        let store = FaultyStore::new(patiently(|| self.backend.store()).await?, process);
        let id = stage.consumer.clone();
        let in_memory = FaultyHandler::new(stage.ledger.clone(), process);
        match self.delivery {
            Expectation::EssentiallyOnce => {
                let ledger = SceneLedger { scene: self };
                let in_store = FaultyHandler::new(ledger, process);
                let consumer = Consumer::essentially_once(id, log, store, in_store);
                self.catch_up(stage, consumer).await
            }
            Expectation::AtLeastOnce => {
                let consumer = Consumer::at_least_once(id, log, store, in_memory);
                self.catch_up(stage, consumer).await
            }
            Expectation::AtMostOnce => {
                let consumer = Consumer::at_most_once(id, log, store, in_memory);
                self.catch_up(stage, consumer).await
            }
        }
    }

    async fn catch_up<S, H, D>(&self, stage: &Stage, consumer: Consumer<S, H, D>) -> Result<(), Error>
    where
        S: OffsetStore,
        D: Delivery<S>,
        H: Handler<D::Tx>,
    {
        let mut consumer = tuned(consumer, self.max_batch, self.pauses);
        if stage.accept_volatile {
            consumer = consumer.accept_volatile();
        }
        consumer.run_until_caught_up().await?;
        Ok(())
    }

    async fn judge(&self, stage: &Stage, records: &[Record], is_drained: bool) -> Result<(), Violation> {
        let store = self.backend.store().await?;
        let position = store.position(&stage.consumer).await?;
        let applied = match self.delivery {
            Expectation::EssentiallyOnce => read_ledger(&store, &stage.consumer).await?,
            Expectation::AtLeastOnce | Expectation::AtMostOnce => stage.ledger.applied(),
        };
        let mut check = Check::new(records, &applied).position(position.as_ref());
        if is_drained {
            check = check.drained();
        }
        check.findings().judge(self.delivery)?;
        self.judge_natively(records, &applied).await?;
        self.judge_sent(&applied).await?;
        let (next, last) = (position.map(|position| position.next), records.last());
        if last.is_some_and(|last| next.is_none_or(|next| next <= last.offset)) {
            let next = next.map_or("none".into(), |next| next.to_string());
            return Err(Violation::new(format!(
                "the consumers had caught up, but the position is {next}"
            )));
        }
        Ok(())
    }
}

impl<B: Backend> Scene<'_, B> {
    /// Checks that the native writes match the applied records, record by record.
    async fn judge_natively(&self, records: &[Record], applied: &[Applied]) -> Result<(), Violation> {
        if !self.is_native || self.delivery != Expectation::EssentiallyOnce {
            return Ok(());
        }
        for record in records {
            let times = applied.iter().filter(|applied| applied.offset == record.offset).count();
            let natively = self.backend.native_count(&self.native_name(record.offset)).await?;
            if natively != times as u64 {
                return Err(Violation::new(format!(
                    "native writes and state differ: {} was applied {times} times, and natively {natively} times",
                    record.offset
                )));
            }
        }
        Ok(())
    }

    /// Checks that exactly the applied records were sent on, in the order of their application.
    async fn judge_sent(&self, applied: &[Applied]) -> Result<(), Violation> {
        if !self.sends || self.delivery != Expectation::EssentiallyOnce || applied.is_empty() {
            return Ok(());
        }
        let consumer = ConsumerId::new(&self.name)?;
        let records = found_of(self.backend, &consumer, &self.outbox_name()).await?;
        let sent = payloads(&records);
        let applied: Vec<_> = applied.iter().map(|applied| applied.offset.to_string()).collect();
        match sent == applied {
            true => continued("in the outbox", None, &records).map(drop),
            false => Err(Violation::new(format!(
                "sent records and state differ: {applied:?} were applied, and {sent:?} were sent"
            ))),
        }
    }

    fn outbox_name(&self) -> String {
        format!("{}-outbox", self.name)
    }

    fn native_name(&self, offset: Offset) -> String {
        format!("{}-{}-{}", self.name, offset.hi(), offset.lo())
    }
}

/// A [`Ledger`] that also writes natively and sends a record, where the backend can.
struct SceneLedger<'s, 'b, B> {
    scene: &'s Scene<'b, B>,
}

#[async_trait]
impl<B: Backend> Handler<FaultyTx<<B::Store as OffsetStore>::Tx>> for SceneLedger<'_, '_, B> {
    async fn handle(
        &mut self,
        record: &Record,
        tx: &mut FaultyTx<<B::Store as OffsetStore>::Tx>,
    ) -> Result<(), HandlerError> {
        Ledger.handle(record, tx).await?;
        if self.scene.is_native {
            let name = self.scene.native_name(record.offset);
            tx.natively(async |tx| self.scene.backend.native_put(tx, &name).await)
                .await?;
        }
        if self.scene.sends {
            let name = self.scene.backend.outbox_name(&self.scene.outbox_name());
            outbox(tx)?
                .send(&name, NewRecord::new(record.offset.to_string()))
                .await?;
        }
        Ok(())
    }
}

/// Two keys, one message that is sent twice, and a later one that may not be reordered with it.
fn messages() -> Result<Vec<NewRecord>, Error> {
    let origin = Origin::new(ProducerId::new("sender")?, Epoch::fresh(), 1);
    Ok(vec![
        NewRecord::new("0").key("a").origin(origin.clone()),
        NewRecord::new("1").key("b"),
        NewRecord::new("0").key("a").origin(origin),
        NewRecord::new("3").key("a"),
    ])
}

/// Sets up a consumer whose faults strike in as many places as possible, and without waiting.
pub(super) fn tuned<S, H, D>(
    consumer: Consumer<S, H, D>,
    max_batch: usize,
    (first, longest): (Duration, Duration),
) -> Consumer<S, H, D>
where
    S: OffsetStore,
    D: Delivery<S>,
    H: Handler<D::Tx>,
{
    consumer
        .max_batch(max_batch)
        // As small as possible, so that reading and handling alternate and more faults fall between
        // them.
        .read_ahead_records(max_batch)
        .read_ahead_bytes(1024 * 1024)
        .min_backoff(first)
        .max_backoff(longest)
        // Zombies should be fenced at their commits. Nobody should wait for them.
        .standby_after(Duration::ZERO)
}

pub(super) fn is_volatile(durability: Durability) -> bool {
    matches!(durability, Durability::Volatile(_))
}

/// Opens a handle. That may need a lock that a frozen consumer holds for a while.
pub(super) async fn patiently<T, F: Future<Output = Result<T, Error>>>(open: impl Fn() -> F) -> Result<T, Error> {
    loop {
        match open().await {
            Err(error) if error.is_transient() => sleep(Duration::from_millis(10)).await,
            result => return result,
        }
    }
}
