//! Records that are passed by the next session, together with others.

use essentially_once::consumer::{DeadLetterOptions, OnFailure, dead_letters};

use super::{
    letters::{keyed, next, parked, poisoned, retry_all, with_letters},
    letters_in_trouble::{Calls, listing, quick},
    *,
};

/// 2 is poison, and 1 fails in this way from its second call on.
fn contradicts(fails: fn(&'static str) -> HandlerError) -> impl Handler<ScriptedTx> + Clone {
    let calls = Calls::default();
    listing(move |payload, _| match (payload, calls.note(payload)) {
        ("2", _) => Err(HandlerError::reject("2 is poison")),
        ("1", before) if before > 0 => Err(fails("1 refuses a second call")),
        _ => Ok(()),
    })
}

#[tokio::test]
async fn a_record_in_front_of_a_rejected_one_may_fail_when_it_is_handled_again() {
    for fails in [HandlerError::retry, HandlerError::reject] {
        let backend = keyed(Script::default()).await;
        let run = quick(&backend, contradicts(fails)).restart_limit(50);
        let report = run.run_until_caught_up().await.unwrap();
        assert_eq!((report.handled, report.parked), (5, 7), "{report}");
        assert_eq!(parked(&backend).await, [1, 2, 3, 4, 6, 8, 9]);
    }
}

#[tokio::test]
async fn a_run_that_stops_at_a_record_commits_those_before_it() {
    // It stops at 1, after a verdict on 2.
    let backend = keyed(Script::default()).await;
    let run = quick(&backend, contradicts(HandlerError::reject)).on_failure_with(|failed| {
        match failed.record.payload == "1" {
            true => OnFailure::Stop,
            false => OnFailure::DeadLetter,
        }
    });
    let error = run.restart_limit(50).run_until_caught_up().await.unwrap_err();
    assert!(error.to_string().contains("rejected"), "{error}");
    assert_eq!(next(&backend).await, 1.into());

    for policy in [OnFailure::Stop, OnFailure::DeadLetter] {
        let backend = keyed(Script::default()).await;
        // Without `dead_letters`.
        let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), poisoned(&backend, &["2"]));
        run.on_failure(policy).run_until_caught_up().await.unwrap_err();
        assert_eq!(next(&backend).await, 2.into(), "{policy:?}");
        skip(
            &shipping(),
            &backend.memory_log(),
            &backend.memory.store(),
            2.into(),
            &ann(),
        )
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn a_letter_that_is_one_too_many_does_not_hold_up_those_before_it() {
    let backend = with_letters().await;
    let more = [NewRecord::new("12").key("a"), NewRecord::new("13").key("z")];
    backend.memory_log().append(&more).await.unwrap();
    let calls = Calls::default();
    let counted = calls.clone();
    let handler = listing(move |payload, _| {
        counted.note(payload);
        Err(HandlerError::reject("poison"))
    });
    let run = quick(&backend, handler).dead_letters(DeadLetterOptions::new().limit(4));
    let error = run
        .restart_limit(0)
        .run_until_caught_up()
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("the record at 13") && error.contains("4 is its limit"),
        "{error}"
    );
    assert_eq!(parked(&backend).await, [2, 4, 8, 12]);
    assert_eq!(next(&backend).await, 13.into());
    assert_eq!(calls.of("12"), 0);
}

#[tokio::test]
async fn a_job_under_at_least_once_tries_the_letters_although_the_record_behind_its_end_is_poison() {
    let backend = keyed(Script::default()).await;
    let calls = Calls::default();
    let handler = |poison: &'static [&'static str]| {
        let (calls, log) = (calls.clone(), backend.memory_log());
        handler_fn(move |record: &Record, (): &mut ()| {
            let (calls, log) = (calls.clone(), log.clone());
            let payload = String::from_utf8_lossy(&record.payload).into_owned();
            Box::pin(async move {
                if poison.contains(&&*payload) {
                    return Err(HandlerError::reject("poison"));
                }
                if payload == "12" && calls.note("12") == 0 {
                    log.append(&[NewRecord::new("behind the end")]).await?;
                    // It is read ahead, and is in the batch of the record at the end.
                    for _ in 0..100 {
                        tokio::task::yield_now().await;
                    }
                }
                Ok(())
            })
        })
    };
    let run = |poison| {
        Consumer::at_least_once(shipping(), backend.log(), backend.store(), handler(poison))
            .max_batch(2)
            .min_backoff(Duration::ZERO)
            .max_backoff(Duration::ZERO)
            .dead_letters(DeadLetterOptions::new())
            .run_until_caught_up()
    };
    run(&["1", "2", "5", "7"]).await.unwrap();
    assert_eq!(retry_all(&backend).await, 4);
    let more = ["12", "13", "14"].map(NewRecord::new);
    backend.memory_log().append(&more).await.unwrap();
    run(&["behind the end"]).await.unwrap();
    let left = dead_letters::list(&shipping(), &backend.memory.store(), None, 100).await;
    assert!(left.unwrap().iter().all(|letter| letter.record.offset > 14.into()));
}
