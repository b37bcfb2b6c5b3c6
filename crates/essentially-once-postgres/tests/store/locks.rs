//! Locks, and transactions that take too long.

use std::time::Duration;

use essentially_once::{
    ConsumerId, Error, KeyValue as _, OffsetStore as _,
    backend::{Source, Transaction as _},
};
use essentially_once_postgres::{Pg, PgOptions, PgTx};
use test_servers::Proxy;
use tokio::time::Instant;

use crate::common::{Outcome, Stage, advance, assert_error, code_of, ensure, soon};

const CHANGE: &str = "UPDATE totals SET n = n + 1 WHERE name = $1";
const IDLE: &str = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";

async fn with(options: PgOptions, settings: &[(&str, &str)]) -> Result<Stage, Source> {
    let stage = Stage::with(options, settings).await?;
    stage.sql(
        "CREATE TABLE totals (name text PRIMARY KEY, n int NOT NULL); INSERT INTO totals VALUES ('a', 0), ('b', 0)",
    )?;
    Ok(stage)
}

impl Stage {
    fn totals(&self) -> Result<String, Source> {
        Ok(self.sql("SELECT n FROM totals ORDER BY name")?.replace('\n', " "))
    }
}

/// A transaction of another consumer.
async fn other(stage: &Stage) -> Result<PgTx, Error> {
    stage.store.begin(&ConsumerId::new("other")?).await
}

pub(crate) async fn a_deadlock_is_a_passing_error() -> Outcome {
    let stage = with(PgOptions::new(), &[("deadlock_timeout", "20ms")]).await?;
    let (mut a, mut b) = (stage.begin().await?, other(&stage).await?);
    a.execute(CHANGE, &[&"a"]).await?;
    b.execute(CHANGE, &[&"b"]).await?;
    let (first, second) = tokio::join!(a.execute(CHANGE, &[&"b"]), b.execute(CHANGE, &[&"a"]));
    let failed = match (first, second) {
        (failed @ Err(_), Ok(_)) => {
            b.commit(advance(0, 1)).await?;
            assert_error!(a.commit(advance(0, 1)).await, Error::Unavailable { .. }, "deadlock");
            failed
        }
        (Ok(_), failed @ Err(_)) => {
            a.commit(advance(0, 1)).await?;
            assert_error!(b.commit(advance(0, 1)).await, Error::Unavailable { .. }, "deadlock");
            failed
        }
        other => return Err(format!("no deadlock: {other:?}").into()),
    };
    ensure!(code_of(&failed) == Some("40P01"), "{failed:?}");
    assert_error!(failed, Error::Unavailable { .. }, "deadlock detected");
    ensure!(stage.totals()? == "1 1", "{}", stage.totals()?);
    Ok(())
}

pub(crate) async fn a_lock_that_is_held_for_long_is_a_passing_error() -> Outcome {
    let stage = with(PgOptions::new().lock_timeout(Duration::from_millis(100)), &[]).await?;
    let mut holder = other(&stage).await?;
    holder.execute(CHANGE, &[&"a"]).await?;
    for is_queued in [false, true] {
        let mut tx = stage.begin().await?;
        tx.put(b"k", b"v").await?;
        let failed = match is_queued {
            true => {
                tx.queue(CHANGE, &[&"a"]).await?;
                tx.commit(advance(0, 1)).await
            }
            false => tx.execute(CHANGE, &[&"a"]).await.map(drop),
        };
        ensure!(code_of(&failed) == Some("55P03"), "{failed:?}");
        assert_error!(failed, Error::Unavailable { .. }, "raise `lock_timeout`");
    }
    ensure!(stage.value("k").await?.is_none(), "applied");
    holder.commit(advance(0, 1)).await?;
    let mut tx = stage.begin().await?;
    tx.execute(CHANGE, &[&"a"]).await?;
    tx.commit(advance(0, 1)).await?;
    ensure!(stage.totals()? == "2 0", "{}", stage.totals()?);
    Ok(())
}

pub(crate) async fn a_statement_that_takes_too_long_is_ended() -> Outcome {
    let stage = with(PgOptions::new().statement_timeout(Duration::from_secs(1)), &[]).await?;
    let failed = soon(stage.begin().await?.execute("SELECT pg_sleep(1000)", &[])).await?;
    ensure!(code_of(&failed) == Some("57014"), "{failed:?}");
    assert_error!(failed, Error::Unavailable { .. }, "`statement_timeout`");
    Ok(())
}

