//! Dead letters and sequences of events that once broke a promise of the documentation.

use std::{
    sync::{Mutex, atomic::AtomicU64},
    time::SystemTime,
};

use essentially_once::{
    backend::{Advance, DeadLetter, DeadLetters, Transaction},
    consumer::{
        DeadLetterOptions, OnFailure,
        dead_letters::{self, LetterFilter},
    },
};
use tokio::sync::Notify;

use super::{
    letters::{consumer, effects, keyed, letters, next, parked, poisoned, retry_all, wait_until, with_letters},
    *,
};

/// Fails if something that should happen soon does not.
async fn soon<F: Future>(event: F) -> F::Output {
    let limited = tokio::time::timeout(Duration::from_secs(60), event).await;
    limited.expect("it happens within a minute")
}

/// Parks letters by hand.
async fn park(backend: &Backend, parked: &[DeadLetter]) {
    let mut tx = backend.memory.store().begin(&shipping()).await.unwrap();
    for letter in parked {
        tx.park(letter).await.unwrap();
    }
    let position = backend.position(&shipping()).await.unwrap();
    let revision = position.revision;
    let mut advance = Advance::new(position.log, position.next, revision, revision.next_epoch());
    advance.owner = position.owner;
    tx.commit(advance).await.unwrap();
}

/// "At-most-once [...] refuses to run while the consumer has letters."
#[tokio::test]
async fn at_most_once_refuses_letters_after_a_passing_fault_too() {
    let backend = with_letters().await;
    let more = [NewRecord::new("x").key("a")];
    backend.memory_log().append(&more).await.unwrap();
    let script = Script::default().fail(Step::Begin, 0, Fault::Before);
    let faulty = Backend::of(backend.memory.clone(), script);
    let counter = faulty.counter();
    let run = Consumer::at_most_once(shipping(), faulty.log(), faulty.store(), InMemory(counter.clone()))
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO);
    let error = run.run_until_caught_up().await.unwrap_err();
    faulty.script.assert_all_struck();
    assert!(error.to_string().contains("3 dead letters"), "{error}");
    assert!(
        counter.in_memory.lock().unwrap().is_empty(),
        "a record of a key with letters was handled"
    );
}

/// The same if letters appear while it runs.
#[tokio::test]
async fn at_most_once_refuses_letters_that_appeared_since_it_began() {
    let backend = keyed(Script::default()).await;
    let handled = Arc::new(Mutex::new(Vec::new()));
    let go_on = Arc::new(Notify::new());
    let (seen, released) = (Arc::clone(&handled), Arc::clone(&go_on));
    let handler = handler_fn(move |record: &Record, (): &mut ()| {
        seen.lock().unwrap().push(record.offset.lo());
        let (is_slow, released) = (record.payload == "slow", Arc::clone(&released));
        Box::pin(async move {
            if is_slow {
                released.notified().await;
            }
            Ok(())
        })
    });
    let plain = Consumer::at_most_once(shipping(), backend.log(), backend.store(), handler)
        .standby_after(Duration::from_millis(20));
    let run = tokio::spawn(plain.run());
    wait_until(&run, async || next(&backend).await == RECORDS.into()).await;
    backend.memory_log().append(&[NewRecord::new("slow")]).await.unwrap();
    wait_until(&run, async || handled.lock().unwrap().contains(&RECORDS)).await;
    let poison = [NewRecord::new("poison").key("a")];
    backend.memory_log().append(&poison).await.unwrap();
    // The new version, essentially-once, takes over for a while and parks a record.
    let rolled_out = consumer(&backend, poisoned(&backend, &["poison"])).standby_after(Duration::ZERO);
    rolled_out.run_until_caught_up().await.unwrap();
    assert_eq!(parked(&backend).await, [RECORDS + 1]);
    let more = [NewRecord::new("y").key("a")];
    backend.memory_log().append(&more).await.unwrap();
    go_on.notify_one();
    let error = soon(run).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("1 dead letters"), "{error}");
    let handled = handled.lock().unwrap().clone();
    assert!(
        !handled.contains(&(RECORDS + 2)),
        "ahead of a letter of its key: {handled:?}"
    );
}

