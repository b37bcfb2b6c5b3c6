//! Dead letters next to failures: handlers that break their transaction, owners that die, stops,
//! and logs that lost records.

use std::{
    collections::BTreeMap,
    sync::{Mutex, atomic::AtomicU64},
};

use essentially_once::{
    backend::Position,
    consumer::{DeadLetterOptions, OnFailure, OnTruncated, Report, dead_letters},
    memory::MemoryLog,
};

use super::{
    letters::{
        all_in_order, consumer, effects, keyed, letters, next, parked, poisoned, retry_all, wait_until, with_letters,
    },
    *,
};

/// Lists of payloads by key in the state, with something that happens at some payloads.
pub(super) fn listing(
    at: impl Fn(&str, &mut ScriptedTx) -> Result<(), HandlerError> + Clone + Send + 'static,
) -> impl Handler<ScriptedTx> + Clone {
    handler_fn(move |record: &Record, tx: &mut ScriptedTx| {
        let at = at.clone();
        Box::pin(async move {
            let payload = std::str::from_utf8(&record.payload)?;
            at(payload, tx)?;
            let key = record.key.clone().unwrap_or_else(|| "-".into());
            let before = essentially_once::KeyValue::get(tx, &key).await?.unwrap_or_default();
            let list = [&before[..], payload.as_bytes(), b" "].concat();
            Ok(essentially_once::KeyValue::put(tx, &key, &list).await?)
        })
    })
}

pub(super) fn quick<H: Handler<ScriptedTx>>(
    backend: &Backend,
    handler: H,
) -> Consumer<support::ScriptedStore, H, essentially_once::consumer::EssentiallyOnce> {
    Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .retries(1)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .dead_letters(DeadLetterOptions::new())
}

/// Counts calls by payload.
#[derive(Clone, Default)]
pub(super) struct Calls(Arc<Mutex<BTreeMap<String, u64>>>);

impl Calls {
    /// Counts one more call, and returns how many there were before.
    pub(super) fn note(&self, payload: &str) -> u64 {
        let mut calls = self.0.lock().unwrap();
        let count = calls.entry(payload.to_owned()).or_default();
        *count += 1;
        *count - 1
    }

    pub(super) fn of(&self, payload: &str) -> u64 {
        self.0.lock().unwrap().get(payload).copied().unwrap_or(0)
    }
}

#[tokio::test]
async fn a_handler_that_ignores_a_broken_transaction_is_blamed_although_a_letter_is_parked_after_it() {
    let backend = keyed(Script::default()).await;
    let calls = Calls::default();
    let counted = calls.clone();
    // 4 is parked behind 2, in the transaction that 3 breaks.
    let handler = listing(move |payload, tx| {
        let before = counted.note(payload);
        match payload {
            "2" => return Err(HandlerError::reject("poison")),
            "3" => tx.is_broken |= before == 0,
            _ => {}
        }
        Ok(())
    });
    let report = quick(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.parked), (9, 3), "{report}");
    assert_eq!(calls.of("3"), 2, "with others, and then alone");
    assert_eq!(effects(&backend).await["b"], "1 3 6 9 ");
}

#[tokio::test]
async fn a_handler_that_ignores_a_broken_transaction_is_blamed_at_a_letter_too() {
    let backend = with_letters().await;
    for (culprit, left) in [("4", vec![4, 8]), ("4", vec![4, 8]), ("none", vec![])] {
        retry_all(&backend).await;
        let handler = listing(move |payload, tx| {
            tx.is_broken |= payload == culprit;
            Ok(())
        });
        quick(&backend, handler).run_until_caught_up().await.unwrap();
        assert_eq!(parked(&backend).await, left);
    }
    assert_eq!(effects(&backend).await, all_in_order());
}

#[tokio::test]
async fn a_fatal_error_behind_other_letters_ends_the_run_at_its_first_call() {
    let backend = with_letters().await;
    retry_all(&backend).await;
    let calls = Calls::default();
    let counted = calls.clone();
    let handler = listing(move |payload, _| match (counted.note(payload), payload) {
        (_, "4") => Err(HandlerError::fatal("full")),
        _ => Ok(()),
    });
    let error = quick(&backend, handler).run_until_caught_up().await.unwrap_err();
    assert!(error.to_string().contains("fatal error in a dead letter"), "{error}");
    assert_eq!((calls.of("2"), calls.of("4")), (1, 1));
    assert_eq!(parked(&backend).await, [2, 4, 8], "nothing of its batch was committed");
}

