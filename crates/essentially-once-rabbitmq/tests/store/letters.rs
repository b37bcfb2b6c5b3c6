//! Dead letters as messages: what commits, snapshots and other versions make of them.

use std::time::{Duration, UNIX_EPOCH};

use essentially_once::{
    Consumer, Error, HandlerError, KeyValue as _, Log as _, NewRecord, Offset, OffsetStore as _, Record,
    backend::{DeadLetter, DeadLetters as _, Journal, Transaction as _},
    consumer::{
        DeadLetterOptions, Operator, OperatorAction,
        dead_letters::{self, LetterFilter},
    },
    handler_fn,
    memory::Memory,
};
use essentially_once_rabbitmq::{RabbitStore, RabbitTx};
use essentially_once_testkit::Violation;
use test_servers::insist;

use crate::{
    Tests,
    support::{Place, Stranger, advance, get, put, shipping},
};

pub(crate) fn add(tests: &mut Tests) {
    tests.add(
        "letters::only_commits_that_change_letters_are_of_a_new_version",
        versions,
    );
    tests.add("letters::snapshots_hold_letters", snapshots);
    tests.add(
        "letters::edits_and_journals_are_of_another_version_and_in_snapshots",
        edits_and_journals,
    );
    tests.add(
        "letters::a_consumer_whose_state_is_full_can_be_paused",
        pause_in_full_state,
    );
    tests.add("letters::another_try_does_not_repeat_the_record", another_try);
    tests.add(
        "letters::more_than_a_commit_holds_are_retried_and_discarded_at_once",
        retry_all,
    );
    tests.add(
        "letters::one_that_does_not_fit_leaves_the_transaction_as_it_was",
        too_large,
    );
    tests.add("letters::letters_count_as_state", state_limit);
    tests.add("letters::a_failed_try_is_noted_in_a_full_state", full_state);
    tests.add("letters::a_standby_takes_over_for_a_due_letter", standby);
}

const MIB: usize = 1024 * 1024;

/// Where an entry has its version and kind.
const VERSION: usize = 8;
const COMMIT: u8 = 1;

fn letter(offset: u64, key: &str, payload: usize) -> DeadLetter {
    let mut record = Record::new(offset.into(), UNIX_EPOCH, vec![b'x'; payload]);
    record.key = Some(key.to_owned().into());
    DeadLetter::new(record, 1, "a reason", UNIX_EPOCH)
}

async fn park(store: &RabbitStore, letter: &DeadLetter, expected_revision: u64) -> Result<(), Error> {
    let mut tx = store.begin(&shipping()).await?;
    tx.park(letter).await?;
    tx.commit(advance(expected_revision + 1, expected_revision)).await
}

async fn offsets(store: &RabbitStore) -> Result<Vec<u64>, Error> {
    let letters = dead_letters::list(&shipping(), store, None, 100).await?;
    Ok(letters.iter().map(|letter| letter.record.offset.lo()).collect())
}

/// The first commits of the changelog.
async fn commits(stranger: &Stranger, place: &Place, count: usize) -> Vec<Vec<u8>> {
    let mut commits = Vec::new();
    stranger
        .find(&place.changelog(), |message| {
            if message[VERSION + 1] == COMMIT {
                commits.push(message.to_vec());
            }
            commits.len() == count
        })
        .await;
    commits
}

async fn versions() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    put(&store, "k", "1", 0).await?;
    park(&store, &letter(7, "a", 1), 1).await?;
    put(&store, "k", "2", 2).await?;
    let mut tx = store.begin(&shipping()).await?;
    assert_eq!(
        (tx.remove_from(8.into()).await?, tx.remove(9.into()).await?),
        (0, false)
    );
    tx.commit(advance(4, 3)).await?;
    let mut tx = store.begin(&shipping()).await?;
    assert_eq!(tx.remove_from(Offset::ZERO).await?, 1);
    tx.commit(advance(5, 4)).await?;
    let stranger = place.stranger().await;
    let commits = commits(&stranger, &place, 5).await;
    let versions: Vec<_> = commits.iter().map(|commit| commit[VERSION]).collect();
    assert_eq!(versions, [2, 3, 2, 2, 3]);
    Ok(())
}

