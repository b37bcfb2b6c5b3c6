//! The case for what operators did by hand, [S12](essentially_once::OffsetStore#contract).

use essentially_once::{
    ConsumerId, Error, KeyValue, OffsetStore,
    backend::{Journal, Transaction},
    consumer::{Operator, OperatorAction},
};

use super::{
    common::{advance, consumer},
    compare,
    store::{position, value},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// [S12](essentially_once::OffsetStore#contract): a journal is kept until a commit replaces it,
/// whatever becomes of other transactions.
pub(super) async fn s12_a_journal_is_part_of_the_commit<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let ann = Operator::new("ann").because("größer");
    let paused = Journal::default().with(&ann, OperatorAction::Pause);
    let resumed = paused.with(&Operator::new("bob"), OperatorAction::Resume);
    let full = full_journal();
    let begins_with_one = [
        Some(&paused),
        None,
        Some(&resumed),
        None,
        Some(&full),
        None,
        Some(&paused),
    ];
    let gets_one_later = [None, None, Some(&paused), None];
    for (name, journals) in [("shipping", &begins_with_one[..]), ("billing", &gets_one_later)] {
        let (consumer, mut expected) = (consumer(name), Journal::default());
        for (n, given) in (0u64..).zip(journals) {
            let before = store.position(&consumer).await?;
            let mut advance = advance(before.as_ref(), &*log, n);
            advance.journal = given.cloned();
            let mut tx = store.begin(&consumer).await?;
            tx.put(b"n", &n.to_be_bytes()).await?;
            tx.commit(advance).await?;
            expected = given.cloned().unwrap_or(expected);
            let fresh = backend.store().await?;
            for store in [&store, &fresh] {
                holds(store, &consumer, &expected, &format!("after commit {n} of {name}")).await?;
            }
            let found = value(&fresh, &consumer, b"n").await?;
            ensure!(
                found == Some(n.to_be_bytes().to_vec()),
                "commit {n} of {name} left the value {found:?}"
            );
        }
        let mut stale = advance(None, &*log, 0);
        stale.journal = Some(resumed.clone());
        let result = store.begin(&consumer).await?.commit(stale).await;
        ensure!(
            matches!(result, Err(Error::Fenced { .. })),
            "a stale commit with a journal returned {result:?}"
        );
        store.begin(&consumer).await?.rollback().await?;
        drop(store.begin(&consumer).await?);
        let fresh = backend.store().await?;
        for store in [&store, &fresh] {
            let after = "after transactions that were fenced, rolled back and dropped";
            holds(store, &consumer, &expected, after).await?;
        }
    }
    Ok(())
}

/// As many entries as a journal keeps, with the longest texts.
fn full_journal() -> Journal {
    let mut journal = Journal::default();
    for n in 0..Journal::LIMIT as u64 {
        let by = Operator::new(format!("{n:0>width$}", width = Operator::TEXT_LIMIT));
        let by = by.because("ü".repeat(Operator::TEXT_LIMIT / 2));
        let action = OperatorAction::Discard {
            first: n.into(),
            letters: n + 1,
        };
        journal = journal.with(&by, action);
    }
    journal
}

async fn holds<S: OffsetStore>(store: &S, consumer: &ConsumerId, expected: &Journal, when: &str) -> CaseResult {
    let found = position(store, consumer).await?.journal;
    match compare::journal(&found, expected) {
        None => Ok(()),
        Some(how) => Err(Violation::new(format!("{when}: {how}"))),
    }
}
