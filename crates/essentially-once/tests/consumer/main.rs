//! The consumer loop on a scripted backend: the records and the position after a fault at each
//! step.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "tests, with a support module that each uses in part"
)]

mod blame;
mod deaths;
mod discard_all;
mod duplicates;
mod faults;
#[cfg(feature = "json")]
mod json;
mod letters;
mod letters_at_least_once;
mod letters_decoded;
mod letters_in_trouble;
mod letters_promises;
mod letters_unreadable;
mod lost;
mod operators;
mod policies;
mod records;
mod remove_passed;
mod running;
#[cfg(feature = "signed")]
mod signed;
mod skip;
mod standby;
mod starting;
mod stopping;
#[path = "../support/mod.rs"]
mod support;
mod verdicts;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, Log, NewRecord, Offset, OffsetStore,
    ProducerId, Record, StartAt,
    consumer::Operator,
    handler_fn,
    memory::{Memory, MemoryTx},
    seek, skip,
};
use support::{Backend, Fault, InMemory, Script, ScriptedTx, Step};

fn shipping() -> ConsumerId {
    ConsumerId::new("shipping").unwrap()
}

fn ann() -> Operator {
    Operator::new("ann").because("a test")
}

const RECORDS: u64 = 12;

/// The result of a future that never waits, as those of the memory backend.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        std::task::Poll::Ready(done) => done,
        std::task::Poll::Pending => panic!("it waits"),
    }
}
