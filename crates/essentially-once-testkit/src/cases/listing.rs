//! Cases for the consumers of a store, [S13](essentially_once::OffsetStore#contract).

use std::collections::BTreeSet;

use essentially_once::{
    ConsumerId, Error, KeyValue, OffsetStore, StartAt,
    backend::{Owner, Transaction},
    consumer::Operator,
    seek,
};

use super::{
    common::{advance, consumer, soon},
    names::{LONGEST, similar},
    store::commit,
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// How many consumers commit while the others are listed.
const NEW_CONSUMERS: u64 = 40;

/// [S13](essentially_once::OffsetStore#contract): each consumer with a position is listed once, on
/// every handle, also one whose position only `seek` created.
pub(super) async fn s13_every_consumer_with_a_position_is_listed<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    holds(&store, "a fresh store", &[]).await?;
    for (n, name) in (1u64..).zip(["shipping", "billing", "shipping", "archive", "billing"]) {
        commit(&store, &consumer(name), &*log, &[(b"k", Some(b"v"))], n).await?;
    }
    let sought = consumer("fulfilment");
    seek(&sought, &*log, &store, StartAt::Earliest, &Operator::new("ann")).await?;
    let all = ["archive", "billing", "fulfilment", "shipping"];
    for store in [&store, &backend.store().await?] {
        holds(store, "a store with four consumers", &all).await?;
    }
    commit(&store, &consumer("accounts"), &*log, &[], 1).await?;
    let all = ["accounts", "archive", "billing", "fulfilment", "shipping"];
    for store in [&store, &backend.store().await?] {
        holds(store, "a store with one more consumer", &all).await?;
    }
    Ok(())
}

/// [S13](essentially_once::OffsetStore#contract): what is not committed lists nobody, and a list
/// waits for no transaction.
pub(super) async fn s13_a_consumer_that_never_committed_is_not_listed<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (other, shipping) = (backend.store().await?, consumer("shipping"));
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"k", b"v").await?;
    soon(
        "the list next to an open transaction",
        holds(&other, "an open transaction", &[]),
    )
    .await??;
    tx.rollback().await?;
    holds(&store, "a transaction that was rolled back", &[]).await?;
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"k", b"v").await?;
    drop(tx);
    holds(&store, "a dropped transaction", &[]).await?;
    commit(&store, &consumer("billing"), &*log, &[], 1).await?;
    let billing = store.position(&consumer("billing")).await?;
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"k", b"v").await?;
    let result = tx.commit(advance(billing.as_ref(), &*log, 2)).await;
    ensure!(
        matches!(result, Err(Error::Fenced { .. })),
        "a commit of a consumer without a position that expects one returned {result:?}"
    );
    holds(&store, "a fenced first commit", &["billing"]).await?;
    store.position(&shipping).await?;
    store.pulse(&shipping).await?;
    store.beat(&shipping, Owner::new(7)).await?;
    store.release(&shipping, Owner::new(7)).await?;
    for store in [&store, &other] {
        holds(store, "a beat and a release without a position", &["billing"]).await?;
    }
    Ok(())
}

/// [S13](essentially_once::OffsetStore#contract): names with every character that is allowed, that
/// differ only in case, or of which one begins another, are listed as they are.
pub(super) async fn s13_consumers_with_similar_names_are_listed<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let mut names = similar(LONGEST);
    names.extend(["a:position", "a:state", "0", "Z9._-:/@+="].map(str::to_owned));
    for (n, name) in (1u64..).zip(&names) {
        commit(&store, &consumer(name), &*log, &[], n).await?;
    }
    names.sort_unstable();
    let expected: Vec<_> = names.iter().map(String::as_str).collect();
    holds(&backend.store().await?, "a store with similar names", &expected).await
}

/// [S13](essentially_once::OffsetStore#contract): a list has every consumer whose commit was
/// acknowledged before the call, whoever commits meanwhile.
pub(super) async fn s13_consumers_are_listed_while_others_commit<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (writing, listing) = (backend.store().await?, backend.store().await?);
    let log = backend.log("orders").await?;
    let old = ["a", "m", "z"].map(consumer);
    for consumer in &old {
        commit(&writing, consumer, &*log, &[], 1).await?;
    }
    let mut known: BTreeSet<_> = old.iter().cloned().collect();
    for n in 0..NEW_CONSUMERS {
        let new = consumer(&format!("new-{}", n * 7 % NEW_CONSUMERS));
        let busy = &old[(n % 3) as usize];
        let committing = async {
            commit(&writing, busy, &*log, &[(b"n", Some(&n.to_be_bytes()))], n + 2).await?;
            commit(&writing, &new, &*log, &[], 1).await
        };
        let (committed, found) = tokio::join!(committing, list(&listing));
        committed?;
        let (missing, mut found) = (missing(&known, &found?), list(&listing).await?);
        known.insert(new.clone());
        ensure!(
            missing.is_empty(),
            "while {busy} and {new} committed, the list left out {missing:?}"
        );
        found.retain(|consumer| !known.contains(consumer));
        ensure!(found.is_empty(), "the list has {found:?}, which never committed");
        let missing = self::missing(&known, &list(&listing).await?);
        ensure!(
            missing.is_empty(),
            "after {new} committed, the list leaves out {missing:?}"
        );
    }
    Ok(())
}

fn missing(known: &BTreeSet<ConsumerId>, found: &[ConsumerId]) -> Vec<ConsumerId> {
    let missing = known.iter().filter(|consumer| !found.contains(consumer));
    missing.cloned().collect()
}

async fn holds<S: OffsetStore>(store: &S, what: &str, expected: &[&str]) -> CaseResult {
    let found = list(store).await?;
    let found: Vec<_> = found.iter().map(ConsumerId::as_str).collect();
    ensure!(
        found == expected,
        "after {what}, the list is {found:?}, not {expected:?}"
    );
    Ok(())
}

async fn list<S: OffsetStore>(store: &S) -> Result<Vec<ConsumerId>, Violation> {
    let consumers = store.consumers().await?;
    consumers.ok_or_else(|| Violation::new("the store does not list its consumers, although the harness claims it"))
}
