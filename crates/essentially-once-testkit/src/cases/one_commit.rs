//! Cases for reads while commits run: [S9](essentially_once::OffsetStore#contract) and
//! [`ReadState`](essentially_once::ReadState).

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::UNIX_EPOCH,
};

use essentially_once::{
    Error, KeyValue, Offset, OffsetStore, Record,
    backend::{Advance, Journal, LogId, Note, Owner, Position, Revision, Snapshot, Transaction, Window},
    consumer::{Operator, OperatorAction},
};
use tokio::task::JoinSet;

use super::{
    common::{advance, consumer, soon},
    compare,
    store::{commit, numbering, position},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// The least number of commits, and the least number of reads by each reader.
const AT_LEAST: u64 = 150;
/// After this many commits, even a slow reader has seen enough.
const AT_MOST: u64 = 5_000;
/// One read in this many commits happens while no commit is in progress.
const QUIET_COMMITS: u64 = 10;
/// The keys that each commit writes and a snapshot reads.
const KEYS: [&[u8]; 3] = [b"z", b"a", b"m"];

type Reading = Pin<Box<dyn Future<Output = Result<Snapshot, Error>> + Send>>;
/// Reads the position, and optionally values, on a separate handle.
type Reader = Arc<dyn Fn() -> Reading + Send + Sync>;

/// [S9](essentially_once::OffsetStore#contract): a position read while commits run belongs entirely
/// to one commit, and is never older than a commit acknowledged before the read.
pub(super) async fn s9_a_position_is_of_one_commit<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let writing = Arc::new(backend.store().await?);
    let mut readers = Vec::new();
    for store in [
        Arc::clone(&writing),
        Arc::new(backend.store().await?),
        Arc::new(backend.store().await?),
    ] {
        let reader = move || -> Reading {
            let store = Arc::clone(&store);
            Box::pin(async move {
                let position = store.position(&consumer("shipping")).await?;
                Ok(Snapshot::new(position, Vec::new()))
            })
        };
        readers.push(Arc::new(reader) as Reader);
    }
    read_while_committing(backend, &*writing, readers).await
}

/// [`ReadState`](essentially_once::ReadState): position and values belong to one commit, and are
/// never older than a commit acknowledged before the read.
pub(super) async fn s11_a_snapshot_is_of_one_commit<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let mut readers = Vec::new();
    for reading in [backend.state_reader().await?, backend.state_reader().await?] {
        let reader = move || -> Reading {
            let reading = Arc::clone(&reading);
            Box::pin(async move { reading.read_state(&consumer("shipping"), &KEYS).await })
        };
        readers.push(Arc::new(reader) as Reader);
    }
    read_while_committing(backend, &backend.store().await?, readers).await
}

/// One consumer commits, and each commit writes its number everywhere. Meanwhile readers look for
/// parts of two commits.
async fn read_while_committing<B: Backend>(backend: &B, store: &B::Store, readers: Vec<Reader>) -> CaseResult {
    let id = backend.log("orders").await?.id().clone();
    // Done before any reader starts. A store may have to create something for a consumer, and
    // report it as unavailable until then.
    commit_number(store, &id, 1).await?;
    let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(1)));
    let mut reading = JoinSet::new();
    let counts: Vec<_> = readers.iter().map(|_| Arc::new(AtomicU64::new(0))).collect();
    for (reader, count) in readers.iter().cloned().zip(&counts) {
        let (id, stop, acknowledged, count) = (
            id.clone(),
            Arc::clone(&stop),
            Arc::clone(&acknowledged),
            Arc::clone(count),
        );
        reading.spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let floor = acknowledged.load(Ordering::SeqCst);
                let snapshot = reader().await?;
                whole(&id, floor, &snapshot)?;
                count.fetch_add(1, Ordering::SeqCst);
                tokio::task::yield_now().await;
            }
            Ok::<_, Violation>(())
        });
    }
    for n in 2..=AT_MOST {
        commit_number(store, &id, n).await?;
        acknowledged.store(n, Ordering::SeqCst);
        if n.is_multiple_of(QUIET_COMMITS) {
            // Concurrent readers may by chance always read in the middle of a commit, whose changes
            // may or may not show.
            for reader in &readers {
                whole(&id, n, &reader().await?)?;
            }
        }
        let fewest = counts.iter().map(|count| count.load(Ordering::SeqCst)).min();
        if n >= AT_LEAST && fewest.is_some_and(|fewest| fewest >= AT_LEAST) {
            break;
        }
        // A reader that has ended has found something.
        if let Some(ended) = reading.try_join_next() {
            return read_to_its_end(ended);
        }
        tokio::task::yield_now().await;
    }
    stop.store(true, Ordering::SeqCst);
    while let Some(ended) = reading.join_next().await {
        read_to_its_end(ended)?;
    }
    Ok(())
}

