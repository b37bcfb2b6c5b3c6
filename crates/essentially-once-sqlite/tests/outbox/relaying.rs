//! Consumers that share outboxes, and a relay behind them.

use essentially_once::{
    Consumer, ConsumerId, Handler, HandlerError, Log, NewRecord, Outbox, Record, async_trait, consumer::Report,
    relay::Relay,
};
use essentially_once_sqlite::{Sqlite, SqliteLog, SqliteTx};

use super::{existing, numbered, open};

/// Sends each record to the outbox that its key names, with the name of the consumer.
struct Forward(&'static str);

#[async_trait]
impl Handler<SqliteTx> for Forward {
    async fn handle(&mut self, record: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        let outbox = String::from_utf8(record.key.clone().unwrap_or_default().to_vec())?;
        let payload = format!("{}:{}", self.0, record.offset);
        tx.send(&outbox, NewRecord::new(payload).key(self.0)).await?;
        Ok(())
    }
}

async fn forward(sqlite: Sqlite, log: SqliteLog, name: &'static str) -> Report {
    let consumer = ConsumerId::new(name).expect("name");
    Consumer::essentially_once(consumer, log, sqlite.store(), Forward(name))
        .max_batch(7)
        .run_until_caught_up()
        .await
        .expect("run")
}

fn keyed(count: u64, keys: &[&'static str]) -> Vec<NewRecord> {
    let record = |n: u64| NewRecord::new("x").key(keys[n as usize % keys.len()]);
    (0..count).map(record).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_of_two_handles_share_two_outboxes() {
    let (_folder, sqlite) = open().await;
    let other = Sqlite::open(sqlite.path()).await.expect("another handle");
    let orders = sqlite.log("orders").await.expect("log");
    let returns = sqlite.log("returns").await.expect("log");
    orders.append(&keyed(100, &["north", "south"])).await.expect("append");
    returns.append(&keyed(60, &["south", "north"])).await.expect("append");
    let there = other.log("returns").await.expect("log");
    let runs = [
        tokio::spawn(forward(sqlite.clone(), orders, "shipping")),
        tokio::spawn(forward(other, there, "billing")),
    ];
    for run in runs {
        run.await.expect("no panic");
    }
    let (north, north_producer) = numbered(&existing(&sqlite, "north").await).await;
    let (south, south_producer) = numbered(&existing(&sqlite, "south").await).await;
    assert_ne!(north_producer, south_producer);
    for (outbox, shipped, billed) in [(north, 0, 1), (south, 1, 0)] {
        let of = |name: &str, first: usize, end: usize| -> Vec<String> {
            (first..end).step_by(2).map(|n| format!("{name}:{n}")).collect()
        };
        let sent_by =
            |name: &str| -> Vec<String> { outbox.iter().filter(|sent| sent.starts_with(name)).cloned().collect() };
        assert_eq!(outbox.len(), 80);
        assert_eq!(sent_by("shipping"), of("shipping", shipped, 100));
        assert_eq!(sent_by("billing"), of("billing", billed, 60));
    }
}

#[tokio::test]
async fn a_copy_of_a_sent_record_is_recognized_behind_a_relay() {
    let (_folder, sqlite) = open().await;
    let orders = sqlite.log("orders").await.expect("log");
    orders.append(&keyed(20, &["out"])).await.expect("append");
    let report = forward(sqlite.clone(), orders, "shipping").await;
    assert_eq!(report.handled, 20, "{report}");

    let folder = tempfile::tempdir().expect("folder");
    let central = Sqlite::open(folder.path().join("bus.db")).await.expect("open");
    let bus = central.log("bus").await.expect("log");
    // The second relay does not know what the first one has sent.
    for name in ["relay", "relay-again"] {
        let consumer = ConsumerId::new(name).expect("name");
        let out = existing(&sqlite, "out").await;
        let report = Consumer::at_least_once(consumer, out, sqlite.store(), Relay::to(bus.clone()))
            .run_until_caught_up()
            .await
            .expect("run");
        assert_eq!(report.handled, 20, "{report}");
    }
    bus.append(&keyed(1, &["out"])).await.expect("the last record");
    let report = forward(central, bus, "billing").await;
    assert_eq!((report.handled, report.duplicates), (21, 20), "{report}");
}
