//! Runs the same work on consumers of this library, of others and by hand, undisturbed, while the
//! worker is killed, and while one of two is frozen, and counts what was lost and doubled.

mod contestants;
mod judge;
mod places;
mod trial;

use std::{
    collections::BTreeSet,
    env,
    error::Error,
    fmt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use clap::Parser;
use contestants::Contestant;
use trial::{Disturbance, Outcome, Trial};

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Kills and freezes consumers of this library and of others, and counts what was lost and doubled.
#[derive(Parser)]
struct Arguments {
    /// Only contestants whose backend or name contains one of these.
    only: Vec<String>,
    /// Only say how fast undisturbed workers are.
    #[arg(long)]
    undisturbed: bool,
    #[command(flatten)]
    load: Load,
}

#[derive(clap::Args, Clone)]
struct Load {
    /// How many records wait for an undisturbed worker.
    #[arg(long, default_value_t = 50_000)]
    records: u64,
    /// For how many seconds records are sent, and the longest that an undisturbed worker runs.
    #[arg(long, default_value = "20", value_parser = seconds)]
    time: Duration,
    /// How many records are sent per second to disturbed workers.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    per_second: u64,
    /// How many records a worker handles per commit, where it can choose.
    #[arg(long, default_value_t = 10)]
    batch: usize,
    /// How long a disturbed worker handles a record, in microseconds.
    #[arg(long, default_value_t = 2_000)]
    pause: u64,
    /// After which silence of a worker, in milliseconds, another takes over.
    #[arg(long, default_value_t = 500)]
    patience: u64,
    /// How often the worker is killed.
    #[arg(long, default_value_t = 20)]
    kills: u32,
    /// How often one of two workers is frozen, for three times as long as the other waits.
    #[arg(long, default_value_t = 10)]
    freezes: u32,
    /// Decides when workers are killed and frozen.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
        _ => Err("a number of seconds above 0".into()),
    }
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let contestants = contestants::ALL.iter();
    let chosen: Vec<&Contestant> = contestants.filter(|c| is_chosen(c, &arguments.only)).collect();
    if chosen.is_empty() {
        return Err(format!("no contestant's backend or name contains {:?}", arguments.only).into());
    }
    let folders: BTreeSet<&str> = chosen.iter().map(|contestant| contestant.folder).collect();
    for folder in folders {
        build(folder)?;
    }
    let errors = tempfile::tempdir()?.keep();
    eprintln!("what the programs print as errors is in {}", errors.display());
    println!(
        "| backend | consumer | promise | records/s | killed: p50, ms | p99, ms | lost | doubled | frozen: p50, ms | p99, ms | lost | doubled |"
    );
    println!("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    let mut is_kept = true;
    for (number, contestant) in chosen.into_iter().enumerate() {
        let errors = errors.join(format!("{number}-{}.txt", contestant.program));
        is_kept &= compete(contestant, &arguments, &errors);
    }
    if !is_kept {
        eprintln!("this library failed, lost records or doubled them");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the row of a contestant. Returns `false` if this library did not keep its promise.
fn compete(contestant: &Contestant, arguments: &Arguments, errors: &Path) -> bool {
    let programs = target(contestant.folder).join("release");
    let load = &arguments.load;
    let trial = || Trial::start(contestant, &programs, errors.to_path_buf());
    let report = |what: &str, error: &dyn fmt::Display| {
        eprintln!("{}, {}, {what}: {error}", contestant.backends(), contestant.name)
    };
    let undisturbed = trial().and_then(|mut trial| trial.drain(load));
    let rate = match &undisturbed {
        Ok(rate) => format!("{rate:.0}"),
        Err(error) => {
            report("undisturbed", error);
            "failed".into()
        }
    };
    let mut is_kept = undisturbed.is_ok();
    let mut disturbed = |what: &str, disturbance| {
        if arguments.undisturbed {
            return " | | | ".into();
        }
        match trial().and_then(|mut trial| trial.disturb(load, disturbance)) {
            Ok(outcome) => {
                is_kept &= outcome.lost == 0 && outcome.doubled == 0;
                outcome.to_string()
            }
            Err(error) => {
                report(what, &error);
                is_kept = false;
                "failed | | | ".into()
            }
        }
    };
    let (killed, frozen) = (
        disturbed("killed", Disturbance::Kill),
        disturbed("frozen", Disturbance::Freeze),
    );
    println!(
        "| {} | {} | {} | {rate} | {killed} | {frozen} |",
        contestant.backends(),
        contestant.name,
        contestant.promise,
    );
    is_kept || contestant.program != contestants::OURS
}

fn is_chosen(contestant: &Contestant, only: &[String]) -> bool {
    let text = format!("{} {}", contestant.backends(), contestant.name).to_lowercase();
    only.is_empty() || only.iter().any(|part| text.contains(&part.to_lowercase()))
}

/// Where the programs of a folder are built: beside this program.
fn target(folder: &str) -> PathBuf {
    let exe = env::current_exe().unwrap_or_default();
    let own = exe.ancestors().nth(2).unwrap_or(Path::new("target"));
    own.join(folder.trim_start_matches('.'))
}

fn build(folder: &str) -> Result<()> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join("Cargo.toml");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--release", "--bins", "--manifest-path"])
        .arg(&manifest);
    match cargo.arg("--target-dir").arg(target(folder)).status()? {
        status if status.success() => Ok(()),
        status => Err(format!("building {} ended with {status}", manifest.display()).into()),
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |time: Duration| match time {
            Duration::MAX => "never".into(),
            time => time.as_millis().to_string(),
        };
        let (p50, p99) = (shown(self.p50), shown(self.p99));
        write!(f, "{p50} | {p99} | {} | {}", self.lost, self.doubled)
    }
}
