//! Relays between logs whose appends fail.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod histories;
mod restored;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use essentially_once::{
    Consumer, ConsumerId, Epoch, Error, KeyValue, Log, NewRecord, OffsetStore, Origin, ProducerId, Record, async_trait,
    backend::{DeadLetter, Window},
    consumer::{AtLeastOnce, DeadLetterOptions, OnFailure, Operator, Report, dead_letters},
    handler_fn,
    memory::{Memory, MemoryLog, MemoryStore, MemoryTx},
    relay::{Destination, Relay},
};
use proptest::{collection::vec, prelude::*};
use tokio::sync::Notify;

/// What happens to an append.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Nothing.
    None,
    /// It does not happen, and a later one may.
    Before,
    /// This many of its records are appended, and the reply is lost.
    Prefix(usize),
    /// It does not happen, and no later one will.
    Permanent,
}

/// A log whose appends fail in turn.
#[derive(Clone)]
struct Lossy {
    log: MemoryLog,
    faults: Arc<Mutex<VecDeque<Fault>>>,
}

impl Lossy {
    fn new(log: MemoryLog, faults: impl IntoIterator<Item = Fault>) -> Self {
        Self {
            log,
            faults: Arc::new(Mutex::new(faults.into_iter().collect())),
        }
    }
}

#[async_trait]
impl Destination for Lossy {
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error> {
        let fault = self.faults.lock().unwrap().pop_front();
        match fault.unwrap_or(Fault::None) {
            Fault::None => self.log.append(records).await.map(drop),
            Fault::Before => Err(Error::unavailable("append", "scripted")),
            Fault::Prefix(count) => {
                self.log.append(&records[..count.min(records.len())]).await?;
                Err(Error::indeterminate("append", "scripted"))
            }
            Fault::Permanent => Err(Error::failed("append", "the disk is full")),
        }
    }
}

fn origin(sequence: u64) -> Origin {
    Origin::new(ProducerId::new("orders").unwrap(), Epoch::STABLE, sequence)
}

/// A backend with a log `outbox` of records `0`, `1`, ..., and an empty log `bus`.
async fn outbox(records: u64) -> (Memory, MemoryLog) {
    let memory = Memory::new();
    let records: Vec<_> = (0..records)
        .map(|n| {
            NewRecord::new(n.to_string())
                .key("k")
                .header("n", n.to_string())
                .origin(origin(n))
        })
        .collect();
    memory.log("outbox").unwrap().append(&records).await.unwrap();
    let bus = memory.log("bus").unwrap();
    (memory, bus)
}

fn consumer<D: Destination + 'static>(
    memory: &Memory,
    relay: Relay<D>,
) -> Consumer<MemoryStore, Relay<D>, AtLeastOnce> {
    let outbox = memory.log("outbox").unwrap();
    Consumer::at_least_once(ConsumerId::new("relay").unwrap(), outbox, memory.store(), relay)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
}

/// What a consumer of a log handles, in order.
async fn handled(memory: &Memory, log: &MemoryLog) -> Vec<u64> {
    let id = ConsumerId::new("shipping").unwrap();
    let list = handler_fn(|record: &Record, tx: &mut MemoryTx| {
        Box::pin(async move {
            let before = tx.get(b"handled").await?.unwrap_or_default();
            let list = [&before[..], &record.payload, b" "].concat();
            Ok(tx.put(b"handled", &list).await?)
        })
    });
    let run = Consumer::essentially_once(id.clone(), log.clone(), memory.store(), list).accept_volatile();
    run.run_until_caught_up().await.unwrap();
    let list = memory.store().begin(&id).await.unwrap().get(b"handled").await.unwrap();
    let list = String::from_utf8(list.unwrap_or_default().to_vec()).unwrap();
    list.split_whitespace().map(|n| n.parse().unwrap()).collect()
}

async fn read(log: &MemoryLog) -> Vec<Record> {
    let (mut reader, mut records) = (log.read(0.into()).await.unwrap(), Vec::new());
    let end = log.bounds().await.unwrap().end;
    let next = |records: &[Record]| records.last().map_or(0.into(), |last| last.offset.successor());
    while next(&records) < end {
        records.extend(reader.next(1_000).await.unwrap());
    }
    records
}

