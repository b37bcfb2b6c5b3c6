//! What a consumer tells the process's metrics recorder. A test binary of its own, since the recorder is global.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "tests, with a support module that each uses in part"
)]

mod support;

use std::collections::HashMap;

use essentially_once::{Consumer, ConsumerId};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use support::{Backend, Fault, Script, Step};

#[tokio::test]
async fn counters_agree_with_the_report() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().unwrap();
    let script = Script::default()
        .fail(Step::Commit, 2, Fault::Overtaken)
        .fail(Step::Begin, 4, Fault::Before);
    let backend = Backend::new(12, script).await;
    let shipping = ConsumerId::new("shipping").unwrap();
    let report = Consumer::essentially_once(shipping, backend.log(), backend.store(), backend.counter())
        .max_batch(5)
        .run_until_caught_up()
        .await
        .unwrap();
    backend.script.assert_all_struck();

    let mut counters = HashMap::new();
    let mut histograms = HashMap::new();
    for (key, _, _, value) in snapshotter.snapshot().into_vec() {
        let labels: Vec<_> = key.key().labels().map(|label| (label.key(), label.value())).collect();
        assert_eq!(labels, [("consumer", "shipping"), ("delivery", "essentially-once")]);
        let name = key.key().name().to_owned();
        match value {
            DebugValue::Counter(count) => counters.insert(name, count),
            DebugValue::Histogram(values) => histograms.insert(name, values.len() as u64),
            DebugValue::Gauge(_) => panic!("{name} is no gauge"),
        };
    }
    for (name, expected) in [
        ("handled", report.handled),
        ("duplicates", 0),
        ("failed", 0),
        ("commits", report.commits),
        ("fenced", 1),
        ("restarts", 2),
    ] {
        assert_eq!(counters[&format!("essentially_once_{name}_total")], expected, "{name}");
    }
    assert_eq!(histograms["essentially_once_commit_seconds"], report.commits);
    // The first commit only sets the position.
    assert_eq!(histograms["essentially_once_lag_seconds"], report.commits - 1);
}
