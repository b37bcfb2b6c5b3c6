//! Records and letters whose process dies while it handles them.

use std::{future::pending, sync::Mutex};

use essentially_once::{
    Epoch, Origin,
    backend::{Durability, Position},
    consumer::{DeadLetterOptions, EssentiallyOnce, OnFailure, Report, dead_letters, pause, resume},
};
use support::ScriptedStore;
use tokio::sync::Notify;

use super::{
    letters::{Lists, all_in_order, effects, keyed, letters, parked, poisoned, retry_all, with_letters},
    *,
};

/// A handler whose process dies of some payloads: it then never returns, and the test drops the run
/// as a crash does.
#[derive(Clone)]
struct Mortal {
    lists: Lists,
    killers: Arc<Mutex<Vec<&'static str>>>,
    dies: Arc<Notify>,
}

#[essentially_once::async_trait]
impl Handler<ScriptedTx> for Mortal {
    async fn handle(&mut self, record: &Record, tx: &mut ScriptedTx) -> Result<(), HandlerError> {
        let is_killer = {
            let killers = self.killers.lock().unwrap();
            killers.iter().any(|killer| killer.as_bytes() == record.payload)
        };
        if is_killer {
            self.dies.notify_one();
            pending::<()>().await;
        }
        self.lists.handle(record, tx).await
    }
}

fn mortal(backend: &Backend, killers: &[&'static str]) -> Mortal {
    Mortal {
        lists: poisoned(backend, &[]),
        killers: Arc::new(Mutex::new(killers.to_vec())),
        dies: Arc::default(),
    }
}

type MortalConsumer = Consumer<ScriptedStore, Mortal, EssentiallyOnce>;

fn consumer(backend: &Backend, handler: &Mortal) -> MortalConsumer {
    Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler.clone())
        .max_batch(50)
        .standby_after(Duration::from_millis(20))
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
}

/// Runs to the end, or to the death of the process, which is `None`.
async fn live(run: MortalConsumer, handler: &Mortal) -> Option<Result<Report, Error>> {
    tokio::select! {
        result = run.run_until_caught_up() => Some(result),
        () = handler.dies.notified() => None,
    }
}

/// How often the process dies before a run ends, and how that run ends.
async fn deaths(run: impl Fn() -> MortalConsumer, handler: &Mortal) -> (u32, Result<Report, Error>) {
    for deaths in 0..20 {
        if let Some(result) = live(run(), handler).await {
            return (deaths, result);
        }
    }
    panic!("it dies forever");
}

#[tokio::test]
async fn a_crash_loop_ends_in_a_stop_that_names_the_record() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &["7"]);
    let (died, result) = deaths(|| consumer(&backend, &handler), &handler).await;
    let error = result.unwrap_err();
    // The first death leaves no mark, since nobody suspects anything yet.
    assert_eq!(died, 4);
    assert!(
        matches!(&error, Error::Unhandled { offset, .. } if *offset == 7.into()),
        "{error}"
    );
    assert!(error.to_string().contains("3 instances in a row died"), "{error}");
    assert_eq!(backend.position(&shipping()).await.unwrap().next, 7.into());
    // After the stop, it has all its lives again.
    let (died, result) = deaths(|| consumer(&backend, &handler), &handler).await;
    assert!(result.is_err());
    assert_eq!(died, 4);
    handler.killers.lock().unwrap().clear();
    live(consumer(&backend, &handler), &handler).await.unwrap().unwrap();
    assert_eq!(effects(&backend).await, all_in_order());
}

