//! Removing the records that every consumer has passed.

use essentially_once::{
    backend::{Bounds, Durability, LogId, LogReader},
    consumer::{OnFailure, remove_passed},
    memory::MemoryLog,
};
use tokio::sync::Notify;

use super::*;

fn billing() -> ConsumerId {
    ConsumerId::new("billing").unwrap()
}

/// Lets a consumer handle the records up to the one with that payload, which stops it.
async fn run_to(backend: &Backend, consumer: ConsumerId, poison: &'static str) {
    let mut handler = backend.counter();
    handler.poison = vec![poison];
    let run = Consumer::essentially_once(consumer, backend.log(), backend.store(), handler).run_until_caught_up();
    let _stopped_or_done = run.await;
}

async fn earliest(backend: &Backend) -> u64 {
    backend.memory_log().bounds().await.unwrap().earliest.lo()
}

#[tokio::test]
async fn the_last_record_that_the_slowest_consumer_passed_stays() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    run_to(&backend, shipping(), "none").await;
    run_to(&backend, billing(), "5").await;
    let both = [shipping(), billing()];
    let remove = async || remove_passed(&backend.log(), &backend.store(), &both).await.unwrap();
    assert_eq!((remove().await, earliest(&backend).await), (4, 4));
    assert_eq!(remove().await, 0);
    run_to(&backend, billing(), "none").await;
    assert_eq!(backend.counts(&billing(), RECORDS).await, vec![1; RECORDS as usize]);
    assert_eq!((remove().await, earliest(&backend).await), (7, RECORDS - 1));
    // The record that stayed still shows a log that was restored and has grown again.
    let restored = Memory::new().log("orders").unwrap();
    let records: Vec<NewRecord> = (0..2 * RECORDS).map(|n| NewRecord::new(format!("new {n}"))).collect();
    restored.append(&records).await.unwrap();
    let error = remove_passed(&restored, &backend.store(), &both).await.unwrap_err();
    assert!(
        matches!(&error, Error::LogChanged { consumer, .. } if *consumer == shipping()),
        "{error}"
    );
    assert_eq!(restored.bounds().await.unwrap().earliest, Offset::ZERO);
}

#[tokio::test]
async fn a_position_that_passed_no_known_record_needs_only_what_is_ahead() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let remove = async || {
        remove_passed(&backend.log(), &backend.store(), &[shipping()])
            .await
            .unwrap()
    };
    for (to, removed) in [(StartAt::Offset(7.into()), 7), (StartAt::Latest, RECORDS - 7)] {
        seek(&shipping(), &backend.log(), &backend.store(), to, &ann())
            .await
            .unwrap();
        assert_eq!(remove().await, removed, "{to:?}");
    }
    assert_eq!(earliest(&backend).await, RECORDS);
    let back = StartAt::Offset(3.into());
    let error = seek(&shipping(), &backend.log(), &backend.store(), back, &ann()).await;
    assert!(matches!(error, Err(Error::Truncated { .. })), "{error:?}");
}

#[tokio::test]
async fn nothing_is_removed_unless_every_consumer_is_known_to_have_passed_it() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    run_to(&backend, shipping(), "none").await;
    let remove = async |consumers: &[ConsumerId]| {
        remove_passed(&backend.log(), &backend.store(), consumers)
            .await
            .unwrap_err()
    };
    let error = remove(&[]).await.to_string();
    assert!(error.contains("no consumer is named"), "{error}");
    let error = remove(&[shipping(), billing()]).await.to_string();
    assert!(error.contains("consumer billing has no position yet"), "{error}");

    let other = backend.memory.log("returns").unwrap();
    other.append(&[NewRecord::new("0")]).await.unwrap();
    seek(&billing(), &other, &backend.store(), StartAt::Latest, &ann())
        .await
        .unwrap();
    let error = remove(&[shipping(), billing()]).await;
    assert!(
        matches!(&error, Error::WrongLog { consumer, .. } if *consumer == billing()),
        "{error}"
    );

    // A log that lost its tail has records that no consumer has seen, wherever the others are.
    let shorter = Memory::new().log("orders").unwrap();
    shorter.append(&vec![NewRecord::new("0"); 3]).await.unwrap();
    let error = remove_passed(&shorter, &backend.store(), &[shipping()])
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::OutOfRange { requested, .. } if *requested == RECORDS.into()),
        "{error}"
    );
    for (log, left) in [(&backend.memory_log(), RECORDS), (&other, 1), (&shorter, 3)] {
        let bounds = log.bounds().await.unwrap();
        assert_eq!(
            (bounds.earliest, bounds.end),
            (Offset::ZERO, left.into()),
            "{}",
            log.id()
        );
    }
}

