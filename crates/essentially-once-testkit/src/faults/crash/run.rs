//! One run of a crash test: consumers of one plan, and what they left behind.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use essentially_once::{
    Consumer, ConsumerId, Error, KeyValue, OffsetStore, Record, backend::Transaction, consumer::DeadLetterOptions,
    memory::MemoryLog,
};

use super::{
    CrashTest, TxOf,
    findings::Effects,
    probe::{Calls, Instance, Probe},
};
use crate::{
    cases::outbox::found_of,
    faults::{
        FaultyHandler, FaultyLog, FaultyStore,
        control::{Faults, Process, Touched},
        driver::drive,
        explorer::{Outcome, PATIENCE, pauses, within_limit},
        plan::Plan,
        scene::{patiently, tuned},
    },
    harness::{Backend, Harness},
    violation::Violation,
};

/// The name of the log and of the consumer.
pub(super) const NAME: &str = "crash-test";

/// The most dead letters that are compared.
const LETTERS: usize = 100_000;

/// How a run differs from the ordinary.
#[derive(Clone, Copy)]
pub(super) struct Setup {
    pub(super) max_batch: usize,
    /// Whether the consumer sets records aside that cannot be handled.
    pub(super) has_letters: bool,
    /// Whether a rollback makes a new handler.
    pub(super) is_renewed: bool,
    /// The operation before which the other program acts, if there is one.
    pub(super) act_before: usize,
}

pub(super) struct Run<'t, H: Harness> {
    pub(super) test: &'t CrashTest<H>,
    /// All runs read the same records, down to the time of their append.
    pub(super) log: &'t MemoryLog,
    pub(super) setup: Setup,
}

/// What a run left behind.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) effects: Effects,
    pub(super) calls: Calls,
}

/// A run, and what its consumers reported.
pub(super) struct Played {
    pub(super) outcome: Outcome<Seen>,
    pub(super) said: Said,
}

/// What the consumers of a run reported when they ended.
#[derive(Default)]
pub(super) struct Said {
    /// The error of a record that could not be handled and ended a run.
    pub(super) unhandled: Option<String>,
    /// How many records and letters were handled.
    pub(super) handled: u64,
}

/// What the consumers of a run share.
struct Stage<'s, B> {
    backend: &'s B,
    consumer: ConsumerId,
    probe: Probe,
    said: &'s Mutex<Said>,
}

