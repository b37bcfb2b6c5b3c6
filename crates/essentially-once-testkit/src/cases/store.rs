//! Cases for the store's contract, [S1 to S8](essentially_once::OffsetStore#contract).

use std::{sync::Arc, task::Poll};

use essentially_once::{
    Advance, ConsumerId, Error, KeyValue, Log, Offset, OffsetStore, Position, ProducerId, Transaction, Window,
};
use tokio::{sync::Barrier, task::JoinSet};

use super::{QUIET, advance, consumer, soon};
use crate::{
    Backend, Harness,
    suite::{CaseResult, Violation, ensure},
};

/// Commits `writes` (`None` deletes) and an advance to `next`, based on the stored position.
async fn commit<S: OffsetStore<Tx: KeyValue>>(
    store: &S,
    consumer: &ConsumerId,
    log: &dyn Log,
    writes: &[(&[u8], Option<&[u8]>)],
    next: u64,
) -> Result<(), Error> {
    let position = store.position(consumer).await?;
    let mut tx = store.begin(consumer).await?;
    for (key, value) in writes {
        match value {
            Some(value) => tx.put(key, value).await?,
            None => tx.delete(key).await?,
        }
    }
    tx.commit(advance(position.as_ref(), log, next)).await
}

/// A value as a transaction of its own sees it.
async fn value<S: OffsetStore<Tx: KeyValue>>(
    store: &S,
    consumer: &ConsumerId,
    key: &[u8],
) -> Result<Option<Vec<u8>>, Error> {
    let mut tx = store.begin(consumer).await?;
    let value = tx.get(key).await?.map(|value| value.to_vec());
    tx.rollback().await?;
    Ok(value)
}

async fn position<S: OffsetStore>(store: &S, consumer: &ConsumerId) -> Result<Position, Violation> {
    store
        .position(consumer)
        .await?
        .ok_or_else(|| Violation::new(format!("{consumer} has no position after a commit")))
}

/// [S1](essentially_once::OffsetStore#contract): puts, overwrites and deletes, seen from another handle.
pub(super) async fn s1_a_commit_applies_state_and_position<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    ensure!(
        store.position(&shipping).await?.is_none(),
        "a fresh store has a position"
    );
    commit(&store, &shipping, &*log, &[(b"a", Some(b"1")), (b"b", Some(b"1"))], 1).await?;
    commit(
        &store,
        &shipping,
        &*log,
        &[(b"a", Some(b"2")), (b"b", None), (b"absent", None)],
        7,
    )
    .await?;
    let other = backend.store().await?;
    let found = position(&other, &shipping).await?;
    ensure!(
        (found.next, found.revision) == (7.into(), 2),
        "after two commits: {found:?}"
    );
    for (key, expected) in [("a", Some("2")), ("b", None), ("absent", None)] {
        let found = value(&other, &shipping, key.as_bytes()).await?;
        ensure!(
            found.as_deref() == expected.map(str::as_bytes),
            "{key} is {found:?}, not {expected:?}"
        );
    }
    // A position with a high part, and one that goes back, as `seek` does.
    for next in [Offset::new(u64::MAX, u64::MAX), Offset::ZERO] {
        let before = position(&store, &shipping).await?;
        store
            .begin(&shipping)
            .await?
            .commit(advance(Some(&before), &*log, next))
            .await?;
        let found = position(&other, &shipping).await?;
        ensure!(found.next == next, "committed {next}, found {found:?}");
    }
    Ok(())
}

/// A window of `count` sequences up to `highest`, every third left out, and with a last offset and time.
fn window(highest: u64, count: u64) -> Window {
    let mut window = Window::new(highest);
    for sequence in (highest - count..highest).filter(|sequence| sequence % 3 != 0) {
        window.mark(sequence);
    }
    // Only a consumer sets them, so they are written where the encoding has them: behind version and highest sequence.
    let mut encoded = window.encode();
    encoded[9..33].fill(7);
    Window::decode(&encoded).expect("its own encoding")
}

async fn stored_windows<S: OffsetStore>(
    store: &S,
    consumer: &ConsumerId,
) -> Result<Vec<(ProducerId, Window)>, Violation> {
    let mut windows = position(store, consumer).await?.windows;
    windows.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(windows)
}

fn producer(name: &str) -> ProducerId {
    ProducerId::new(name).expect("a valid name")
}

