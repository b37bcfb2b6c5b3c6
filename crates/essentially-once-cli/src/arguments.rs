//! The arguments of the program.

use std::{env, ffi::OsString, path::PathBuf, str::FromStr, time::SystemTime};

use clap::{
    Args, Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, builder::Resettable,
    parser::ValueSource,
};
use clap_complete::Shell;
use essentially_once::{ConsumerId, Offset, StartAt, consumer::Operator, consumer::dead_letters::LetterFilter};
use jiff::{SignedDuration, Timestamp};

use crate::failure::Failure;

const BACKENDS: &str = "\
A URL names a backend, and after a `#` a log on it:
  sqlite:/var/lib/shop/shop.db#orders    a SQLite file; `sqlite:shop.db` is relative to this folder
  postgres://user:password@host/database#orders, with ?sslmode=require before the `#` for TLS
  redis://user:password@host:6379/0#orders, rediss://... with TLS
  amqp://user:password@host/vhost#orders, amqps://... with TLS
  kafka://user:password@host:9092#orders, or `#orders/3` for partition 3 of the topic, kafkas://... with TLS
Kafka has logs only, so name the store as well.

Without `--log`, the log is on the backend of `--store`, under the name that the consumer's position has. Without
`--store`, the store is on the backend of `--log`. A URL with a password is safer in the environment than in the
arguments, which every user of the machine can see.

An empty variable of the environment counts as none.

Exit status: 0 if it is done, 1 if it failed or was refused, 2 if the arguments are wrong.";

/// Looks after the consumers of essentially-once: shows what they do, and pauses, moves and repairs
/// them while they run.
#[derive(Parser)]
#[command(name = "essentially-once", version, after_help = BACKENDS, max_term_width = 100)]
pub(crate) struct Cli {
    /// The backend that holds the log, and the log's name.
    #[arg(
        long,
        value_name = "URL",
        global = true,
        env = "ESSENTIALLY_ONCE_LOG",
        hide_env_values = true
    )]
    pub(crate) log: Option<String>,
    /// The backend that holds positions, state and dead letters.
    #[arg(
        long,
        value_name = "URL",
        global = true,
        env = "ESSENTIALLY_ONCE_STORE",
        hide_env_values = true
    )]
    pub(crate) store: Option<String>,
    /// The consumer.
    #[arg(long, value_name = "NAME", global = true, env = "ESSENTIALLY_ONCE_CONSUMER", hide_env_values = true,
          value_parser = consumer)]
    pub(crate) consumer: Option<ConsumerId>,
    /// The prefix of the store's keys or streams, or PostgreSQL's schema, if the services set one.
    #[arg(
        long,
        value_name = "TEXT",
        global = true,
        env = "ESSENTIALLY_ONCE_PREFIX",
        hide_env_values = true
    )]
    pub(crate) prefix: Option<String>,
    /// Print JSON instead of text: one value per line.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Show it again at this interval, 2 seconds by default, until interrupted.
    #[arg(long, value_name = "SECONDS", global = true, num_args = 0..=1, default_missing_value = "2", require_equals = true,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) watch: Option<u64>,
    #[command(subcommand)]
    pub(crate) verb: Verb,
    /// Whether `--consumer` is an argument, and not only in the environment.
    #[arg(skip)]
    pub(crate) is_consumer_given: bool,
}

impl Cli {
    /// Reads the arguments and the environment.
    pub(crate) fn of_program() -> Result<Self, clap::Error> {
        let matches = Self::program().try_get_matches()?;
        let mut cli = Self::from_arg_matches(&matches)?;
        cli.is_consumer_given = matches.value_source("consumer") == Some(ValueSource::CommandLine);
        Ok(cli)
    }

