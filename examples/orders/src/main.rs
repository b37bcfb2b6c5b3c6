//! Ships orders while the shipping worker is killed again and again, once for each delivery.
//!
//! ```text
//! cargo run --release -p orders
//! cargo run --release -p orders -- --input orders.csv --kills 50 --seed 7
//! ```
//!
//! This program writes orders to a log. A worker process reads them and inserts one shipment per
//! order. The program kills the worker at random moments (with SIGKILL, so it has no chance to
//! clean up) and starts it again, until the log is drained. Then it counts in the database which
//! orders were shipped once, more than once, or never.
//!
//! It does this three times, on fresh files, with the same handler and the same kills:
//!
//! - **at-most-once** commits the position, then ships. A kill loses the orders not yet shipped.
//! - **at-least-once** ships, then commits the position. After a kill, orders not yet committed are
//!   shipped again.
//! - **essentially-once** ships in the transaction that commits the position. A kill cannot
//!   separate the two.
//!
//! The handler rejects a line that is not a valid order. Essentially-once sets the line aside as a
//! dead letter, with the reason, in the transaction that commits the position. A later line with
//! the same order id waits behind it. The other deliveries keep no letters and pass over the line.
//!
//! With `--mend` the program retries the letters afterwards, with a parser that accepts more:
//!
//! ```text
//! cargo run --release -p orders -- --mend --input examples/orders/tests/data/unquoted.csv
//! ```
//!
//! Log and store are kept in SQLite files. With `--log` or `--store` they are kept on a Redis
//! server (`--features redis`) or a RabbitMQ broker (`--features rabbitmq`).
//!
//! Where to read on: `backend` opens log and store. `shipping` is the handler. `shop` is what it
//! writes to. `worker` runs the consumer. `race` kills it. `letters` lists and retries the dead
//! letters, and `tally` counts.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand};

mod backend;
mod delivery;
mod input;
mod leash;
mod letters;
mod order;
mod plan;
mod race;
mod shipping;
mod shop;
mod tally;
mod worker;

use backend::{Backend, Place};
use delivery::Delivery;
use essentially_once::ConsumerId;
use input::Input;
use tally::{Mended, Tally};

/// Any error that stops the program, as text for its user.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Ships orders while the shipping worker is killed again and again, once for each delivery, and
/// counts what happened to them.
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    after_help = "Exit status: 0 if essentially-once lost and doubled nothing, 1 if it did or the run failed, 2 for bad usage or input."
)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// The shipping worker, which this program starts itself.
    #[command(hide = true)]
    Worker(worker::WorkerArgs),
}

#[derive(clap::Args)]
struct RunArgs {
    /// Ship the lines of this CSV file. It has a header with a column `freight`, then one order per
    /// line with its id in the first field.
    #[arg(long, value_name = "FILE", conflicts_with = "orders")]
    input: Option<PathBuf>,
    /// How many orders to generate without FILE.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    orders: u32,
    /// How often to kill the worker, for each delivery.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(..=10_000))]
    kills: u32,
    /// How many orders the worker takes at a time.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_batch: u32,
    /// Then retry the dead letters of essentially-once, with a parser that accepts an unquoted
    /// comma before a space, as in `Alder, Finch & Sons`.
    #[arg(long)]
    mend: bool,
    /// Repeat the generated orders and the kills of an earlier run.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Keep the databases and the data on servers. The databases go to this folder, which must not
    /// hold any yet.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Where to keep the log: `sqlite`, redis://host:6379/0 (with `--features redis`) or
    /// amqp://user:password@host/%2f (with `--features rabbitmq`).
    #[arg(long, value_name = "PLACE", default_value = "sqlite", env = worker::LOG_VARIABLE, hide_env_values = true)]
    log: String,
    /// Where to keep shipments and position. Takes the same values as `--log`.
    #[arg(long, value_name = "PLACE", default_value = "sqlite", env = worker::STORE_VARIABLE, hide_env_values = true)]
    store: String,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (done, bad_input) = match cli.command {
        Some(Command::Worker(args)) => (worker::run(args).map(|()| true), 1),
        None => match prepare(&cli.run) {
            Ok(prepared) => (run(&cli.run, prepared), 1),
            Err(error) => (Err(error), 2),
        },
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // A closed stderr is not a reason to panic.
            let _ = writeln!(io::stderr(), "orders: {error}");
            ExitCode::from(bad_input)
        }
    }
}

