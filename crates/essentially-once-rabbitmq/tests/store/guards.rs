//! Guarded outboxes: commits are refused before retention reaches records that no relay has passed
//! on.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, Log, NewRecord, OffsetStore, Outbox as _,
    Record,
    backend::{Durability, Owner, Position, Pulse, Source, Transaction as _},
    consumer::AtLeastOnce,
    memory::{Memory, MemoryLog, MemoryStore, MemoryTx},
    relay::Relay,
};
use essentially_once_rabbitmq::{RabbitStore, RabbitTx};
use essentially_once_testkit::{Violation, read_log};
use tokio::sync::watch;

use crate::{
    Tests,
    support::{Place, advance, put, revision, shipping},
};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("guards::commits_wait_for_a_relay_that_stands_still", refused);
    tests.add("guards::a_consumer_goes_on_by_itself_and_loses_nothing", by_itself);
    tests.add("guards::nothing_is_refused_while_the_relay_is_up_to_date", up_to_date);
    tests.add("guards::another_handle_knows_how_far_the_relay_is", another_handle);
    tests.add("guards::a_relay_whose_store_is_away_counts_from_where_it_was", away);
    tests.add("guards::what_cannot_be_guarded_is_refused", settings);
}

const LIMIT: u64 = 1024 * 1024;

/// With what a message takes besides, 10 of them fit into the limit. The commit after the 11th is
/// refused.
const VALUE: usize = 100_000;
const FIT: u64 = 11;

fn name(name: &str) -> ConsumerId {
    ConsumerId::new(name).expect("a name")
}

/// A store that guards outbox `a`.
async fn guarded(place: &Place, relays: impl OffsetStore) -> Result<RabbitStore, Error> {
    let store = place.store().await?.unrelayed_limit(LIMIT);
    store.guard_outbox(&shipping(), "a", name("relay"), relays)
}

fn numbered(number: u64) -> NewRecord {
    let mut payload = vec![0; VALUE];
    payload[..8].copy_from_slice(&number.to_be_bytes());
    NewRecord::new(payload)
}

/// The numbers of the records that the relay has passed on.
async fn numbers(bus: &MemoryLog) -> Result<Vec<u64>, Error> {
    let number = |record: Record| {
        let number = record.payload.first_chunk().expect("a number");
        u64::from_be_bytes(*number)
    };
    Ok(read_log(bus).await?.into_iter().map(number).collect())
}

/// Sends record number `revision` in a commit of its own.
async fn send(store: &RabbitStore, outbox: &str, revision: u64) -> Result<(), Error> {
    let mut tx = store.begin(&shipping()).await?;
    tx.send(outbox, numbered(revision)).await?;
    tx.commit(advance(revision + 1, revision)).await
}

/// Sends until a commit is refused. Returns the revision, and the text of the refusal.
async fn send_until_refused(store: &RabbitStore, outbox: &str, mut revision: u64) -> Result<(u64, String), Error> {
    loop {
        match send(store, outbox, revision).await {
            Ok(()) => revision += 1,
            Err(error @ Error::Unavailable { .. }) => return Ok((revision, error.to_string())),
            Err(error) => return Err(error),
        }
        assert!(revision < 3 * FIT, "no commit was refused");
    }
}

fn relay<S: OffsetStore + Clone>(
    outbox: impl Log + 'static,
    relays: &S,
    bus: &MemoryLog,
) -> Consumer<S, Relay<MemoryLog>, AtLeastOnce> {
    Consumer::at_least_once(name("relay"), outbox, relays.clone(), Relay::to(bus.clone()))
}

/// Runs the relay until it has caught up.
async fn catch_up<S: OffsetStore + Clone>(place: &Place, relays: &S, bus: &MemoryLog) -> Result<(), Error> {
    let outbox = place.store().await?.sent_to(&shipping(), "a")?;
    relay(outbox, relays, bus).run_until_caught_up().await.map(drop)
}

async fn refused() -> Result<(), Violation> {
    let (place, memory) = (Place::new(), Memory::new());
    let (relays, bus) = (memory.store(), memory.log("bus")?);
    let store = guarded(&place, relays.clone()).await?;
    let (sent, text) = send_until_refused(&store, "a", 0).await?;
    assert_eq!(sent, FIT, "{text}");
    for part in [
        "consumer shipping",
        "outbox a ",
        "relay relay ",
        "limit is 1048576",
        "Start the relay",
    ] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
    let again = send(&store, "a", sent).await;
    assert!(matches!(again, Err(Error::Unavailable { .. })), "{again:?}");
    // Nothing was published, as another handle sees.
    let other = place.store().await?;
    assert_eq!(revision(&other).await?, sent);
    assert_eq!(read_log(&other.sent_to(&shipping(), "a")?).await?.len() as u64, sent);
    // Commits that do not send to that outbox have half as much again.
    put(&store, "k", "v", sent).await?;
    let (more, text) = send_until_refused(&store, "b", sent + 1).await?;
    assert!(
        (FIT + 5..FIT + 7).contains(&more) && text.contains("limit is 1572864"),
        "{more}: {text}"
    );
    let putting = put(&store, "k", "v", more).await;
    assert!(matches!(putting, Err(Error::Unavailable { .. })), "{putting:?}");
    // The other handle has no guard.
    assert_eq!(revision(&other).await?, more);
    put(&other, "k", "v", more).await?;
    catch_up(&place, &relays, &bus).await?;
    revision(&store).await?;
    send(&store, "a", more + 1).await?;
    catch_up(&place, &relays, &bus).await?;
    assert_eq!(numbers(&bus).await?, (0..sent).chain([more + 1]).collect::<Vec<_>>());
    Ok(())
}

