//! Duplicate records.

use essentially_once::{
    Epoch, KeyValue, Origin, async_trait,
    backend::{Bounds, Durability, LogId, LogReader},
    consumer::DeadLetterOptions,
};

use super::*;

/// A log to which every record was sent twice, with one out of order.
async fn sent_twice(memory: &Memory) -> essentially_once::memory::MemoryLog {
    let log = memory.log("orders").unwrap();
    let producer = ProducerId::new("web-1").unwrap();
    let records = [0u64, 1, 3, 2, 1, 3, 0, 2, 4]
        .map(|n| NewRecord::new(n.to_string()).origin(Origin::new(producer.clone(), Epoch::STABLE, n)));
    log.append(&records).await.unwrap();
    log
}

#[tokio::test]
async fn what_was_sent_twice_is_handled_once_at_any_batch_size_and_across_runs() {
    for max_batch in [1, 2, 3, 100] {
        let memory = Memory::new();
        let log = sent_twice(&memory).await;
        for _ in 0..2 {
            Consumer::essentially_once(shipping(), log.clone(), memory.store(), support::Counter::default())
                .accept_volatile()
                .max_batch(max_batch)
                .run_until_caught_up()
                .await
                .unwrap();
            // The producer sends everything once more after the consumer has ended.
            sent_twice(&memory).await;
        }
        let backend = Backend::of(memory, Script::default());
        assert_eq!(backend.counts(&shipping(), 5).await, [1; 5], "max_batch {max_batch}");
    }
}

#[tokio::test]
async fn a_failed_record_is_no_duplicate_when_it_is_tried_again() {
    for nth in 0..5 {
        let script = Script::default().fail(Step::Handle, nth, Fault::Permanent);
        let backend = Backend::of(Memory::new(), script);
        sent_twice(&backend.memory).await;
        let handler = backend.counter();
        let handled = Arc::clone(&handler.in_memory);
        let report = Consumer::at_least_once(shipping(), backend.log(), backend.store(), InMemory(handler))
            .run_until_caught_up()
            .await
            .unwrap();
        backend.script.assert_all_struck();
        assert_eq!((report.handled, report.duplicates), (5, 4));
        assert_eq!(handled.lock().unwrap().len(), 5);
    }
}

#[tokio::test]
async fn going_back_by_hand_handles_again_what_has_an_origin() {
    let memory = Memory::new();
    let log = sent_twice(&memory).await;
    for handled in [5, 5] {
        let report = Consumer::essentially_once(shipping(), log.clone(), memory.store(), support::Counter::default())
            .accept_volatile()
            .run_until_caught_up()
            .await
            .unwrap();
        assert_eq!(report.handled, handled);
        seek(&shipping(), &log, &memory.store(), StartAt::Earliest, &ann())
            .await
            .unwrap();
    }
}

/// Reads to the end of the log and forgets producers that were silent for `forget_after`.
async fn catch_up(log: &essentially_once::memory::MemoryLog, memory: &Memory, forget_after: Duration) -> (u64, u64) {
    let report = Consumer::essentially_once(shipping(), log.clone(), memory.store(), support::Counter::default())
        .accept_volatile()
        .forget_producers_after(forget_after)
        .max_batch(1)
        .run_until_caught_up()
        .await
        .unwrap();
    (report.handled, report.duplicates)
}

#[tokio::test]
async fn a_producer_is_not_silent_while_its_records_are_unread_or_dropped() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    let resent = NewRecord::new("0").origin(Origin::new(ProducerId::new("web").unwrap(), Epoch::new(7), 1));
    log.append(&[resent.clone(), NewRecord::new("1")]).await.unwrap();
    let after = Duration::from_millis(100);
    assert_eq!(catch_up(&log, &memory, after).await, (2, 0));
    for round in 0..4u64 {
        // The record stays unread while the consumer is down for longer than the limit, and
        // retention removes all records that were read.
        log.append(std::slice::from_ref(&resent)).await.unwrap();
        log.truncate((2 + round).into());
        tokio::time::sleep(after + Duration::from_millis(20)).await;
        assert_eq!(catch_up(&log, &memory, after).await, (0, 1), "round {round}");
    }
}

#[tokio::test]
async fn a_silent_producer_is_forgotten_once_the_log_went_on_without_it() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    let resent = NewRecord::new("0").origin(Origin::new(ProducerId::new("web").unwrap(), Epoch::new(7), 1));
    log.append(std::slice::from_ref(&resent)).await.unwrap();
    assert_eq!(catch_up(&log, &memory, Duration::ZERO).await, (1, 0));
    log.truncate(1.into());
    tokio::time::sleep(Duration::from_millis(2)).await;
    log.append(&[NewRecord::new("1"), NewRecord::new("2")]).await.unwrap();
    assert_eq!(catch_up(&log, &memory, Duration::ZERO).await, (2, 0));
    let windows = memory.store().position(&shipping()).await.unwrap().unwrap().windows;
    assert!(windows.is_empty(), "{windows:?}");
}

