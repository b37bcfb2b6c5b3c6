//! Cases for native writes within a commit: [S1, S2, S4 and
//! S6](essentially_once::OffsetStore#contract).

use essentially_once::{
    Error, KeyValue, OffsetStore,
    backend::{Revision, Transaction},
};

use super::{
    common::{advance, consumer, soon},
    store::{position, value},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, ensure},
};

/// [S1](essentially_once::OffsetStore#contract): native writes, including several with one name,
/// exist if and only if the commit does.
pub(super) async fn s1_native_writes_are_applied_with_the_commit<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    for n in 1..=3u64 {
        let before = store.position(&shipping).await?;
        let mut tx = store.begin(&shipping).await?;
        backend.native_put(&mut tx, "each").await?;
        tx.put(b"n", &n.to_be_bytes()).await?;
        backend.native_put(&mut tx, "each").await?;
        backend.native_put(&mut tx, &format!("commit-{n}")).await?;
        let found = (
            backend.native_count("each").await?,
            backend.native_count(&format!("commit-{n}")).await?,
        );
        ensure!(
            found == (2 * (n - 1), 0),
            "commit {n} is not made yet, but its native writes are visible: {found:?}"
        );
        tx.commit(advance(before.as_ref(), &*log, n)).await?;
        for (name, expected) in [("each".to_owned(), 2 * n), (format!("commit-{n}"), 1)] {
            let found = backend.native_count(&name).await?;
            ensure!(
                found == expected,
                "after commit {n}, {name} was natively written {expected} times and counts {found}"
            );
        }
        let found = (
            position(&store, &shipping).await?.next,
            value(&store, &shipping, b"n").await?,
        );
        ensure!(
            found == (n.into(), Some(n.to_be_bytes().to_vec())),
            "commit {n} wrote natively, but lost its other changes: {found:?}"
        );
    }
    Ok(())
}

/// [S2](essentially_once::OffsetStore#contract): a stale commit leaves no native writes, and
/// neither does a commit for another log.
pub(super) async fn s2_a_fenced_commit_applies_no_native_writes<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (invoices, shipping) = (backend.log("invoices").await?, consumer("shipping"));
    let first = advance(None, &*log, 1);
    store.begin(&shipping).await?.commit(first.clone()).await?;
    let mut tx = store.begin(&shipping).await?;
    backend.native_put(&mut tx, "late").await?;
    let result = tx.commit(first).await;
    ensure!(
        matches!(result, Err(Error::Fenced { .. })),
        "a late commit returned {result:?}"
    );
    let stored = position(&store, &shipping).await?;
    let mut tx = store.begin(&shipping).await?;
    backend.native_put(&mut tx, "late").await?;
    let result = tx.commit(advance(Some(&stored), &*invoices, 2)).await;
    ensure!(
        matches!(result, Err(Error::WrongLog { .. })),
        "a commit for another log returned {result:?}"
    );
    // The next commit must not bring the refused writes along.
    let mut tx = store.begin(&shipping).await?;
    backend.native_put(&mut tx, "next").await?;
    tx.commit(advance(Some(&stored), &*log, 2)).await?;
    let found = (backend.native_count("late").await?, backend.native_count("next").await?);
    ensure!(
        found == (0, 1),
        "after two refused commits and one successful commit, (late, next) are natively {found:?}, not (0, 1)"
    );
    Ok(())
}

/// [S4](essentially_once::OffsetStore#contract): dropping or rolling back a transaction leaves no
/// native writes.
pub(super) async fn s4_a_transaction_that_ends_leaves_no_native_writes<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    for is_dropped in [true, false] {
        let mut tx = store.begin(&shipping).await?;
        backend.native_put(&mut tx, "gone").await?;
        tx.put(b"k", b"v").await?;
        match is_dropped {
            true => drop(tx),
            false => tx.rollback().await?,
        }
        // The next transaction completes whatever a dropped one left open.
        let before = store.position(&shipping).await?;
        let mut tx = store.begin(&shipping).await?;
        backend.native_put(&mut tx, "made").await?;
        tx.commit(advance(before.as_ref(), &*log, 1)).await?;
        let found = backend.native_count("gone").await?;
        ensure!(
            found == 0,
            "a transaction that was {} left {found} native writes",
            if is_dropped { "dropped" } else { "rolled back" }
        );
    }
    let found = backend.native_count("made").await?;
    ensure!(
        found == 2,
        "two commits wrote natively once each, but {found} native writes are there"
    );
    Ok(())
}

/// [S6](essentially_once::OffsetStore#contract): a transaction whose read failed does not commit
/// its native writes.
pub(super) async fn s6_a_failed_read_commits_no_native_writes<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let mut tx = store.begin(&shipping).await?;
    backend.native_put(&mut tx, "staged").await?;
    backend.restart().await?;
    let mut failed = false;
    for key in [&b"a"[..], b"b", b"c"] {
        failed |= tx.get(key).await.is_err();
    }
    let mut advance = advance(None, &*log, 1);
    advance.revision = Revision::new(1, 1);
    let result = tx.commit(advance).await;
    if failed {
        let count = soon("the backend up again after a restart", async {
            loop {
                match backend.native_count("staged").await {
                    Ok(count) => return count,
                    // No event reports that a server accepts connections again. Polling is the only
                    // way to know.
                    Err(_) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
                }
            }
        })
        .await?;
        ensure!(
            result.is_err() && count == 0,
            "a read failed and was ignored, then the commit returned {result:?}, and {count} native writes are there"
        );
    }
    Ok(())
}
