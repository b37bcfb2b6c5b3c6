//! The memory that a consumer uses while it drains a log whose records grow, for every log.
//!
//! Each case runs a consumer in its own process and prints that process's peak above an idle
//! consumer. Only Linux reports peaks, so the cases are ignored elsewhere.

use std::{
    env, fs,
    io::{self, Write as _},
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    time::Duration,
};

use essentially_once::{
    Consumer, ConsumerId, Handler, Log, NewRecord, Record,
    backend::Source,
    consumer::AtLeastOnce,
    handler_fn,
    memory::{Memory, MemoryStore},
};
use essentially_once_testkit::Suite;
use integration_tests::{Address, Backend};

const VARIABLE: &str = "ESSENTIALLY_ONCE_TEST_MEMORY";
const SMALL_LOG: &str = "small";
const GROWING_LOG: &str = "growing";
const MIB: usize = 1024 * 1024;

/// Small records train a reader to fetch many at once.
const SMALL: usize = 12_000;

/// This many large records would fill 256 MiB if nothing limited their bytes.
const LARGE: usize = 256;

/// How long a case may take.
const LIMIT: Duration = Duration::from_secs(200);

fn main() -> ExitCode {
    if let Ok(address) = env::var(VARIABLE) {
        return match drain(&address).and_then(report) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let mut suite = Suite::new();
    for log in Backend::LOGS {
        let name = format!("{}::growing_records_do_not_fill_the_memory", log.name());
        let missing = log.missing().or_else(|| {
            (log == Backend::Kafka)
                .then(|| "the broker of these tests sends all it has at once, whatever the client's limit".into())
        });
        let missing = missing.or_else(|| {
            (!cfg!(target_os = "linux")).then(|| "only Linux reports the peak of a process's memory".into())
        });
        suite = match missing {
            Some(why) => suite.ignored(&name, &why),
            None => suite.async_test(&name, LIMIT, move || check(log)),
        };
    }
    suite.run()
}

/// Reports the peak to the parent.
fn report(peak: u64) -> Result<(), Source> {
    Ok(writeln!(io::stdout(), "{peak}")?)
}

async fn check(backend: Backend) -> Result<(), Source> {
    let place = tokio::task::spawn_blocking(move || backend.start().map_err(|error| error.to_string())).await??;
    let small: Vec<_> = (0..SMALL).map(|n| NewRecord::new(n.to_string())).collect();
    place.address().log(SMALL_LOG).await?.append(&small).await?;
    let log = place.address().log(GROWING_LOG).await?;
    log.append(&small).await?;
    for _ in 0..LARGE / 8 {
        log.append(&vec![NewRecord::new(vec![0; MIB]); 8]).await?;
    }
    let mut consumer = Command::new(env::current_exe()?);
    consumer
        .env(VARIABLE, serde_json::to_string(&place.address())?)
        .stderr(Stdio::inherit());
    let output = tokio::task::spawn_blocking(move || consumer.output()).await??;
    let peak: u64 = String::from_utf8(output.stdout)?.trim().parse()?;
    let bar = bar(backend);
    eprintln!("{backend:?}: {peak} KiB above an idle consumer");
    match peak > bar {
        true => Err(format!("{peak} KiB above an idle consumer, over {bar}").into()),
        false => Ok(()),
    }
}

/// The allowed memory, in KiB: what the consumer may hold (4 MiB), a fetch and a record, each
/// doubled for the client library's buffers, and 2 MiB for the allocator. RabbitMQ pushes up to 8
/// messages before the reader notices that they have grown, and on a busy machine each of them may
/// be in memory three times at once: as frames, as a message and as a record.
fn bar(backend: Backend) -> u64 {
    let consumer = 2 * (4 + 1 + 1) + 2;
    let pushed = match backend {
        Backend::Sqlite | Backend::Postgres | Backend::Redis | Backend::Kafka => 0,
        Backend::Rabbitmq | Backend::RabbitmqPacked => 3 * 8,
    };
    (consumer + pushed) * 1024
}

/// Drains the log, and returns this process's peak above the memory of an idle consumer, in KiB.
fn drain(address: &str) -> Result<u64, Source> {
    let address: Address = serde_json::from_str(address)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // A consumer that has drained its log once is idle.
        consumer(address.log(SMALL_LOG).await?)?.run_until_caught_up().await?;
        // Resets the peak to the current size. See proc(5).
        fs::write("/proc/self/clear_refs", "5")?;
        let before = status("VmRSS:")?;
        let growing = consumer(address.log(GROWING_LOG).await?)?;
        let report = growing.run_until_caught_up().await?;
        if report.handled != (SMALL + LARGE) as u64 {
            return Err(format!("handled {report}").into());
        }
        Ok(status("VmHWM:")?.saturating_sub(before))
    })
}

fn consumer(log: Arc<dyn Log>) -> Result<Consumer<MemoryStore, impl Handler<()>, AtLeastOnce>, Source> {
    let handler = handler_fn(|record: &Record, _: &mut ()| {
        let is_large = record.payload.len() == MIB;
        Box::pin(async move {
            if is_large {
                // Slower than the reader, so that it reads as far ahead as possible.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(())
        })
    });
    let store = Memory::new().store();
    Ok(Consumer::at_least_once(
        ConsumerId::new("draining")?,
        log,
        store,
        handler,
    ))
}

/// A line of this process's status, in KiB.
fn status(name: &str) -> Result<u64, Source> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|line| line.split_whitespace().next());
    Ok(value.ok_or_else(|| format!("no {name}"))?.parse()?)
}
