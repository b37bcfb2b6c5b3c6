//! Records that are sent within a commit.

use std::sync::Arc;

use async_trait::async_trait;
use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, Log as _, NewRecord, Offset, OffsetStore as _, Outbox as _,
    Record, backend::Transaction as _,
};
use essentially_once_rabbitmq::{LogOptions, RabbitSent, RabbitStore, RabbitTx};
use essentially_once_testkit::{Check, Expectation, Ledger, Violation, read_ledger, read_log};

use crate::{
    Tests,
    support::{Place, advance, node, put, shipping},
};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("sent::records_are_there_if_and_only_if_their_commit_is", all_or_nothing);
    tests.add("sent::the_log_keeps_its_contract", contract);
    tests.add("sent::a_reader_may_begin_anywhere", anywhere);
    tests.add("sent::a_reader_that_missed_a_record_gets_an_error", missed);
    tests.add("sent::consumers_can_be_chained", chained);
}

/// Commits these records as the next revision, each to the outbox of its first letter.
pub(crate) async fn send(store: &RabbitStore, payloads: &[&str], expected_revision: u64) -> Result<(), Error> {
    let mut tx = store.begin(&shipping()).await?;
    for payload in payloads {
        let record = NewRecord::new(payload.to_string()).key("k").header("h", "v");
        tx.send(&payload[..1], record).await?;
    }
    tx.commit(advance(expected_revision + 1, expected_revision)).await
}

pub(crate) async fn payloads(sent: &RabbitSent) -> Result<Vec<String>, Error> {
    let records = read_log(sent).await?;
    Ok(records
        .into_iter()
        .map(|record| String::from_utf8_lossy(&record.payload).into_owned())
        .collect())
}

async fn all_or_nothing() -> Result<(), Violation> {
    let place = Place::new();
    let (one, two) = (place.store().await?, place.store().await?);
    send(&one, &["a", "b"], 0).await?;
    let mut dropped = one.begin(&shipping()).await?;
    dropped.send("d", NewRecord::new("dropped")).await?;
    drop(dropped);
    let mut rolled_back = one.begin(&shipping()).await?;
    rolled_back.send("r", NewRecord::new("rolled back")).await?;
    rolled_back.rollback().await?;
    // Both build on the first. The one that loses has sent nothing.
    let mut late = two.begin(&shipping()).await?;
    late.send("l", NewRecord::new("late")).await?;
    put(&one, "k", "v", 1).await?;
    let result = late.commit(advance(2, 1)).await;
    assert!(matches!(result, Err(Error::Fenced { .. })), "{result:?}");
    for round in 2..12 {
        let (a, b) = (format!("one {round}"), format!("two {round}"));
        let (a, b) = ([a.as_str()], [b.as_str()]);
        assert_eq!(crate::support::revision(&two).await?, round);
        let results = tokio::join!(send(&one, &a, round), send(&two, &b, round));
        assert!(results.0.is_ok() != results.1.is_ok(), "{results:?}");
    }
    for store in [&one, &two, &place.store().await?] {
        let sent = payloads(&store.sent(&shipping())?).await?;
        assert_eq!(sent.len(), 12, "{sent:?}");
        assert_eq!(sent[..2], ["a", "b"]);
        for (round, sent) in (2..12).zip(&sent[2..]) {
            assert!(sent.ends_with(&format!(" {round}")), "{sent:?} in round {round}");
        }
    }
    let records = read_log(&one.sent(&shipping())?).await?;
    assert_eq!(records[0].key.as_deref(), Some(&b"k"[..]));
    assert_eq!(records[0].header("h").map(|value| &value[..]), Some(&b"v"[..]));
    let too_large = NewRecord::new(vec![0; 17 * 1024 * 1024]);
    let result = one.begin(&shipping()).await?.send("t", too_large).await;
    assert!(
        matches!(result, Err(Error::TooLarge { what: "record", .. })),
        "{result:?}"
    );
    Ok(())
}

async fn contract() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    let sent = store.sent(&shipping())?;
    let bounds = sent.bounds().await?;
    assert_eq!((bounds.earliest, bounds.end), (Offset::ZERO, Offset::ZERO));
    let mut waiting = sent.read(Offset::ZERO).await?;
    // A dropped call loses nothing.
    assert!(futures_now(waiting.next(10)).await.is_none());
    send(&store, &["a", "b", "c"], 0).await?;
    let mut records = waiting.next(2).await?;
    records.extend(waiting.next(2).await?);
    assert_eq!(
        records.iter().map(|record| &record.payload[..]).collect::<Vec<_>>(),
        [b"a", b"b", b"c"]
    );
    put(&store, "k", "v", 1).await?;
    let end = records[2].offset.successor();
    assert_eq!(sent.bounds().await?.end, end);
    let result = sent.read(end.successor()).await.map(drop);
    assert!(
        matches!(&result, Err(Error::OutOfRange { end: reported, .. }) if *reported == end),
        "{result:?}"
    );
    let mut at_end = sent.read(end).await?;
    send(&store, &["d"], 2).await?;
    assert_eq!(at_end.next(10).await?[0].payload, "d");
    let result = sent.append(&[NewRecord::new("x")]).await;
    assert!(matches!(result, Err(Error::Failed { .. })), "{result:?}");
    assert_eq!(sent.append(&[]).await?, None);
    Ok(())
}

/// The result of the future if one poll completes it.
async fn futures_now<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(std::time::Duration::ZERO, future).await.ok()
}