/// A verdict that no longer counts must not hold letters back. Here an operator moves the position
/// (or another instance commits) after the verdict and before the next session.
#[tokio::test]
async fn a_verdict_that_no_longer_counts_does_not_hold_letters_back() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2", "11"]);
    let stop = CancellationToken::new();
    let (memory, log) = (backend.memory.clone(), backend.memory_log());
    let run = consumer(&backend, handler.clone()).on_failure_with(move |failed| {
        if failed.record.offset == 11.into() {
            now(seek(&shipping(), &log, &memory.store(), StartAt::Latest, &ann())).unwrap();
        }
        OnFailure::DeadLetter
    });
    let run = tokio::spawn(run.run_until(stop.clone()));
    wait_until(&run, async || next(&backend).await == RECORDS.into()).await;
    handler.poison.lock().unwrap().clear();
    retry_all(&backend).await;
    soon(wait_until(&run, async || letters(&backend).await.is_empty())).await;
    stop.cancel();
    run.await.unwrap().unwrap();
}

/// The same in a job: it ends well, with the due letters untried.
#[tokio::test]
async fn a_job_tries_due_letters_although_a_verdict_no_longer_counts() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2", "11"]);
    let (memory, log, fixed) = (
        backend.memory.clone(),
        backend.memory_log(),
        Arc::clone(&handler.poison),
    );
    let run = consumer(&backend, handler.clone()).on_failure_with(move |failed| {
        if failed.record.offset == 11.into() {
            fixed.lock().unwrap().clear();
            now(seek(&shipping(), &log, &memory.store(), StartAt::Latest, &ann())).unwrap();
            now(dead_letters::retry_all(
                &shipping(),
                &memory.store(),
                &LetterFilter::all(),
                &ann(),
            ))
            .unwrap();
        }
        OnFailure::DeadLetter
    });
    run.run_until_caught_up().await.unwrap();
    assert!(
        parked(&backend).await.is_empty(),
        "due and not tried: {:?}",
        parked(&backend).await
    );
}

/// "Ends the run with the last error after this many restarts without a commit in between."
#[tokio::test]
async fn letters_that_are_committed_count_as_progress_for_the_restart_limit() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2"]);
    let stop = CancellationToken::new();
    let run = consumer(&backend, handler.clone()).restart_limit(5);
    let run = tokio::spawn(run.run_until(stop.clone()));
    wait_until(&run, async || {
        parked(&backend).await == [2, 4, 8] && next(&backend).await == RECORDS.into()
    })
    .await;
    let tries = || handler.calls.lock().unwrap().iter().filter(|call| *call == "2").count();
    for nth in 0..10 {
        let before = tries();
        dead_letters::retry(&shipping(), &backend.memory.store(), 2.into(), &ann())
            .await
            .unwrap();
        // Each retry is tried, fails and is committed.
        while tries() == before || letters(&backend).await[0].due.is_some() {
            if run.is_finished() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if run.is_finished() {
            panic!("the run ended at retry {nth}: {:?}", run.await.unwrap());
        }
    }
    stop.cancel();
    run.await.unwrap().unwrap();
}

/// "Pauses double, with up to 100 % jitter, and reset after a commit."
#[tokio::test]
async fn the_pause_before_an_operators_retry_resets_after_the_commit_of_a_letter() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2"]);
    let stop = CancellationToken::new();
    let run = consumer(&backend, handler.clone())
        .min_backoff(Duration::from_millis(10))
        .max_backoff(Duration::from_secs(10));
    let run = tokio::spawn(run.run_until(stop.clone()));
    wait_until(&run, async || {
        parked(&backend).await == [2, 4, 8] && next(&backend).await == RECORDS.into()
    })
    .await;
    let tries = || handler.calls.lock().unwrap().iter().filter(|call| *call == "2").count();
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let before = tries();
        let started = std::time::Instant::now();
        dead_letters::retry(&shipping(), &backend.memory.store(), 2.into(), &ann())
            .await
            .unwrap();
        wait_until(&run, async || {
            tries() > before && letters(&backend).await[0].due.is_none()
        })
        .await;
        pauses.push(started.elapsed());
    }
    stop.cancel();
    run.await.unwrap().unwrap();
    assert!(
        pauses.iter().all(|pause| *pause < Duration::from_millis(500)),
        "{pauses:?}"
    );
}

/// `seek`: "[`Error::Failed`] if it would remove dead letters whose records are gone. Nothing
/// changes."
#[tokio::test]
async fn seek_back_keeps_letters_whose_records_were_deleted_one_by_one() {
    let backend = keyed(Script::default()).await;
    consumer(&backend, poisoned(&backend, &["11"]))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(parked(&backend).await, [11]);
    // As XDEL does: the end stays where it is.
    backend.deleted.store(1, Ordering::SeqCst);
    let moved = seek(
        &shipping(),
        &backend.log(),
        &backend.store(),
        StartAt::Offset(9.into()),
        &ann(),
    )
    .await;
    let report = consumer(&backend, poisoned(&backend, &[]))
        .run_until_caught_up()
        .await
        .unwrap();
    let effects = effects(&backend).await;
    assert!(
        effects["c"].contains("11") || parked(&backend).await == [11],
        "record 11 is lost: {moved:?}, {report}, {effects:?}, letters {:?}",
        parked(&backend).await
    );
}

