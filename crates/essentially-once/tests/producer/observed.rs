//! Metrics and warnings.

use std::{
    collections::HashMap,
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_util::registry::{AtomicStorage, Registry};
use tracing::{Event, Level, Subscriber, field::Visit, span};

use super::*;

struct Kept(Registry<Key, AtomicStorage>);

impl Kept {
    /// Counters and gauges of the producer by name.
    fn values(&self) -> HashMap<String, f64> {
        let mut values = HashMap::new();
        let mut keep = |key: &Key, value: f64| {
            let labels: Vec<_> = key.labels().map(|label| (label.key(), label.value())).collect();
            assert_eq!(labels, [("producer", "web"), ("log", "orders")]);
            let name = key.name().strip_prefix("essentially_once_producer_").unwrap();
            values.insert(name.to_owned(), value);
        };
        self.0
            .visit_counters(|key, counter| keep(key, counter.load(Ordering::SeqCst) as f64));
        self.0
            .visit_gauges(|key, gauge| keep(key, f64::from_bits(gauge.load(Ordering::SeqCst))));
        values
    }
}

impl Recorder for Kept {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        assert!(unit.is_some(), "{name:?} has no unit");
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        assert!(unit.is_some(), "{name:?} has no unit");
    }

    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
        panic!("{name:?} is no metric of a producer");
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.0
            .get_or_create_counter(key, |counter| Counter::from_arc(Arc::clone(counter)))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.0
            .get_or_create_gauge(key, |gauge| Gauge::from_arc(Arc::clone(gauge)))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        panic!("{key:?} is no metric of a producer");
    }
}

#[tokio::test(start_paused = true)]
async fn metrics_count_what_became_of_the_records() {
    let memory = Memory::new();
    let script = [Act::Obey.held(), Act::Lose(2), Act::Unavailable, Act::Lose(0)];
    let log = Faulty::new(&memory, script);
    let kept = Kept(Registry::atomic());
    let sender = metrics::with_local_recorder(&kept, || producer(&log).start()).unwrap();
    send(&sender, "1").await;
    log.called(1).await;
    for payload in ["2", "bad", "4"] {
        send(&sender, payload).await;
    }
    assert_eq!(kept.values()["waiting"], 4.0, "queued and in flight");
    log.release();
    soon(sender.flush()).await;
    let bad = send(&sender, "bad").await;
    assert_eq!(fate(&soon(bad).await), Fate::Refused);
    soon(sender.close()).await;
    let values = kept.values();
    // Three records three times in a batch, then the refused batch in parts, of which none fails.
    for (name, expected) in [
        ("confirmed_total", 3.0),
        ("failed_total", 1.0),
        ("in_doubt_total", 1.0),
        ("resent_total", 9.0),
        ("waiting", 0.0),
    ] {
        assert_eq!(values[name], expected, "{name}");
    }
    assert_eq!(values.len(), 5);
}

/// Keeps the text of warnings.
#[derive(Clone, Default)]
struct Warnings {
    texts: Arc<Mutex<Vec<String>>>,
    spans: Arc<AtomicU64>,
}

impl Warnings {
    fn of(&self, part: &str) -> Vec<String> {
        let texts = self.texts.lock().unwrap();
        texts.iter().filter(|text| text.contains(part)).cloned().collect()
    }
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        self.0.push_str(&format!("{}={value:?} ", field.name()));
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(self.spans.fetch_add(1, Ordering::SeqCst) + 1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        if *event.metadata().level() == Level::WARN {
            let mut text = Text(String::new());
            event.record(&mut text);
            self.texts.lock().unwrap().push(text.0);
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[tokio::test(start_paused = true)]
async fn dropping_a_producer_with_unconfirmed_records_warns_with_their_number() {
    let warnings = Warnings::default();
    let _subscriber = tracing::subscriber::set_default(warnings.clone());
    for (waits, closes) in [(true, false), (false, false), (true, true)] {
        let memory = Memory::new();
        let log = Faulty::new(&memory, [Act::Obey.held()]);
        let sender = producer(&log).start().unwrap();
        let sent = send_all(&sender, 1, 7).await;
        if !waits || closes {
            log.release();
            soon(sender.close()).await;
        }
        drop(sender.clone());
        drop(sender);
        let dropped = warnings.of("dropped before its records were confirmed");
        warnings.texts.lock().unwrap().clear();
        if waits && !closes {
            assert_eq!(dropped.len(), 1, "{dropped:?}");
            assert!(dropped[0].contains("unconfirmed=7 sequences=7 (1-7)"), "{dropped:?}");
            log.release();
        } else {
            assert_eq!(dropped.len(), 0, "{dropped:?}");
        }
        assert_eq!(fates(sent).await, [Fate::Confirmed; 7]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_nobody_awaits_is_logged_and_one_that_is_awaited_is_not() {
    let warnings = Warnings::default();
    let _subscriber = tracing::subscriber::set_default(warnings.clone());
    let memory = Memory::new();
    let log = Faulty::new(&memory, []);
    let sender = producer(&log).start().unwrap();
    assert_eq!(fate(&soon(send(&sender, "bad").await).await), Fate::Refused);
    assert!(warnings.of("nobody awaits").is_empty());
    send(&sender, "bad").await;
    soon(sender.flush()).await;
    let unheard = warnings.of("nobody awaits");
    assert_eq!(unheard.len(), 1, "{unheard:?}");
    assert!(
        unheard[0].contains("records=1 first_error=append to orders: a bad record"),
        "{unheard:?}"
    );
}

#[tokio::test]
async fn debug_output_shows_no_record() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Obey.held()]);
    let producer = producer(&log);
    let shown = format!("{producer:?}");
    let sender = producer.start().unwrap();
    let sent = send(&sender, "a secret").await;
    let shown = format!("{shown} {sender:?} {sent:?}");
    assert!(!shown.contains("secret") && shown.contains("web"), "{shown}");
}
