//! Cases for requests and replies lost on the wire: [L7](essentially_once::Log#contract),
//! [S5](essentially_once::OffsetStore#contract) and [O1](essentially_once::Outbox#contract).

use essentially_once::{
    Error, KeyValue, Log, OffsetStore,
    backend::{Position, Transaction},
};

use super::{
    common::{SOON, advance, consumer, counter, is_certain, payloads, read_all, records, soon},
    outbox::{Sender, agree, send_next},
    store::value,
};
use crate::{
    harness::{Backend, Harness, Request},
    proxy::Cut,
    violation::{CaseResult, Violation, ensure},
};

/// Each kind of cut occurs several times, because a handle may behave differently after a cut.
const CUTS: [Cut; 6] = [
    Cut::BeforeReply,
    Cut::BeforeRequest,
    Cut::BeforeReply,
    Cut::BeforeReply,
    Cut::BeforeRequest,
    Cut::BeforeRequest,
];

/// [S5](essentially_once::OffsetStore#contract): after a cut, the commit returns what it knows, the
/// position shows the truth, and no commit took effect twice.
pub(super) async fn s5_a_lost_reply_leaves_the_truth_to_position<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let shipping = consumer("shipping");
    let (direct, log) = (backend.store().await?, backend.log("orders").await?);
    for (round, cut) in CUTS.into_iter().enumerate() {
        // Armed once before the handle opens, so that its connection runs through the proxy.
        backend.cut_next(Request::Commit, cut).await?;
        let store = backend.store().await?;
        let before = store.position(&shipping).await?;
        let mut tx = store.begin(&shipping).await?;
        let n = counter(tx.get(b"n").await?.as_deref()) + 1;
        tx.put(b"n", &n.to_be_bytes()).await?;
        let advance = advance(before.as_ref(), &*log, n);
        let (expected, revision) = (advance.expected, advance.revision);
        let cuts = backend.cuts();
        let result = soon("a commit whose connection is cut", tx.commit(advance)).await?;
        was_cut(backend, cuts, round).await?;
        let (after, n) = soon("the position after a cut", stored(&direct)).await?;
        let found = after
            .as_ref()
            .map_or_else(Default::default, |position| position.revision);
        let (fits, meaning) = match &result {
            Ok(()) => (found == revision, "made"),
            Err(error) if is_certain(error) => (found == expected, "not made"),
            Err(_) => (found == expected || found == revision, "made or not made"),
        };
        ensure!(
            fits,
            "cut {round} ({cut:?}): a commit from revision {expected} to {revision} returned {result:?}, \
             which means {meaning}, but {found} is stored"
        );
        let next = after.map(|position| position.next).unwrap_or_default();
        ensure!(
            next == n.into(),
            "cut {round} ({cut:?}): the position is {next}, but the state counts {n}"
        );
        soon("a commit after a cut", settle(&direct, &*log)).await??;
    }
    Ok(())
}

/// Commits once more. Until then, a commit whose reply was lost may still arrive, and the next
/// round would take it for its own.
async fn settle<S: OffsetStore<Tx: KeyValue>>(store: &S, log: &dyn Log) -> CaseResult {
    let shipping = consumer("shipping");
    loop {
        let committing = async {
            let before = store.position(&shipping).await?;
            let mut tx = store.begin(&shipping).await?;
            let n = counter(tx.get(b"n").await?.as_deref()) + 1;
            tx.put(b"n", &n.to_be_bytes()).await?;
            tx.commit(advance(before.as_ref(), log, n)).await
        };
        match committing.await {
            // It has just arrived.
            Err(Error::Fenced { .. }) => {}
            Err(error) if error.is_transient() => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            done => return Ok(done?),
        }
    }
}