async fn snapshots() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    let stranger = place.stranger().await;
    put(&store, "k", "1", 0).await?;
    store.snapshot(&shipping()).await?;
    park(&store, &letter(7, "a", 1), 1).await?;
    park(&store, &letter(8, "a", 3 * MIB), 2).await?;
    store.snapshot(&shipping()).await?;
    let mut tx = store.begin(&shipping()).await?;
    assert!(tx.remove(7.into()).await?);
    tx.commit(advance(4, 3)).await?;
    let fresh = place.store().await?;
    assert_eq!(
        (offsets(&fresh).await?, get(&fresh, "k").await?),
        (vec![8], Some("1".into()))
    );
    let found = fresh.begin(&shipping()).await?.head(b"a").await?;
    assert_eq!(found, Some(letter(8, "a", 3 * MIB)));
    // A version without letters reads the first snapshot and ignores the second.
    let mut versions = Vec::new();
    for stream in ['a', 'b'] {
        let (_, chunk) = stranger.find(&place.snapshots(stream), |_| true).await;
        versions.push(chunk[VERSION]);
    }
    assert_eq!(versions, [2, 3]);
    Ok(())
}

fn paused() -> Journal {
    Journal::default().with(&Operator::new("ann"), OperatorAction::Pause)
}

async fn edits_and_journals() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    put(&store, "k", "1", 0).await?;
    let mut edited = letter(7, "a", 1);
    park(&store, &edited, 1).await?;
    edited.edit(
        NewRecord::new("edited").key("b"),
        &Operator::new("ann").because("a typo"),
    );
    park(&store, &edited, 2).await?;
    // Another try changes the status alone.
    edited.tries += 1;
    park(&store, &edited, 3).await?;
    let mut advance = advance(5, 4);
    let paused = paused();
    advance.journal = Some(paused.clone());
    store.begin(&shipping()).await?.commit(advance).await?;
    put(&store, "k", "2", 5).await?;
    let stranger = place.stranger().await;
    let versions = commits(&stranger, &place, 6).await;
    let versions: Vec<u8> = versions.iter().map(|commit| commit[VERSION]).collect();
    assert_eq!(versions, [2, 3, 4, 3, 4, 2]);
    for has_snapshot in [false, true] {
        if has_snapshot {
            store.snapshot(&shipping()).await?;
            let (_, chunk) = stranger.find(&place.snapshots('a'), |_| true).await;
            assert_eq!(chunk[VERSION], 4);
        }
        let fresh = place.store().await?;
        let position = fresh.position(&shipping()).await?.expect("a position");
        assert_eq!((position.next, position.journal), (6.into(), paused.clone()));
        let mut tx = fresh.begin(&shipping()).await?;
        assert_eq!(tx.letter(7.into()).await?.as_ref(), Some(&edited));
        assert_eq!(tx.head(b"a").await?, None);
    }
    Ok(())
}

async fn pause_in_full_state() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?.state_limit(1_000);
    let value = "x".repeat(850);
    put(&store, "k", &value, 0).await?;
    let mut advance = advance(2, 1);
    let paused = paused();
    advance.journal = Some(paused.clone());
    store.begin(&shipping()).await?.commit(advance).await?;
    // The journal counts: without it, the state would have room for this.
    let mut tx = store.begin(&shipping()).await?;
    let refused = tx.put(b"k", "x".repeat(890).as_bytes()).await;
    assert!(
        matches!(&refused, Err(Error::Failed { .. })),
        "a larger value: {refused:?}"
    );
    let store = place.store().await?.state_limit(1_000);
    put(&store, "k", "smaller", 2).await?;
    assert!(
        store
            .position(&shipping())
            .await?
            .is_some_and(|position| position.journal == paused),
        "the journal was not kept"
    );
    Ok(())
}

