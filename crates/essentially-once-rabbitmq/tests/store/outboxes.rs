//! Outboxes: the numbers of their records, and what their readers see. The conformance cases check
//! the contract for one handle at a time. These tests race handles of one consumer, and remove
//! entries from the changelog.

use std::time::Duration;

use essentially_once::{
    ConsumerId, Epoch, Error, KeyValue as _, Log as _, NewRecord, Offset, OffsetStore as _, Origin, Outbox as _,
    Record, backend::Transaction as _,
};
use essentially_once_rabbitmq::{LogOptions, RabbitStore};
use essentially_once_testkit::{Violation, read_log};
use test_servers::eventually;

use crate::{
    Tests,
    sent::{payloads, send},
    support::{Place, advance, node, put, revision, shipping},
};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("outboxes::racing_handles_share_no_number", racing);
    tests.add("outboxes::each_consumer_has_its_own", own);
    tests.add("outboxes::the_log_of_all_records_has_them_in_order", together);
    tests.add("outboxes::numbers_go_on_after_retention", retention);
    tests.add("outboxes::a_name_that_no_log_can_have_is_refused", names);
}

/// The records of an outbox as another process reads them.
async fn read(place: &Place, consumer: &ConsumerId, outbox: &str) -> Result<Vec<Record>, Error> {
    read_log(&place.store().await?.sent_to(consumer, outbox)?).await
}

/// The sequences of the records, which all have one producer in the stable epoch.
fn sequences(records: &[Record]) -> Vec<u64> {
    let origins: Vec<&Origin> = records.iter().filter_map(|record| record.origin.as_ref()).collect();
    assert_eq!(origins.len(), records.len(), "{records:?}");
    for origin in &origins {
        assert_eq!(origin.numbering, origins[0].numbering);
        assert_eq!(origin.numbering.epoch(), Epoch::STABLE);
    }
    origins.iter().map(|origin| origin.sequence).collect()
}

/// Two handles build on the same revision, again and again. One of each pair of commits applies.
/// Both would use the same numbers, and in the first round each would draw a producer.
async fn racing() -> Result<(), Violation> {
    const ROUNDS: u64 = 12;
    let place = Place::new();
    let (one, two) = (place.store().await?, place.store().await?);
    for round in 0..ROUNDS {
        assert_eq!((revision(&one).await?, revision(&two).await?), (round, round));
        let (a, b) = (format!("a one {round}"), format!("a two {round}"));
        let (a, b) = ([&a[..], &a[..]], [&b[..], &b[..]]);
        let results = tokio::join!(send(&one, &a, round), send(&two, &b, round));
        assert!(results.0.is_ok() != results.1.is_ok(), "{results:?}");
    }
    let records = read(&place, &shipping(), "a").await?;
    assert_eq!(sequences(&records), (0..2 * ROUNDS).collect::<Vec<_>>());
    for (n, record) in records.iter().enumerate() {
        assert!(record.payload.ends_with(format!(" {}", n / 2).as_bytes()), "{record:?}");
    }
    Ok(())
}

async fn own() -> Result<(), Violation> {
    let place = Place::new();
    let (store, billing) = (place.store().await?, ConsumerId::new("billing")?);
    for commits in 0..2 {
        send(&store, &["a by shipping"], commits).await?;
        let mut tx = store.begin(&billing).await?;
        tx.send("a", NewRecord::new("by billing")).await?;
        tx.commit(advance(commits + 1, commits)).await?;
    }
    let (of_shipping, of_billing) = (
        read(&place, &shipping(), "a").await?,
        read(&place, &billing, "a").await?,
    );
    assert_eq!(
        (sequences(&of_shipping), sequences(&of_billing)),
        (vec![0, 1], vec![0, 1])
    );
    let producer = |records: &[Record]| records[0].origin.clone().map(|origin| origin.numbering);
    assert!(producer(&of_shipping) != producer(&of_billing), "they share a producer");
    assert!(of_billing.iter().all(|record| record.payload == "by billing"));
    let ids = [&shipping(), &billing].map(|consumer| store.sent_to(consumer, "a").map(|sent| sent.id().clone()));
    let [Ok(one), Ok(other)] = ids else { panic!("{ids:?}") };
    assert!(one != other, "a position in one would be taken for one in the other");
    Ok(())
}

async fn together() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    send(&store, &["a0", "b0", "a1"], 0).await?;
    put(&store, "k", "v", 1).await?;
    send(&store, &["b1"], 2).await?;
    send(&store, &["c0", "a2"], 3).await?;
    let all = read_log(&store.sent(&shipping())?).await?;
    assert_eq!(
        payloads(&store.sent(&shipping())?).await?,
        ["a0", "b0", "a1", "b1", "c0", "a2"]
    );
    for (outbox, expected) in [
        ("a", &["a0", "a1", "a2"][..]),
        ("b", &["b0", "b1"]),
        ("c", &["c0"]),
        ("d", &[]),
    ] {
        let sent = store.sent_to(&shipping(), outbox)?;
        let records = read_log(&sent).await?;
        assert_eq!(payloads(&sent).await?, expected);
        assert_eq!(sequences(&records), (0..expected.len() as u64).collect::<Vec<_>>());
        // The same records, with the same origins.
        assert!(records.iter().all(|record| all.contains(record)), "{records:?}");
        let end = records.last().map_or(Offset::ZERO, |last| last.offset.successor());
        assert_eq!(sent.bounds().await?.end, end, "outbox {outbox}");
        let past = sent.read(end.successor()).await.map(drop);
        assert!(matches!(past, Err(Error::OutOfRange { .. })), "{past:?}");
        // A reader may begin anywhere.
        for (index, record) in records.iter().enumerate() {
            let mut reader = sent.read(record.offset).await?;
            assert_eq!(reader.next(1).await?, records[index..=index]);
        }
    }
    // A reader of an outbox that does not exist waits for its first record.
    let sent = store.sent_to(&shipping(), "e")?;
    let mut waiting = sent.read(Offset::ZERO).await?;
    let early = tokio::time::timeout(Duration::ZERO, waiting.next(1)).await;
    assert!(early.is_err(), "{early:?}");
    send(&store, &["a3", "e0"], 4).await?;
    assert_eq!(waiting.next(2).await?[0].payload, "e0");
    Ok(())
}