#[tokio::test]
async fn a_process_that_restarts_numbering_in_a_fresh_epoch_loses_nothing() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    let producer = ProducerId::new("web").unwrap();
    for run in 0..2 {
        let epoch = Epoch::fresh();
        let records: Vec<NewRecord> = (0..400)
            .map(|n| NewRecord::new(format!("{run}-{n}")).origin(Origin::new(producer.clone(), epoch, n)))
            .collect();
        log.append(&records).await.unwrap();
        assert_eq!(catch_up(&log, &memory, Duration::MAX).await, (400, 0), "run {run}");
    }
}

/// Regression test: a process whose clock was eight days ahead made consumers forget all other
/// producers.
#[tokio::test]
async fn one_wrong_clock_forgets_nobody_elses_window() {
    let week = Duration::from_secs(7 * 86_400);
    for ahead in [true, false] {
        let memory = Memory::new();
        let log = memory.log("orders").unwrap();
        let of = |producer: &str, n: u64| {
            NewRecord::new(n.to_string()).origin(Origin::new(ProducerId::new(producer).unwrap(), Epoch::new(7), n))
        };
        let records: Vec<NewRecord> = (0..10).map(|n| of("a", n)).collect();
        log.append(&records).await.unwrap();
        assert_eq!(catch_up(&log, &memory, week).await, (10, 0));
        log.append(&[of("b", 0), of("b", 1), of("b", 2)]).await.unwrap();
        log.truncate(10.into());
        let clock = OffClock {
            log: log.clone(),
            from: 10.into(),
            ahead,
        };
        let run = |clock: OffClock| {
            Consumer::essentially_once(shipping(), clock, memory.store(), support::Counter::default())
                .accept_volatile()
                .forget_producers_after(week)
                .run_until_caught_up()
        };
        assert_eq!(run(clock.clone()).await.unwrap().handled, 3);
        log.append(&[of("a", 9)]).await.unwrap();
        let report = run(clock).await.unwrap();
        assert_eq!((report.handled, report.duplicates), (0, 1), "ahead {ahead}: {report}");
    }
}

/// A log in which a process with a wrong clock appended the records from an offset on.
#[derive(Clone)]
struct OffClock {
    log: essentially_once::memory::MemoryLog,
    from: Offset,
    ahead: bool,
}

struct OffReader(Box<dyn LogReader>, OffClock);

#[async_trait]
impl LogReader for OffReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        let mut records = self.0.next(max).await?;
        let off = Duration::from_secs(8 * 86_400);
        for record in records.iter_mut().filter(|record| record.offset >= self.1.from) {
            record.appended_at = match self.1.ahead {
                true => record.appended_at + off,
                false => record.appended_at - off,
            };
        }
        Ok(records)
    }
}

#[async_trait]
impl Log for OffClock {
    fn id(&self) -> &LogId {
        self.log.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.log.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        Ok(Box::new(OffReader(self.log.read(from).await?, self.clone())))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.log.bounds().await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.log.durability().await
    }
}

/// A broken copy of a record must neither count as its record nor be dropped as its duplicate.
#[tokio::test]
async fn a_malformed_record_marks_nothing_and_is_no_duplicate() {
    let whole = NewRecord::new("0").origin(Origin::new(ProducerId::new("web").unwrap(), Epoch::STABLE, 1));
    let mut backend = Backend::of(Memory::new(), Script::default());
    backend.malformed = Some(Offset::ZERO);
    backend.memory_log().append(&[whole.clone(), whole]).await.unwrap();
    let handler = backend.counter();
    let handled = Arc::clone(&handler.in_memory);
    let report = Consumer::at_most_once(shipping(), backend.log(), backend.store(), InMemory(handler))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.failed, report.duplicates), (1, 1, 0));
    assert_eq!(handled.lock().unwrap().len(), 1);

    // The other order, under a delivery that stops at a malformed record: seen before, and then
    // malformed.
    backend.malformed = Some(1.into());
    let error = Consumer::at_least_once(
        ConsumerId::new("other").unwrap(),
        backend.log(),
        backend.store(),
        InMemory(backend.counter()),
    )
    .run_until_caught_up()
    .await
    .unwrap_err();
    assert!(
        matches!(error, Error::Unhandled { offset, .. } if offset == 1.into()),
        "{error}"
    );
}

