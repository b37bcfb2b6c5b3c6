//! Positions that vanish or go back, and logs that were replaced.

use std::sync::atomic::AtomicBool;

use essentially_once::{
    KeyValue,
    backend::{Durability, Position},
    consumer::Report,
    memory::{MemoryLog, MemoryStore},
};

use super::*;

/// Fails the second commit temporarily, and returns `fault` when the consumer then loads its
/// position.
async fn run_with(fault: Fault, start_at: StartAt) -> (Backend, Result<Report, Error>) {
    let script = Script::default()
        .fail(Step::Commit, 2, Fault::Before)
        .fail(Step::Position, 1, fault);
    let backend = Backend::new(RECORDS, script).await;
    let result = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .max_batch(5)
        .start_at(start_at)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .run_until_caught_up()
        .await;
    backend.script.assert_all_struck();
    (backend, result)
}

#[tokio::test]
async fn a_position_that_vanishes_or_goes_back_under_a_running_consumer_stops_it() {
    for fault in [Fault::Gone, Fault::WentBack] {
        let (backend, result) = run_with(fault, StartAt::Earliest).await;
        let error = result.unwrap_err();
        assert!(matches!(error, Error::PositionLost { .. }), "{fault:?}: {error}");
        assert!(error.to_string().contains("start the consumer again"), "{error}");
        let counts = backend.counts(&shipping(), RECORDS).await;
        assert_eq!(
            counts,
            [[1; 5].as_slice(), &[0; 7]].concat(),
            "{fault:?}: nothing counts twice"
        );
    }
}

#[tokio::test]
async fn a_new_run_goes_on_from_what_is_stored() {
    let (backend, _) = run_with(Fault::Gone, StartAt::Earliest).await;
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.rewound), (RECORDS - 5, 0));
}

#[tokio::test]
async fn log_and_store_that_went_back_together_go_on_with_a_count() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    log.append(&[NewRecord::new("0"), NewRecord::new("1")]).await.unwrap();
    let mut script = Script::default().fail(Step::Commit, 2, Fault::Before);
    // On a slow machine the consumer looks at its position again before it is stopped.
    for nth in 1..100 {
        script = script.fail(Step::Position, nth, Fault::WentBack);
    }
    let backend = Backend::of(memory, script);
    // The log that fails over: from the second session on it is one that has lost everything.
    let lost = Memory::new().log("orders").unwrap();
    let stop = CancellationToken::new();
    let failing_over = FailsOver {
        before: backend.log(),
        after: lost,
        script: backend.script.clone(),
    };
    let running = Consumer::essentially_once(shipping(), failing_over, backend.store(), backend.counter())
        .accept_volatile()
        .max_batch(1)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .run_until(stop.clone());
    let stopping = async {
        while backend.script.taken(Step::Position) < 2 {
            tokio::task::yield_now().await;
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        stop.cancel();
    };
    let (report, ()) = tokio::join!(running, stopping);
    let report = report.unwrap();
    assert_eq!((report.rewound, report.next), (1, Some(Offset::ZERO)), "{report}");
}

struct FailsOver {
    before: support::ScriptedLog,
    after: MemoryLog,
    script: Script,
}

impl FailsOver {
    fn current(&self) -> &dyn Log {
        match self.script.taken(Step::Position) {
            0 | 1 => &self.before,
            _ => &self.after,
        }
    }
}

#[essentially_once::async_trait]
impl Log for FailsOver {
    fn id(&self) -> &essentially_once::backend::LogId {
        self.before.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.current().append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn essentially_once::backend::LogReader>, Error> {
        self.current().read(from).await
    }

    async fn bounds(&self) -> Result<essentially_once::backend::Bounds, Error> {
        self.current().bounds().await
    }

    async fn durability(&self) -> Result<essentially_once::backend::Durability, Error> {
        self.current().durability().await
    }
}

/// Regression test: a log restored from an older copy had grown past the consumer's position, and
/// the records in between were never handled.
#[tokio::test]
async fn a_log_restored_from_an_older_copy_that_has_grown_again_is_noticed() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let consume = |log: MemoryLog| {
        Consumer::essentially_once(shipping(), log, backend.store(), backend.counter())
            .accept_volatile()
            .run_until_caught_up()
    };
    assert_eq!(consume(backend.memory_log()).await.unwrap().handled, RECORDS);
    let restored = Memory::new().log("orders").unwrap();
    let records: Vec<NewRecord> = (0..RECORDS + 5).map(|n| NewRecord::new(format!("new {n}"))).collect();
    restored.append(&records).await.unwrap();
    let error = consume(restored.clone()).await.unwrap_err();
    assert!(
        matches!(error, Error::LogChanged { offset, .. } if offset == (RECORDS - 1).into()),
        "{error}"
    );
    let seek_to = StartAt::Offset(5.into());
    seek(&shipping(), &restored, &backend.memory.store(), seek_to, &ann())
        .await
        .unwrap();
    assert_eq!(consume(restored).await.unwrap().handled, RECORDS);
}

#[tokio::test(start_paused = true)]
async fn a_restored_log_of_the_same_length_is_noticed_although_nothing_is_left_to_read() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let consume = |log: MemoryLog| {
        Consumer::essentially_once(shipping(), log, backend.store(), backend.counter())
            .accept_volatile()
            .run_until_caught_up()
    };
    let log = backend.memory_log();
    assert_eq!(consume(log.clone()).await.unwrap().handled, RECORDS);
    assert_eq!(consume(log).await.unwrap().handled, 0, "the same log");
    let restored = Memory::new().log("orders").unwrap();
    let records: Vec<NewRecord> = (0..RECORDS).map(|n| NewRecord::new(format!("new {n}"))).collect();
    restored.append(&records).await.unwrap();
    let error = consume(restored).await.unwrap_err();
    assert!(matches!(error, Error::LogChanged { .. }), "{error}");
}

