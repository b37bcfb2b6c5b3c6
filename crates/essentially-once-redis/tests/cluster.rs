//! A cluster of three nodes: placement of keys, moving slots, and killed nodes.

mod common;

use std::{
    collections::HashMap,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue as _, Log as _, NewRecord,
    OffsetStore as _, Outbox as _, ReadState as _, Record, async_trait,
    backend::{Advance, DeadLetter, DeadLetters as _, Owner, Revision, Source, Transaction as _},
    consumer::{EssentiallyOnce, Report},
};
use essentially_once_redis::{
    LogOptions, Redis, RedisLog, RedisOptions, RedisStore, RedisTx, Retention,
    redis::{Cmd, cmd},
};
use essentially_once_testkit::{Ledger, read_log};
use test_servers::{RedisCluster, RedisServer, Reply};
use tokio::{sync::watch, task::JoinHandle};

use common::{LIMIT, Outcome, Seen, Watched, cases, ensure, judge, message, run, send, send_until, until};

const MESSAGES: u64 = 30;

fn main() -> ExitCode {
    run(cases![
        logs_and_consumers_are_on_all_nodes,
        life_and_state_are_where_the_position_is,
        a_command_in_another_slot_is_refused,
        an_outbox_is_in_the_slot_of_its_consumer,
        consumers_on_all_nodes_are_listed,
        a_consumer_follows_its_slot,
        sender_and_reader_follow_the_slot_of_the_log,
        a_node_that_is_killed_comes_back,
    ])
}

/// A cluster with one log and one consumer per node.
struct Stage {
    cluster: RedisCluster,
    redis: Redis,
    logs: [RedisLog; 3],
    consumers: [ConsumerId; 3],
}

impl Stage {
    async fn start() -> Result<Self, Source> {
        let cluster = RedisCluster::start(3)?;
        let urls: Vec<String> = cluster.nodes().iter().map(RedisServer::url).collect();
        let redis = RedisOptions::new().other_nodes(&urls[1..]).connect(&urls[0]).await?;
        let [first, second, third] = names(&cluster, |name| name.to_owned())?;
        let consumers = names(&cluster, position_key)?.map(ConsumerId::new);
        let [a, b, c] = consumers;
        Ok(Self {
            logs: [
                redis.log(&first).await?,
                redis.log(&second).await?,
                redis.log(&third).await?,
            ],
            consumers: [a?, b?, c?],
            cluster,
            redis,
        })
    }

    fn node(&self, index: usize) -> &RedisServer {
        &self.cluster.nodes()[index]
    }

    fn consumer(&self, index: usize, log: usize) -> (TestConsumer, watch::Receiver<Seen>) {
        let (handler, seen) = Watched::new(Tally);
        let (id, log) = (self.consumers[index].clone(), self.logs[log].clone());
        let consumer = Consumer::essentially_once(id, log, self.redis.store(), handler)
            .max_batch(4)
            .min_backoff(Duration::from_millis(5))
            .max_backoff(Duration::from_millis(100));
        (consumer, seen)
    }

    fn start_consumer(&self, index: usize, log: usize) -> Running {
        let (consumer, seen) = self.consumer(index, log);
        let stop = CancellationToken::new();
        let task = tokio::spawn(consumer.run_until(stop.clone()));
        Running { task, stop, seen }
    }

    /// Compares the ledger with the log, and the native commands with the ledger.
    async fn judge(&self, index: usize, log: usize, messages: u64) -> Outcome {
        let (store, consumer) = (self.redis.store(), &self.consumers[index]);
        judge(&self.logs[log], &store, consumer, messages).await?;
        let tx = store.begin(consumer).await?;
        let counts: HashMap<String, u64> = tx.query(Cmd::hgetall(count_key(&tx))).await?;
        let expected = (0..messages).fold(HashMap::new(), |mut counts, number| {
            *counts.entry((number % 3).to_string()).or_default() += 1;
            counts
        });
        ensure!(counts == expected, "counted {counts:?} of {messages}");
        Ok(())
    }

    /// Makes two nodes agree that a slot is moving.
    fn begin_move(&self, slot: &str, from: usize, to: usize) -> Outcome {
        let (from, to) = (self.node(from), self.node(to));
        let (source, target) = (from.command(&["CLUSTER", "MYID"])?, to.command(&["CLUSTER", "MYID"])?);
        to.command(&["CLUSTER", "SETSLOT", slot, "IMPORTING", source.text()])?;
        from.command(&["CLUSTER", "SETSLOT", slot, "MIGRATING", target.text()])?;
        Ok(())
    }

