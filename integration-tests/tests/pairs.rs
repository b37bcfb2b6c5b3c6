//! Logs with stores, with the same portable handler and the same check. Meanwhile workers
//! are killed and frozen, servers are killed, and the sender resends records in doubt.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use essentially_once::{ConsumerId, Epoch, Error, Log, NewRecord, Offset, Origin, ProducerId, backend::Source};
use essentially_once_testkit::{Check, Expectation, Suite, read_log};
use integration_tests::{
    Backend, Place, Store,
    worker::{self, Work, Worker},
};
use test_servers::insist;

/// The least number of records. More are sent if the servers take long to restart, because workers
/// must have something to handle meanwhile.
const RECORDS: u64 = 5_000;
const KILLS: u32 = 3;
/// The log's name.
const LOG: &str = "orders";

/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(240);

fn main() -> ExitCode {
    if let Some(ended) = worker::main() {
        return ended;
    }
    let mut suite = Suite::new();
    for (log, store) in Backend::pairs() {
        let name = format!("log_{}_store_{}", log.name(), store.name());
        suite = match log.missing().or(store.missing()) {
            Some(why) => suite.ignored(&name, &why),
            None => suite.async_test(&name, 2 * LIMIT, move || run(log, store)),
        };
    }
    suite.run()
}

async fn run(log: Backend, store: Backend) -> Result<(), Source> {
    let (log, store) = (log.start()?, store.start()?);
    let work = Work {
        max_batch: 20,
        pause: Duration::from_micros(500),
        long_every: None,
        long_pause: Duration::ZERO,
        ..Work::new(log.address(), store.address(), LOG, "shipping")
    };
    let pair = Pair {
        log: insist(|| work.log.log(LOG)).await?,
        store: insist(|| work.store.store()).await?,
        places: [log, store],
        consumer: ConsumerId::new("shipping")?,
        work,
        started: Instant::now(),
        disturbed: AtomicBool::new(false),
    };
    let sent = AtomicBool::new(false);
    let sending = async {
        let count = pair.send().await?;
        sent.store(true, Ordering::Release);
        Ok::<_, Source>(count)
    };
    let (count, ()) = tokio::try_join!(sending, pair.disturb(&sent))?;
    pair.judge(count).await
}

struct Pair {
    log: std::sync::Arc<dyn Log>,
    store: Box<dyn Store>,
    places: [Place; 2],
    consumer: ConsumerId,
    work: Work,
    started: Instant,
    /// Set when all disturbances are done.
    disturbed: AtomicBool,
}

impl Pair {
    /// Appends all records in order, and returns their number. Resends records in doubt with the
    /// same origin, as senders do.
    async fn send(&self) -> Result<u64, Source> {
        const CHUNK: u64 = 50;
        let producer = ProducerId::new("web")?;
        let record = |n: u64| {
            NewRecord::new(n.to_string())
                .key((n % 7).to_string())
                .origin(Origin::new(producer.clone(), Epoch::STABLE, n))
        };
        let mut next = 0;
        while next < RECORDS || !self.disturbed.load(Ordering::Acquire) {
            if next >= RECORDS {
                // About as fast as a worker.
                tokio::time::sleep(Duration::from_millis(40)).await;
            }
            let records: Vec<NewRecord> = (next..next + CHUNK).map(record).collect();
            while let Err(error) = self.log.append(&records).await {
                self.go_on_after(error).await?;
            }
            next += CHUNK;
        }
        Ok(next)
    }

