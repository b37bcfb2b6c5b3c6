//! Dead letters: parked with the position, kept in order within their key, tried again.

use std::{collections::BTreeMap, sync::Mutex, time::SystemTime};

use essentially_once::{
    backend::{DeadLetter, DeadLetters, Transaction},
    consumer::{
        DeadLetterOptions, EssentiallyOnce, OnFailure, Report,
        dead_letters::{self, LetterFilter},
    },
};
use support::ScriptedStore;

use super::*;

/// The keys of the records by offset; a dash stands for none.
const KEYS: &str = "ababa-bcab-c";

fn key(offset: u64) -> Option<&'static str> {
    let keys = KEYS.get(offset as usize..=offset as usize)?;
    (keys != "-").then_some(keys)
}

/// A log of payloads `0`, `1`, ... with these keys.
pub(super) async fn keyed(script: Script) -> Backend {
    let memory = Memory::new();
    let records: Vec<_> = (0..KEYS.len() as u64)
        .map(|n| match key(n) {
            Some(key) => NewRecord::new(n.to_string()).key(key),
            None => NewRecord::new(n.to_string()),
        })
        .collect();
    memory.log("orders").unwrap().append(&records).await.unwrap();
    Backend::of(memory, script)
}

/// Appends each payload to a list under its key, in the state. Some payloads fail.
#[derive(Clone, Default)]
pub(super) struct Lists {
    script: Script,
    /// Payloads to reject, or to refuse with an error that another try may resolve.
    pub(super) poison: Arc<Mutex<Vec<&'static str>>>,
    pub(super) retried: Arc<Mutex<Vec<&'static str>>>,
    pub(super) calls: Arc<Mutex<Vec<String>>>,
}

#[essentially_once::async_trait]
impl Handler<ScriptedTx> for Lists {
    async fn handle(&mut self, record: &Record, tx: &mut ScriptedTx) -> Result<(), HandlerError> {
        support::handler_fault(&self.script)?;
        let payload = std::str::from_utf8(&record.payload)?;
        self.calls.lock().unwrap().push(payload.to_owned());
        if self.poison.lock().unwrap().contains(&payload) {
            return Err(HandlerError::reject(format!("{payload} is poison")));
        }
        if self.retried.lock().unwrap().contains(&payload) {
            return Err(HandlerError::retry(format!("{payload} is not ready")));
        }
        let key = record.key.clone().unwrap_or_else(|| "-".into());
        let before = essentially_once::KeyValue::get(tx, &key).await?.unwrap_or_default();
        let list = [&before[..], payload.as_bytes(), b" "].concat();
        essentially_once::KeyValue::put(tx, &key, &list).await?;
        Ok(())
    }
}

pub(super) fn poisoned(backend: &Backend, poison: &[&'static str]) -> Lists {
    Lists {
        script: backend.script.clone(),
        poison: Arc::new(Mutex::new(poison.to_vec())),
        ..Lists::default()
    }
}

pub(super) fn consumer(backend: &Backend, handler: Lists) -> Consumer<ScriptedStore, Lists, EssentiallyOnce> {
    Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .max_batch(5)
        .retries(1)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .dead_letters(DeadLetterOptions::new())
}

/// A backend whose consumer has passed all records and has parked 2, 4 and 8 of key `a`.
pub(super) async fn with_letters() -> Backend {
    let backend = keyed(Script::default()).await;
    let run = consumer(&backend, poisoned(&backend, &["2"]));
    run.run_until_caught_up().await.unwrap();
    backend
}

/// The payloads that took effect, in order, by key.
pub(super) async fn effects(backend: &Backend) -> BTreeMap<&'static str, String> {
    let mut tx = backend.memory.store().begin(&shipping()).await.unwrap();
    let mut effects = BTreeMap::new();
    for key in ["-", "a", "b", "c"] {
        let list = essentially_once::KeyValue::get(&mut tx, key.as_bytes()).await.unwrap();
        effects.insert(key, String::from_utf8(list.unwrap_or_default().to_vec()).unwrap());
    }
    effects
}

