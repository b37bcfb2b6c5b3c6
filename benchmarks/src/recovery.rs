//! How long the store on RabbitMQ takes to rebuild its state. A consumer waits for this when it
//! starts.

use std::time::Instant;

use essentially_once::{
    ConsumerId, KeyValue as _, OffsetStore as _,
    backend::{Advance, LogId, Revision, Transaction as _},
};
use essentially_once_rabbitmq::{Rabbit, RabbitStore};
use test_servers::RabbitNode;

use crate::{PAYLOAD, Result, median};

/// Keys of 12 bytes with values of 100 bytes, and commits of one key each since the snapshot.
const STATES: [(u64, u64); 7] = [
    (1_000, 0),
    (10_000, 0),
    (100_000, 0),
    (1_000_000, 0),
    (1_000, 100),
    (1_000, 1_000),
    (1_000, 10_000),
];

/// Keys per commit while the state is built.
const CHUNK: u64 = 20_000;

pub(crate) fn measure(rounds: u32) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let node = RabbitNode::start()?;
    println!("{rounds} rounds, each from a new handle until its first transaction has begun");
    println!("| keys | commits since the snapshot | median, s | longest, s |");
    println!("|---:|---:|---:|---:|");
    for (keys, commits) in STATES {
        let mut times = runtime.block_on(recoveries(&node.url(), keys, commits, rounds))?;
        let median = median(&mut times);
        println!("| {keys} | {commits} | {median:.2} | {:.2} |", times[times.len() - 1]);
    }
    Ok(())
}

/// The seconds of each round.
async fn recoveries(url: &str, keys: u64, commits: u64, rounds: u32) -> Result<Vec<f64>> {
    let consumer = ConsumerId::new(format!("keys-{keys}-{commits}"))?;
    // Takes no snapshot except the one requested below.
    let store = Rabbit::connect(url).await?.store().snapshot_after(64 * 1024 * 1024);
    let mut revision = Revision::NONE;
    for first in (0..keys).step_by(CHUNK as usize) {
        let last = (first + CHUNK).min(keys);
        revision = put(&store, &consumer, first..last, revision).await?;
    }
    store.snapshot(&consumer).await?;
    for commit in 0..commits {
        let key = commit % keys;
        revision = put(&store, &consumer, key..key + 1, revision).await?;
    }
    let mut times = Vec::new();
    for _ in 0..rounds {
        let store = Rabbit::connect(url).await?.store();
        let started = Instant::now();
        let mut tx = store.begin(&consumer).await?;
        times.push(started.elapsed().as_secs_f64());
        if tx.get(&key(keys - 1)).await?.as_deref() != Some(&PAYLOAD[..]) {
            return Err("the store returned another value than was written".into());
        }
    }
    Ok(times)
}

async fn put(
    store: &RabbitStore,
    consumer: &ConsumerId,
    keys: std::ops::Range<u64>,
    revision: Revision,
) -> Result<Revision> {
    let mut tx = store.begin(consumer).await?;
    for number in keys {
        tx.put(&key(number), &PAYLOAD).await?;
    }
    let next = revision.next_count();
    tx.commit(Advance::new(LogId::new("orders")?, next.count().into(), revision, next))
        .await?;
    Ok(next)
}

fn key(number: u64) -> Vec<u8> {
    format!("key-{number:08}").into_bytes()
}
