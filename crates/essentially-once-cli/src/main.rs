//! The program `essentially-once`. See its `--help`, and the README of this crate.

#[cfg(not(any(feature = "sqlite", feature = "postgres", feature = "redis", feature = "rabbitmq")))]
compile_error!("without a store there is nothing to look after: enable `sqlite`, `postgres`, `redis` or `rabbitmq`");

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
    time::Duration,
};

use clap::CommandFactory as _;

use crate::{
    arguments::{Cli, Letters, Relay, Verb},
    failure::Failure,
    session::Session,
};

mod arguments;
mod backend;
mod failure;
mod output;
mod session;
mod store;
mod verbs;

fn main() -> ExitCode {
    let cli = match Cli::of_program() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("essentially-once: cannot start: {error}\n"));
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(&cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure, Failure::ClosedOutput) {
                complain(&format!("essentially-once: {failure}\n"));
            }
            failure.status()
        }
    }
}

/// Shows what is wrong with the arguments, or the help. A value that looks like a URL may hold a
/// password, and is not repeated.
fn refuse(error: &clap::Error) -> ExitCode {
    let values = env::args_os().skip(1).chain(env::var_os("ESSENTIALLY_ONCE_CONSUMER"));
    let values = values.map(|value| value.to_string_lossy().into_owned());
    let mut urls: Vec<String> = values.filter(|value| value.contains("://")).collect();
    // In `--name=URL`, only the URL is a value.
    let named = urls.iter().filter_map(|value| value.split_once('='));
    let named: Vec<_> = named.map(|(_, url)| url.to_owned()).collect();
    urls.extend(named.into_iter().filter(|url| url.contains("://")));
    let text = error.to_string();
    if !urls.iter().any(|url| text.contains(url)) {
        // Fails only if nobody reads it.
        let _ = error.print();
        return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
    }
    let text = urls.iter().fold(text, |text, url| text.replace(url, "<URL>"));
    complain(&text);
    ExitCode::from(2)
}

/// Says what is wrong. If nobody can read it, the exit status still says that something is.
fn complain(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

async fn run(cli: &Cli) -> Result<(), Failure> {
    if let Verb::Completions { shell } = cli.verb {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "essentially-once", &mut script);
        return Ok(io::stdout().write_all(&script)?);
    }
    let session = Session::new(cli)?;
    if cli.verb.needs_consumer() {
        session.consumer()?;
    }
    let Some(seconds) = cli.watch else {
        return show(&session).await;
    };
    if !cli.verb.can_be_watched() {
        return Err(Failure::usage(
            "`--watch` shows a state again and again; it goes with doctor, status, lag, positions, journal, \
             dead-letters list and relay status",
        ));
    }
    loop {
        if io::stdout().is_terminal() && !cli.json {
            // Clears the screen (ECMA-48).
            write!(io::stdout(), "\x1b[2J\x1b[H")?;
        }
        show(&session).await?;
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
}

async fn show(session: &Session<'_>) -> Result<(), Failure> {
    match &session.cli.verb {
        Verb::Doctor => verbs::doctor::doctor(session).await,
        Verb::Status => verbs::status::status(session).await,
        Verb::Lag { max } => verbs::status::lag(session, *max).await,
        Verb::Positions { consumers } => verbs::positions::positions(session, consumers).await,
        Verb::Tail { lines, from, follow } => verbs::tail::tail(session, *lines, *from, *follow).await,
        Verb::DeadLetters(letters) => verbs::letters::letters(session, letters).await,
        Verb::Skip { offset, change } => verbs::moving::skip(session, *offset, change).await,
        Verb::Seek { to, change } => verbs::moving::seek(session, *to, change).await,
        Verb::Pause { change } => verbs::pausing::pause(session, change).await,
        Verb::Resume { change } => verbs::pausing::resume(session, change).await,
        Verb::Relay(Relay::Status) => verbs::status::status(session).await,
        Verb::Relay(Relay::NewEpoch) => verbs::relay::new_epoch(session).await,
        Verb::Journal => verbs::journal::journal(session).await,
        // Needs no backend.
        Verb::Completions { .. } => Ok(()),
    }
}

impl Verb {
    fn needs_consumer(&self) -> bool {
        !matches!(
            self,
            Self::Doctor | Self::Positions { .. } | Self::Tail { .. } | Self::Completions { .. }
        )
    }

    fn can_be_watched(&self) -> bool {
        matches!(
            self,
            Self::Doctor
                | Self::Status
                | Self::Lag { .. }
                | Self::Positions { .. }
                | Self::Journal
                | Self::DeadLetters(Letters::List { .. })
                | Self::Relay(Relay::Status)
        )
    }
}