/// The same with a log that was replaced and has grown past the letters.
#[tokio::test]
async fn seek_back_keeps_letters_of_a_log_that_was_replaced() {
    let backend = with_letters().await;
    let before = letters(&backend).await;
    let other = Memory::new();
    let log = other.log("orders").unwrap();
    let records: Vec<_> = (0..20).map(|n| NewRecord::new(format!("other {n}"))).collect();
    log.append(&records).await.unwrap();
    let store = backend.memory.store();
    let run = Consumer::essentially_once(shipping(), log.clone(), backend.store(), poisoned(&backend, &[]));
    let run = run.accept_volatile();
    let error = run.run_until_caught_up().await.unwrap_err();
    assert!(matches!(error, Error::LogChanged { .. }), "{error}");
    let moved = seek(&shipping(), &log, &store, StartAt::Earliest, &ann()).await;
    assert_eq!(
        letters(&backend).await,
        before,
        "letters removed, and no log holds their records: {moved:?}"
    );
}

/// A record that its handler handled is not to blame for a letter that cannot be parked.
#[tokio::test]
async fn a_record_is_not_skipped_because_the_next_one_cannot_be_parked() {
    let backend = keyed(Script::default()).await;
    let options = || DeadLetterOptions::new().limit(1);
    // 2 is a letter of `a`, and the limit is reached. Then 3 is handled, and 4 cannot be parked.
    let run = consumer(&backend, poisoned(&backend, &["2"]))
        .retries(0)
        .on_failure_with(|failed| match failed.record.offset == 2.into() {
            true => OnFailure::DeadLetter,
            false => OnFailure::Skip,
        })
        .dead_letters(options());
    let result = run.run_until_caught_up().await;
    let (next, effects) = (next(&backend).await, effects(&backend).await);
    assert!(result.is_err(), "{result:?}");
    assert!(
        next <= 3.into() || effects["b"].contains('3'),
        "record 3 was skipped, although its handler succeeded: position {next}, {effects:?}, {result:?}"
    );
}

/// "`retry_after`: Tries the first letter of each key again after this time [...]. The pause then
/// doubles with each failure."
#[tokio::test]
async fn a_letter_that_waited_behind_another_is_tried_again_after_retry_after() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &[]);
    consumer(&backend, handler.clone()).run_until_caught_up().await.unwrap();
    let parked_at = SystemTime::now() - Duration::from_secs(3_600);
    let letter = |offset: u64, tries| {
        let mut record = Record::new(offset.into(), parked_at, offset.to_string());
        record.key = Some("a".into());
        DeadLetter::new(record, tries, "why", parked_at)
    };
    let mut first = letter(2, 1);
    first.due = Some(parked_at);
    park(&backend, &[first, letter(4, 0)]).await;
    handler.retried.lock().unwrap().push("4");
    let options = DeadLetterOptions::new().retry_after(Duration::from_secs(60));
    let now = SystemTime::now();
    let run = consumer(&backend, handler).dead_letters(options);
    run.run_until_caught_up().await.unwrap();
    let letter = letters(&backend).await.remove(0);
    assert_eq!((letter.record.offset, letter.tries), (4.into(), 1));
    let pause = letter.due.unwrap().duration_since(now).unwrap();
    assert!(
        pause < Duration::from_secs(120),
        "its first failure makes it wait {pause:?}"
    );
}

/// "tries it again alone, with growing pauses, `retries` times", also after an operator went back.
#[tokio::test]
async fn a_record_gets_all_its_retries_again_after_seek_back() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &[]);
    handler.retried.lock().unwrap().push("2");
    let stop = CancellationToken::new();
    let run = consumer(&backend, handler.clone())
        .retries(3)
        .on_failure(OnFailure::Skip);
    let run = tokio::spawn(run.run_until(stop.clone()));
    wait_until(&run, async || next(&backend).await == RECORDS.into()).await;
    let calls = || handler.calls.lock().unwrap().iter().filter(|call| *call == "2").count();
    let first = calls();
    seek(
        &shipping(),
        &backend.memory_log(),
        &backend.memory.store(),
        StartAt::Offset(2.into()),
        &ann(),
    )
    .await
    .unwrap();
    wait_until(&run, async || calls() > first && next(&backend).await == RECORDS.into()).await;
    stop.cancel();
    let report = run.await.unwrap().unwrap();
    assert_eq!(report.failed, 2, "{report}");
    assert!(
        calls() - first >= 4,
        "{first} tries first, and {} after the seek",
        calls() - first
    );
}

