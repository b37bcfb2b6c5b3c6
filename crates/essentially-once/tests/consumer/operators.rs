//! What operators do by hand: pausing, the journal, filters, edits, and plans.

use std::time::SystemTime;

use essentially_once::{
    backend::{DeadLetter, DeadLetters as _},
    consumer::{
        JournalEntry, OperatorAction,
        dead_letters::{self, LetterFilter},
        pause, plan_seek, resume, seek_as_planned,
    },
};

use super::{
    letters::{all_in_order, consumer, effects, keyed, letters, next, parked, poisoned, wait_until, with_letters},
    *,
};

async fn journal(backend: &Backend) -> Vec<JournalEntry> {
    backend.position(&shipping()).await.unwrap().journal.entries().to_vec()
}

pub(super) async fn actions(backend: &Backend) -> Vec<OperatorAction> {
    journal(backend).await.iter().map(|entry| entry.action).collect()
}

#[tokio::test]
async fn a_running_consumer_pauses_and_resumes_where_it_was() {
    let backend = keyed(Script::default()).await;
    let run = tokio::spawn(consumer(&backend, poisoned(&backend, &[])).run());
    wait_until(&run, async || next(&backend).await == RECORDS.into()).await;
    let store = backend.memory.store();
    pause(&shipping(), &store, &ann()).await.unwrap();
    backend.memory_log().append(&[NewRecord::new("12")]).await.unwrap();
    // An instance that starts meanwhile waits too, and a job says why it does not run.
    let second = tokio::spawn(consumer(&backend, poisoned(&backend, &[])).run());
    let job = consumer(&backend, poisoned(&backend, &[])).run_until_caught_up();
    let error = job.await.unwrap_err().to_string();
    assert!(
        error.contains("paused") && error.contains("\"ann\"") && error.contains("a test"),
        "{error}"
    );
    // Both have had the time to look at the record.
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }
    let paused = backend.position(&shipping()).await.unwrap();
    assert_eq!(paused.next, RECORDS.into());
    resume(&shipping(), &store, &ann()).await.unwrap();
    wait_until(&run, async || next(&backend).await == (RECORDS + 1).into()).await;
    assert_eq!(actions(&backend).await, [OperatorAction::Pause, OperatorAction::Resume]);
    run.abort();
    second.abort();
}

#[tokio::test]
async fn a_paused_consumer_stops_when_it_is_asked_to() {
    let backend = keyed(Script::default()).await;
    consumer(&backend, poisoned(&backend, &[]))
        .run_until_caught_up()
        .await
        .unwrap();
    pause(&shipping(), &backend.memory.store(), &ann()).await.unwrap();
    let stop = CancellationToken::new();
    let run = tokio::spawn(consumer(&backend, poisoned(&backend, &[])).run_until(stop.clone()));
    tokio::task::yield_now().await;
    stop.cancel();
    assert_eq!(run.await.unwrap().unwrap().handled, 0);
}

#[tokio::test]
async fn a_paused_consumer_tries_no_letters() {
    let backend = with_letters().await;
    let store = backend.memory.store();
    pause(&shipping(), &store, &ann()).await.unwrap();
    dead_letters::retry(&shipping(), &store, 2.into(), &ann())
        .await
        .unwrap();
    let run = tokio::spawn(consumer(&backend, poisoned(&backend, &[])).run());
    // The other verbs work meanwhile, and nothing fences them.
    let all = letters(&backend).await;
    dead_letters::discard(&shipping(), &store, &all[1], &ann())
        .await
        .unwrap();
    assert_eq!(parked(&backend).await, [2, 8]);
    resume(&shipping(), &store, &ann()).await.unwrap();
    wait_until(&run, async || parked(&backend).await.is_empty()).await;
    run.abort();
}

#[tokio::test]
async fn every_delivery_pauses() {
    let backend = keyed(Script::default()).await;
    consumer(&backend, poisoned(&backend, &[]))
        .run_until_caught_up()
        .await
        .unwrap();
    pause(&shipping(), &backend.memory.store(), &ann()).await.unwrap();
    let handler = || handler_fn(|_: &Record, (): &mut ()| Box::pin(async { Ok(()) }));
    let run = Consumer::at_least_once(shipping(), backend.log(), backend.store(), handler());
    assert!(
        run.run_until_caught_up()
            .await
            .unwrap_err()
            .to_string()
            .contains("paused")
    );
    let run = Consumer::at_most_once(shipping(), backend.log(), backend.store(), handler());
    assert!(
        run.run_until_caught_up()
            .await
            .unwrap_err()
            .to_string()
            .contains("paused")
    );
}

