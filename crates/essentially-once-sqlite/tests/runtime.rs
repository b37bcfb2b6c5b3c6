//! A consumer with a backlog next to other tasks, on a runtime with one thread.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use essentially_once::{Consumer, ConsumerId, Log, NewRecord, Record, handler_fn};
use essentially_once_sqlite::{Sqlite, SqliteTx, rusqlite::Connection};
use tempfile::TempDir;
use tokio::{
    task::yield_now,
    time::{Instant, MissedTickBehavior, interval},
};

const RECORDS: u64 = 2_000;
const MAX_BATCH: usize = 10;
/// How many records may be handled between two turns of a task that is always ready: a few commits.
const MOST_BETWEEN_TURNS: u64 = 5 * MAX_BATCH as u64;
/// How long a sleeping task may be delayed: a few commits on a slow disk.
const LONGEST_GAP: Duration = Duration::from_millis(250);
/// On a busy machine the task may be delayed by this fraction of the total time.
const LONGEST_PART: u32 = 5;
/// How long a task may be delayed on average.
const MEAN_GAP: Duration = Duration::from_millis(50);
const TICK: Duration = Duration::from_millis(5);

/// What another task observed of its turns.
#[derive(Default)]
struct Turns {
    /// The largest gap between two turns, in microseconds or records.
    most: AtomicU64,
    count: AtomicU64,
}

impl Turns {
    fn note(&self, between: u64) {
        self.most.fetch_max(between, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self) -> (u64, u64) {
        (self.most.load(Ordering::Relaxed), self.count.load(Ordering::Relaxed))
    }
}

async fn tick(ticks: Arc<Turns>) {
    let mut interval = interval(TICK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    loop {
        interval.tick().await;
        ticks.note(last.elapsed().as_micros() as u64);
        last = Instant::now();
    }
}

async fn take_turns(turns: Arc<Turns>, handled: Arc<AtomicU64>) {
    let mut last = 0;
    loop {
        yield_now().await;
        let now = handled.load(Ordering::Relaxed);
        turns.note(now - last);
        last = now;
    }
}

/// Consumes the backlog next to other tasks, and returns how long it took.
async fn consume(sqlite: &Sqlite, handled: Arc<AtomicU64>) -> Duration {
    let log = sqlite.log("orders").await.expect("log");
    let records: Vec<_> = (0..RECORDS).map(|n| NewRecord::new(n.to_string())).collect();
    log.append(&records).await.expect("append");
    let handler = handler_fn(move |_: &Record, tx: &mut SqliteTx| {
        handled.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            tx.execute("UPDATE total SET handled = handled + 1", [])?;
            Ok(())
        })
    });
    let counting = ConsumerId::new("counting").expect("name");
    let consumer = Consumer::essentially_once(counting, log, sqlite.store(), handler).max_batch(MAX_BATCH);
    let start = Instant::now();
    let report = consumer.run_until_caught_up().await.expect("run");
    assert_eq!(report.handled, RECORDS);
    start.elapsed()
}

async fn with_a_table(folder: &TempDir) -> Sqlite {
    let path = folder.path().join("a.db");
    let shell = Connection::open(&path).expect("open");
    shell
        .execute_batch("CREATE TABLE total (handled INTEGER); INSERT INTO total VALUES (0)")
        .expect("create");
    Sqlite::open(path).await.expect("open")
}

#[tokio::test(flavor = "current_thread")]
async fn a_backlog_keeps_no_sleeping_task_waiting_on_one_thread() {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = with_a_table(&folder).await;
    let ticks = Arc::<Turns>::default();
    tokio::spawn(tick(Arc::clone(&ticks)));
    let took = consume(&sqlite, Arc::default()).await;
    let (longest, count) = ticks.read();
    let longest = Duration::from_micros(longest);
    eprintln!("{RECORDS} records in {took:?}: {count} ticks of {TICK:?}, longest gap {longest:?}");
    assert!(
        longest < LONGEST_GAP.max(took / LONGEST_PART),
        "a tick took {longest:?} of {took:?}"
    );
    assert!(
        u128::from(count) > took.as_millis() / MEAN_GAP.as_millis(),
        "{count} ticks in {took:?}"
    );
}

#[tokio::test(flavor = "current_thread")]
async fn a_backlog_gives_other_tasks_a_turn_every_few_commits_on_one_thread() {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = with_a_table(&folder).await;
    let (turns, handled) = (Arc::<Turns>::default(), Arc::default());
    tokio::spawn(take_turns(Arc::clone(&turns), Arc::clone(&handled)));
    let took = consume(&sqlite, handled).await;
    let (most, count) = turns.read();
    eprintln!("{RECORDS} records in {took:?}: {count} turns of another task, at most {most} records between two");
    assert!(most <= MOST_BETWEEN_TURNS, "{most} records between two turns");
    assert!(count >= RECORDS / MOST_BETWEEN_TURNS, "{count} turns");
}