/// Others on a runtime with one thread run while letters are worked off.
#[tokio::test(flavor = "current_thread")]
async fn letters_do_not_starve_a_runtime_of_one_thread() {
    let memory = Memory::new();
    let records: Vec<_> = (0..3_000).map(|n| NewRecord::new(n.to_string())).collect();
    memory.log("orders").unwrap().append(&records).await.unwrap();
    let run = |ok: bool| {
        let handler = handler_fn(move |_: &Record, _: &mut MemoryTx| {
            Box::pin(async move {
                match ok {
                    true => Ok(()),
                    false => Err(HandlerError::reject("poison")),
                }
            })
        });
        Consumer::essentially_once(shipping(), memory.log("orders").unwrap(), memory.store(), handler)
            .accept_volatile()
            .dead_letters(DeadLetterOptions::new())
    };
    run(false).run_until_caught_up().await.unwrap();
    dead_letters::retry_all(&shipping(), &memory.store(), &LetterFilter::all(), &ann())
        .await
        .unwrap();
    let longest = Arc::new(AtomicU64::new(0));
    let noted = Arc::clone(&longest);
    let ticks = tokio::spawn(async move {
        let mut last = std::time::Instant::now();
        loop {
            tokio::task::yield_now().await;
            noted.fetch_max(last.elapsed().as_millis() as u64, Ordering::SeqCst);
            last = std::time::Instant::now();
        }
    });
    let started = std::time::Instant::now();
    run(true).run_until_caught_up().await.unwrap();
    ticks.abort();
    let longest = longest.load(Ordering::SeqCst);
    assert!(longest < 300, "others waited {longest} ms of {:?}", started.elapsed());
}

/// A letter far in the future, as one whose clock was wrong when it was parked.
#[tokio::test]
async fn no_letter_waits_for_longer_than_longest_retry_after() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &[]);
    consumer(&backend, handler.clone()).run_until_caught_up().await.unwrap();
    let wrong = SystemTime::now() + Duration::from_secs(365 * 24 * 3_600);
    let mut record = Record::new(2.into(), SystemTime::now(), "again");
    record.key = Some("a".into());
    let mut letter = DeadLetter::new(record, 1, "why", wrong);
    letter.due = Some(wrong);
    park(&backend, &[letter]).await;
    consumer(&backend, handler).run_until_caught_up().await.unwrap();
    assert!(parked(&backend).await.is_empty());
}

/// A letter whose commit is refused, behind others of its key: how often are these handled, and how
/// many tries does the report count?
#[tokio::test]
async fn a_letter_whose_commit_is_refused_costs_a_few_calls_of_those_before_it() {
    const LETTERS: u64 = 60;
    let memory = Memory::new();
    let records: Vec<_> = (0..LETTERS).map(|n| NewRecord::new(n.to_string()).key("a")).collect();
    memory.log("orders").unwrap().append(&records).await.unwrap();
    let backend = Backend::of(memory, Script::default());
    let run = |poison: bool, calls: Arc<AtomicU64>| {
        let handler = handler_fn(move |record: &Record, tx: &mut ScriptedTx| {
            calls.fetch_add(1, Ordering::SeqCst);
            tx.refuse_commit |= record.offset == (LETTERS - 1).into();
            Box::pin(async move {
                match poison {
                    true => Err(HandlerError::reject("poison")),
                    false => Ok(()),
                }
            })
        });
        Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
            .dead_letters(DeadLetterOptions::new())
            .batch_time_limit(Duration::MAX)
    };
    run(true, Arc::default()).run_until_caught_up().await.unwrap();
    assert_eq!(parked(&backend).await.len() as u64, LETTERS);
    retry_all(&backend).await;
    let calls = Arc::new(AtomicU64::new(0));
    let report = run(false, Arc::clone(&calls)).run_until_caught_up().await.unwrap();
    assert_eq!(parked(&backend).await, [LETTERS - 1]);
    let calls = calls.load(Ordering::SeqCst);
    assert!(
        calls <= 3 * LETTERS && report.failed_tries <= 8,
        "{calls} calls for {LETTERS} letters: {report}"
    );
}