#[tokio::test]
async fn a_change_that_would_change_nothing_is_refused_and_not_in_the_journal() {
    let backend = with_letters().await;
    let store = backend.memory.store();
    assert!(resume(&shipping(), &store, &ann()).await.is_err());
    pause(&shipping(), &store, &ann()).await.unwrap();
    let error = pause(&shipping(), &store, &Operator::new("bob")).await.unwrap_err();
    assert!(error.to_string().contains("\"ann\""), "{error}");
    dead_letters::retry(&shipping(), &store, 2.into(), &ann())
        .await
        .unwrap();
    let error = dead_letters::retry(&shipping(), &store, 2.into(), &ann())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("due already"), "{error}");
    let all = LetterFilter::all();
    assert_eq!(
        dead_letters::retry_all(&shipping(), &store, &all, &ann())
            .await
            .unwrap(),
        0
    );
    let first = OperatorAction::Retry {
        first: 2.into(),
        letters: 1,
    };
    assert_eq!(actions(&backend).await, [OperatorAction::Pause, first]);
    let nobody = ConsumerId::new("nobody").unwrap();
    let error = pause(&nobody, &store, &ann()).await.unwrap_err();
    assert!(error.to_string().contains("no position"), "{error}");
}

#[tokio::test]
async fn the_journal_says_who_did_what_and_why_and_survives_commits() {
    let backend = with_letters().await;
    let (log, store) = (backend.log(), backend.memory.store());
    let started = SystemTime::now() - Duration::from_secs(1);
    let seen = letters(&backend).await;
    dead_letters::discard(&shipping(), &store, &seen[0], &ann())
        .await
        .unwrap();
    seek(
        &shipping(),
        &log,
        &store,
        StartAt::Offset(5.into()),
        &Operator::new("bob"),
    )
    .await
    .unwrap();
    skip(&shipping(), &log, &store, 5.into(), &ann()).await.unwrap();
    consumer(&backend, poisoned(&backend, &[]))
        .run_until_caught_up()
        .await
        .unwrap();
    let entries = journal(&backend).await;
    let actions: Vec<_> = entries.iter().map(|entry| entry.action).collect();
    let discarded = OperatorAction::Discard {
        first: 2.into(),
        letters: 1,
    };
    let moved = OperatorAction::Seek {
        from: RECORDS.into(),
        to: 5.into(),
        letters_removed: 1,
    };
    assert_eq!(actions, [discarded, moved, OperatorAction::Skip(5.into())]);
    assert_eq!((&*entries[0].by, &*entries[0].reason), ("ann", "a test"));
    assert_eq!((&*entries[1].by, &*entries[1].reason), ("bob", ""));
    assert!(entries.iter().all(|entry| entry.at >= started));
}

#[tokio::test]
async fn filters_select_by_key_reason_and_time() {
    let backend = keyed(Script::default()).await;
    let run = consumer(&backend, poisoned(&backend, &["2", "3", "5"]));
    run.run_until_caught_up().await.unwrap();
    let store = backend.memory.store();
    let find = async |filter: LetterFilter, after: Option<u64>, limit| {
        let after = after.map(Offset::from);
        let found = dead_letters::find(&shipping(), &store, &filter, after, limit)
            .await
            .unwrap();
        found.iter().map(|letter| letter.record.offset.lo()).collect::<Vec<_>>()
    };
    let all = LetterFilter::all;
    assert_eq!(find(all(), None, 9).await, [2, 3, 4, 5, 6, 8, 9]);
    assert_eq!(find(all().key("a"), None, 9).await, [2, 4, 8]);
    assert_eq!(find(all().key("a"), Some(2), 1).await, [4]);
    assert_eq!(find(all().reason("poison"), None, 9).await, [2, 3, 5]);
    assert_eq!(find(all().reason("poison").key("b"), None, 9).await, [3]);
    let later = SystemTime::now() + Duration::from_secs(60);
    assert_eq!(find(all().parked_from(later), None, 9).await, [0; 0]);
    assert_eq!(find(all().parked_before(later).key("b"), None, 9).await, [3, 6, 9]);
    let second = dead_letters::get(&shipping(), &store, 3.into()).await.unwrap();
    assert_eq!(second.unwrap().last_reason, "3 is poison");
    assert!(
        dead_letters::get(&shipping(), &store, 7.into())
            .await
            .unwrap()
            .is_none()
    );
    // Only those letters are made due.
    let of_b = all().key("b");
    assert_eq!(
        dead_letters::retry_all(&shipping(), &store, &of_b, &ann())
            .await
            .unwrap(),
        1
    );
    consumer(&backend, poisoned(&backend, &[]))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(parked(&backend).await, [2, 4, 5, 8]);
}