/// The handler finds out when it goes on.
pub(crate) async fn a_transaction_left_idle_is_ended_by_the_server() -> Outcome {
    let stage = with(PgOptions::new().idle_timeout(Duration::from_millis(100)), &[]).await?;
    let mut tx = stage.begin().await?;
    tx.execute(CHANGE, &[&"a"]).await?;
    stage.until_count(IDLE, 0).await?;
    // Nobody has to wait for its lock.
    let mut second = other(&stage).await?;
    second.execute(CHANGE, &[&"a"]).await?;
    second.commit(advance(0, 1)).await?;
    let failed = tx.execute(CHANGE, &[&"a"]).await;
    assert_error!(failed, Error::Unavailable { .. }, "idle_timeout");
    assert_error!(
        tx.commit(advance(0, 1)).await,
        Error::Unavailable { .. },
        "idle_timeout"
    );
    ensure!(
        stage.totals()? == "1 0" && stage.commits().await? == 0,
        "{}",
        stage.totals()?
    );
    Ok(())
}

pub(crate) async fn a_transaction_left_idle_before_its_commit_applies_nothing() -> Outcome {
    let stage = with(PgOptions::new().idle_timeout(Duration::from_millis(100)), &[]).await?;
    for commits in [0, 1] {
        let mut tx = stage.begin().await?;
        tx.put(b"k", b"v").await?;
        tx.execute(CHANGE, &[&"a"]).await?;
        stage.until_count(IDLE, 0).await?;
        assert_error!(
            tx.commit(advance(commits, 1)).await,
            Error::Unavailable { .. },
            "idle_timeout"
        );
        ensure!(stage.totals()? == "0 0" && stage.commits().await? == commits, "applied");
        // A transaction that has sent nothing cannot be left idle: the server does not know it.
        let mut tx = stage.begin().await?;
        tx.put(b"other", b"v").await?;
        ensure!(stage.sql(IDLE)? == "0", "the server knows it");
        tx.commit(advance(commits, 1)).await?;
    }
    ensure!(stage.value("k").await?.is_none(), "applied");
    Ok(())
}

/// Its connection stays open and silent, as that of a process that is stopped.
pub(crate) async fn a_suspended_instance_keeps_its_locks_for_a_while_only() -> Outcome {
    let stage = with(PgOptions::new(), &[]).await?;
    let proxy = Proxy::start(stage.server.port())?;
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port());
    let options = PgOptions::new().idle_timeout(Duration::from_millis(500));
    let suspended = options.connect(&url).await?.store();
    let mut late = suspended.begin(&stage.consumer).await?;
    late.execute(CHANGE, &[&"a"]).await?;
    let locked = Instant::now();
    proxy.hold(true);
    let mut tx = stage.begin().await?;
    tx.execute(CHANGE, &[&"a"]).await?;
    let waited = locked.elapsed();
    ensure!(waited >= Duration::from_millis(400), "it held no lock: {waited:?}");
    tx.commit(advance(0, 1)).await?;
    proxy.hold(false);
    let late = late.commit(advance(0, 1)).await;
    ensure!(late.is_err(), "it committed late");
    ensure!(stage.totals()? == "1 0" && stage.commits().await? == 1, "applied twice");
    Ok(())
}

pub(crate) async fn a_dropped_transaction_gives_its_locks_up() -> Outcome {
    let stage = with(PgOptions::new(), &[]).await?;
    for round in 0..20 {
        let mut dropped = Pg::connect(&stage.server.url())
            .await?
            .store()
            .begin(&stage.consumer)
            .await?;
        dropped.execute(CHANGE, &[&"a"]).await?;
        if round % 2 == 0 {
            dropped.queue(CHANGE, &[&"b"]).await?;
        }
        drop(dropped);
        // It would wait for 5 seconds.
        let mut tx = stage.begin().await?;
        tx.execute(CHANGE, &[&"a"]).await?;
        tx.rollback().await?;
    }
    ensure!(stage.totals()? == "0 0", "{}", stage.totals()?);
    Ok(())
}