/// "Letters of other keys, and the log, do not wait for it." Here the handler of a letter meets a
/// backend that is away, for example another log to which it appends.
#[tokio::test]
async fn the_log_does_not_wait_for_a_letter_whose_handler_meets_a_backend_that_is_away() {
    let backend = with_letters().await;
    retry_all(&backend).await;
    let more = ["x", "y"].map(|payload| NewRecord::new(payload).key("b"));
    backend.memory_log().append(&more).await.unwrap();
    let handler = handler_fn(move |record: &Record, _: &mut ScriptedTx| {
        let away = record.payload == "2";
        Box::pin(async move {
            match away {
                true => Err(Error::unavailable("append to the log audit", "connection refused").into()),
                false => Ok(()),
            }
        })
    });
    let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .max_backoff(Duration::from_millis(10))
        .standby_after(Duration::ZERO)
        .dead_letters(DeadLetterOptions::new());
    let run = tokio::spawn(run.run());
    soon(wait_until(&run, async || next(&backend).await == (RECORDS + 2).into())).await;
    run.abort();
    assert_eq!(parked(&backend).await, [2, 4, 8]);
}

/// "Letters that are in the store already are respected and tried when they are due, even without
/// this option". Tried once, such a letter must not lose its schedule for good.
#[tokio::test]
async fn a_run_without_the_option_does_not_end_the_retries_of_a_letter() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &[]);
    handler.retried.lock().unwrap().push("2");
    let options = DeadLetterOptions::new().retry_after(Duration::from_millis(10));
    let run = consumer(&backend, handler.clone()).dead_letters(options);
    run.run_until_caught_up().await.unwrap();
    let before = letters(&backend).await.remove(0);
    let left = before.due.unwrap().duration_since(SystemTime::now());
    tokio::time::sleep(left.unwrap_or_default()).await;
    let plain = Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler);
    plain.run_until_caught_up().await.unwrap();
    let after = letters(&backend).await.remove(0);
    assert_eq!(after.tries, before.tries + 1);
    assert!(after.due > before.due, "{after:?}");
}

/// "If the active instance dies, a standby takes over when a letter is due". The standby was active
/// before, rejected a record, and was cut off before it could carry the verdict out.
#[tokio::test]
async fn a_standby_with_an_old_verdict_tries_due_letters_after_it_took_over() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["2", "11"]);
    // A: after its verdict on 11, it cannot load its position for a while.
    let script = Script::default();
    let a_backend = Backend::of(backend.memory.clone(), script.clone());
    let (cut, last_load) = (script.clone(), Arc::new(AtomicU64::new(u64::MAX)));
    let noted = Arc::clone(&last_load);
    let stop = CancellationToken::new();
    let a = consumer(&a_backend, handler.clone())
        .standby_after(Duration::from_millis(20))
        .min_backoff(Duration::from_millis(300))
        .max_backoff(Duration::from_millis(300))
        .on_failure_with(move |failed| {
            if failed.record.offset == 11.into() {
                let nth = cut.taken(Step::Position);
                noted.store(nth, Ordering::SeqCst);
                let _ = cut.clone().fail(Step::Position, nth, Fault::Before);
            }
            OnFailure::DeadLetter
        });
    let a = tokio::spawn(a.run_until(stop.clone()));
    wait_until(&a, async || {
        next(&backend).await == 11.into() || next(&backend).await == RECORDS.into()
    })
    .await;
    // B takes over meanwhile, parks 11, and dies.
    let b = tokio::spawn(consumer(&backend, handler.clone()).standby_after(Duration::ZERO).run());
    wait_until(&b, async || next(&backend).await == RECORDS.into()).await;
    wait_until(&a, async || {
        script.taken(Step::Position) > last_load.load(Ordering::SeqCst)
    })
    .await;
    b.abort();
    let _ = b.await;
    script.assert_all_struck();
    assert_eq!(parked(&backend).await, [2, 4, 8, 11]);
    handler.poison.lock().unwrap().clear();
    retry_all(&backend).await;
    soon(wait_until(&a, async || letters(&backend).await.is_empty())).await;
    stop.cancel();
    a.await.unwrap().unwrap();
}

/// A job that must never take over ends once all records are handled, as it did before letters.
#[tokio::test]
async fn a_job_that_never_takes_over_ends_although_a_letter_is_due() {
    let backend = keyed(Script::default()).await;
    let owner = tokio::spawn(consumer(&backend, poisoned(&backend, &["2"])).run());
    wait_until(&owner, async || next(&backend).await == RECORDS.into()).await;
    owner.abort();
    let _ = owner.await;
    retry_all(&backend).await;
    let job = consumer(&backend, poisoned(&backend, &[])).standby_after(Duration::MAX);
    soon(job.run_until_caught_up()).await.unwrap();
}