#[tokio::test]
async fn an_edited_letter_is_handled_in_its_place_and_keeps_its_original_until_then() {
    let backend = with_letters().await;
    let store = backend.memory.store();
    let seen = letters(&backend).await;
    let mut mended = NewRecord::from(&seen[0].record);
    mended.payload = "2!".into();
    dead_letters::edit(&shipping(), &store, &seen[0], &mended, &ann())
        .await
        .unwrap();
    let edited = &letters(&backend).await[0];
    let edit = edited.edit.as_ref().unwrap();
    assert_eq!(
        (&edit.original, &*edit.by, &*edit.reason),
        (&seen[0].record, "ann", "a test")
    );
    assert_eq!(actions(&backend).await, [OperatorAction::Edit(2.into())]);
    // It is conditional on what the operator saw, and must change something.
    let refused = async |letter: &DeadLetter, new: &NewRecord| {
        let error = dead_letters::edit(&shipping(), &store, letter, new, &ann())
            .await
            .unwrap_err();
        error.to_string()
    };
    assert!(refused(&seen[0], &mended).await.contains("changed since"));
    assert!(refused(edited, &mended).await.contains("is the same"));
    let mut other_key = mended.clone();
    other_key.key = Some("b".into());
    assert!(refused(edited, &other_key).await.contains("key and origin"));
    consumer(&backend, poisoned(&backend, &["2"]))
        .run_until_caught_up()
        .await
        .unwrap();
    assert!(letters(&backend).await.is_empty());
    let mut expected = all_in_order();
    expected.insert("a", "0 2! 4 8 ".into());
    assert_eq!(effects(&backend).await, expected);
}

/// `seek` compares a letter with the record that the log holds, not with the edited one.
#[tokio::test]
async fn seek_back_removes_an_edited_letter_whose_record_is_in_the_log() {
    let backend = with_letters().await;
    let (log, store) = (backend.memory_log(), backend.memory.store());
    let seen = letters(&backend).await;
    let mut mended = NewRecord::from(&seen[0].record);
    mended.payload = "2!".into();
    dead_letters::edit(&shipping(), &store, &seen[0], &mended, &ann())
        .await
        .unwrap();
    let plan = plan_seek(&shipping(), &log, &store, StartAt::Earliest).await.unwrap();
    assert_eq!((plan.from, plan.to), (Some(RECORDS.into()), Offset::ZERO));
    assert_eq!((plan.records, plan.letters_removed), (Some(RECORDS), 3));
    assert_eq!(letters(&backend).await.len(), 3, "a plan changes nothing");
    seek(&shipping(), &log, &store, StartAt::Earliest, &ann())
        .await
        .unwrap();
    assert!(letters(&backend).await.is_empty());
    let plan = plan_seek(&shipping(), &log, &store, StartAt::Latest).await.unwrap();
    assert_eq!((plan.records, plan.letters_removed), (Some(RECORDS), 0));
}

