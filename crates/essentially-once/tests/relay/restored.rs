//! Relays whose outbox was restored from an older copy, and relays that send again what they sent.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use essentially_once::{
    Consumer, ConsumerId, Epoch, Error, Log, NewRecord, Offset, Origin, ProducerId, async_trait,
    backend::{Bounds, Durability, LogId, LogReader, Window},
    consumer::{Report, StartAt},
    memory::{Memory, MemoryLog},
    relay::{Destination, Relay},
};

use super::{handled, read};

/// Records `from..to` of an outbox, each with the text `<life> <number>`.
fn records(producer: &str, epoch: Epoch, life: &str, numbers: impl IntoIterator<Item = u64>) -> Vec<NewRecord> {
    let producer = ProducerId::new(producer).unwrap();
    let record = |n: u64| {
        NewRecord::new(n.to_string())
            .key("k")
            .header("life", life.to_owned())
            .origin(Origin::new(producer.clone(), epoch, n))
    };
    numbers.into_iter().map(record).collect()
}

fn orders(life: &str, numbers: impl IntoIterator<Item = u64>) -> Vec<NewRecord> {
    records("orders@1", Epoch::STABLE, life, numbers)
}

/// An outbox with these records, as a database of its own.
async fn outbox(records: &[NewRecord]) -> (Memory, MemoryLog) {
    let memory = Memory::new();
    let outbox = memory.log("outbox").unwrap();
    outbox.append(records).await.unwrap();
    (memory, outbox)
}

async fn run<D: Destination + 'static>(
    memory: &Memory,
    outbox: &MemoryLog,
    relay: Relay<D>,
    from: u64,
) -> Result<Report, Error> {
    Consumer::at_least_once(ConsumerId::new("relay").unwrap(), outbox.clone(), memory.store(), relay)
        .start_at(StartAt::Offset(from.into()))
        .run_until_caught_up()
        .await
}

async fn position(memory: &Memory) -> Offset {
    use essentially_once::OffsetStore as _;
    let id = ConsumerId::new("relay").unwrap();
    memory.store().position(&id).await.unwrap().unwrap().next
}