#[tokio::test]
async fn a_crash_loop_ends_in_a_dead_letter_that_waits_for_an_operator() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &["2"]);
    let options = DeadLetterOptions::new().retry_after(Duration::from_nanos(1));
    let run = || consumer(&backend, &handler).max_deaths(1).dead_letters(options.clone());
    let (died, result) = deaths(run, &handler).await;
    assert_eq!(died, 2);
    assert_eq!(result.unwrap().parked, 3);
    assert_eq!(parked(&backend).await, [2, 4, 8]);
    let letter = &letters(&backend).await[0];
    assert!(
        letter.last_reason.contains("1 instances in a row died"),
        "{}",
        letter.last_reason
    );
    assert_eq!(letter.due, None);
    handler.killers.lock().unwrap().clear();
    retry_all(&backend).await;
    live(run(), &handler).await.unwrap().unwrap();
    assert_eq!(effects(&backend).await, all_in_order());
}

#[tokio::test]
async fn a_record_that_kills_is_never_skipped() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &["2"]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (_, result) = deaths(
        || {
            let seen = Arc::clone(&seen);
            consumer(&backend, &handler).on_failure_with(move |failed| {
                seen.lock().unwrap().push(failed.deaths);
                OnFailure::Skip
            })
        },
        &handler,
    )
    .await;
    assert!(matches!(result, Err(Error::Unhandled { .. })));
    assert_eq!(*seen.lock().unwrap(), [3]);
}

#[tokio::test]
async fn the_killer_is_found_in_the_middle_of_a_batch() {
    let memory = Memory::new();
    let records: Vec<_> = (0..120).map(|n: u32| NewRecord::new(n.to_string())).collect();
    memory.log("orders").unwrap().append(&records).await.unwrap();
    let backend = Backend::of(memory, Script::default());
    let handler = mortal(&backend, &["99"]);
    let run = || {
        consumer(&backend, &handler)
            .max_batch(100)
            .dead_letters(DeadLetterOptions::new())
    };
    let (died, result) = deaths(run, &handler).await;
    assert_eq!(died, 4);
    assert_eq!(result.unwrap().parked, 1);
    assert_eq!(parked(&backend).await, [99]);
}

#[tokio::test]
async fn a_letter_that_kills_waits_for_an_operator_and_the_log_goes_on() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &[]);
    *handler.lists.poison.lock().unwrap() = vec!["2"];
    let run = || {
        consumer(&backend, &handler)
            .max_deaths(2)
            .dead_letters(DeadLetterOptions::new())
    };
    live(run(), &handler).await.unwrap().unwrap();
    handler.lists.poison.lock().unwrap().clear();
    handler.killers.lock().unwrap().push("2");
    retry_all(&backend).await;
    backend
        .memory_log()
        .append(&[NewRecord::new("12").key("b")])
        .await
        .unwrap();
    let (died, result) = deaths(run, &handler).await;
    assert_eq!(died, 3);
    result.unwrap();
    let letter = &letters(&backend).await[0];
    assert_eq!((letter.due, letter.tries), (None, 2));
    assert!(
        letter.last_reason.contains("2 instances in a row died"),
        "{}",
        letter.last_reason
    );
    assert_eq!(effects(&backend).await["b"], "1 3 6 9 12 ");
    handler.killers.lock().unwrap().clear();
    retry_all(&backend).await;
    live(run(), &handler).await.unwrap().unwrap();
    assert_eq!(effects(&backend).await["a"], "0 2 4 8 ");
}

/// A letter that fails ahead of it must not reset the count of a record that kills.
#[tokio::test]
async fn a_letter_that_fails_does_not_hide_a_record_that_kills() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &["7"]);
    *handler.lists.retried.lock().unwrap() = vec!["2"];
    let options = DeadLetterOptions::new().retry_after(Duration::from_nanos(1));
    let options = options.longest_retry_after(Duration::from_nanos(1));
    let run = || consumer(&backend, &handler).retries(0).dead_letters(options.clone());
    let (died, result) = deaths(run, &handler).await;
    assert_eq!(died, 4);
    result.unwrap();
    assert_eq!(parked(&backend).await, [2, 4, 7, 8, 11]);
}

