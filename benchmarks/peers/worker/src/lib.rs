//! What each program that takes part is asked to do: to prepare a bus, to send numbered records to
//! it, or to consume them. A consumer records in its store how often it has handled each number.
//! The judge reads only that.

use std::{
    ops::Range,
    time::{Duration, SystemTime},
};

use clap::{Args, Parser, Subcommand};

/// The length of a payload, in bytes. It begins with the record's number.
pub const PAYLOAD: usize = 100;

/// The hash in Redis, and the table in SQL databases, that holds how often each number was handled.
/// The judge creates the table: `effects (number bigint PRIMARY KEY, times bigint)`.
pub const EFFECTS: &str = "{peers}:effects";

/// Counts one record. SQLite and PostgreSQL take it alike.
pub const COUNT: &str =
    "INSERT INTO effects (number, times) VALUES ($1, 1) ON CONFLICT (number) DO UPDATE SET times = effects.times + 1";

/// A program that takes part.
#[derive(Parser)]
pub struct Program {
    #[command(subcommand)]
    pub task: Task,
    /// The bus: the URL of a server, or the path of a SQLite file.
    #[arg(long, global = true, default_value = "")]
    pub bus: String,
    /// Where effects are recorded, if not on the bus.
    #[arg(long, global = true)]
    pub store: Option<String>,
    /// Which of several ways of this program to consume.
    #[arg(long, global = true, default_value = "")]
    pub way: String,
}

impl Program {
    /// The store: the bus, unless another is named.
    pub fn store(&self) -> &str {
        self.store.as_deref().unwrap_or(&self.bus)
    }
}

#[derive(Subcommand, Clone)]
pub enum Task {
    /// Creates what sending and consuming need.
    Prepare,
    /// Sends the records `0..records`.
    Send(Sending),
    /// Consumes until it is killed.
    Work(Work),
}

#[derive(Args, Clone, Copy)]
pub struct Sending {
    #[arg(long)]
    pub records: u64,
    /// How many records to send per second, one by one. Without it they are sent as fast as the
    /// library takes them.
    #[arg(long)]
    pub per_second: Option<u64>,
}

#[derive(Args, Clone)]
pub struct Work {
    /// The name of this instance. A restarted instance keeps its name.
    #[arg(long)]
    pub instance: String,
    /// How many records to handle per commit, where the library can choose.
    #[arg(long)]
    pub batch: usize,
    /// How long the handler works on after it has counted a record, in microseconds.
    #[arg(long)]
    pub pause: u64,
    /// After which silence of an instance, in milliseconds, another takes its records over.
    #[arg(long)]
    pub patience: u64,
    /// Whether this is the only instance.
    #[arg(long)]
    pub alone: bool,
}

impl Work {
    pub fn pause(&self) -> Duration {
        Duration::from_micros(self.pause)
    }

    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.patience)
    }
}

impl Sending {
    /// When the first record is due. It is printed, so that the judge knows when each was.
    ///
    /// # Panics
    /// If the clock is before 1970.
    pub fn start(self) -> Schedule {
        let now = SystemTime::now();
        let since = now.duration_since(SystemTime::UNIX_EPOCH).expect("a clock after 1970");
        println!("{}", since.as_micros());
        Schedule {
            started: now,
            sending: self,
        }
    }
}

/// When records are due.
#[derive(Clone, Copy)]
pub struct Schedule {
    started: SystemTime,
    sending: Sending,
}

impl Schedule {
    /// The numbers to send at once: one by one at a rate, and otherwise `most`.
    pub fn batches(self, most: usize) -> impl Iterator<Item = Range<u64>> {
        let size = if self.sending.per_second.is_some() { 1 } else { most };
        let records = self.sending.records;
        (0..records)
            .step_by(size)
            .map(move |first| first..records.min(first + size as u64))
    }

    /// How long to wait before record `number` is sent.
    pub fn wait(&self, number: u64) -> Option<Duration> {
        let due = self.started + Duration::from_micros(number * 1_000_000 / self.sending.per_second?);
        due.duration_since(SystemTime::now()).ok()
    }
}

/// The payload of a record.
pub fn payload(number: u64) -> [u8; PAYLOAD] {
    let mut payload = [b'x'; PAYLOAD];
    payload[..20].copy_from_slice(format!("{number:020}").as_bytes());
    payload
}

/// The number of a payload.
///
/// # Panics
/// If it has none.
pub fn number(payload: &[u8]) -> u64 {
    let digits = payload.get(..20).and_then(|digits| std::str::from_utf8(digits).ok());
    digits
        .and_then(|digits| digits.parse().ok())
        .expect("a payload that begins with its number")
}
