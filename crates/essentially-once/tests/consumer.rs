//! The consumer loop under a scripted backend: what becomes of records and position with a fault at each step.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "tests, with a support module that each uses in part"
)]

mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, Log, NewRecord, Offset, OffsetStore,
    ProducerId, Record, StartAt, handler_fn,
    memory::{Memory, MemoryTx},
    seek,
};
use support::{Backend, Fault, InMemory, Script, ScriptedTx, Step};

fn shipping() -> ConsumerId {
    ConsumerId::new("shipping").unwrap()
}

const RECORDS: u64 = 12;
const STEPS: [Step; 7] = [
    Step::Bounds,
    Step::Read,
    Step::Next,
    Step::Position,
    Step::Begin,
    Step::Handle,
    Step::Commit,
];

/// Runs essentially-once in batches of 5 with that script, and checks that every record was counted once.
async fn every_record_counts_once(script: Script) -> essentially_once::Report {
    let backend = Backend::new(RECORDS, script).await;
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .max_batch(5)
        .backoff(Duration::ZERO, Duration::ZERO)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(backend.counts(&shipping(), RECORDS).await, [1; RECORDS as usize]);
    assert_eq!(backend.position(&shipping()).await.unwrap().next, RECORDS.into());
    backend.script.assert_all_struck();
    report
}

#[tokio::test]
async fn essentially_once_survives_a_transient_fault_at_any_step() {
    let clean = Script::default();
    every_record_counts_once(clean.clone()).await;
    let mut plans = 0;
    for step in STEPS {
        for nth in 0..clean.taken(step) {
            for fault in [Fault::Before, Fault::After] {
                let report = every_record_counts_once(Script::default().fail(step, nth, fault)).await;
                // The reader may have failed behind the last record that was waited for.
                assert!(
                    report.restarts == 1 || step == Step::Next,
                    "{step:?} {nth} {fault:?}: {report}"
                );
                plans += 1;
            }
        }
    }
    assert!(plans > 30, "only {plans} plans were run");
}

#[tokio::test]
async fn essentially_once_survives_two_faults_in_a_row() {
    for first in [Fault::Before, Fault::After, Fault::Overtaken] {
        for second in [Fault::Before, Fault::After, Fault::Overtaken] {
            for nth in 0..3 {
                let script = Script::default();
                every_record_counts_once(
                    script
                        .fail(Step::Commit, nth, first)
                        .fail(Step::Commit, nth + 1, second),
                )
                .await;
            }
        }
    }
}

#[tokio::test]
async fn a_fenced_consumer_goes_on_behind_the_other() {
    for nth in 0..4 {
        let report = every_record_counts_once(Script::default().fail(Step::Commit, nth, Fault::Overtaken)).await;
        assert_eq!((report.fenced, report.restarts), (1, 1), "{nth}: {report}");
    }
}

#[tokio::test]
async fn a_panic_in_the_handler_is_retried() {
    let report = every_record_counts_once(Script::default().fail(Step::Handle, 7, Fault::Panic)).await;
    assert_eq!(report.handled, RECORDS);
}

#[tokio::test]
async fn a_lost_log_ends_the_run_with_its_own_error() {
    for (fault, step) in [
        (Fault::Truncated, Step::Read),
        (Fault::Truncated, Step::Next),
        (Fault::OutOfRange, Step::Read),
        (Fault::OutOfRange, Step::Next),
        (Fault::Permanent, Step::Begin),
        (Fault::Permanent, Step::Commit),
    ] {
        let backend = Backend::new(RECORDS, Script::default().fail(step, 0, fault)).await;
        let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
            .run_until_caught_up()
            .await
            .unwrap_err();
        let expected = match fault {
            Fault::Truncated => matches!(error, Error::Truncated { .. }),
            Fault::OutOfRange => matches!(error, Error::OutOfRange { .. }),
            _ => matches!(error, Error::Failed { .. }),
        };
        assert!(expected, "{fault:?} at {step:?}: {error}");
        assert_eq!(backend.counts(&shipping(), RECORDS).await, [0; RECORDS as usize]);
    }
}

