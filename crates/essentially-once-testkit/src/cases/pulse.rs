//! Cases for signs of life: [`pulse`](essentially_once::OffsetStore::pulse),
//! [`watch`](essentially_once::OffsetStore::watch), [`beat`](essentially_once::OffsetStore::beat)
//! and [`release`](essentially_once::OffsetStore::release). They are hints, so a pulse may lag. It
//! must still show every sign of life eventually.

use std::time::Duration;

use essentially_once::{
    ConsumerId, KeyValue, Log, OffsetStore,
    backend::{Advance, Owner, Position, Pulse, Revision, Transaction, Window},
};

use super::{
    common::{QUIET, SOON, advance, consumer, soon},
    compare,
    store::{numbering, position},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// How often a store polls, if it has to.
const INTERVAL: Duration = Duration::from_millis(5);

const OWNER: Owner = Owner::new(7);
const OTHER: Owner = Owner::new(8);

/// Commits a position with that owner and one window. `n` is both the next offset and the revision.
async fn commit_as<S: OffsetStore>(
    store: &S,
    consumer: &ConsumerId,
    log: &dyn Log,
    owner: Option<Owner>,
    n: u64,
) -> Result<(), Violation> {
    let expected = if n == 1 {
        Revision::NONE
    } else {
        Revision::new(1, n - 1)
    };
    let mut advance = Advance::new(log.id().clone(), n.into(), expected, Revision::new(1, n));
    advance.owner = owner;
    advance.windows = vec![(numbering("web"), Window::new(n))];
    Ok(store.begin(consumer).await?.commit(advance).await?)
}

/// Returns the pulse once it is as expected. It may lag.
async fn pulse_that<S: OffsetStore>(
    store: &S,
    consumer: &ConsumerId,
    what: &str,
    is_expected: impl Fn(&Pulse) -> bool,
) -> Result<Pulse, Violation> {
    let asked = async {
        loop {
            let pulse = store.pulse(consumer).await?;
            if is_expected(&pulse) {
                return Ok(pulse);
            }
            tokio::time::sleep(INTERVAL).await;
        }
    };
    match tokio::time::timeout(SOON / 6, asked).await {
        Ok(found) => found,
        Err(_) => Err(Violation::new(format!(
            "{what}: the pulse is {:?} and does not change",
            store.pulse(consumer).await?
        ))),
    }
}

/// Returns a pulse after enough time for an unwanted change to show.
async fn settled<S: OffsetStore>(store: &S, consumer: &ConsumerId) -> Result<Pulse, Violation> {
    tokio::time::sleep(QUIET).await;
    Ok(store.pulse(consumer).await?)
}

fn is_of(position: &Position) -> impl Fn(&Pulse) -> bool {
    let (next, revision, owner) = (position.next, position.revision, position.owner);
    move |pulse| (pulse.next, pulse.revision, pulse.owner) == (next, revision, owner)
}

/// [`pulse`](essentially_once::OffsetStore::pulse): on every handle it arrives at the last commit,
/// and it never shows other consumers.
pub(super) async fn s10_a_commit_changes_the_pulse<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (shipping, standby) = (consumer("shipping"), backend.store().await?);
    let none = standby.pulse(&shipping).await?;
    ensure!(
        none == Pulse::default(),
        "a consumer that never committed has the pulse {none:?}"
    );
    commit_as(&store, &consumer("billing"), &*log, Some(OTHER), 1).await?;
    let none = settled(&standby, &shipping).await?;
    ensure!(
        none == Pulse::default(),
        "another consumer's commit shows in the pulse: {none:?}"
    );
    let mut seen = none;
    for n in 1..=4 {
        commit_as(&store, &shipping, &*log, (n != 3).then_some(OWNER), n).await?;
        let stored = position(&store, &shipping).await?;
        for store in [&store, &standby] {
            let pulse = pulse_that(store, &shipping, &format!("after commit {n}"), is_of(&stored)).await?;
            ensure!(pulse != seen, "commit {n} did not change the pulse {seen:?}");
        }
        seen = standby.pulse(&shipping).await?;
    }
    Ok(())
}

/// [`beat`](essentially_once::OffsetStore::beat): each beat of the owner changes the pulse, also on
/// other handles.
pub(super) async fn s10_a_beat_of_the_owner_changes_the_pulse<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (shipping, standby) = (consumer("shipping"), backend.store().await?);
    for n in 1..=2 {
        commit_as(&store, &shipping, &*log, Some(OWNER), n).await?;
        let stored = position(&store, &shipping).await?;
        let mut seen = pulse_that(&standby, &shipping, &format!("after commit {n}"), is_of(&stored)).await?;
        for beat in 1..=5 {
            store.beat(&shipping, OWNER).await?;
            let what = format!("after beat {beat} of the owner, on another handle");
            let pulse = pulse_that(&standby, &shipping, &what, |pulse| *pulse != seen).await?;
            ensure!(
                is_of(&stored)(&pulse),
                "a beat changed more than the beats: from {seen:?} to {pulse:?}"
            );
            seen = pulse;
        }
    }
    Ok(())
}