pub(super) fn all_in_order() -> BTreeMap<&'static str, String> {
    [("-", "5 10 "), ("a", "0 2 4 8 "), ("b", "1 3 6 9 "), ("c", "7 11 ")]
        .map(|(key, list)| (key, list.to_owned()))
        .into()
}

pub(super) async fn letters(backend: &Backend) -> Vec<DeadLetter> {
    dead_letters::list(&shipping(), &backend.memory.store(), None, 100)
        .await
        .unwrap()
}

pub(super) async fn parked(backend: &Backend) -> Vec<u64> {
    letters(backend)
        .await
        .iter()
        .map(|letter| letter.record.offset.lo())
        .collect()
}

/// Waits for something that a running consumer does.
pub(super) async fn wait_until<T>(run: &tokio::task::JoinHandle<T>, condition: impl AsyncFn() -> bool) {
    let started = std::time::Instant::now();
    while !condition().await {
        assert!(!run.is_finished(), "the run ended");
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "it did not happen within a minute"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The consumer's position, or 0.
pub(super) async fn next(backend: &Backend) -> Offset {
    let position = backend.position(&shipping()).await;
    position.map_or(Offset::ZERO, |position| position.next)
}

pub(super) async fn retry_all(backend: &Backend) -> u64 {
    dead_letters::retry_all(&shipping(), &backend.memory.store(), &LetterFilter::all(), &ann())
        .await
        .unwrap()
}

#[tokio::test]
async fn later_records_of_a_key_are_parked_behind_a_poison_record_and_others_go_on() {
    let backend = keyed(Script::default()).await;
    let report = consumer(&backend, poisoned(&backend, &["2", "5"]))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.parked, report.failed), (8, 4, 0), "{report}");
    assert_eq!(parked(&backend).await, [2, 4, 5, 8]);
    let effects = effects(&backend).await;
    assert_eq!(
        (&*effects["a"], &*effects["b"], &*effects["-"]),
        ("0 ", "1 3 6 9 ", "10 ")
    );

    let letters = letters(&backend).await;
    assert_eq!(
        letters.iter().map(|letter| letter.tries).collect::<Vec<_>>(),
        [1, 0, 1, 0]
    );
    assert!(letters[0].last_reason.contains("2 is poison"), "{:?}", letters[0]);
    assert!(
        letters[1].first_reason.contains("earlier records of its key"),
        "{:?}",
        letters[1]
    );
    assert!(letters.iter().all(|letter| letter.due.is_none()), "an operator decides");
}

#[tokio::test]
async fn a_retry_handles_a_key_in_order_and_later_records_go_on_behind_it() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2", "5"]);
    consumer(&backend, handler.clone()).run_until_caught_up().await.unwrap();
    handler.poison.lock().unwrap().clear();
    assert_eq!(
        retry_all(&backend).await,
        2,
        "the first letter of `a`, and the one without a key"
    );
    let report = consumer(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!(report.handled, 4, "{report}");
    assert!(letters(&backend).await.is_empty());
    let effects = effects(&backend).await;
    assert_eq!(
        (&*effects["a"], &*effects["-"]),
        ("0 2 4 8 ", "10 5 "),
        "records without a key have no order"
    );
}

#[tokio::test]
async fn a_letter_that_fails_again_stays_and_counts_its_tries() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2"]);
    consumer(&backend, handler.clone()).run_until_caught_up().await.unwrap();
    let before = letters(&backend).await;
    dead_letters::retry(&shipping(), &backend.memory.store(), 2.into(), &ann())
        .await
        .unwrap();
    let report = consumer(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.failed_tries), (0, 1), "{report}");
    let after = letters(&backend).await;
    assert_eq!(after[0].tries, before[0].tries + 1);
    assert!(after[0].due.is_none() && after[0].version > before[0].version);
    assert_eq!(after[1..], before[1..]);
}

