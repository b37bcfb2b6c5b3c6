//! What a consumer reports to the process's metrics recorder. Has its own test binary, since the
//! recorder is global.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "tests, with a support module that each uses in part"
)]

mod support;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, HandlerError, Log, NewRecord, Record, StartAt,
    consumer::{OnFailure, OnTruncated, Operator},
    handler_fn,
    memory::{Memory, MemoryTx},
    seek,
};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_util::registry::{AtomicStorage, Registry};
use support::{Backend, Fault, Script, Step};

/// Keeps the values. The debugging recorder of `metrics-util` resets gauges to zero at each read.
#[derive(Clone)]
struct Kept {
    registry: Arc<Registry<Key, AtomicStorage>>,
    described: Arc<Mutex<HashSet<String>>>,
}

impl Kept {
    fn describe(&self, name: &KeyName, unit: Option<Unit>) {
        assert!(unit.is_some(), "{name:?} has no unit");
        self.described.lock().unwrap().insert(name.as_str().to_owned());
    }

    /// The values of one consumer's metrics by name. For histograms, the number of samples.
    fn of(&self, consumer: &str) -> HashMap<String, f64> {
        let mut values = HashMap::new();
        let mut keep = |key: &Key, value: f64| {
            let labels: HashMap<_, _> = key.labels().map(|label| (label.key(), label.value())).collect();
            assert_eq!(labels["delivery"], "essentially-once");
            assert!(self.described.lock().unwrap().contains(key.name()), "{}", key.name());
            if labels["consumer"] == consumer {
                let name = key.name().strip_prefix("essentially_once_").unwrap();
                values.insert(name.to_owned(), value);
            }
        };
        self.registry
            .visit_counters(|key, counter| keep(key, counter.load(Ordering::SeqCst) as f64));
        self.registry
            .visit_gauges(|key, gauge| keep(key, f64::from_bits(gauge.load(Ordering::SeqCst))));
        self.registry
            .visit_histograms(|key, histogram| keep(key, histogram.data().len() as f64));
        values
    }
}

impl Recorder for Kept {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.describe(&name, unit);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.describe(&name, unit);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.describe(&name, unit);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.registry
            .get_or_create_counter(key, |counter| Counter::from_arc(Arc::clone(counter)))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.registry
            .get_or_create_gauge(key, |gauge| Gauge::from_arc(Arc::clone(gauge)))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.registry
            .get_or_create_histogram(key, |histogram| Histogram::from_arc(Arc::clone(histogram)))
    }
}

#[tokio::test]
async fn counters_agree_with_the_report_and_the_states_of_a_consumer_can_be_told_apart() {
    let kept = Kept {
        registry: Arc::new(Registry::atomic()),
        described: Arc::default(),
    };
    metrics::set_global_recorder(kept.clone()).unwrap();
    counters_agree_with_the_report(&kept).await;
    counters_agree_with_policies(&kept).await;
    states_can_be_told_apart(&kept).await;
    a_record_without_a_time_gives_no_lag(&kept).await;
}

async fn counters_agree_with_the_report(kept: &Kept) {
    let script = Script::default()
        .fail(Step::Commit, 2, Fault::Overtaken)
        .fail(Step::Begin, 4, Fault::Before)
        .fail(Step::Handle, 7, Fault::Permanent);
    let backend = Backend::new(12, script).await;
    let shipping = ConsumerId::new("shipping").unwrap();
    let report = Consumer::essentially_once(shipping, backend.log(), backend.store(), backend.counter())
        .max_batch(5)
        .run_until_caught_up()
        .await
        .unwrap();
    backend.script.assert_all_struck();
    let values = kept.of("shipping");
    for (name, expected) in [
        ("handled_total", report.handled),
        ("duplicates_total", 0),
        ("failed_total", 0),
        ("failed_tries_total", 1),
        ("commits_total", report.commits),
        ("fenced_total", 1),
        ("restarts_total", 3),
        ("commit_seconds", report.commits),
        // The first commit only sets the position.
        ("lag_seconds", report.commits - 1),
        ("running", 0),
    ] {
        assert_eq!(values[name], expected as f64, "{name}: {report}");
    }
}