    /// Kills, freezes and restarts until each was done. Then waits until everything is handled.
    async fn disturb(&self, sent: &AtomicBool) -> Result<(), Source> {
        let mut worker = Worker::start(&self.work)?;
        for kill in 1..=KILLS {
            self.move_on(&mut [&mut worker]).await?;
            tokio::time::sleep(Duration::from_micros(fastrand::u64(..20_000))).await;
            worker.kill()?;
            worker = Worker::start(&self.work)?;
            if kill == 2 {
                self.move_on(&mut [&mut worker]).await?;
                for place in &self.places {
                    place.restart()?;
                }
            }
        }
        let mut successor = self.freeze_past_a_take_over(&mut worker).await?;
        self.disturbed.store(true, Ordering::Release);
        while !sent.load(Ordering::Acquire) || self.next().await? < Some(self.end().await?) {
            self.wait(&mut [&mut worker, &mut successor]).await?;
        }
        worker.kill()?;
        successor.kill()
    }

    /// Freezes one of two workers until the other has committed past it, so that the frozen one
    /// wakes up after a take-over.
    async fn freeze_past_a_take_over(&self, worker: &mut Worker) -> Result<Worker, Source> {
        /// A worker frozen while it holds a file's lock blocks every take-over. Then it is the
        /// other worker's turn.
        const PATIENCE: Duration = Duration::from_secs(1);
        self.move_on(&mut [worker]).await?;
        let mut successor = Worker::start(&self.work)?;
        for turn in 0_usize.. {
            self.move_on(&mut [worker, &mut successor]).await?;
            tokio::time::sleep(Duration::from_micros(fastrand::u64(..50_000))).await;
            let frozen = match turn.is_multiple_of(2) {
                true => &mut *worker,
                false => &mut successor,
            };
            frozen.freeze()?;
            let (since, before) = (Instant::now(), self.next().await?);
            let mut took_over = false;
            while !took_over && since.elapsed() < PATIENCE {
                self.wait(&mut [frozen]).await?;
                took_over = self.next().await? > before;
            }
            frozen.thaw()?;
            if took_over {
                break;
            }
        }
        Ok(successor)
    }

    /// Waits until the position has moved.
    async fn move_on(&self, workers: &mut [&mut Worker]) -> Result<(), Source> {
        let before = self.next().await?;
        while self.next().await? <= before {
            self.wait(workers).await?;
        }
        Ok(())
    }

    /// Pauses between two polls. The workers are separate processes, so polling is the only way to
    /// know.
    async fn wait(&self, workers: &mut [&mut Worker]) -> Result<(), Source> {
        for worker in workers {
            worker.check()?;
        }
        if self.started.elapsed() > LIMIT {
            return Err(format!("not done within {LIMIT:?}, the position is {:?}", self.next().await?).into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        Ok(())
    }

    async fn next(&self) -> Result<Option<Offset>, Source> {
        loop {
            match self.store.position(&self.consumer).await {
                Ok(position) => return Ok(position.map(|position| position.next)),
                Err(error) => self.go_on_after(error).await?,
            }
        }
    }

    async fn end(&self) -> Result<Offset, Source> {
        loop {
            match self.log.bounds().await {
                Ok(bounds) => return Ok(bounds.end),
                Err(error) => self.go_on_after(error).await?,
            }
        }
    }

    /// A killed server comes back soon, so its transient errors pass. All others are returned.
    async fn go_on_after(&self, error: Error) -> Result<(), Source> {
        if !error.is_transient() || self.started.elapsed() > LIMIT {
            return Err(error.into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        Ok(())
    }

    async fn judge(&self, sent: u64) -> Result<(), Source> {
        let records = insist(|| read_log(&*self.log)).await?;
        let applied = insist(|| self.store.ledger(&self.consumer)).await?;
        let position = insist(|| self.store.position(&self.consumer)).await?;
        let check = Check::new(&records, &applied).position(position.as_ref()).drained();
        check.findings().judge(Expectation::EssentiallyOnce)?;
        let counter = insist(|| self.store.counter(&self.consumer)).await?;
        eprintln!("{} records in the log, {counter} handled", records.len());
        match (applied.len() as u64, counter) {
            (applied, counter) if (applied, counter) == (sent, sent) => Ok(()),
            (applied, counter) => {
                Err(format!("{sent} records were sent, {applied} were applied, {counter} were counted").into())
            }
        }
    }
}
