//! Where a run begins, how it ends, its settings, and its neighbors.

use super::*;

#[tokio::test]
async fn start_at_is_committed_before_the_first_record_is_handled() {
    for (start_at, handled) in [
        (StartAt::Earliest, 10),
        (StartAt::Latest, 0),
        (StartAt::Offset(7.into()), 5),
    ] {
        let backend = Backend::new(RECORDS, Script::default()).await;
        backend.memory_log().truncate(2.into());
        let handler =
            handler_fn(|_: &Record, _: &mut ScriptedTx| Box::pin(async { Err(HandlerError::fatal("not today")) }));
        let first = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
            .start_at(start_at)
            .run_until_caught_up()
            .await;
        assert_eq!(first.is_err(), handled > 0);
        let position = backend.position(&shipping()).await.unwrap();
        assert_eq!(
            (position.next, position.revision.count()),
            ((RECORDS - handled).into(), 1)
        );
        // The start is decided once: more records do not move `Latest`.
        backend.memory_log().append(&[NewRecord::new("0")]).await.unwrap();
        let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
            .start_at(StartAt::Latest)
            .run_until_caught_up()
            .await
            .unwrap();
        assert_eq!(report.handled, handled + 1);
    }
}

#[tokio::test]
async fn a_start_past_the_end_commits_no_position() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .start_at(StartAt::Offset(99.into()))
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
    assert_eq!(backend.position(&shipping()).await, None);
}

#[tokio::test]
async fn essentially_once_refuses_a_volatile_backend_unless_allowed() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    let error = Consumer::essentially_once(shipping(), log.clone(), memory.store(), support::Counter::default())
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Volatile { .. }), "{error}");
    assert!(error.to_string().contains("accept_volatile"), "{error}");
    let handler = InMemory(support::Counter::default());
    Consumer::at_least_once(shipping(), log, memory.store(), handler)
        .run_until_caught_up()
        .await
        .unwrap();
}

#[tokio::test]
async fn settings_that_make_no_sense_are_refused() {
    let backend = Backend::new(1, Script::default()).await;
    let consumer = || Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter());
    for consumer in [
        consumer().max_batch(0),
        consumer().read_ahead_records(0).read_ahead_bytes(1),
        consumer().read_ahead_records(1).read_ahead_bytes(0),
        consumer()
            .min_backoff(Duration::from_secs(2))
            .max_backoff(Duration::from_secs(1)),
        consumer().record_time_limit(Duration::ZERO),
    ] {
        let error = consumer.run_until_caught_up().await.unwrap_err();
        assert!(matches!(error, Error::InvalidSetting { .. }), "{error}");
    }
}

#[tokio::test]
async fn the_greatest_values_of_all_settings_are_taken_as_they_are() {
    let script = Script::default().fail(Step::Begin, 1, Fault::Before);
    let backend = Backend::new(RECORDS, script).await;
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .max_batch(usize::MAX)
        .read_ahead_records(usize::MAX)
        .read_ahead_bytes(usize::MAX)
        .retries(u32::MAX)
        .restart_limit(u32::MAX)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::MAX)
        .forget_producers_after(Duration::MAX)
        .batch_time_limit(Duration::MAX)
        .record_time_limit(Duration::MAX)
        .stop_grace(Duration::MAX)
        .standby_after(Duration::MAX)
        .run_until_caught_up()
        .await
        .unwrap();
    backend.script.assert_all_struck();
    assert_eq!(report.handled, RECORDS);
}

#[tokio::test]
async fn a_log_far_larger_than_the_read_ahead_is_read_to_its_end() {
    for (records, bytes) in [
        (1, 1),
        (2, 1_000),
        (3, 7),
        (10, 1),
        (16, 1_000),
        (1_000, 100),
        (1_024, 1_000_000),
    ] {
        for max_batch in [1, 2, 5, 100, 5_000] {
            let backend = Backend::new(1_000, Script::default()).await;
            let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
                .read_ahead_records(records)
                .read_ahead_bytes(bytes)
                .max_batch(max_batch)
                .run_until_caught_up();
            let report = tokio::time::timeout(Duration::from_secs(30), run).await;
            let report = report.unwrap_or_else(|_| panic!("stuck: {records} records, {bytes} bytes, {max_batch}"));
            assert_eq!(report.unwrap().handled, 1_000);
        }
    }
}