#[tokio::test]
async fn a_stop_lets_the_letter_commit_that_was_just_handled() {
    let backend = with_letters().await;
    retry_all(&backend).await;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    let handler = listing(move |_, _| {
        stopping.cancel();
        Ok(())
    });
    let report = quick(&backend, handler).run_until(stop).await.unwrap();
    assert_eq!(report.handled, 1, "{report}");
    assert_eq!(parked(&backend).await, [4, 8]);
    assert!(letters(&backend).await[0].due.is_some(), "the next one follows");
    assert_eq!(effects(&backend).await["a"], "0 2 ");
}

#[tokio::test]
async fn a_run_that_has_caught_up_tries_each_due_letter_and_ends() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2"]);
    consumer(&backend, handler.clone()).run_until_caught_up().await.unwrap();
    handler.poison.lock().unwrap().clear();
    handler.retried.lock().unwrap().extend(["4", "10"]);
    retry_all(&backend).await;
    // Each failure makes the letter due at once.
    let options = DeadLetterOptions::new().retry_after(Duration::from_nanos(1));
    let run = consumer(&backend, handler.clone()).dead_letters(options);
    let run = tokio::time::timeout(Duration::from_secs(60), run.run_until_caught_up());
    run.await.expect("it ends").unwrap();
    assert_eq!(parked(&backend).await, [4, 8]);
    handler.retried.lock().unwrap().clear();
    retry_all(&backend).await;
    let run = consumer(&backend, handler).max_batch(1).run_until_caught_up();
    run.await.unwrap();
    assert!(parked(&backend).await.is_empty(), "more letters than a batch holds");
    assert_eq!(effects(&backend).await, all_in_order());
}

#[tokio::test]
async fn letters_that_are_due_do_not_delay_the_verdict_on_a_record() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["11"]);
    handler.retried.lock().unwrap().push("2");
    let always = Duration::from_nanos(1);
    let options = DeadLetterOptions::new().retry_after(always).longest_retry_after(always);
    let run = consumer(&backend, handler.clone()).max_batch(1).dead_letters(options);
    run.run_until_caught_up().await.unwrap();
    let calls = handler.calls.lock().unwrap();
    assert_eq!(calls.iter().filter(|payload| *payload == "11").count(), 1);
}

#[tokio::test]
async fn a_rejected_record_waits_for_an_operator_whatever_the_pause() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2"]);
    handler.retried.lock().unwrap().push("11");
    let options = DeadLetterOptions::new().retry_after(Duration::from_secs(60));
    let run = consumer(&backend, handler).dead_letters(options);
    run.run_until_caught_up().await.unwrap();
    let due: Vec<_> = letters(&backend)
        .await
        .iter()
        .map(|letter| letter.due.is_some())
        .collect();
    assert_eq!(due, [false, false, false, true]);
}

#[tokio::test]
async fn a_letter_keeps_the_first_reason_and_the_last() {
    let backend = keyed(Script::default()).await;
    let calls = Calls::default();
    let handler = listing(move |payload, _| match (payload, calls.note(payload)) {
        ("2", before) => Err(HandlerError::retry(format!("reason {before}"))),
        _ => Ok(()),
    });
    quick(&backend, handler)
        .max_batch(1)
        .run_until_caught_up()
        .await
        .unwrap();
    let letter = &letters(&backend).await[0];
    assert_eq!((&*letter.first_reason, &*letter.last_reason), ("reason 0", "reason 1"));
}

