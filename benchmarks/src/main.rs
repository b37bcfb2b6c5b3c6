//! Measures the library against hand-written loops with the same backend, durability and work.
//!
//! Absolute figures vary by the hour on a shared machine. So both sides run alternately in one
//! process, on fresh files in the same folder or on one private server. The ratio within each round
//! is what counts.

#![allow(clippy::print_stdout, reason = "a command-line program")]

mod appends;
mod instructions;
mod kafka;
mod latency;
mod letters;
mod postgres;
mod rabbitmq;
mod recovery;
mod redis;
mod relay;
mod sqlite;

use std::{error::Error, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};

/// Compares hand-written loops with this library, alternately in one run.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    backend: Backend,
    /// How often each side runs at each batch size.
    #[arg(long, global = true, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The batch sizes to measure.
    #[arg(long = "batch", global = true, value_delimiter = ',', default_values_t = BATCHES)]
    batches: Vec<usize>,
    /// Where to put the files. The default is a temporary folder.
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    /// How many counters the records are spread over, on Redis and PostgreSQL.
    #[arg(long, global = true, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    counters: u64,
    /// Exit with status 1 if a median ratio is below this.
    #[arg(long, global = true)]
    require: Option<f64>,
}

#[derive(Subcommand)]
enum Backend {
    /// SQLite, WAL and synchronous=FULL: one counter update per record, with the offset in the same
    /// commit.
    Sqlite,
    /// Redis, AOF with appendfsync=always, on a private server: XREAD, then one HINCRBY per record
    /// and the offset in one step.
    Redis,
    /// PostgreSQL with its own settings, on a private server: a batch is read, counted with one
    /// statement, and committed with the offset if nobody else has moved it.
    Postgres {
        /// How the handler counts.
        write: postgres::Write,
    },
    /// Appends to PostgreSQL by many processes at once, or one table for all logs against a table
    /// per log. Ignores batch sizes, counters and `--require`.
    Appends(appends::AppendsArguments),
    #[command(hide = true)]
    Appender(appends::Appender),
    /// Kafka's protocol, on a private broker: appending, or consuming into SQLite or PostgreSQL.
    Kafka {
        /// What to measure.
        part: kafka::Part,
    },
    /// RabbitMQ streams on a private node: publishing with confirms, and consuming into SQLite,
    /// plain and packed. Ignores batch sizes.
    Rabbitmq,
    /// A relay from an outbox on SQLite to a bus, or past a million records that were relayed.
    Relay {
        /// Where the relay sends records, or `behind`.
        bus: relay::Bus,
    },
    /// How long an order takes from its commit, with an outbox on SQLite, to a bus, at 100 orders
    /// per second. Ignores batch sizes and `--require`.
    Latency(latency::LatencyArguments),
    /// How long the store on RabbitMQ takes to rebuild its state, by keys and by commits since the
    /// snapshot.
    Recovery,
    /// The price of dead letters on SQLite: of records that are parked, of many letters in the
    /// file, and of what an operator does to many of them. Ignores batch sizes.
    Letters,
    /// What the option to keep dead letters costs a record that is handled. Needs Valgrind, and
    /// ignores all other options.
    Healthy,
    /// What the loop costs a record: instructions and allocations, on the in-memory backend. Needs
    /// Valgrind, and ignores all other options but the batch sizes.
    Core,
    #[command(hide = true)]
    Counted(instructions::Work),
}

/// One measured row of the table.
struct Row {
    label: String,
    /// Chosen so that a round takes about a second.
    records: u64,
    batch: usize,
}

/// The same work on both sides. Each name is used once.
trait Contest {
    /// The rows: one per batch size, or others.
    fn rows(&self, batches: &[usize]) -> Vec<Row>;

    /// The loop that a user writes without a library.
    fn by_hand(&self, name: &str, row: &Row) -> Result<Duration>;

    /// The same work through the library.
    fn ours(&self, name: &str, row: &Row) -> Result<Duration>;
}