#[tokio::test]
async fn letters_are_tried_again_after_a_pause_that_doubles_while_other_keys_go_on() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &[]);
    handler.retried.lock().unwrap().push("2");
    let pause = Duration::from_millis(40);
    let options = DeadLetterOptions::new().retry_after(pause);
    let stop = CancellationToken::new();
    let run = tokio::spawn(
        consumer(&backend, handler.clone())
            .dead_letters(options)
            .run_until(stop.clone()),
    );
    let calls = || handler.calls.lock().unwrap().iter().filter(|call| *call == "2").count();
    let started = SystemTime::now();
    // Two tries in the loop, and three of the letter: after 40, 80 and 160 ms.
    wait_until(&run, async || calls() >= 6).await;
    assert!(started.elapsed().unwrap() >= 6 * pause, "{:?}", started.elapsed());
    assert_eq!(effects(&backend).await["b"], "1 3 6 9 ", "other keys went on");
    handler.retried.lock().unwrap().clear();
    wait_until(&run, async || letters(&backend).await.is_empty()).await;
    stop.cancel();
    let report = run.await.unwrap().unwrap();
    assert_eq!((report.handled, report.parked), (12, 3), "{report}");
    assert_eq!(effects(&backend).await, all_in_order());
}

#[tokio::test]
async fn a_running_idle_consumer_tries_a_letter_that_an_operator_retries() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2"]);
    let stop = CancellationToken::new();
    let run = tokio::spawn(consumer(&backend, handler.clone()).run_until(stop.clone()));
    wait_until(&run, async || {
        parked(&backend).await == [2, 4, 8] && next(&backend).await == RECORDS.into()
    })
    .await;
    handler.poison.lock().unwrap().clear();
    dead_letters::retry(&shipping(), &backend.memory.store(), 2.into(), &ann())
        .await
        .unwrap();
    wait_until(&run, async || letters(&backend).await.is_empty()).await;
    stop.cancel();
    run.await.unwrap().unwrap();
    assert_eq!(effects(&backend).await, all_in_order());
}

#[tokio::test]
async fn a_discarded_letter_makes_the_next_one_due_and_has_no_effect() {
    let backend = keyed(Script::default()).await;
    let (handler, store) = (poisoned(&backend, &["2"]), backend.memory.store());
    consumer(&backend, handler.clone()).run_until_caught_up().await.unwrap();
    let seen = letters(&backend).await;
    // Someone else retries it meanwhile, in vain.
    dead_letters::retry(&shipping(), &store, 2.into(), &ann())
        .await
        .unwrap();
    let error = dead_letters::discard(&shipping(), &store, &seen[0], &ann())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("changed since"), "{error}");
    let seen = letters(&backend).await;
    dead_letters::discard(&shipping(), &store, &seen[0], &ann())
        .await
        .unwrap();
    let error = dead_letters::discard(&shipping(), &store, &seen[0], &ann())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no such letter"), "{error}");
    let report = consumer(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!(report.handled, 2, "{report}");
    assert_eq!(effects(&backend).await["a"], "0 4 8 ");
}

/// An operator's program may run them on any thread.
#[test]
fn verbs_can_be_spawned() {
    fn is_send(_: impl Future + Send) {}
    let store = Memory::new().store();
    is_send(dead_letters::list(&shipping(), &store, None, 1));
    is_send(dead_letters::retry(&shipping(), &store, 0.into(), &ann()));
    let all = LetterFilter::all();
    is_send(dead_letters::retry_all(&shipping(), &store, &all, &ann()));
    is_send(dead_letters::discard_all(&shipping(), &store, &all, &ann()));
}

#[tokio::test]
async fn verbs_that_would_change_nothing_are_refused_and_name_why() {
    let backend = keyed(Script::default()).await;
    let store = backend.memory.store();
    let error = dead_letters::retry(&shipping(), &store, 2.into(), &ann())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no position"), "{error}");
    consumer(&backend, poisoned(&backend, &["2"]))
        .run_until_caught_up()
        .await
        .unwrap();
    let before = backend.position(&shipping()).await;
    let error = dead_letters::retry(&shipping(), &store, 4.into(), &ann())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("the letter at 2 of the same key"), "{error}");
    let error = dead_letters::retry(&shipping(), &store, 3.into(), &ann())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no such letter"), "{error}");
    assert_eq!(backend.position(&shipping()).await, before);
}

