//! Records that cannot be handled: retried, rejected, fatal, malformed.

use std::sync::Mutex;

use essentially_once::consumer::OnFailure;

use super::*;

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
        // The record fails as the third in its batch. The two before it are then handled once more,
        // and committed.
        for nth in [2].into_iter().chain(5..).take(failures) {
            script = script.fail(Step::Handle, nth, Fault::Permanent);
        }
        let backend = Backend::new(RECORDS, script).await;
        let handler = backend.counter();
        let result = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler.clone())
            .retries(3)
            .min_backoff(Duration::ZERO)
            .max_backoff(Duration::ZERO)
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
    assert!(
        error.to_string().contains("scripted"),
        "the error gives the reason: {error}"
    );
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
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
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

/// Gathers records and writes them at each flush. A store may refuse them, at the flush or at the
/// commit.
struct Gathers {
    gathered: Vec<Record>,
    /// The payload that makes a flush fail, and the payload that makes the commit fail.
    refused: (&'static str, &'static str),
    flushes: Arc<std::sync::atomic::AtomicU64>,
}

#[essentially_once::async_trait]
impl Handler<ScriptedTx> for Gathers {
    async fn handle(&mut self, record: &Record, _: &mut ScriptedTx) -> Result<(), HandlerError> {
        self.gathered.push(record.clone());
        Ok(())
    }

    async fn flush(&mut self, tx: &mut ScriptedTx) -> Result<(), HandlerError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        for record in self.gathered.drain(..) {
            support::count_one(tx, &record.payload).await?;
            if record.payload == self.refused.0 {
                return Err(HandlerError::reject("refused at the flush"));
            }
            tx.refuse_commit |= record.payload == self.refused.1;
        }
        Ok(())
    }

    async fn reset(&mut self) {
        self.gathered.clear();
    }
}

#[tokio::test]
async fn a_batch_that_fails_as_a_whole_is_taken_apart_until_the_culprit_is_known() {
    for refused in [("7", "none"), ("none", "7")] {
        let backend = Backend::new(RECORDS, Script::default()).await;
        let handler = Gathers {
            gathered: Vec::new(),
            refused,
            flushes: Arc::default(),
        };
        let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
            .retries(1)
            .min_backoff(Duration::ZERO)
            .max_backoff(Duration::ZERO)
            .run_until_caught_up()
            .await
            .unwrap_err();
        assert!(
            matches!(error, Error::Unhandled { offset, .. } if offset == 7.into()),
            "{refused:?}: {error}"
        );
        assert!(error.to_string().contains("refused at the"), "{error}");
        let counts = backend.counts(&shipping(), RECORDS).await;
        assert_eq!(counts, [[1; 7].as_slice(), &[0; 5]].concat(), "{refused:?}");
        assert_eq!(backend.position(&shipping()).await.unwrap().next, 7.into());
    }
}

#[tokio::test]
async fn what_was_gathered_is_flushed_once_for_each_commit() {
    let backend = Backend::new(RECORDS, Script::default().fail(Step::Commit, 2, Fault::Before)).await;
    let flushes = Arc::default();
    let handler = Gathers {
        gathered: Vec::new(),
        refused: ("none", "none"),
        flushes: Arc::clone(&flushes),
    };
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .max_batch(5)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .run_until_caught_up()
        .await
        .unwrap();
    backend.script.assert_all_struck();
    assert_eq!(backend.counts(&shipping(), RECORDS).await, [1; RECORDS as usize]);
    // The first commit only sets the position, and one was tried twice.
    assert_eq!(flushes.load(Ordering::SeqCst), report.commits, "{report}");
}

#[tokio::test]
async fn a_wrapped_error_of_the_backend_is_not_the_records_fault() {
    #[derive(Debug, thiserror::Error)]
    #[error("cannot ship")]
    struct Wrapped(#[source] Error);

    let backend = Backend::new(1, Script::default()).await;
    let mut failures = 3;
    let handler = handler_fn(move |_: &Record, _: &mut ScriptedTx| {
        let failing = failures > 0;
        failures -= i32::from(failing);
        Box::pin(async move {
            match failing {
                true => Err(Wrapped(Error::unavailable("get a key", "scripted")).into()),
                false => Ok(()),
            }
        })
    });
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .retries(0)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.restarts), (1, 3));
}

/// Every failure goes back to the stored position. What was read ahead from there is still good.
#[tokio::test]
async fn a_record_that_fails_does_not_make_the_log_be_read_again() {
    let backend = Backend::new(2_000, Script::default()).await;
    let handler = handler_fn(|record: &Record, tx: &mut ScriptedTx| {
        let is_poison = record.offset.lo() % 10 == 7;
        Box::pin(async move {
            support::count_one(tx, &record.payload).await?;
            match is_poison {
                true => Err(HandlerError::reject("poison")),
                false => Ok(()),
            }
        })
    });
    let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .on_failure(OnFailure::Skip)
        .max_batch(50);
    let report = run.run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.failed), (1_800, 200), "{report}");
    assert_eq!(backend.script.taken(Step::Read), 1);
    let expected: Vec<_> = (0..2_000).map(|n| u64::from(n % 10 != 7)).collect();
    assert_eq!(backend.counts(&shipping(), 2_000).await, expected);
}

/// What was read ahead belongs to the position at which the record failed.
#[tokio::test]
async fn a_position_that_moves_while_a_record_fails_is_read_from_there() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let (handled, memory, log) = (
        Arc::new(Mutex::new(Vec::new())),
        backend.memory.clone(),
        backend.memory_log(),
    );
    let seen = Arc::clone(&handled);
    let handler = handler_fn(move |record: &Record, _: &mut ScriptedTx| {
        seen.lock().unwrap().push(record.offset.lo());
        let is_poison = record.offset == 2.into();
        Box::pin(async move {
            match is_poison {
                true => Err(HandlerError::reject("poison")),
                false => Ok(()),
            }
        })
    });
    let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .max_batch(1)
        .on_failure_with(move |_| {
            // An operator is faster than the consumer.
            let (id, store) = (shipping(), memory.store());
            now(seek(&id, &log, &store, StartAt::Offset(9.into()), &ann())).unwrap();
            OnFailure::Skip
        });
    let report = run.run_until_caught_up().await.unwrap();
    assert_eq!((report.next, report.failed), (Some(RECORDS.into()), 0), "{report}");
    assert_eq!(*handled.lock().unwrap(), [0, 1, 2, 9, 10, 11]);
}