/// One row per batch size, with as many records as the backend handles in about a second.
fn by_batch(batches: &[usize], records: impl Fn(usize) -> u64) -> Vec<Row> {
    let row = |batch: &usize| Row {
        label: format!("batch {batch}"),
        records: records(*batch),
        batch: *batch,
    };
    batches.iter().map(row).collect()
}

type Failure = Box<dyn Error + Send + Sync>;
type Result<T, E = Failure> = std::result::Result<T, E>;

const BATCHES: [usize; 4] = [1, 10, 100, 1_000];
const PAYLOAD: [u8; 100] = [b'x'; 100];

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let folder = match &arguments.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let contest: Box<dyn Contest> = match arguments.backend {
        Backend::Sqlite => Box::new(sqlite::Files(folder)),
        Backend::Rabbitmq => Box::new(rabbitmq::Node::start(folder)?),
        Backend::Kafka { part } => Box::new(kafka::Broker::start(part, arguments.counters, folder)?),
        Backend::Postgres { write } => Box::new(postgres::Server::start(arguments.counters, write)?),
        Backend::Redis => Box::new(redis::Server::start(arguments.counters)?),
        Backend::Relay { bus } => Box::new(relay::Relays::start(bus, folder)?),
        Backend::Appends(appends) => return appends::measure(&appends, arguments.rounds).map(|()| ExitCode::SUCCESS),
        Backend::Appender(appender) => return appends::append(&appender).map(|()| ExitCode::SUCCESS),
        Backend::Latency(latency) => {
            return latency::measure(latency, arguments.rounds, folder).map(|()| ExitCode::SUCCESS);
        }
        Backend::Healthy => return instructions::healthy(folder.path()).map(|()| ExitCode::SUCCESS),
        Backend::Core => return instructions::core(folder.path(), &arguments.batches).map(|()| ExitCode::SUCCESS),
        Backend::Counted(work) => return instructions::work(&work).map(|()| ExitCode::SUCCESS),
        Backend::Letters => return letters::measure(arguments.rounds, &folder).map(|()| ExitCode::SUCCESS),
        Backend::Recovery => return recovery::measure(arguments.rounds).map(|()| ExitCode::SUCCESS),
    };
    println!(
        "{} rounds; records/s are medians, the ratio is ours / by hand, round by round",
        arguments.rounds
    );
    println!("| | by hand, records/s | ours, records/s | ratio, median | min | max |");
    println!("|---|---|---|---|---|---|");
    let mut worst = f64::INFINITY;
    for (number, row) in contest.rows(&arguments.batches).iter().enumerate() {
        let (mut by_hand, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..arguments.rounds {
            let run_by_hand = || contest.by_hand(&format!("hand-{number}-{round}"), row);
            let run_ours = || contest.ours(&format!("ours-{number}-{round}"), row);
            // The first side finds a quieter disk, so they alternate.
            let (hand, our) = if round % 2 == 0 {
                let hand = run_by_hand()?;
                (hand, run_ours()?)
            } else {
                let our = run_ours()?;
                (run_by_hand()?, our)
            };
            let rate = |time: Duration| row.records as f64 / time.as_secs_f64();
            by_hand.push(rate(hand));
            ours.push(rate(our));
            ratios.push(hand.as_secs_f64() / our.as_secs_f64());
        }
        ratios.sort_by(f64::total_cmp);
        let ratio = median(&mut ratios);
        worst = worst.min(ratio);
        println!(
            "| {} | {:.0} | {:.0} | {ratio:.2} | {:.2} | {:.2} |",
            row.label,
            median(&mut by_hand),
            median(&mut ours),
            ratios[0],
            ratios[ratios.len() - 1],
        );
    }
    match arguments.require {
        Some(required) if worst < required => {
            println!("the lowest median ratio is {worst:.2}, below {required}");
            Ok(ExitCode::FAILURE)
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
