//! Cases that restart the backend, both idle and busy: [L1, L7](essentially_once::Log#contract) and
//! [S1, S3, S5](essentially_once::OffsetStore#contract).

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use essentially_once::{
    Error, KeyValue, Log, OffsetStore, Record,
    backend::{Advance, Position, Revision, Transaction, Window},
};

use super::{
    common::{advance, consumer, counter, is_certain, payloads, records, soon},
    compare,
    store::numbering,
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// For how many steps of the work to look without a pause. Backends in memory take few.
const STEPS: u32 = 1_000;

/// [L1](essentially_once::Log#contract): acknowledged records survive a restart, and appends
/// continue after them.
pub(super) async fn l1_appended_records_survive_a_restart<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    for round in 0..3 {
        let log = up(|| backend.log("orders")).await?;
        let batch = records([round * 2, round * 2 + 1]);
        once_ready(|| log.append(&batch)).await?;
        backend.restart().await?;
        let log = up(|| backend.log("orders")).await?;
        let expected: Vec<_> = (0..=round * 2 + 1).map(|n| n.to_string()).collect();
        let bounds = once_ready(|| log.bounds()).await?;
        ensure!(
            bounds.earliest < bounds.end,
            "restart {round}: acknowledged records are gone, the log is empty"
        );
        let last = (round * 2 + 1).to_string();
        let found = once_ready(|| read_to_last(&*log, &last)).await?;
        let found = payloads(&found);
        ensure!(
            found == expected,
            "restart {round}: appended {expected:?}, found {found:?}"
        );
    }
    Ok(())
}