#[tokio::test]
async fn a_restored_outbox_is_refused_at_its_first_new_record() {
    // The copy is from before record 60, and the relay had passed record 50 then.
    let (old, bus) = (Memory::new(), Memory::new());
    let to = bus.log("bus").unwrap();
    drop(old);
    to.append(&orders("first", 0..100)).await.unwrap();
    let (memory, outbox) = outbox(&orders("first", 0..60)).await;
    outbox.append(&orders("second", 60..70)).await.unwrap();

    let error = run(&memory, &outbox, Relay::to(to.clone()), 50)
        .await
        .unwrap_err()
        .to_string();
    for part in [
        "offset 60",
        "log bus holds another record with the origin orders@1:60",
        "new_producer_from",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(
        position(&memory).await,
        60.into(),
        "what was sent before is sent again, and no more"
    );
    assert_eq!(to.bounds().await.unwrap().end, 110.into());

    let relay = || Relay::to(to.clone()).new_producer_from(60.into());
    assert_eq!(run(&memory, &outbox, relay(), 0).await.unwrap().handled, 10);
    let all = (0..100).chain(60..70);
    assert_eq!(handled(&bus, &to).await, all.collect::<Vec<_>>());
}

#[tokio::test]
async fn the_new_producer_is_the_same_each_time() {
    let bus = Memory::new();
    let to = bus.log("bus").unwrap();
    let (memory, outbox) = outbox(&orders("second", 0..10)).await;
    let relay = || {
        Relay::to(to.clone())
            .new_producer_from(3.into())
            .new_producer_from(7.into())
    };
    run(&memory, &outbox, relay(), 0).await.unwrap();
    // Another relay that has passed nothing sends all of it again.
    run(&Memory::new(), &outbox, relay(), 0).await.unwrap();
    assert_eq!(handled(&bus, &to).await, (0..10).collect::<Vec<_>>());
    let sent = read(&to).await;
    let producer = |at: usize| sent[at].origin.as_ref().unwrap().numbering.clone();
    assert_eq!(producer(2).producer().as_str(), "orders@1");
    let (second, third) = (producer(3), producer(7));
    assert!(producer(2) != second && second != third, "{second} {third}");
    assert_eq!((producer(6), producer(9)), (second.clone(), third));
    assert!(second.producer().as_str().starts_with("orders@") && second.epoch() == Epoch::STABLE);
    let numbers = sent.iter().map(|record| record.origin.as_ref().unwrap().sequence);
    assert_eq!(numbers.collect::<Vec<_>>(), (0..10).chain(0..10).collect::<Vec<_>>());
}

#[tokio::test]
async fn records_with_a_fresh_epoch_are_neither_compared_nor_changed() {
    let to = Memory::new().log("bus").unwrap();
    let epoch = Epoch::new(7);
    to.append(&records("web", epoch, "first", 0..5)).await.unwrap();
    let (memory, outbox) = outbox(&records("web", epoch, "second", 0..5)).await;
    let relay = Relay::to(to.clone()).new_producer_from(0.into());
    assert_eq!(run(&memory, &outbox, relay, 0).await.unwrap().handled, 5);
    let sent = read(&to).await;
    assert_eq!(sent[0].origin, sent[5].origin);
}

/// A log that counts how many of its records are read.
#[derive(Clone)]
struct Counted {
    log: MemoryLog,
    reads: Arc<AtomicU64>,
}

#[async_trait]
impl Log for Counted {
    fn id(&self) -> &LogId {
        self.log.id()
    }
    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.log.append(records).await
    }
    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let unread = self.log.bounds().await?.end.lo() - from.lo();
        self.reads.fetch_add(unread, Ordering::SeqCst);
        self.log.read(from).await
    }
    async fn bounds(&self) -> Result<Bounds, Error> {
        self.log.bounds().await
    }
    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        self.log.tail(count).await
    }
    async fn durability(&self) -> Result<Durability, Error> {
        self.log.durability().await
    }
}

fn counted() -> Counted {
    let log = Memory::new().log("bus").unwrap();
    Counted {
        log,
        reads: Arc::default(),
    }
}

#[tokio::test]
async fn the_relay_reads_back_no_further_than_it_must() {
    let to = counted();
    to.append(&orders("first", 0..20_000)).await.unwrap();
    let (memory, outbox) = outbox(&orders("first", 0..20_100)).await;
    assert_eq!(
        run(&memory, &outbox, Relay::to(to.clone()), 19_990)
            .await
            .unwrap()
            .handled,
        110
    );
    assert_eq!(to.reads.load(Ordering::SeqCst), 1_024);
    assert_eq!(
        run(&Memory::new(), &outbox, Relay::to(to.clone()), 15_000)
            .await
            .unwrap()
            .handled,
        5_100
    );
    assert_eq!(to.reads.load(Ordering::SeqCst), 2 * 1_024 + 8 * 1_024);
}

#[tokio::test]
async fn a_log_of_others_is_not_read_to_its_beginning() {
    let to = counted();
    to.append(&records("others@1", Epoch::STABLE, "first", 0..50_000))
        .await
        .unwrap();
    let (memory, outbox) = outbox(&orders("first", 0..10)).await;
    assert_eq!(
        run(&memory, &outbox, Relay::to(to.clone()), 0).await.unwrap().handled,
        10
    );
    assert_eq!(to.reads.load(Ordering::SeqCst), 1_024);
}

#[tokio::test]
async fn a_number_that_receivers_would_drop_is_refused() {
    let to = counted();
    // Number 5 went elsewhere before the copy was made.
    let far = 6 + Window::SIZE;
    let held = (0..=far).filter(|n| *n != 5);
    to.append(&orders("first", held)).await.unwrap();
    let (memory, outbox) = outbox(&orders("second", [5])).await;
    let error = run(&memory, &outbox, Relay::to(to.clone()), 0)
        .await
        .unwrap_err()
        .to_string();
    let expected = format!("was sent number {far} of its producer before orders@1:5");
    assert!(error.contains(&expected), "{error}");
}

