//! A standby takes over, with all data or without the latest.

#[path = "../common/mod.rs"]
mod common;
mod waiting;

use std::{process::ExitCode, time::Duration};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, KeyValue, Log, OffsetStore, backend::Source, consumer::Report,
    memory::Memory,
};
use essentially_once_postgres::{Pg, PgOptions};
use essentially_once_testkit::{Ledger, read_ledger, read_log};
use test_servers::{PostgresServer, eventually, insist};
use tokio::{sync::watch, task::JoinHandle, task::block_in_place};

use common::{LIMIT, Outcome, Seen, Watched, agree, cases, ensure, run, send, send_until, until};
use waiting::{a_commit_that_stops_waiting_for_a_standby_is_in_doubt, standbys_are_waited_for};

fn main() -> ExitCode {
    run(cases![
        a_consumer_goes_on_with_the_new_primary,
        a_store_elsewhere_notices_that_the_tail_is_gone,
        a_store_elsewhere_notices_that_the_log_has_grown_again,
        a_position_that_went_back_ends_a_running_consumer,
        position_and_log_on_the_same_server_go_back_together,
        standbys_are_waited_for,
        a_commit_that_stops_waiting_for_a_standby_is_in_doubt,
    ])
}

/// A primary with a standby.
struct Stage {
    primary: PostgresServer,
    replica: PostgresServer,
    consumer: ConsumerId,
}

impl Stage {
    async fn with(settings: &[(&str, &str)]) -> Result<Self, Source> {
        let primary = PostgresServer::builder().with(settings).start()?;
        let replica = PostgresServer::builder().replica_of(&primary).start()?;
        let stage = Self {
            consumer: ConsumerId::new("shipping")?,
            primary,
            replica,
        };
        send(&stage.pg().await?.log("orders").await?, 0..1).await?;
        let behind = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_lsn()";
        stage.until(&stage.primary, behind, "1").await?;
        Ok(stage)
    }

    /// Commits do not wait for the standby.
    async fn start() -> Result<Self, Source> {
        Self::with(&[]).await
    }

    /// Connects to the one of both that accepts writes.
    async fn pg(&self) -> Result<Pg, Error> {
        let (primary, replica) = (self.primary.port(), self.replica.port());
        let url = format!("postgres://postgres@127.0.0.1:{primary},127.0.0.1:{replica}/postgres");
        PgOptions::new().connect(&url).await
    }

    async fn until(&self, server: &PostgresServer, sql: &str, wanted: &str) -> Outcome {
        eventually(async || {
            let found = server.run_sql(sql)?;
            Ok(if found.trim() == wanted { Ok(()) } else { Err(found) })
        })
        .await
    }

    /// What is committed from now on never reaches the standby.
    async fn cut_off_replica(&self) -> Outcome {
        self.replica.run_sql("ALTER SYSTEM SET primary_conninfo = ''")?;
        self.replica.run_sql("SELECT pg_reload_conf()")?;
        self.until(&self.replica, "SELECT count(*) FROM pg_stat_wal_receiver", "0")
            .await
    }

    fn fail_over(&self) -> Outcome {
        block_in_place(|| {
            self.primary.kill()?;
            self.replica.promote()
        })
    }
}

/// A consumer that runs in the background.
struct Running {
    task: JoinHandle<Result<Report, Error>>,
    stop: CancellationToken,
    seen: watch::Receiver<Seen>,
}