/// [`beat`](essentially_once::OffsetStore::beat): a beat for a position with another owner, with no
/// owner, or that does not exist.
pub(super) async fn s10_a_beat_of_another_changes_nothing<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    store.beat(&shipping, OWNER).await?;
    let found = (store.position(&shipping).await?, settled(&store, &shipping).await?);
    ensure!(
        found == (None, Pulse::default()),
        "a beat without a position created one: {found:?}"
    );
    for (n, owner) in [(1, Some(OWNER)), (2, None)] {
        commit_as(&store, &shipping, &*log, owner, n).await?;
        let stored = position(&store, &shipping).await?;
        let before = pulse_that(&store, &shipping, &format!("after commit {n}"), is_of(&stored)).await?;
        store.beat(&shipping, OTHER).await?;
        let after = settled(&store, &shipping).await?;
        ensure!(
            before == after,
            "a beat by another than the owner {owner:?} changed the pulse from {before:?} to {after:?}"
        );
    }
    Ok(())
}

/// [`beat`](essentially_once::OffsetStore::beat): the position stays the same to the bit, and an
/// open transaction commits.
pub(super) async fn s10_a_beat_fences_nobody<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    commit_as(&store, &shipping, &*log, Some(OWNER), 1).await?;
    let before = position(&store, &shipping).await?;
    for _ in 0..3 {
        store.beat(&shipping, OWNER).await?;
    }
    let after = position(&backend.store().await?, &shipping).await?;
    let differing = compare::position(&after, &before);
    ensure!(
        differing.is_none(),
        "beats changed the position: {}",
        differing.unwrap_or_default()
    );
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"k", b"v").await?;
    // A beat may wait for a lock that the transaction holds, as when the handler is slow. It must
    // not break the transaction.
    let beaten = tokio::time::timeout(QUIET, store.beat(&shipping, OWNER)).await;
    let committed = tx.commit(advance(Some(&before), &*log, 2)).await;
    ensure!(
        committed.is_ok(),
        "a commit with a concurrent beat returned {committed:?}, and the beat {beaten:?}"
    );
    let found = position(&store, &shipping).await?;
    ensure!(
        found.next == 2.into() && found.revision == before.revision.next_count(),
        "after a beat and a commit, the position is {found:?}"
    );
    Ok(())
}

/// [`release`](essentially_once::OffsetStore::release): the owner's release clears the owner and
/// nothing else. Another's release does nothing. The next commit succeeds in either case.
pub(super) async fn s10_a_release_clears_its_own_owner_only<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (shipping, standby) = (consumer("shipping"), backend.store().await?);
    store.release(&shipping, OWNER).await?;
    let none = store.position(&shipping).await?;
    ensure!(none.is_none(), "a release without a position created one: {none:?}");
    commit_as(&store, &shipping, &*log, Some(OWNER), 1).await?;
    let before = position(&store, &shipping).await?;
    standby.release(&shipping, OTHER).await?;
    tokio::time::sleep(QUIET).await;
    let after = position(&store, &shipping).await?;
    let differing = compare::position(&after, &before);
    ensure!(
        differing.is_none(),
        "a release by another than the owner changed the position: {}",
        differing.unwrap_or_default()
    );
    store.release(&shipping, OWNER).await?;
    let mut released = before.clone();
    released.owner = None;
    pulse_that(&standby, &shipping, "after a release by the owner", is_of(&released)).await?;
    for store in [&store, &standby, &backend.store().await?] {
        let found = position(store, &shipping).await?;
        let differing = compare::position(&found, &released);
        ensure!(
            differing.is_none(),
            "after a release by the owner, the position is wrong: {}",
            differing.unwrap_or_default()
        );
    }
    commit_as(&standby, &shipping, &*log, Some(OTHER), 2).await?;
    // A late release, by an owner that does not know that it was displaced.
    store.release(&shipping, OWNER).await?;
    tokio::time::sleep(QUIET).await;
    let found = position(&store, &shipping).await?;
    ensure!(
        found.owner == Some(OTHER) && found.revision == Revision::new(1, 2),
        "after a late release, the position is {found:?}"
    );
    Ok(())
}

/// [`watch`](essentially_once::OffsetStore::watch): repeated calls eventually return a commit made
/// on another handle, even one made before the call. A dropped call loses nothing.
pub(super) async fn s10_watch_returns_after_a_commit_elsewhere<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (shipping, standby) = (consumer("shipping"), backend.store().await?);
    let mut seen = standby.pulse(&shipping).await?;
    for n in 1..=4u64 {
        let expected = Revision::new(1, n);
        let watching = async {
            loop {
                let pulse = standby.watch(&shipping, &seen, INTERVAL).await?;
                if pulse.revision == expected {
                    return Ok::<_, Violation>(pulse);
                }
            }
        };
        let committing = async {
            if n % 2 == 0 {
                // Late enough that the watch has begun to wait.
                tokio::time::sleep(QUIET).await;
            }
            commit_as(&store, &shipping, &*log, Some(OWNER), n).await
        };
        if n == 3 {
            let dropped = tokio::time::timeout(INTERVAL, standby.watch(&shipping, &seen, SOON)).await;
            drop(dropped);
        }
        let what = format!("a watch that returns commit {n}, made on another handle");
        let (watched, committed) = match n {
            // Before the watch begins.
            1 | 3 => {
                let committed = committing.await;
                (soon(&what, watching).await?, committed)
            }
            _ => soon(&what, async { tokio::join!(watching, committing) }).await?,
        };
        committed?;
        seen = watched?;
    }
    Ok(())
}