/// Opens a backend as soon as it is up again.
pub(super) async fn up<T, F: Future<Output = Result<T, Error>>>(mut open: impl FnMut() -> F) -> Result<T, Violation> {
    soon("the backend up again after a restart", async {
        loop {
            match open().await {
                Ok(opened) => return opened,
                // No event reports that a server accepts connections again. Polling is the only way
                // to know.
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    })
    .await
}

/// Repeats a request to a restarted backend until it no longer returns [`Error::Unavailable`]. That
/// error means that nothing has happened yet. The backend may have to open a log before it can use
/// it.
pub(super) async fn once_ready<T, F: Future<Output = Result<T, Error>>>(
    mut ask: impl FnMut() -> F,
) -> Result<T, Violation> {
    let mut last = None;
    let asking = async {
        loop {
            match ask().await {
                Err(error @ Error::Unavailable { .. }) => last = Some(error),
                done => return done,
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    match soon("an answer after a restart", asking).await {
        Ok(done) => Ok(done?),
        Err(violation) => Err(last.map_or(violation, Violation::from)),
    }
}

/// Reads all records up to the one with this payload.
async fn read_to_last(log: &dyn Log, payload: &str) -> Result<Vec<Record>, Error> {
    let mut reader = log.read(log.bounds().await?.earliest).await?;
    let mut found: Vec<Record> = Vec::new();
    while found.last().is_none_or(|last| last.payload != payload.as_bytes()) {
        found.extend(reader.next(1_000).await?);
    }
    Ok(found)
}

/// Runs `work` until it has seen as many restarts as the harness wants. Between restarts the work
/// must advance, as `progress` counts.
pub(super) async fn while_restarting<H: Harness, F: Future<Output = CaseResult>>(
    harness: &H,
    backend: &H::Backend,
    work: impl FnOnce(Arc<AtomicBool>, Arc<AtomicUsize>) -> F,
) -> CaseResult {
    let (stop, progress) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let restarts = async {
        let mut seen = 0;
        for restart in 0..harness.capabilities().restarts {
            let mut steps = 0..STEPS;
            while progress.load(Ordering::SeqCst) < seen + 20 {
                match steps.next() {
                    Some(_) => tokio::task::yield_now().await,
                    // A server that starts needs the processor.
                    None => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
            // `work` counts between two operations, and restarts should hit those at different
            // stages.
            for _ in 0..5_u32.pow(restart) {
                tokio::task::yield_now().await;
            }
            backend.restart().await?;
            seen = progress.load(Ordering::SeqCst);
        }
        stop.store(true, Ordering::SeqCst);
        Ok::<_, Violation>(())
    };
    // A violation ends both at once. Otherwise the restarts would wait forever for work that has
    // stopped. `biased` polls both in strict turns. Otherwise restarts could fall only after every
    // other step of the work.
    tokio::try_join!(biased; work(Arc::clone(&stop), Arc::clone(&progress)), restarts)?;
    Ok(())
}

/// [L7](essentially_once::Log#contract): batches of three while the backend restarts. Acknowledged
/// batches are there in full. Batches that certainly failed left nothing. Batches in doubt left a
/// prefix.
pub(super) async fn l7_a_failed_append_reports_its_outcome<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let mut outcomes = Vec::new();
    let results = &mut outcomes;
    while_restarting(
        harness,
        backend,
        async |stop: Arc<AtomicBool>, progress: Arc<AtomicUsize>| {
            let mut log = up(|| backend.log("orders")).await?;
            while !stop.load(Ordering::SeqCst) {
                let batch = results.len();
                let result = log.append(&records((0..3).map(|n| format!("{batch}.{n}")))).await;
                if result.is_err() {
                    log = up(|| backend.log("orders")).await?;
                }
                results.push(result.map(drop));
                progress.fetch_add(1, Ordering::SeqCst);
                tokio::task::yield_now().await;
            }
            Ok(())
        },
    )
    .await?;
    let log = up(|| backend.log("orders")).await?;
    let end = records(["end"]);
    once_ready(|| log.append(&end)).await?;
    let found = payloads(&once_ready(|| read_to_last(&*log, "end")).await?);
    for (batch, outcome) in outcomes.iter().enumerate() {
        let prefix = format!("{batch}.");
        let there: Vec<_> = found.iter().filter(|payload| payload.starts_with(&prefix)).collect();
        let is_prefix = there
            .iter()
            .enumerate()
            .all(|(n, payload)| **payload == format!("{batch}.{n}"));
        let (fits, expected) = match outcome {
            Ok(()) => (is_prefix && there.len() == 3, "all three records"),
            Err(error) if is_certain(error) => (there.is_empty(), "none"),
            Err(_) => (is_prefix, "a prefix"),
        };
        ensure!(
            fits,
            "append {batch} returned {outcome:?}, which means {expected}, but the log holds {there:?}"
        );
    }
    Ok(())
}

/// Reads the stored position and counter.
async fn stored<S: OffsetStore<Tx: KeyValue>>(store: &S) -> Result<(Option<Position>, u64), Error> {
    let shipping = consumer("shipping");
    let mut tx = store.begin(&shipping).await?;
    let n = counter(tx.get(b"n").await?.as_deref());
    tx.rollback().await?;
    Ok((store.position(&shipping).await?, n))
}

/// [S1](essentially_once::OffsetStore#contract): the state counts the commits, and agrees with the
/// position after every failure.
pub(super) async fn s1_a_restart_never_parts_state_from_position<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    while_restarting(
        harness,
        backend,
        async |stop: Arc<AtomicBool>, progress: Arc<AtomicUsize>| {
            let mut store = up(|| backend.store()).await?;
            while !stop.load(Ordering::SeqCst) {
                if let Err(error) = count_one(&store, &*log).await {
                    store = up(|| backend.store()).await?;
                    let (position, n) = settled(backend, &mut store).await?;
                    let next = position.map(|position| position.next).unwrap_or_default();
                    ensure!(
                        next == n.into(),
                        "after {error}: the position is {next}, but the state counts {n}"
                    );
                }
                progress.fetch_add(1, Ordering::SeqCst);
                tokio::task::yield_now().await;
            }
            Ok(())
        },
    )
    .await
}

/// Adds 1 to the counter and the position.
async fn count_one<S: OffsetStore<Tx: KeyValue>>(store: &S, log: &dyn Log) -> Result<(), Error> {
    let (position, _) = stored(store).await?;
    let mut tx = store.begin(&consumer("shipping")).await?;
    let n = counter(tx.get(b"n").await?.as_deref());
    tx.put(b"n", &(n + 1).to_be_bytes()).await?;
    tx.commit(advance(position.as_ref(), log, n + 1)).await
}

/// Commits this count as the counter.
async fn commit_count<S: OffsetStore<Tx: KeyValue>>(store: &S, n: u64, advance: &Advance) -> Result<(), Error> {
    let mut tx = store.begin(&consumer("shipping")).await?;
    tx.put(b"n", &n.to_be_bytes()).await?;
    tx.commit(advance.clone()).await
}

/// Reads the stored position and counter, retrying until the store answers.
async fn settled<B: Backend>(backend: &B, store: &mut B::Store) -> Result<(Option<Position>, u64), Violation> {
    loop {
        match stored(store).await {
            Ok(found) => return Ok(found),
            Err(_) => *store = up(|| backend.store()).await?,
        }
    }
}

/// [S6](essentially_once::OffsetStore#contract): a handler that ignores a failed read must not
/// commit a result computed without the value.
pub(super) async fn s6_a_transaction_whose_read_failed_does_not_commit<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (log, shipping) = (backend.log("orders").await?, consumer("shipping"));
    let mut store = up(|| backend.store()).await?;
    count_one(&store, &*log).await?;
    let before = settled(backend, &mut store).await?;
    let mut tx = store.begin(&shipping).await?;
    backend.restart().await?;
    let mut failed = false;
    // Each read uses another key, so that no answer is cached. A backend may reconnect between two
    // of them.
    for key in [&b"a"[..], b"b", b"c"] {
        failed |= tx.get(key).await.is_err();
    }
    let staged = tx.put(b"n", &9u64.to_be_bytes()).await;
    let result = tx.commit(advance(before.0.as_ref(), &*log, 9u64)).await;
    if failed || staged.is_err() {
        let after = settled(backend, &mut store).await?;
        ensure!(
            result.is_err() && after == before,
            "a read failed and was ignored, then the commit returned {result:?}, and {before:?} became {after:?}"
        );
    }
    Ok(())
}

/// [S3](essentially_once::OffsetStore#contract): position, windows and state of an acknowledged
/// commit.
pub(super) async fn s3_commits_survive_a_restart<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    for round in 1..=3 {
        let mut store = up(|| backend.store()).await?;
        let (position, n) = settled(backend, &mut store).await?;
        let mut advance = advance(position.as_ref(), &*log, n + 1);
        advance.windows.push((numbering("web-1"), Window::new(round)));
        once_ready(|| commit_count(&store, n + 1, &advance)).await?;
        let before = settled(backend, &mut store).await?;
        backend.restart().await?;
        let mut store = up(|| backend.store()).await?;
        let after = settled(backend, &mut store).await?;
        ensure!(
            after.1 == round,
            "restart {round}: {round} commits were acknowledged, the state counts {}",
            after.1
        );
        let differing = before.0.as_ref().zip(after.0.as_ref());
        let differing = differing.map(|(before, after)| compare::position(after, before));
        ensure!(
            differing == Some(None),
            "restart {round} changed the position: {}",
            differing.flatten().unwrap_or_else(|| "it has no position".into())
        );
    }
    Ok(())
}

/// [S3](essentially_once::OffsetStore#contract): a commit of only a position, or only windows, is
/// as durable as any other.
pub(super) async fn s3_a_commit_that_stages_nothing_survives_a_restart<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (log, shipping) = (backend.log("orders").await?, consumer("shipping"));
    for round in 1..=4u64 {
        let mut store = up(|| backend.store()).await?;
        let (position, _) = settled(backend, &mut store).await?;
        let mut advance = advance(position.as_ref(), &*log, round);
        if round % 3 == 0 {
            advance.windows.push((numbering("web-1"), Window::new(round)));
        }
        let mut tx = store.begin(&shipping).await?;
        if round == 1 {
            tx.put(b"n", &1u64.to_be_bytes()).await?;
        }
        tx.commit(advance).await?;
        backend.restart().await?;
        let mut store = up(|| backend.store()).await?;
        let (after, n) = settled(backend, &mut store).await?;
        let after = after.ok_or_else(|| Violation::new(format!("restart {round}: the position is gone")))?;
        let window = after.windows.first().map(|(_, window)| window.clone());
        ensure!(
            after.next == round.into() && after.revision.count() == round,
            "restart {round}: commit {round} was acknowledged, but the position is {} at revision {}",
            after.next,
            after.revision
        );
        ensure!(
            n == 1 && window == (round >= 3).then(|| Window::new(round / 3 * 3)),
            "restart {round}: the state counts {n}, and the window is {window:?}"
        );
    }
    Ok(())
}

/// [S5](essentially_once::OffsetStore#contract): commits while the backend restarts. A certain
/// failure moved nothing. After an unknown outcome, the position shows which. An acknowledged
/// commit is there.
pub(super) async fn s5_position_resolves_an_unknown_outcome<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    while_restarting(
        harness,
        backend,
        async |stop: Arc<AtomicBool>, progress: Arc<AtomicUsize>| {
            let mut store = up(|| backend.store()).await?;
            let mut revision = Revision::NONE;
            while !stop.load(Ordering::SeqCst) {
                let result = count_one(&store, &*log).await;
                if result.is_err() {
                    store = up(|| backend.store()).await?;
                }
                let (position, _) = settled(backend, &mut store).await?;
                let found = position.map_or(Revision::NONE, |position| position.revision);
                let next = match revision {
                    Revision::NONE => Revision::NONE.next_epoch(),
                    revision => revision.next_count(),
                };
                let fits = match &result {
                    Ok(()) => found == next,
                    Err(error) if is_certain(error) => found == revision,
                    Err(_) => found == revision || found == next,
                };
                ensure!(
                    fits,
                    "revision {revision} was stored, a commit returned {result:?}, now revision {found} is stored"
                );
                revision = found;
                progress.fetch_add(1, Ordering::SeqCst);
                tokio::task::yield_now().await;
            }
            Ok(())
        },
    )
    .await
}
