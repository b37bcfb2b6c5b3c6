//! What a stop interrupts, what limits a batch, and what a run waits for.

use essentially_once::{KeyValue, OffsetStore};
use tokio::{sync::mpsc, time::Instant};

use super::*;

/// The longest time for a stop, in simulated time.
const BAR: Duration = Duration::from_millis(100);

#[tokio::test(start_paused = true)]
async fn a_stop_takes_effect_while_any_call_of_the_backend_hangs() {
    for (step, nth) in [
        (Step::Position, 0),
        (Step::Bounds, 0),
        (Step::Read, 0),
        (Step::Next, 0),
        (Step::Begin, 0),
        (Step::Begin, 1),
    ] {
        let backend = Backend::new(RECORDS, Script::default().fail(step, nth, Fault::Hang)).await;
        let stop = CancellationToken::new();
        let run = tokio::spawn(
            Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
                .run_until(stop.clone()),
        );
        while backend.script.taken(step) <= nth {
            tokio::task::yield_now().await;
        }
        let stopped = Instant::now();
        stop.cancel();
        run.await.unwrap().unwrap();
        assert!(stopped.elapsed() < BAR, "{step:?} {nth}: {:?}", stopped.elapsed());
        backend.script.assert_all_struck();
    }
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_does_not_end_is_dropped_after_the_grace_and_its_transaction_with_it() {
    let grace = Duration::from_secs(3);
    let backend = Backend::new(RECORDS, Script::default()).await;
    let stop = CancellationToken::new();
    let (entered, mut in_handler) = mpsc::unbounded_channel();
    let handler = handler_fn(move |record: &Record, tx: &mut ScriptedTx| {
        let _ = entered.send(());
        let hangs = record.offset == Offset::from(2);
        Box::pin(async move {
            tx.put(&record.payload, &1u64.to_be_bytes()).await?;
            match hangs {
                true => std::future::pending().await,
                false => Ok(()),
            }
        })
    });
    let run = tokio::spawn(
        Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
            .stop_grace(grace)
            .batch_time_limit(Duration::MAX)
            .run_until(stop.clone()),
    );
    for _ in 0..3 {
        in_handler.recv().await.unwrap();
    }
    let stopped = Instant::now();
    stop.cancel();
    let report = run.await.unwrap().unwrap();
    assert!(
        stopped.elapsed() >= grace && stopped.elapsed() < grace + BAR,
        "{:?}",
        stopped.elapsed()
    );
    assert_eq!((report.handled, report.next), (0, Some(Offset::ZERO)));
    assert_eq!(backend.counts(&shipping(), RECORDS).await, [0; RECORDS as usize]);
}

#[tokio::test(start_paused = true)]
async fn at_least_once_finishes_the_record_in_hand_and_commits_it() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let stop = CancellationToken::new();
    let token = stop.clone();
    let handler = handler_fn(move |_: &Record, (): &mut ()| {
        let token = token.clone();
        Box::pin(async move {
            token.cancel();
            tokio::time::sleep(Duration::from_secs(60)).await;
            Ok(())
        })
    });
    let report = Consumer::at_least_once(shipping(), backend.log(), backend.store(), handler)
        .run_until(stop)
        .await
        .unwrap();
    assert_eq!((report.handled, report.next), (1, Some(1.into())));
}

#[tokio::test(start_paused = true)]
async fn at_most_once_counts_what_it_passes_over_when_the_grace_ends() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let stop = CancellationToken::new();
    let token = stop.clone();
    let handler = handler_fn(move |_: &Record, (): &mut ()| {
        let token = token.clone();
        Box::pin(async move {
            token.cancel();
            tokio::time::sleep(Duration::from_secs(6)).await;
            Ok(())
        })
    });
    let report = Consumer::at_most_once(shipping(), backend.log(), backend.store(), handler)
        .run_until(stop)
        .await
        .unwrap();
    // The grace period of 10 s begins after the first record and ends in the third.
    assert_eq!((report.handled, report.failed), (3, RECORDS - 3), "{report}");
    assert_eq!(report.next, Some(RECORDS.into()));
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_committed_when_its_time_is_up_and_the_rest_goes_into_the_next() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let slow = || {
        handler_fn(|record: &Record, tx: &mut ScriptedTx| {
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(30)).await;
                support::count_one(tx, &record.payload).await?;
                Ok(())
            })
        })
    };
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), slow())
        .run_until_caught_up()
        .await
        .unwrap();
    // Three records take 90 ms, and a fourth would exceed 100 ms. The first commit only sets the
    // position.
    assert_eq!(
        (report.handled, report.commits),
        (RECORDS, 1 + RECORDS.div_ceil(3)),
        "{report}"
    );
    assert_eq!(backend.counts(&shipping(), RECORDS).await, [1; RECORDS as usize]);

    let other = ConsumerId::new("other").unwrap();
    let report = Consumer::essentially_once(other, backend.log(), backend.store(), slow())
        .batch_time_limit(Duration::from_secs(1))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.commits), (RECORDS, 2), "{report}");
}

