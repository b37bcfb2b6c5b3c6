//! Cases for similar names: long names, names that differ only in case or in a separator, and names
//! with a common prefix.

use essentially_once::{
    KeyValue, OffsetStore,
    backend::{Transaction, Window},
};

use super::{
    common::{advance, consumer, payloads, read_all, records},
    compare,
    store::{commit, numbering, position, value},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, ensure},
};

/// The longest name that the core accepts.
pub(super) const LONGEST: usize = 200;

/// Distinct names of up to `longest` bytes that a careless backend confuses.
pub(super) fn similar(longest: usize) -> Vec<String> {
    let stem = "n".repeat(longest - 1);
    let separated = ['.', '-', '_', ':', '/', '@', '+', '='].map(|separator| format!("a{separator}b"));
    let alike = [
        "orders", "Orders", "ORDERS", "order", "orders1", "orders11", "orders.", "orders.a", "a", "ab",
    ];
    [format!("{stem}1"), format!("{stem}2"), stem]
        .into_iter()
        .chain(separated)
        .chain(alike.map(str::to_owned))
        .collect()
}

/// The part of a name that identifies it.
fn shown(name: &str) -> String {
    match name.len() {
        0..40 => name.to_owned(),
        length => format!("...{} ({length} bytes)", &name[length - 5..]),
    }
}

/// [L4](essentially_once::Log#contract): a log with a similar name is another log.
pub(super) async fn l4_logs_with_similar_names_are_independent<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let names = similar(harness.capabilities().log_name_bytes.min(LONGEST));
    for (n, name) in names.iter().enumerate() {
        let log = backend.log(name).await?;
        let bounds = log.bounds().await?;
        ensure!(
            bounds.earliest == bounds.end,
            "log {} holds something before anyone appended to it: {bounds:?}",
            shown(name)
        );
        log.append(&records([n])).await?;
    }
    for (n, name) in names.iter().enumerate() {
        let log = backend.log(name).await?;
        let found = payloads(&read_all(&*log, 1).await?);
        ensure!(
            found == [n.to_string()],
            "log {} holds {found:?}, but only record {n} was appended to it",
            shown(name)
        );
        let bounds = log.bounds().await?;
        let end = log.read(bounds.earliest).await?.next(1).await?[0].offset.successor();
        ensure!(
            bounds.end == end,
            "log {} ends at {}, but its one record ends at {end}",
            shown(name),
            bounds.end
        );
    }
    Ok(())
}

/// [S7](essentially_once::OffsetStore#contract): a consumer with a similar name is another
/// consumer.
pub(super) async fn s7_consumers_with_similar_names_are_independent<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let names = similar(LONGEST);
    for (n, name) in (1u64..).zip(&names) {
        let id = consumer(name);
        ensure!(
            store.position(&id).await?.is_none() && value(&store, &id, b"k").await?.is_none(),
            "consumer {} has a position or state before it committed",
            shown(name)
        );
        commit(&store, &id, &*log, &[(b"k", Some(&n.to_be_bytes()))], n).await?;
    }
    for (n, name) in (1u64..).zip(&names) {
        let id = consumer(name);
        let found = position(&store, &id).await?;
        ensure!(
            found.next == n.into(),
            "consumer {} committed {n}, but its position is {}",
            shown(name),
            found.next
        );
        let found = value(&store, &id, b"k").await?;
        ensure!(
            found.as_deref() == Some(&n.to_be_bytes()),
            "consumer {} wrote {n}, but it reads {found:?}",
            shown(name)
        );
    }
    Ok(())
}

/// [S1](essentially_once::OffsetStore#contract): producers with similar names have separate
/// windows.
pub(super) async fn s1_windows_of_similar_producers_are_independent<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let mut names = similar(LONGEST);
    names.extend(["a#1".into(), "a#11".into(), "ab#1".into(), "A#1".into()]);
    let windows = (10u64..).zip(&names);
    let windows: Vec<_> = windows.map(|(n, name)| (numbering(name), Window::new(n))).collect();
    let mut first = advance(None, &*log, 1);
    first.windows.clone_from(&windows);
    store.begin(&shipping).await?.commit(first).await?;
    let found = position(&backend.store().await?, &shipping).await?;
    let differing = compare::windows(&found.windows, &windows);
    ensure!(
        differing.is_none(),
        "after a commit of the position, {}",
        differing.unwrap_or_default()
    );

    // Forget every other producer. The similarly named ones must stay.
    let mut second = advance(Some(&found), &*log, 2);
    second.forgotten = windows.iter().step_by(2).map(|(name, _)| name.clone()).collect();
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"k", b"v").await?;
    tx.commit(second).await?;
    let left: Vec<_> = windows.iter().skip(1).step_by(2).cloned().collect();
    let found = position(&backend.store().await?, &shipping).await?;
    let differing = compare::windows(&found.windows, &left);
    ensure!(
        differing.is_none(),
        "after every other producer was forgotten, {}",
        differing.unwrap_or_default()
    );
    Ok(())
}

/// [S7](essentially_once::OffsetStore#contract): two consumers of one log and one producer.
pub(super) async fn s7_consumers_do_not_see_each_others_windows<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (shipping, billing) = (consumer("shipping"), consumer("billing"));
    let web = |n| {
        vec![
            (numbering("web"), Window::new(n)),
            (numbering("web#7"), Window::new(n + 1)),
        ]
    };
    let mut first = advance(None, &*log, 1);
    first.windows = web(10);
    store.begin(&shipping).await?.commit(first).await?;
    store.begin(&billing).await?.commit(advance(None, &*log, 1)).await?;
    let found = position(&store, &billing).await?;
    ensure!(
        found.windows.is_empty(),
        "billing, which committed no windows, has {:?}",
        found.windows
    );
    let mut second = advance(Some(&found), &*log, 2);
    second.windows = web(20);
    store.begin(&billing).await?.commit(second).await?;
    for (id, n) in [(&shipping, 10), (&billing, 20)] {
        let found = position(&store, id).await?;
        let differing = compare::windows(&found.windows, &web(n));
        ensure!(
            differing.is_none(),
            "of the position of {id}, which committed sequence {n}, {}",
            differing.unwrap_or_default()
        );
    }
    let mut third = advance(Some(&position(&store, &billing).await?), &*log, 3);
    third.forgotten = vec![numbering("web"), numbering("web#7")];
    store.begin(&billing).await?.commit(third).await?;
    let found = (position(&store, &shipping).await?, position(&store, &billing).await?);
    let differing = compare::windows(&found.0.windows, &web(10));
    ensure!(
        differing.is_none() && found.1.windows.is_empty(),
        "after billing forgot its windows, shipping's differ ({differing:?}), billing's are {:?}",
        found.1.windows
    );
    Ok(())
}
