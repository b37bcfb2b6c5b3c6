//! Two consumers of one log in one process. Each has a position and a handler of its own.
//!
//! ```text
//! cargo run -p several-consumers              # on a file in the temporary folder
//! cargo run -p several-consumers -- shop.db   # run it twice: both go on where they stopped
//! ```
//!
//! If one consumer fails, the others commit what they have handled and stop.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, path::PathBuf, process::ExitCode, time::Duration};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue, Log, NewRecord, ReadState, Record,
    async_trait,
};
use essentially_once_sqlite::Sqlite;
use tokio::task::JoinSet;

/// Counts records under a key of its consumer's state.
struct Count;

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Count {
    async fn handle(&mut self, _order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let before: u64 = match tx.get(b"count").await? {
            Some(count) => std::str::from_utf8(&count)?.parse()?,
            None => 0,
        };
        tx.put(b"count", (before + 1).to_string().as_bytes()).await?;
        Ok(())
    }
}

async fn run(path: PathBuf) -> Result<(), Error> {
    println!("opening {}", path.display());
    let sqlite = Sqlite::open(path).await?;
    let orders = sqlite.log("orders").await?;
    let stop = CancellationToken::new();
    let mut consumers = JoinSet::new();
    for name in ["shipping", "billing"] {
        let id = ConsumerId::new(name)?;
        let consumer = Consumer::essentially_once(id.clone(), orders.clone(), sqlite.store(), Count);
        let run = consumer.run_until(stop.clone());
        consumers.spawn(async move { (id, run.await) });
    }

    orders.append(&["10248", "10249", "10250"].map(NewRecord::new)).await?;
    println!("appended three orders; a service would run on, and this example stops after a second");
    let timer = stop.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        timer.cancel();
    });
    while let Some(ended) = consumers.join_next().await {
        stop.cancel(); // The first consumer that ends stops the others.
        let (id, ended) = ended.map_err(|error| Error::failed("run a consumer", error))?;
        match ended {
            Ok(report) => println!("{id}: {report}"),
            Err(error) => eprintln!("{id} failed: {error}"),
        }
        let state = sqlite.store().read_state(&id, &[b"count"]).await?;
        println!("{id}: the key `count` of its state is {:?}", state.values[0]);
    }
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let path = env::args_os().nth(1).map(PathBuf::from);
    match run(path.unwrap_or_else(|| env::temp_dir().join("essentially-once-several.db"))).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("several-consumers: {error}");
            ExitCode::FAILURE
        }
    }
}
