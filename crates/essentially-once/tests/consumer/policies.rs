//! What follows the last try of a record: the end of the run, or going past the record; and what
//! follows the loss of records to retention.

use std::sync::{Mutex, atomic::AtomicU64};

use essentially_once::{
    Epoch, Origin,
    consumer::{FailedRecord, HandlerErrorKind, OnFailure, OnTruncated, Report},
};
use support::ScriptedStore;

use super::*;

/// The counts of all records if `skipped` had no effect.
fn all_but(skipped: &[u64]) -> Vec<u64> {
    (0..RECORDS).map(|n| u64::from(!skipped.contains(&n))).collect()
}

fn skipping<H: Handler<ScriptedTx>>(
    backend: &Backend,
    handler: H,
) -> Consumer<ScriptedStore, H, essentially_once::consumer::EssentiallyOnce> {
    Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .max_batch(5)
        .retries(2)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .on_failure(OnFailure::Skip)
}

#[tokio::test]
async fn rejected_records_are_skipped_and_all_others_handled_once() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let mut handler = backend.counter();
    handler.poison = vec!["0", "3", "4", "9", "11"];
    let report = skipping(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.failed), (RECORDS - 5, 5), "{report}");
    assert_eq!(backend.counts(&shipping(), RECORDS).await, all_but(&[0, 3, 4, 9, 11]));
    assert_eq!(backend.position(&shipping()).await.unwrap().next, RECORDS.into());
}

#[tokio::test]
async fn a_record_is_skipped_after_its_retries() {
    let mut script = Script::default();
    // The record fails as the third in its batch, then alone until no retry is left.
    for nth in [2, 5, 6] {
        script = script.fail(Step::Handle, nth, Fault::Permanent);
    }
    let backend = Backend::new(RECORDS, script).await;
    let report = skipping(&backend, backend.counter())
        .run_until_caught_up()
        .await
        .unwrap();
    backend.script.assert_all_struck();
    assert_eq!((report.failed, report.failed_tries), (1, 3), "{report}");
    assert_eq!(backend.counts(&shipping(), RECORDS).await, all_but(&[2]));
}

#[tokio::test]
async fn at_least_once_skips_without_handling_the_records_before_again() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let mut handler = backend.counter();
    handler.poison = vec!["3", "11"];
    let handled = Arc::clone(&handler.in_memory);
    let report = Consumer::at_least_once(shipping(), backend.log(), backend.store(), InMemory(handler))
        .on_failure(OnFailure::Skip)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.failed), (RECORDS - 2, 2), "{report}");
    let expected: Vec<_> = (0..RECORDS)
        .filter(|n| ![3, 11].contains(n))
        .map(|n| n.to_string())
        .collect();
    assert_eq!(*handled.lock().unwrap(), expected);
}

#[tokio::test]
async fn a_malformed_record_is_skipped_and_marks_nothing() {
    let web = |sequence| Origin::new(ProducerId::new("web").unwrap(), Epoch::STABLE, sequence);
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    let records = [0, 1].map(|n| NewRecord::new(n.to_string()).origin(web(n)));
    log.append(&records).await.unwrap();
    let mut backend = Backend::of(memory, Script::default());
    backend.malformed = Some(0.into());
    let report = skipping(&backend, backend.counter())
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.failed), (1, 1), "{report}");
    // Sent again intact, it counts as another record. The skipped record itself does not.
    log.append(&records).await.unwrap();
    let report = skipping(&backend, backend.counter())
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.duplicates), (1, 1), "{report}");
    assert_eq!(backend.counts(&shipping(), 2).await, [1, 1]);
}

#[tokio::test]
async fn a_record_that_was_skipped_is_dropped_if_it_is_sent_again() {
    let poison = NewRecord::new("7").origin(Origin::new(ProducerId::new("web").unwrap(), Epoch::STABLE, 7));
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    log.append(&[poison.clone(), poison]).await.unwrap();
    let backend = Backend::of(memory, Script::default());
    let mut handler = backend.counter();
    handler.poison = vec!["7"];
    let report = skipping(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!(
        (report.failed, report.duplicates, report.failed_tries),
        (1, 1, 1),
        "{report}"
    );
}

#[tokio::test]
async fn a_rule_sees_record_error_and_tries_and_may_stop() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let rule = move |failed: &FailedRecord<'_>| {
        let payload = String::from_utf8_lossy(&failed.record.payload).into_owned();
        let is_number = failed.error.cause().is::<std::num::ParseIntError>();
        noted
            .lock()
            .unwrap()
            .push((payload, failed.error.kind(), is_number, failed.tries));
        match failed.error.kind() {
            HandlerErrorKind::Reject => OnFailure::Skip,
            _ => OnFailure::Stop,
        }
    };
    let handler = handler_fn(|record: &Record, _: &mut ScriptedTx| {
        Box::pin(async move {
            match &record.payload[..] {
                b"2" => Err(HandlerError::reject("x".parse::<u64>().unwrap_err())),
                b"4" => Err(HandlerError::retry("again")),
                _ => Ok(()),
            }
        })
    });
    let run = skipping(&backend, handler).on_failure_with(rule);
    let error = run.run_until_caught_up().await.unwrap_err();
    assert!(
        matches!(error, Error::Unhandled { offset, attempts: 3, .. } if offset == 4.into()),
        "{error}"
    );
    let expected = [
        ("2".to_owned(), HandlerErrorKind::Reject, true, 1),
        ("4".to_owned(), HandlerErrorKind::Retry, false, 3),
    ];
    assert_eq!(*seen.lock().unwrap(), expected);
}