/// [S1](essentially_once::OffsetStore#contract): every bit of every window; what an advance does not name stays.
pub(super) async fn s1_windows_are_kept_whole_with_the_position<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let mut expected = vec![
        (producer("a"), window(5_000, Window::SIZE)),
        (producer("b"), Window::new(0)),
        (producer("c"), window(u64::MAX, Window::SIZE)),
    ];
    let mut advance = advance(None, &*log, 1);
    advance.windows.clone_from(&expected);
    store.begin(&shipping).await?.commit(advance).await?;
    let found = stored_windows(&backend.store().await?, &shipping).await?;
    ensure!(!found.is_empty(), "no window was kept");
    ensure!(
        found == expected,
        "windows changed in the store: {found:?} instead of {expected:?}"
    );

    expected[1].1 = window(2_000, 500);
    let advance = Advance {
        windows: vec![expected[1].clone()],
        ..super::advance(Some(&position(&store, &shipping).await?), &*log, 2)
    };
    store.begin(&shipping).await?.commit(advance).await?;
    let found = stored_windows(&backend.store().await?, &shipping).await?;
    ensure!(
        found == expected,
        "after one window changed: {found:?} instead of {expected:?}"
    );
    Ok(())
}

/// [S1](essentially_once::OffsetStore#contract): a forgotten producer's window goes, and no other.
pub(super) async fn s1_forgotten_windows_are_removed<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let mut first = advance(None, &*log, 1);
    first.windows = vec![(producer("a"), Window::new(1)), (producer("b"), Window::new(2))];
    store.begin(&shipping).await?.commit(first).await?;
    let mut second = advance(Some(&position(&store, &shipping).await?), &*log, 2);
    second.forgotten = vec![producer("a"), producer("never-seen")];
    store.begin(&shipping).await?.commit(second).await?;
    let found = stored_windows(&store, &shipping).await?;
    ensure!(
        found == [(producer("b"), Window::new(2))],
        "after forgetting a: {found:?}"
    );
    Ok(())
}

/// [S2](essentially_once::OffsetStore#contract): older revisions and ones that never were, from this handle and another.
pub(super) async fn s2_a_stale_revision_is_fenced<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    for next in 1..=3 {
        commit(&store, &shipping, &*log, &[], next).await?;
    }
    for (store, revision) in [
        (&store, 2),
        (&backend.store().await?, 1),
        (&store, 4),
        (&store, u64::MAX),
    ] {
        let late = Advance {
            expected_revision: revision,
            ..advance(None, &*log, 9)
        };
        let result = store.begin(&shipping).await?.commit(late).await;
        ensure!(
            matches!(&result, Err(Error::Fenced { expected, .. }) if *expected == revision),
            "a commit based on revision {revision}, where 3 is stored: {result:?}"
        );
    }
    Ok(())
}

/// [S2](essentially_once::OffsetStore#contract): neither state, nor position, nor windows.
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
    let late = Advance {
        next: 9.into(),
        windows: vec![(producer("a"), Window::new(1))],
        ..stale
    };
    let result = tx.commit(late).await;
    ensure!(matches!(result, Err(Error::Fenced { .. })), "a late commit: {result:?}");
    let after = position(&store, &shipping).await?;
    ensure!(
        after == before,
        "a fenced commit moved the position from {before:?} to {after:?}"
    );
    for (key, expected) in [("kept", Some("1")), ("changed", Some("1")), ("new", None)] {
        let found = value(&store, &shipping, key.as_bytes()).await?;
        ensure!(
            found.as_deref() == expected.map(str::as_bytes),
            "a fenced commit left {key} = {found:?}, not {expected:?}"
        );
    }
    // The handle is as good as before.
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
    let result = two
        .begin(&shipping)
        .await?
        .commit(Advance {
            next: 0.into(),
            ..first
        })
        .await;
    ensure!(
        matches!(result, Err(Error::Fenced { .. })),
        "a second first commit: {result:?}"
    );
    let found = position(&one, &shipping).await?;
    ensure!(found.next == 5.into(), "the position is {found:?}");
    Ok(())
}

/// [S2](essentially_once::OffsetStore#contract): in every round four handles race from one revision; each adds 1.
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
        // A loser may also have been refused before its commit, by a lock say; but then for a while only.
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            ensure!(error.is_transient(), "round {round}: a loser got: {error}");
        }
    }
    let n = counter(value(&*stores[0], &shipping, b"n").await?.as_deref());
    ensure!(n == ROUNDS, "{ROUNDS} commits won, but the state counts {n}");
    Ok(())
}

pub(super) fn counter(value: Option<&[u8]>) -> u64 {
    value
        .and_then(|value| value.try_into().ok())
        .map_or(0, u64::from_be_bytes)
}

/// [S4](essentially_once::OffsetStore#contract): dropped at any moment, it leaves no trace and nothing locked.
pub(super) async fn s4_a_dropped_transaction_leaves_no_trace<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    commit(&store, &shipping, &*log, &[(b"kept", Some(b"1"))], 1).await?;
    for writes in 0..3 {
        let mut tx = store.begin(&shipping).await?;
        if writes > 0 {
            tx.put(b"new", b"2").await?;
        }
        if writes > 1 {
            tx.delete(b"kept").await?;
        }
        drop(tx);
        untouched(&store, &shipping, "dropped").await?;
    }
    commit(&store, &shipping, &*log, &[(b"kept", Some(b"3"))], 2).await?;
    Ok(())
}