/// A process that is killed while nothing happens kills no record, however often.
#[tokio::test]
async fn idle_deaths_blame_nobody() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &[]);
    for day in 0..10 {
        let run = tokio::spawn(consumer(&backend, &handler).max_deaths(1).run());
        let end = Offset::from(RECORDS + day);
        letters::wait_until(&run, async || letters::next(&backend).await == end).await;
        run.abort();
        let _ = run.await;
        // What arrives in between is handled by the next process.
        let more = [NewRecord::new((RECORDS + day).to_string())];
        backend.memory_log().append(&more).await.unwrap();
    }
}

/// A clean stop clears the mark, and a new process counts from zero.
#[tokio::test]
async fn a_clean_stop_clears_the_count() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &["7"]);
    for _ in 0..5 {
        for _ in 0..3 {
            assert!(live(consumer(&backend, &handler), &handler).await.is_none());
        }
        // Stopped while it has the record in hand.
        let stop = CancellationToken::new();
        let run = consumer(&backend, &handler)
            .stop_grace(Duration::ZERO)
            .run_until(stop.clone());
        let run = tokio::spawn(run);
        handler.dies.notified().await;
        stop.cancel();
        run.await.unwrap().unwrap();
        assert_eq!(backend.position(&shipping()).await.unwrap().owner, None);
    }
}

/// A store through which an instance shows no sign of life.
struct Silent(ScriptedStore);

#[essentially_once::async_trait]
impl OffsetStore for Silent {
    type Tx = ScriptedTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.0.position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<ScriptedTx, Error> {
        self.0.begin(consumer).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.0.durability().await
    }
}

/// An instance that lost the position to others while it lived does not count itself.
#[tokio::test]
async fn a_fenced_instance_that_lives_is_not_counted_again() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &["0"]);
    assert!(live(consumer(&backend, &handler), &handler).await.is_none());
    let (entered, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (on_enter, may_go_on) = (Arc::clone(&entered), Arc::clone(&go_on));
    let slow = handler_fn(move |record: &Record, _: &mut ScriptedTx| {
        let (on_enter, may_go_on) = (Arc::clone(&on_enter), Arc::clone(&may_go_on));
        let is_slow = record.payload == "0";
        Box::pin(async move {
            if is_slow {
                on_enter.notify_one();
                may_go_on.notified().await;
            }
            Ok(())
        })
    });
    // It takes over, and is the first to suspect the record.
    let lives = Consumer::essentially_once(shipping(), backend.log(), Silent(backend.store()), slow)
        .standby_after(Duration::from_millis(20))
        .max_deaths(2)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO);
    let lives = tokio::spawn(lives.run_until_caught_up());
    entered.notified().await;
    // Another one takes it for dead, is the second to suspect the record, and dies of it.
    assert!(live(consumer(&backend, &handler), &handler).await.is_none());
    // The first one is fenced and takes over again: the third, if it counted itself.
    go_on.notify_one();
    entered.notified().await;
    go_on.notify_one();
    assert_eq!(lives.await.unwrap().unwrap().handled, RECORDS);
}

#[tokio::test]
async fn a_skip_does_not_clear_the_count_of_a_letter() {
    let backend = with_letters().await;
    retry_all(&backend).await;
    let handler = mortal(&backend, &["2"]);
    let options = DeadLetterOptions::new();
    let run = || consumer(&backend, &handler).max_deaths(2).dead_letters(options.clone());
    let mut died = 0;
    while live(run(), &handler).await.is_none() {
        died += 1;
        let next = backend.position(&shipping()).await.unwrap().next;
        backend.memory_log().append(&[NewRecord::new("x")]).await.unwrap();
        skip(
            &shipping(),
            &backend.memory_log(),
            &backend.memory.store(),
            next,
            &ann(),
        )
        .await
        .unwrap();
        assert!(died < 10, "it dies forever");
    }
    assert_eq!(died, 3);
    assert_eq!(letters(&backend).await[0].due, None);
}

