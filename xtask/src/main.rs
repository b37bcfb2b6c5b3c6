//! The repository's own commands, run as `cargo xtask <command>`.

use std::{
    env,
    ffi::OsString,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use clap::{Args, Parser, Subcommand};

mod servers;
mod summary;
mod tidy;

use summary::Summary;

#[derive(Parser)]
#[command(name = "cargo xtask", about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run everything that a contributor runs before proposing a change: all tests, doctests and
    /// the model checker.
    Test(Tests),
    /// Run what CI runs: format, lints, documentation, `test` and `tidy`.
    Ci(Tests),
    /// Check what people forget: changelog, README table, manifests, exports of the core, long
    /// prose lines, leftovers, dead links.
    Tidy,
}

/// Shown in the help of the commands that run tests.
const SERVERS: &str = "\
Tests start private servers on free ports, with their data in temporary folders. If a server program is missing,
apt-get installs it, provided that this runs as root or sudo needs no password. Otherwise the task fails before
anything is built, and says how to install the program.

ESSENTIALLY_ONCE_REDIS_SERVER selects another redis-server, or a Valkey. ESSENTIALLY_ONCE_RABBITMQ_SERVER selects
another rabbitmq-server, with its rabbitmqctl in the same folder. ESSENTIALLY_ONCE_POSTGRES_BIN selects another
PostgreSQL: it is the folder of its postgres, initdb, psql and pg_basebackup.";

#[derive(Args)]
#[command(after_help = SERVERS)]
struct Tests {
    /// Skip a server. Tests that need it show as ignored.
    #[arg(long, value_name = "SERVER")]
    without: Vec<servers::Server>,
    /// Test every log with every store. Without it, each one meets at least two others.
    #[arg(long)]
    full: bool,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Test(tests) => variables(&tests).and_then(|servers| test(&servers)),
        Task::Ci(tests) => variables(&tests).and_then(|servers| ci(&servers)),
        Task::Tidy => tidy(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(status) => ExitCode::from(status),
    }
}

/// A task stops at its first failure. The error is the exit status.
type Done = Result<(), u8>;

type Variables = [(&'static str, OsString)];

/// Runs first, so that a missing server is reported before anything is built.
fn variables(tests: &Tests) -> Result<Vec<(&'static str, OsString)>, u8> {
    let mut variables = servers::variables(&tests.without).map_err(|error| {
        eprintln!("xtask: {error}");
        1
    })?;
    if tests.full {
        variables.push(("ESSENTIALLY_ONCE_PAIRS", "full".into()));
    }
    Ok(variables)
}

/// Runs all tests, even after failures, and ends with a summary.
fn test(servers: &Variables) -> Done {
    let mut summary = Summary::new();
    let mut variables = servers.to_vec();
    variables.extend(summary.variables());
    let workspace = ["test", "--workspace", "--all-features", "--no-fail-fast"];
    summary.run(&[&workspace[..], &["--all-targets"]].concat(), &variables);
    // `--all-targets` covers everything except doctests.
    summary.run(&[&workspace[..], &["--doc"]].concat(), &variables);
    model_check(&mut summary)?;
    summary.finish()
}

/// Runs the consumer loop under shuttle. This builds the core differently, so it uses a separate
/// target folder.
fn model_check(summary: &mut Summary) -> Done {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let target = target.join("shuttle");
    let Some(target) = target.to_str() else {
        eprintln!("xtask: the target folder {} is not UTF-8: move it", target.display());
        return Err(1);
    };
    let package = [
        "test",
        "--package",
        "essentially-once",
        "--test",
        "shuttle",
        "--target-dir",
        target,
    ];
    summary.run(&package, &[("RUSTFLAGS", "--cfg shuttle".into())]);
    Ok(())
}

fn ci(servers: &Variables) -> Done {
    cargo(&["fmt", "--all", "--check"], &[])?;
    let deny = ["--", "-D", "warnings"];
    cargo(
        &[&["clippy", "--workspace", "--all-targets", "--all-features"][..], &deny].concat(),
        &[],
    )?;
    // The tests use all features. These packages have optional ones.
    for package in [
        "essentially-once",
        "essentially-once-postgres",
        "essentially-once-redis",
        "essentially-once-rabbitmq",
        "orders",
    ] {
        cargo(
            &[&["clippy", "--package", package, "--no-default-features"][..], &deny].concat(),
            &[],
        )?;
    }
    // Each backend of the program can be built alone.
    for backend in ["sqlite", "postgres", "redis", "rabbitmq"] {
        let alone = [
            "--package",
            "essentially-once-cli",
            "--no-default-features",
            "--features",
            backend,
        ];
        cargo(&[&["clippy"][..], &alone, &deny].concat(), &[])?;
    }
    cargo(
        &["doc", "--workspace", "--no-deps", "--all-features"],
        &[("RUSTDOCFLAGS", "-D warnings".into())],
    )?;
    test(servers)?;
    tidy()
}

fn tidy() -> Done {
    say("cargo xtask tidy");
    let complaints = tidy::check(root());
    for complaint in &complaints {
        eprintln!("tidy: {complaint}");
    }
    if complaints.is_empty() { Ok(()) } else { Err(1) }
}

fn cargo(arguments: &[&str], variables: &Variables) -> Done {
    let shown = format!("cargo {}", arguments.join(" "));
    match command(arguments, variables).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            eprintln!("xtask: `{shown}` failed: {status}");
            // A signal leaves no exit code, and only a byte can be passed on.
            Err(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
        }
        Err(error) => {
            eprintln!("xtask: cannot start `{shown}`: {error}");
            Err(1)
        }
    }
}

/// Creates a call of cargo, and prints it.
fn command(arguments: &[&str], variables: &Variables) -> Command {
    let values = variables.iter();
    let values = values.map(|(name, value)| format!("{name}='{}' ", value.display()));
    say(&format!("{}cargo {}", values.collect::<String>(), arguments.join(" ")));
    // Cargo passes its own path in this variable, which keeps the toolchain the same.
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(arguments)
        .envs(variables.iter().cloned())
        .current_dir(root());
    command
}

/// Prints a command before it runs, to stderr as cargo does, which keeps the order.
fn say(command: &str) {
    // A closed stderr is not a reason to stop.
    let _ = writeln!(io::stderr(), "$ {command}");
}

fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}
