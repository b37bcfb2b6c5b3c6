//! A shop whose consumer sets some orders aside, and calls of the program.

use std::{
    ffi::OsStr,
    path::Path,
    process::{Command, Output, Stdio},
};

use essentially_once::{
    Consumer, ConsumerId, Handler, HandlerError, KeyValue, Log, NewRecord, Record, async_trait,
    consumer::{DeadLetterOptions, Report},
};
use essentially_once_sqlite::{Sqlite, SqliteTx};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// The consumer's name.
pub(crate) const SHIPPING: &str = "shipping";

pub(crate) struct Shop {
    pub(crate) folder: TempDir,
    pub(crate) runtime: Runtime,
    pub(crate) sqlite: Sqlite,
}

/// Ships orders that are numbers. Takes a decimal comma only once it is mended.
struct Ship {
    is_mended: bool,
}

#[async_trait]
impl Handler<SqliteTx> for Ship {
    async fn handle(&mut self, order: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        let text = str::from_utf8(&order.payload)?;
        let text = if self.is_mended {
            text.replace(',', ".")
        } else {
            text.to_owned()
        };
        let freight: f64 = text.parse().map_err(HandlerError::reject)?;
        tx.put(&order.payload, freight.to_string().as_bytes()).await?;
        Ok(())
    }
}

impl Shop {
    /// A shop without orders.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let runtime = Runtime::new().expect("runtime");
        let sqlite = runtime
            .block_on(Sqlite::open(folder.path().join("shop.db")))
            .expect("open");
        Self {
            folder,
            runtime,
            sqlite,
        }
    }

    /// A shop with five orders, two of which cannot be read, and one that waits behind them.
    pub(crate) fn with_letters() -> Self {
        let shop = Self::new();
        shop.place(&[
            ("Chile", "32.38"),
            ("Chile", "11,61"),
            ("Peru", "65.83"),
            ("Peru", "n/a"),
            ("Chile", "4.99"),
        ]);
        let report = shop.consume(false);
        assert_eq!((report.handled, report.parked), (2, 3));
        shop
    }

    /// Appends orders with their keys.
    pub(crate) fn place(&self, orders: &[(&'static str, &'static str)]) {
        let records: Vec<_> = orders
            .iter()
            .map(|(key, order)| NewRecord::new(*order).key(*key))
            .collect();
        let append = async { self.sqlite.log("orders").await?.append(&records).await };
        self.runtime.block_on(append).expect("append");
    }

    /// Runs the consumer until it has caught up.
    pub(crate) fn consume(&self, is_mended: bool) -> Report {
        let run = async {
            let log = self.sqlite.log("orders").await?;
            let consumer = ConsumerId::new(SHIPPING)?;
            Consumer::essentially_once(consumer, log, self.sqlite.store(), Ship { is_mended })
                .dead_letters(DeadLetterOptions::new())
                .run_until_caught_up()
                .await
        };
        self.runtime.block_on(run).expect("run")
    }

    /// Calls the program on the shop and its consumer.
    pub(crate) fn call(&self, arguments: &[&str]) -> Called {
        let mut command = self.command(arguments);
        Called::of(command.output().expect("start"))
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program(self.folder.path());
        command
            .env("ESSENTIALLY_ONCE_STORE", "sqlite:shop.db")
            .env("ESSENTIALLY_ONCE_CONSUMER", SHIPPING)
            .args(arguments);
        command
    }

    /// Calls the program, which must succeed, and returns the lines of its JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Vec<Value> {
        let called = self.call(&[arguments, &["--json"]].concat());
        assert_eq!(called.status, Some(0), "{arguments:?}: {}", called.error);
        let lines = called.output.lines();
        lines.map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// What the consumer's journal says: who did what, and why.
    pub(crate) fn journal(&self) -> Vec<[String; 3]> {
        let entries = self.json(&["journal"]);
        let text = |entry: &Value, field| entry[field].as_str().expect("text").to_owned();
        entries
            .iter()
            .map(|entry| ["by", "action", "reason"].map(|field| text(entry, field)))
            .collect()
    }
}

/// The program in a folder, without a backend.
pub(crate) fn program(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_essentially-once"));
    for variable in ["LOG", "STORE", "CONSUMER", "PREFIX"] {
        command.env_remove(format!("ESSENTIALLY_ONCE_{variable}"));
    }
    command.env("USER", "ann").current_dir(folder).stdin(Stdio::null());
    command
}

/// Calls the program in a folder without naming a backend in the environment.
pub(crate) fn call(folder: &Path, arguments: &[impl AsRef<OsStr>]) -> Called {
    Called::of(program(folder).args(arguments).output().expect("start"))
}

pub(crate) struct Called {
    pub(crate) status: Option<i32>,
    pub(crate) output: String,
    pub(crate) error: String,
}

impl Called {
    pub(crate) fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Self {
            status: output.status.code(),
            output: text(output.stdout),
            error: text(output.stderr),
        }
    }

    /// The call must have ended with this status, and its error must contain this text.
    pub(crate) fn failed(&self, status: i32, text: &str) {
        assert_eq!(self.status, Some(status), "{}{}", self.output, self.error);
        assert!(self.error.contains(text), "{text:?} is not in: {}", self.error);
    }
}
