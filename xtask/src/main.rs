//! The repository's own commands, run as `cargo xtask <command>`.

use std::{
    env,
    ffi::OsString,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
};

use clap::{Args, Parser, Subcommand};

mod servers;
mod summary;
mod tidy;
mod wheels;

use summary::Summary;
use wheels::Wheel;

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
apt-get installs it, provided that this runs as root or sudo needs no password. The one for Kafka's protocol is
downloaded into the target folder instead. Otherwise the task fails before anything is built, and says how to install
the program.

ESSENTIALLY_ONCE_REDIS_SERVER selects another redis-server, or a Valkey. ESSENTIALLY_ONCE_RABBITMQ_SERVER selects
another rabbitmq-server, with its rabbitmqctl in the same folder. ESSENTIALLY_ONCE_POSTGRES_BIN selects another
PostgreSQL: it is the folder of its postgres, initdb, psql and pg_basebackup. ESSENTIALLY_ONCE_KAFKA_SERVER selects
another noida-db.";

#[derive(Args)]
#[command(after_help = SERVERS)]
struct Tests {
    /// Skip a server. Tests that need it show as ignored.
    #[arg(long, value_name = "SERVER")]
    without: Vec<servers::Server>,
    /// Test every log with every store, of which each one otherwise meets at least two, and the
    /// Redis adapter also with Valkey 9 and Redis 8, which are downloaded into the target folder.
    #[arg(long)]
    full: bool,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Test(tests) => variables(&tests).and_then(|servers| test(&tests, &servers, Summary::new)),
        Task::Ci(tests) => variables(&tests).and_then(|servers| ci(&tests, &servers)),
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

/// Runs all tests, even after failures, and ends with a summary. Meanwhile it does what is to be
/// done `beside` them, which also has a summary.
fn test(tests: &Tests, servers: &Variables, beside: impl FnOnce() -> Summary + Send) -> Done {
    let mut summary = Summary::new();
    let mut variables = servers.to_vec();
    variables.extend(summary.variables());
    let workspace = ["test", "--workspace", "--all-features", "--no-fail-fast"];
    // Apart, so that the summary tells how long each takes.
    summary.run(&[&workspace[..], &["--all-targets", "--no-run"]].concat(), &variables);
    let beside = thread::scope(|scope| {
        let (mut waiting, mut running) = (Some(beside), None);
        // Cargo does one thing at a time until the tests begin.
        let begun = || running = waiting.take().map(|beside| scope.spawn(beside));
        summary.run_and(&[&workspace[..], &["--all-targets"]].concat(), &variables, begun);
        match running {
            Some(running) => running.join().ok(),
            // The tests could not be built.
            None => waiting.map(|beside| beside()),
        }
    });
    summary.add(beside);
    // `--all-targets` covers everything except doctests.
    summary.run(&[&workspace[..], &["--doc"]].concat(), &variables);
    model_check(&mut summary)?;
    if tests.full && !tests.without.contains(&servers::Server::Redis) {
        test_redis_with("Valkey 9", &wheels::VALKEY, &mut summary, &variables)?;
        test_redis_with("Redis 8", &wheels::REDIS_8, &mut summary, &variables)?;
    }
    summary.finish()
}

/// Runs the tests of the Redis adapter with another server that speaks its protocol.
fn test_redis_with(name: &str, wheel: &Wheel, summary: &mut Summary, variables: &Variables) -> Done {
    let program = wheel.program().map_err(|error| {
        eprintln!("xtask: no {name} for `--full`: {error}");
        1
    })?;
    let mut variables = variables.to_vec();
    let redis = servers::Server::Redis.variable();
    variables.retain(|(variable, _)| *variable != redis);
    variables.push((redis, program.into()));
    let package = [
        "test",
        "--package",
        "essentially-once-redis",
        "--all-features",
        "--no-fail-fast",
        "--all-targets",
    ];
    summary.run(&package, &variables);
    Ok(())
}

/// Runs the consumer loop under shuttle. This builds the core differently, so it uses a separate
/// target folder.
fn model_check(summary: &mut Summary) -> Done {
    let target = target().join("shuttle");
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

fn ci(tests: &Tests, servers: &Variables) -> Done {
    cargo(&["fmt", "--all", "--check"], &[])?;
    tidy()?;
    // The tests leave half of the processor idle, because they mostly wait.
    test(tests, servers, lint)
}

/// Runs all lints and builds the documentation, with warnings denied.
fn lint() -> Summary {
    // The tests come first. This concerns the thread, and what it starts. If it is refused, they
    // only take longer.
    let _ = rustix::process::nice(10);
    let mut summary = Summary::new();
    let mut clippy = |arguments: &[&str]| {
        summary.run(
            &[&["clippy", "--quiet"][..], arguments, &["--", "-D", "warnings"]].concat(),
            &[],
        );
    };
    clippy(&["--workspace", "--all-targets", "--all-features"]);
    // The tests use all features. These packages have optional ones. Those in one call have no
    // features that the others enable.
    for packages in [
        &[
            "essentially-once",
            "essentially-once-kafka",
            "essentially-once-postgres",
            "essentially-once-redis",
            "essentially-once-rabbitmq",
        ][..],
        &["orders"],
    ] {
        let packages: Vec<&str> = packages.iter().flat_map(|package| ["--package", package]).collect();
        clippy(&[&packages[..], &["--no-default-features"]].concat());
    }
    // Each backend of the program that keeps state can be built alone.
    for backend in ["sqlite", "postgres", "redis", "rabbitmq"] {
        let program = ["--package", "essentially-once-cli", "--no-default-features"];
        clippy(&[&program[..], &["--features", backend]].concat());
    }
    summary.run(
        &["doc", "--quiet", "--workspace", "--no-deps", "--all-features"],
        &[("RUSTDOCFLAGS", "-D warnings".into())],
    );
    summary
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
    // Cargo describes this package to it in others. Some dependencies look at them, and would be
    // built again each time a contributor changes between `cargo test` and `cargo xtask test`.
    for (name, _) in env::vars_os() {
        let described = name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"));
        if described {
            command.env_remove(name);
        }
    }
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

/// The folder that cargo builds into.
fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |folder| root().join(folder))
}

fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}
