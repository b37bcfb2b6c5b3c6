//! Commits that wait for the standby.

use std::time::Duration;

use essentially_once::{Error, Log as _, OffsetStore as _, backend::Transaction as _};
use essentially_once_postgres::{Pg, PgOptions};
use test_servers::{eventually, insist};

use crate::{
    Stage,
    common::{Outcome, advance, assert_error, ensure, message, numbered, records, soon},
};

/// A handle with little patience.
async fn patient(stage: &Stage, timeout: Duration) -> Result<Pg, Error> {
    let options = PgOptions::new().timeout(timeout).lock_timeout(timeout / 2);
    options.connect(&stage.primary.url()).await
}

pub(crate) async fn standbys_are_waited_for() -> Outcome {
    let stage = Stage::with(&[("synchronous_standby_names", "*")]).await?;
    let commit = async |pg: &Pg, commits| {
        pg.store()
            .begin(&stage.consumer)
            .await?
            .commit(advance(commits, 1))
            .await
    };
    let pg = patient(&stage, Duration::from_secs(60)).await?;
    let log = pg.log("orders").await?;
    commit(&pg, 0).await?;
    let hasty = patient(&stage, Duration::from_secs(2)).await?;
    let hasty_log = hasty.log("orders").await?;
    stage.replica.freeze();
    let (appended, committed) = (
        soon(hasty_log.append(&[message(1)])).await?,
        soon(commit(&hasty, 1)).await?,
    );
    stage.replica.thaw();
    assert_error!(appended, Error::Indeterminate { .. }, "did not answer within 2s");
    assert_error!(committed, Error::Indeterminate { .. }, "did not answer within 2s");
    // The outcomes were unknown, and both were applied.
    eventually(async || {
        let (found, position) = (records(&log).await?.len(), pg.store().position(&stage.consumer).await?);
        let commits = position.map_or(0, |position| position.revision.count());
        Ok(match (found, commits) {
            (2, 2) => Ok(()),
            other => Err(format!("{other:?}")),
        })
    })
    .await?;
    log.append(&numbered(0..1)).await?;
    commit(&pg, 2).await?;
    Ok(())
}

/// The server has committed already, and only stops to wait.
pub(crate) async fn a_commit_that_stops_waiting_for_a_standby_is_in_doubt() -> Outcome {
    let stage = Stage::with(&[("synchronous_standby_names", "*")]).await?;
    let pg = patient(&stage, Duration::from_secs(60)).await?;
    let log = pg.log("orders").await?;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    stage.replica.freeze();
    let records_to_append = [message(1)];
    let (appended, ended) = tokio::join!(soon(log.append(&records_to_append)), async {
        stage.until(&stage.primary, waiting, "1").await?;
        stage.primary.run_sql(end)
    });
    ended?;
    assert_error!(appended?, Error::Indeterminate { .. }, "append to log orders");
    let commit = async || pg.store().begin(&stage.consumer).await?.commit(advance(0, 1)).await;
    let (committed, ended) = tokio::join!(soon(commit()), async {
        stage.until(&stage.primary, waiting, "1").await?;
        stage.primary.run_sql(end)
    });
    ended?;
    assert_error!(committed?, Error::Indeterminate { .. }, "commit");
    stage.replica.thaw();
    let position = insist(async || pg.store().position(&stage.consumer).await).await?;
    ensure!(position.is_some(), "it had committed");
    ensure!(records(&log).await?.len() == 2, "it had appended");
    Ok(())
}
