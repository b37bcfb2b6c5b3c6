//! The repository's own commands, run as `cargo xtask <command>`.

use std::{
    env,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use clap::{Parser, Subcommand};

mod tidy;

#[derive(Parser)]
#[command(name = "cargo xtask", about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Clone, Copy, Subcommand)]
enum Task {
    /// Everything a contributor runs before a change is proposed: all tests, documentation tests, and the model checker.
    Test,
    /// What the server runs: format, lints, documentation, `test` and `tidy`.
    Ci,
    /// Checks what people forget: changelog, README table, inherited lints, leftovers, dead links.
    Tidy,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Test => test(),
        Task::Ci => ci(),
        Task::Tidy => tidy(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(status) => ExitCode::from(status),
    }
}

/// A task stops at its first failure, with the exit status to end with.
type Done = Result<(), u8>;

fn test() -> Done {
    cargo(&["test", "--workspace", "--all-targets"], None)?;
    // `--all-targets` covers everything but documentation tests.
    cargo(&["test", "--workspace", "--doc"], None)?;
    model_check()
}

/// The consumer loop under shuttle: another build of the core, in a target folder of its own so that neither build undoes the other.
fn model_check() -> Done {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let target = target.join("shuttle");
    let Some(target) = target.to_str() else {
        eprintln!("xtask: the target folder {} is not UTF-8; move it", target.display());
        return Err(1);
    };
    cargo(
        &[
            "test",
            "--package",
            "essentially-once",
            "--test",
            "shuttle",
            "--target-dir",
            target,
        ],
        Some(("RUSTFLAGS", "--cfg shuttle")),
    )
}

fn ci() -> Done {
    cargo(&["fmt", "--all", "--check"], None)?;
    cargo(
        &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        None,
    )?;
    cargo(
        &["doc", "--workspace", "--no-deps"],
        Some(("RUSTDOCFLAGS", "-D warnings")),
    )?;
    test()?;
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

fn cargo(arguments: &[&str], variable: Option<(&str, &str)>) -> Done {
    let shown = format!("cargo {}", arguments.join(" "));
    match variable {
        Some((name, value)) => say(&format!("{name}='{value}' {shown}")),
        None => say(&shown),
    }
    // Cargo names itself to what it runs, so that the same toolchain goes on.
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let status = command.args(arguments).envs(variable).current_dir(root()).status();
    match status {
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

/// Shows a command before it runs; on stderr, where cargo writes too, so that the order is kept.
fn say(command: &str) {
    // A closed stderr is no reason to stop.
    let _ = writeln!(io::stderr(), "$ {command}");
}

fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}
