//! Cases for the effects of a commit, [S1, S4, S5 and S8](essentially_once::OffsetStore#contract).

use std::{task::Poll, time::UNIX_EPOCH};

use essentially_once::{
    ConsumerId, Error, KeyValue, Log, Offset, OffsetStore, Record,
    backend::{Advance, LogId, Note, Numbering, Owner, Position, Revision, Transaction, Tried, Window},
};

use super::{
    common::{QUIET, advance, consumer, counter},
    compare,
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// Commits `writes` (`None` deletes) and an advance to `next`, based on the stored position.
pub(super) async fn commit<S: OffsetStore<Tx: KeyValue>>(
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

/// A value as a new transaction sees it.
pub(super) async fn value<S: OffsetStore<Tx: KeyValue>>(
    store: &S,
    consumer: &ConsumerId,
    key: &[u8],
) -> Result<Option<Vec<u8>>, Error> {
    let mut tx = store.begin(consumer).await?;
    let value = tx.get(key).await?.map(|value| value.to_vec());
    tx.rollback().await?;
    Ok(value)
}

pub(super) async fn position<S: OffsetStore>(store: &S, consumer: &ConsumerId) -> Result<Position, Violation> {
    store
        .position(consumer)
        .await?
        .ok_or_else(|| Violation::new(format!("{consumer} has no position after a commit")))
}

/// [S1](essentially_once::OffsetStore#contract): puts, overwrites and deletes, seen from another
/// handle.
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
        (found.next, found.revision) == (7.into(), Revision::NONE.next_epoch().next_count()),
        "after two commits: {found:?}"
    );
    for (key, expected) in [("a", Some("2")), ("b", None), ("absent", None)] {
        let found = value(&other, &shipping, key.as_bytes()).await?;
        ensure!(
            found.as_deref() == expected.map(str::as_bytes),
            "{key} is {found:?}, not {expected:?}"
        );
    }
    // A position with a high part, then one that goes back, as `seek` makes it.
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

/// A window of `count` sequences up to `highest` without every third one, and with a last offset
/// and time.
fn window(highest: u64, count: u64) -> Window {
    let mut window = Window::new(highest);
    for sequence in (highest - count..highest).filter(|sequence| sequence % 3 != 0) {
        window.mark(sequence);
    }
    // Only a consumer sets the last offset and time. The encoding has them after the version and
    // the highest sequence.
    let mut encoded = window.encode();
    encoded[9..41].fill(7);
    Window::decode(&encoded).expect("its own encoding")
}

async fn stored_windows<S: OffsetStore>(
    store: &S,
    consumer: &ConsumerId,
) -> Result<Vec<(Numbering, Window)>, Violation> {
    let mut windows = position(store, consumer).await?.windows;
    windows.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(windows)
}

pub(super) fn numbering(text: &str) -> Numbering {
    text.parse().expect("a valid numbering")
}

/// [S1](essentially_once::OffsetStore#contract): every bit of every window is kept. Windows that an
/// advance does not name stay.
pub(super) async fn s1_windows_are_kept_whole_with_the_position<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let mut expected = vec![
        (numbering("a"), window(5_000, Window::SIZE)),
        (numbering("a#7"), window(3_000, 900)),
        (numbering("a#18446744073709551615"), Window::new(4)),
        (numbering("b"), Window::new(0)),
        (numbering("c"), window(u64::MAX, Window::SIZE)),
    ];
    let mut advance = advance(None, &*log, 1);
    advance.windows.clone_from(&expected);
    store.begin(&shipping).await?.commit(advance).await?;
    let found = stored_windows(&backend.store().await?, &shipping).await?;
    ensure!(!found.is_empty(), "no window was kept");
    let differing = compare::windows(&found, &expected);
    ensure!(
        differing.is_none(),
        "windows changed in the store: {}",
        differing.unwrap_or_default()
    );

    expected[1].1 = window(2_000, 500);
    let mut advance = super::common::advance(Some(&position(&store, &shipping).await?), &*log, 2);
    advance.windows = vec![expected[1].clone()];
    store.begin(&shipping).await?.commit(advance).await?;
    let found = stored_windows(&backend.store().await?, &shipping).await?;
    let differing = compare::windows(&found, &expected);
    ensure!(
        differing.is_none(),
        "after one window changed: {}",
        differing.unwrap_or_default()
    );
    Ok(())
}