/// Sends a large record for each record that it handles.
struct Sender {
    resets: watch::Sender<u64>,
}

#[async_trait]
impl Handler<RabbitTx> for Sender {
    async fn handle(&mut self, record: &Record, tx: &mut RabbitTx) -> Result<(), HandlerError> {
        Ok(tx.send("a", numbered(record.offset.lo())).await?)
    }

    async fn reset(&mut self) {
        self.resets.send_modify(|resets| *resets += 1);
    }
}

async fn by_itself() -> Result<(), Violation> {
    const RECORDS: usize = 3 * FIT as usize;
    let (place, memory) = (Place::new(), Memory::new());
    let (relays, bus, orders) = (memory.store(), memory.log("bus")?, memory.log("orders")?);
    orders.append(&vec![NewRecord::new("order"); RECORDS]).await?;
    let store = guarded(&place, relays.clone()).await?;
    let (resets, mut watching) = watch::channel(0);
    let consumer = Consumer::essentially_once(shipping(), orders, store.clone(), Sender { resets })
        .accept_volatile()
        .retries(1)
        .max_batch(3)
        .max_backoff(Duration::from_millis(50));
    let running = tokio::spawn(consumer.run_until_caught_up());
    // It has gone back to its place more often than a record is tried.
    let waiting = watching.wait_for(|resets| *resets > 5).await.map(drop);
    waiting.map_err(|_| Violation::new("the consumer has ended"))?;
    let position = place.store().await?.position(&shipping()).await?;
    let next = position.map_or(0, |position| position.next.lo());
    assert!((FIT..FIT + 3).contains(&next), "{next}");
    let stop = CancellationToken::new();
    let outbox = place.store().await?.sent_to(&shipping(), "a")?;
    let relaying = tokio::spawn(relay(outbox, &relays, &bus).run_until(stop.clone()));
    let report = running.await.map_err(Source::from)??;
    assert_eq!((report.handled, report.failed_tries), (RECORDS as u64, 0), "{report}");
    stop.cancel();
    relaying.await.map_err(Source::from)??;
    catch_up(&place, &relays, &bus).await?;
    assert_eq!(numbers(&bus).await?, (0..RECORDS as u64).collect::<Vec<_>>());
    Ok(())
}

async fn up_to_date() -> Result<(), Violation> {
    let (place, memory) = (Place::new(), Memory::new());
    let (relays, bus) = (memory.store(), memory.log("bus")?);
    let store = guarded(&place, relays.clone()).await?;
    for number in 0..2 * FIT {
        send(&store, "a", number).await?;
        catch_up(&place, &relays, &bus).await?;
        // The reader of the outbox writes a mark to the changelog.
        revision(&store).await?;
    }
    // A relay that has passed everything may have done so long ago.
    for number in 2 * FIT..5 * FIT {
        send(&store, "b", number).await?;
    }
    send(&store, "a", 5 * FIT).await?;
    // Its first record that was not passed on is new.
    send(&store, "a", 5 * FIT + 1).await?;
    let sent = read_log(&store.sent_to(&shipping(), "a")?).await?;
    assert_eq!(sent.len() as u64, 2 * FIT + 2);
    Ok(())
}

async fn another_handle() -> Result<(), Violation> {
    const PASSED: u64 = 3;
    let (place, memory) = (Place::new(), Memory::new());
    // The relay's position is in this store, as another consumer.
    let (relays, bus) = (place.store().await?, memory.log("bus")?);
    let store = guarded(&place, relays.clone()).await?;
    for number in 0..PASSED {
        send(&store, "a", number).await?;
    }
    catch_up(&place, &relays, &bus).await?;
    let most = PASSED + FIT - 2;
    for number in PASSED..most {
        revision(&store).await?;
        send(&store, "a", number).await?;
    }
    // Other handles start behind all of that, and read what the relay has not passed on.
    store.snapshot(&shipping()).await?;
    let (fresh, from) = (guarded(&place, relays.clone()).await?, most);
    let (sent, text) = send_until_refused(&fresh, "a", from).await?;
    assert!(
        (from + 1..from + 3).contains(&sent),
        "{sent}, not from {from} on: {text}"
    );
    let (none, text) = send_until_refused(&guarded(&place, relays.clone()).await?, "a", sent).await?;
    assert_eq!(none, sent, "{text}");
    // A relay of another name has passed on nothing.
    let unguarded = place.store().await?.unrelayed_limit(LIMIT);
    let other = unguarded.guard_outbox(&shipping(), "a", name("archive"), relays.clone())?;
    let (none, text) = send_until_refused(&other, "a", sent).await?;
    assert!(none == sent && text.contains("relay archive "), "{none}: {text}");
    catch_up(&place, &relays, &bus).await?;
    let fresh = guarded(&place, relays.clone()).await?;
    let next = revision(&fresh).await?;
    send(&fresh, "a", next).await?;
    assert_eq!(numbers(&bus).await?, (0..sent).collect::<Vec<_>>());
    Ok(())
}

