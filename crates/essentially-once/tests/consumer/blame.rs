//! Whether a failure is the record's fault or the backend's.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_backend_that_refuses_every_commit_is_to_blame_for_it() {
    let mut script = Script::default();
    for nth in 1..100 {
        script = script.fail(Step::Commit, nth, Fault::Permanent);
    }
    let backend = Backend::new(RECORDS, script).await;
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    assert_eq!(backend.counts(&shipping(), RECORDS).await, [0; RECORDS as usize]);
}

/// Fails a few times with this error, then succeeds.
fn failing(error: impl Fn() -> HandlerError + Send + 'static) -> impl Handler<MemoryTx> {
    let mut failures = 0;
    handler_fn(move |_: &Record, _: &mut MemoryTx| {
        failures += 1;
        let error = (failures < 5).then(&error);
        Box::pin(async move { error.map_or(Ok(()), Err) })
    })
}

async fn run_without_retries(
    handler: impl Handler<MemoryTx> + 'static,
) -> Result<essentially_once::consumer::Report, Error> {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    log.append(&[NewRecord::new("0")]).await.unwrap();
    Consumer::essentially_once(shipping(), log, memory.store(), handler)
        .accept_volatile()
        .retries(0)
        .run_until_caught_up()
        .await
}

#[tokio::test(start_paused = true)]
async fn a_transient_cause_is_found_beneath_errors_of_all_kinds() {
    fn down() -> Error {
        Error::unavailable("get a key", "the server is down")
    }

    #[derive(Debug, thiserror::Error)]
    #[error("cannot ship")]
    struct Wrapped(#[source] Error);

    let causes: [fn() -> HandlerError; 4] = [
        || down().into(),
        || Wrapped(down()).into(),
        || Error::failed("ship", down()).into(),
        || Wrapped(Error::failed("ship", Wrapped(down()))).into(),
    ];
    for cause in causes {
        assert_eq!(run_without_retries(failing(cause)).await.unwrap().handled, 1);
    }
    let error = run_without_retries(failing(|| Error::failed("ship", "no such order").into())).await;
    assert!(matches!(error, Err(Error::Unhandled { .. })), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_record_that_fails_at_its_commit_is_retried_with_growing_pauses() {
    let backend = Backend::new(1, Script::default()).await;
    let handler = handler_fn(|_: &Record, tx: &mut ScriptedTx| {
        tx.refuse_commit = true;
        Box::pin(async { Ok(()) })
    });
    let started = tokio::time::Instant::now();
    let error = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unhandled { .. }), "{error}");
    // 10 ms doubled ten times, with jitter. Empty commits do not count as progress.
    assert!(started.elapsed() > Duration::from_secs(5), "{:?}", started.elapsed());
}