impl Running {
    fn start<S>(id: &ConsumerId, log: impl Log + 'static, store: S, in_memory: bool) -> Self
    where
        S: OffsetStore<Tx: KeyValue> + 'static,
    {
        let (handler, seen) = Watched::new(Ledger);
        let consumer = Consumer::essentially_once(id.clone(), log, store, handler)
            .max_batch(3)
            .min_backoff(Duration::from_millis(5))
            .max_backoff(Duration::from_millis(100));
        // Memory is volatile. The servers are durable, and consumers check that.
        let consumer = match in_memory {
            true => consumer.accept_volatile(),
            false => consumer,
        };
        let stop = CancellationToken::new();
        let task = tokio::spawn(consumer.run_until(stop.clone()));
        Self { task, stop, seen }
    }

    async fn ends(self) -> Result<Result<Report, Error>, Source> {
        Ok(tokio::time::timeout(LIMIT, self.task).await??)
    }
}

/// Each commit waits for the standby, so nothing that was acknowledged is lost.
async fn a_consumer_goes_on_with_the_new_primary() -> Outcome {
    let stage = Stage::with(&[("synchronous_standby_names", "*")]).await?;
    let pg = stage.pg().await?;
    ensure!(pg.synchronous_standby_names().await? == "*", "another setting");
    let mut running = Running::start(&stage.consumer, pg.log("orders").await?, pg.store(), false);
    let sent = CancellationToken::new();
    let sending = tokio::spawn(send_until(pg.log("orders").await?, sent.clone()));
    until(&mut running.seen, |seen| seen.handled >= 30).await?;
    stage.fail_over()?;
    let before = running.seen.borrow().handled;
    until(&mut running.seen, |seen| seen.handled >= before + 30).await?;
    sent.cancel();
    let (_, failed) = tokio::time::timeout(LIMIT, sending).await???;
    running.stop.cancel();
    let report = running.ends().await??;
    ensure!(failed > 0 && report.restarts > 0, "{failed} appends failed; {report}");
    ensure!(report.rewound == 0, "commits were lost: {report}");
    // Judge by the new primary's data.
    let pg = Pg::connect(&stage.replica.url()).await?;
    let (log, store) = (pg.log("orders").await?, pg.store());
    let rest = Consumer::essentially_once(stage.consumer.clone(), log.clone(), store.clone(), Ledger);
    rest.run_until_caught_up().await?;
    agree(&read_log(&log).await?, &store, &stage.consumer).await
}

/// Makes the consumer handle records that the standby never receives.
async fn lose_the_tail<S>(stage: &Stage, pg: &Pg, store: S, in_memory: bool) -> Result<Running, Source>
where
    S: OffsetStore<Tx: KeyValue> + 'static,
{
    let log = pg.log("orders").await?;
    let mut running = Running::start(&stage.consumer, log.clone(), store, in_memory);
    until(&mut running.seen, |seen| seen.handled == 1).await?;
    send(&log, 1..10).await?;
    until(&mut running.seen, |seen| seen.handled == 10).await?;
    Ok(running)
}

async fn a_store_elsewhere_notices_that_the_tail_is_gone() -> Outcome {
    let stage = Stage::start().await?;
    stage.cut_off_replica().await?;
    let (pg, store) = (stage.pg().await?, Memory::new().store());
    let running = lose_the_tail(&stage, &pg, store.clone(), true).await?;
    stage.fail_over()?;
    let past_end = |result: Result<Report, Error>| match result {
        Err(Error::OutOfRange { end, .. }) if end == 1.into() => Ok(()),
        other => Err(Source::from(format!("the tail is gone, and: {other:?}"))),
    };
    past_end(running.ends().await?)?;
    // A consumer that starts now finds the same.
    let log = insist(|| pg.log("orders")).await?;
    past_end(Running::start(&stage.consumer, log, store.clone(), true).ends().await?)?;
    ensure!(
        read_ledger(&store, &stage.consumer).await?.len() == 10,
        "the state has changed"
    );
    Ok(())
}

async fn a_store_elsewhere_notices_that_the_log_has_grown_again() -> Outcome {
    let stage = Stage::start().await?;
    stage.cut_off_replica().await?;
    let (pg, store) = (stage.pg().await?, Memory::new().store());
    let running = lose_the_tail(&stage, &pg, store.clone(), true).await?;
    running.stop.cancel();
    running.ends().await??;
    stage.fail_over()?;
    // The sender has noticed nothing and continues.
    let log = insist(|| pg.log("orders")).await?;
    send(&log, 10..40).await?;
    let ended = Running::start(&stage.consumer, log, store.clone(), true).ends().await?;
    ensure!(matches!(ended, Err(Error::LogChanged { .. })), "{ended:?}");
    ensure!(
        read_ledger(&store, &stage.consumer).await?.len() == 10,
        "the state has changed"
    );
    Ok(())
}

/// The log is elsewhere.
async fn a_position_that_went_back_ends_a_running_consumer() -> Outcome {
    let stage = Stage::start().await?;
    let log = Memory::new().log("orders")?;
    send(&log, 0..3).await?;
    let pg = stage.pg().await?;
    let mut running = Running::start(&stage.consumer, log.clone(), pg.store(), true);
    until(&mut running.seen, |seen| seen.handled == 3).await?;
    running.stop.cancel();
    running.ends().await??;
    let behind = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_lsn()";
    stage.until(&stage.primary, behind, "1").await?;
    stage.cut_off_replica().await?;
    let mut running = Running::start(&stage.consumer, log.clone(), pg.store(), true);
    send(&log, 3..10).await?;
    until(&mut running.seen, |seen| seen.handled == 10).await?;
    let seen = async || {
        Ok::<_, Error>(
            pg.store()
                .position(&stage.consumer)
                .await?
                .map(|position| position.next),
        )
    };
    eventually(async || {
        let next = seen().await?;
        Ok(if next == Some(10.into()) {
            Ok(())
        } else {
            Err(format!("{next:?}"))
        })
    })
    .await?;
    stage.fail_over()?;
    // The next commit would be the first one to notice.
    send(&log, 10..11).await?;
    let ended = running.ends().await?;
    ensure!(
        matches!(&ended, Err(Error::PositionLost { found: Some(found), seen, .. }) if found < seen),
        "{ended:?}"
    );
    ensure!(insist(seen).await? == Some(3.into()), "the position moved");
    Ok(())
}

async fn position_and_log_on_the_same_server_go_back_together() -> Outcome {
    let stage = Stage::start().await?;
    stage.cut_off_replica().await?;
    let pg = stage.pg().await?;
    let mut running = lose_the_tail(&stage, &pg, pg.store(), false).await?;
    stage.fail_over()?;
    // The consumer can only detect that both went back while the log is shorter than it was when
    // read. Either it finds its position gone and goes back too, or its reader is first, and the
    // run ends at the log that has become too short.
    let new_primary = Pg::connect(&stage.replica.url()).await?.store();
    eventually(async || {
        let position = new_primary.position(&stage.consumer).await?;
        Ok(match position.is_some() || running.task.is_finished() {
            true => Ok(()),
            false => Err("the consumer makes no progress".into()),
        })
    })
    .await?;
    // The sender has noticed nothing and continues.
    let log = insist(|| pg.log("orders")).await?;
    send(&log, 10..20).await?;
    if running.task.is_finished() {
        let ended = running.ends().await?;
        ensure!(matches!(ended, Err(Error::OutOfRange { .. })), "{ended:?}");
        let again = Consumer::essentially_once(stage.consumer.clone(), log.clone(), pg.store(), Ledger);
        again.run_until_caught_up().await?;
    } else {
        until(&mut running.seen, |seen| seen.handled >= 20).await?;
        running.stop.cancel();
        let report = running.ends().await??;
        ensure!(report.rewound == 1, "{report}");
    }
    let found = read_log(&log).await?;
    let sequences: Vec<u64> = found
        .iter()
        .filter_map(|record| Some(record.origin.as_ref()?.sequence))
        .collect();
    ensure!(
        sequences.iter().copied().eq([0].into_iter().chain(10..20)),
        "the log has {sequences:?}"
    );
    agree(&found, &pg.store(), &stage.consumer).await
}