/// A batch that ends at its limit and then commits would exceed it.
#[tokio::test(start_paused = true)]
async fn the_time_limit_of_a_batch_includes_its_commit() {
    let backend = Backend::new(24, Script::default()).await;
    let handler = handler_fn(|_: &Record, tx: &mut ScriptedTx| {
        tx.commit_time = Duration::from_millis(40);
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            Ok(())
        })
    });
    let started = tokio::time::Instant::now();
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .run_until_caught_up()
        .await
        .unwrap();
    // Nine records before a commit was timed, and then five at a time.
    assert_eq!((report.handled, report.commits), (24, 1 + 4), "{report}");
    assert_eq!(started.elapsed(), Duration::from_millis(24 * 10 + 4 * 40));
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_exceeds_its_time_limit_has_failed() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let handler = handler_fn(|record: &Record, tx: &mut ScriptedTx| {
        Box::pin(async move {
            support::count_one(tx, &record.payload).await?;
            if record.offset == Offset::from(7) {
                std::future::pending::<()>().await;
            }
            Ok(())
        })
    });
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .record_time_limit(Duration::from_secs(5))
        .retries(2)
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("time limit of 5s"), "{error}");
    assert!(
        matches!(error, Error::Unhandled { offset, attempts: 3, .. } if offset == 7.into()),
        "{error}"
    );
    assert_eq!(backend.position(&shipping()).await.unwrap().next, 7.into());
}

#[tokio::test(start_paused = true)]
async fn records_that_were_deleted_one_by_one_are_not_waited_for() {
    for deleted in [1, 5, RECORDS] {
        let backend = Backend::new(RECORDS, Script::default()).await;
        backend.deleted.store(deleted, Ordering::SeqCst);
        let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter());
        let report = tokio::time::timeout(Duration::from_secs(60), run.run_until_caught_up());
        assert_eq!(
            report.await.expect("it still waits").unwrap().handled,
            RECORDS - deleted
        );
    }
}

#[tokio::test(start_paused = true)]
async fn records_that_are_deleted_during_the_run_are_not_waited_for_either() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let deleted = Arc::clone(&backend.deleted);
    let handler = handler_fn(move |_: &Record, _: &mut ScriptedTx| {
        deleted.store(3, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    });
    let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .max_batch(1)
        .read_ahead_records(2)
        .read_ahead_bytes(1_000);
    let report = tokio::time::timeout(Duration::from_secs(60), run.run_until_caught_up());
    assert_eq!(report.await.expect("it still waits").unwrap().handled, RECORDS - 3);
}

#[tokio::test]
async fn a_new_consumer_that_retention_overtakes_begins_again_at_the_earliest_record() {
    for (step, nth) in [(Step::Read, 0), (Step::Next, 0)] {
        let backend = Backend::new(RECORDS, Script::default().fail(step, nth, Fault::Truncated)).await;
        let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
            .min_backoff(Duration::ZERO)
            .max_backoff(Duration::ZERO)
            .run_until_caught_up()
            .await
            .unwrap();
        assert_eq!(report.handled, RECORDS, "{step:?}");
        backend.script.assert_all_struck();
    }
}

#[tokio::test]
async fn a_commit_whose_reply_was_lost_counts_as_progress_and_as_handled() {
    let mut script = Script::default();
    for nth in 1..=RECORDS {
        script = script.fail(Step::Commit, nth, Fault::After);
    }
    let backend = Backend::new(RECORDS, script).await;
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .max_batch(1)
        .restart_limit(1)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .run_until_caught_up()
        .await
        .unwrap();
    backend.script.assert_all_struck();
    assert_eq!((report.handled, report.commits), (RECORDS, 1 + RECORDS), "{report}");
}

#[tokio::test]
async fn a_fatal_error_ends_the_run_at_its_first_call_even_if_another_instance_was_first() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let (log, store) = (backend.memory_log(), backend.memory.store());
    let calls = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = Arc::clone(&calls);
    let handler = handler_fn(move |record: &Record, _: &mut ScriptedTx| {
        counted.fetch_add(1, Ordering::SeqCst);
        let (log, store) = (log.clone(), store.clone());
        let behind = record.offset.successor();
        Box::pin(async move {
            seek(&shipping(), &log, &store, StartAt::Offset(behind), &ann()).await?;
            Err(HandlerError::fatal("the disk is gone"))
        })
    });
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("the disk is gone"), "{error}");
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_fatal_error_ends_at_least_once_too_although_what_was_before_it_cannot_be_committed() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let (log, store) = (backend.memory_log(), backend.memory.store());
    let calls = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = Arc::clone(&calls);
    let handler = handler_fn(move |record: &Record, (): &mut ()| {
        let (log, store) = (log.clone(), store.clone());
        let is_first = record.offset == Offset::ZERO;
        counted.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            if is_first {
                return Ok(());
            }
            seek(&shipping(), &log, &store, StartAt::Offset(5.into()), &ann()).await?;
            Err(HandlerError::fatal("the disk is gone"))
        })
    });
    let error = Consumer::at_least_once(shipping(), backend.log(), backend.store(), handler)
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("the disk is gone"), "{error}");
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn without_retries_a_record_that_failed_behind_others_is_tried_alone_once() {
    let backend = Backend::new(RECORDS, Script::default().fail(Step::Handle, 3, Fault::Permanent)).await;
    let handler = backend.counter();
    let handled = Arc::clone(&handler.in_memory);
    Consumer::at_least_once(shipping(), backend.log(), backend.store(), InMemory(handler))
        .retries(0)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(handled.lock().unwrap().len() as u64, RECORDS);
    assert!(backend.memory.store().position(&shipping()).await.unwrap().is_some());
}