/// Instances that die when they have passed a duplicate die of something else.
#[tokio::test]
async fn a_record_that_its_handler_does_not_get_is_not_to_blame() {
    let memory = Memory::new();
    let origin = Origin::new(ProducerId::new("web").unwrap(), Epoch::STABLE, 1);
    let record = NewRecord::new("0").origin(origin);
    memory
        .log("orders")
        .unwrap()
        .append(std::slice::from_ref(&record))
        .await
        .unwrap();
    let run = |script| {
        let backend = Backend::of(memory.clone(), script);
        consumer(&backend, &mortal(&backend, &[]))
            .max_batch(1)
            .max_deaths(1)
            .run_until_caught_up()
    };
    assert_eq!(run(Script::default()).await.unwrap().handled, 1);
    memory.log("orders").unwrap().append(&vec![record; 5]).await.unwrap();
    for _ in 0..4 {
        // The first commit takes the position over, and the second one passes a duplicate.
        let script = Script::default().fail(Step::Commit, 1, Fault::HangAfter);
        tokio::select! {
            ended = run(script.clone()) => panic!("{ended:?}"),
            () = async { while script.taken(Step::Commit) < 2 { tokio::task::yield_now().await } } => {}
        }
        script.assert_all_struck();
    }
    assert_eq!(run(Script::default()).await.unwrap().duplicates, 1);
}

#[tokio::test]
async fn under_at_least_once_a_crash_loop_ends_too() {
    let backend = keyed(Script::default()).await;
    let dies = Arc::new(Notify::new());
    let run = || {
        let dies = Arc::clone(&dies);
        let handler = handler_fn(move |record: &Record, (): &mut ()| {
            let (is_killer, dies) = (record.payload == "7", Arc::clone(&dies));
            Box::pin(async move {
                if is_killer {
                    dies.notify_one();
                    pending::<()>().await;
                }
                Ok(())
            })
        });
        Consumer::at_least_once(shipping(), backend.log(), backend.store(), handler)
            .standby_after(Duration::from_millis(20))
            .dead_letters(DeadLetterOptions::new())
    };
    let mut died = 0;
    let report = loop {
        tokio::select! {
            report = run().run_until_caught_up() => break report.unwrap(),
            () = dies.notified() => died += 1,
        }
        assert!(died < 20, "it dies forever");
    };
    assert_eq!((died, report.parked), (4, 2));
    assert_eq!(parked(&backend).await, [7, 11]);
}

#[tokio::test]
async fn a_limit_of_zero_deaths_is_refused() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &[]);
    let result = consumer(&backend, &handler).max_deaths(0).run_until_caught_up().await;
    assert!(matches!(
        result,
        Err(Error::InvalidSetting {
            setting: "max_deaths",
            ..
        })
    ));
}

#[tokio::test]
async fn letters_do_not_use_up_the_suspicion_of_a_record() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &["7"]);
    *handler.lists.retried.lock().unwrap() = vec!["2"];
    let always = Duration::from_nanos(1);
    let options = DeadLetterOptions::new().retry_after(always).longest_retry_after(always);
    let run = || {
        consumer(&backend, &handler)
            .max_batch(1)
            .retries(0)
            .dead_letters(options.clone())
    };
    let (died, result) = deaths(run, &handler).await;
    result.unwrap();
    assert_eq!(died, 4);
}

/// A record that passes must not reset the count of a letter that kills.
#[tokio::test]
async fn a_record_that_passes_does_not_hide_a_letter_that_kills() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &[]);
    *handler.lists.poison.lock().unwrap() = vec!["2", "11"];
    let run = || consumer(&backend, &handler).dead_letters(DeadLetterOptions::new());
    live(run(), &handler).await.unwrap().unwrap();
    handler.lists.poison.lock().unwrap().clear();
    handler.killers.lock().unwrap().push("11");
    // The letter at 2 is due first and is handled. A record is handled before the next one.
    retry_all(&backend).await;
    let more: Vec<_> = (0..9).map(|n: u32| NewRecord::new(format!("more {n}"))).collect();
    backend.memory_log().append(&more).await.unwrap();
    let (died, result) = deaths(run, &handler).await;
    result.unwrap();
    assert!(died <= 4, "{died}");
    assert_eq!(parked(&backend).await, [11]);
}