/// [O1](essentially_once::Outbox#contract): after a cut, the outbox has a record for each step of
/// the position, whatever the commit returned.
pub(super) async fn o1_a_lost_reply_neither_loses_nor_doubles_records<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let name = backend.outbox_name("a");
    send_next(&Sender::open(backend, "shipping").await?, &name).await?;
    for (round, cut) in CUTS.into_iter().enumerate() {
        // Armed once before the handle opens, so that its connection runs through the proxy.
        backend.cut_next(Request::Commit, cut).await?;
        let sender = Sender::open(backend, "shipping").await?;
        let cuts = backend.cuts();
        let result = soon("a commit whose connection is cut", send_next(&sender, &name)).await?;
        was_cut(backend, cuts, round).await?;
        agree(
            backend,
            &format!("cut {round} ({cut:?}), after which the commit returned {result:?}"),
        )
        .await?;
        go_on(&sender, &name).await?;
        agree(
            backend,
            &format!("after a commit on the handle of cut {round} ({cut:?})"),
        )
        .await?;
    }
    Ok(())
}

/// Sends once more on a handle whose connection was cut. It may notice that late.
async fn go_on<S: OffsetStore<Tx: KeyValue>>(sender: &Sender<S>, name: &str) -> CaseResult {
    let going_on = async {
        loop {
            match send_next(sender, name).await {
                Err(error) if error.is_transient() => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
                done => return done,
            }
        }
    };
    Ok(soon("a commit on a handle whose connection was cut", going_on).await??)
}

/// Reads the position, and the counter of the same moment, retrying until the backend answers
/// again. A commit whose reply was lost may still arrive in between.
async fn stored<S: OffsetStore<Tx: KeyValue>>(store: &S) -> (Option<Position>, u64) {
    let shipping = consumer("shipping");
    loop {
        let before = store.position(&shipping).await;
        let n = value(store, &shipping, b"n").await;
        let after = store.position(&shipping).await;
        match (before, n, after) {
            (Ok(before), Ok(n), Ok(after)) if before == after => return (after, counter(n.as_deref())),
            _ => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
        }
    }
}

async fn was_cut(backend: &impl Backend, cuts: usize, round: usize) -> CaseResult {
    let made = async {
        while backend.cuts() == cuts {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    let made = tokio::time::timeout(SOON, made).await;
    made.map_err(|_| {
        Violation::new(format!(
            "the harness made no cut in round {round}: check that its pattern occurs in the request"
        ))
    })
}

/// [L7](essentially_once::Log#contract): batches of three whose connection is cut. Acknowledged
/// batches are there once. Batches that certainly failed left nothing. Batches in doubt left a
/// prefix. No record is there twice.
pub(super) async fn l7_a_lost_reply_never_doubles_an_append<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let direct = backend.log("orders").await?;
    let mut outcomes: Vec<(Cut, Result<(), Error>)> = Vec::new();
    for (round, cut) in CUTS.into_iter().enumerate() {
        backend.cut_next(Request::Append, cut).await?;
        let log = backend.log("orders").await?;
        let cuts = backend.cuts();
        let batch = records((0..3).map(|n| format!("{round}.{n}")));
        let result = soon("an append whose connection is cut", log.append(&batch)).await?;
        was_cut(backend, cuts, round).await?;
        outcomes.push((cut, result.map(drop)));
    }
    direct.append(&records(["end"])).await?;
    let mut found = Vec::new();
    let mut reader = direct.read(direct.bounds().await?.earliest).await?;
    while found.last().is_none_or(|last| last != "end") {
        found.extend(payloads(&soon("the last record", reader.next(1_000)).await??));
    }
    for (round, (cut, outcome)) in outcomes.iter().enumerate() {
        let prefix = format!("{round}.");
        let there: Vec<_> = found.iter().filter(|payload| payload.starts_with(&prefix)).collect();
        let expected = (0..3).map(|n| format!("{round}.{n}"));
        let is_prefix = there.len() <= 3 && there.iter().zip(expected).all(|(found, expected)| **found == expected);
        let (fits, meaning) = match outcome {
            Ok(()) => (is_prefix && there.len() == 3, "all three records"),
            Err(error) if is_certain(error) => (there.is_empty(), "none"),
            Err(_) => (is_prefix, "a prefix"),
        };
        ensure!(
            fits,
            "cut {round} ({cut:?}): an append returned {outcome:?}, which means {meaning}, but the log holds {there:?}"
        );
    }
    let all = read_all(&*direct, found.len()).await?;
    ensure!(
        payloads(&all) == found,
        "a second read of the log returned {:?}",
        payloads(&all)
    );
    Ok(())
}
