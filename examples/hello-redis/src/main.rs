//! Appends three orders to a Redis stream, handles each once, and shows the result.
//!
//! ```text
//! redis-server --appendonly yes --appendfsync always   # in an empty folder; Redis 7.0 or later
//! cargo run -p hello-redis -- redis://127.0.0.1/
//! ```
//!
//! It leaves three keys on the server: the stream `hello-orders`, the hash
//! `{hello-redis}:shipped`, and its position.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{collections::BTreeMap, env, process::ExitCode};

use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, Log, NewRecord, OffsetStore, Record, async_trait,
};
use essentially_once_redis::{Redis, RedisTx, redis::Cmd};

const MISSING: &str = "\
This example needs Redis 7.0 or later. Start one in an empty folder:
    redis-server --appendonly yes --appendfsync always
or name yours:
    cargo run -p hello-redis -- redis://host/";

struct Ship;

#[async_trait]
impl Handler<RedisTx> for Ship {
    async fn handle(&mut self, order: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        println!("  handling offset {}: {}", order.offset, order.payload.escape_ascii());
        // Your own key. The hash tag keeps it on the position's node in a cluster.
        let shipped = format!("{}:shipped", tx.hash_tag());
        tx.command(Cmd::hincr(shipped, &order.payload[..], 1)).await?;
        Ok(())
    }
}

async fn run(url: &str) -> Result<(), Error> {
    let redis = Redis::connect(url).await?;
    let orders = redis.log("hello-orders").await?;
    let last = orders
        .append(&["Brazil", "Chile", "Brazil"].map(NewRecord::new))
        .await?
        .unwrap_or_default();
    println!("appended three orders, the last one at offset {last}");

    let (id, store) = (ConsumerId::new("hello-redis")?, redis.store());
    let consumer = Consumer::essentially_once(id.clone(), orders, store.clone(), Ship);
    let report = consumer.run_until_caught_up().await?;
    println!("the consumer's report: {report}");
    let tx = store.begin(&id).await?;
    let shipped: BTreeMap<String, u64> = tx.query(Cmd::hgetall(format!("{}:shipped", tx.hash_tag()))).await?;
    println!("shipped by country, over all runs: {shipped:?}");
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let url = env::args().nth(1).unwrap_or_else(|| "redis://127.0.0.1/".into());
    match run(&url).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello-redis: {error}");
            if matches!(error, Error::Unavailable { .. }) {
                eprintln!("{MISSING}");
            }
            ExitCode::FAILURE
        }
    }
}