#[tokio::test]
async fn a_batch_of_large_records_takes_at_most_half_of_the_bytes() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    log.append(&vec![NewRecord::new(vec![0; 100]); 12]).await.unwrap();
    // The first commit only sets the position.
    for (bytes, commits) in [(10_000, 1 + 1), (800, 1 + 3), (199, 1 + 12)] {
        let consumer = ConsumerId::new(format!("reads-{bytes}")).unwrap();
        let handler = handler_fn(|_: &Record, _: &mut ()| Box::pin(async { Ok(()) }));
        let report = Consumer::at_least_once(consumer, log.clone(), memory.store(), handler)
            .read_ahead_bytes(bytes)
            .run_until_caught_up()
            .await
            .unwrap();
        assert_eq!((report.handled, report.commits), (12, commits), "{bytes}: {report}");
    }
}

#[tokio::test]
async fn restart_limit_ends_the_run_with_the_last_error() {
    let mut script = Script::default();
    for nth in 0..5 {
        script = script.fail(Step::Begin, nth, Fault::Before);
    }
    let backend = Backend::new(RECORDS, script).await;
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .restart_limit(4)
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert_eq!(backend.script.taken(Step::Begin), 5);
}

#[tokio::test]
async fn a_commit_starts_the_count_of_restarts_over() {
    // Two failures in a row, three times, with commits between them.
    let mut script = Script::default();
    // Each session begins one transaction to look for dead letters.
    for nth in [1, 2, 5, 6, 9, 10] {
        script = script.fail(Step::Begin, nth, Fault::Before);
    }
    let backend = Backend::new(RECORDS, script).await;
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .max_batch(3)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .restart_limit(2)
        .run_until_caught_up()
        .await
        .unwrap();
    backend.script.assert_all_struck();
    assert_eq!(report.restarts, 6);
}

#[tokio::test(start_paused = true)]
async fn pauses_grow_until_a_commit() {
    let mut script = Script::default();
    for nth in 1..7 {
        script = script.fail(Step::Begin, nth, Fault::Before);
    }
    let backend = Backend::new(RECORDS, script).await;
    let started = tokio::time::Instant::now();
    Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .min_backoff(Duration::from_secs(1))
        .max_backoff(Duration::from_secs(8))
        .run_until_caught_up()
        .await
        .unwrap();
    // 1 + 2 + 4 + 8 + 8 + 8 seconds, each with up to 100 % jitter.
    let waited = started.elapsed();
    assert!(
        waited >= Duration::from_secs(31) && waited < Duration::from_secs(62),
        "{waited:?}"
    );
}

#[tokio::test]
async fn a_stop_commits_what_was_handled_and_reports_it() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let stop = CancellationToken::new();
    let stop_at_third = {
        let stop = stop.clone();
        let mut counter = backend.counter();
        struct StopAt(support::Counter, CancellationToken);
        #[async_trait::async_trait]
        impl Handler<ScriptedTx> for StopAt {
            async fn handle(&mut self, record: &Record, tx: &mut ScriptedTx) -> Result<(), HandlerError> {
                if record.offset == Offset::from(2) {
                    self.1.cancel();
                }
                self.0.handle(record, tx).await
            }
        }
        counter.poison = Vec::new();
        StopAt(counter, stop)
    };
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), stop_at_third)
        .run_until(stop)
        .await
        .unwrap();
    assert_eq!((report.handled, report.next), (3, Some(3.into())));
    let counts = backend.counts(&shipping(), RECORDS).await;
    assert_eq!(counts, [[1; 3].as_slice(), &[0; 9]].concat());
}

