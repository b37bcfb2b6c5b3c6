//! Records that cannot be handled: retried, rejected, fatal, malformed.

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