    /// Moves up to this many keys of the slot, and returns their number. A consumer's position
    /// comes first: the server returns the keys in any order, and not every commit needs the
    /// others.
    fn move_keys(&self, slot: &str, from: usize, to: usize, count: usize) -> Result<usize, Source> {
        let keys = self.node(from).command(&["CLUSTER", "GETKEYSINSLOT", slot, "100"])?;
        let (mut keys, port) = (keys.list().to_vec(), self.node(to).port().to_string());
        keys.sort_by_key(|key| !key.text().ends_with(":position"));
        keys.truncate(count);
        for key in &keys {
            self.node(from)
                .command(&["MIGRATE", "127.0.0.1", &port, key.text(), "0", "10000"])?;
        }
        Ok(keys.len())
    }

    fn end_move(&self, slot: &str, to: usize) -> Outcome {
        let target = self.node(to).command(&["CLUSTER", "MYID"])?;
        // Set the new owner first, so that the slot always has one.
        for node in [to, (to + 1) % 3, (to + 2) % 3] {
            self.node(node)
                .command(&["CLUSTER", "SETSLOT", slot, "NODE", target.text()])?;
        }
        Ok(())
    }
}

type TestConsumer = Consumer<RedisStore, Watched<Tally>, EssentiallyOnce>;

/// A consumer that runs in the background.
struct Running {
    task: JoinHandle<Result<Report, Error>>,
    stop: CancellationToken,
    seen: watch::Receiver<Seen>,
}

impl Running {
    async fn handles(&mut self, messages: u64) -> Outcome {
        until(&mut self.seen, |seen| seen.handled >= messages).await?;
        Ok(())
    }

    /// Waits for its next failure.
    async fn fails(&mut self) -> Outcome {
        let before = self.seen.borrow().resets;
        until(&mut self.seen, |seen| seen.resets > before).await?;
        Ok(())
    }

    async fn stop(self) -> Result<Report, Source> {
        self.stop.cancel();
        Ok(tokio::time::timeout(LIMIT, self.task).await???)
    }
}

/// Writes a ledger, and counts records by key with a native command.
struct Tally;

#[async_trait]
impl Handler<RedisTx> for Tally {
    async fn handle(&mut self, record: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        Ledger.handle(record, tx).await?;
        let key = record.key.clone().unwrap_or_default();
        tx.command(Cmd::hincr(count_key(tx), &key[..], 1)).await?;
        Ok(())
    }
}

fn count_key(tx: &RedisTx) -> String {
    format!("{}:count", tx.hash_tag())
}

fn position_key(consumer: &str) -> String {
    format!("essentially-once:{{{consumer}}}:position")
}

fn slot_of(cluster: &RedisCluster, key: &str) -> Result<usize, Source> {
    match cluster.nodes()[0].command(&["CLUSTER", "KEYSLOT", key])? {
        Reply::Int(slot) => Ok(usize::try_from(slot)?),
        other => Err(format!("{key} is in slot {other:?}").into()),
    }
}

/// One name per node, whose keys that node holds.
fn names(cluster: &RedisCluster, key: impl Fn(&str) -> String) -> Result<[String; 3], Source> {
    let mut names: [Option<String>; 3] = Default::default();
    for letter in 'a'..='z' {
        let name = letter.to_string();
        // Each node has an equal share of the slots.
        let node = slot_of(cluster, &key(&name))? * 3 / 16_384;
        names[node] = Some(name);
    }
    match names {
        [Some(first), Some(second), Some(third)] => Ok([first, second, third]),
        _ => Err("no name for some node".into()),
    }
}

async fn logs_and_consumers_are_on_all_nodes() -> Outcome {
    let stage = Stage::start().await?;
    for index in 0..3 {
        let log = (index + 1) % 3;
        send(&stage.logs[log], 0..MESSAGES).await?;
        let (consumer, _) = stage.consumer(index, log);
        consumer.run_until_caught_up().await?;
        stage.judge(index, log, MESSAGES).await?;
        // The keys are on the nodes of their slots and on no others.
        for node in 0..3 {
            let keys = stage.node(node).command(&["KEYS", "*"])?;
            let has = |key: &str| keys.list().iter().any(|found| found.text() == key);
            let position = has(&position_key(stage.consumers[index].as_str()));
            ensure!(
                position == (node == index),
                "the position of node {index} on node {node}: {position}"
            );
            let stream = has(stage.logs[log].id().name());
            ensure!(
                stream == (node == log),
                "the log of node {log} on node {node}: {stream}"
            );
        }
    }
    Ok(())
}

/// Writes a key in the right slot, and one in another.
struct Astray;

#[async_trait]
impl Handler<RedisTx> for Astray {
    async fn handle(&mut self, record: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        Tally.handle(record, tx).await?;
        tx.command(cmd("SET").arg("elsewhere").arg(1).take()).await?;
        Ok(())
    }
}

