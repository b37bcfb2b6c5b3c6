//! Two processes with one consumer name, disturbed in four ways. In every case, exactly as many
//! increments are committed as there are records.
//!
//! Under the same disturbances, another library's "atomic" mode, which checks no revision, made 400
//! increments for 200 records (a), 3,640 for 3,000 (b) and 1,176 for 600 (c).

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use essentially_once::{ConsumerId, Log, NewRecord, backend::Source};
use essentially_once_testkit::{Check, Expectation, Suite, read_log};
use integration_tests::{
    Backend, Store,
    worker::{self, Work, Worker},
};
use test_servers::insist;

/// The probes, with their numbers of records.
const PROBES: [(&str, u64, Disturbance); 4] = [
    ("a_every_50th_record_takes_long", 200, Disturbance::LongRecords),
    ("b_one_process_is_frozen_ten_times", 3_000, Disturbance::Freezes),
    ("c_every_record_takes_20_ms", 600, Disturbance::SlowRecords),
    ("d_processes_are_killed_20_times", 2_000, Disturbance::Kills),
];

/// The log's name.
const LOG: &str = "orders";

/// How long a probe may take. An idle machine needs 50 seconds at most, and one whose cores are
/// kept busy by others several times that.
const LIMIT: Duration = Duration::from_secs(400);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Disturbance {
    LongRecords,
    Freezes,
    SlowRecords,
    Kills,
}

fn main() -> ExitCode {
    if let Some(ended) = worker::main() {
        return ended;
    }
    let mut suite = Suite::new();
    for (log, store) in Backend::alone() {
        for (probe, records, disturbance) in PROBES {
            let name = format!("{}::{probe}", log.name());
            suite = match log.missing().or(store.missing()) {
                Some(why) => suite.ignored(&name, &why),
                None => suite.async_test(&name, 2 * LIMIT, move || run(log, store, records, disturbance)),
            };
        }
    }
    suite.run()
}

async fn run(log: Backend, store: Backend, records: u64, disturbance: Disturbance) -> Result<(), Source> {
    let place = log.start()?;
    let other = if log == store { None } else { Some(store.start()?) };
    let addresses = [place.address(), other.as_ref().unwrap_or(&place).address()];
    let log = insist(|| addresses[0].log(LOG)).await?;
    let store = insist(|| addresses[1].store()).await?;
    let keyed = |n: u64| NewRecord::new(n.to_string()).key((n % 7).to_string());
    log.append(&(0..records).map(keyed).collect::<Vec<_>>()).await?;
    let work = Work {
        max_batch: match disturbance {
            Disturbance::LongRecords | Disturbance::SlowRecords => 10,
            Disturbance::Freezes | Disturbance::Kills => 20,
        },
        pause: match disturbance {
            Disturbance::LongRecords => Duration::from_millis(1),
            Disturbance::SlowRecords => Duration::from_millis(20),
            // Makes the records last as long as the disturbances.
            Disturbance::Freezes => Duration::from_millis(4),
            Disturbance::Kills => Duration::from_millis(1),
        },
        long_every: (disturbance == Disturbance::LongRecords).then_some(50),
        long_pause: Duration::from_millis(1_500),
        ..Work::new(addresses[0].clone(), addresses[1].clone(), LOG, "zombie")
    };
    let mut workers = [Worker::start(&work)?, Worker::start(&work)?];
    let probe = Probe {
        work,
        store: &*store,
        log: &*log,
        records,
        consumer: ConsumerId::new("zombie")?,
        started: Instant::now(),
    };
    match disturbance {
        Disturbance::Freezes => probe.freeze(&mut workers[0], 10).await?,
        Disturbance::Kills => probe.kill(&mut workers, 20).await?,
        Disturbance::LongRecords | Disturbance::SlowRecords => {}
    }
    probe.reach(records, &mut workers).await?;
    for worker in &mut workers {
        worker.kill()?;
    }
    probe.judge().await
}

struct Probe<'a> {
    work: Work,
    store: &'a dyn Store,
    log: &'a dyn Log,
    records: u64,
    consumer: ConsumerId,
    started: Instant,
}

impl Probe<'_> {
    /// Freezes the worker `times` times for 1.2 seconds each, spread over the records.
    async fn freeze(&self, worker: &mut Worker, times: u64) -> Result<(), Source> {
        for time in 0..times {
            self.reach(self.records * time / (times + 2), std::slice::from_mut(worker))
                .await?;
            worker.freeze()?;
            tokio::time::sleep(Duration::from_millis(1_200)).await;
            worker.thaw()?;
        }
        Ok(())
    }

    /// Kills one worker or the other and starts it again, at random moments spread over the
    /// records.
    async fn kill(&self, workers: &mut [Worker; 2], times: u64) -> Result<(), Source> {
        for time in 0..times {
            self.reach(self.records * time / (times + 2), workers).await?;
            tokio::time::sleep(Duration::from_micros(fastrand::u64(..20_000))).await;
            let victim = fastrand::usize(..workers.len());
            workers[victim].kill()?;
            workers[victim] = Worker::start(&self.work)?;
        }
        Ok(())
    }

    /// Waits until `increments` increments are committed. The workers are separate processes, so
    /// polling is the only way to know.
    async fn reach(&self, increments: u64, workers: &mut [Worker]) -> Result<(), Source> {
        while self.reached().await? < increments {
            for worker in &mut *workers {
                worker.check()?;
            }
            if self.started.elapsed() > LIMIT {
                return Err(format!("{increments} increments were not committed within {LIMIT:?}").into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// The number of increments committed so far. Two workers that pass a file's lock back and
    /// forth may starve this query. Then it is repeated.
    async fn reached(&self) -> Result<u64, Source> {
        match self.store.counter(&self.consumer).await {
            Err(error) if error.is_transient() => Ok(0),
            counted => Ok(counted?),
        }
    }

    async fn judge(&self) -> Result<(), Source> {
        let counter = insist(|| self.store.counter(&self.consumer)).await?;
        eprintln!("{counter} increments for {} records", self.records);
        if counter != self.records {
            return Err(format!("{counter} increments for {} records", self.records).into());
        }
        let records = insist(|| read_log(self.log)).await?;
        let applied = insist(|| self.store.ledger(&self.consumer)).await?;
        let position = insist(|| self.store.position(&self.consumer)).await?;
        let check = Check::new(&records, &applied).position(position.as_ref()).drained();
        check.findings().judge(Expectation::EssentiallyOnce)?;
        Ok(())
    }
}
