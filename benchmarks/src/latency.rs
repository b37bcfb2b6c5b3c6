//! How long an order takes from its commit to the bus: from the return of a commit that stores it
//! and announces it in an outbox on SQLite, to the return of the append that stores it on the bus.
//!
//! Both sides commit 100 orders per second, one by one, on a thread of their own. The loop by hand
//! looks at the outbox each millisecond, appends what it finds to the bus, waits until it is
//! stored, and commits its position to the outbox's file.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
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

use crate::{
    PAYLOAD, Result,
    contest::in_turn,
    median,
    relay::{self, ByHand, Relays, Sent, open},
};

/// The time between two orders.
const INTERVAL: Duration = Duration::from_millis(10);

/// How often the loop by hand looks at the outbox.
const POLL: Duration = Duration::from_millis(1);

/// Orders before those that count, in which connections are opened and statements are prepared.
const WARM_UP: usize = 20;

/// How many records the loop by hand takes at once: the default of the library.
const BATCH: i64 = 100;

/// How long to wait for the last record.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bus {
    /// Another SQLite file.
    Sqlite,
    /// A private server that syncs each write.
    Redis,
    /// A private node.
    Rabbitmq,
}

#[derive(Clone, Copy, clap::Args)]
pub(crate) struct LatencyArguments {
    /// Where the relay sends records.
    bus: Bus,
    /// How long each side commits orders in each round.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
}

pub(crate) fn measure(arguments: LatencyArguments, rounds: u32, folder: TempDir) -> Result<()> {
    let LatencyArguments { bus, seconds } = arguments;
    let relays = Relays::start(
        match bus {
            Bus::Sqlite => relay::Bus::Sqlite,
            Bus::Redis => relay::Bus::Redis,
            Bus::Rabbitmq => relay::Bus::Rabbitmq,
        },
        folder,
    )?;
    let orders = WARM_UP + (Duration::from_secs(seconds).as_millis() / INTERVAL.as_millis()) as usize;
    println!(
        "{rounds} rounds of {seconds} s on each side, 100 orders/s; times from the commit's return to the bus, in ms; \
         medians over the rounds"
    );
    println!("the ratio is ours / by hand, of p99, round by round; below 1, ours is faster");
    println!("| by hand, p50 | p99 | ours, p50 | p99 | ratio of p99, median | min | max |");
    println!("|---|---|---|---|---|---|---|");
    let (mut by_hand, mut ours) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    let mut ratios = Vec::new();
    for round in 0..rounds {
        let run_by_hand = || {
            relays
                .runtime()
                .block_on(poll(&relays, &format!("hand-{round}"), orders))
        };
        let run_ours = || {
            relays
                .runtime()
                .block_on(relay(&relays, &format!("ours-{round}"), orders))
        };
        let (hand, our) = in_turn(round as usize, run_by_hand, run_ours)?;
        for (side, times) in [(&mut by_hand, &hand), (&mut ours, &our)] {
            side[0].push(percentile(times, 50));
            side[1].push(percentile(times, 99));
        }
        ratios.push(percentile(&our, 99) / percentile(&hand, 99));
    }
    let ratio = median(&mut ratios);
    let [hand_50, hand_99] = by_hand.map(|mut times| median(&mut times));
    let [our_50, our_99] = ours.map(|mut times| median(&mut times));
    println!(
        "| {hand_50:.2} | {hand_99:.2} | {our_50:.2} | {our_99:.2} | {ratio:.2} | {:.2} | {:.2} |",
        ratios[0],
        ratios[ratios.len() - 1]
    );
    Ok(())
}

/// In milliseconds, of sorted times.
fn percentile(times: &[Duration], percent: usize) -> f64 {
    times[(times.len() * percent).div_ceil(100) - 1].as_secs_f64() * 1_000.0
}

/// When each record was first stored on the bus.
#[derive(Clone)]
struct Arrivals(Arc<Mutex<Vec<Option<Instant>>>>);

impl Arrivals {
    fn new(orders: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![None; orders])))
    }

    fn note(&self, payloads: impl Iterator<Item = u64>) {
        let now = Instant::now();
        let mut arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for number in payloads {
            arrivals[number as usize].get_or_insert(now);
        }
    }

    /// The sorted times between the commits and the arrivals.
    fn since(&self, committed: &[Instant]) -> Result<Vec<Duration>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(arrivals) = arrivals.into_iter().collect::<Option<Vec<_>>>() {
                let times = arrivals.iter().zip(committed).skip(WARM_UP);
                let times = times.map(|(arrival, commit)| arrival.saturating_duration_since(*commit));
                let mut times: Vec<_> = times.collect();
                times.sort();
                return Ok(times);
            }
            if Instant::now() > deadline {
                return Err("not every record arrived on the bus: the measurement is invalid".into());
            }
            thread::sleep(POLL);
        }
    }
}

