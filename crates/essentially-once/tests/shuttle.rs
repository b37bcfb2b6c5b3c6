//! The consumer loop under a model checker: two instances of one consumer, a crash anywhere in
//! each, many interleavings. And a producer with two senders whose replies are lost.
//!
//! Built only with `--cfg shuttle`, which replaces the loop's runtime services with those of the
//! checker (`src/rt.rs`). `cargo xtask test` does so. A failure prints its schedule, which
//! `shuttle::replay` repeats.

#![cfg(shuttle)]
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::{future::poll_fn, panic, pin::pin, task::Poll, time::Duration};

use bytes::Bytes;
use essentially_once::{
    Consumer, ConsumerId, Epoch, Error, Handler, HandlerError, KeyValue, Log, NewRecord, Offset, OffsetStore, Origin,
    Producer, ProducerId, Record, async_trait,
    backend::{Advance, Bounds, Durability, LogId, LogReader, Position, Revision, Transaction},
    memory::{Memory, MemoryLog, MemoryStore, MemoryTx},
};
use shuttle::{
    Config, Runner, future,
    rand::Rng,
    scheduler::{PctScheduler, RandomScheduler, Scheduler, UncontrolledNondeterminismCheckScheduler},
};

/// The number of random schedules, and of PCT schedules (Burckhardt et al., ASPLOS 2010).
/// `ESSENTIALLY_ONCE_SCHEDULES` overrides it.
const SCHEDULES: usize = 5_000;
const RECORDS: u64 = 4;

/// Lets the scheduler switch tasks. The in-memory backend never waits, but a real one always may.
async fn switch() {
    future::yield_now().await;
}

/// The in-memory store with a switch before and after every operation, optionally without fencing.
#[derive(Clone)]
struct Store {
    inner: MemoryStore,
    fenced: bool,
}

struct Tx {
    inner: MemoryTx,
    store: Store,
    consumer: ConsumerId,
}

#[async_trait]
impl OffsetStore for Store {
    type Tx = Tx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        switch().await;
        let position = self.inner.position(consumer).await;
        switch().await;
        position
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<Tx, Error> {
        switch().await;
        Ok(Tx {
            inner: self.inner.begin(consumer).await?,
            store: self.clone(),
            consumer: consumer.clone(),
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(Durability::Durable)
    }
}

#[async_trait]
impl Transaction for Tx {
    async fn commit(self, mut advance: Advance) -> Result<(), Error> {
        switch().await;
        if !self.store.fenced {
            let position = self.store.inner.position(&self.consumer).await?;
            advance.expected = position.map_or(Revision::NONE, |position| position.revision);
        }
        let result = self.inner.commit(advance).await;
        switch().await;
        result
    }

    async fn rollback(self) -> Result<(), Error> {
        switch().await;
        self.inner.rollback().await
    }
}

#[async_trait]
impl KeyValue for Tx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        switch().await;
        self.inner.get(key).await
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.inner.put(key, value).await
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.inner.delete(key).await
    }
}

/// Appends the record's payload to one value, the journal of all handled records in order.
struct Journal;

#[async_trait]
impl<T: KeyValue> Handler<T> for Journal {
    async fn handle(&mut self, record: &Record, tx: &mut T) -> Result<(), HandlerError> {
        let mut journal = tx.get(b"journal").await?.unwrap_or_default().to_vec();
        journal.extend_from_slice(&record.payload);
        switch().await;
        tx.put(b"journal", &journal).await?;
        Ok(())
    }
}

/// Runs the consumer, crashes it at a random moment, and starts it again.
async fn run_with_a_crash(memory: Memory, fenced: bool) {
    let run = || {
        let store = Store {
            inner: memory.store(),
            fenced,
        };
        Consumer::essentially_once(shipping(), memory.log("orders").unwrap(), store, Journal)
            .accept_volatile()
            .max_batch(2)
            // Smaller than the log, so that a wake-up lost between reading and taking shows as a
            // deadlock.
            .read_ahead_records(2)
            .read_ahead_bytes(1_000)
            // Time does not pass here, so a standby would never take over.
            .standby_after(Duration::ZERO)
            // The machine's clock must not decide anything.
            .batch_time_limit(Duration::MAX)
            .run_until_caught_up()
    };
    let mut polls_left = shuttle::rand::thread_rng().gen_range(0..80u32);
    let mut first = pin!(run());
    let finished = poll_fn(|context| {
        if polls_left == 0 {
            return Poll::Ready(None);
        }
        polls_left -= 1;
        first.as_mut().poll(context).map(Some)
    });
    match finished.await {
        Some(report) => drop(report.unwrap()),
        None => drop(run().await.unwrap()),
    }
}

fn shipping() -> ConsumerId {
    ConsumerId::new("shipping").unwrap()
}

