//! Handles on several runtimes, and how many sessions they keep.

use std::{sync::mpsc, thread};

use essentially_once::{
    Log as _, NewRecord, OffsetStore as _,
    backend::{Source, Transaction as _},
};
use essentially_once_postgres::{Pg, PgLog};
use tokio::{
    runtime::Runtime,
    task::{JoinSet, block_in_place},
};

use crate::common::{Outcome, Stage, advance, ensure, numbered, payloads, records, soon};

const OURS: &str = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'essentially-once'";

fn runtime() -> Result<Runtime, Source> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Runs on a thread with a runtime of its own, which ends then.
fn elsewhere<T: Send + 'static, F: Future<Output = Result<T, Source>>>(
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<T, Source> {
    let thread = thread::spawn(move || runtime()?.block_on(work()));
    block_in_place(|| thread.join()).map_err(|_| "a thread panicked")?
}

pub(crate) async fn a_handle_outlives_the_runtime_that_it_connected_on() -> Outcome {
    let stage = Stage::start().await?;
    let url = stage.server.url();
    let (pg, log): (Pg, PgLog) = elsewhere(move || async move {
        let pg = Pg::connect(&url).await?;
        let log = pg.log("orders").await?;
        log.append(&numbered(0..1)).await?;
        // Starts to listen.
        log.read(0.into()).await?.next(1).await?;
        Ok((pg, log))
    })?;
    for round in 0..3_u64 {
        log.append(&numbered(0..1)).await?;
        pg.store()
            .begin(&stage.consumer)
            .await?
            .commit(advance(round, 1))
            .await?;
        let (pg, log, id) = (pg.clone(), log.clone(), stage.consumer.clone());
        let found = elsewhere(move || async move {
            log.append(&numbered(0..1)).await?;
            pg.store().position(&id).await?;
            records(&log).await
        })?;
        ensure!(found.len() as u64 == 3 + 2 * round, "{} records", found.len());
    }
    Ok(())
}

/// All sessions of the handle are on the runtime that is blocked, and cannot answer meanwhile.
pub(crate) async fn a_runtime_that_is_blocked_delays_no_other() -> Outcome {
    let stage = Stage::start().await?;
    let url = stage.server.url();
    let (opened, when_opened) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    let other = thread::spawn(move || {
        runtime()?.block_on(async {
            let pg = Pg::connect(&url).await?;
            let log = pg.log("orders").await?;
            log.append(&numbered(0..1)).await?;
            // Starts to listen.
            log.read(0.into()).await?.next(1).await?;
            opened.send((pg, log.clone()))?;
            // Blocks the only thread of its runtime.
            may_go_on.recv()?;
            log.append(&numbered(2..3)).await?;
            Ok::<_, Source>(())
        })
    });
    let (pg, log): (Pg, PgLog) = block_in_place(|| when_opened.recv())?;
    let work = async {
        let mut reader = log.read(1.into()).await?;
        log.append(&numbered(1..2)).await?;
        pg.store().begin(&stage.consumer).await?.commit(advance(0, 1)).await?;
        reader.next(1).await
    };
    // A session that does not answer would end it with an error.
    ensure!(payloads(&soon(work).await??) == ["1"], "another record");
    go_on.send(())?;
    block_in_place(|| other.join()).map_err(|_| "it panicked")??;
    ensure!(
        payloads(&records(&log).await?) == ["0", "1", "2"],
        "records are missing"
    );
    Ok(())
}

/// A burst opens more. They are closed afterwards.
pub(crate) async fn a_handle_keeps_few_sessions() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    // They wait for this lock, so that none can use the session of another.
    let mut client = stage.client().await?;
    let lock = client.transaction().await?;
    lock.batch_execute("LOCK TABLE essentially_once.logs IN ACCESS EXCLUSIVE MODE")
        .await?;
    let mut burst = JoinSet::new();
    for n in 0..40 {
        let log = log.clone();
        burst.spawn(async move { log.append(&[NewRecord::new(n.to_string())]).await });
    }
    stage.until_locked(40).await?;
    lock.commit().await?;
    while let Some(appended) = burst.join_next().await {
        appended??;
    }
    let most = OURS.replace("count(*)", "(count(*) > 20)::int::bigint");
    stage.until_count(&most, 0).await?;
    ensure!(records(&log).await?.len() == 40, "records are missing");
    drop((log, stage.store.clone()));
    let other = stage.other().await?;
    other.log("orders").await?.read(0.into()).await?.next(1).await?;
    let before: i64 = stage.sql(OURS)?.parse()?;
    drop(other);
    // A dropped handle leaves none behind, not even the one that listens.
    let fewer = OURS.replace("count(*)", &format!("(count(*) < {before})::int::bigint"));
    stage.until_count(&fewer, 1).await
}