/// Fills segments of the changelog, writes a snapshot, and lets a policy remove all but the last
/// segment.
async fn fill_and_trim(place: &Place, store: &RabbitStore, mut revision: u64, gone: Offset) -> Result<u64, Violation> {
    const VALUE: usize = 15 * 1024 * 1024;
    for round in 0..5u8 {
        let mut tx = store.begin(&shipping()).await?;
        tx.put(b"large", &vec![round; VALUE]).await?;
        tx.commit(advance(revision + 1, revision)).await?;
        revision += 1;
    }
    store.snapshot(&shipping()).await?;
    let pattern = format!("^{}$", place.changelog().replace('.', "[.]"));
    let keep_one = r#"{"max-length-bytes": 1}"#;
    let policy = ["set_policy", &place.prefix, &pattern, keep_one, "--apply-to", "queues"];
    tokio::task::block_in_place(|| node().ctl(&policy)).map_err(|error| Violation::new(error.to_string()))?;
    // No event reports that the broker is done. With another prefix, it is an ordinary stream.
    let changelog = place.options().prefix("another").connect(&place.url).await?;
    let existing = LogOptions::new().existing();
    let changelog = changelog.log_with(&place.changelog(), existing).await?;
    eventually(|| async {
        Ok(match changelog.bounds().await {
            Ok(bounds) if bounds.earliest > gone => Ok(()),
            Ok(bounds) => Err(format!("the entry at {}", bounds.earliest)),
            Err(error) => Err(error.to_string()),
        })
    })
    .await
    .map_err(|error| Violation::new(error.to_string()))?;
    Ok(revision)
}

async fn retention() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    send(&store, &["a0", "b0"], 0).await?;
    send(&store, &["b1"], 1).await?;
    let before = (
        read(&place, &shipping(), "a").await?,
        read(&place, &shipping(), "b").await?,
    );
    let gone = before.1[1].offset;
    let revision = fill_and_trim(&place, &store, 2, gone).await?;
    let fresh = place.store().await?;
    let (a, b) = (fresh.sent_to(&shipping(), "a")?, fresh.sent_to(&shipping(), "b")?);
    // A reader that has missed the last record learns it at once, not with the next record.
    for (sent, from) in [(&a, Offset::ZERO), (&b, before.1[0].offset.successor())] {
        let missed = sent.read(from).await.map(drop);
        assert!(matches!(missed, Err(Error::Truncated { .. })), "{missed:?}");
    }
    // One that has read everything has missed nothing, although `b1` is gone.
    let mut up_to_date = a.read(before.0[0].offset.successor()).await?;
    send(&fresh, &["a1", "b2"], revision).await?;
    send(&fresh, &["a2"], revision + 1).await?;
    let mut found = up_to_date.next(2).await?;
    found.extend(up_to_date.next(2).await?);
    // The state came from a snapshot, and no entry that sent was left.
    let all: Vec<_> = before.0.iter().cloned().chain(found).collect();
    assert_eq!(sequences(&all), [0, 1, 2]);
    // The same reader, opened after the commits, finds the entry that follows its place.
    let mut late = a.read(before.0[0].offset.successor()).await?;
    assert_eq!(late.next(1).await?, all[1..2]);
    let of_b = read(&place, &shipping(), "b").await?;
    let numbering = |record: &Record| record.origin.clone().map(|origin| origin.numbering);
    assert_eq!(
        (sequences(&of_b), numbering(&of_b[0])),
        (vec![2], numbering(&before.1[0]))
    );
    // One that lacks `b1` gets an error with the entry of `b2`.
    let mut behind = match b.read(before.1[0].offset.successor()).await {
        Ok(reader) => reader,
        Err(error) => panic!("{error}"),
    };
    let missed = behind.next(1).await;
    assert!(matches!(missed, Err(Error::Truncated { .. })), "{missed:?}");
    Ok(())
}

async fn names() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    // The prefix has 12 bytes, the consumer's name 8, and `/`, `.` and `.outbox` 9.
    let (longest, longer) = ("x".repeat(171), "x".repeat(172));
    let mut tx = store.begin(&shipping()).await?;
    for wrong in [&longer[..], "", "two words"] {
        for refused in [
            tx.send(wrong, NewRecord::new("lost")).await,
            store.sent_to(&shipping(), wrong).map(drop),
        ] {
            assert!(
                matches!(refused, Err(Error::InvalidName { .. })),
                "{wrong}: {refused:?}"
            );
        }
    }
    tx.send(&longest, NewRecord::new("sent")).await?;
    tx.commit(advance(1, 0)).await?;
    let records = read(&place, &shipping(), &longest).await?;
    assert_eq!((records.len(), sequences(&records)), (1, vec![0]));
    assert_eq!(records[0].payload, "sent");
    // The name of an outbox is not free for a log.
    let name = store.sent_to(&shipping(), "a")?.id().name().to_owned();
    let taken = place.rabbit().await?.log(&name).await.map(drop);
    assert!(matches!(&taken, Err(Error::InvalidName { .. })), "{taken:?}");
    Ok(())
}