#[tokio::test]
async fn retention_that_overtakes_a_consumer_is_told_and_seek_goes_on() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let consumer = |backend: &Backend| {
        Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter()).run_until_caught_up()
    };
    seek(&backend.log(), &backend.store(), &shipping(), StartAt::Offset(2.into()))
        .await
        .unwrap();
    backend.memory_log().truncate(6.into());
    let error = consumer(&backend).await.unwrap_err();
    assert!(
        matches!(error, Error::Truncated { requested, earliest, .. }
        if (requested, earliest) == (2.into(), 6.into())),
        "{error}"
    );
    seek(&backend.log(), &backend.store(), &shipping(), StartAt::Earliest)
        .await
        .unwrap();
    assert_eq!(consumer(&backend).await.unwrap().handled, 6);

    let past = seek(
        &backend.log(),
        &backend.store(),
        &shipping(),
        StartAt::Offset(13.into()),
    )
    .await
    .unwrap_err();
    assert!(matches!(past, Error::OutOfRange { .. }), "{past}");
}

#[tokio::test]
async fn a_position_of_another_log_is_refused() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let other = backend.memory.log("invoices").unwrap();
    seek(&other, &backend.memory.store(), &shipping(), StartAt::Earliest)
        .await
        .unwrap();
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::WrongLog { .. }), "{error}");
    assert_eq!(
        backend.script.taken(Step::Handle),
        0,
        "no record of the wrong log is handled"
    );
    let error = seek(&backend.log(), &backend.store(), &shipping(), StartAt::Earliest)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::WrongLog { .. }), "{error}");
}

#[tokio::test]
async fn poison_stops_the_run_behind_what_came_before_it() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let mut handler = backend.counter();
    handler.poison = vec!["7"];
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .max_batch(5)
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Unhandled { offset, .. } if offset == 7.into()),
        "{error}"
    );
    let counts = backend.counts(&shipping(), RECORDS).await;
    assert_eq!(counts, [[1; 7].as_slice(), &[0; 5]].concat());
    assert_eq!(backend.position(&shipping()).await.unwrap().next, 7.into());
}

#[tokio::test]
async fn a_record_is_retried_alone_as_often_as_set_then_the_run_ends() {
    for (failures, ends_well) in [(3, true), (4, false)] {
        let mut script = Script::default();
        // It fails third in its batch; the two before it are then handled once more, and committed.
        for nth in [2].into_iter().chain(5..).take(failures) {
            script = script.fail(Step::Handle, nth, Fault::Permanent);
        }
        let backend = Backend::new(RECORDS, script).await;
        let handler = backend.counter();
        let result = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler.clone())
            .retries(3)
            .backoff(Duration::ZERO, Duration::ZERO)
            .run_until_caught_up()
            .await;
        backend.script.assert_all_struck();
        match result {
            Ok(report) => {
                assert!(ends_well);
                assert_eq!(report.restarts, failures as u64);
                assert_eq!(handler.resets.load(Ordering::SeqCst), failures as u64);
            }
            Err(error) => {
                assert!(
                    !ends_well && matches!(error, Error::Unhandled { attempts: 4, .. }),
                    "{error}"
                );
                assert_eq!(backend.position(&shipping()).await.unwrap().next, 2.into());
            }
        }
    }
}

#[tokio::test]
async fn a_fatal_error_stops_at_once_and_moves_nothing() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let mut handler = backend.counter();
    handler.fatal = vec!["3"];
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Unhandled { offset, attempts: 1, .. } if offset == 3.into()),
        "{error}"
    );
    assert_eq!(backend.counts(&shipping(), RECORDS).await, [0; RECORDS as usize]);
}