/// Everything that is decided before anything is written.
struct Prepared {
    seed: u64,
    input: Input,
    log: Place,
    store: Place,
    folder: Folder,
}

fn prepare(args: &RunArgs) -> Result<Prepared, Failure> {
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let input = match &args.input {
        Some(path) => Input::read(path)?,
        None => Input::made_up(args.orders as usize, seed),
    };
    // Parsed here because clap would print a bad value, including the password in a URL.
    let log = args.log.parse().map_err(|error| format!("--log: {error}"))?;
    let store = args.store.parse().map_err(|error| format!("--store: {error}"))?;
    let folder = Folder::open(args.dir.as_deref())?;
    Ok(Prepared {
        seed,
        input,
        log,
        store,
        folder,
    })
}

/// Runs all deliveries and prints the result. Returns whether essentially-once kept its promise.
fn run(args: &RunArgs, prepared: Prepared) -> Result<bool, Failure> {
    let Prepared {
        seed,
        input,
        log,
        store,
        folder,
    } = prepared;
    let orders = input.lines.len();
    let _ = writeln!(
        io::stderr(),
        "{orders} orders, {} kills for each delivery (--seed {seed} repeats them)",
        args.kills
    );
    let kills = plan::kills(seed, orders, args.kills as usize);
    // Independent of the seed, because a repeated run must not reuse an earlier run's names on a
    // server.
    let run = fastrand::Rng::new().u32(..);
    let mut tallies = Vec::new();
    let mut mended = None;
    for delivery in Delivery::ALL {
        let race = race::Race {
            delivery,
            backend: Backend {
                log: log.clone(),
                store: store.clone(),
                database: folder.database(delivery),
                consumer: ConsumerId::new(format!("shipping-{run:08x}-{delivery}"))?,
            },
            input: &input,
            kills: &kills,
            max_batch: args.max_batch,
        };
        let outcome = run_and_mend(&race, args.mend);
        if let Folder::Temporary(_) = &folder
            && let Err(error) = runtime()?.block_on(race.backend.remove())
        {
            // Only reported, because an error of the run itself is more important.
            let _ = writeln!(io::stderr(), "cannot remove the data of this run: {error}");
        }
        let (tally, retried) = outcome?;
        tallies.push(tally);
        mended = mended.or(retried);
    }
    let shown = match args.json {
        true => tally::json(&tallies, mended.as_ref())?,
        false => tally::table(&tallies, mended.as_ref()),
    };
    io::stdout().lock().write_all(shown.as_bytes())?;
    if let Folder::Kept(path) = &folder {
        let _ = writeln!(io::stderr(), "the databases are in {}", path.display());
    }
    Ok(tallies
        .iter()
        .filter(|tally| tally.delivery == Delivery::EssentiallyOnce)
        .chain(mended.as_ref().map(|Mended { tally, .. }| tally))
        .all(Tally::each_took_effect_once))
}

fn run_and_mend(race: &race::Race<'_>, mend: bool) -> Result<(Tally, Option<Mended>), Failure> {
    let tally = race.run()?;
    let mended = match mend && !tally.dead_letters.is_empty() {
        true => Some(race.mend()?),
        false => None,
    };
    Ok((tally, mended))
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// The folder of the databases.
enum Folder {
    Kept(PathBuf),
    Temporary(tempfile::TempDir),
}

impl Folder {
    /// Refuses a folder that holds databases, because two runs in one file would be counted as one.
    fn open(kept: Option<&std::path::Path>) -> Result<Self, Failure> {
        let Some(path) = kept else {
            let folder = tempfile::Builder::new()
                .prefix("orders-")
                .tempdir()
                .map_err(|error| format!("cannot make a temporary folder: {error}"))?;
            return Ok(Self::Temporary(folder));
        };
        std::fs::create_dir_all(path).map_err(|error| format!("cannot use the folder {}: {error}", path.display()))?;
        let folder = Self::Kept(path.to_path_buf());
        for delivery in Delivery::ALL {
            let database = folder.database(delivery);
            if database.exists() {
                let shown = database.display();
                return Err(format!("{shown} already exists: remove it or choose another folder").into());
            }
        }
        Ok(folder)
    }

    fn database(&self, delivery: Delivery) -> PathBuf {
        let folder = match self {
            Self::Kept(path) => path,
            Self::Temporary(folder) => folder.path(),
        };
        folder.join(format!("{delivery}.db"))
    }
}