async fn another_try() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    let mut parked = letter(7, "a", MIB);
    park(&store, &parked, 0).await?;
    for tries in 2..5u32 {
        parked.tries = tries;
        parked.last_reason = format!("try {tries}");
        parked.due = Some(UNIX_EPOCH + Duration::from_secs(tries.into()));
        park(&store, &parked, u64::from(tries) - 1).await?;
    }
    let stranger = place.stranger().await;
    let sizes: Vec<_> = commits(&stranger, &place, 4).await.iter().map(Vec::len).collect();
    assert!(
        sizes[0] > MIB && sizes[1..].iter().all(|size| *size < 1_000),
        "{sizes:?}"
    );
    for store in [store, place.store().await?] {
        let found = store.begin(&shipping()).await?.first_due().await?;
        assert_eq!(found.as_ref(), Some(&parked));
    }
    Ok(())
}

async fn retry_all() -> Result<(), Violation> {
    const LETTERS: u64 = 10;
    let place = Place::new();
    let store = place.store().await?;
    for offset in 0..LETTERS {
        park(&store, &letter(offset, &format!("{offset}"), MIB), offset).await?;
    }
    assert_eq!(
        dead_letters::retry_all(&shipping(), &store, &LetterFilter::all(), &Operator::new("test")).await?,
        LETTERS
    );
    let letters = dead_letters::list(&shipping(), &place.store().await?, None, 100).await?;
    assert_eq!(
        letters.iter().filter(|letter| letter.due.is_some()).count() as u64,
        LETTERS
    );
    assert!(letters.iter().all(|letter| letter.record.payload.len() == MIB));
    assert_eq!(
        dead_letters::discard_all(&shipping(), &store, &LetterFilter::all(), &Operator::new("test")).await?,
        LETTERS
    );
    let left = dead_letters::list(&shipping(), &place.store().await?, None, 100).await?;
    assert!(left.is_empty());
    Ok(())
}

async fn too_large() -> Result<(), Violation> {
    let store = Place::new().store().await?;
    let mut tx = store.begin(&shipping()).await?;
    tx.park(&letter(1, "a", 15 * MIB - 1)).await?;
    let second = tx.park(&letter(2, "a", MIB)).await;
    let Err(Error::TooLarge {
        what: "transaction", ..
    }) = second
    else {
        panic!("{second:?}");
    };
    let value = tx.put(b"k", &vec![0; MIB]).await;
    assert!(matches!(value, Err(Error::TooLarge { .. })), "{value:?}");
    // Another version of the first takes its place.
    tx.park(&letter(1, "a", 14 * MIB)).await?;
    let larger = tx.park(&letter(2, "a", 16 * MIB)).await;
    let Err(Error::TooLarge {
        what: "dead letter", ..
    }) = larger
    else {
        panic!("{larger:?}");
    };
    tx.commit(advance(1, 0)).await?;
    assert_eq!(offsets(&store).await?, [1]);
    Ok(())
}

async fn state_limit() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.rabbit().await?.store().state_limit(10_000);
    let mut tx = store.begin(&shipping()).await?;
    tx.park(&letter(1, "a", 6_000)).await?;
    // The letter that it replaces does not count.
    tx.park(&letter(1, "a", 7_000)).await?;
    tx.commit(advance(1, 0)).await?;
    let mut tx = store.begin(&shipping()).await?;
    tx.remove(1.into()).await?;
    tx.park(&letter(2, "a", 7_000)).await?;
    let error = tx.park(&letter(3, "a", 3_000)).await.expect_err("too much");
    assert!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("limit of 10000"),
        "{error}"
    );
    let error = tx.commit(advance(2, 1)).await.expect_err("a letter is missing");
    assert!(error.to_string().contains("limit of 10000"), "{error}");
    let mut tx = store.begin(&shipping()).await?;
    assert!(tx.put(b"k", &[0; 3_000]).await.is_err());
    let mut tx = store.begin(&shipping()).await?;
    tx.remove_from(Offset::ZERO).await?;
    tx.put(b"k", &[0; 9_000]).await?;
    tx.commit(advance(2, 1)).await?;
    assert_eq!(offsets(&store).await?, [0; 0]);
    Ok(())
}

