//! How long a record takes to a consumer: from the return of its append to the return of the commit
//! of the transaction that handled it.
//!
//! The appends of both sides come from a connection of their own, as from another process, so that
//! no reader is woken within the process. Unless a loop by hand needs a notification, both sides
//! append through the library, and so at the same cost.

mod kafka;
mod noting;
mod postgres;
mod rabbitmq;
mod redis;
mod sqlite;

use std::{ops::Range, time::Duration};

use clap::ValueEnum;
use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Handler, Log, NewRecord, OffsetStore, async_trait, backend::Transaction,
};
use tempfile::TempDir;
use tokio::{
    runtime::Handle,
    task::{JoinHandle, spawn_blocking},
};

use self::noting::{NotingHandler, NotingStore};
use super::timing::{Arrivals, Load, compare, payload};
use crate::{Result, postgres::runtime};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Backend {
    /// A file that the loop by hand looks at each millisecond.
    Sqlite,
    /// A private server that syncs each write. By hand: a blocking XREAD.
    Redis,
    /// A private server. By hand: LISTEN, and NOTIFY in the transaction that appends.
    Postgres,
    /// A stream on a private node, counted in SQLite. By hand: a consumer of lapin.
    Rabbitmq,
    /// A topic on a private broker, counted in SQLite. By hand: a consumer of rdkafka.
    Kafka,
}

pub(super) fn measure(backend: Backend, load: Load, rounds: u32, folder: TempDir) -> Result<()> {
    let sides: Box<dyn Sides> = match backend {
        Backend::Sqlite => Box::new(sqlite::Files { folder }),
        Backend::Redis => Box::new(redis::Server::start()?),
        Backend::Postgres => Box::new(postgres::Server::start()?),
        Backend::Rabbitmq => Box::new(rabbitmq::Node::start(folder)?),
        Backend::Kafka => Box::new(kafka::Broker::start(folder)?),
    };
    let runtime = runtime()?;
    let Load { rate, seconds } = load;
    println!("{rounds} rounds of {seconds} s on each side, {rate} records/s; times from the append to the commit");
    compare(
        rounds,
        |name| runtime.block_on(sides.by_hand(name, Run::new(load))),
        |name| runtime.block_on(sides.ours(name, Run::new(load))),
    )
}

/// Both sides on one backend. Each name is used once. They return sorted times.
#[async_trait(?Send)]
trait Sides {
    /// The loop that a user writes without a library.
    async fn by_hand(&self, name: &str, run: Run) -> Result<Vec<Duration>>;

    /// The library with its defaults.
    async fn ours(&self, name: &str, run: Run) -> Result<Vec<Duration>>;
}

/// One run of one side.
#[derive(Clone)]
struct Run {
    load: Load,
    arrivals: Arrivals,
    /// Ends the consumer.
    stop: CancellationToken,
}

impl Run {
    fn new(load: Load) -> Self {
        Self {
            load,
            arrivals: Arrivals::new(load.records()),
            stop: CancellationToken::new(),
        }
    }

    /// Appends while a consumer of the library runs.
    async fn consume<S: OffsetStore, H: Handler<S::Tx> + 'static>(
        self,
        name: &str,
        append: impl FnMut(Range<usize>) -> Result<()> + Send + 'static,
        log: impl Log + 'static,
        store: S,
        handler: H,
    ) -> Result<Vec<Duration>>
    where
        S::Tx: Transaction,
    {
        let store = NotingStore::new(store, self.arrivals.clone());
        let consumer = Consumer::essentially_once(ConsumerId::new(name)?, log, store, NotingHandler(handler));
        // A single Kafka broker is volatile, for both sides.
        let consuming = consumer.accept_volatile().run_until(self.stop.clone());
        let consuming = tokio::spawn(async {
            consuming.await?;
            Ok(())
        });
        self.append(append, consuming).await
    }

    /// Appends while a consumer runs, which notes its commits.
    async fn append(
        self,
        append: impl FnMut(Range<usize>) -> Result<()> + Send + 'static,
        mut consuming: JoinHandle<Result<()>>,
    ) -> Result<Vec<Duration>> {
        let Self { load, arrivals, stop } = self;
        let mut appending = spawn_blocking(move || load.measure(usize::MAX, &arrivals, append));
        tokio::select! {
            times = &mut appending => {
                stop.cancel();
                let ended = consuming.await;
                let times = times??;
                ended??;
                Ok(times)
            }
            ended = &mut consuming => {
                ended??;
                Err("the consumer ended before its records".into())
            }
        }
    }
}

/// Appends through the library.
fn append_to(log: impl Log) -> impl FnMut(Range<usize>) -> Result<()> {
    let runtime = Handle::current();
    move |numbers| {
        runtime.block_on(log.append(&records(numbers)))?;
        Ok(())
    }
}

fn records(numbers: Range<usize>) -> Vec<NewRecord> {
    numbers.map(|number| NewRecord::new(payload(number).to_vec())).collect()
}
