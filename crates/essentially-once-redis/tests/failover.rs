//! A replica takes over, with all data or without the latest.

mod common;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Log as _, OffsetStore,
    backend::{Advance, Bounds, Revision, Source, Transaction as _},
    consumer::Report,
    memory::Memory,
};
use essentially_once_redis::{Redis, RedisLog, RedisOptions, RedisStore};
use essentially_once_testkit::{Ledger, read_ledger, read_log};
use test_servers::{RedisSentinel, RedisServer};
use tokio::{sync::watch, task::JoinHandle};

use common::{LIMIT, Outcome, Seen, Watched, agree, cases, ensure, insist, message, run, send, send_until, until};

const NAME: &str = "shop";

fn main() -> ExitCode {
    run(cases![
        a_consumer_goes_on_with_the_new_master,
        a_store_elsewhere_notices_that_the_tail_is_gone,
        position_and_state_on_the_same_server_go_back_together,
        replicas_are_waited_for,
        an_old_master_refuses_for_now,
    ])
}

/// A master with a replica.
struct Stage {
    master: RedisServer,
    replica: RedisServer,
    consumer: ConsumerId,
}

impl Stage {
    /// Waits until both have the same data.
    async fn start() -> Result<Self, Source> {
        let master = RedisServer::durable()
            .with(&[("repl-diskless-sync-delay", "0")])
            .start()?;
        let replica = RedisServer::durable().replica_of(&master).start()?;
        let stage = Self {
            consumer: ConsumerId::new("shipping")?,
            master,
            replica,
        };
        let log = insist(|| stage.open_replicated()).await?;
        send(&log, 0..1).await?;
        Ok(stage)
    }

    /// Cuts the replica off. Sentinels that start later do not learn of it.
    fn cut_off_replica(&self) -> Outcome {
        self.replica.command(&["REPLICAOF", "NO", "ONE"])?;
        self.master.command(&["CLIENT", "KILL", "TYPE", "REPLICA"])?;
        Ok(())
    }

    /// The log on the master. Its appends wait for the replica.
    async fn open_replicated(&self) -> Result<RedisLog, Error> {
        let redis = waiting(LIMIT).connect(&self.master.url()).await?;
        redis.log("orders").await
    }

    /// Two Sentinels. The first knows the master, the second the server cut off from it. Asked in
    /// this order, they name the master while it lives, and then the other server.
    fn sentinels(&self) -> Result<[RedisSentinel; 2], Source> {
        Ok([
            RedisSentinel::start(NAME, &self.master)?,
            RedisSentinel::start(NAME, &self.replica)?,
        ])
    }
}

/// Connects through the Sentinels alone. No server listens on the port in the URL.
async fn connect(sentinels: &[RedisSentinel]) -> Result<Redis, Error> {
    RedisOptions::new()
        .timeout(LIMIT)
        .sentinel(NAME, sentinels.iter().map(|sentinel| sentinel.server().url()))
        .connect("redis://127.0.0.1:1")
        .await
}

/// Requires one replica.
fn waiting(limit: Duration) -> RedisOptions {
    RedisOptions::new().min_replicas(1, limit)
}

/// A consumer that runs in the background.
struct Running {
    task: JoinHandle<Result<Report, Error>>,
    stop: CancellationToken,
    seen: watch::Receiver<Seen>,
}

