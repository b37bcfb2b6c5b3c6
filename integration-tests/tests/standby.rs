//! Several processes with one consumer name and the default settings. One is active. The others
//! stand by and take over.
//!
//! Each case prints its figures. `ESSENTIALLY_ONCE_STANDBY=full` makes the cases long, and holds
//! them to the full bar: at most 1.3 times the time of one process.

use std::{
    env, fs,
    future::Future,
    path::PathBuf,
    pin::Pin,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use essentially_once::{ConsumerId, NewRecord, Offset, backend::Source};
use essentially_once_testkit::Suite;
use integration_tests::{
    Address, Backend, Place, Store,
    worker::{self, Work, Worker},
};
use tempfile::TempDir;
use test_servers::eventually;

/// The default of a consumer.
const STANDBY_AFTER: Duration = Duration::from_secs(1);

/// How long a case may take.
const LIMIT: Duration = Duration::from_secs(200);

fn main() -> ExitCode {
    if let Some(ended) = worker::main() {
        return ended;
    }
    let servers = Arc::<Servers>::default();
    let mut suite = Suite::new();
    for (log, store) in Backend::pairs() {
        let name = format!("log_{}_store_{}", log.name(), store.name());
        let missing = log.missing().or(store.missing());
        let add = |suite: Suite, case: &str, run: fn(Stage) -> Pending| {
            let (name, servers) = (format!("{name}::{case}"), Arc::clone(&servers));
            let stage_name = name.replace("::", "_");
            match &missing {
                Some(why) => suite.ignored(&name, why),
                None => suite.async_test(&name, LIMIT, move || async move {
                    run(Stage::new(&servers, log, store, &stage_name).await?).await
                }),
            }
        };
        suite = add(suite, "three_processes_are_about_as_fast_as_one", |stage| {
            Box::pin(three_are_as_fast_as_one(stage))
        });
        // The other cases depend only on the store.
        if log == store {
            suite = add(suite, "a_long_handler_keeps_its_process_active", |stage| {
                Box::pin(a_long_handler_keeps_its_process_active(stage))
            });
            suite = add(suite, "a_killed_process_is_replaced", |stage| {
                Box::pin(a_process_is_replaced(stage, Worker::kill, Duration::ZERO))
            });
            suite = match store {
                Backend::Sqlite => suite.ignored(
                    &format!("{name}::a_frozen_process_is_replaced"),
                    "a process that is frozen while it holds the file's write lock lets nobody write",
                ),
                // The handler's SQL has locked a row. The server unlocks it after `idle_timeout`.
                Backend::Postgres => add(suite, "a_frozen_process_is_replaced", |stage| {
                    Box::pin(a_process_is_replaced(stage, Worker::freeze, Duration::from_secs(10)))
                }),
                _ => add(suite, "a_frozen_process_is_replaced", |stage| {
                    Box::pin(a_process_is_replaced(stage, Worker::freeze, Duration::ZERO))
                }),
            };
        }
    }
    suite.run()
}

type Pending = std::pin::Pin<Box<dyn Future<Output = Result<(), Source>> + Send>>;

/// The servers of all cases. Each starts for the first case that needs it.
#[derive(Default)]
struct Servers {
    postgres: OnceLock<Result<Place, String>>,
    redis: OnceLock<Result<Place, String>>,
    rabbitmq: OnceLock<Result<Place, String>>,
    kafka: OnceLock<Result<Place, String>>,
}

impl Servers {
    fn address(&self, backend: Backend, folder: &TempDir) -> Result<Address, Source> {
        let start = |server: &OnceLock<Result<Place, String>>, backend: Backend| {
            let place = server.get_or_init(|| backend.start().map_err(|error| error.to_string()));
            place
                .as_ref()
                .map(Place::address)
                .map_err(|error| Source::from(error.clone()))
        };
        match backend {
            Backend::Sqlite => Ok(Address::Sqlite(folder.path().join("test.db"))),
            Backend::Postgres => start(&self.postgres, Backend::Postgres),
            Backend::Redis => start(&self.redis, Backend::Redis),
            Backend::Rabbitmq => start(&self.rabbitmq, Backend::Rabbitmq),
            Backend::Kafka => start(&self.kafka, Backend::Kafka),
            Backend::RabbitmqPacked => Ok(match start(&self.rabbitmq, Backend::Rabbitmq)? {
                Address::Rabbitmq(url) => Address::RabbitmqPacked(url),
                address => address,
            }),
        }
    }
}

/// A log and a store for one case.
struct Stage {
    name: String,
    log: Address,
    store: Address,
    folder: TempDir,
}

impl Stage {
    async fn new(servers: &Arc<Servers>, log: Backend, store: Backend, name: &str) -> Result<Self, Source> {
        let folder = tempfile::tempdir()?;
        let servers = Arc::clone(servers);
        let (folder, log, store) = tokio::task::spawn_blocking(move || {
            let (log, store) = (servers.address(log, &folder), servers.address(store, &folder));
            (folder, log, store)
        })
        .await?;
        Ok(Self {
            name: name.to_owned(),
            log: log?,
            store: store?,
            folder,
        })
    }

    /// A run with `records` records, for the consumer of that name.
    async fn fill(&self, consumer: &str, records: u64, pause: Duration) -> Result<Run, Source> {
        let consumer = format!("{}-{consumer}", self.name);
        let log = self.log.log(&consumer).await?;
        let keyed = |n: u64| NewRecord::new(n.to_string()).key((n % 7).to_string());
        log.append(&(0..records).map(keyed).collect::<Vec<_>>()).await?;
        let calls = self.folder.path().join(format!("{consumer}.calls"));
        Ok(Run {
            end: log.bounds().await?.end,
            store: self.store.store().await?,
            id: ConsumerId::new(&consumer)?,
            work: Work {
                pause,
                standby_after: STANDBY_AFTER,
                calls: Some(calls.clone()),
                ..Work::new(self.log.clone(), self.store.clone(), &consumer, &consumer)
            },
            calls,
            records,
        })
    }
}

struct Run {
    store: Box<dyn Store>,
    id: ConsumerId,
    end: Offset,
    work: Work,
    calls: PathBuf,
    records: u64,
}

impl Run {
    async fn next(&self) -> Result<Option<Offset>, Source> {
        match self.store.position(&self.id).await {
            Ok(position) => Ok(position.map(|position| position.next)),
            // The caller polls again.
            Err(error) if error.is_transient() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the position is at or past `place`. The workers are separate processes, so
    /// polling is the only way to know.
    async fn reaches(&self, place: Offset, workers: &mut [Worker]) -> Result<(), Source> {
        eventually(|| {
            let alive = workers.iter_mut().try_for_each(Worker::check);
            async move {
                alive?;
                Ok(match self.next().await? {
                    next if next >= Some(place) => Ok(()),
                    next => Err(format!("the position is {next:?}, expected {place} or later")),
                })
            }
        })
        .await
    }

    fn calls(&self) -> u64 {
        fs::metadata(&self.calls).map_or(0, |file| file.len())
    }

    /// How long `processes` processes take for all records.
    async fn time(&self, processes: usize) -> Result<Duration, Source> {
        let mut workers = Vec::new();
        for _ in 0..processes {
            workers.push(Worker::start(&self.work)?);
        }
        let started = Instant::now();
        self.reaches(self.end, &mut workers).await?;
        let took = started.elapsed();
        for worker in &mut workers {
            worker.kill()?;
        }
        let counted = self.store.counter(&self.id).await?;
        if counted != self.records {
            return Err(format!("{counted} increments for {} records", self.records).into());
        }
        eprintln!("{processes} processes: {took:?}, {} calls", self.calls());
        Ok(took)
    }

    fn check_calls(&self) -> Result<(), Source> {
        let calls = self.calls();
        match calls * 10 <= self.records * 12 {
            true => Ok(()),
            false => Err(format!("{calls} calls for {} records", self.records).into()),
        }
    }
}

fn is_full() -> bool {
    env::var_os("ESSENTIALLY_ONCE_STANDBY").is_some_and(|value| value == "full")
}

/// A machine that is overloaded for a second makes a live process look dead, so a failed attempt is
/// repeated.
const ATTEMPTS: u32 = 3;

async fn three_are_as_fast_as_one(stage: Stage) -> Result<(), Source> {
    repeat(&stage, |stage, attempt| {
        Box::pin(compare_three_with_one(stage, attempt))
    })
    .await
}

type Measurement<'a> = Pin<Box<dyn Future<Output = Result<(), Source>> + Send + 'a>>;

async fn repeat(stage: &Stage, measure: for<'a> fn(&'a Stage, u32) -> Measurement<'a>) -> Result<(), Source> {
    for attempt in 1..ATTEMPTS {
        match measure(stage, attempt).await {
            Err(error) => eprintln!("attempt {attempt}: {error}"),
            done => return done,
        }
    }
    measure(stage, ATTEMPTS).await
}

async fn compare_three_with_one(stage: &Stage, attempt: u32) -> Result<(), Source> {
    // A short run is mostly start-up, and a busy machine needs leeway.
    let (records, bar) = if is_full() { (500, 1.3) } else { (150, 3.0) };
    let pause = Duration::from_millis(5);
    let alone = stage.fill(&format!("alone-{attempt}"), records, pause).await?;
    let alone = alone.time(1).await?;
    let counts: &[usize] = if is_full() { &[2, 3] } else { &[3] };
    for processes in counts {
        let run = stage.fill(&format!("{processes}-{attempt}"), records, pause).await?;
        let took = run.time(*processes).await?;
        run.check_calls()?;
        if took > alone.mul_f64(bar) {
            return Err(format!("{processes} processes took {took:?}, one took {alone:?}").into());
        }
    }
    Ok(())
}

async fn a_long_handler_keeps_its_process_active(stage: Stage) -> Result<(), Source> {
    repeat(&stage, |stage, attempt| {
        Box::pin(count_calls_of_a_long_handler(stage, attempt))
    })
    .await
}

async fn count_calls_of_a_long_handler(stage: &Stage, attempt: u32) -> Result<(), Source> {
    // Longer than a standby waits.
    let (records, pause) = match is_full() {
        true => (10, Duration::from_secs(5)),
        false => (3, 2 * STANDBY_AFTER),
    };
    let run = stage.fill(&format!("long-{attempt}"), records, pause).await?;
    run.time(3).await?;
    run.check_calls()
}

/// `locks` is how long the store lets a process that stands still keep its locks.
async fn a_process_is_replaced(
    stage: Stage,
    end: fn(&mut Worker) -> Result<(), Source>,
    locks: Duration,
) -> Result<(), Source> {
    let run = stage.fill("replaced", 2_000, Duration::from_millis(5)).await?;
    let mut active = [Worker::start(&run.work)?];
    run.reaches(Offset::ZERO.successor(), &mut active).await?;
    let mut standby = [Worker::start(&run.work)?];
    // A standby has begun to watch once it has started. Until then the active one continues.
    let before = run.next().await?.unwrap_or_default();
    run.reaches(before.successor(), &mut active).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    end(&mut active[0])?;
    let ended = Instant::now();
    // Commits in flight may still arrive.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let last = run.next().await?.unwrap_or_default();
    run.reaches(last.successor(), &mut standby).await?;
    let took = ended.elapsed();
    eprintln!("replaced after {took:?}");
    // One batch, plus leeway for a busy machine.
    let leeway = match is_full() {
        true => Duration::from_millis(500),
        false => Duration::from_secs(10),
    };
    let bar = STANDBY_AFTER + locks + leeway;
    match took {
        took if took > bar => Err(format!("the standby took over after {took:?}").into()),
        took if took < STANDBY_AFTER / 2 => Err(format!("the standby took over after {took:?}, too early").into()),
        _ => Ok(()),
    }
}