async fn untouched<S: OffsetStore<Tx: KeyValue>>(store: &S, consumer: &ConsumerId, how: &str) -> CaseResult {
    let found = position(store, consumer).await?;
    ensure!(
        (found.next, found.revision) == (1.into(), 1),
        "a {how} transaction moved the position: {found:?}"
    );
    let (new, kept) = (
        value(store, consumer, b"new").await?,
        value(store, consumer, b"kept").await?,
    );
    ensure!(
        new.is_none() && kept.as_deref() == Some(b"1"),
        "a {how} transaction left new = {new:?}, kept = {kept:?}"
    );
    Ok(())
}

/// [S4](essentially_once::OffsetStore#contract): the same for a rollback that is asked for.
pub(super) async fn s4_a_rolled_back_transaction_leaves_no_trace<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    commit(&store, &shipping, &*log, &[(b"kept", Some(b"1"))], 1).await?;
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"new", b"2").await?;
    tx.delete(b"kept").await?;
    tx.rollback().await?;
    untouched(&store, &shipping, "rolled back").await
}

/// [S5](essentially_once::OffsetStore#contract): a commit whose future is dropped happened whole or not at all; if it still
/// comes later, it is checked like any other, and takes nothing back.
pub(super) async fn s5_a_cancelled_commit_is_all_or_nothing_and_for_good<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    commit(&store, &shipping, &*log, &[(b"n", Some(&0u64.to_be_bytes()))], 0).await?;
    let mut highest = 0;
    for round in 0..40 {
        let (found, n) = position_and_counter(&store, &shipping).await?;
        ensure!(
            found.next == n.into(),
            "a cancelled commit left next {} with state {n}",
            found.next
        );
        ensure!(
            found.revision >= highest,
            "revision {highest} was stored, now it is {}",
            found.revision
        );
        highest = found.revision;
        let mut tx = store.begin(&shipping).await?;
        tx.put(b"n", &(n + 1).to_be_bytes()).await?;
        let mut commit = tx.commit(advance(Some(&found), &*log, n + 1));
        let mut polls = 0;
        let polled = std::future::poll_fn(|context| match commit.as_mut().poll(context) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending if polls >= round % 8 => Poll::Ready(None),
            Poll::Pending => {
                polls += 1;
                context.waker().wake_by_ref();
                Poll::Pending
            }
        });
        match polled.await {
            Some(Ok(())) | None | Some(Err(Error::Fenced { .. })) => {}
            Some(Err(error)) => return Err(error.into()),
        }
    }
    // A late commit that was not checked would take back what was committed since.
    tokio::time::sleep(QUIET).await;
    let (found, n) = position_and_counter(&store, &shipping).await?;
    ensure!(
        found.next == n.into() && found.revision >= highest,
        "cancelled commits came late and unchecked: revision {highest} was stored, now {found:?} with state {n}"
    );
    Ok(())
}

/// Position and state of one moment: late commits may land between two reads.
async fn position_and_counter<S: OffsetStore<Tx: KeyValue>>(
    store: &S,
    consumer: &ConsumerId,
) -> Result<(Position, u64), Violation> {
    loop {
        let before = position(store, consumer).await?;
        let n = counter(value(store, consumer, b"n").await?.as_deref());
        if position(store, consumer).await? == before {
            return Ok((before, n));
        }
    }
}

/// [S6](essentially_once::OffsetStore#contract): puts, overwrites, deletes, and what was there before.
pub(super) async fn s6_a_transaction_reads_its_own_writes<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    commit(&store, &shipping, &*log, &[(b"old", Some(b"1"))], 1).await?;
    let mut tx = store.begin(&shipping).await?;
    type Step<'a> = (&'a str, &'a [u8], Option<&'a [u8]>);
    let steps: [Step<'_>; 6] = [
        ("a put of a new key", b"new", Some(b"2")),
        ("an overwrite of its own put", b"new", Some(b"3")),
        ("an overwrite of a stored key", b"old", Some(b"4")),
        ("a delete of a stored key", b"old", None),
        ("a put after its own delete", b"old", Some(b"5")),
        ("a delete of its own put", b"new", None),
    ];
    let before = tx.get(b"old").await?;
    ensure!(before.as_deref() == Some(b"1"), "a stored key reads as {before:?}");
    for (step, key, value) in steps {
        match value {
            Some(value) => tx.put(key, value).await?,
            None => tx.delete(key).await?,
        }
        let found = tx.get(key).await?;
        ensure!(found.as_deref() == value, "after {step}, get returned {found:?}");
    }
    tx.rollback().await?;
    Ok(())
}