/// A crash leaves the position with its owner.
#[tokio::test]
async fn a_standby_takes_over_when_a_letter_is_due_and_its_owner_is_dead() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2"]);
    let owner = tokio::spawn(consumer(&backend, handler.clone()).run());
    wait_until(&owner, async || next(&backend).await == RECORDS.into()).await;
    owner.abort();
    let _ = owner.await;
    handler.poison.lock().unwrap().clear();
    retry_all(&backend).await;
    // A job finds it at once, and a service after a while.
    let standby = || consumer(&backend, handler.clone()).standby_after(Duration::from_millis(20));
    let report = standby().max_batch(1).run_until_caught_up().await.unwrap();
    assert_eq!(report.handled, 3, "{report}");

    let memory = backend.memory_log();
    memory.append(&[NewRecord::new("2").key("a")]).await.unwrap();
    handler.poison.lock().unwrap().push("2");
    let owner = tokio::spawn(consumer(&backend, handler.clone()).run());
    wait_until(&owner, async || next(&backend).await == (RECORDS + 1).into()).await;
    owner.abort();
    let _ = owner.await;
    handler.poison.lock().unwrap().clear();
    retry_all(&backend).await;
    let stop = CancellationToken::new();
    let service = tokio::spawn(standby().run_until(stop.clone()));
    wait_until(&service, async || letters(&backend).await.is_empty()).await;
    stop.cancel();
    service.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_standby_leaves_letters_that_are_not_due_to_their_owner() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2"]);
    let owner = tokio::spawn(consumer(&backend, handler.clone()).run());
    wait_until(&owner, async || next(&backend).await == RECORDS.into()).await;
    let before = backend.position(&shipping()).await.unwrap();
    let standby = consumer(&backend, handler).standby_after(Duration::from_millis(1));
    let report = standby.run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.commits), (0, 0), "{report}");
    assert_eq!(backend.position(&shipping()).await.unwrap(), before);
    owner.abort();
}

#[tokio::test]
async fn seek_back_refuses_to_remove_letters_whose_records_are_gone() {
    let backend = with_letters().await;
    let shorter = Memory::new();
    let log: MemoryLog = shorter.log("orders").unwrap();
    log.append(&[NewRecord::new("0"), NewRecord::new("1"), NewRecord::new("2")])
        .await
        .unwrap();
    let before = letters(&backend).await;
    let store = backend.memory.store();
    let error = seek(&shipping(), &log, &store, StartAt::Earliest, &ann())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("the one at 2"), "{error}");
    assert_eq!(letters(&backend).await, before);
    // From the last one on, because the next of its key becomes due.
    for letter in before.iter().rev() {
        dead_letters::discard(&shipping(), &store, letter, &ann())
            .await
            .unwrap();
    }
    seek(&shipping(), &log, &store, StartAt::Earliest, &ann())
        .await
        .unwrap();
    assert!(letters(&backend).await.is_empty());
}

#[tokio::test]
async fn at_most_once_refuses_a_consumer_with_letters() {
    let backend = with_letters().await;
    backend
        .memory_log()
        .append(&[NewRecord::new("x").key("a")])
        .await
        .unwrap();
    let handler = handler_fn(|_: &Record, (): &mut ()| Box::pin(async { Ok(()) }));
    let (log, store) = (backend.log(), backend.store());
    let error = Consumer::at_most_once(shipping(), log, store, handler)
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("3 dead letters"), "{error}");
}

#[tokio::test]
async fn the_order_of_options_does_not_matter() {
    let backend = keyed(Script::default()).await;
    let seen = Arc::new(AtomicU64::new(0));
    let asked = Arc::clone(&seen);
    let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), poisoned(&backend, &["2"]))
        .on_failure_with(move |_| {
            asked.fetch_add(1, Ordering::Relaxed);
            OnFailure::DeadLetter
        })
        .dead_letters(DeadLetterOptions::new());
    run.run_until_caught_up().await.unwrap();
    assert_eq!(seen.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_consumer_that_begins_below_the_earliest_record_can_skip_to_it() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    backend.memory_log().truncate(5.into());
    let handler = listing(|_, _| Ok(()));
    let run = quick(&backend, handler)
        .start_at(StartAt::Offset(2.into()))
        .on_truncated(OnTruncated::SkipToEarliest);
    let report = run.run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.truncated), (RECORDS - 5, 1), "{report}");
    assert_eq!(report.skipped_to_earliest, Some((2.into(), 5.into())));
}