async fn counters_agree_with_policies(kept: &Kept) {
    let backend = Backend::new(12, Script::default()).await;
    let policies = ConsumerId::new("policies").unwrap();
    seek(
        &policies,
        &backend.log(),
        &backend.store(),
        StartAt::Earliest,
        &Operator::new("ann"),
    )
    .await
    .unwrap();
    backend.memory_log().truncate(2.into());
    let mut handler = backend.counter();
    handler.poison = vec!["7"];
    let report = Consumer::essentially_once(policies, backend.log(), backend.store(), handler)
        .on_failure(OnFailure::Skip)
        .on_truncated(OnTruncated::SkipToEarliest)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.failed, report.truncated), (1, 1), "{report}");
    let values = kept.of("policies");
    for name in ["failed_total", "truncated_total"] {
        assert_eq!(values[name], 1.0, "{name}");
    }
}

/// A handler that succeeds, fails or hangs, depending on the payload.
fn obedient() -> impl essentially_once::Handler<MemoryTx> {
    handler_fn(|record: &Record, _: &mut MemoryTx| {
        Box::pin(async move {
            match &*record.payload {
                b"fail" => Err(HandlerError::retry("scripted")),
                b"hang" => std::future::pending().await,
                _ => Ok(()),
            }
        })
    })
}

async fn states_can_be_told_apart(kept: &Kept) {
    let mut states = HashMap::new();
    for (state, payload) in [
        ("idle", "ok"),
        ("failing", "fail"),
        ("hung", "hang"),
        ("standby", "ok"),
        ("stopped", "ok"),
    ] {
        let memory = Memory::new();
        let log = memory.log("orders").unwrap();
        log.append(&[NewRecord::new("ok")]).await.unwrap();
        let stop = CancellationToken::new();
        let start = |name: &str| {
            let consumer = ConsumerId::new(name).unwrap();
            let run = Consumer::essentially_once(consumer, log.clone(), memory.store(), obedient())
                .accept_volatile()
                .min_backoff(Duration::from_millis(1))
                .max_backoff(Duration::from_millis(1))
                .retries(u32::MAX);
            tokio::spawn(run.run_until(stop.clone()))
        };
        let mut first = None;
        if state == "standby" {
            // Both instances share the consumer's labels, so the active one must have reported
            // first.
            first = Some(start(state));
            wait_for(|| kept.of(state).get("handled_total") == Some(&1.0)).await;
        }
        let run = start(state);
        if state != "standby" {
            wait_for(|| kept.of(state).get("handled_total") == Some(&1.0)).await;
        }
        log.append(&[NewRecord::new(payload)]).await.unwrap();
        let mut seen = HashMap::new();
        let mut failed_tries = 0.0;
        wait_for(|| {
            seen = kept.of(state);
            failed_tries = seen["failed_tries_total"];
            match state {
                "hung" => seen["oldest_waiting_timestamp_seconds"] > 0.0,
                "failing" => failed_tries > 2.0,
                "standby" => seen["standby"] == 1.0 && seen["oldest_waiting_timestamp_seconds"] == 0.0,
                _ => seen["oldest_waiting_timestamp_seconds"] == 0.0,
            }
        })
        .await;
        if state == "stopped" {
            stop.cancel();
            run.await.unwrap().unwrap();
            seen = kept.of(state);
        } else {
            run.abort();
        }
        if let Some(first) = first {
            first.abort();
        }
        assert!(seen["last_commit_timestamp_seconds"] > 1e9, "{state}");
        let waits = seen["oldest_waiting_timestamp_seconds"] > 0.0;
        states.insert(
            state,
            (seen["running"] > 0.0, seen["standby"] > 0.0, waits, failed_tries > 0.0),
        );
    }
    assert_eq!(states["idle"], (true, false, false, false));
    assert_eq!(states["hung"], (true, false, true, false));
    assert_eq!(states["failing"], (true, false, true, true));
    assert_eq!(states["standby"], (true, true, false, false));
    assert_eq!(states["stopped"], (false, false, false, false));
}

async fn a_record_without_a_time_gives_no_lag(kept: &Kept) {
    let mut record = Record::new(0.into(), std::time::UNIX_EPOCH, "no time");
    record.key = None;
    let log = support::OneRecord(record);
    let timeless = ConsumerId::new("timeless").unwrap();
    let report = Consumer::essentially_once(timeless, log, Memory::new().store(), obedient())
        .accept_volatile()
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(report.handled, 1);
    assert_eq!(kept.of("timeless")["lag_seconds"], 0.0);
}

async fn wait_for(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait)
        .await
        .expect("the condition holds within 60 s");
}
