//! The producer on a log whose appends are scripted.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "tests, with helpers that each module uses in part"
)]

mod ending;
mod faulty;
mod giving_up;
mod observed;
mod once;
mod refusals;
mod waiting;
mod window;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use essentially_once::{
    Consumer, ConsumerId, Error, NewRecord, Producer, ProducerId, Record, handler_fn,
    memory::{Memory, MemoryTx},
    producer::{Sender, Sent},
};
use faulty::{Act, Faulty, LARGEST};

fn producer(log: &Faulty) -> Producer {
    Producer::new(log.clone(), ProducerId::new("web").unwrap())
}

/// The result of something that must happen. Paused time jumps to the limit if nothing else can.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    let limit = Duration::from_secs(1_000 * 86_400);
    tokio::time::timeout(limit, future).await.expect("it happens")
}

/// Queues a record.
async fn send(sender: &Sender, payload: impl Into<String>) -> Sent {
    soon(sender.send(NewRecord::new(payload.into()))).await.unwrap()
}

/// Queues the payloads `from`, `from + 1`, ... `to`, which are also their sequences if nothing else
/// was sent.
async fn send_all(sender: &Sender, from: u64, to: u64) -> Vec<Sent> {
    let mut sent = Vec::new();
    for n in from..=to {
        sent.push(send(sender, n.to_string()).await);
    }
    sent
}

/// Waits until no task can go on. Paused time only passes then.
async fn idle() {
    tokio::time::sleep(Duration::from_nanos(1)).await;
}

/// What an essentially-once consumer makes of the log: the payloads that it handled, in order.
async fn handled(memory: &Memory) -> Vec<String> {
    let handled = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::clone(&handled);
    let handler = handler_fn(move |record: &Record, _: &mut MemoryTx| {
        let payload = String::from_utf8(record.payload.to_vec()).unwrap();
        note.lock().unwrap().push(payload);
        Box::pin(async { Ok(()) })
    });
    let log = memory.log("orders").unwrap();
    Consumer::essentially_once(ConsumerId::new("shipping").unwrap(), log, memory.store(), handler)
        .accept_volatile()
        .run_until_caught_up()
        .await
        .unwrap();
    let handled = handled.lock().unwrap();
    handled.clone()
}

/// `from` to `to` as payloads.
fn numbers(from: u64, to: u64) -> Vec<String> {
    (from..=to).map(|n| n.to_string()).collect()
}

/// What became of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Confirmed,
    InDoubt,
    Unavailable,
    Refused,
    TooLarge,
}

fn fate(result: &Result<(), Error>) -> Fate {
    match result {
        Ok(()) => Fate::Confirmed,
        Err(Error::Indeterminate { .. }) => Fate::InDoubt,
        Err(Error::Unavailable { .. }) => Fate::Unavailable,
        Err(Error::Failed { .. }) => Fate::Refused,
        Err(Error::TooLarge { .. }) => Fate::TooLarge,
        Err(error) => panic!("an unexpected error: {error}"),
    }
}

async fn fates(sent: Vec<Sent>) -> Vec<Fate> {
    let mut fates = Vec::new();
    for sent in sent {
        fates.push(fate(&soon(sent).await));
    }
    fates
}
