//! Ships orders that arrive as JSON and invoices each of them in the same commit. One order is bad:
//! it becomes a dead letter, and an operator corrects it.
//!
//! ```text
//! cargo run -p hello-typed              # on files in the temporary folder
//! cargo run -p hello-typed -- shop.db   # and shop.bus.db, to which the invoices go
//! ```
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, path::PathBuf, process::ExitCode};

use essentially_once::{
    Consumer, ConsumerId, Handler, HandlerError, Log, NewRecord, Outbox as _, Record, async_trait,
    consumer::{
        DeadLetterOptions, Operator,
        dead_letters::{self, LetterFilter},
    },
    json,
    relay::Relay,
};
use essentially_once_sqlite::{Sqlite, SqliteTx, rusqlite::Connection};
use serde::{Deserialize, Serialize};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS shipments (number INTEGER NOT NULL, country TEXT NOT NULL)";

/// The outbox. On SQLite it is a log in the consumer's own file.
const INVOICES: &str = "invoices";

#[derive(Serialize, Deserialize)]
struct Order {
    number: u32,
    country: String,
    pieces: u32,
}

#[derive(Serialize, Deserialize)]
struct Invoice {
    order: u32,
    cents: u32,
}

struct Ship;

#[async_trait]
impl Handler<SqliteTx> for Ship {
    async fn handle(&mut self, record: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        let order: Order = json::decode(record)?;
        if order.pieces == 0 {
            // No further try helps, so the record is set aside at once.
            return Err(HandlerError::reject(format!("order {} has no pieces", order.number)));
        }
        let shipment = (order.number, &order.country);
        tx.execute("INSERT INTO shipments (number, country) VALUES (?1, ?2)", shipment)?;
        let invoice = Invoice {
            order: order.number,
            cents: order.pieces * 995,
        };
        let invoice = NewRecord::json(&invoice)?.key(order.number.to_string());
        tx.send(INVOICES, invoice).await?;
        Ok(())
    }
}

fn order(number: u32, country: &str, pieces: u32) -> Result<NewRecord, Failure> {
    let country = country.to_owned();
    let order = Order {
        number,
        country,
        pieces,
    };
    Ok(NewRecord::json(&order)?.key(number.to_string()))
}

async fn run(path: PathBuf) -> Result<(), Failure> {
    println!("opening {}", path.display());
    let shop = Connection::open(&path)?;
    shop.execute_batch(TABLE)?;
    let sqlite = Sqlite::open(&path).await?;
    let orders = sqlite.log("orders").await?;
    let three = [
        order(10248, "France", 12)?,
        order(10249, "Germany", 0)?,
        order(10250, "Brazil", 10)?,
    ];
    orders.append(&three).await?;

    let (shipping, store) = (ConsumerId::new("shipping")?, sqlite.store());
    let ship = || {
        Consumer::essentially_once(shipping.clone(), orders.clone(), store.clone(), Ship)
            .dead_letters(DeadLetterOptions::new())
            .run_until_caught_up()
    };
    println!("{}", ship().await?);

    // What an operator does with the program `essentially-once`, or a service with these functions.
    let ann = Operator::new("ann").because("the customer confirmed nine pieces");
    let no_pieces = LetterFilter::all().reason("has no pieces");
    for letter in dead_letters::find(&shipping, &store, &no_pieces, None, 100).await? {
        println!("dead letter at offset {}: {}", letter.record.offset, letter.last_reason);
        let mended = order(10249, "Germany", 9)?;
        dead_letters::edit(&shipping, &store, &letter, &mended, &ann).await?;
    }
    println!("{}", ship().await?);
    let shipments: i64 = shop.query_row("SELECT count(*) FROM shipments", [], |row| row.get(0))?;
    println!("rows in the table `shipments`: {shipments}");

    // The way of the invoices to another service: its bus, here another file.
    let bus = Sqlite::open(path.with_extension("bus.db")).await?.log(INVOICES).await?;
    let (id, outbox) = (ConsumerId::new("relay")?, sqlite.log(INVOICES).await?);
    let relay = Consumer::at_least_once(id, outbox, store, Relay::to(bus.clone()));
    println!("{}", relay.run_until_caught_up().await?);
    println!("invoices on the bus: {}", bus.bounds().await?.end);
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let argument = env::args_os().nth(1);
    if argument
        .as_ref()
        .is_some_and(|text| text.as_encoded_bytes().starts_with(b"-"))
    {
        eprintln!("usage: hello-typed [FILE]");
        return ExitCode::from(2);
    }
    let path = argument.map(PathBuf::from);
    let path = path.unwrap_or_else(|| env::temp_dir().join("essentially-once-typed.db"));
    match run(path).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello-typed: {error}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::test]
async fn the_example_ships_and_invoices_each_order_once() -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("shop.db");
    for runs in 1..=2_i64 {
        run(path.clone()).await?;
        let shop = Connection::open(&path)?;
        let shipments: i64 = shop.query_row("SELECT count(*) FROM shipments", [], |row| row.get(0))?;
        let bus = Sqlite::open(folder.path().join("shop.bus.db")).await?;
        let invoices = bus.log(INVOICES).await?.bounds().await?.end;
        assert_eq!((shipments, invoices.lo() as i64), (3 * runs, 3 * runs));
    }
    Ok(())
}