#[tokio::test]
async fn a_log_that_cannot_remove_records_says_what_to_do() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    run_to(&backend, shipping(), "none").await;
    let gated = Gated::new(backend.memory_log());
    let error = remove_passed(&gated, &backend.store(), &[shipping()])
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Failed { .. }), "{error:?}");
    assert!(
        error.to_string().contains("log orders") && error.to_string().contains("set a retention"),
        "{error}"
    );
    assert_eq!(earliest(&backend).await, 0);
}

#[tokio::test]
async fn more_records_than_one_step_removes() {
    let log = Memory::new().log("orders").unwrap();
    log.append(&vec![NewRecord::new("x"); 35_000]).await.unwrap();
    assert_eq!(log.remove_before(34_999.into()).await.unwrap(), 34_999);
    let bounds = log.bounds().await.unwrap();
    assert_eq!((bounds.earliest, bounds.end), (34_999.into(), 35_000.into()));
}

/// A log that cannot remove records. Its readers return two records at a time, and hold the second
/// call back until the test wakes them.
#[derive(Clone)]
struct Gated {
    log: MemoryLog,
    is_held: Arc<Notify>,
    wakes: Arc<Notify>,
}

impl Gated {
    fn new(log: MemoryLog) -> Self {
        Self {
            log,
            is_held: Arc::default(),
            wakes: Arc::default(),
        }
    }
}

struct GatedReader {
    reader: Box<dyn LogReader>,
    calls: u32,
    log: Gated,
}

#[essentially_once::async_trait]
impl Log for Gated {
    fn id(&self) -> &LogId {
        self.log.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.log.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        Ok(Box::new(GatedReader {
            reader: self.log.read(from).await?,
            calls: 0,
            log: self.clone(),
        }))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.log.bounds().await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(Durability::Durable)
    }
}

#[essentially_once::async_trait]
impl LogReader for GatedReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        self.calls += 1;
        if self.calls == 2 {
            self.log.is_held.notify_one();
            self.log.wakes.notified().await;
        }
        self.reader.next(max.min(2)).await
    }
}

/// Regression test: the run of an instance that was frozen while another one passed the records
/// ended with an error that claimed they were lost.
#[tokio::test]
async fn an_instance_that_was_displaced_has_lost_nothing() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let gated = Gated::new(backend.memory_log());
    let frozen = Consumer::essentially_once(shipping(), gated.clone(), backend.store(), backend.counter())
        .standby_after(Duration::ZERO)
        .min_backoff(Duration::ZERO);
    let frozen = tokio::spawn(frozen.run_until_caught_up());
    gated.is_held.notified().await;
    while backend
        .position(&shipping())
        .await
        .is_none_or(|position| position.next < 2.into())
    {
        tokio::task::yield_now().await;
    }
    let other = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .standby_after(Duration::ZERO);
    assert_eq!(other.run_until_caught_up().await.unwrap().handled, RECORDS - 2);
    assert_eq!(
        remove_passed(&backend.log(), &backend.store(), &[shipping()])
            .await
            .unwrap(),
        RECORDS - 1
    );
    gated.wakes.notify_one();
    let report = frozen.await.unwrap().unwrap();
    assert_eq!((report.handled, report.fenced, report.truncated), (2, 1, 0), "{report}");
    assert_eq!(backend.counts(&shipping(), RECORDS).await, vec![1; RECORDS as usize]);
}

#[tokio::test]
async fn a_consumer_that_was_not_named_is_told_that_it_lost_records() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    run_to(&backend, shipping(), "none").await;
    run_to(&backend, billing(), "5").await;
    remove_passed(&backend.log(), &backend.store(), &[shipping()])
        .await
        .unwrap();
    let run = Consumer::essentially_once(billing(), backend.log(), backend.store(), backend.counter())
        .on_failure(OnFailure::Skip);
    let error = run.run_until_caught_up().await.unwrap_err();
    assert!(
        matches!(error, Error::Truncated { requested, .. } if requested == 5.into()),
        "{error}"
    );
}