fn sent_by_web(payload: &'static str, sequence: u64) -> NewRecord {
    let web = ProducerId::new("web").unwrap();
    NewRecord::new(payload).origin(Origin::new(web, Epoch::STABLE, sequence))
}

/// A handler whose `flush` fails once, after its effects.
#[derive(Default)]
struct FlushesLate {
    has_failed: bool,
}

#[essentially_once::async_trait]
impl<Tx: KeyValue> Handler<Tx> for FlushesLate {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        Ok(tx.put(&record.payload, b"handled").await?)
    }

    async fn flush(&mut self, _: &mut Tx) -> Result<(), HandlerError> {
        match std::mem::replace(&mut self.has_failed, true) {
            false => Err(HandlerError::retry("not yet")),
            true => Ok(()),
        }
    }
}

/// The failed try is a commit, and must not carry the mark of the record that it rolled back.
#[tokio::test]
async fn a_record_whose_flush_failed_is_no_duplicate_when_it_is_tried_again() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    log.append(&[sent_by_web("a", 1)]).await.unwrap();
    let run = Consumer::essentially_once(shipping(), log, memory.store(), FlushesLate::default());
    let run = run
        .accept_volatile()
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO);
    let report = run.run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.duplicates, report.failed_tries), (1, 0, 1));
    let value = memory
        .store()
        .begin(&shipping())
        .await
        .unwrap()
        .get(b"a")
        .await
        .unwrap();
    assert_eq!(value.as_deref(), Some(&b"handled"[..]));
}

/// The same under at-least-once, which has no transaction.
#[tokio::test]
async fn a_record_whose_flush_failed_is_flushed_again_under_at_least_once() {
    struct Gathers {
        gathered: u64,
        flushed: Arc<std::sync::atomic::AtomicU64>,
        has_failed: bool,
    }

    #[essentially_once::async_trait]
    impl Handler<()> for Gathers {
        async fn handle(&mut self, _: &Record, (): &mut ()) -> Result<(), HandlerError> {
            self.gathered += 1;
            Ok(())
        }

        async fn flush(&mut self, (): &mut ()) -> Result<(), HandlerError> {
            if !std::mem::replace(&mut self.has_failed, true) {
                return Err(HandlerError::retry("not yet"));
            }
            self.flushed
                .fetch_add(std::mem::take(&mut self.gathered), Ordering::Relaxed);
            Ok(())
        }

        async fn reset(&mut self) {
            self.gathered = 0;
        }
    }

    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    log.append(&[sent_by_web("a", 1)]).await.unwrap();
    let flushed = Arc::default();
    let handler = Gathers {
        gathered: 0,
        flushed: Arc::clone(&flushed),
        has_failed: false,
    };
    let run = Consumer::at_least_once(shipping(), log, memory.store(), handler);
    let run = run.min_backoff(Duration::ZERO).max_backoff(Duration::ZERO);
    let report = run.run_until_caught_up().await.unwrap();
    assert_eq!((flushed.load(Ordering::Relaxed), report.duplicates), (1, 0));
}

/// A commit that only finds out who is to blame must not carry marks either.
#[tokio::test]
async fn a_record_in_front_of_one_that_cannot_be_parked_is_handled() {
    let memory = Memory::new();
    let (log, store) = (memory.log("orders").unwrap(), memory.store());
    let run = || {
        let handler = handler_fn(|record: &Record, tx: &mut MemoryTx| {
            Box::pin(async move {
                if record.payload == "poison" {
                    return Err(HandlerError::reject("poison"));
                }
                Ok(tx.put(&record.payload, b"handled").await?)
            })
        });
        Consumer::essentially_once(shipping(), log.clone(), store.clone(), handler)
            .dead_letters(DeadLetterOptions::new().limit(1))
            .accept_volatile()
            .min_backoff(Duration::ZERO)
            .max_backoff(Duration::ZERO)
            .run_until_caught_up()
    };
    log.append(&[sent_by_web("poison", 1).key("a")]).await.unwrap();
    assert_eq!(run().await.unwrap().parked, 1);
    let more = [sent_by_web("good", 2).key("b"), sent_by_web("behind", 3).key("a")];
    log.append(&more).await.unwrap();
    let error = run().await.unwrap_err();
    assert!(error.to_string().contains("1 is its limit"), "{error}");
    let value = store.begin(&shipping()).await.unwrap().get(b"good").await.unwrap();
    assert_eq!(value.as_deref(), Some(&b"handled"[..]));
}
