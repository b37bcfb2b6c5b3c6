//! How long an order takes from its commit to the bus: from the return of a commit that stores it
//! and announces it in an outbox on SQLite, to the return of the append that stores it on the bus.
//!
//! Both sides commit orders at a rate, one by one, on a thread of their own. The loop by hand
//! looks at the outbox each millisecond, appends what it finds to the bus, waits until it is
//! stored, and commits its position to the outbox's file.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use clap::ValueEnum;
use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Log, NewRecord, async_trait,
    relay::{Destination, Relay},
};
use essentially_once_sqlite::{
    Sqlite, SqliteLog,
    rusqlite::{Connection, Transaction, TransactionBehavior, params},
};
use tempfile::TempDir;
use tokio::runtime::Handle;

use super::{
    BATCH, POLL,
    timing::{Arrivals, Load, compare, number, payload},
};
use crate::{
    PAYLOAD, Result,
    relay::{self, ByHand, Relays, Sent, open},
};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bus {
    /// Another SQLite file.
    Sqlite,
    /// A private server that syncs each write.
    Redis,
    /// A private node.
    Rabbitmq,
}

pub(super) fn measure(bus: Bus, load: Load, rounds: u32, folder: TempDir) -> Result<()> {
    let relays = Relays::start(
        match bus {
            Bus::Sqlite => relay::Bus::Sqlite,
            Bus::Redis => relay::Bus::Redis,
            Bus::Rabbitmq => relay::Bus::Rabbitmq,
        },
        folder,
    )?;
    let Load { rate, seconds } = load;
    println!("{rounds} rounds of {seconds} s on each side, {rate} orders/s; times from the commit's return to the bus");
    compare(
        rounds,
        |name| relays.runtime().block_on(poll(&relays, name, load)),
        |name| relays.runtime().block_on(relay(&relays, name, load)),
    )
}

/// Commits one order after the other, and returns the sorted times from each commit to the bus.
fn commit_orders(
    path: &Path,
    load: Load,
    arrivals: &Arrivals,
    announce: impl Fn(&Transaction<'_>, usize) -> Result<()>,
) -> Result<Vec<Duration>> {
    let mut connection = open(path)?;
    connection.execute_batch("CREATE TABLE orders (number INTEGER PRIMARY KEY, line BLOB NOT NULL)")?;
    let times = load.measure(1, arrivals, |Range { start: order, .. }| {
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.prepare_cached("INSERT INTO orders VALUES (?1, ?2)")?
            .execute(params![order as i64, PAYLOAD])?;
        announce(&tx, order)?;
        tx.commit()?;
        Ok(())
    });
    relay::remove(path)?;
    times
}

/// A bus that notes when it has stored what a relay sends.
struct Noted {
    bus: Arc<dyn Log>,
    arrivals: Arrivals,
}

#[async_trait]
impl Destination for Noted {
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error> {
        self.bus.append(records).await?;
        self.arrivals.note(records.iter().map(|record| number(&record.payload)));
        Ok(())
    }
}

async fn relay(relays: &Relays, name: &str, load: Load) -> Result<Vec<Duration>> {
    let (path, bus_path) = (relays.path(), relays.path());
    let outbox = Sqlite::open(&path).await?;
    let log: SqliteLog = outbox.log("outbox").await?;
    let arrivals = Arrivals::new(load.records());
    let noted = Noted {
        bus: relays.bus(name, &bus_path).await?,
        arrivals: arrivals.clone(),
    };
    let id = ConsumerId::new("relay")?;
    let consumer = Consumer::at_least_once(id, log.clone(), outbox.store(), Relay::to(noted));
    let stop = CancellationToken::new();
    let relay = tokio::spawn(consumer.run_until(stop.clone()));
    let times = tokio::task::spawn_blocking(move || {
        commit_orders(&path, load, &arrivals, |tx, order| {
            log.append_in(tx, &[NewRecord::new(payload(order).to_vec())])?;
            Ok(())
        })
    });
    let times = times.await?;
    stop.cancel();
    relay.await??;
    relays.clear(name).await?;
    outbox.close().await?;
    relay::remove(&bus_path)?;
    times
}

async fn poll(relays: &Relays, name: &str, load: Load) -> Result<Vec<Duration>> {
    let (path, bus_path) = (relays.path(), relays.path());
    let connection = open(&path)?;
    connection.execute_batch(
        "CREATE TABLE outbox (number INTEGER PRIMARY KEY, key BLOB, headers BLOB, payload BLOB NOT NULL);
         CREATE TABLE position (id INTEGER PRIMARY KEY, next INTEGER NOT NULL);
         INSERT INTO position VALUES (1, 0);",
    )?;
    let bus = relays.bus_by_hand(name, &bus_path).await?;
    let arrivals = Arrivals::new(load.records());
    let is_stopped = Arc::new(AtomicBool::new(false));
    let (noted, stopped, runtime) = (arrivals.clone(), Arc::clone(&is_stopped), Handle::current());
    let copies = tokio::task::spawn_blocking(move || copy(&connection, bus, &noted, &stopped, &runtime));
    let times = tokio::task::spawn_blocking(move || {
        commit_orders(&path, load, &arrivals, |tx, order| {
            tx.prepare_cached("INSERT INTO outbox VALUES (?1, NULL, NULL, ?2)")?
                .execute(params![order as i64, payload(order)])?;
            Ok(())
        })
    });
    let times = times.await?;
    is_stopped.store(true, Ordering::Relaxed);
    copies.await??;
    relays.clear(name).await?;
    relay::remove(&bus_path)?;
    times
}

/// The loop that a user writes without a library.
fn copy(
    connection: &Connection,
    mut bus: ByHand,
    arrivals: &Arrivals,
    is_stopped: &AtomicBool,
    runtime: &Handle,
) -> Result<()> {
    let mut select = connection.prepare("SELECT * FROM outbox WHERE number >= ?1 LIMIT ?2")?;
    let mut advance = connection.prepare("UPDATE position SET next = ?1 WHERE id = 1")?;
    let mut next: i64 = 0;
    while !is_stopped.load(Ordering::Relaxed) {
        let rows = select.query_map(params![next, BATCH as i64], Sent::from_row)?;
        let rows: Vec<Sent> = rows.collect::<std::result::Result<_, _>>()?;
        let Some(last) = rows.last() else {
            thread::sleep(POLL);
            continue;
        };
        next = last.number + 1;
        let numbers: Vec<usize> = rows.iter().map(|sent| number(&sent.payload)).collect();
        runtime.block_on(bus.append(rows))?;
        arrivals.note(numbers);
        // A commit of its own.
        advance.execute([next])?;
    }
    Ok(())
}
