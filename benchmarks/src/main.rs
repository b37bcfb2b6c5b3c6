//! Measures the library against hand-written loops with the same backend, durability and work.
//!
//! Absolute figures vary by the hour on a shared machine. So both sides run alternately in one
//! process, on fresh files in the same folder or on one private server. The ratio within each round
//! is what counts.

#![allow(clippy::print_stdout, reason = "a command-line program")]

mod appends;
mod backends;
mod batch;
mod contest;
mod growth;
mod instructions;
mod kafka;
mod latency;
mod letters;
mod memory;
mod plot;
mod postgres;
mod price;
mod rabbitmq;
mod recovery;
mod redis;
mod relay;
mod results;
mod sqlite;

use std::{error::Error, fmt, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};
use tempfile::TempDir;

use batch::Batch;
use contest::{Contest, Row, Rules, by_batch};
use results::Results;

/// Compares hand-written loops with this library, alternately in one run.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// How often each side runs at each batch size.
    #[arg(long, global = true, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The batch sizes to measure. `defaults` leaves the choice to the library.
    #[arg(long = "batch", global = true, value_delimiter = ',', default_values_t = BATCHES)]
    batches: Vec<Batch>,
    /// How many bytes of payload each record of a contest has.
    #[arg(long, global = true, default_value_t = PAYLOAD.len() as u32, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    payload: u32,
    /// Where to put the files. The default is a temporary folder.
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    /// How many counters the records are spread over. RabbitMQ's records have one.
    #[arg(long, global = true, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    counters: u64,
    /// Exit with status 1 if a median ratio is below this.
    #[arg(long, global = true)]
    require: Option<f64>,
    /// Keep each round of a contest in this file, and continue where it ends.
    #[arg(long, global = true)]
    results: Option<PathBuf>,
    /// Three short rounds. The figures only show that all works.
    #[arg(long, global = true)]
    quick: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Each contest: consuming on each backend, with one counter and with a counter per record, and
    /// appending.
    All,
    #[command(flatten)]
    One(Backend),
    /// Draws the ratios in a file of results, one SVG per contest.
    Plot {
        /// A file that `--results` wrote.
        file: PathBuf,
        /// The folder to draw to.
        #[arg(long)]
        to: PathBuf,
    },
    /// Appends to PostgreSQL by many processes at once, or one table for all logs against a table
    /// per log. Ignores batch sizes, counters and `--require`.
    Appends(appends::AppendsArguments),
    #[command(hide = true)]
    Appender(appends::Appender),
    /// How long records take to a bus, through a relay, or to the commit of a consumer. Ignores
    /// batch sizes, counters and `--require`.
    Latency(latency::LatencyArguments),
    /// What a record costs while the log, the producers or the consumers grow. Ignores batch sizes,
    /// counters and `--require`.
    Growth(growth::GrowthArguments),
    /// How much memory a process needs at its peak that drains a large log. Ignores rounds, batch
    /// sizes, counters and `--require`.
    Memory(memory::MemoryArguments),
    #[command(hide = true)]
    Drain(memory::Drain),
    /// What the promise costs: the same work essentially once, at least once and at most once.
    /// Ignores counters and `--require`.
    Price(price::PriceArguments),
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

/// What the two sides of a contest work with.
#[derive(Clone, Copy, Subcommand)]
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
    /// Kafka's protocol, on private brokers: appending, or consuming into SQLite or PostgreSQL.
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
}

type Failure = Box<dyn Error + Send + Sync>;
type Result<T, E = Failure> = std::result::Result<T, E>;

const BATCHES: [Batch; 4] = [
    Batch::Records(1),
    Batch::Records(10),
    Batch::Records(100),
    Batch::Records(1_000),
];
const PAYLOAD: [u8; 100] = [b'x'; 100];

/// Rounds of `--quick`, and by how much it divides the number of records.
const QUICK: (u32, u64) = (3, 5);