/// [S1](essentially_once::OffsetStore#contract): revision, owner and note are kept to the bit.
/// Those that the next advance omits are removed.
pub(super) async fn s1_the_whole_position_is_kept<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let record = |n: u64| {
        let mut record = Record::new(Offset::new(n, u64::MAX - n), UNIX_EPOCH, n.to_string());
        record.key = Some("key".into());
        Note::after(&record)
    };
    let tried = Tried::new(Offset::new(3, u64::MAX), &"x".repeat(2_000)).again();
    let mut expected = Revision::NONE;
    for (revision, owner, note) in [
        (Revision::new(1, 1), None, Note::default()),
        (Revision::new(1, 2), Some(Owner::new(1)), record(1)),
        (Revision::new(1, 70_000), Some(Owner::new(u128::MAX)), record(u64::MAX)),
        (Revision::new(2, 1), Some(Owner::new(1 << 64)), Note::default()),
        (Revision::new(2, 2), None, record(2).with_tried(Some(tried))),
        (Revision::new(1 << 62, 1 << 62), None, record(0)),
    ] {
        let mut advance = Advance::new(log.id().clone(), 1.into(), expected, revision);
        (advance.owner, advance.note) = (owner, note.clone());
        store.begin(&shipping).await?.commit(advance).await?;
        for store in [&store, &backend.store().await?] {
            let found = position(store, &shipping).await?;
            ensure!(
                found.revision == revision,
                "committed revision {revision}, found {}",
                found.revision
            );
            ensure!(
                found.owner == owner,
                "committed owner {owner:?}, found {:?}",
                found.owner
            );
            ensure!(
                found.note == note,
                "committed the note {note:?}, found {:?}",
                found.note
            );
        }
        expected = revision;
    }
    Ok(())
}

/// [S1](essentially_once::OffsetStore#contract): a forgotten producer's window is removed, and no
/// other.
pub(super) async fn s1_forgotten_windows_are_removed<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let mut first = advance(None, &*log, 1);
    first.windows = vec![(numbering("a"), Window::new(1)), (numbering("a#2"), Window::new(2))];
    store.begin(&shipping).await?.commit(first).await?;
    let mut second = advance(Some(&position(&store, &shipping).await?), &*log, 2);
    second.forgotten = vec![numbering("a"), numbering("never-seen")];
    store.begin(&shipping).await?.commit(second).await?;
    let found = stored_windows(&store, &shipping).await?;
    ensure!(
        found == [(numbering("a#2"), Window::new(2))],
        "after forgetting a: {found:?}"
    );
    Ok(())
}

/// [S4](essentially_once::OffsetStore#contract): a transaction dropped at any moment leaves no
/// trace and no lock.
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
        (found.next, found.revision) == (1.into(), Revision::NONE.next_epoch()),
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

/// [S4](essentially_once::OffsetStore#contract): the same for an explicit rollback.
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

/// [S5](essentially_once::OffsetStore#contract): a commit whose future is dropped takes effect
/// either entirely or not at all. If it arrives later, it is checked like any other commit, and
/// never undoes a newer one.
pub(super) async fn s5_a_cancelled_commit_is_all_or_nothing_and_for_good<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    commit(&store, &shipping, &*log, &[(b"n", Some(&0u64.to_be_bytes()))], 0).await?;
    let mut highest = Revision::NONE;
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
    // A late commit that is not checked would undo newer commits.
    tokio::time::sleep(QUIET).await;
    let (found, n) = position_and_counter(&store, &shipping).await?;
    ensure!(
        found.next == n.into() && found.revision >= highest,
        "a late cancelled commit was not checked: revision {highest} was stored, now {found:?} with state {n}"
    );
    Ok(())
}

/// Position and state as of one moment. Late commits may land between two reads.
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