#[tokio::test]
async fn seek_back_removes_the_letters_whose_records_are_handled_again() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["0", "2"]);
    consumer(&backend, handler.clone()).run_until_caught_up().await.unwrap();
    assert_eq!(parked(&backend).await, [0, 2, 4, 8]);
    seek(
        &shipping(),
        &backend.log(),
        &backend.store(),
        StartAt::Offset(4.into()),
        &ann(),
    )
    .await
    .unwrap();
    assert_eq!(parked(&backend).await, [0, 2]);
    handler.poison.lock().unwrap().clear();
    retry_all(&backend).await;
    consumer(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!(effects(&backend).await["a"], "0 2 4 8 ");
    // Forwards, every letter stays.
    seek(&shipping(), &backend.log(), &backend.store(), StartAt::Earliest, &ann())
        .await
        .unwrap();
    assert!(letters(&backend).await.is_empty());
}

#[tokio::test]
async fn a_consumer_without_the_option_respects_the_letters_that_are_there() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2"]);
    let stopped = consumer(&backend, handler.clone())
        .on_failure_with(|failed| match &failed.record.payload[..] {
            b"2" => OnFailure::DeadLetter,
            _ => OnFailure::Stop,
        })
        .max_batch(1)
        .run_until_caught_up();
    stopped.await.unwrap();
    seek(
        &shipping(),
        &backend.log(),
        &backend.store(),
        StartAt::Offset(3.into()),
        &ann(),
    )
    .await
    .unwrap();
    assert_eq!(parked(&backend).await, [2]);
    let plain = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler);
    let report = plain.run_until_caught_up().await.unwrap();
    assert_eq!(report.parked, 2, "{report}");
    assert_eq!(parked(&backend).await, [2, 4, 8]);
}

#[tokio::test]
async fn a_policy_that_asks_for_letters_needs_the_option() {
    let backend = keyed(Script::default()).await;
    let plain = Consumer::essentially_once(shipping(), backend.log(), backend.store(), poisoned(&backend, &["2"]));
    let error = plain
        .on_failure(OnFailure::DeadLetter)
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("call `dead_letters`"), "{error}");
}

#[tokio::test]
async fn the_limit_stops_the_run_before_the_record_that_is_one_too_many() {
    let backend = keyed(Script::default()).await;
    let run = consumer(&backend, poisoned(&backend, &["2"])).dead_letters(DeadLetterOptions::new().limit(2));
    let error = run.run_until_caught_up().await.unwrap_err();
    assert!(
        error.to_string().contains("2 dead letters, and 2 is its limit"),
        "{error}"
    );
    assert_eq!(parked(&backend).await, [2, 4]);
    assert!(backend.position(&shipping()).await.unwrap().next <= 8.into());
}

#[tokio::test]
async fn a_malformed_record_is_parked_without_holding_up_its_key() {
    let mut backend = keyed(Script::default()).await;
    backend.malformed = Some(2.into());
    let report = consumer(&backend, poisoned(&backend, &[]))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.parked), (11, 1), "{report}");
    let letter = &letters(&backend).await[0];
    assert!(
        letter.record.malformed.is_some() && letter.last_reason.contains("scripted"),
        "{letter:?}"
    );
    assert_eq!(effects(&backend).await["a"], "0 4 8 ");
}

#[tokio::test]
async fn a_fatal_error_in_a_letter_ends_the_run_and_leaves_the_letter() {
    let backend = with_letters().await;
    retry_all(&backend).await;
    let before = letters(&backend).await;
    let handler = handler_fn(|_: &Record, _: &mut ScriptedTx| Box::pin(async { Err(HandlerError::fatal("full")) }));
    let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler);
    let error = run.run_until_caught_up().await.unwrap_err();
    assert!(error.to_string().contains("fatal error in a dead letter"), "{error}");
    assert_eq!(letters(&backend).await, before);
}