#[tokio::test]
async fn a_malformed_record_never_reaches_the_handler_and_blocks_only_what_is_behind_it() {
    let mut backend = Backend::new(RECORDS, Script::default()).await;
    backend.malformed = Some(7.into());
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Unhandled { offset, .. } if offset == 7.into()),
        "{error}"
    );
    assert!(error.to_string().contains("scripted"), "the reason is told: {error}");
    assert_eq!(
        backend.counts(&shipping(), RECORDS).await,
        [[1; 7].as_slice(), &[0; 5]].concat()
    );

    let other = ConsumerId::new("other").unwrap();
    let handler = backend.counter();
    let handled = Arc::clone(&handler.in_memory);
    let report = Consumer::at_most_once(other, backend.log(), backend.store(), InMemory(handler))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.failed), (RECORDS - 1, 1));
    assert!(!handled.lock().unwrap().contains(&"7".to_owned()));
}

#[tokio::test]
async fn a_backend_in_trouble_is_not_the_records_fault() {
    let mut script = Script::default();
    for nth in 3..8 {
        script = script.fail(Step::Handle, nth, Fault::Before);
    }
    let backend = Backend::new(RECORDS, script).await;
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .retries(0)
        .backoff(Duration::ZERO, Duration::ZERO)
        .run_until_caught_up()
        .await
        .unwrap();
    backend.script.assert_all_struck();
    assert_eq!(report.handled, RECORDS);
}

#[tokio::test]
async fn at_least_once_rejects_poison_after_one_call_with_the_position_at_it() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let mut handler = backend.counter();
    handler.poison = vec!["7"];
    let handled = Arc::clone(&handler.in_memory);
    let error = Consumer::at_least_once(shipping(), backend.log(), backend.store(), InMemory(handler))
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Unhandled { offset, attempts: 1, .. } if offset == 7.into()),
        "{error}"
    );
    assert_eq!(handled.lock().unwrap().len(), 7, "each record before it once");
    assert_eq!(backend.position(&shipping()).await.unwrap().next, 7.into());
}

#[tokio::test]
async fn caught_up_means_with_what_the_log_held_at_first() {
    let backend = Backend::new(5, Script::default().fail(Step::Commit, 2, Fault::After)).await;
    let log = backend.memory_log();
    let handler = handler_fn(move |_: &Record, _: &mut ScriptedTx| {
        let log = log.clone();
        Box::pin(async move {
            log.append(&[NewRecord::new("more")]).await?;
            Ok(())
        })
    });
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .max_batch(1)
        .run_until_caught_up()
        .await
        .unwrap();
    backend.script.assert_all_struck();
    assert_eq!(report.next, Some(5.into()));
}

#[tokio::test]
async fn at_least_once_loses_nothing_and_doubles_only_behind_a_lost_commit() {
    for (step, nth, fault) in [
        (Step::Handle, 3, Fault::Permanent),
        (Step::Handle, 3, Fault::Panic),
        (Step::Commit, 2, Fault::Before),
        (Step::Commit, 2, Fault::After),
        (Step::Next, 0, Fault::Before),
    ] {
        let backend = Backend::new(RECORDS, Script::default().fail(step, nth, fault)).await;
        let handler = backend.counter();
        let handled = Arc::clone(&handler.in_memory);
        Consumer::at_least_once(shipping(), backend.log(), backend.store(), InMemory(handler))
            .max_batch(5)
            .backoff(Duration::ZERO, Duration::ZERO)
            .run_until_caught_up()
            .await
            .unwrap();
        backend.script.assert_all_struck();
        let mut handled = handled.lock().unwrap().clone();
        let all = handled.len();
        handled.sort_by_key(|payload| payload.parse::<u64>().unwrap());
        handled.dedup();
        assert_eq!(handled.len() as u64, RECORDS, "{step:?} {fault:?}: lost");
        let expected = if (step, fault) == (Step::Commit, Fault::Before) {
            5
        } else {
            0
        };
        assert_eq!(all - handled.len(), expected, "{step:?} {fault:?}: doubled");
    }
}