#[tokio::test]
async fn a_rule_that_panics_stops_the_run() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let mut handler = backend.counter();
    handler.poison = vec!["3"];
    let run = skipping(&backend, handler).on_failure_with(|_| panic!("scripted"));
    let error = run.run_until_caught_up().await.unwrap_err();
    assert!(
        matches!(error, Error::Unhandled { offset, .. } if offset == 3.into()),
        "{error}"
    );
}

#[tokio::test]
async fn a_fatal_error_is_never_skipped() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let mut handler = backend.counter();
    handler.fatal = vec!["3"];
    let error = skipping(&backend, handler).run_until_caught_up().await.unwrap_err();
    assert!(error.to_string().contains("fatal"), "{error}");
    assert_eq!(backend.counts(&shipping(), RECORDS).await, [0; RECORDS as usize]);
}

/// The record succeeds at its second try. In the meantime, something else commits.
struct SucceedsAfterAMove {
    backend: Arc<Backend>,
    calls: Arc<AtomicU64>,
}

#[essentially_once::async_trait]
impl Handler<ScriptedTx> for SucceedsAfterAMove {
    async fn handle(&mut self, record: &Record, tx: &mut ScriptedTx) -> Result<(), HandlerError> {
        if record.payload == "0" && self.calls.fetch_add(1, Ordering::SeqCst) == 0 {
            return Err(HandlerError::reject("not yet"));
        }
        support::count_one(tx, &record.payload).await?;
        Ok(())
    }

    async fn reset(&mut self) {
        let Backend { memory, .. } = &*self.backend;
        seek(
            &shipping(),
            &memory.log("orders").unwrap(),
            &memory.store(),
            StartAt::Earliest,
            &ann(),
        )
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn a_verdict_does_not_count_if_another_instance_commits_before_it_is_carried_out() {
    let backend = Arc::new(Backend::new(RECORDS, Script::default()).await);
    let handler = SucceedsAfterAMove {
        backend: Arc::clone(&backend),
        calls: Arc::default(),
    };
    let report = skipping(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.failed), (RECORDS, 0), "{report}");
    assert_eq!(backend.counts(&shipping(), RECORDS).await, all_but(&[]));
}

/// Runs with one poison record and this script. Checks that it was skipped and counted once, and
/// that every other record took effect once.
async fn poison_is_skipped_once(script: Script) -> Report {
    let backend = Backend::new(RECORDS, script).await;
    let mut handler = backend.counter();
    handler.poison = vec!["7"];
    let report = skipping(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!(report.failed, 1, "{report}");
    assert_eq!(backend.counts(&shipping(), RECORDS).await, all_but(&[7]));
    assert_eq!(backend.position(&shipping()).await.unwrap().next, RECORDS.into());
    backend.script.assert_all_struck();
    report
}

#[tokio::test]
async fn a_fault_at_any_step_neither_saves_nor_doubles_a_skipped_record() {
    let clean = Script::default();
    poison_is_skipped_once(clean.clone()).await;
    let mut plans = 0;
    for step in [Step::Read, Step::Position, Step::Begin, Step::Handle, Step::Commit] {
        for nth in 0..clean.taken(step) {
            for fault in [Fault::Before, Fault::After] {
                poison_is_skipped_once(Script::default().fail(step, nth, fault)).await;
                plans += 1;
            }
        }
    }
    assert!(plans > 50, "only {plans} plans were run");
}

#[tokio::test]
async fn a_batch_that_fails_as_a_whole_loses_only_its_culprit() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let handler = handler_fn(|record: &Record, tx: &mut ScriptedTx| {
        Box::pin(async move {
            support::count_one(tx, &record.payload).await?;
            tx.refuse_commit |= record.payload == "7";
            Ok(())
        })
    });
    let report = skipping(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.failed), (RECORDS - 1, 1), "{report}");
    assert_eq!(backend.counts(&shipping(), RECORDS).await, all_but(&[7]));
}

#[tokio::test]
async fn a_consumer_that_retention_overtook_skips_to_the_earliest_record_and_says_how_far() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    seek(
        &shipping(),
        &backend.log(),
        &backend.store(),
        StartAt::Offset(2.into()),
        &ann(),
    )
    .await
    .unwrap();
    backend.memory_log().truncate(6.into());
    let report = skipping(&backend, backend.counter())
        .on_truncated(OnTruncated::SkipToEarliest)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.truncated), (RECORDS - 6, 1), "{report}");
    assert_eq!(report.skipped_to_earliest, Some((2.into(), 6.into())));
    assert!(report.to_string().contains("last from 2 to 6"), "{report}");
}

#[tokio::test]
async fn a_running_consumer_that_retention_overtakes_skips_to_the_earliest_record() {
    let backend = Arc::new(Backend::new(RECORDS, Script::default()).await);
    let overtaking = Arc::clone(&backend);
    let handler = handler_fn(move |record: &Record, tx: &mut ScriptedTx| {
        let overtaking = Arc::clone(&overtaking);
        Box::pin(async move {
            if record.offset == 1.into() {
                overtaking.memory_log().truncate(9.into());
            }
            support::count_one(tx, &record.payload).await?;
            Ok(())
        })
    });
    let report = skipping(&backend, handler)
        .max_batch(1)
        .read_ahead_records(1)
        .on_truncated(OnTruncated::SkipToEarliest)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(report.truncated, 1, "{report}");
    let (from, to) = report.skipped_to_earliest.unwrap();
    assert!(to == 9.into() && (2..9).any(|n| from == n.into()), "{report}");
    let counts = backend.counts(&shipping(), RECORDS).await;
    assert_eq!(counts.iter().sum::<u64>(), report.handled, "{counts:?}");
    assert_eq!(counts[9..], [1, 1, 1]);
}
