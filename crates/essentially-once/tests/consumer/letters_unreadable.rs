//! Letters that the store cannot read: they hold up their key, and nothing else, until an operator
//! decides.

use essentially_once::{
    backend::{Advance, DeadLetter, DeadLetters as _, Transaction as _},
    consumer::{
        DeadLetterOptions,
        dead_letters::{self, LetterFilter},
        plan_seek,
    },
};

use super::{
    letters::{consumer, effects, letters, parked, poisoned, retry_all, with_letters},
    *,
};

/// A backend whose letters are 2, 4 and 8 of key `a`, of which one cannot be read.
async fn with_damaged(offset: u64) -> Backend {
    let backend = with_letters().await;
    let mut tx = backend.memory.store().begin(&shipping()).await.unwrap();
    let damaged = DeadLetter::damaged(offset.into(), Some("a".into()), "its row is damaged", b"");
    tx.park(&damaged).await.unwrap();
    let position = backend.position(&shipping()).await.unwrap();
    let revision = position.revision;
    let mut advance = Advance::new(position.log, position.next, revision, revision.next_epoch());
    advance.owner = position.owner;
    tx.commit(advance).await.unwrap();
    backend
}

async fn assert_refused(backend: &Backend, offset: u64) {
    let store = backend.memory.store();
    let letter = dead_letters::get(&shipping(), &store, offset.into())
        .await
        .unwrap()
        .unwrap();
    let retried = dead_letters::retry(&shipping(), &store, offset.into(), &ann()).await;
    let edited = dead_letters::edit(&shipping(), &store, &letter, &NewRecord::new("4!").key("a"), &ann()).await;
    for refused in [retried, edited] {
        let error = refused.unwrap_err().to_string();
        assert!(
            error.contains("cannot read it (its row is damaged)") && error.contains("`discard`"),
            "{error}"
        );
    }
}

async fn discard(backend: &Backend, offset: u64) {
    let store = backend.memory.store();
    let letter = dead_letters::get(&shipping(), &store, offset.into())
        .await
        .unwrap()
        .unwrap();
    dead_letters::discard(&shipping(), &store, &letter, &ann())
        .await
        .unwrap();
}

#[tokio::test]
async fn an_unreadable_letter_behind_another_ends_the_retry_of_its_key() {
    let backend = with_damaged(4).await;
    assert_eq!(retry_all(&backend).await, 1);
    backend
        .memory_log()
        .append(&[NewRecord::new("12").key("a")])
        .await
        .unwrap();
    let run = || consumer(&backend, poisoned(&backend, &[])).run_until_caught_up();
    let report = run().await.unwrap();
    assert_eq!((report.handled, report.parked), (1, 1), "{report}");
    assert_eq!(parked(&backend).await, [4, 8, 12]);
    assert_refused(&backend, 4).await;
    assert_eq!(retry_all(&backend).await, 0, "the letters behind it wait");
    discard(&backend, 4).await;
    assert_eq!(run().await.unwrap().handled, 2);
    assert_eq!(effects(&backend).await["a"], "0 2 8 12 ");
}

#[tokio::test]
async fn at_least_once_stops_at_an_unreadable_letter_too() {
    let backend = with_damaged(4).await;
    assert_eq!(retry_all(&backend).await, 1);
    let run = || {
        let handler = handler_fn(|_: &Record, (): &mut ()| Box::pin(async { Ok(()) }));
        Consumer::at_least_once(shipping(), backend.log(), backend.store(), handler)
            .dead_letters(DeadLetterOptions::new())
            .run_until_caught_up()
    };
    assert_eq!(run().await.unwrap().handled, 1);
    assert_eq!(parked(&backend).await, [4, 8]);
    discard(&backend, 4).await;
    assert_eq!(run().await.unwrap().handled, 1);
}

#[tokio::test]
async fn a_discard_does_not_make_an_unreadable_letter_due() {
    let backend = with_damaged(4).await;
    discard(&backend, 2).await;
    let left = letters(&backend).await;
    assert!(left[0].unreadable && left[0].due.is_none(), "{:?}", left[0]);
    let report = consumer(&backend, poisoned(&backend, &[])).run_until_caught_up().await;
    assert_eq!(report.unwrap().handled, 0);
    let damaged = LetterFilter::all().reason("is damaged");
    let found = dead_letters::find(&shipping(), &backend.memory.store(), &damaged, None, 10).await;
    assert_eq!(found.unwrap().len(), 1);
}

#[tokio::test]
async fn a_seek_reads_the_record_of_an_unreadable_letter_again() {
    let backend = with_damaged(2).await;
    assert_eq!(
        retry_all(&backend).await,
        0,
        "the first letter of the key cannot be read"
    );
    let (log, store) = (backend.memory_log(), backend.memory.store());
    let plan = plan_seek(&shipping(), &log, &store, StartAt::Offset(2.into()))
        .await
        .unwrap();
    assert_eq!(plan.letters_removed, 3);
    seek(&shipping(), &log, &store, StartAt::Offset(2.into()), &ann())
        .await
        .unwrap();
    consumer(&backend, poisoned(&backend, &[]))
        .run_until_caught_up()
        .await
        .unwrap();
    assert!(parked(&backend).await.is_empty());
    assert_eq!(effects(&backend).await["a"], "0 2 4 8 ");
}

#[tokio::test]
async fn a_discard_that_removes_nothing_is_an_error() {
    let backend = with_damaged(2).await;
    backend.script.keeps_letters.store(true, Ordering::SeqCst);
    let letter = letters(&backend).await.remove(0);
    let refused = dead_letters::discard(&shipping(), &backend.store(), &letter, &ann()).await;
    assert!(refused.is_err());
    let journal = backend.position(&shipping()).await.unwrap().journal;
    assert!(journal.entries().is_empty(), "{journal:?}");
}
