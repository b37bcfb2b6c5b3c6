//! Cases for stale commits, [S2](essentially_once::OffsetStore#contract).

use std::sync::Arc;

use essentially_once::{
    Error, KeyValue, OffsetStore,
    backend::{Revision, Transaction, Window},
};
use tokio::{sync::Barrier, task::JoinSet};

use super::{
    common::{advance, consumer, counter, soon},
    compare,
    store::{commit, numbering, position, value},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, ensure},
};

/// [S2](essentially_once::OffsetStore#contract): commits based on older revisions, and on revisions
/// that never existed, from this handle and another.
pub(super) async fn s2_a_stale_revision_is_fenced<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    for next in 1..=3 {
        commit(&store, &shipping, &*log, &[], next).await?;
    }
    let stored = position(&store, &shipping).await?.revision;
    let (epoch, count) = (stored.epoch(), stored.count());
    for (store, revision) in [
        (&store, Revision::new(epoch, count - 1)),
        (&backend.store().await?, Revision::new(epoch, 1)),
        (&store, Revision::new(epoch, count + 1)),
        (&store, Revision::new(epoch + 1, count)),
        (&store, Revision::new(0, count)),
        (&store, Revision::new(u64::MAX, u64::MAX)),
    ] {
        let mut late = advance(None, &*log, 9);
        late.expected = revision;
        late.revision = stored.next_epoch();
        let result = store.begin(&shipping).await?.commit(late).await;
        ensure!(
            matches!(&result, Err(Error::Fenced { expected, .. }) if *expected == revision),
            "a commit based on revision {revision}, where {stored} is stored, returned {result:?}"
        );
    }
    Ok(())
}

/// [S2](essentially_once::OffsetStore#contract): a fenced commit changes neither state, nor
/// position, nor windows.
pub(super) async fn s2_a_fenced_commit_applies_nothing<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    commit(
        &store,
        &shipping,
        &*log,
        &[(b"kept", Some(b"1")), (b"changed", Some(b"1"))],
        1,
    )
    .await?;
    let stale = advance(None, &*log, 1);
    let before = position(&store, &shipping).await?;
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"changed", b"2").await?;
    tx.put(b"new", b"2").await?;
    tx.delete(b"kept").await?;
    let mut late = stale;
    late.next = 9.into();
    late.windows = vec![(numbering("a"), Window::new(1))];
    let result = tx.commit(late).await;
    ensure!(
        matches!(result, Err(Error::Fenced { .. })),
        "a late commit returned {result:?}"
    );
    let after = position(&store, &shipping).await?;
    let differing = compare::position(&after, &before);
    ensure!(
        differing.is_none(),
        "a fenced commit moved the position: {}",
        differing.unwrap_or_default()
    );
    for (key, expected) in [("kept", Some("1")), ("changed", Some("1")), ("new", None)] {
        let found = value(&store, &shipping, key.as_bytes()).await?;
        ensure!(
            found.as_deref() == expected.map(str::as_bytes),
            "a fenced commit left {key} = {found:?}, not {expected:?}"
        );
    }
    // The handle still works.
    commit(&store, &shipping, &*log, &[(b"changed", Some(b"3"))], 2).await?;
    Ok(())
}

/// [S2](essentially_once::OffsetStore#contract): a second instance that also found no position.
pub(super) async fn s2_a_first_commit_is_fenced_if_there_is_a_position<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (one, two) = (backend.store().await?, backend.store().await?);
    let log = backend.log("orders").await?;
    let shipping = consumer("shipping");
    let first = advance(None, &*log, 5);
    one.begin(&shipping).await?.commit(first.clone()).await?;
    let mut second = first;
    second.next = 0.into();
    let result = two.begin(&shipping).await?.commit(second).await;
    ensure!(
        matches!(result, Err(Error::Fenced { .. })),
        "a second first commit returned {result:?}"
    );
    let found = position(&one, &shipping).await?;
    ensure!(
        found.next == 5.into(),
        "after a second first commit, the position is {found:?}"
    );
    Ok(())
}

/// [S2](essentially_once::OffsetStore#contract): in every round, four handles race from one
/// revision. Each adds 1.
pub(super) async fn s2_of_racing_commits_one_wins<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    const ROUNDS: u64 = 25;
    const RACERS: usize = 4;
    let log = backend.log("orders").await?;
    let shipping = consumer("shipping");
    let mut stores = Vec::new();
    for _ in 0..RACERS {
        stores.push(Arc::new(backend.store().await?));
    }
    commit(&*stores[0], &shipping, &*log, &[(b"n", Some(&0u64.to_be_bytes()))], 0).await?;
    for round in 0..ROUNDS {
        let based_on = position(&*stores[0], &shipping).await?;
        let barrier = Arc::new(Barrier::new(RACERS));
        let mut racers = JoinSet::new();
        for store in &stores {
            let (store, log, shipping) = (Arc::clone(store), Arc::clone(&log), shipping.clone());
            let (based_on, barrier) = (based_on.clone(), Arc::clone(&barrier));
            racers.spawn(async move {
                barrier.wait().await;
                let mut tx = store.begin(&shipping).await?;
                let n = counter(tx.get(b"n").await?.as_deref());
                tx.put(b"n", &(n + 1).to_be_bytes()).await?;
                tx.commit(advance(Some(&based_on), &*log, round + 1)).await
            });
        }
        let results = soon("racing commits", racers.join_all()).await?;
        let winners = results.iter().filter(|result| result.is_ok()).count();
        ensure!(
            winners == 1,
            "round {round}: {winners} of {RACERS} racing commits won: {results:?}"
        );
        // A loser may also fail before its commit, for example on a lock. That error must be
        // transient.
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            ensure!(error.is_transient(), "round {round}: a loser got: {error}");
        }
    }
    let n = counter(value(&*stores[0], &shipping, b"n").await?.as_deref());
    ensure!(n == ROUNDS, "{ROUNDS} commits won, but the state counts {n}");
    Ok(())
}