    /// A service manager may set a variable to nothing, which clap takes for a value.
    fn program() -> Command {
        ["log", "store", "consumer", "prefix"]
            .into_iter()
            .fold(Self::command(), |program, name| {
                program.mut_arg(name, |argument| {
                    let value = argument.get_env().and_then(env::var_os);
                    match value.is_some_and(|value| value.is_empty()) {
                        true => argument.env(Resettable::Reset),
                        false => argument,
                    }
                })
            })
    }
}

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Check whether the backends can be reached and keep what they acknowledge.
    Doctor,
    /// Show where the consumer is, what it waits for, and what operators did to it last.
    Status,
    /// Show how many records the consumer has not handled yet.
    Lag {
        /// Exit with status 1 if there are more.
        #[arg(long, value_name = "RECORDS")]
        max: Option<u64>,
    },
    /// Show the positions of all consumers of the store, or of those that are named here or with
    /// `--consumer`.
    Positions {
        /// The consumers; needed if the store cannot list them.
        #[arg(value_parser = consumer)]
        consumers: Vec<ConsumerId>,
    },
    /// Show records of the log, by default the last ones.
    Tail {
        /// How many records: 10 by default.
        #[arg(short = 'n', long)]
        lines: Option<u64>,
        /// Begin at this offset instead.
        #[arg(long, value_name = "OFFSET")]
        from: Option<Offset>,
        /// Go on with the records that arrive, until interrupted.
        #[arg(short, long)]
        follow: bool,
    },
    /// Show, retry, discard or edit the records that the consumer has set aside.
    #[command(subcommand)]
    DeadLetters(Letters),
    /// Pass the record that the consumer cannot handle, without its effects.
    Skip {
        /// The record's offset, as `status` shows it.
        offset: Offset,
        #[command(flatten)]
        change: Change,
    },
    /// Move the consumer's position.
    Seek {
        /// `earliest`, `latest`, or an offset.
        #[arg(value_parser = place)]
        to: StartAt,
        #[command(flatten)]
        change: Change,
    },
    /// Stop all instances of the consumer from handling anything until `resume`.
    Pause {
        #[command(flatten)]
        change: Change,
    },
    /// Let a paused consumer continue.
    Resume {
        #[command(flatten)]
        change: Change,
    },
    /// Look after a relay: `--log` is its outbox, and `--consumer` its name.
    #[command(subcommand)]
    Relay(Relay),
    /// Show what operators did to the consumer.
    Journal,
    /// Print a script that completes this program's arguments in a shell.
    Completions { shell: Shell },
}

#[derive(Subcommand)]
pub(crate) enum Letters {
    /// List letters in the order of their offsets.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Begin after this offset.
        #[arg(long, value_name = "OFFSET")]
        after: Option<Offset>,
        /// How many letters at most: 20 by default, and all with `--json`.
        #[arg(long, value_parser = letters)]
        limit: Option<usize>,
    },
    /// Show one letter with its payload, its headers and all that is known of its tries.
    Show {
        offset: Offset,
        /// Write the payload, and nothing else, to this file; `-` for the output.
        #[arg(long, value_name = "FILE")]
        payload: Option<PathBuf>,
    },
    /// Have the consumer try letters again now.
    Retry {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        change: Change,
    },
    /// Remove letters for good, without their effects. One that is named by its offset is removed
    /// without a question.
    Discard {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        change: Change,
    },
    /// Replace the payload of a letter, and have the consumer try it.
    Edit {
        offset: Offset,
        /// The new payload.
        #[arg(long, value_name = "TEXT")]
        payload: Option<OsString>,
        /// A file with the new payload; `-` for the input.
        #[arg(long, value_name = "FILE", conflicts_with = "payload")]
        payload_file: Option<PathBuf>,
        /// The key, for a malformed letter. The key of any other letter must stay.
        #[arg(long, value_name = "TEXT")]
        key: Option<OsString>,
        #[command(flatten)]
        change: Change,
    },
}

#[derive(Subcommand)]
pub(crate) enum Relay {
    /// Show how many records the relay has not sent yet, and for how long the oldest waits.
    Status,
    /// Show how to give the outbox a new producer after it was restored from an older copy.
    NewEpoch,
}

/// One letter, or all that a filter selects.
#[derive(Args)]
pub(crate) struct Which {
    /// One letter, by its offset.
    pub(crate) offset: Option<Offset>,
    /// All letters.
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) filter: Filter,
}