#[tokio::test]
async fn at_most_once_doubles_nothing_and_tells_what_it_passed_over() {
    for (step, nth, fault, failed) in [
        (Step::Handle, 3, Fault::Permanent, 1),
        (Step::Handle, 3, Fault::Panic, 1),
        (Step::Commit, 2, Fault::Before, 0),
        (Step::Commit, 2, Fault::After, 0),
    ] {
        let backend = Backend::new(RECORDS, Script::default().fail(step, nth, fault)).await;
        let handler = backend.counter();
        let handled = Arc::clone(&handler.in_memory);
        let report = Consumer::at_most_once(shipping(), backend.log(), backend.store(), InMemory(handler))
            .max_batch(5)
            .backoff(Duration::ZERO, Duration::ZERO)
            .run_until_caught_up()
            .await
            .unwrap();
        backend.script.assert_all_struck();
        let mut handled = handled.lock().unwrap().clone();
        let all = handled.len() as u64;
        handled.dedup();
        assert_eq!(handled.len() as u64, all, "doubled");
        let lost = if fault == Fault::After { 5 } else { failed };
        assert_eq!(RECORDS - all, lost, "{step:?} {fault:?}");
        assert_eq!((report.handled, report.failed), (all, failed), "{step:?} {fault:?}");
    }
}

#[tokio::test]
async fn at_most_once_counts_the_rest_of_a_fatal_batch_as_failed() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let mut handler = backend.counter();
    handler.fatal = vec!["3"];
    let error = Consumer::at_most_once(shipping(), backend.log(), backend.store(), InMemory(handler))
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("position is past this record"), "{error}");
}

/// A log in which every record was sent twice, and one out of order.
async fn sent_twice(memory: &Memory) -> essentially_once::memory::MemoryLog {
    let log = memory.log("orders").unwrap();
    let producer = ProducerId::new("web-1").unwrap();
    let records = [0u64, 1, 3, 2, 1, 3, 0, 2, 4].map(|n| NewRecord::new(n.to_string()).origin(producer.clone(), n));
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
            // Sent once more, after the consumer ended.
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
        seek(&log, &memory.store(), &shipping(), StartAt::Earliest)
            .await
            .unwrap();
    }
}

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
        assert_eq!((position.next, position.revision), ((RECORDS - handled).into(), 1));
        // Once decided, it stays: more records do not move `Latest`.
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
async fn essentially_once_refuses_a_volatile_backend_unless_told() {
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
        consumer().read_ahead(0, 1),
        consumer().read_ahead(1, 0),
    ] {
        let error = consumer.run_until_caught_up().await.unwrap_err();
        assert!(matches!(error, Error::InvalidSetting { .. }), "{error}");
    }
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
                .read_ahead(records, bytes)
                .max_batch(max_batch)
                .run_until_caught_up();
            let report = tokio::time::timeout(Duration::from_secs(30), run).await;
            let report = report.unwrap_or_else(|_| panic!("stuck: {records} records, {bytes} bytes, {max_batch}"));
            assert_eq!(report.unwrap().handled, 1_000);
        }
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
        .backoff(Duration::ZERO, Duration::ZERO)
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
    for nth in [1, 2, 4, 5, 7, 8] {
        script = script.fail(Step::Begin, nth, Fault::Before);
    }
    let backend = Backend::new(RECORDS, script).await;
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .max_batch(3)
        .backoff(Duration::ZERO, Duration::ZERO)
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
        .backoff(Duration::from_secs(1), Duration::from_secs(8))
        .run_until_caught_up()
        .await
        .unwrap();
    // 1 + 2 + 4 + 8 + 8 + 8 seconds, each with up to as much again of jitter.
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
async fn a_waiting_consumer_handles_what_arrives_and_stops_when_told() {
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
                .backoff(Duration::ZERO, Duration::from_micros(50))
                .run_until_caught_up(),
        )
    };
    let (one, two) = (run(), run());
    let reports = [one.await.unwrap().unwrap(), two.await.unwrap().unwrap()];
    assert_eq!(reports.iter().map(|report| report.handled).sum::<u64>(), 500);
    let backend = Backend::of(memory, Script::default());
    assert_eq!(backend.counts(&shipping(), 500).await, [1; 500]);
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

/// A type-level guarantee: neither future is tied to the thread it was made on.
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