#[tokio::test]
async fn a_waiting_consumer_handles_new_records_and_stops_on_request() {
    let backend = Backend::new(0, Script::default()).await;
    let (log, memory_log) = (backend.log(), backend.memory_log());
    let stop = CancellationToken::new();
    let (seen, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    let handler = handler_fn(move |record: &Record, _: &mut ()| {
        let _ = seen.send(record.payload.clone());
        Box::pin(async { Ok(()) })
    });
    let run = tokio::spawn(Consumer::at_least_once(shipping(), log, backend.store(), handler).run_until(stop.clone()));
    for n in ["0", "1", "2"] {
        memory_log.append(&[NewRecord::new(n)]).await.unwrap();
        assert_eq!(arrived.recv().await.unwrap(), n);
    }
    stop.cancel();
    assert_eq!(run.await.unwrap().unwrap().handled, 3);
}

#[tokio::test]
async fn a_dropped_run_leaves_no_trace_of_the_batch_in_hand() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let (entered, mut in_handler) = tokio::sync::mpsc::unbounded_channel();
    let handler = handler_fn(move |_: &Record, _: &mut ScriptedTx| {
        let _ = entered.send(());
        Box::pin(std::future::pending())
    });
    let run = tokio::spawn(Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler).run());
    in_handler.recv().await.unwrap();
    run.abort();
    assert!(run.await.unwrap_err().is_cancelled());
    assert_eq!(backend.position(&shipping()).await.unwrap().next, Offset::ZERO);
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(report.handled, RECORDS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_instances_of_one_consumer_handle_every_record_once() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    let records: Vec<NewRecord> = (0..500).map(|n| NewRecord::new(n.to_string())).collect();
    log.append(&records).await.unwrap();
    let run = || {
        let handler = handler_fn(|record: &Record, tx: &mut MemoryTx| {
            Box::pin(async move {
                tokio::task::yield_now().await;
                support::Counter::default().handle(record, tx).await
            })
        });
        tokio::spawn(
            Consumer::essentially_once(shipping(), log.clone(), memory.store(), handler)
                .accept_volatile()
                .max_batch(7)
                .min_backoff(Duration::ZERO)
                .max_backoff(Duration::from_micros(50))
                .run_until_caught_up(),
        )
    };
    let (one, two) = (run(), run());
    let reports = [one.await.unwrap().unwrap(), two.await.unwrap().unwrap()];
    assert_eq!(reports.iter().map(|report| report.handled).sum::<u64>(), 500);
    let backend = Backend::of(memory, Script::default());
    assert_eq!(backend.counts(&shipping(), 500).await, [1; 500]);
}

/// Without a poll more than it was woken for, which would take away its turn.
#[tokio::test]
async fn a_handler_that_yields_lets_other_tasks_run() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let handler = handler_fn(|_: &Record, _: &mut ScriptedTx| {
        Box::pin(async {
            let other = tokio::spawn(async {});
            tokio::task::yield_now().await;
            match other.is_finished() {
                true => Ok(()),
                false => Err(HandlerError::fatal("no other task has run")),
            }
        })
    });
    let consumer = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler);
    assert_eq!(consumer.run_until_caught_up().await.unwrap().handled, RECORDS);
}

#[tokio::test]
async fn consumers_of_other_names_are_independent() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let other = ConsumerId::new("billing").unwrap();
    for consumer in [shipping(), other.clone()] {
        Consumer::essentially_once(consumer, backend.log(), backend.store(), backend.counter())
            .run_until_caught_up()
            .await
            .unwrap();
    }
    assert_eq!(backend.counts(&other, RECORDS).await, [1; RECORDS as usize]);
}

/// A type-level guarantee: neither future is tied to the thread that created it.
#[test]
fn runs_can_be_spawned() {
    fn assert_send<T: Send>(_: T) {}
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    assert_send(Consumer::essentially_once(shipping(), log.clone(), memory.store(), support::Counter::default()).run());
    let handler: Box<dyn Handler<MemoryTx>> = Box::new(support::Counter::default());
    let log: Arc<dyn Log> = Arc::new(log);
    assert_send(Consumer::essentially_once(shipping(), log, Arc::new(memory.store()), handler).run());
}