/// More counters than a contest has records, so that each record has its own.
const COUNTER_PER_RECORD: u64 = 1_000_000;

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let folder = || match &arguments.dir {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    let rounds = arguments.rounds;
    let sizes = || -> Vec<usize> { arguments.batches.iter().map(|batch| batch.size()).collect() };
    let done = match &arguments.command {
        Command::All => return contests(&arguments, all(), folder),
        Command::One(backend) => return contests(&arguments, [(*backend, arguments.counters)], folder),
        Command::Plot { file, to } => plot::draw(&Results::read(file)?, to),
        Command::Appends(appends) => appends::measure(appends, rounds),
        Command::Appender(appender) => appends::append(appender),
        Command::Latency(latency) => latency::measure(*latency, rounds, folder()?),
        Command::Growth(growth) => growth::measure(growth, rounds, &folder()?),
        Command::Memory(memory) => return memory::measure(memory, &folder()?),
        Command::Drain(drain) => memory::drain(drain),
        Command::Price(price) => price::measure(*price, rounds, &sizes(), &folder()?),
        Command::Healthy => instructions::healthy(folder()?.path()),
        Command::Core => instructions::core(folder()?.path(), &sizes()),
        Command::Counted(work) => instructions::work(work),
        Command::Letters => letters::measure(rounds, &folder()?),
        Command::Recovery => recovery::measure(rounds),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// The contests of `all`, each with its number of counters.
fn all() -> impl Iterator<Item = (Backend, u64)> {
    use kafka::Part;
    use postgres::Write;

    const EACH: u64 = COUNTER_PER_RECORD;
    let postgres = |write| Backend::Postgres { write };
    let kafka = |part| Backend::Kafka { part };
    [
        (Backend::Sqlite, 1),
        (Backend::Sqlite, EACH),
        (Backend::Redis, 1),
        (Backend::Redis, EACH),
        (postgres(Write::Gather), 1),
        (postgres(Write::Gather), EACH),
        (postgres(Write::KeyValue), 1),
        (postgres(Write::KeyValue), EACH),
        (postgres(Write::Queue), 1),
        (postgres(Write::Queue), EACH),
        (kafka(Part::Append), 1),
        (kafka(Part::Sqlite), 1),
        (kafka(Part::Sqlite), EACH),
        (kafka(Part::Postgres), 1),
        (kafka(Part::Postgres), EACH),
        (Backend::Rabbitmq, 1),
    ]
    .into_iter()
}

fn contests(
    arguments: &Arguments,
    contests: impl IntoIterator<Item = (Backend, u64)>,
    folder: impl Fn() -> std::io::Result<TempDir>,
) -> Result<ExitCode> {
    let mut results = match &arguments.results {
        Some(file) => Results::open(file)?,
        None => Results::default(),
    };
    let (rounds, divisor) = match arguments.quick {
        true => QUICK,
        false => (arguments.rounds, 1),
    };
    let rules = Rules {
        rounds,
        batches: &arguments.batches,
        payload: vec![b'x'; arguments.payload as usize].leak(),
        divisor,
    };
    println!("records/s are medians, and the ratio is ours / by hand, round by round");
    println!();
    let mut worst = f64::INFINITY;
    for (backend, counters) in contests {
        let name = name(backend, counters, rules.payload.len());
        let contest = start(backend, counters, folder()?)?;
        worst = worst.min(contest::measure(&name, &*contest, &rules, &mut results)?);
    }
    match arguments.require {
        Some(required) if worst < required => {
            println!("the lowest median ratio is {worst:.2}, below {required}");
            Ok(ExitCode::FAILURE)
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The name of a contest in the file of results.
fn name(backend: Backend, counters: u64, payload: usize) -> String {
    let mut name = backend.to_string();
    match counters {
        1 => {}
        COUNTER_PER_RECORD => name += ", a counter per record",
        counters => name += &format!(", {counters} counters"),
    }
    if payload != PAYLOAD.len() {
        name += &format!(", {}-byte payloads", with_commas(payload));
    }
    name
}

fn with_commas(number: usize) -> String {
    match number {
        ..1_000 => number.to_string(),
        _ => format!("{},{:03}", with_commas(number / 1_000), number % 1_000),
    }
}

fn start(backend: Backend, counters: u64, folder: TempDir) -> Result<Box<dyn Contest>> {
    Ok(match backend {
        Backend::Sqlite => Box::new(sqlite::Files { folder, counters }),
        Backend::Rabbitmq => Box::new(rabbitmq::Node::start(folder)?),
        Backend::Kafka { part } => Box::new(kafka::Brokers::new(part, counters, folder)?),
        Backend::Postgres { write } => Box::new(postgres::Server::start(counters, write)?),
        Backend::Redis => Box::new(redis::Server::start(counters)?),
        Backend::Relay { bus } => Box::new(relay::Relays::start(bus, folder)?),
    })
}

/// The name of a contest.
impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of =
            |value: Option<clap::builder::PossibleValue>| value.map(|v| v.get_name().to_owned()).unwrap_or_default();
        match self {
            Self::Sqlite => write!(f, "SQLite"),
            Self::Redis => write!(f, "Redis"),
            Self::Rabbitmq => write!(f, "RabbitMQ"),
            Self::Postgres { write } => write!(f, "PostgreSQL, {}", of(write.to_possible_value())),
            Self::Kafka { part } => write!(f, "Kafka, {}", of(part.to_possible_value())),
            Self::Relay { bus } => write!(f, "relay, {}", of(bus.to_possible_value())),
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    spread(values).0
}

/// The median, the minimum and the maximum.
fn spread(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contests_with_other_payloads_have_other_names() {
        assert_eq!(name(Backend::Sqlite, 1, 100), "SQLite");
        assert_eq!(name(Backend::Redis, 1, 10), "Redis, 10-byte payloads");
        assert_eq!(
            name(Backend::Sqlite, 8, 1_024),
            "SQLite, 8 counters, 1,024-byte payloads"
        );
        assert_eq!(with_commas(1_000_000), "1,000,000");
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;

        Arguments::command().debug_assert();
    }
}