async fn life_and_state_are_where_the_position_is() -> Outcome {
    let stage = Stage::start().await?;
    let (store, owner) = (stage.redis.store(), Owner::draw());
    for (consumer, log) in stage.consumers.iter().zip(&stage.logs) {
        send(log, 0..2).await?;
        ensure!(log.readable_end().await? == log.bounds().await?.end, "not at the end");
        let mut tx = store.begin(consumer).await?;
        tx.put(b"key", b"value").await?;
        let record = Record::new(log.bounds().await?.earliest, SystemTime::UNIX_EPOCH, "x");
        let letter = DeadLetter::new(record, 1, "a reason", SystemTime::UNIX_EPOCH);
        tx.park(&letter).await?;
        let (first, end) = (Revision::NONE.next_epoch(), log.bounds().await?.end);
        let mut advance = Advance::new(log.id().clone(), end, Revision::NONE, first);
        advance.owner = Some(owner);
        tx.commit(advance).await?;
        let letters = store.begin(consumer).await?.list(None, 2).await?;
        ensure!(letters == [letter], "{letters:?}");
        let before = store.pulse(consumer).await?;
        store.beat(consumer, owner).await?;
        ensure!(store.pulse(consumer).await? != before, "a beat is not seen");
        store.release(consumer, owner).await?;
        ensure!(store.pulse(consumer).await?.owner.is_none(), "it is not released");
        let state = store.read_state(consumer, &[b"key"]).await?;
        ensure!(state.values[0].as_deref() == Some(b"value"), "{state:?}");
        ensure!(state.position == store.position(consumer).await?, "{state:?}");
        let retention = Retention::new().max_records(1);
        let (name, options) = (log.id().name(), LogOptions::new().existing().retention(retention));
        let trimmed = stage.redis.log_with(name, options).await?.trim().await?;
        ensure!(trimmed == 1, "{trimmed} records were removed");
    }
    Ok(())
}

async fn a_command_in_another_slot_is_refused() -> Outcome {
    let stage = Stage::start().await?;
    send(&stage.logs[0], 0..1).await?;
    let (id, log) = (stage.consumers[0].clone(), stage.logs[0].clone());
    let run = Consumer::essentially_once(id.clone(), log, stage.redis.store(), Astray).retries(0);
    let error = run.run_until_caught_up().await.err().ok_or("it was not refused")?;
    let text = error.to_string();
    ensure!(matches!(error, Error::Unhandled { .. }), "{text}");
    ensure!(
        text.contains(&format!("{{{id}}}")) && text.contains("elsewhere"),
        "{text}"
    );
    for node in stage.cluster.nodes() {
        let keys = node.command(&["KEYS", "*"])?;
        let applied = |key: &Reply| {
            ["elsewhere", "count", "state"]
                .iter()
                .any(|part| key.text().contains(part))
        };
        ensure!(!keys.list().iter().any(applied), "{keys:?}");
    }
    // Another handler continues at the same record.
    stage.consumer(0, 0).0.run_until_caught_up().await?;
    stage.judge(0, 0, 1).await
}

async fn an_outbox_is_in_the_slot_of_its_consumer() -> Outcome {
    let stage = Stage::start().await?;
    let store = stage.redis.store();
    for (index, consumer) in stage.consumers.iter().enumerate() {
        let name = format!("{{{consumer}}}:shipped");
        let mut revision = Revision::NONE;
        for number in 0..2_u64 {
            let mut tx = store.begin(consumer).await?;
            let other = &stage.consumers[(index + 1) % 3];
            for elsewhere in ["shipped".into(), format!("{{{other}}}:shipped"), consumer.to_string()] {
                let refused = tx.send(&elsewhere, NewRecord::new("lost")).await;
                let text = refused.as_ref().err().map(ToString::to_string).unwrap_or_default();
                let advice = format!(
                    "must contain {}; {elsewhere} does not; send to {}:",
                    tx.hash_tag(),
                    tx.hash_tag()
                );
                ensure!(
                    matches!(refused, Err(Error::Failed { .. })) && text.contains(&advice),
                    "{elsewhere}: {refused:?}"
                );
            }
            tx.send(&name, NewRecord::new(number.to_string())).await?;
            let next = revision.next_epoch();
            let advance = Advance::new(stage.logs[0].id().clone(), (number + 1).into(), revision, next);
            tx.commit(advance).await?;
            revision = next;
        }
        let options = LogOptions::new().existing().stream(name.clone());
        let records = read_log(&stage.redis.log_with("shipped", options).await?).await?;
        let found: Vec<_> = records
            .iter()
            .map(|record| {
                (
                    record.payload.clone(),
                    record.origin.as_ref().map(|origin| origin.sequence),
                )
            })
            .collect();
        ensure!(found == [("0".into(), Some(0)), ("1".into(), Some(1))], "{found:?}");
        for key in [name.clone(), format!("essentially-once:{{{consumer}}}:outbox:{name}")] {
            let exists = stage.node(index).command(&["EXISTS", &key])?;
            ensure!(exists == Reply::Int(1), "{key} is not on node {index}");
        }
    }
    Ok(())
}