/// [S8](essentially_once::OffsetStore#contract): a handle that does not know the incarnation can
/// commit, and does not erase the stored one.
pub(super) async fn s8_a_known_incarnation_is_kept<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let store = backend.store().await?;
    let shipping = consumer("shipping");
    let unknown = LogId::new("orders")?;
    let known = unknown.clone().with_incarnation("a1")?;
    let mut expected = Revision::NONE;
    for (given, kept) in [
        (&unknown, &unknown),
        (&known, &known),
        (&unknown, &known),
        (&known, &known),
    ] {
        let revision = expected.next_epoch();
        let advance = Advance::new(given.clone(), 1.into(), expected, revision);
        store.begin(&shipping).await?.commit(advance).await?;
        let found = position(&backend.store().await?, &shipping).await?.log;
        ensure!(
            found == *kept,
            "after a commit for {given} the position is of {found}, not {kept}"
        );
        expected = revision;
    }
    let other = unknown.with_incarnation("b2")?;
    let advance = Advance::new(other, 1.into(), expected, expected.next_epoch());
    let result = store.begin(&shipping).await?.commit(advance).await;
    ensure!(
        matches!(result, Err(Error::WrongLog { .. })),
        "a commit for another incarnation returned {result:?}"
    );
    Ok(())
}

/// [S8](essentially_once::OffsetStore#contract): an unknown incarnation does not make it another
/// log. Such a commit is applied in full, in either direction. Another name is still another log.
pub(super) async fn s8_a_log_without_incarnation_is_the_same_log<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let store = backend.store().await?;
    let unknown = LogId::new("orders")?;
    let known = unknown.clone().with_incarnation("a1")?;
    for (name, first, second) in [("shipping", &known, &unknown), ("billing", &unknown, &known)] {
        let id = consumer(name);
        store
            .begin(&id)
            .await?
            .commit(Advance::new(
                first.clone(),
                1.into(),
                Revision::NONE,
                Revision::new(1, 1),
            ))
            .await?;
        let mut advance = Advance::new(second.clone(), 2.into(), Revision::new(1, 1), Revision::new(1, 2));
        (advance.owner, advance.windows) = (Some(Owner::new(7)), vec![(numbering("web"), Window::new(2))]);
        let mut tx = store.begin(&id).await?;
        tx.put(b"k", b"2").await?;
        let result = tx.commit(advance).await;
        ensure!(
            result.is_ok(),
            "a commit for {second}, where the position is of {first}: {result:?}"
        );
        let mut expected = Position::new(known.clone(), 2.into(), Revision::new(1, 2));
        (expected.owner, expected.windows) = (Some(Owner::new(7)), vec![(numbering("web"), Window::new(2))]);
        let differing = compare::position(&position(&backend.store().await?, &id).await?, &expected);
        ensure!(
            differing.is_none(),
            "after a commit for {second}, where the position was of {first}, {}",
            differing.unwrap_or_default()
        );
        let found = value(&store, &id, b"k").await?;
        ensure!(
            found.as_deref() == Some(b"2"),
            "a commit for {second} left k = {found:?}"
        );
        let other = Advance::new(
            LogId::new("invoices")?,
            3.into(),
            Revision::new(1, 2),
            Revision::new(1, 3),
        );
        let result = store.begin(&id).await?.commit(other).await;
        ensure!(
            matches!(result, Err(Error::WrongLog { .. })),
            "a commit for invoices, without an incarnation, where the position is of {known}: {result:?}"
        );
    }
    Ok(())
}

/// [S8](essentially_once::OffsetStore#contract): the position may have changed its log since, so
/// `Fenced` takes precedence.
pub(super) async fn s8_a_stale_commit_for_another_log_is_fenced<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let store = backend.store().await?;
    let (orders, invoices) = (backend.log("orders").await?, backend.log("invoices").await?);
    let shipping = consumer("shipping");
    commit(&store, &shipping, &*orders, &[], 1).await?;
    let stale = position(&store, &shipping).await?;
    commit(&store, &shipping, &*orders, &[], 2).await?;
    let result = store
        .begin(&shipping)
        .await?
        .commit(advance(Some(&stale), &*invoices, 3))
        .await;
    ensure!(
        matches!(result, Err(Error::Fenced { .. })),
        "a stale commit for another log returned {result:?}"
    );
    Ok(())
}

/// [S8](essentially_once::OffsetStore#contract): a commit for another log is refused even with the
/// right revision.
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
        "a commit for another log returned {result:?}"
    );
    let after = position(&store, &shipping).await?;
    let differing = compare::position(&after, &before);
    ensure!(
        differing.is_none(),
        "a commit for another log moved the position: {}",
        differing.unwrap_or_default()
    );
    let found = value(&store, &shipping, b"k").await?;
    ensure!(found.is_none(), "a commit for another log left state: {found:?}");
    Ok(())
}
