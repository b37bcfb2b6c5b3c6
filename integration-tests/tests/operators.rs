//! Operators get through to a consumer with a backlog, which begins its next commit as soon as the
//! last one is done.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, KeyValue, Log as _, NewRecord, Offset, OffsetStore,
    backend::Source,
    consumer::{Operator, pause, resume},
    memory::Memory,
};
use essentially_once_postgres::Pg;
use essentially_once_rabbitmq::Rabbit;
use essentially_once_redis::Redis;
use essentially_once_sqlite::Sqlite;
use essentially_once_testkit::{Ledger, Suite};
use integration_tests::{Address, Backend};
use test_servers::insist;

/// How often the consumer is paused and resumed.
const CALLS: u32 = 5;

/// How long a pause may take on average. On an idle machine, each takes some 20 ms.
const SOON: Duration = Duration::from_secs(1);

/// More records than a consumer can handle meanwhile.
const BACKLOG: usize = 500_000;

const LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let mut suite = Suite::new();
    for store in Backend::STORES {
        let name = format!("a_busy_consumer_on_{}_is_paused_soon", store.name());
        suite = match store.missing() {
            Some(why) => suite.ignored(&name, &why),
            None => suite.async_test(&name, LIMIT, move || run(store)),
        };
    }
    suite.run()
}

/// With a handle for the consumer, and another one for the operator.
async fn run(store: Backend) -> Result<(), Source> {
    let place = store.start()?;
    match place.address() {
        Address::Sqlite(path) => pauses(Sqlite::open(&path).await?.store(), Sqlite::open(&path).await?.store()).await,
        Address::Postgres(url) => pauses(Pg::connect(&url).await?.store(), Pg::connect(&url).await?.store()).await,
        Address::Redis(url) => pauses(Redis::connect(&url).await?.store(), Redis::connect(&url).await?.store()).await,
        Address::Rabbitmq(url) | Address::RabbitmqPacked(url) => {
            pauses(
                Rabbit::connect(&url).await?.store(),
                Rabbit::connect(&url).await?.store(),
            )
            .await
        }
        Address::Kafka(_) => Err("Kafka keeps no state of a consumer".into()),
    }
}

async fn pauses<S>(store: S, operator: S) -> Result<(), Source>
where
    S: OffsetStore<Tx: KeyValue> + 'static,
{
    let (id, by) = (ConsumerId::new("shipping")?, Operator::new("ann"));
    let log = Memory::new().log("orders")?;
    log.append(&vec![NewRecord::new("order"); BACKLOG]).await?;
    let stop = CancellationToken::new();
    let consumer = Consumer::essentially_once(id.clone(), log, store, Ledger);
    let consumer = consumer.max_batch(1).accept_volatile().run_until(stop.clone());
    let consumer = tokio::spawn(consumer);
    let next = || async {
        // A store that is being created may not answer yet.
        let position = insist(|| operator.position(&id)).await?;
        Ok::<_, Error>(position.map_or(Offset::ZERO, |position| position.next))
    };
    let mut taken = Duration::ZERO;
    for _ in 0..CALLS {
        let before = next().await?;
        while next().await? <= before {
            if consumer.is_finished() {
                return Err(format!("the consumer has ended: {:?}", consumer.await?).into());
            }
        }
        let started = Instant::now();
        pause(&id, &operator, &by).await?;
        taken += started.elapsed();
        resume(&id, &operator, &by).await?;
    }
    stop.cancel();
    let report = consumer.await??;
    eprintln!("{report}; a pause took {:?} on average", taken / CALLS);
    match taken < CALLS * SOON {
        true => Ok(()),
        false => Err(format!("{CALLS} pauses took {taken:?}").into()),
    }
}