#[tokio::test]
async fn a_number_that_receivers_still_take_is_sent() {
    let to = counted();
    let held = (0..5 + Window::SIZE).filter(|n| *n != 5);
    to.append(&orders("first", held)).await.unwrap();
    let (memory, outbox) = outbox(&orders("second", [5])).await;
    assert_eq!(
        run(&memory, &outbox, Relay::to(to.clone()), 0).await.unwrap().handled,
        1
    );
}

#[tokio::test]
async fn numbers_that_retention_removed_are_sent_again() {
    let memory = Memory::new();
    let to = memory.log("bus").unwrap();
    to.append(&orders("first", 0..5_000)).await.unwrap();
    to.truncate(4_000.into());
    let (old, outbox) = outbox(&orders("first", 0..5_000)).await;
    assert_eq!(run(&old, &outbox, Relay::to(to), 0).await.unwrap().handled, 5_000);
}

#[tokio::test]
async fn each_destination_is_compared_on_its_own() {
    let bus = Memory::new();
    let (odd, even) = (bus.log("odd").unwrap(), bus.log("even").unwrap());
    even.append(&orders("first", [0, 2, 4])).await.unwrap();
    odd.append(&orders("first", [1, 3])).await.unwrap();
    let (memory, outbox) = outbox(&orders("first", 0..4)).await;
    outbox.append(&orders("second", 4..6)).await.unwrap();
    let relay = || {
        Relay::routed(vec![even.clone(), odd.clone()], |record| {
            Some(record.payload[0] as usize % 2)
        })
    };
    let error = run(&memory, &outbox, relay(), 0).await.unwrap_err().to_string();
    assert!(
        error.contains("log even holds another record with the origin orders@1:4"),
        "{error}"
    );
    let relay = relay().new_producer_from(4.into());
    run(&memory, &outbox, relay, 0).await.unwrap();
    assert_eq!(handled(&bus, &even).await, [0, 2, 4, 4]);
}

/// A log that may be written but not read.
struct WriteOnly(MemoryLog);

#[async_trait]
impl Log for WriteOnly {
    fn id(&self) -> &LogId {
        self.0.id()
    }
    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.0.append(records).await
    }
    async fn read(&self, _: Offset) -> Result<Box<dyn LogReader>, Error> {
        Err(Error::failed("read log bus", "this user may not"))
    }
    async fn bounds(&self) -> Result<Bounds, Error> {
        self.0.bounds().await
    }
    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        self.0.tail(count).await
    }
    async fn durability(&self) -> Result<Durability, Error> {
        self.0.durability().await
    }
}

#[tokio::test]
async fn a_destination_that_may_not_be_read_is_written() {
    let to = Memory::new().log("bus").unwrap();
    to.append(&orders("first", 0..1)).await.unwrap();
    let (memory, outbox) = outbox(&orders("first", 0..3)).await;
    let relay = Relay::to(WriteOnly(to.clone()));
    assert_eq!(run(&memory, &outbox, relay, 0).await.unwrap().handled, 3);
    assert_eq!(to.bounds().await.unwrap().end, 4.into());
}

/// Two relays that pass records on to each other stop when a record comes back.
#[tokio::test]
async fn a_record_goes_round_a_cycle_once() {
    let memory = Memory::new();
    let (there, back) = (memory.log("there").unwrap(), memory.log("back").unwrap());
    there.append(&orders("first", 0..10)).await.unwrap();
    for _ in 0..3 {
        for (name, from, to) in [("one", &there, &back), ("other", &back, &there)] {
            let relay = Relay::to(to.clone());
            let relay = Consumer::at_least_once(ConsumerId::new(name).unwrap(), from.clone(), memory.store(), relay);
            relay.run_until_caught_up().await.unwrap();
        }
    }
    assert_eq!(there.bounds().await.unwrap().end, 20.into());
    assert_eq!(back.bounds().await.unwrap().end, 10.into());
}
