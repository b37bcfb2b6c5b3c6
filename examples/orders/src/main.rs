//! Two services, each with its own database, and a message bus between them.
//!
//! ```text
//! cargo run --release -p orders
//! cargo run --release -p orders -- --input orders.csv --kills 100 --seed 7
//! ```
//!
//! The order service stores each order and announces it, in one transaction. A relay moves the
//! announcement to the bus. The shipping service writes a shipment and reports `packing` and
//! `shipped`, in the transaction that commits its position. A second relay moves the reports to the
//! bus, and the order service marks the order. No transaction spans two databases.
//!
//! ```text
//! order service ── outbox ── relay ──▶ bus: orders ──▶ shipping service
//!       ▲                                                     │
//!       └───────── bus: progress ◀── relay ── outbox ─────────┘
//! ```
//!
//! This program kills the four processes at random moments (with SIGKILL, so they have no chance to
//! clean up) and starts them again. Meanwhile the bus loses replies of appends that took effect,
//! and alters records. A relay that gets no reply sends its records again. At the end the program
//! counts in both databases: each order is placed, packed, shipped and confirmed once. If not, it
//! names the orders that were lost, doubled or shipped out of their turn.
//!
//! Before that, the shipping service runs with two other deliveries, for comparison:
//!
//! - **at-most-once** commits the position, then ships. A kill loses the orders not yet shipped.
//! - **at-least-once** ships, then commits the position. After a kill, orders not yet committed are
//!   shipped again.
//!
//! Both ship outside the transaction that commits the position, so they have no outbox for the way
//! back.
//!
//! The shipping service rejects a line that is not a valid order. Essentially-once sets the line
//! aside as a dead letter, with the reason, in the transaction that commits the position. A later
//! line with the same order id waits behind it. A record whose signature is wrong becomes a dead
//! letter too. The other deliveries keep no letters and pass over such records.
//!
//! With `--mend` the program retries the letters afterwards, with a parser that accepts more:
//!
//! ```text
//! cargo run --release -p orders -- --mend --input examples/orders/tests/data/unquoted.csv
//! ```
//!
//! Everything is kept in SQLite files. With `--bus` or `--store` the bus or the shipping service is
//! in a PostgreSQL database (`--features postgres`), on a Redis server (`--features redis`) or on a
//! RabbitMQ broker (`--features rabbitmq`). The bus can also be on Kafka (`--features kafka`).
//!
//! Where to read on: `order_service` and `shipping` are the two services, `processes` runs them and
//! the relays, `bus` opens the bus, and `settings` the databases. `shop` is what the shipping
//! service writes to. `letters`, `tally` and `report` show the result, and `violations` judges it.
//! `rig` does the harm.

use std::{
    collections::HashSet,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::Ordering,
    time::Duration,
};

use clap::{Parser, Subcommand};
use essentially_once::Error;

mod bus;
mod database;
mod delivery;
mod input;
mod keys;
mod letters;
mod order;
mod order_service;
mod place;
mod processes;
mod report;
mod rig;
mod settings;
mod shipping;
mod shop;
mod tally;
mod violations;

use bus::Bus;
use delivery::Delivery;
use input::Input;
use place::Place;
use rig::{Plan, Race, Toll};
use settings::Settings;
use tally::{Mended, Tally};
use violations::Orders;

