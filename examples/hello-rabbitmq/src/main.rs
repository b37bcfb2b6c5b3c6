//! Appends three orders to a RabbitMQ stream, handles each once, and shows the result. It uses no
//! database.
//!
//! ```text
//! cargo run -p hello-rabbitmq -- amqp://guest:guest@127.0.0.1/%2f   # RabbitMQ 3.10 or later
//! ```
//!
//! It leaves the stream `hello-orders` and up to three streams `essentially-once.hello-rabbitmq.*`
//! on the broker.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, process::ExitCode};

use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue, Log, NewRecord, Outbox, ReadState, Record,
    async_trait,
};
use essentially_once_rabbitmq::{Rabbit, RabbitTx};

const MISSING: &str = "\
This example needs RabbitMQ 3.10 or later. Start one, for instance:
    docker run --rm -p 5672:5672 rabbitmq:4
or name yours:
    cargo run -p hello-rabbitmq -- amqp://user:password@host/%2f";

struct Ship;

#[async_trait]
impl Handler<RabbitTx> for Ship {
    async fn handle(&mut self, order: &Record, tx: &mut RabbitTx) -> Result<(), HandlerError> {
        println!("  handling offset {}: {}", order.offset, order.payload.escape_ascii());
        let before: u64 = match tx.get(b"shipped").await? {
            Some(count) => std::str::from_utf8(&count)?.parse()?,
            None => 0,
        };
        tx.put(b"shipped", (before + 1).to_string().as_bytes()).await?;
        // Part of the same commit. A relay or a consumer reads it from `RabbitStore::sent_to`.
        tx.send("billing", NewRecord::new(order.payload.clone())).await?;
        Ok(())
    }
}

async fn run(url: &str) -> Result<(), Error> {
    let rabbit = Rabbit::connect(url).await?;
    let orders = rabbit.log("hello-orders").await?;
    orders
        .append(&["Brazil", "Chile", "Brazil"].map(NewRecord::new))
        .await?;
    println!("appended three orders, and the broker confirmed them");

    let (id, store) = (ConsumerId::new("hello-rabbitmq")?, rabbit.store());
    let consumer = Consumer::essentially_once(id.clone(), orders, store.clone(), Ship);
    let report = consumer.run_until_caught_up().await?;
    println!("the consumer's report: {report}");
    let state = store.read_state(&id, &[b"shipped"]).await?;
    println!("value of the key `shipped`: {:?}", state.values[0]);
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let url = env::args()
        .nth(1)
        .unwrap_or_else(|| "amqp://guest:guest@127.0.0.1/%2f".into());
    match run(&url).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello-rabbitmq: {error}");
            if matches!(error, Error::Unavailable { .. }) {
                eprintln!("{MISSING}");
            }
            ExitCode::FAILURE
        }
    }
}