async fn anywhere() -> Result<(), Violation> {
    let place = Place::new();
    // With snapshots, so that a reader's base is not the first entry.
    let store = place.rabbit().await?.store().snapshot_after(1);
    for revision in 0..15 {
        let (a, b) = (format!("{revision} a"), format!("{revision} b"));
        match revision % 3 {
            0 => put(&store, "k", "v", revision).await?,
            1 => send(&store, &[&a], revision).await?,
            _ => send(&store, &[&a, &b], revision).await?,
        }
    }
    let all = read_log(&store.sent(&shipping())?).await?;
    assert_eq!(all.len(), 15);
    let fresh = place.store().await?.sent(&shipping())?;
    for (index, record) in all.iter().enumerate() {
        for from in [record.offset, Offset::new(record.offset.hi(), 0)] {
            let mut reader = fresh.read(from).await?;
            let mut found = Vec::new();
            while found.last() != all.last() {
                found.extend(reader.next(3).await?);
            }
            let begin = if from == record.offset {
                index
            } else {
                all.len() - found.len()
            };
            assert_eq!(found, all[begin..], "from {from}");
            assert!(begin <= index && all[begin].offset >= from);
        }
    }
    Ok(())
}

async fn missed() -> Result<(), Violation> {
    const VALUE: usize = 15 * 1024 * 1024;
    let place = Place::new();
    let store = place.store().await?;
    send(&store, &["first"], 0).await?;
    send(&store, &["second"], 1).await?;
    let first = read_log(&store.sent(&shipping())?).await?;
    // Several segments, of which a policy then keeps the last. The store's own retention would need
    // ten times as many.
    let mut revision = 2;
    for round in 0..5u8 {
        let mut tx = store.begin(&shipping()).await?;
        essentially_once::KeyValue::put(&mut tx, b"large", &vec![round; VALUE]).await?;
        tx.commit(advance(revision + 1, revision)).await?;
        revision += 1;
    }
    store.snapshot(&shipping()).await?;
    let pattern = format!("^{}$", place.changelog().replace('.', "[.]"));
    let policy = [
        "set_policy",
        &place.prefix,
        &pattern,
        r#"{"max-length-bytes": 1}"#,
        "--apply-to",
        "queues",
    ];
    tokio::task::block_in_place(|| node().ctl(&policy)).map_err(|error| Violation::new(error.to_string()))?;
    // No event reports when the broker is done.
    // With another prefix, it is an ordinary stream.
    let changelog = place.options().prefix("another").connect(&place.url).await?;
    let changelog = changelog
        .log_with(&place.changelog(), LogOptions::new().existing())
        .await?;
    while changelog.bounds().await?.earliest <= first[1].offset {}
    let sent = place.store().await?.sent(&shipping())?;
    // A reader that has read everything has missed nothing, although the records are gone.
    let mut up_to_date = sent.read(first[1].offset.successor()).await?;
    send(&store, &["third"], revision).await?;
    assert_eq!(up_to_date.next(1).await?[0].payload, "third");
    let mut again = sent.read(first[1].offset.successor()).await?;
    assert_eq!(again.next(1).await?[0].payload, "third");
    let error = match sent.read(first[0].offset.successor()).await {
        Ok(mut reader) => reader.next(1).await.err(),
        Err(error) => Some(error),
    };
    assert!(matches!(error, Some(Error::Truncated { .. })), "{error:?}");
    Ok(())
}

/// Sends two records for each record that it handles.
struct Doubler;

#[async_trait]
impl Handler<RabbitTx> for Doubler {
    async fn handle(&mut self, record: &Record, tx: &mut RabbitTx) -> Result<(), HandlerError> {
        for part in ["a", "b"] {
            let payload = [&record.payload[..], part.as_bytes()].concat();
            let part_of = NewRecord::new(payload).key(record.key.clone().unwrap_or_default());
            tx.send(part, part_of).await?;
        }
        Ok(())
    }
}

/// Two consumers, each with two instances that take over from each other.
async fn chained() -> Result<(), Violation> {
    const RECORDS: usize = 200;
    let place = Place::new();
    let rabbit = place.rabbit().await?;
    let log = Arc::new(rabbit.log(&format!("{}-orders", place.prefix)).await?);
    let records: Vec<_> = (0..RECORDS)
        .map(|n| NewRecord::new(n.to_string()).key((n % 7).to_string()))
        .collect();
    log.append(&records).await?;
    let (doubler, billing) = (ConsumerId::new("doubler")?, ConsumerId::new("billing")?);
    let doubling = || async {
        let store = place.store().await?;
        Consumer::essentially_once(doubler.clone(), Arc::clone(&log), store, Doubler)
            .max_batch(7)
            .run_until_caught_up()
            .await
    };
    let (one, two) = tokio::join!(doubling(), doubling());
    one?;
    two?;
    let sent = Arc::new(place.store().await?.sent(&doubler)?);
    let billing_on = || async {
        let (store, sent) = (place.store().await?, Arc::clone(&sent));
        Consumer::essentially_once(billing.clone(), sent, store, Ledger)
            .max_batch(11)
            .run_until_caught_up()
            .await
    };
    let (one, two) = tokio::join!(billing_on(), billing_on());
    one?;
    two?;
    let records = read_log(&*sent).await?;
    assert_eq!(records.len(), 2 * RECORDS);
    let expected: Vec<_> = (0..RECORDS).flat_map(|n| [format!("{n}a"), format!("{n}b")]).collect();
    assert_eq!(payloads(&sent).await?, expected);
    let store = place.store().await?;
    let (applied, position) = (read_ledger(&store, &billing).await?, store.position(&billing).await?);
    let check = Check::new(&records, &applied).position(position.as_ref()).drained();
    check.findings().judge(Expectation::EssentiallyOnce)?;
    Ok(())
}