impl Running {
    async fn start<S>(id: &ConsumerId, log: RedisLog, store: S, in_memory: bool) -> Self
    where
        S: OffsetStore<Tx: essentially_once::KeyValue> + 'static,
    {
        let (handler, seen) = Watched::new(Ledger);
        let consumer = Consumer::essentially_once(id.clone(), log, store, handler)
            .max_batch(3)
            .min_backoff(Duration::from_millis(5))
            .max_backoff(Duration::from_millis(100));
        // A store in memory is volatile. The servers are durable, and consumers check that.
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

async fn a_consumer_goes_on_with_the_new_master() -> Outcome {
    let stage = Stage::start().await?;
    let sentinel = RedisSentinel::start(NAME, &stage.master)?;
    let redis = connect(std::slice::from_ref(&sentinel)).await?;
    let mut running = Running::start(&stage.consumer, redis.log("orders").await?, redis.store(), false).await;
    let sent = CancellationToken::new();
    let sending = tokio::spawn(send_until(redis.log("orders").await?, sent.clone()));
    until(&mut running.seen, |seen| seen.handled >= 30).await?;
    stage.master.kill()?;
    let deadline = Instant::now() + LIMIT;
    while sentinel.master_port()? != stage.replica.port() {
        ensure!(
            Instant::now() < deadline,
            "Sentinel has not made the replica the master"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = running.seen.borrow().handled;
    until(&mut running.seen, |seen| seen.handled >= before + 30).await?;
    sent.cancel();
    let (_, failed) = tokio::time::timeout(LIMIT, sending).await???;
    running.stop.cancel();
    let report = running.ends().await??;
    ensure!(failed > 0 && report.restarts > 0, "{failed} appends failed; {report}");
    // Judge by the new master's data.
    let redis = Redis::connect(&stage.replica.url()).await?;
    let (log, store) = (redis.log("orders").await?, redis.store());
    let rest = Consumer::essentially_once(stage.consumer.clone(), log.clone(), store.clone(), Ledger);
    rest.run_until_caught_up().await?;
    agree(&read_log(&log).await?, &store, &stage.consumer).await
}

/// Makes the consumer handle records that the replica never receives.
async fn lose_the_tail<S>(stage: &Stage, redis: &Redis, store: S, in_memory: bool) -> Result<(Running, Bounds), Source>
where
    S: OffsetStore<Tx: essentially_once::KeyValue> + 'static,
{
    let log = redis.log("orders").await?;
    let kept = log.bounds().await?;
    let mut running = Running::start(&stage.consumer, log.clone(), store, in_memory).await;
    until(&mut running.seen, |seen| seen.handled == 1).await?;
    send(&log, 1..10).await?;
    until(&mut running.seen, |seen| seen.handled == 10).await?;
    Ok((running, kept))
}

async fn a_store_elsewhere_notices_that_the_tail_is_gone() -> Outcome {
    let stage = Stage::start().await?;
    stage.cut_off_replica()?;
    let sentinels = stage.sentinels()?;
    let redis = connect(&sentinels).await?;
    let store = Memory::new().store();
    let (running, kept) = lose_the_tail(&stage, &redis, store.clone(), true).await?;
    stage.master.kill()?;
    let past_end = |result: Result<Report, Error>| match result {
        Err(Error::OutOfRange { end, .. }) if end == kept.end => Ok(()),
        other => Err(Source::from(format!("the tail is gone, and: {other:?}"))),
    };
    past_end(running.ends().await?)?;
    // A consumer that starts now finds the same.
    let log = insist(|| redis.log("orders")).await?;
    let late = Running::start(&stage.consumer, log, store.clone(), true).await;
    past_end(late.ends().await?)?;
    ensure!(
        read_ledger(&store, &stage.consumer).await?.len() == 10,
        "the state has changed"
    );
    Ok(())
}

async fn position_and_state_on_the_same_server_go_back_together() -> Outcome {
    let stage = Stage::start().await?;
    stage.cut_off_replica()?;
    let sentinels = stage.sentinels()?;
    let redis = connect(&sentinels).await?;
    let (mut running, _) = lose_the_tail(&stage, &redis, redis.store(), false).await?;
    stage.master.kill()?;
    // The consumer can only detect that both went back while the log is shorter than it was when
    // read.
    let new_master = Redis::connect(&stage.replica.url()).await?.store();
    let deadline = Instant::now() + LIMIT;
    while new_master.position(&stage.consumer).await?.is_none() {
        ensure!(Instant::now() < deadline, "the consumer makes no progress");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The sender has noticed nothing and continues.
    let log = insist(|| redis.log("orders")).await?;
    send(&log, 10..20).await?;
    until(&mut running.seen, |seen| seen.handled == 20).await?;
    running.stop.cancel();
    let report = running.ends().await??;
    ensure!(report.rewound == 1, "{report}");
    let redis = Redis::connect(&stage.replica.url()).await?;
    let records = read_log(&redis.log("orders").await?).await?;
    let sequences: Vec<u64> = records
        .iter()
        .filter_map(|record| Some(record.origin.as_ref()?.sequence))
        .collect();
    ensure!(
        sequences.iter().copied().eq([0].into_iter().chain(10..20)),
        "the log has {sequences:?}"
    );
    agree(&records, &redis.store(), &stage.consumer).await
}

async fn replicas_are_waited_for() -> Outcome {
    let stage = Stage::start().await?;
    let (log, store) = patient(&stage, LIMIT).await?;
    log.append(&[message(1)]).await?;
    commit(&store, &stage.consumer, &log, 0).await?;
    let (log, store) = patient(&stage, Duration::from_millis(200)).await?;
    stage.replica.freeze();
    let in_doubt = |result: Result<(), Error>| match result {
        Err(error @ Error::Indeterminate { .. }) if error.to_string().contains("only 0") => Ok(()),
        other => Err(Source::from(format!("no replica answers, and: {other:?}"))),
    };
    in_doubt(log.append(&[message(2)]).await.map(drop))?;
    in_doubt(commit(&store, &stage.consumer, &log, 1).await)?;
    stage.replica.thaw();
    // The outcomes were unknown, and both were applied.
    ensure!(read_log(&log).await?.len() == 3, "the record is missing");
    let position = store.position(&stage.consumer).await?;
    ensure!(
        position.is_some_and(|position| position.revision.count() == 2),
        "the commit was not made"
    );
    let (log, store) = patient(&stage, LIMIT).await?;
    log.append(&[message(3)]).await?;
    commit(&store, &stage.consumer, &log, 2).await?;
    Ok(())
}

async fn patient(stage: &Stage, limit: Duration) -> Result<(RedisLog, RedisStore), Error> {
    let redis = waiting(limit).connect(&stage.master.url()).await?;
    Ok((redis.log("orders").await?, redis.store()))
}

async fn commit(store: &RedisStore, consumer: &ConsumerId, log: &RedisLog, revision: u64) -> Result<(), Error> {
    let of = |count| Revision::new(0, count);
    let advance = Advance::new(log.id().clone(), revision.into(), of(revision), of(revision + 1));
    store.begin(consumer).await?.commit(advance).await
}

async fn an_old_master_refuses_for_now() -> Outcome {
    let stage = Stage::start().await?;
    let redis = Redis::connect(&stage.master.url()).await?;
    let (log, store) = (redis.log("orders").await?, redis.store());
    commit(&store, &stage.consumer, &log, 0).await?;
    stage.replica.command(&["REPLICAOF", "NO", "ONE"])?;
    let port = stage.replica.port().to_string();
    stage.master.command(&["REPLICAOF", "127.0.0.1", &port])?;
    // A replica that needs a full copy loads it first.
    let says = |error: &Error| {
        ["a replica now", "is loading"]
            .iter()
            .any(|words| error.to_string().contains(words))
    };
    let refused = |result: Result<(), Error>| match result {
        Err(error @ Error::Unavailable { .. }) if says(&error) => Ok(()),
        other => Err(Source::from(format!("it is a replica, and: {other:?}"))),
    };
    // Try again on a new connection.
    for _ in 0..2 {
        refused(log.append(&[message(1)]).await.map(drop))?;
        refused(commit(&store, &stage.consumer, &log, 1).await)?;
    }
    stage.master.command(&["REPLICAOF", "NO", "ONE"])?;
    send(&log, 1..2).await?;
    insist(|| commit(&store, &stage.consumer, &log, 1)).await?;
    Ok(())
}
