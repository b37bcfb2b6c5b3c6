//! Appends three orders to a log in a SQLite file, handles each once, and shows the result.
//!
//! ```text
//! cargo run -p hello-sqlite              # on a file in the temporary folder
//! cargo run -p hello-sqlite -- shop.db   # run it twice: the second run handles three more
//! ```
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

#[cfg(test)]
mod crash_test;

use std::{env, path::PathBuf, process::ExitCode};

use essentially_once::{Consumer, ConsumerId, Handler, HandlerError, Log, NewRecord, Record, async_trait};
use essentially_once_sqlite::{Sqlite, SqliteTx, rusqlite::Connection};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS shipments (country TEXT NOT NULL)";

struct Ship;

#[async_trait]
impl Handler<SqliteTx> for Ship {
    async fn handle(&mut self, order: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        let country = std::str::from_utf8(&order.payload)?;
        println!("  handling offset {}: an order from {country}", order.offset);
        tx.execute("INSERT INTO shipments (country) VALUES (?1)", [country])?;
        Ok(())
    }
}

async fn run(path: PathBuf) -> Result<(), Failure> {
    println!("opening {}", path.display());
    let shop = Connection::open(&path)?;
    shop.execute_batch(TABLE)?;
    let sqlite = Sqlite::open(&path).await?;
    let orders = sqlite.log("orders").await?;
    let last = orders
        .append(&["Brazil", "Chile", "Brazil"].map(NewRecord::new))
        .await?
        .unwrap_or_default();
    println!("appended three orders, the last one at offset {last}");

    let consumer = Consumer::essentially_once(ConsumerId::new("shipping")?, orders, sqlite.store(), Ship);
    let report = consumer.run_until_caught_up().await?;
    println!("the consumer's report: {report}");
    let shipments: i64 = shop.query_row("SELECT count(*) FROM shipments", [], |row| row.get(0))?;
    println!("rows in the table `shipments`: {shipments}");
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let argument = env::args_os().nth(1);
    if argument
        .as_ref()
        .is_some_and(|text| text.as_encoded_bytes().starts_with(b"-"))
    {
        eprintln!("usage: hello-sqlite [FILE]");
        return ExitCode::from(2);
    }
    let path = argument.map(PathBuf::from);
    let path = path.unwrap_or_else(|| env::temp_dir().join("essentially-once-hello.db"));
    match run(path).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello-sqlite: {error}");
            ExitCode::FAILURE
        }
    }
}
