//! Appends three orders to a Kafka topic, handles each once into a SQLite file, and shows the
//! result.
//!
//! ```text
//! docker run --rm -p 9092:9092 apache/kafka
//! cargo run -p hello-kafka -- kafka://127.0.0.1:9092 shop.db   # run it twice
//! ```
//!
//! It leaves the topic `hello-orders` on the broker.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, path::PathBuf, process::ExitCode};

use essentially_once::{Consumer, ConsumerId, Error, Handler, HandlerError, Log, NewRecord, Record, async_trait};
use essentially_once_kafka::Kafka;
use essentially_once_sqlite::{Sqlite, SqliteTx, rusqlite::Connection};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const MISSING: &str = "\
This example needs Kafka. Start a broker, for instance:
    docker run --rm -p 9092:9092 apache/kafka
or name yours:
    cargo run -p hello-kafka -- kafka://host:9092 shop.db";

const TABLE: &str = "CREATE TABLE IF NOT EXISTS shipments (country TEXT NOT NULL)";

struct Ship;

#[async_trait]
impl Handler<SqliteTx> for Ship {
    async fn handle(&mut self, order: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        let country = std::str::from_utf8(&order.payload)?;
        println!("  handling offset {}: an order from {country}", order.offset);
        // Committed with the offset, which Kafka never learns.
        tx.execute("INSERT INTO shipments (country) VALUES (?1)", [country])?;
        Ok(())
    }
}

async fn run(url: &str, path: PathBuf) -> Result<(), Failure> {
    let orders = Kafka::connect(url).await?.log("hello-orders").await?;
    let last = orders
        .append(&["Brazil", "Chile", "Brazil"].map(NewRecord::new))
        .await?
        .unwrap_or_default();
    println!("appended three orders, the last one at offset {last}");

    let shop = Connection::open(&path)?;
    shop.execute_batch(TABLE)?;
    let store = Sqlite::open(&path).await?.store();
    let consumer = Consumer::essentially_once(ConsumerId::new("hello-kafka")?, orders, store, Ship)
        // A single broker on your machine may lose records in a power cut.
        .accept_volatile();
    let report = consumer.run_until_caught_up().await?;
    println!("the consumer's report: {report}");
    let shipments: i64 = shop.query_row("SELECT count(*) FROM shipments", [], |row| row.get(0))?;
    println!("rows in the table `shipments` of {}: {shipments}", path.display());
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let url = arguments.next().unwrap_or_else(|| "kafka://127.0.0.1:9092".into());
    let path = arguments.next().map(PathBuf::from);
    let path = path.unwrap_or_else(|| env::temp_dir().join("essentially-once-hello-kafka.db"));
    match run(&url, path).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello-kafka: {error}");
            if let Some(Error::Unavailable { .. }) = error.downcast_ref() {
                eprintln!("{MISSING}");
            }
            ExitCode::FAILURE
        }
    }
}
