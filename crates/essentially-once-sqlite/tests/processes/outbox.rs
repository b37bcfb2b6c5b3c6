//! Consumers of two processes that send to one outbox, and are killed.

use std::time::Duration;

use essentially_once::{
    Consumer, ConsumerId, Epoch, Log, NewRecord, OffsetStore, Origin, Outbox, Record, backend::Numbering, handler_fn,
};
use essentially_once_sqlite::{Sqlite, SqliteTx, rusqlite::Connection};
use essentially_once_testkit::read_log;
use tokio::time::sleep;

use super::{LONG, Process, given_file, kills::kill_at_random, until};

const RECORDS: u64 = 1_000;

/// Sends each order on, with the name of the consumer.
async fn child(name: &'static str) {
    let Some(path) = given_file() else { return };
    let sqlite = Sqlite::open(path).await.expect("open");
    let orders = sqlite.log("orders").await.expect("log");
    let handler = handler_fn(move |order: &Record, tx: &mut SqliteTx| {
        Box::pin(async move {
            tx.send("out", NewRecord::new(format!("{name}:{}", order.offset)))
                .await?;
            // Gives the parent time to kill this process in the middle of a batch.
            sleep(Duration::from_micros(300)).await;
            Ok(())
        })
    });
    Consumer::essentially_once(ConsumerId::new(name).expect("name"), orders, sqlite.store(), handler)
        .max_batch(16)
        // The previous process is dead.
        .standby_after(Duration::ZERO)
        .run_until_caught_up()
        .await
        .expect("run");
}

#[tokio::test]
#[ignore = "a child process of killed_consumers_of_two_processes_send_each_record_once"]
async fn child_ships() {
    child("shipping").await;
}

#[tokio::test]
#[ignore = "a child process of killed_consumers_of_two_processes_send_each_record_once"]
async fn child_bills() {
    child("billing").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_consumers_of_two_processes_send_each_record_once() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let orders = sqlite.log("orders").await.expect("log");
    let records: Vec<_> = (0..RECORDS).map(|n| NewRecord::new(n.to_string())).collect();
    orders.append(&records).await.expect("append");
    let out = sqlite.log("out").await.expect("log");
    let shell = Connection::open(&path).expect("open");
    shell.busy_timeout(LONG).expect("timeout");
    let end = || {
        let sql = "SELECT next FROM essentially_once_logs WHERE name = 'out'";
        shell.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("end")
    };
    let names = ["shipping", "billing"];
    for _ in 0..5 {
        let mut children = [
            Process::start("outbox::child_ships", &path),
            Process::start("outbox::child_bills", &path),
        ];
        let before = end();
        until(|| end() >= before + 100).await;
        for child in &mut children {
            kill_at_random(child).await;
        }
        let sent = read_log(&out).await.expect("records");
        for name in names {
            let consumer = ConsumerId::new(name).expect("name");
            let position = sqlite.store().position(&consumer).await.expect("position");
            let handled = position.map_or(0, |position| position.next.lo());
            let of_it = sent.iter().filter(|record| record.payload.starts_with(name.as_bytes()));
            assert_eq!(of_it.count() as u64, handled, "{name}");
        }
    }
    for role in ["outbox::child_ships", "outbox::child_bills"] {
        Process::start(role, &path).succeeds().await;
    }
    let sent = read_log(&out).await.expect("records");
    let mut sender: Option<Numbering> = None;
    for (n, record) in (0..).zip(&sent) {
        let origin = record.origin.as_ref().expect("an origin");
        let sender = sender.get_or_insert_with(|| origin.numbering.clone());
        assert_eq!(sender.epoch(), Epoch::STABLE);
        assert_eq!(record.offset, n.into());
        assert_eq!(*origin, Origin::of(sender.clone(), n));
    }
    for name in names {
        let payloads: Vec<_> = sent
            .iter()
            .filter_map(|record| str::from_utf8(&record.payload).ok()?.strip_prefix(name))
            .collect();
        let expected: Vec<_> = (0..RECORDS).map(|n| format!(":{n}")).collect();
        assert_eq!(payloads, expected, "{name}");
    }
}
