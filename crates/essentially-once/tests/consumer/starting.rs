//! New consumers whose first record retention removes, and records at the greatest offset.

use std::sync::atomic::{AtomicBool, AtomicU64};

use essentially_once::{
    backend::{Bounds, LogId, LogReader},
    memory::MemoryLog,
};

use super::*;

async fn log_of(memory: &Memory, records: u64) -> MemoryLog {
    let log = memory.log("orders").unwrap();
    let records: Vec<_> = (0..records).map(|n| NewRecord::new(n.to_string())).collect();
    log.append(&records).await.unwrap();
    log
}

#[tokio::test(start_paused = true)]
async fn a_record_that_was_tried_and_then_removed_is_reported() {
    let memory = Memory::new();
    let log = log_of(&memory, RECORDS).await;
    let (truncating, mut tries) = (log.clone(), 0);
    let handler = handler_fn(move |_: &Record, _: &mut MemoryTx| {
        tries += 1;
        if tries == 30 {
            truncating.truncate(5.into());
        }
        Box::pin(async { Err(Error::unavailable("ask the bank", "it is down").into()) })
    });
    let error = Consumer::essentially_once(shipping(), log, memory.store(), handler)
        .accept_volatile()
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Truncated { requested, .. } if requested == Offset::ZERO),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_place_that_an_operator_chose_is_not_begun_again() {
    let memory = Memory::new();
    let log = log_of(&memory, RECORDS).await;
    let stop = CancellationToken::new();
    let handler = handler_fn(|_: &Record, _: &mut MemoryTx| Box::pin(async { Ok(()) }));
    let run = tokio::spawn(
        Consumer::essentially_once(shipping(), log.clone(), memory.store(), handler)
            .accept_volatile()
            .run_until(stop.clone()),
    );
    tokio::time::sleep(Duration::from_secs(5)).await;
    // This is the offset where the run began, but a new position.
    seek(
        &shipping(),
        &log,
        &memory.store(),
        StartAt::Offset(Offset::ZERO),
        &ann(),
    )
    .await
    .unwrap();
    log.truncate(5.into());
    let error = run.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
}

/// A log that reports a bad start only from the first `next`, as L5 allows.
struct Lazy {
    inner: MemoryLog,
    /// Removes records as soon as a reader exists.
    truncates: Arc<AtomicBool>,
}

struct LazyReader {
    log: MemoryLog,
    from: Offset,
    inner: Option<Box<dyn LogReader>>,
    truncates: Arc<AtomicBool>,
}

#[essentially_once::async_trait]
impl Log for Lazy {
    fn id(&self) -> &LogId {
        self.inner.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.inner.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        Ok(Box::new(LazyReader {
            log: self.inner.clone(),
            from,
            inner: None,
            truncates: Arc::clone(&self.truncates),
        }))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.inner.bounds().await
    }

    async fn durability(&self) -> Result<essentially_once::backend::Durability, Error> {
        self.inner.durability().await
    }
}

#[essentially_once::async_trait]
impl LogReader for LazyReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        if self.truncates.swap(false, Ordering::SeqCst) {
            self.log.truncate(5.into());
        }
        if self.inner.is_none() {
            self.inner = Some(self.log.read(self.from).await?);
        }
        self.inner.as_mut().unwrap().next(max).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_log_that_reports_the_removal_late_does_not_stall_a_new_consumer() {
    let memory = Memory::new();
    let log = Lazy {
        inner: log_of(&memory, RECORDS).await,
        truncates: Arc::new(AtomicBool::new(true)),
    };
    let handler = handler_fn(|_: &Record, _: &mut MemoryTx| Box::pin(async { Ok(()) }));
    let run = Consumer::essentially_once(shipping(), log, memory.store(), handler)
        .accept_volatile()
        .run_until_caught_up();
    let report = tokio::time::timeout(Duration::from_secs(3_600), run)
        .await
        .expect("it does not stall");
    assert_eq!(report.unwrap().handled, RECORDS - 5);
}

#[tokio::test(start_paused = true)]
async fn a_record_at_the_greatest_offset_is_refused_rather_than_handled_again_and_again() {
    let handled = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&handled);
    let handler = handler_fn(move |_: &Record, _: &mut MemoryTx| {
        counted.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    });
    let log = support::OneRecord(Record::new(Offset::MAX, std::time::SystemTime::now(), "last"));
    let error = Consumer::essentially_once(shipping(), log, Memory::new().store(), handler)
        .accept_volatile()
        .run()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("greatest offset"), "{error}");
    assert_eq!(handled.load(Ordering::SeqCst), 0);
    assert_eq!(Offset::MAX.successor(), Offset::MAX);
}