/// Commits `n`, and writes this number everywhere.
async fn commit_number<S: OffsetStore<Tx: KeyValue>>(store: &S, id: &LogId, n: u64) -> Result<(), Error> {
    let position = position_number(id, n);
    let before = match n {
        1 => Revision::NONE,
        n => Revision::new(1, n - 1),
    };
    let mut advance = Advance::new(id.clone(), position.next, before, position.revision);
    (advance.owner, advance.note, advance.windows) = (position.owner, position.note, position.windows);
    advance.journal = (n % 2 == 1).then_some(position.journal);
    let mut tx = store.begin(&consumer("shipping")).await?;
    for key in KEYS {
        tx.put(key, &n.to_be_bytes()).await?;
    }
    tx.commit(advance).await
}

fn read_to_its_end(ended: Result<CaseResult, tokio::task::JoinError>) -> CaseResult {
    ended.map_err(|error| Violation::new(format!("a reader panicked: {error}")))?
}

/// The position that commit `n` stores.
fn position_number(log: &LogId, n: u64) -> Position {
    let mut position = Position::new(log.clone(), Offset::new(n, n), Revision::new(1, n));
    position.owner = Some(Owner::new(u128::from(n)));
    position.note = Note::after(&Record::new(Offset::new(n, n - 1), UNIX_EPOCH, n.to_string()));
    // Only odd commits replace the journal.
    position.journal = journal_number(n - (n + 1) % 2);
    let producers = ["a", "b", "c#7", "d", "e", "f"];
    position.windows = producers.map(|name| (numbering(name), Window::new(n))).into();
    position
}

fn journal_number(n: u64) -> Journal {
    let journal = Journal::default().with(&Operator::new("ann"), OperatorAction::Skip(n.into()));
    // The encoding has the time after the version.
    let mut encoded = journal.encode();
    encoded[1..9].fill(0);
    Journal::decode(encoded).expect("its own encoding")
}

fn whole(log: &LogId, floor: u64, snapshot: &Snapshot) -> CaseResult {
    let Some(found) = &snapshot.position else {
        ensure!(
            floor == 0,
            "commit {floor} was acknowledged, and then a read found no position"
        );
        ensure!(
            snapshot.values.iter().all(Option::is_none),
            "a snapshot has the position of no commit, but the values {:?}",
            snapshot.values
        );
        return Ok(());
    };
    let n = found.revision.count();
    ensure!(
        n >= floor,
        "commit {floor} was acknowledged, and then a read returned commit {n}"
    );
    let torn = compare::position(found, &position_number(log, n));
    ensure!(
        torn.is_none(),
        "a position read while commits run is wrong: {}",
        torn.unwrap_or_default()
    );
    for (value, key) in snapshot.values.iter().zip(KEYS) {
        ensure!(
            value.as_deref() == Some(&n.to_be_bytes()),
            "a snapshot has the position of commit {n}, but {} = {value:?}",
            String::from_utf8_lossy(key)
        );
    }
    Ok(())
}