/// Runs two instances at once. In the end every record took effect once, in order.
fn race(fenced: bool) {
    future::block_on(async move {
        let memory = Memory::new();
        let web = ProducerId::new("web").unwrap();
        // The third record is a duplicate of the second.
        let records = [("a", 0), ("b", 1), ("b", 1), ("c", 2)];
        let records = records.map(|(payload, sequence)| {
            NewRecord::new(payload).origin(Origin::new(web.clone(), Epoch::STABLE, sequence))
        });
        memory.log("orders").unwrap().append(&records).await.unwrap();
        let other = future::spawn(run_with_a_crash(memory.clone(), fenced));
        run_with_a_crash(memory.clone(), fenced).await;
        other.await.unwrap();
        let store = memory.store();
        let journal = store.begin(&shipping()).await.unwrap().get(b"journal").await.unwrap();
        assert_eq!(journal.as_deref(), Some(&b"abc"[..]));
        assert_eq!(store.position(&shipping()).await.unwrap().unwrap().next, RECORDS.into());
    });
}

fn schedules() -> usize {
    std::env::var("ESSENTIALLY_ONCE_SCHEDULES")
        .ok()
        .and_then(|schedules| schedules.parse().ok())
        .unwrap_or(SCHEDULES)
}

fn check(scheduler: impl Scheduler + 'static, fenced: bool) {
    let mut config = Config::new();
    // The loop's futures are larger than the checker's small default stacks.
    config.stack_size = 0x10_0000;
    Runner::new(scheduler, config).run(move || race(fenced));
}

#[test]
fn every_random_schedule_handles_each_record_once() {
    check(RandomScheduler::new(schedules()), true);
    println!("{} random schedules", schedules());
}

#[test]
fn every_pct_schedule_handles_each_record_once() {
    check(PctScheduler::new(3, schedules()), true);
    println!("{} PCT schedules of depth 3", schedules());
}

#[test]
fn without_fencing_the_checker_finds_a_doubled_or_lost_record() {
    let found = panic::catch_unwind(|| check(RandomScheduler::new(schedules()), false));
    assert!(
        found.is_err(),
        "a store without fencing passed {} schedules",
        schedules()
    );
}

#[test]
fn schedules_are_all_that_varies() {
    check(
        UncontrolledNondeterminismCheckScheduler::new(RandomScheduler::new(200)),
        true,
    );
}

/// The in-memory log with a switch before and after every append. One reply of three is lost after
/// a prefix has taken effect.
struct Lossy(MemoryLog);

#[async_trait]
impl Log for Lossy {
    fn id(&self) -> &LogId {
        self.0.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        switch().await;
        let is_lost = shuttle::rand::thread_rng().gen_range(0..3u32) == 0;
        let appended = if is_lost {
            shuttle::rand::thread_rng().gen_range(0..=records.len())
        } else {
            records.len()
        };
        let result = self.0.append(&records[..appended]).await;
        switch().await;
        if is_lost {
            return Err(Error::indeterminate("append", "the reply is lost"));
        }
        result
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        self.0.read(from).await
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.0.bounds().await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.0.durability().await
    }
}

/// Two tasks send through one producer, which is then closed or dropped. In the end the consumer
/// has handled each record once, in the order of its sender unless the producer is unordered.
fn send(depth: usize) {
    future::block_on(async move {
        let memory = Memory::new();
        let log = Lossy(memory.log("orders").unwrap());
        let sender = Producer::new(log, ProducerId::new("web").unwrap())
            .unordered(depth)
            .max_batch(2)
            // A wake-up that is lost shows as a deadlock.
            .queue_records(2)
            .start()
            .unwrap();
        let tasks = ["abc", "xyz"].map(|payloads| {
            let sender = sender.clone();
            future::spawn(async move {
                let mut sent = Vec::new();
                for payload in payloads.chars() {
                    switch().await;
                    sent.push(sender.send(NewRecord::new(payload.to_string())).await.unwrap());
                }
                sent
            })
        });
        let mut sent = Vec::new();
        for task in tasks {
            sent.extend(task.await.unwrap());
        }
        if shuttle::rand::thread_rng().gen_range(0..2u32) == 0 {
            let report = sender.close().await;
            assert_eq!((report.confirmed, report.waiting.count()), (6, 0), "{report}");
        }
        drop(sender);
        for sent in sent {
            sent.await.unwrap();
        }
        let log = memory.log("orders").unwrap();
        Consumer::essentially_once(shipping(), log, memory.store(), Journal)
            .accept_volatile()
            .standby_after(Duration::ZERO)
            .batch_time_limit(Duration::MAX)
            .run_until_caught_up()
            .await
            .unwrap();
        let mut tx = memory.store().begin(&shipping()).await.unwrap();
        let journal = tx.get(b"journal").await.unwrap().unwrap();
        // The sort is stable, so it keeps each sender's order.
        let mut handled = journal.to_vec();
        if depth == 1 {
            handled.sort_by_key(|payload| *payload > b'c');
        } else {
            handled.sort_unstable();
        }
        assert_eq!(handled, b"abcxyz");
    });
}

#[test]
fn in_every_schedule_each_sent_record_is_handled_once() {
    for depth in [1, 2] {
        let mut config = Config::new();
        config.stack_size = 0x10_0000;
        let scheduler = RandomScheduler::new(schedules());
        Runner::new(scheduler, config).run(move || send(depth));
        println!("{} random schedules, {depth} appends in flight", schedules());
    }
}