/// An operator who edits or retries a letter starts a new count.
#[tokio::test]
async fn an_edited_letter_is_not_blamed_for_what_it_was() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &[]);
    *handler.lists.poison.lock().unwrap() = vec!["2"];
    let run = || consumer(&backend, &handler).dead_letters(DeadLetterOptions::new());
    live(run(), &handler).await.unwrap().unwrap();
    handler.lists.poison.lock().unwrap().clear();
    handler.killers.lock().unwrap().push("2");
    retry_all(&backend).await;
    for _ in 0..4 {
        assert!(live(run(), &handler).await.is_none());
    }
    let letter = letters(&backend).await.remove(0);
    let mut mended = NewRecord::from(&letter.record);
    mended.payload = "2!".into();
    dead_letters::edit(&shipping(), &backend.memory.store(), &letter, &mended, &ann())
        .await
        .unwrap();
    live(run(), &handler).await.unwrap().unwrap();
    assert!(letters(&backend).await.is_empty());
}

/// A pause in which the handler is mended starts a new count.
#[tokio::test]
async fn resuming_starts_a_new_count() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &["7"]);
    for _ in 0..4 {
        assert!(live(consumer(&backend, &handler), &handler).await.is_none());
    }
    let store = backend.memory.store();
    pause(&shipping(), &store, &ann()).await.unwrap();
    handler.killers.lock().unwrap().clear();
    resume(&shipping(), &store, &ann()).await.unwrap();
    live(consumer(&backend, &handler), &handler).await.unwrap().unwrap();
    assert_eq!(effects(&backend).await, all_in_order());
}

/// Deploys stop each instance while it has a record in hand, and start the next.
#[tokio::test]
async fn rolling_deploys_blame_nobody() {
    let backend = keyed(Script::default()).await;
    let handler = mortal(&backend, &["7"]);
    for _ in 0..10 {
        let stop = CancellationToken::new();
        let run = consumer(&backend, &handler).max_deaths(1).stop_grace(Duration::ZERO);
        let run = tokio::spawn(run.run_until(stop.clone()));
        handler.dies.notified().await;
        stop.cancel();
        run.await.unwrap().unwrap();
    }
    handler.killers.lock().unwrap().clear();
    live(consumer(&backend, &handler).max_deaths(1), &handler)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(effects(&backend).await, all_in_order());
}

/// A process with two consumers dies of a record of one of them. The other one goes on with each
/// process, so none of its records is in hand twice.
#[tokio::test]
async fn a_consumer_is_not_blamed_for_the_deaths_of_another_in_its_process() {
    let backend = keyed(Script::default()).await;
    let killer = mortal(&backend, &["7"]);
    let other = mortal(&backend, &[]);
    let billing = || ConsumerId::new("billing").unwrap();
    for died in 0..3 {
        let more = [NewRecord::new(format!("more {died}"))];
        backend.memory_log().append(&more).await.unwrap();
        let innocent = Consumer::essentially_once(billing(), backend.log(), backend.store(), other.clone())
            .standby_after(Duration::from_millis(20))
            .max_deaths(1);
        let innocent = tokio::spawn(innocent.run());
        let end = Offset::from(RECORDS + died + 1);
        let billed = async || {
            let position = backend.position(&billing()).await;
            position.is_some_and(|position| position.next == end)
        };
        letters::wait_until(&innocent, billed).await;
        assert!(live(consumer(&backend, &killer), &killer).await.is_none());
        innocent.abort();
        let _ = innocent.await;
    }
}