#[tokio::test]
async fn a_record_arrives_as_it_was() {
    let (memory, bus) = outbox(3).await;
    let report = consumer(&memory, Relay::to(bus.clone()))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(report.handled, 3);
    let content = |records: Vec<Record>| records.iter().map(NewRecord::from).collect::<Vec<_>>();
    let sent = content(read(&memory.log("outbox").unwrap()).await);
    let arrived = content(read(&bus).await);
    assert_eq!(arrived, sent);
    assert!(arrived.iter().all(|record| record.origin.is_some()));
}

fn any_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        Just(Fault::None),
        Just(Fault::Before),
        (0..12_usize).prop_map(Fault::Prefix),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn whatever_replies_are_lost_a_consumer_of_the_destination_handles_each_record_once_and_in_order(
        faults in vec(any_fault(), 0..12),
        max_batch in 1..12_usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (memory, bus) = outbox(20).await;
            let relay = Relay::to(Lossy::new(bus.clone(), faults));
            consumer(&memory, relay).max_batch(max_batch).run_until_caught_up().await.unwrap();
            assert_eq!(handled(&memory, &bus).await, (0..20).collect::<Vec<_>>());
        });
    }
}

#[tokio::test]
async fn a_batch_that_did_not_arrive_is_sent_again_without_its_former_self() {
    let (memory, bus) = outbox(10).await;
    let relay = Relay::to(Lossy::new(bus.clone(), [Fault::Before, Fault::Before]));
    let report = consumer(&memory, relay)
        .max_batch(5)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, report.restarts), (10, 2), "{report}");
    assert_eq!(read(&bus).await.len(), 10);
}

fn payloads(records: Vec<Record>) -> Vec<bytes::Bytes> {
    records.into_iter().map(|record| record.payload).collect()
}

fn by_parity(record: &Record) -> Option<usize> {
    match record.offset.lo() {
        9 => None,
        n => Some(n as usize % 2),
    }
}

#[tokio::test]
async fn while_one_destination_is_away_the_others_get_a_batch_once() {
    let (memory, bus) = outbox(10).await;
    let other = memory.log("other").unwrap();
    let away = vec![Fault::Before; 20];
    let destinations = vec![Lossy::new(bus.clone(), []), Lossy::new(other.clone(), away)];
    let relay = Relay::routed(destinations, by_parity);
    let report = consumer(&memory, relay).run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.restarts), (10, 20), "{report}");
    // The first time, nobody knows yet which one is away.
    assert_eq!(
        payloads(read(&bus).await),
        ["0", "2", "4", "6", "8", "0", "2", "4", "6", "8"]
    );
    assert_eq!(payloads(read(&other).await), ["1", "3", "5", "7"]);
}

/// Refuses one record, and everything that comes with it.
struct Picky(MemoryLog);

#[async_trait]
impl Destination for Picky {
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error> {
        match records.iter().any(|record| record.payload == "7") {
            true => Err(Error::failed("append", "it has a header that is not allowed")),
            false => self.0.append(records).await.map(drop),
        }
    }
}

