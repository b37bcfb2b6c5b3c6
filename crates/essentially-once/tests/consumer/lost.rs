//! Positions that vanish or go back, and logs that are not the ones that were read.

use essentially_once::{Report, memory::MemoryLog};

use super::*;

/// Fails the second commit for a moment, and shows `fault` when the consumer then asks for its position.
async fn run_with(fault: Fault, start_at: StartAt) -> (Backend, Result<Report, Error>) {
    let script = Script::default()
        .fail(Step::Commit, 2, Fault::Before)
        .fail(Step::Position, 1, fault);
    let backend = Backend::new(RECORDS, script).await;
    let result = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .max_batch(5)
        .start_at(start_at)
        .backoff(Duration::ZERO, Duration::ZERO)
        .run_until_caught_up()
        .await;
    backend.script.assert_all_struck();
    (backend, result)
}

#[tokio::test]
async fn a_position_that_vanishes_or_goes_back_under_a_running_consumer_stops_it() {
    for fault in [Fault::Gone, Fault::WentBack] {
        let (backend, result) = run_with(fault, StartAt::Earliest).await;
        let error = result.unwrap_err();
        assert!(matches!(error, Error::PositionLost { .. }), "{fault:?}: {error}");
        assert!(error.to_string().contains("start the consumer again"), "{error}");
        let counts = backend.counts(&shipping(), RECORDS).await;
        assert_eq!(
            counts,
            [[1; 5].as_slice(), &[0; 7]].concat(),
            "{fault:?}: nothing counts twice"
        );
    }
}

#[tokio::test]
async fn a_new_run_goes_on_from_what_is_stored() {
    let (backend, _) = run_with(Fault::Gone, StartAt::Earliest).await;
    let report = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter())
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.rewound), (RECORDS - 5, 0));
}

#[tokio::test]
async fn log_and_store_that_went_back_together_go_on_with_a_count() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    log.append(&[NewRecord::new("0"), NewRecord::new("1")]).await.unwrap();
    let script = Script::default()
        .fail(Step::Commit, 2, Fault::Before)
        .fail(Step::Position, 1, Fault::WentBack);
    let backend = Backend::of(memory, script);
    // The log that fails over: from its second session on it is one that has lost everything.
    let lost = Memory::new().log("orders").unwrap();
    let stop = CancellationToken::new();
    let failing_over = FailsOver {
        before: backend.log(),
        after: lost,
        script: backend.script.clone(),
    };
    let running = Consumer::essentially_once(shipping(), failing_over, backend.store(), backend.counter())
        .accept_volatile()
        .max_batch(1)
        .backoff(Duration::ZERO, Duration::ZERO)
        .run_until(stop.clone());
    let stopping = async {
        while backend.script.taken(Step::Position) < 2 {
            tokio::task::yield_now().await;
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        stop.cancel();
    };
    let (report, ()) = tokio::join!(running, stopping);
    let report = report.unwrap();
    assert_eq!((report.rewound, report.next), (1, Some(Offset::ZERO)), "{report}");
}

struct FailsOver {
    before: support::ScriptedLog,
    after: MemoryLog,
    script: Script,
}

impl FailsOver {
    fn current(&self) -> &dyn Log {
        match self.script.taken(Step::Position) {
            0 | 1 => &self.before,
            _ => &self.after,
        }
    }
}

#[essentially_once::async_trait]
impl Log for FailsOver {
    fn id(&self) -> &essentially_once::LogId {
        self.before.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.current().append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn essentially_once::LogReader>, Error> {
        self.current().read(from).await
    }

    async fn bounds(&self) -> Result<essentially_once::Bounds, Error> {
        self.current().bounds().await
    }

    async fn durability(&self) -> Result<essentially_once::Durability, Error> {
        self.current().durability().await
    }
}

/// The bug report that this answers: a log restored from an older copy had grown past the consumer's position, and the records
/// between were never handled.
#[tokio::test]
async fn a_log_restored_from_an_older_copy_that_has_grown_again_is_noticed() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let consume = |log: MemoryLog| {
        Consumer::essentially_once(shipping(), log, backend.store(), backend.counter())
            .accept_volatile()
            .run_until_caught_up()
    };
    assert_eq!(consume(backend.memory_log()).await.unwrap().handled, RECORDS);
    let restored = Memory::new().log("orders").unwrap();
    let records: Vec<NewRecord> = (0..RECORDS + 5).map(|n| NewRecord::new(format!("new {n}"))).collect();
    restored.append(&records).await.unwrap();
    let error = consume(restored.clone()).await.unwrap_err();
    assert!(
        matches!(error, Error::LogChanged { offset, .. } if offset == (RECORDS - 1).into()),
        "{error}"
    );
    let seek_to = StartAt::Offset(5.into());
    seek(&restored, &backend.memory.store(), &shipping(), seek_to)
        .await
        .unwrap();
    assert_eq!(consume(restored).await.unwrap().handled, RECORDS);
}