#[tokio::test]
async fn parking_is_part_of_the_transaction() {
    let store = Memory::new().store();
    let mut tx = store.begin(&shipping()).await.unwrap();
    let record = Record::new(3.into(), SystemTime::now(), "x");
    tx.park(&DeadLetter::new(record, 1, "why", SystemTime::now()))
        .await
        .unwrap();
    assert_eq!(tx.total().await.unwrap(), 1, "it sees its own letters");
    tx.rollback().await.unwrap();
    assert!(
        dead_letters::list(&shipping(), &store, None, 1)
            .await
            .unwrap()
            .is_empty()
    );
}

/// A commit is refused because of one record, while others of its batch were parked.
#[tokio::test]
async fn a_refused_commit_leaves_no_trace_in_the_counts() {
    let backend = keyed(Script::default()).await;
    let (poison, refused) = (Arc::new(Mutex::new(true)), Arc::new(Mutex::new(true)));
    let (is_poison, is_refused) = (Arc::clone(&poison), Arc::clone(&refused));
    let handler = handler_fn(move |record: &Record, tx: &mut ScriptedTx| {
        let (poison, refused) = (*is_poison.lock().unwrap(), *is_refused.lock().unwrap());
        Box::pin(async move {
            match &record.payload[..] {
                b"0" if poison => return Err(HandlerError::reject("poison")),
                b"3" => tx.refuse_commit |= refused,
                _ => {}
            }
            support::count_one(tx, &record.payload).await?;
            Ok(())
        })
    });
    let stop = CancellationToken::new();
    let run = tokio::spawn(
        Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
            .retries(1)
            .min_backoff(Duration::ZERO)
            .max_backoff(Duration::ZERO)
            .dead_letters(DeadLetterOptions::new().limit(7))
            .run_until(stop.clone()),
    );
    // 0 is poison, 2, 4 and 8 follow it, and 3 makes its commits fail, so 6 and 9 follow it.
    wait_until(&run, async || next(&backend).await == RECORDS.into()).await;
    assert_eq!(parked(&backend).await, [0, 2, 3, 4, 6, 8, 9]);
    (*poison.lock().unwrap(), *refused.lock().unwrap()) = (false, false);
    retry_all(&backend).await;
    wait_until(&run, async || letters(&backend).await.is_empty()).await;
    // The keys have no letters, and their records are handled again.
    let more = ["a", "b"].map(|key| NewRecord::new("more").key(key));
    backend.memory_log().append(&more).await.unwrap();
    wait_until(&run, async || next(&backend).await == (RECORDS + 2).into()).await;
    stop.cancel();
    run.await.unwrap().unwrap();
    assert!(letters(&backend).await.is_empty());
    assert_eq!(backend.counts(&shipping(), RECORDS).await, [1; RECORDS as usize]);
}

/// Runs with poison records, mends the handler, retries and runs again, with a fault from the
/// script. Every record takes effect once, in order within its key.
async fn everything_takes_effect_once_in_order(script: Script) -> Report {
    let backend = keyed(script).await;
    let handler = poisoned(&backend, &["2", "1", "11"]);
    consumer(&backend, handler.clone()).run_until_caught_up().await.unwrap();
    handler.poison.lock().unwrap().clear();
    retry_all(&backend).await;
    let report = consumer(&backend, handler)
        .max_batch(2)
        .run_until_caught_up()
        .await
        .unwrap();
    assert!(letters(&backend).await.is_empty());
    assert_eq!(effects(&backend).await, all_in_order());
    backend.script.assert_all_struck();
    report
}

#[tokio::test]
async fn a_fault_at_any_step_of_parking_and_retrying_loses_doubles_and_reorders_nothing() {
    let clean = Script::default();
    everything_takes_effect_once_in_order(clean.clone()).await;
    let mut plans = 0;
    for step in [Step::Read, Step::Position, Step::Begin, Step::Handle, Step::Commit] {
        for nth in 0..clean.taken(step) {
            for fault in [Fault::Before, Fault::After] {
                everything_takes_effect_once_in_order(Script::default().fail(step, nth, fault)).await;
                plans += 1;
            }
        }
    }
    assert!(plans > 100, "only {plans} plans were run");
}