#[tokio::test]
async fn the_error_of_a_refused_record_names_that_record_and_those_before_it_are_sent() {
    let (memory, bus) = outbox(10).await;
    let relay = Relay::to(Picky(bus.clone()));
    let error = consumer(&memory, relay).run_until_caught_up().await.unwrap_err();
    assert!(
        matches!(&error, Error::Unhandled { offset, .. } if *offset == 7.into()),
        "{error}"
    );
    assert_eq!(handled(&memory, &bus).await, (0..7).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_destination_that_fails_for_good_ends_the_run_whatever_the_policy_for_records_is() {
    let (memory, bus) = outbox(10).await;
    let relay = Relay::to(Lossy::new(bus.clone(), [Fault::Permanent; 2]));
    let run = consumer(&memory, relay).on_failure(OnFailure::Skip);
    let error = run.run_until_caught_up().await.unwrap_err();
    assert!(error.to_string().contains("the disk is full"), "{error}");
    assert!(read(&bus).await.is_empty());
}

#[tokio::test]
async fn a_route_to_nowhere_is_an_error() {
    let (memory, bus) = outbox(1).await;
    let error = consumer(&memory, Relay::routed(vec![bus], |_| Some(7)))
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("destination 7, and the relay has 1"),
        "{error}"
    );
}

#[tokio::test]
async fn a_record_without_an_origin_is_only_sent_if_that_is_asked_for() {
    let (memory, bus) = outbox(1).await;
    memory
        .log("outbox")
        .unwrap()
        .append(&[NewRecord::new("1")])
        .await
        .unwrap();
    let error = consumer(&memory, Relay::to(bus.clone()))
        .run_until_caught_up()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no origin"), "{error}");
    assert_eq!(read(&bus).await.len(), 1, "those before it are sent");
    let relay = Relay::to(bus.clone()).send_without_origin();
    consumer(&memory, relay).run_until_caught_up().await.unwrap();
    assert_eq!(handled(&memory, &bus).await, [0, 1]);
}

/// Refuses records of more bytes than this.
struct Narrow(MemoryLog, usize);

#[async_trait]
impl Destination for Narrow {
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error> {
        for record in records {
            record.check_size(self.1)?;
        }
        self.0.append(records).await.map(drop)
    }
}

#[tokio::test]
async fn a_record_that_is_too_large_stops_the_relay() {
    let (memory, bus) = outbox(12).await;
    // Key, header and payload of the record 9 make four bytes, and those of 10 make six.
    let run = consumer(&memory, Relay::to(Narrow(bus.clone(), 4)));
    let error = run.run_until_caught_up().await.unwrap_err();
    assert!(
        matches!(&error, Error::Unhandled { offset, .. } if *offset == 10.into()),
        "{error}"
    );
    assert!(error.to_string().contains("over the limit of 4 bytes"), "{error}");
    assert_eq!(handled(&memory, &bus).await, (0..10).collect::<Vec<_>>());
}

/// An outbox with records from `0` to `last`, of the keys `a` and `b` in turn. One is large.
async fn outbox_with_a_large_record(large: u64, last: u64) -> (Memory, MemoryLog) {
    let memory = Memory::new();
    let record = |n: u64| {
        let record = NewRecord::new(n.to_string()).origin(origin(n));
        let record = record.key(if n.is_multiple_of(2) { "a" } else { "b" });
        match n == large {
            true => record.header("large", [b'x'; 100].as_slice()),
            false => record,
        }
    };
    let records: Vec<_> = (0..=last).map(record).collect();
    memory.log("outbox").unwrap().append(&records).await.unwrap();
    let bus = memory.log("bus").unwrap();
    (memory, bus)
}

/// Runs a relay that parks what its destination refuses as too large, and returns the letters.
async fn run_and_park(memory: &Memory, bus: &MemoryLog) -> Vec<DeadLetter> {
    let relay = Relay::to(Narrow(bus.clone(), 50));
    let run = consumer(memory, relay).dead_letters(DeadLetterOptions::new());
    run.run_until_caught_up().await.unwrap();
    let id = ConsumerId::new("relay").unwrap();
    dead_letters::list(&id, &memory.store(), None, 1_000).await.unwrap()
}

/// Retries the first letter, with a destination that accepts it now, and returns the letters left.
async fn retry(memory: &Memory, bus: &MemoryLog, letters: &[DeadLetter]) -> Vec<DeadLetter> {
    let (id, store) = (ConsumerId::new("relay").unwrap(), memory.store());
    let first = letters[0].record.offset;
    dead_letters::retry(&id, &store, first, &Operator::new("ann"))
        .await
        .unwrap();
    let run = consumer(memory, Relay::to(bus.clone())).dead_letters(DeadLetterOptions::new());
    run.run_until_caught_up().await.unwrap();
    dead_letters::list(&id, &store, None, 1_000).await.unwrap()
}

#[tokio::test]
async fn a_parked_record_holds_up_only_its_key_and_is_sent_once_the_destination_accepts_it() {
    let (memory, bus) = outbox_with_a_large_record(0, 6).await;
    let stopped = consumer(&memory, Relay::to(Narrow(bus.clone(), 50)));
    let error = stopped.run_until_caught_up().await.unwrap_err();
    assert!(
        matches!(&error, Error::Unhandled { offset, .. } if *offset == 0.into()),
        "{error}"
    );

    let letters = run_and_park(&memory, &bus).await;
    let parked: Vec<u64> = letters.iter().map(|letter| letter.record.offset.lo()).collect();
    assert_eq!(parked, [0, 2, 4, 6]);
    let reason = &letters[0].last_reason;
    assert!(reason.contains("over the limit of 50 bytes"), "{reason}");
    assert_eq!(payloads(read(&bus).await), ["1", "3", "5"]);

    assert!(retry(&memory, &bus, &letters).await.is_empty());
    assert_eq!(handled(&memory, &bus).await, [1, 3, 5, 0, 2, 4, 6]);
}

#[tokio::test]
async fn a_parked_record_stays_if_consumers_would_drop_it() {
    let (memory, bus) = outbox_with_a_large_record(5, 3 * Window::SIZE).await;
    let letters = run_and_park(&memory, &bus).await;
    let sent = bus.bounds().await.unwrap().end;
    let left = retry(&memory, &bus, &letters).await;
    assert_eq!(left.len(), letters.len());
    let reason = &left[0].last_reason;
    assert!(
        reason.contains("receivers would drop the record as a duplicate"),
        "{reason}"
    );
    assert_eq!(bus.bounds().await.unwrap().end, sent, "nothing was sent");
}

/// A log that does not exist.
struct Missing;

#[async_trait]
impl Destination for Missing {
    async fn send(&self, _: &[NewRecord]) -> Result<(), Error> {
        Err(Error::failed(
            "append to log bus",
            "the log does not exist; create it, or correct its name",
        ))
    }
}

#[tokio::test]
async fn a_relay_to_a_log_that_does_not_exist_stops_and_goes_on_once_it_exists() {
    let (memory, bus) = outbox(10).await;
    let run = consumer(&memory, Relay::to(Missing)).on_failure(OnFailure::Skip);
    let error = run.run_until_caught_up().await.unwrap_err().to_string();
    for part in ["append to log bus", "the log does not exist; create it"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    let report = consumer(&memory, Relay::to(bus.clone()))
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!(report.handled, 10, "no record was passed over");
    assert_eq!(handled(&memory, &bus).await, (0..10).collect::<Vec<_>>());
}

/// Holds its first records back until the test wakes it.
struct Frozen {
    log: MemoryLog,
    holds: Mutex<Option<(Arc<Notify>, Arc<Notify>)>>,
}

#[async_trait]
impl Destination for Frozen {
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error> {
        let held = self.holds.lock().unwrap().take();
        if let Some((is_held, wakes)) = held {
            is_held.notify_one();
            wakes.notified().await;
        }
        self.log.append(records).await.map(drop)
    }
}

#[tokio::test]
async fn a_relay_that_wakes_up_far_behind_another_doubles_nothing() {
    let count = 3 * Window::SIZE;
    let (memory, bus) = outbox(count).await;
    let (is_held, wakes) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let frozen = Frozen {
        log: bus.clone(),
        holds: Mutex::new(Some((Arc::clone(&is_held), Arc::clone(&wakes)))),
    };
    let run = |relay: Consumer<MemoryStore, _, AtLeastOnce>| relay.standby_after(Duration::ZERO);
    let zombie: tokio::task::JoinHandle<Result<Report, Error>> =
        tokio::spawn(run(consumer(&memory, Relay::to(frozen))).run_until_caught_up());
    is_held.notified().await;
    let other = consumer(&memory, Relay::to(bus.clone())).standby_after(Duration::ZERO);
    assert_eq!(other.run_until_caught_up().await.unwrap().handled, count);
    wakes.notify_one();
    zombie.await.unwrap().unwrap();
    assert!(read(&bus).await.len() as u64 > count);
    assert_eq!(handled(&memory, &bus).await, (0..count).collect::<Vec<_>>());
}