#[tokio::test]
async fn the_store_is_shared_through_an_arc() {
    let store = Arc::new(Memory::new().store());
    assert_eq!(store.position(&shipping()).await.unwrap(), None);
}

#[tokio::test]
async fn a_stop_does_not_wait_for_a_transaction_that_cannot_begin() {
    let backend = Backend::new(RECORDS, Script::default().fail(Step::Begin, 1, Fault::Hang)).await;
    let stop = CancellationToken::new();
    let run = tokio::spawn(
        Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
            .run_until(stop.clone()),
    );
    while backend.script.taken(Step::Begin) < 2 {
        tokio::task::yield_now().await;
    }
    stop.cancel();
    assert_eq!(run.await.unwrap().unwrap().handled, 0);
}

/// A handler that treats existing state as a conflict, like one with a unique constraint.
struct RejectsWhatIsThere(
    Option<(
        essentially_once::memory::MemoryLog,
        essentially_once::memory::MemoryStore,
    )>,
);

#[async_trait::async_trait]
impl Handler<ScriptedTx> for RejectsWhatIsThere {
    async fn handle(&mut self, record: &Record, tx: &mut ScriptedTx) -> Result<(), HandlerError> {
        use essentially_once::{
            KeyValue,
            backend::{Advance, Transaction},
        };

        if let Some((log, store)) = self.0.take() {
            // Another instance handles the same record and commits first.
            let position = store.position(&shipping()).await?.unwrap();
            let mut other = store.begin(&shipping()).await?;
            other.put(&record.payload, b"shipped").await?;
            let (next, expected) = (record.offset.successor(), position.revision);
            let advance = Advance::new(log.id().clone(), next, expected, expected.next_epoch());
            other.commit(advance).await?;
        }
        if tx.get(&record.payload).await?.is_some() {
            return Err(HandlerError::reject("shipped already"));
        }
        tx.put(&record.payload, b"shipped").await?;
        Ok(())
    }
}

#[tokio::test]
async fn the_verdict_of_an_instance_that_was_overtaken_counts_for_nothing() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let handler = RejectsWhatIsThere(Some((backend.memory_log(), backend.memory.store())));
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.fenced), (RECORDS - 1, 1));
}

#[tokio::test]
async fn the_verdict_of_an_overtaken_instance_counts_for_nothing_without_a_transaction_either() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let (log, store) = (backend.memory_log(), backend.memory.store());
    let mut overtaken = false;
    let handler = handler_fn(move |record: &Record, (): &mut ()| {
        let (log, store) = (log.clone(), store.clone());
        let first = !std::mem::replace(&mut overtaken, true);
        let behind = record.offset.successor();
        Box::pin(async move {
            if first {
                // Another instance handles the same record and commits first.
                seek(&shipping(), &log, &store, StartAt::Offset(behind), &ann()).await?;
                return Err(HandlerError::reject("shipped already"));
            }
            Ok(())
        })
    });
    let report = Consumer::at_least_once(shipping(), backend.log(), backend.store(), handler)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.fenced), (RECORDS - 1, 1));
}

#[tokio::test]
async fn a_panic_while_resetting_is_survived() {
    struct PanicsOnReset(support::Counter);
    #[async_trait::async_trait]
    impl Handler<ScriptedTx> for PanicsOnReset {
        async fn handle(&mut self, record: &Record, tx: &mut ScriptedTx) -> Result<(), HandlerError> {
            self.0.handle(record, tx).await
        }

        async fn reset(&mut self) {
            panic!("scripted panic");
        }
    }
    let backend = Backend::new(RECORDS, Script::default().fail(Step::Commit, 1, Fault::Before)).await;
    let handler = PanicsOnReset(backend.counter());
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(report.handled, RECORDS);
}