impl<H: Harness> Run<'_, H> {
    pub(super) async fn play(&self, plan: &Plan) -> Played {
        let mut faults = Faults::new(plan.clone()).test_handler();
        if self.setup.has_letters {
            faults = faults.take_turns();
        }
        if let Some(before_each) = &self.test.before_each {
            before_each();
        }
        if let Some(meanwhile) = &self.test.meanwhile {
            faults = faults.with_act(self.setup.act_before, meanwhile());
        }
        let said = Mutex::default();
        let outcome = within_limit(&faults, self.consume_and_look(&faults, &said)).await;
        let said = said.into_inner().unwrap_or_else(PoisonError::into_inner);
        Played { outcome, said }
    }

    async fn consume_and_look(&self, faults: &Faults, said: &Mutex<Said>) -> Result<Seen, Violation> {
        let backend = self.test.harness.start("crash_test").await?;
        let stage = Stage {
            backend: &backend,
            consumer: ConsumerId::new(NAME)?,
            probe: Probe::new(),
            said,
        };
        drive(
            faults,
            self.test.is_real_time.then_some(PATIENCE),
            |process| Box::pin(self.consume(&stage, process)),
            |_, _| Box::pin(async { Err(Error::failed("call an operator", "a crash test has none")) }),
        )
        .await?;
        Ok(Seen {
            effects: self.effects(&stage, faults.touched()).await?,
            calls: stage.probe.calls(),
        })
    }

    /// Runs one consumer, with a new handler and its own handle of the store, until it has caught
    /// up.
    async fn consume(&self, stage: &Stage<'_, H::Backend>, process: Process) -> Result<(), Error> {
        let process = &process;
        let log = FaultyLog::new(self.log.clone(), process);
        let store = FaultyStore::new(patiently(|| stage.backend.store()).await?, process);
        let handler = Instance::new(&self.test.make, &stage.probe, self.setup.is_renewed);
        let handler = FaultyHandler::new(handler, process);
        let consumer = Consumer::essentially_once(stage.consumer.clone(), log, store, handler);
        let pauses = pauses(self.test.is_real_time);
        let mut consumer = tuned(consumer, self.setup.max_batch, pauses).accept_volatile();
        if self.setup.has_letters {
            consumer = consumer.dead_letters(DeadLetterOptions::new());
        }
        let result = consumer.run_until_caught_up().await;
        let mut said = stage.said.lock().unwrap_or_else(PoisonError::into_inner);
        match &result {
            Ok(report) => said.handled += report.handled,
            Err(error @ Error::Unhandled { .. }) => said.unhandled = Some(error.to_string()),
            Err(_) => {}
        }
        drop(said);
        result.map(drop)
    }

    /// Everything that can be compared.
    async fn effects(&self, stage: &Stage<'_, H::Backend>, touched: Touched) -> Result<Effects, Violation> {
        let (test, consumer) = (self.test, &stage.consumer);
        let mut effects = Effects::new();
        let store = stage.backend.store().await?;
        let mut tx = store.begin(consumer).await?;
        for key in touched.keys.union(&test.keys) {
            if let Some(value) = tx.get(key).await? {
                effects.insert(key_effect(key), shown(&value));
            }
        }
        if TxOf::<H>::KEEPS_DEAD_LETTERS
            && let Some(letters) = tx.dead_letters()
        {
            for letter in letters.list(None, LETTERS).await? {
                let name = format!("dead letter of record {}", letter.record.offset);
                effects.insert(name, shown(&letter.record.payload));
            }
        }
        tx.rollback().await?;
        for name in touched.outboxes.union(&test.outboxes) {
            let records = found_of(stage.backend, consumer, name).await?;
            for (key, sent) in received(records) {
                let key = key.map_or("no key".into(), |key| format!("key {}", shown(&key)));
                effects.insert(
                    format!("{}{key}", outbox_effects(name)),
                    format!("[{}]", sent.join(", ")),
                );
            }
        }
        if let Some(observe) = &test.observe {
            effects.extend(observe(stage.backend).await?);
        }
        Ok(effects)
    }
}

/// The name of a key's value among the effects.
fn key_effect(key: &[u8]) -> String {
    format!("key {}", shown(key))
}

/// What the names of an outbox's records begin with among the effects.
fn outbox_effects(outbox: &str) -> String {
    format!("outbox {outbox}, ")
}

/// The keys and outboxes that the user names and that hold nothing, as the effects name them.
pub(super) fn empty_names<H: Harness>(test: &CrashTest<H>, effects: &Effects) -> Vec<String> {
    let keys = test.keys.iter().map(|key| key_effect(key));
    let keys = keys.filter(|key| !effects.contains_key(key));
    let is_empty = |outbox: &&String| !effects.keys().any(|name| name.starts_with(&outbox_effects(outbox)));
    let outboxes = test.outboxes.iter().filter(is_empty);
    keys.chain(outboxes.map(|outbox| format!("outbox {outbox}"))).collect()
}

/// The records of an outbox as a receiver handles them: each origin once, in the order of its key.
fn received(records: Vec<Record>) -> BTreeMap<Option<Bytes>, Vec<String>> {
    let mut origins = HashSet::new();
    let mut received: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for record in records {
        if record.origin.is_none_or(|origin| origins.insert(origin)) {
            let headers = record.headers.iter();
            let headers: String = headers
                .map(|(name, value)| format!(" {name}={}", shown(value)))
                .collect();
            let sent = received.entry(record.key).or_default();
            sent.push(format!("{}{headers}", shown(&record.payload)));
        }
    }
    received
}

fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => format!("{text:?}"),
        Err(_) => format!("\"{}\"", bytes.escape_ascii()),
    }
}