async fn consumers_on_all_nodes_are_listed() -> Outcome {
    let stage = Stage::start().await?;
    let store = stage.redis.store();
    for consumer in &stage.consumers {
        let first = Revision::NONE.next_epoch();
        let advance = Advance::new(stage.logs[0].id().clone(), 0.into(), Revision::NONE, first);
        store.begin(consumer).await?.commit(advance).await?;
    }
    let mut all = stage.consumers.to_vec();
    all.sort_unstable();
    ensure!(store.consumers().await? == Some(all.clone()), "not all are listed");
    let slot = slot_of(&stage.cluster, &position_key(stage.consumers[0].as_str()))?.to_string();
    stage.begin_move(&slot, 0, 2)?;
    while stage.move_keys(&slot, 0, 2, 10)? > 0 {}
    ensure!(
        store.consumers().await? == Some(all.clone()),
        "one left out amid a move"
    );
    stage.end_move(&slot, 2)?;
    ensure!(store.consumers().await? == Some(all), "one left out after a move");
    Ok(())
}

async fn a_consumer_follows_its_slot() -> Outcome {
    let stage = Stage::start().await?;
    let log = &stage.logs[1];
    let slot = slot_of(&stage.cluster, &position_key(stage.consumers[0].as_str()))?.to_string();
    let mut running = stage.start_consumer(0, 1);
    send(log, 0..10).await?;
    running.handles(10).await?;
    stage.begin_move(&slot, 0, 2)?;
    ensure!(stage.move_keys(&slot, 0, 2, 1)? == 1, "there is nothing to move");
    // The consumer's keys are on two nodes, so no commit can succeed.
    send(log, 10..20).await?;
    running.fails().await?;
    while stage.move_keys(&slot, 0, 2, 10)? > 0 {}
    running.fails().await?;
    stage.end_move(&slot, 2)?;
    running.handles(20).await?;
    send(log, 20..MESSAGES).await?;
    running.handles(MESSAGES).await?;
    let report = running.stop().await?;
    // If an adapter repeats a commit, the first one fences the second.
    ensure!(report.fenced == 0 && report.restarts >= 2, "{report}");
    stage.judge(0, 1, MESSAGES).await
}

async fn sender_and_reader_follow_the_slot_of_the_log() -> Outcome {
    let stage = Stage::start().await?;
    let log = &stage.logs[1];
    let slot = slot_of(&stage.cluster, log.id().name())?.to_string();
    let mut running = stage.start_consumer(0, 1);
    send(log, 0..10).await?;
    running.handles(10).await?;
    stage.begin_move(&slot, 1, 2)?;
    ensure!(
        stage.move_keys(&slot, 1, 2, 10)? == 1,
        "the stream is not alone in its slot"
    );
    let refused = log.append(&[message(10)]).await;
    ensure!(
        matches!(&refused, Err(error @ Error::Unavailable { .. }) if error.to_string().contains("the key is moving")),
        "{refused:?}"
    );
    running.fails().await?;
    stage.end_move(&slot, 2)?;
    send(log, 10..MESSAGES).await?;
    running.handles(MESSAGES).await?;
    let report = running.stop().await?;
    ensure!(report.duplicates == 0 && report.fenced == 0, "{report}");
    stage.judge(0, 1, MESSAGES).await
}

async fn a_node_that_is_killed_comes_back() -> Outcome {
    const MORE: u64 = 20;
    let stage = Stage::start().await?;
    let mut running: Vec<Running> = (0..3).map(|index| stage.start_consumer(index, 1)).collect();
    let sent = CancellationToken::new();
    let sending = tokio::spawn(send_until(stage.logs[1].clone(), sent.clone()));
    for killed in [1, 2, 0] {
        for consumer in &mut running {
            let handled = consumer.seen.borrow().handled;
            consumer.handles(handled + MORE).await?;
        }
        tokio::task::block_in_place(|| stage.node(killed).restart())?;
        // The killed node holds the position of this consumer.
        running[killed].fails().await?;
    }
    for consumer in &mut running {
        let handled = consumer.seen.borrow().handled;
        consumer.handles(handled + MORE).await?;
    }
    sent.cancel();
    let (messages, failed) = tokio::time::timeout(LIMIT, sending).await???;
    ensure!(failed > 0, "no append failed");
    for (index, consumer) in running.into_iter().enumerate() {
        consumer.stop().await?;
        stage.consumer(index, 1).0.run_until_caught_up().await?;
        stage.judge(index, 1, messages).await?;
    }
    Ok(())
}