/// [S6](essentially_once::OffsetStore#contract): binary and empty ones, keys that are prefixes of others, large values.
pub(super) async fn s6_keys_and_values_are_kept_to_the_byte<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let every_byte: Vec<u8> = (0..=255).collect();
    let large = vec![0xA5; 256 * 1024];
    let pairs: Vec<(&[u8], &[u8])> = vec![
        (b"", b"an empty key"),
        (b"empty value", b""),
        (b"k", b"1"),
        (b"k\0", b"2"),
        (b"k\xFF", b"3"),
        (b"k\xFE", b"4"),
        (b"K", b"5"),
        (&every_byte, &every_byte),
        (b"large", &large),
    ];
    let writes: Vec<_> = pairs.iter().map(|(key, value)| (*key, Some(*value))).collect();
    commit(&store, &shipping, &*log, &writes, 1).await?;
    let other = backend.store().await?;
    for (key, expected) in pairs {
        let found = value(&other, &shipping, key).await?;
        ensure!(
            found.as_deref() == Some(expected),
            "key {:?} holds {:?} bytes, expected {}",
            String::from_utf8_lossy(key),
            found.map(|found| found.len()),
            expected.len()
        );
    }
    Ok(())
}

/// [S7](essentially_once::OffsetStore#contract): equal keys, and names of which one begins like the other.
pub(super) async fn s7_consumers_do_not_see_each_others_state<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let names = ["shipping", "shipping-2", "shipping:k", "Shipping"].map(consumer);
    for (n, name) in (1u8..).zip(&names) {
        let found = value(&store, name, b"k").await?;
        ensure!(found.is_none(), "{name} found {found:?} before it wrote");
        ensure!(
            store.position(name).await?.is_none(),
            "{name} has a position before it committed"
        );
        commit(&store, name, &*log, &[(b"k", Some(&[n]))], n.into()).await?;
    }
    for (n, name) in (1u8..).zip(&names) {
        let found = (value(&store, name, b"k").await?, position(&store, name).await?.next);
        ensure!(
            found == (Some(vec![n]), u64::from(n).into()),
            "{name} found {found:?}, it wrote {n}"
        );
    }
    // Where a backend joins names and keys, these are the keys of the others.
    for key in [&b"-2k"[..], b":kk", b"k:k"] {
        let found = value(&store, &names[0], key).await?;
        ensure!(
            found.is_none(),
            "{} found {found:?} under {:?}, which it never wrote",
            names[0],
            String::from_utf8_lossy(key)
        );
    }
    Ok(())
}

/// [S7](essentially_once::OffsetStore#contract): many consumers on one store.
pub(super) async fn s7_a_thousand_consumers_keep_their_positions<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    const CONSUMERS: u64 = 1_000;
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    for n in 0..CONSUMERS {
        let name = consumer(&format!("consumer-{n}"));
        store.begin(&name).await?.commit(advance(None, &*log, n)).await?;
    }
    for n in 0..CONSUMERS {
        let name = consumer(&format!("consumer-{n}"));
        let found = position(&store, &name).await?;
        ensure!(
            (found.next, found.revision) == (n.into(), 1),
            "{name} committed {n}, it stands at {found:?}"
        );
    }
    Ok(())
}

/// [S8](essentially_once::OffsetStore#contract): name and incarnation.
pub(super) async fn s8_a_position_remembers_its_log<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    commit(&store, &shipping, &*log, &[], 1).await?;
    let found = position(&backend.store().await?, &shipping).await?;
    ensure!(
        found.log == *log.id(),
        "committed for {}, found {}",
        log.id(),
        found.log
    );
    Ok(())
}

/// [S8](essentially_once::OffsetStore#contract): even with the right revision.
pub(super) async fn s8_a_commit_for_another_log_is_refused<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let store = backend.store().await?;
    let (orders, invoices) = (backend.log("orders").await?, backend.log("invoices").await?);
    let shipping = consumer("shipping");
    commit(&store, &shipping, &*orders, &[], 1).await?;
    let before = position(&store, &shipping).await?;
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"k", b"v").await?;
    let result = tx.commit(advance(Some(&before), &*invoices, 2)).await;
    ensure!(
        matches!(&result, Err(Error::WrongLog { stored, .. }) if stored.name() == orders.id().name()),
        "a commit for another log: {result:?}"
    );
    let after = position(&store, &shipping).await?;
    ensure!(
        after == before,
        "a commit for another log moved the position to {after:?}"
    );
    let found = value(&store, &shipping, b"k").await?;
    ensure!(found.is_none(), "a commit for another log left state: {found:?}");
    Ok(())
}