/// What [`Which`] selects.
pub(crate) enum Selected {
    One(Offset),
    Many(LetterFilter),
}

impl Which {
    pub(crate) fn selected(&self) -> Result<Selected, Failure> {
        let filter = self.filter.to_library();
        let is_filtered = filter != LetterFilter::all();
        match (self.offset, self.all, is_filtered) {
            (Some(offset), false, false) => Ok(Selected::One(offset)),
            (None, true, false) | (None, false, true) => Ok(Selected::Many(filter)),
            (None, false, false) => Err(Failure::usage(format!("which letters? {CHOICE}"))),
            _ => Err(Failure::usage(format!(
                "these select letters in several ways: {CHOICE}"
            ))),
        }
    }
}

const CHOICE: &str =
    "give the offset of one, or `--all`, or one or more of `--key`, `--reason`, `--since` and `--before`";

/// Selects letters that meet all conditions.
#[derive(Args, Default)]
#[group(id = "filter", multiple = true)]
pub(crate) struct Filter {
    /// Letters with this key.
    #[arg(long, value_name = "TEXT")]
    key: Option<OsString>,
    /// Letters whose first or last reason contains this text.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Letters that were set aside at this time or later: `2h`, for two hours ago, or
    /// `2026-11-27T08:00:00Z`.
    #[arg(long, value_name = "TIME")]
    since: Option<Moment>,
    /// Letters that were set aside before this time.
    #[arg(long, value_name = "TIME")]
    before: Option<Moment>,
}

impl Filter {
    pub(crate) fn to_library(&self) -> LetterFilter {
        let mut filter = LetterFilter::all();
        if let Some(key) = &self.key {
            filter = filter.key(key.as_encoded_bytes().to_vec());
        }
        if let Some(reason) = &self.reason {
            filter = filter.reason(reason);
        }
        if let Some(Moment(time)) = self.since {
            filter = filter.parked_from(time);
        }
        if let Some(Moment(time)) = self.before {
            filter = filter.parked_before(time);
        }
        filter
    }
}

/// What every verb that changes something takes.
#[derive(Args)]
pub(crate) struct Change {
    /// Show what would change, and change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask.
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Who makes the change, for the consumer's journal.
    #[arg(long, value_name = "NAME", env = "USER", default_value = "unknown")]
    by: String,
    /// Why, for the consumer's journal.
    #[arg(long, value_name = "TEXT", default_value = "")]
    because: String,
}

impl Change {
    pub(crate) fn operator(&self) -> Operator {
        let by = match self.by.trim() {
            "" => "unknown",
            by => by,
        };
        Operator::new(by).because(&self.because)
    }
}

/// A point in time.
#[derive(Clone, Copy)]
struct Moment(SystemTime);

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(time) = text.parse::<Timestamp>() {
            return Ok(Self(time.into()));
        }
        let ago = text.parse::<SignedDuration>().ok();
        // `2h ago` is negative, and means the same as `2h`.
        ago.and_then(|ago| Timestamp::now().checked_sub(ago.abs()).ok())
            .map(|time| Self(time.into()))
            .ok_or_else(|| "it is neither a duration like `2h` nor a time like `2026-11-27T08:00:00Z`".into())
    }
}

/// A name that looks like a URL may hold a password, which nothing may repeat.
fn consumer(text: &str) -> Result<ConsumerId, String> {
    match text.contains("://") {
        true => Err("it is a URL and no name: give URLs with `--log` and `--store`".into()),
        false => text.parse().map_err(|error: essentially_once::Error| error.to_string()),
    }
}

fn letters(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least one letter must be shown".into()),
        Ok(letters) => Ok(letters),
        Err(error) => Err(format!("{error}")),
    }
}

fn place(text: &str) -> Result<StartAt, String> {
    match text {
        "earliest" => Ok(StartAt::Earliest),
        "latest" => Ok(StartAt::Latest),
        offset => offset
            .parse()
            .map(StartAt::Offset)
            .map_err(|_| "give `earliest`, `latest`, or an offset such as 12 or 1795792176303-0".into()),
    }
}