/// Any error that stops the program, as text for its user.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs an order service and a shipping service with a message bus between them, kills both again
/// and again, and counts what happened to the orders.
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    after_help = "Exit status: 0 if under essentially-once each order was placed, packed, shipped and confirmed once, 1 if not or if the run failed, 2 for bad usage or input, before anything is written."
)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// One of the four processes, which this program starts itself.
    #[command(hide = true)]
    Process,
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
    /// How often to kill a process, for each delivery. The kills are spread over all processes.
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(..=10_000))]
    kills: u32,
    /// How many replies of the bus to lose, for each delivery, after the append took effect. A
    /// relay that is killed soon afterwards loses the same reply again.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=10_000))]
    lose: u32,
    /// How many records to alter on their way to the bus, for each delivery. The reply of the
    /// append is lost as well, so that the relay sends the record again. If the relay is killed
    /// soon afterwards, the record is altered again.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=10_000))]
    tamper: u32,
    /// The most records that one commit covers.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_batch: u32,
    /// Then retry the dead letters of essentially-once, with a parser that accepts an unquoted
    /// comma before a space, as in `Alder, Finch & Sons`.
    #[arg(long)]
    mend: bool,
    /// Repeat the generated orders and the kills of an earlier run.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Keep the databases and the data on servers. The databases go to a folder for each delivery
    /// in this one, which must not hold any yet.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Where the bus is: `sqlite`, postgres://user:password@host/database (with `--features
    /// postgres`), redis://host:6379/0 (with `--features redis`), amqp://user:password@host/%2f
    /// (with `--features rabbitmq`) or kafka://host:9092 (with `--features kafka`).
    #[arg(
        long,
        value_name = "PLACE",
        default_value = "sqlite",
        env = "ORDERS_BUS",
        hide_env_values = true
    )]
    bus: String,
    /// Where the shipping service keeps its shipments, its position and its outbox. Takes the same
    /// values as `--bus`, except for Kafka.
    #[arg(
        long,
        value_name = "PLACE",
        default_value = "sqlite",
        env = "ORDERS_STORE",
        hide_env_values = true
    )]
    store: String,
    /// Sign what is sent over the bus with the first key of this file, in place of a new key. Each
    /// line is `<id> = <key>`, with a key from `openssl rand -hex 32`.
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (done, bad_input) = match cli.command {
        Some(Command::Process) => (rig::run_process().map(|()| true), 1),
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

/// Everything that is decided before anything runs.
struct Prepared {
    seed: u64,
    input: Input,
    bus: Bus,
    store: Place,
    folder: Folder,
    keys: PathBuf,
}

fn prepare(args: &RunArgs) -> Result<Prepared, Failure> {
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let input = match &args.input {
        Some(path) => Input::read(path)?,
        None => Input::made_up(args.orders as usize, seed),
    };
    // Parsed here because clap would print a bad value, including the password in a URL.
    let bus: Bus = args.bus.parse().map_err(|error| format!("--bus: {error}"))?;
    let store: Place = args.store.parse().map_err(|error| format!("--store: {error}"))?;
    if let Some(path) = &args.keys {
        keys::check(path)?;
    }
    reach("--bus", bus.reach())?;
    reach("--store", store.reach())?;
    let folder = Folder::open(args.dir.as_deref())?;
    let keys = match &args.keys {
        // The processes run in the same folder as this one.
        Some(path) => path.clone(),
        None => keys::create(folder.path())?,
    };
    Ok(Prepared {
        seed,
        input,
        bus,
        store,
        folder,
        keys,
    })
}

/// Checks that a server is there.
fn reach(option: &str, reached: impl Future<Output = Result<(), Error>>) -> Result<(), Failure> {
    let reached = runtime()?.block_on(reached);
    reached.map_err(|error| match error {
        Error::Unavailable { .. } => format!("{option}: {error}; start the server, or correct the URL").into(),
        error => format!("{option}: {error}").into(),
    })
}

/// Removes a run's data from shared servers.
async fn remove(settings: &Settings) -> Result<(), Failure> {
    settings.bus.remove(settings).await?;
    settings.remove_from(&settings.store).await
}

/// Runs all deliveries and prints the result. Returns whether essentially-once kept its promise.
fn run(args: &RunArgs, prepared: Prepared) -> Result<bool, Failure> {
    let Prepared {
        seed,
        input,
        bus,
        store,
        folder,
        keys,
    } = prepared;
    let orders = input.lines.len();
    let _ = writeln!(
        io::stderr(),
        "{orders} orders; {} kills, about {} lost replies and {} altered records for each delivery (--seed {seed} repeats \
         them)",
        args.kills,
        args.lose,
        args.tamper
    );
    // Independent of the seed, because a repeated run must not reuse an earlier run's names on a
    // server.
    let run = fastrand::Rng::new().u32(..);
    let mut tallies = Vec::new();
    let mut mended = None;
    for delivery in Delivery::ALL {
        let settings = Settings {
            delivery,
            run: format!("{run:08x}-{delivery}"),
            bus: bus.clone(),
            store: store.clone(),
            folder: folder.of(delivery),
            keys: keys.clone(),
            format: input.format,
            max_batch: args.max_batch as usize,
        };
        std::fs::create_dir(&settings.folder)
            .map_err(|error| format!("cannot make the folder {}: {error}", settings.folder.display()))?;
        let [kills, lose, tamper] = [args.kills, args.lose, args.tamper].map(|count| count as usize);
        let race = Race {
            settings: &settings,
            input: &input,
            plan: &Plan::draw(delivery, seed, orders, kills, lose, tamper),
        };
        let outcome = run_and_mend(&race, args.mend);
        if let Folder::Temporary(_) = &folder
            && let Err(error) = runtime()?.block_on(remove(&settings))
        {
            // Only reported, because an error of the run itself is more important.
            let _ = writeln!(io::stderr(), "cannot remove the data of this run: {error}");
        }
        let (tally, retried) = outcome?;
        tallies.push(tally);
        mended = mended.or(retried);
    }
    let shown = match args.json {
        true => report::json(&tallies, mended.as_ref())?,
        false => report::table(&tallies, mended.as_ref()),
    };
    io::stdout().lock().write_all(shown.as_bytes())?;
    if let Folder::Kept(path) = &folder {
        let _ = writeln!(io::stderr(), "the databases are in {}", path.display());
    }
    let mended = mended.iter().map(|Mended { tally, .. }| ("mended".to_owned(), tally));
    let judged = tallies.iter().map(|tally| (tally.delivery.to_string(), tally));
    let mut is_kept = true;
    for (run, tally) in judged.chain(mended) {
        for violation in &tally.violations {
            is_kept = false;
            let _ = writeln!(io::stderr(), "orders: {run}: {violation}");
        }
    }
    Ok(is_kept)
}

fn run_and_mend(race: &Race<'_>, mend: bool) -> Result<(Tally, Option<Mended>), Failure> {
    let (toll, time) = race.run()?;
    let tally = count(race, &toll, time, &HashSet::new())?;
    if !mend || tally.dead_letters.is_empty() {
        return Ok((tally, None));
    }
    let runtime = runtime()?;
    let letters = runtime.block_on(race.settings.letters())?.rejected;
    let retried = runtime.block_on(race.settings.retry(&letters))?;
    let time = race.mend()?;
    let lines = letters
        .iter()
        .filter_map(|letter| shipping::order_number(&letter.record));
    let mended = count(race, &Toll::default(), time, &lines.collect())?;
    Ok((tally, Some(Mended { retried, tally: mended })))
}

fn count(race: &Race<'_>, toll: &Toll, time: Duration, retried: &HashSet<u32>) -> Result<Tally, Failure> {
    let orders = Orders {
        lines: &race.input.lines,
        altered: &race.plan.altered(),
        retried,
    };
    let mut tally = runtime()?.block_on(tally::count(race.settings, &orders))?;
    tally.kills = toll.kills.load(Ordering::Relaxed);
    tally.lost_replies = toll.lost.load(Ordering::Relaxed);
    tally.seconds = (time.as_secs_f64() * 1_000.0).round() / 1_000.0;
    Ok(tally)
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
    fn open(kept: Option<&Path>) -> Result<Self, Failure> {
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
            let of_delivery = folder.of(delivery);
            if of_delivery.exists() {
                let shown = of_delivery.display();
                return Err(format!("{shown} already exists: remove it or choose another folder").into());
            }
        }
        Ok(folder)
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(folder) => folder.path(),
        }
    }

    /// The folder of a delivery's databases.
    fn of(&self, delivery: Delivery) -> PathBuf {
        self.path().join(delivery.to_string())
    }
}