/// A store of positions that may be away.
#[derive(Clone)]
struct Relays {
    store: MemoryStore,
    state: Arc<AtomicU8>,
}

const THERE: u8 = 0;
const AWAY: u8 = 1;
const SILENT: u8 = 2;

impl Relays {
    fn turn(&self, state: u8) {
        self.state.store(state, Ordering::Relaxed);
    }
}

#[async_trait]
impl OffsetStore for Relays {
    type Tx = MemoryTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        match self.state.load(Ordering::Relaxed) {
            THERE => self.store.position(consumer).await,
            AWAY => Err(Error::unavailable("read the positions", "the disk is away")),
            _ => pending().await,
        }
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<MemoryTx, Error> {
        self.store.begin(consumer).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.store.durability().await
    }

    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        self.store.pulse(consumer).await
    }

    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        self.store.watch(consumer, seen, interval).await
    }

    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        self.store.beat(consumer, owner).await
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        self.store.release(consumer, owner).await
    }
}

async fn away() -> Result<(), Violation> {
    const WHY: &str = "could not be read";
    let memory = Memory::new();
    let place = Place {
        timeout: Duration::from_secs(5),
        ..Place::new()
    };
    let bus = memory.log("bus")?;
    let relays = Relays {
        store: memory.store(),
        state: Arc::default(),
    };
    // One that does not answer holds the first commit up, and no longer than the time limit.
    relays.turn(SILENT);
    let store = guarded(&place, relays.clone()).await?;
    send(&store, "a", 0).await?;
    relays.turn(AWAY);
    let (sent, text) = send_until_refused(&store, "a", 1).await?;
    assert!(
        sent == FIT && text.contains(WHY) && text.contains("the disk is away"),
        "{sent}: {text}"
    );
    // The relay passes everything on, and the guard does not learn it.
    relays.turn(THERE);
    catch_up(&place, &relays, &bus).await?;
    relays.turn(AWAY);
    revision(&store).await?;
    let (none, text) = send_until_refused(&store, "a", sent).await?;
    assert!(none == sent && text.contains(WHY), "{none}: {text}");
    relays.turn(THERE);
    send(&store, "a", sent).await?;
    // From where it was last seen, there is room again.
    relays.turn(AWAY);
    let (more, text) = send_until_refused(&store, "a", sent + 1).await?;
    assert!(more == sent + FIT && text.contains(WHY), "{more}: {text}");
    relays.turn(THERE);
    let (none, text) = send_until_refused(&store, "a", more).await?;
    assert!(none == more && !text.contains(WHY), "{none}: {text}");
    Ok(())
}

async fn settings() -> Result<(), Violation> {
    let (place, memory) = (Place::new(), Memory::new());
    let (relays, bus) = (memory.store(), memory.log("bus")?);
    let store = place.store().await?;
    let refused = store
        .clone()
        .guard_outbox(&shipping(), "two words", name("relay"), relays.clone());
    assert!(matches!(refused, Err(Error::InvalidName { .. })), "{refused:?}");
    for limit in [LIMIT - 1, 256 * LIMIT + 1] {
        let refused = store.clone().unrelayed_limit(limit).position(&shipping()).await;
        assert!(
            matches!(
                &refused,
                Err(Error::InvalidSetting {
                    setting: "unrelayed_limit",
                    ..
                })
            ),
            "{refused:?}"
        );
    }
    // A relay of all records passes those of the outbox, too.
    let of_all = store
        .clone()
        .guard_outbox(&shipping(), "a", name("relay"), relays.clone())?;
    send(&store, "a", 0).await?;
    relay(store.sent(&shipping())?, &relays, &bus)
        .run_until_caught_up()
        .await?;
    send(&of_all, "a", 1).await?;
    // The relay of another outbox does not.
    let wrong = store.guard_outbox(&shipping(), "b", name("other"), relays.clone())?;
    Consumer::at_least_once(name("other"), bus.clone(), relays, Relay::to(memory.log("elsewhere")?))
        .run_until_caught_up()
        .await?;
    let refused = send(&wrong, "b", 2).await;
    assert!(
        matches!(&refused, Err(Error::WrongLog { consumer, .. }) if *consumer == name("other")),
        "{refused:?}"
    );
    Ok(())
}
