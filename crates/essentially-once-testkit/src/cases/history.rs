//! Cases for consumers with many commits, [S1](essentially_once::OffsetStore#contract).

use std::time::UNIX_EPOCH;

use essentially_once::{
    KeyValue, Offset, OffsetStore, Record,
    backend::{Advance, Note, Owner, Revision, Transaction, Window},
};

use super::{
    common::{consumer, counter},
    compare,
    store::{numbering, position, value},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// [S1](essentially_once::OffsetStore#contract): one consumer makes more than 255 commits.
pub(super) async fn s1_hundreds_of_commits_keep_everything<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    commits(backend, 300, 1).await
}

/// [S1](essentially_once::OffsetStore#contract): one consumer makes more than 65,535 commits.
pub(super) async fn s1_tens_of_thousands_of_commits_keep_everything<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    commits(backend, 66_000, 500).await
}

/// Commits `count` times, and checks everything after every `look` commits. Values written only by
/// the first commit must stay.
async fn commits<B: Backend>(backend: &B, count: u64, look: u64) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (shipping, other) = (consumer("shipping"), backend.store().await?);
    let first = (numbering("first"), Window::new(5));
    for n in 1..=count {
        let expected = match n {
            1 => Revision::NONE,
            n => Revision::new(1, n - 1),
        };
        let mut advance = Advance::new(log.id().clone(), n.into(), expected, Revision::new(1, n));
        advance.owner = Some(Owner::new(u128::from(n)));
        advance.note = Note::after(&Record::new(Offset::from(n), UNIX_EPOCH, n.to_string()));
        advance.windows = vec![(numbering("each"), Window::new(n))];
        let mut tx = store.begin(&shipping).await?;
        if n == 1 {
            advance.windows.push(first.clone());
            tx.put(b"first", b"kept").await?;
        }
        tx.put(b"n", &n.to_be_bytes()).await?;
        let mut expected =
            essentially_once::backend::Position::new(advance.log.clone(), advance.next, advance.revision);
        (expected.owner, expected.note) = (advance.owner, advance.note.clone());
        expected.windows = vec![(numbering("each"), Window::new(n)), first.clone()];
        if let Err(error) = tx.commit(advance).await {
            return Err(Violation::new(format!("commit {n} of one consumer failed: {error}")));
        }
        if n % look != 0 && n != count {
            continue;
        }
        for store in [&store, &other] {
            let found = position(store, &shipping).await?;
            let differing = compare::position(&found, &expected);
            ensure!(
                differing.is_none(),
                "after {n} commits, the position is wrong: {}",
                differing.unwrap_or_default()
            );
            let found = counter(value(store, &shipping, b"n").await?.as_deref());
            ensure!(found == n, "after {n} commits the state counts {found}");
            let found = value(store, &shipping, b"first").await?;
            ensure!(
                found.as_deref() == Some(b"kept"),
                "after {n} commits, what the first one wrote reads {found:?}"
            );
        }
    }
    Ok(())
}
