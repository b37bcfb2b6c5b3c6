//! A fault at each step of the loop, under each delivery.

use super::*;

const STEPS: [Step; 7] = [
    Step::Bounds,
    Step::Read,
    Step::Next,
    Step::Position,
    Step::Begin,
    Step::Handle,
    Step::Commit,
];

/// Runs essentially-once in batches of 5 with this script, and checks that every record was counted
/// once.
async fn every_record_counts_once(script: Script) -> essentially_once::consumer::Report {
    let backend = Backend::new(RECORDS, script).await;
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .max_batch(5)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
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
                // The reader may have failed behind the last record that the run waited for.
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
            .start_at(StartAt::Offset(Offset::ZERO))
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
async fn retention_that_overtakes_a_consumer_is_reported_and_seek_goes_on() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let consumer = |backend: &Backend| {
        Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter()).run_until_caught_up()
    };
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
    let error = consumer(&backend).await.unwrap_err();
    assert!(
        matches!(error, Error::Truncated { requested, earliest, .. }
        if (requested, earliest) == (2.into(), 6.into())),
        "{error}"
    );
    seek(&shipping(), &backend.log(), &backend.store(), StartAt::Earliest, &ann())
        .await
        .unwrap();
    assert_eq!(consumer(&backend).await.unwrap().handled, 6);

    let past = seek(
        &shipping(),
        &backend.log(),
        &backend.store(),
        StartAt::Offset(13.into()),
        &ann(),
    )
    .await
    .unwrap_err();
    assert!(matches!(past, Error::OutOfRange { .. }), "{past}");
}

#[tokio::test]
async fn a_position_of_another_log_is_refused() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let other = backend.memory.log("invoices").unwrap();
    seek(&shipping(), &other, &backend.memory.store(), StartAt::Earliest, &ann())
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
    let error = seek(&shipping(), &backend.log(), &backend.store(), StartAt::Earliest, &ann())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::WrongLog { .. }), "{error}");
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
            .min_backoff(Duration::ZERO)
            .max_backoff(Duration::ZERO)
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
async fn at_most_once_doubles_nothing_and_reports_skipped_records() {
    for (step, nth, fault, failed) in [
        (Step::Handle, 3, Fault::Permanent, 1),
        (Step::Handle, 3, Fault::Panic, 1),
        (Step::Commit, 2, Fault::Before, 0),
        (Step::Commit, 2, Fault::After, 5),
    ] {
        let backend = Backend::new(RECORDS, Script::default().fail(step, nth, fault)).await;
        let handler = backend.counter();
        let handled = Arc::clone(&handler.in_memory);
        let report = Consumer::at_most_once(shipping(), backend.log(), backend.store(), InMemory(handler))
            .max_batch(5)
            .min_backoff(Duration::ZERO)
            .max_backoff(Duration::ZERO)
            .run_until_caught_up()
            .await
            .unwrap();
        backend.script.assert_all_struck();
        let mut handled = handled.lock().unwrap().clone();
        let all = handled.len() as u64;
        handled.sort();
        handled.dedup();
        assert_eq!(handled.len() as u64, all, "doubled");
        assert_eq!(RECORDS - all, failed, "{step:?} {fault:?}");
        assert_eq!((report.handled, report.failed), (all, failed), "{step:?} {fault:?}");
    }
}

/// A store in which one commit gets no answer, and arrives just before the next one.
#[derive(Clone)]
struct LateStore {
    inner: essentially_once::memory::MemoryStore,
    commits: Arc<std::sync::atomic::AtomicU64>,
    late: Arc<std::sync::Mutex<Option<(MemoryTx, essentially_once::backend::Advance)>>>,
}

struct LateTx {
    inner: MemoryTx,
    store: LateStore,
}

#[essentially_once::async_trait]
impl OffsetStore for LateStore {
    type Tx = LateTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<essentially_once::backend::Position>, Error> {
        self.inner.position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<LateTx, Error> {
        Ok(LateTx {
            inner: self.inner.begin(consumer).await?,
            store: self.clone(),
        })
    }

    async fn durability(&self) -> Result<essentially_once::backend::Durability, Error> {
        Ok(essentially_once::backend::Durability::Durable)
    }
}

#[essentially_once::async_trait]
impl essentially_once::backend::Transaction for LateTx {
    async fn commit(self, advance: essentially_once::backend::Advance) -> Result<(), Error> {
        let late = self.store.late.lock().unwrap().take();
        if let Some((tx, advance)) = late {
            tx.commit(advance).await?;
        }
        // The first commit only sets the position.
        if self.store.commits.fetch_add(1, Ordering::SeqCst) == 1 {
            *self.store.late.lock().unwrap() = Some((self.inner, advance));
            return Err(Error::indeterminate("commit", "no answer"));
        }
        self.inner.commit(advance).await
    }

    async fn rollback(self) -> Result<(), Error> {
        self.inner.rollback().await
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_late_commit_passed_over_is_counted_when_it_arrives() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let store = LateStore {
        inner: backend.memory.store(),
        commits: Arc::default(),
        late: Arc::default(),
    };
    let handler = handler_fn(|_: &Record, (): &mut ()| Box::pin(async { Ok(()) }));
    let report = Consumer::at_most_once(shipping(), backend.log(), store, handler)
        .max_batch(5)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.failed), (RECORDS - 5, 5), "{report}");
}