/// Runs until record 2 was tried this often, and then ends the run as a crash does.
async fn crash_after(tries: u64, backend: &Backend, run: tokio::task::JoinHandle<Result<Report, Error>>) {
    wait_until(&run, async || tries_of_2(backend).await >= tries).await;
    run.abort();
    let _ = run.await;
}

/// The stored number of tries of record 2.
async fn tries_of_2(backend: &Backend) -> u64 {
    let position = backend.position(&shipping()).await;
    let tried = position.as_ref().and_then(|position| position.note.tried());
    tried
        .filter(|tried| tried.offset() == 2.into())
        .map_or(0, |tried| tried.tries().into())
}

#[tokio::test]
async fn tries_count_across_crashes() {
    let backend = keyed(Script::default()).await;
    let calls = Calls::default();
    let counted = calls.clone();
    let handler = listing(move |payload, _| match (payload, counted.note(payload)) {
        ("2", before) => Err(HandlerError::retry(format!("reason {before}"))),
        _ => Ok(()),
    });
    let run = || {
        quick(&backend, handler.clone())
            .standby_after(Duration::ZERO)
            .retries(9)
            .min_backoff(Duration::from_millis(20))
            .max_backoff(Duration::from_millis(20))
    };
    for crash in 1..=3 {
        crash_after(3 * crash, &backend, tokio::spawn(run().run())).await;
    }
    assert_eq!((tries_of_2(&backend).await, calls.of("2")), (9, 9));
    run().run_until_caught_up().await.unwrap();
    assert_eq!(calls.of("2"), 10);
    let letter = &letters(&backend).await[0];
    assert_eq!(
        (letter.tries, &*letter.first_reason, &*letter.last_reason),
        (10, "reason 0", "reason 9")
    );
    assert_eq!(tries_of_2(&backend).await, 0);
}

#[tokio::test]
async fn tries_of_a_record_behind_others_count_too() {
    let backend = keyed(Script::default()).await;
    let handler = listing(move |payload, _| match payload {
        "2" => Err(HandlerError::retry("no")),
        _ => Ok(()),
    });
    let run = quick(&backend, handler)
        .retries(9)
        .min_backoff(Duration::from_secs(60))
        .max_backoff(Duration::from_secs(60));
    // It fails behind 0 and 1, whose commit stores that.
    let run = tokio::spawn(run.run());
    let mut position = None;
    while position
        .as_ref()
        .is_none_or(|position: &Position| position.next < 2.into())
    {
        assert!(!run.is_finished());
        tokio::task::yield_now().await;
        position = backend.position(&shipping()).await;
    }
    assert!(position.expect("some").note.tried().is_some());
    run.abort();
}

#[tokio::test]
async fn at_least_once_counts_tries_across_crashes_too() {
    let backend = keyed(Script::default()).await;
    let calls = Calls::default();
    let counted = calls.clone();
    let handler = handler_fn(move |record: &Record, (): &mut ()| {
        let payload = String::from_utf8_lossy(&record.payload).into_owned();
        let (calls, is_poison) = (counted.clone(), payload == "2");
        Box::pin(async move {
            calls.note(&payload);
            match is_poison {
                true => Err(HandlerError::retry("no")),
                false => Ok(()),
            }
        })
    });
    let run = || {
        Consumer::at_least_once(shipping(), backend.log(), backend.store(), handler.clone())
            .on_failure(OnFailure::Skip)
            .standby_after(Duration::ZERO)
            .retries(7)
            .min_backoff(Duration::from_millis(20))
            .max_backoff(Duration::from_millis(20))
    };
    for crash in 1..=2 {
        crash_after(3 * crash, &backend, tokio::spawn(run().run())).await;
    }
    let report = run().run_until_caught_up().await.unwrap();
    assert_eq!((calls.of("2"), report.failed), (8, 1), "{report}");
}

#[tokio::test]
async fn a_run_that_ends_because_of_a_record_gives_the_next_run_all_tries_again() {
    let backend = keyed(Script::default()).await;
    let calls = Calls::default();
    for run in 1..=2 {
        let counted = calls.clone();
        let handler = listing(move |payload, _| match (payload, counted.note(payload)) {
            ("2", _) => Err(HandlerError::retry("no")),
            _ => Ok(()),
        });
        let stopping = quick(&backend, handler).retries(4).on_failure(OnFailure::Stop);
        let error = stopping.run_until_caught_up().await.unwrap_err();
        assert!(matches!(error, Error::Unhandled { attempts: 5, .. }), "{error}");
        assert_eq!(calls.of("2"), 5 * run);
    }
}