/// [`ReadState`](essentially_once::ReadState): values are returned in the order of the keys, with
/// `None` for a missing value. Repeated keys are repeated. Other consumers' values never appear.
pub(super) async fn s11_a_snapshot_keeps_the_order_of_keys<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (shipping, billing) = (consumer("shipping"), consumer("billing"));
    let reading = backend.state_reader().await?;
    let nothing = reading.read_state(&shipping, &[b"b"]).await?;
    ensure!(
        nothing == Snapshot::new(None, vec![None]),
        "a consumer that never committed has the snapshot {nothing:?}"
    );
    commit(
        &store,
        &billing,
        &*log,
        &[(b"b", Some(b"billing")), (b"x", Some(b"billing"))],
        7,
    )
    .await?;
    commit(
        &store,
        &shipping,
        &*log,
        &[(b"b", Some(b"1")), (b"a", Some(b"")), (b"c", Some(b"3"))],
        1,
    )
    .await?;
    commit(&store, &shipping, &*log, &[(b"c", None)], 2).await?;
    let keys: [&[u8]; 6] = [b"b", b"x", b"a", b"c", b"b", b""];
    let found = reading.read_state(&shipping, &keys).await?;
    let expected = [Some("1"), None, Some(""), None, Some("1"), None];
    let values: Vec<_> = found.values.iter().map(Option::as_deref).collect();
    ensure!(
        values == expected.map(|value| value.map(str::as_bytes)),
        "a snapshot of {:?} has the values {:?}",
        keys.map(String::from_utf8_lossy),
        found.values
    );
    let stored = position(&store, &shipping).await?;
    let differing = found
        .position
        .as_ref()
        .map(|position| compare::position(position, &stored));
    ensure!(
        differing == Some(None),
        "a snapshot's position is not the stored one: {differing:?}"
    );
    let none = reading.read_state(&shipping, &[]).await?;
    ensure!(
        none.values.is_empty() && none.position.is_some(),
        "a snapshot of no keys is {none:?}"
    );
    Ok(())
}

/// S9: an open transaction neither delays a position nor shows in it, and reading a position does
/// not delay the transaction.
pub(super) async fn s9_a_position_waits_for_no_transaction<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, other) = (backend.store().await?, backend.store().await?);
    let (log, shipping) = (backend.log("orders").await?, consumer("shipping"));
    for n in 1..=3 {
        let mut tx = store.begin(&shipping).await?;
        tx.put(b"k", b"staged").await?;
        let mut stored = None;
        for reading in [&store, &other] {
            stored = soon("a position during an open transaction", reading.position(&shipping)).await??;
            let next = stored.as_ref().map(|position| position.next);
            let expected = (n > 1).then(|| Offset::from(n - 1));
            ensure!(
                next == expected,
                "a position during an open transaction has next {next:?}, not {expected:?}"
            );
        }
        let advance = advance(stored.as_ref(), &*log, n);
        soon("a commit after positions were read", tx.commit(advance)).await??;
    }
    Ok(())
}

/// [`ReadState`](essentially_once::ReadState): an open transaction neither delays a snapshot nor
/// shows in it, and a snapshot does not delay the transaction.
pub(super) async fn s11_a_snapshot_waits_for_no_transaction<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let reading = backend.state_reader().await?;
    commit(&store, &shipping, &*log, &[(b"k", Some(b"1"))], 1).await?;
    let stored = position(&store, &shipping).await?;
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"k", b"2").await?;
    for _ in 0..3 {
        let found = soon(
            "a snapshot during an open transaction",
            reading.read_state(&shipping, &[b"k"]),
        )
        .await??;
        let next = found.position.map(|position| position.next);
        ensure!(
            (next, found.values[0].as_deref()) == (Some(1.into()), Some(b"1")),
            "a snapshot during an open transaction has next {next:?} and k = {:?}",
            found.values[0]
        );
    }
    soon("a commit after snapshots", tx.commit(advance(Some(&stored), &*log, 2))).await??;
    let found = reading.read_state(&shipping, &[b"k"]).await?;
    ensure!(
        found.values[0].as_deref() == Some(b"2"),
        "after the commit a snapshot has k = {:?}",
        found.values[0]
    );
    // Neither does a snapshot whose future was dropped.
    let dropped = tokio::time::timeout(std::time::Duration::ZERO, reading.read_state(&shipping, &[b"k"])).await;
    drop(dropped);
    soon(
        "a commit after a dropped snapshot",
        commit(&store, &shipping, &*log, &[(b"k", Some(b"3"))], 3),
    )
    .await??;
    Ok(())
}