fn payload(number: usize) -> [u8; PAYLOAD.len()] {
    let mut payload = PAYLOAD;
    payload[..8].copy_from_slice(&(number as u64).to_be_bytes());
    payload
}

fn number(payload: &[u8]) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&payload[..8]);
    u64::from_be_bytes(number)
}

/// Commits one order after the other, and returns when each commit returned.
fn commit_orders(
    path: &Path,
    orders: usize,
    mut announce: impl FnMut(&Transaction<'_>, usize) -> Result<()>,
) -> Result<Vec<Instant>> {
    let mut connection = open(path)?;
    connection.execute_batch("CREATE TABLE orders (number INTEGER PRIMARY KEY, line BLOB NOT NULL)")?;
    let started = Instant::now();
    let mut committed = Vec::with_capacity(orders);
    for order in 0..orders {
        // A late order does not delay those after it.
        let due = started + INTERVAL * order as u32;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.prepare_cached("INSERT INTO orders VALUES (?1, ?2)")?
            .execute(params![order as i64, PAYLOAD])?;
        announce(&tx, order)?;
        tx.commit()?;
        committed.push(Instant::now());
    }
    Ok(committed)
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

async fn relay(relays: &Relays, name: &str, orders: usize) -> Result<Vec<Duration>> {
    let (path, bus_path) = (relays.path(), relays.path());
    let outbox = Sqlite::open(&path).await?;
    let log: SqliteLog = outbox.log("outbox").await?;
    let arrivals = Arrivals::new(orders);
    let noted = Noted {
        bus: relays.bus(name, &bus_path).await?,
        arrivals: arrivals.clone(),
    };
    let id = ConsumerId::new("relay")?;
    let consumer = Consumer::at_least_once(id, log.clone(), outbox.store(), Relay::to(noted));
    let stop = CancellationToken::new();
    let relay = tokio::spawn(consumer.run_until(stop.clone()));
    let times = tokio::task::spawn_blocking(move || {
        let committed = commit_orders(&path, orders, |tx, order| {
            log.append_in(tx, &[NewRecord::new(payload(order).to_vec())])?;
            Ok(())
        })?;
        let times = arrivals.since(&committed);
        relay::remove(&path)?;
        times
    });
    let times = times.await?;
    stop.cancel();
    relay.await??;
    relays.clear(name).await?;
    outbox.close().await?;
    relay::remove(&bus_path)?;
    times
}

async fn poll(relays: &Relays, name: &str, orders: usize) -> Result<Vec<Duration>> {
    let (path, bus_path) = (relays.path(), relays.path());
    let connection = open(&path)?;
    connection.execute_batch(
        "CREATE TABLE outbox (number INTEGER PRIMARY KEY, key BLOB, headers BLOB, payload BLOB NOT NULL);
         CREATE TABLE position (id INTEGER PRIMARY KEY, next INTEGER NOT NULL);
         INSERT INTO position VALUES (1, 0);",
    )?;
    let bus = relays.bus_by_hand(name, &bus_path).await?;
    let arrivals = Arrivals::new(orders);
    let is_stopped = Arc::new(AtomicBool::new(false));
    let (noted, stopped, runtime) = (arrivals.clone(), Arc::clone(&is_stopped), Handle::current());
    let copies = tokio::task::spawn_blocking(move || copy(&connection, bus, &noted, &stopped, &runtime));
    let times = tokio::task::spawn_blocking(move || {
        let committed = commit_orders(&path, orders, |tx, order| {
            tx.prepare_cached("INSERT INTO outbox VALUES (?1, NULL, NULL, ?2)")?
                .execute(params![order as i64, payload(order)])?;
            Ok(())
        })?;
        let times = arrivals.since(&committed);
        relay::remove(&path)?;
        times
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
        let rows = select.query_map(params![next, BATCH], Sent::from_row)?;
        let rows: Vec<Sent> = rows.collect::<std::result::Result<_, _>>()?;
        let Some(last) = rows.last() else {
            thread::sleep(POLL);
            continue;
        };
        next = last.number + 1;
        let numbers: Vec<u64> = rows.iter().map(|sent| number(&sent.payload)).collect();
        runtime.block_on(bus.append(rows))?;
        arrivals.note(numbers.into_iter());
        // A commit of its own.
        advance.execute([next])?;
    }
    Ok(())
}
