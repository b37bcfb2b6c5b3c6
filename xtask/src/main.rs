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
    /// Everything a contributor runs before a change is proposed: all tests, documentation tests, and the model checker.
    Test(Tests),
    /// What the server runs: format, lints, documentation, `test` and `tidy`.
    Ci(Tests),
    /// Checks what people forget: changelog, README table, inherited lints, leftovers, dead links.
    Tidy,
}

/// Shown with the help of what runs tests.
const SERVERS: &str = "\
Tests start the servers they need by themselves: private ones, on free ports, with their data in temporary folders.
A program that is missing is installed with apt-get, if this runs as root or sudo asks for no password. Otherwise the
task fails before anything is built, and says how to install it.

ESSENTIALLY_ONCE_REDIS_SERVER names another redis-server, or a Valkey, than the one that is found;
ESSENTIALLY_ONCE_RABBITMQ_SERVER another rabbitmq-server, with its rabbitmqctl beside it.";

#[derive(Args)]
#[command(after_help = SERVERS)]
struct Tests {
    /// Do without a server: the cases that need it show as ignored.
    #[arg(long, value_name = "SERVER")]
    without: Vec<servers::Server>,
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

/// A task stops at its first failure, with the exit status to end with.
type Done = Result<(), u8>;

type Variables = [(&'static str, OsString)];

/// The first step, so that a missing server is told of before anything is built.
fn variables(tests: &Tests) -> Result<Vec<(&'static str, OsString)>, u8> {
    servers::variables(&tests.without).map_err(|error| {
        eprintln!("xtask: {error}");
        1
    })
}

/// Runs all tests, whatever fails on the way, and ends with a summary.
fn test(servers: &Variables) -> Done {
    let mut summary = Summary::new();
    let mut variables = servers.to_vec();
    variables.extend(summary.variables());
    let workspace = ["test", "--workspace", "--all-features", "--no-fail-fast"];
    summary.run(&[&workspace[..], &["--all-targets"]].concat(), &variables);
    // `--all-targets` covers everything but documentation tests.
    summary.run(&[&workspace[..], &["--doc"]].concat(), &variables);
    model_check(&mut summary)?;
    summary.finish()
}

/// The consumer loop under shuttle: another build of the core, in a target folder of its own so that neither build undoes the other.
fn model_check(summary: &mut Summary) -> Done {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let target = target.join("shuttle");
    let Some(target) = target.to_str() else {
        eprintln!("xtask: the target folder {} is not UTF-8; move it", target.display());
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
    // What is tested has all features; these have some that can be left out.
    for package in ["essentially-once-redis", "essentially-once-rabbitmq", "orders"] {
        cargo(
            &[&["clippy", "--package", package, "--no-default-features"][..], &deny].concat(),
            &[],
        )?;
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
    let complaints = tidy::complaints(root());
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
            // A signal leaves no code, and a code beyond a byte cannot be passed on.
            Err(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
        }
        Err(error) => {
            eprintln!("xtask: cannot start `{shown}`: {error}");
            Err(1)
        }
    }
}

/// A call of cargo, which is shown.
fn command(arguments: &[&str], variables: &Variables) -> Command {
    let values = variables.iter();
    let values = values.map(|(name, value)| format!("{name}='{}' ", value.display()));
    say(&format!("{}cargo {}", values.collect::<String>(), arguments.join(" ")));
    // Cargo names itself to what it runs, so that the same toolchain goes on.
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(arguments)
        .envs(variables.iter().cloned())
        .current_dir(root());
    command
}

/// Shows a command before it runs; on stderr, where cargo writes too, so that the order is kept.
fn say(command: &str) {
    // A closed stderr is no reason to stop.
    let _ = writeln!(io::stderr(), "$ {command}");
}

fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}