/// A store that an empty one replaces.
#[derive(Clone)]
struct Replaced {
    before: MemoryStore,
    after: MemoryStore,
    is_replaced: Arc<AtomicBool>,
}

impl Replaced {
    fn new() -> Self {
        Self {
            before: Memory::new().store(),
            after: Memory::new().store(),
            is_replaced: Arc::default(),
        }
    }

    fn current(&self) -> &MemoryStore {
        match self.is_replaced.load(Ordering::SeqCst) {
            false => &self.before,
            true => &self.after,
        }
    }

    async fn counts(&self, records: u64) -> Vec<bool> {
        let mut tx = self.after.begin(&shipping()).await.unwrap();
        let mut counts = Vec::new();
        for n in 0..records {
            counts.push(tx.get(n.to_string().as_bytes()).await.unwrap().is_some());
        }
        counts
    }
}

#[essentially_once::async_trait]
impl OffsetStore for Replaced {
    type Tx = MemoryTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.current().position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<MemoryTx, Error> {
        self.current().begin(consumer).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(Durability::Durable)
    }
}

async fn append(log: &MemoryLog, records: std::ops::Range<u64>) {
    let records: Vec<_> = records.map(|n| NewRecord::new(n.to_string())).collect();
    log.append(&records).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_standby_notices_that_the_position_is_lost() {
    let (store, log) = (Replaced::new(), Memory::new().log("orders").unwrap());
    let mut runs = Vec::new();
    for _ in 0..2 {
        let handler = handler_fn(|_: &Record, _: &mut MemoryTx| Box::pin(async { Ok(()) }));
        let consumer = Consumer::essentially_once(shipping(), log.clone(), store.clone(), handler)
            .accept_volatile()
            .start_at(StartAt::Latest);
        runs.push(tokio::spawn(consumer.run()));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    append(&log, 0..5).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    store.is_replaced.store(true, Ordering::SeqCst);
    append(&log, 5..10).await;
    for run in runs {
        // A standby that started over at the end would pass over the records appended before.
        let error = run.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::PositionLost { .. }), "{error}");
    }
}

/// A log that fails over to a copy that ends earlier.
struct Shortened {
    before: MemoryLog,
    after: MemoryLog,
    store: Replaced,
}

impl Shortened {
    fn current(&self) -> &MemoryLog {
        match self.store.is_replaced.load(Ordering::SeqCst) {
            false => &self.before,
            true => &self.after,
        }
    }
}

#[essentially_once::async_trait]
impl Log for Shortened {
    fn id(&self) -> &essentially_once::backend::LogId {
        self.before.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.current().append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn essentially_once::backend::LogReader>, Error> {
        self.current().read(from).await
    }

    async fn bounds(&self) -> Result<essentially_once::backend::Bounds, Error> {
        self.current().bounds().await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(Durability::Durable)
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_consumer_whose_log_and_position_are_lost_before_its_first_record_begins_again() {
    let store = Replaced::new();
    let (before, after) = (
        Memory::new().log("orders").unwrap(),
        Memory::new().log("orders").unwrap(),
    );
    // Retention has emptied the log.
    append(&before, 0..5).await;
    before.truncate(5.into());
    append(&after, 0..3).await;
    let log = Shortened {
        before,
        after,
        store: store.clone(),
    };
    let stop = CancellationToken::new();
    let handler = handler_fn(|record: &Record, tx: &mut MemoryTx| {
        Box::pin(async move { Ok(support::count_one(tx, &record.payload).await?) })
    });
    let run = tokio::spawn(
        Consumer::essentially_once(shipping(), log, store.clone(), handler)
            .accept_volatile()
            .run_until(stop.clone()),
    );
    tokio::time::sleep(Duration::from_secs(5)).await;
    store.is_replaced.store(true, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(60)).await;
    stop.cancel();
    let report = run.await.unwrap().unwrap();
    assert_eq!((report.handled, report.rewound), (3, 1), "{report}");
}

#[tokio::test(start_paused = true)]
async fn an_idle_instance_does_not_commit_into_a_rebuilt_position() {
    let (store, log) = (Replaced::new(), Memory::new().log("orders").unwrap());
    append(&log, 0..5).await;
    let start = |fails_at: Option<u64>| {
        let handler = handler_fn(move |record: &Record, tx: &mut MemoryTx| {
            let fails = fails_at == Some(record.offset.lo());
            Box::pin(async move {
                if fails {
                    return Err(Error::unavailable("ask the bank", "it is down").into());
                }
                support::count_one(tx, &record.payload).await?;
                Ok(())
            })
        });
        let consumer = Consumer::essentially_once(shipping(), log.clone(), store.clone(), handler)
            .accept_volatile()
            .max_batch(1);
        tokio::spawn(consumer.run())
    };
    let old = start(None);
    tokio::time::sleep(Duration::from_secs(10)).await;
    // An operator deletes everything, and another instance begins to rebuild it.
    store.is_replaced.store(true, Ordering::SeqCst);
    let new = start(Some(1));
    append(&log, 5..6).await;
    let error = old.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::PositionLost { .. }), "{error}");
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(store.counts(6).await, [true, false, false, false, false, false]);
    new.abort();
}