/// A malformed entry's key and origin are what the operator says.
#[tokio::test]
async fn an_edited_malformed_letter_joins_its_key_and_marks_its_origin() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["4"]);
    consumer(&backend, handler).run_until_caught_up().await.unwrap();
    assert_eq!(parked(&backend).await, [4, 8]);
    let store = backend.memory.store();
    let origin = essentially_once::Origin::new(ProducerId::new("web").unwrap(), essentially_once::Epoch::STABLE, 7);
    // One malformed letter in front of the letters of its key, and one behind.
    let mut tx = store.begin(&shipping()).await.unwrap();
    for offset in [3_u64, 11] {
        let mut record = Record::new(offset.into(), SystemTime::now(), "{");
        record.malformed = Some("no end".into());
        tx.park(&DeadLetter::new(record, 1, "no end", SystemTime::now()))
            .await
            .unwrap();
    }
    let position = backend.position(&shipping()).await.unwrap();
    let mut advance = essentially_once::backend::Advance::new(
        position.log,
        position.next,
        position.revision,
        position.revision.next_epoch(),
    );
    advance.owner = position.owner;
    essentially_once::backend::Transaction::commit(tx, advance)
        .await
        .unwrap();
    let at = async |offset: u64| {
        dead_letters::get(&shipping(), &store, offset.into())
            .await
            .unwrap()
            .unwrap()
    };
    let new = |payload: &'static str| NewRecord::new(payload).key("a");
    dead_letters::edit(
        &shipping(),
        &store,
        &at(11).await,
        &new("late").origin(origin.clone()),
        &ann(),
    )
    .await
    .unwrap();
    let late = at(11).await;
    assert_eq!(
        (late.due, late.record.malformed),
        (None, None),
        "it waits behind the others"
    );
    let double = dead_letters::edit(
        &shipping(),
        &store,
        &at(3).await,
        &new("x").origin(origin.clone()),
        &ann(),
    )
    .await;
    assert!(double.unwrap_err().to_string().contains("that origin"));
    dead_letters::retry(&shipping(), &store, 4.into(), &ann())
        .await
        .unwrap();
    dead_letters::edit(&shipping(), &store, &at(3).await, &new("early"), &ann())
        .await
        .unwrap();
    assert!(
        at(3).await.due.is_some() && at(4).await.due.is_none(),
        "it is the first of its key now"
    );
    // A copy that is sent again is a duplicate of the edited letter.
    backend
        .memory_log()
        .append(&[new("late").origin(origin)])
        .await
        .unwrap();
    let report = consumer(&backend, poisoned(&backend, &[]))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(report.duplicates, 1);
    assert_eq!(effects(&backend).await["a"], "0 2 early 4 8 late ");
}

#[tokio::test]
async fn a_planned_seek_does_what_the_plan_said_or_nothing() {
    let backend = keyed(Script::default()).await;
    let consume = || consumer(&backend, poisoned(&backend, &[])).run_until_caught_up();
    consume().await.unwrap();
    let (log, store) = (backend.memory_log(), backend.memory.store());
    // It would stay where it is, and would go back if the consumer committed meanwhile.
    let plan = plan_seek(&shipping(), &log, &store, StartAt::Latest).await.unwrap();
    log.append(&[NewRecord::new("12")]).await.unwrap();
    consume().await.unwrap();
    let sought = seek_as_planned(&shipping(), &log, &store, &plan, &ann()).await;
    assert!(matches!(sought, Err(Error::Fenced { .. })), "{sought:?}");
    assert_eq!(next(&backend).await, (RECORDS + 1).into());
    assert_eq!(actions(&backend).await, []);

    let plan = plan_seek(&shipping(), &log, &store, StartAt::Offset(2.into()))
        .await
        .unwrap();
    let sought = seek_as_planned(&shipping(), &log, &store, &plan, &ann()).await;
    assert_eq!(sought.unwrap(), 2.into());
    assert_eq!(next(&backend).await, 2.into());
}

#[tokio::test]
async fn seek_with_another_log_is_refused_before_it_looks_at_letters() {
    let backend = with_letters().await;
    let other = backend.memory.log("other").unwrap();
    let store = backend.memory.store();
    let moved = seek(&shipping(), &other, &store, StartAt::Earliest, &ann()).await;
    assert!(matches!(moved, Err(Error::WrongLog { .. })), "{moved:?}");
    let plan = plan_seek(&shipping(), &other, &store, StartAt::Earliest).await;
    assert!(matches!(plan, Err(Error::WrongLog { .. })), "{plan:?}");
}

#[tokio::test]
async fn letters_that_are_too_large_for_one_commit_are_made_due_in_several() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["1", "2", "5", "7", "10"]);
    consumer(&backend, handler).run_until_caught_up().await.unwrap();
    backend.script.letters_per_commit.store(2, Ordering::SeqCst);
    let all = LetterFilter::all();
    let due = dead_letters::retry_all(&shipping(), &backend.store(), &all, &ann())
        .await
        .unwrap();
    assert_eq!(due, 5);
    backend.script.letters_per_commit.store(0, Ordering::SeqCst);
    consumer(&backend, poisoned(&backend, &[]))
        .run_until_caught_up()
        .await
        .unwrap();
    assert!(parked(&backend).await.is_empty());
}
