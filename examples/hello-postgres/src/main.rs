//! Appends three orders to a log in PostgreSQL, handles each once, and shows the result.
//!
//! ```text
//! initdb -D hello -U postgres --auth=trust && postgres -D hello -k ''   # PostgreSQL 13 or later
//! cargo run -p hello-postgres -- postgres://postgres@127.0.0.1/postgres
//! ```
//!
//! It leaves the table `hello_shipped` in the database, and the schema `essentially_once` with the
//! log and the position.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, process::ExitCode};

use essentially_once::{Consumer, ConsumerId, Error, Handler, HandlerError, Log, NewRecord, Record, async_trait};
use essentially_once_postgres::{
    Pg, PgTx,
    tokio_postgres::{self, NoTls},
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const MISSING: &str = "\
This example needs PostgreSQL 13 or later. Start a server, as any user but root:
    initdb -D hello -U postgres --auth=trust && postgres -D hello -k ''
or name yours:
    cargo run -p hello-postgres -- postgres://user:password@host/database";

const TABLE: &str = "CREATE TABLE IF NOT EXISTS hello_shipped (country text PRIMARY KEY, n bigint NOT NULL)";

const COUNT: &str =
    "INSERT INTO hello_shipped VALUES ($1, 1) ON CONFLICT (country) DO UPDATE SET n = hello_shipped.n + 1";

struct Ship;

#[async_trait]
impl Handler<PgTx> for Ship {
    async fn handle(&mut self, order: &Record, tx: &mut PgTx) -> Result<(), HandlerError> {
        println!("  handling offset {}: {}", order.offset, order.payload.escape_ascii());
        let country = std::str::from_utf8(&order.payload)?;
        tx.queue(COUNT, &[&country]).await?; // committed with the position
        Ok(())
    }
}

async fn run(url: &str) -> Result<(), Failure> {
    let pg = Pg::connect(url).await?;
    let (shop, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    shop.batch_execute(TABLE).await?;
    let orders = pg.log("hello-orders").await?;
    let last = orders
        .append(&["Brazil", "Chile", "Brazil"].map(NewRecord::new))
        .await?
        .unwrap_or_default();
    println!("appended three orders, the last one at offset {last}");

    let consumer = Consumer::essentially_once(ConsumerId::new("hello-postgres")?, orders, pg.store(), Ship);
    let report = consumer.run_until_caught_up().await?;
    println!("the consumer's report: {report}");
    println!("shipped by country, over all runs:");
    let shipped = "SELECT country, n FROM hello_shipped ORDER BY country";
    for row in shop.query(shipped, &[]).await? {
        println!("  {}: {}", row.get::<_, &str>(0), row.get::<_, i64>(1));
    }
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let url = env::args().nth(1);
    let url = url.unwrap_or_else(|| "postgres://postgres@127.0.0.1/postgres".into());
    match run(&url).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello-postgres: {error}");
            if let Some(Error::Unavailable { .. }) = error.downcast_ref() {
                eprintln!("{MISSING}");
            }
            ExitCode::FAILURE
        }
    }
}