/// How many commits, and how many transactions in all, it takes more to handle a batch of 1,000 in
/// which one record is tried in vain and then parked.
async fn extra_transactions(retries: u32, rejects: bool) -> (u64, u64) {
    let transactions = async |poison: bool| {
        let memory = Memory::new();
        let records: Vec<_> = (0..1_000).map(|n: u32| NewRecord::new(n.to_string())).collect();
        memory.log("orders").unwrap().append(&records).await.unwrap();
        let backend = Backend::of(memory, Script::default());
        let handler = poisoned(&backend, &[]);
        if poison {
            let list = if rejects { &handler.poison } else { &handler.retried };
            list.lock().unwrap().push("500");
        }
        let run = consumer(&backend, handler)
            .max_batch(1_000)
            .batch_time_limit(Duration::MAX)
            .retries(retries);
        let report = run.run_until_caught_up().await.unwrap();
        assert_eq!(report.parked, u64::from(poison));
        (backend.script.taken(Step::Commit), backend.script.taken(Step::Begin))
    };
    let (with, without) = (transactions(true).await, transactions(false).await);
    (with.0 - without.0, with.1 - without.1)
}

#[tokio::test]
async fn a_poison_record_costs_three_commits_and_one_per_try_and_a_rejected_one_costs_one() {
    for retries in [0, 1, 5] {
        let tries = u64::from(retries) + 1;
        let (commits, transactions) = extra_transactions(retries, false).await;
        assert!(commits <= 3 + tries, "{commits} commits for {tries} tries");
        // Each try is rolled back.
        assert!(
            transactions <= 3 + 2 * tries,
            "{transactions} transactions for {tries} tries"
        );
    }
    let (commits, transactions) = extra_transactions(5, true).await;
    assert!(
        commits <= 1 && transactions <= 2,
        "{commits} commits in {transactions} transactions"
    );
}

/// The letter that is due makes room for the next one.
#[tokio::test]
async fn a_full_limit_is_drained_by_a_letter_that_is_due() {
    let memory = Memory::new();
    let (log, store) = (memory.log("orders").unwrap(), memory.store());
    let records = [NewRecord::new("bad").key("a"), NewRecord::new("next").key("a")];
    log.append(&records).await.unwrap();
    let backend = Backend::of(memory, Script::default());
    let handler = poisoned(&backend, &["bad"]);
    let run = |handler: &super::letters::Lists| {
        consumer(&backend, handler.clone()).dead_letters(DeadLetterOptions::new().limit(1))
    };
    let error = run(&handler).run_until_caught_up().await.unwrap_err();
    assert!(error.to_string().contains("1 is its limit"), "{error}");
    handler.poison.lock().unwrap().clear();
    dead_letters::retry(&shipping(), &store, 0.into(), &ann())
        .await
        .unwrap();
    run(&handler).run_until_caught_up().await.unwrap();
    assert!(letters(&backend).await.is_empty());
    assert_eq!(effects(&backend).await["a"], "bad next ");
}

/// Tries of a later record must not hide that an earlier one failed behind others since.
#[tokio::test]
async fn a_record_that_fails_in_front_of_one_that_was_tried_is_parked() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &[]);
    *handler.retried.lock().unwrap() = vec!["3", "4"];
    let (log, store) = (backend.memory_log(), backend.memory.store());
    let moved = std::sync::atomic::AtomicBool::new(false);
    let run = consumer(&backend, handler).max_batch(2).on_failure_with(move |failed| {
        if failed.record.offset == 4.into() && !moved.swap(true, Ordering::Relaxed) {
            now(seek(&shipping(), &log, &store, StartAt::Earliest, &ann())).unwrap();
        }
        OnFailure::DeadLetter
    });
    let limited = tokio::time::timeout(Duration::from_secs(60), run.run_until_caught_up());
    limited.await.expect("it ends").unwrap();
    assert_eq!(parked(&backend).await, [3, 4, 6, 8, 9]);
}