/// The reasons of a letter grow with its tries.
async fn full_state() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.rabbit().await?.store().state_limit(10_000);
    // It was never tried, so a failure replaces both of its reasons.
    let mut parked = letter(1, "a", 100);
    parked.tries = 0;
    let mut size = 9_900;
    let tx = loop {
        let mut tx = store.begin(&shipping()).await?;
        tx.park(&parked).await?;
        match tx.put(b"k", &vec![0; size]).await {
            Ok(()) => break tx,
            Err(_) => size -= 10,
        }
    };
    tx.commit(advance(2, 0)).await?;
    dead_letters::retry_all(&shipping(), &store, &LetterFilter::all(), &Operator::new("test")).await?;
    let log = Memory::new().log("orders")?;
    let records: Vec<_> = (0..4).map(|n| NewRecord::new(n.to_string()).key("b")).collect();
    log.append(&records).await?;
    let handler = handler_fn(|record: &Record, _: &mut RabbitTx| {
        let fails = record.key.as_deref() == Some(b"a");
        Box::pin(async move {
            match fails {
                true => Err(HandlerError::retry("r".repeat(500))),
                false => Ok(()),
            }
        })
    });
    let run = Consumer::essentially_once(shipping(), log, store, handler)
        .accept_volatile()
        .dead_letters(DeadLetterOptions::new());
    let report = run.run_until_caught_up().await?;
    assert_eq!(report.handled, 2, "{report}");
    let store = place.store().await?;
    let letters = dead_letters::list(&shipping(), &store, None, 10).await?;
    assert_eq!(letters[0].tries, parked.tries + 1);
    Ok(())
}

/// A standby that waits for the position to move must not hold up its own look at the letters.
async fn standby() -> Result<(), Violation> {
    let place = Place::new();
    let log = Memory::new().log("orders")?;
    log.append(&[NewRecord::new("1").key("a")]).await?;
    let consumer = |is_mended: bool, store| {
        let handler = handler_fn(move |_: &Record, _: &mut RabbitTx| {
            Box::pin(async move {
                match is_mended {
                    true => Ok(()),
                    false => Err(HandlerError::reject("poison")),
                }
            })
        });
        Consumer::essentially_once(shipping(), log.clone(), store, handler)
            .accept_volatile()
            .standby_after(Duration::from_millis(100))
            .dead_letters(DeadLetterOptions::new())
    };
    let owner = tokio::spawn(consumer(false, place.store().await?).run());
    let store = place.store().await?;
    let consumer_id = shipping();
    let are_gone = async |are_gone: bool| {
        // The streams may not be up yet.
        let mut pulse = insist(|| store.pulse(&consumer_id)).await?;
        while insist(|| dead_letters::list(&consumer_id, &store, None, 1))
            .await?
            .is_empty()
            != are_gone
        {
            pulse = insist(|| store.watch(&consumer_id, &pulse, Duration::from_secs(1))).await?;
        }
        Ok::<_, Violation>(())
    };
    are_gone(false).await?;
    // As in a crash, the position keeps its owner.
    owner.abort();
    let _ = owner.await;
    let (all, by) = (LetterFilter::all(), Operator::new("test"));
    insist(|| dead_letters::retry_all(&consumer_id, &store, &all, &by)).await?;
    let run = tokio::spawn(consumer(true, place.store().await?).run());
    tokio::select! {
        gone = are_gone(true) => gone?,
        ended = run => panic!("the standby ended: {ended:?}"),
    }
    Ok(())
}
