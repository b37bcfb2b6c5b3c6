//! A broker that takes smaller messages than we would send, and what its refusal says about other
//! messages.

use std::{
    fs,
    time::{Duration, UNIX_EPOCH},
};

use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue as _, Log as _, NewRecord, OffsetStore as _,
    Outbox as _, Record, async_trait,
    backend::{Advance, DeadLetter, DeadLetters as _, LogId, Revision, Source, Transaction as _},
    consumer::{DeadLetterOptions, dead_letters},
};
use essentially_once_rabbitmq::{Rabbit, RabbitStore, RabbitTx};
use essentially_once_testkit::read_log;
use lapin::{Connection, ConnectionProperties, options::QueueDeleteOptions};
use test_servers::RabbitNode;
use tokio::{
    task::{JoinSet, block_in_place},
    time::timeout,
};

use crate::common::{Outcome, ensure, fresh, insist, options, url};

const LIMIT: usize = 200_000;

fn node() -> Result<RabbitNode, Source> {
    block_in_place(|| RabbitNode::start_with(&format!("max_message_size = {LIMIT}")))
}

/// A handle that does not know the broker's limit yet.
async fn rabbit(node: &RabbitNode) -> Result<Rabbit, Error> {
    options().connect(&url(node.port())).await
}

fn large() -> NewRecord {
    NewRecord::new(vec![b'x'; 300_000])
}

fn is_too_large(result: &Result<Option<essentially_once::Offset>, Error>) -> bool {
    matches!(
        result,
        Err(Error::TooLarge {
            size: 300_000,
            limit: LIMIT,
            ..
        })
    )
}

pub(crate) async fn a_record_too_large_for_the_broker_says_nothing_about_others() -> Outcome {
    let (node, name) = (node()?, fresh("orders"));
    let mut refused = Vec::new();
    for round in 0..20 {
        let log = rabbit(&node).await?.log(&name).await?;
        // The two share the channel.
        log.append(&[NewRecord::new("first")]).await?;
        let small = format!("small {round}");
        let (small_record, large_record) = ([NewRecord::new(small.clone())], [large()]);
        let (small_result, large_result) = tokio::join!(log.append(&small_record), log.append(&large_record));
        ensure!(is_too_large(&large_result), "round {round}: {large_result:?}");
        match small_result {
            Ok(_) | Err(Error::Indeterminate { .. }) => {}
            Err(_) => refused.push(small),
        }
        log.append(&[NewRecord::new("next")]).await?;
    }
    let log = rabbit(&node).await?.log(&name).await?;
    let stored = read_log(&log).await?;
    let lies: Vec<_> = refused
        .iter()
        .filter(|small| stored.iter().any(|record| record.payload == small.as_bytes()))
        .collect();
    ensure!(lies.is_empty(), "reported as not appended, but in the log: {lies:?}");
    Ok(())
}

pub(crate) async fn an_append_with_a_record_too_large_for_the_broker_is_in_doubt_once() -> Outcome {
    let (node, name) = (node()?, fresh("orders"));
    let log = rabbit(&node).await?.log(&name).await?;
    let records = [NewRecord::new("small"), large()];
    let first = log.append(&records).await;
    ensure!(matches!(first, Err(Error::Indeterminate { .. })), "{first:?}");
    for _ in 0..3 {
        let again = log.append(&records).await;
        ensure!(is_too_large(&again), "{again:?}");
    }
    let stored = read_log(&log).await?.len();
    ensure!(stored <= 1, "{stored} records are stored");
    Ok(())
}

/// The advance of the commit after `commits` commits of one session.
fn advance(commits: u64) -> Advance {
    let (log, of) = (LogId::new("orders").expect("a name"), |count| Revision::new(0, count));
    Advance::new(log, 1.into(), of(commits), of(commits + 1))
}

/// Commits these values to a consumer without a position.
async fn commit(store: &RabbitStore, consumer: &ConsumerId, values: &[usize]) -> Result<(), Error> {
    let mut tx = store.begin(consumer).await?;
    for (key, size) in values.iter().enumerate() {
        tx.put(&[key as u8], &vec![b'x'; *size]).await?;
    }
    tx.commit(advance(0)).await
}

pub(crate) async fn a_commit_too_large_for_the_broker_is_refused_with_the_setting() -> Outcome {
    let (node, consumer) = (node()?, ConsumerId::new("shipping")?);
    let store = rabbit(&node).await?.store();
    let result = commit(&store, &consumer, &[150_000, 150_000]).await;
    let refused = matches!(&result, Err(Error::Failed { .. }));
    let words = result.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(
        refused && words.contains("max_batch") && words.contains("max_message_size"),
        "{words}"
    );
    // From now on, the limit is known before the commit.
    let result = commit(&store, &consumer, &[150_000, 150_000]).await;
    ensure!(
        matches!(
            result,
            Err(Error::TooLarge {
                what: "transaction",
                limit: LIMIT,
                ..
            })
        ),
        "{result:?}"
    );
    let mut tx = store.begin(&consumer).await?;
    tx.put(b"k", &[b'x'; 150_000]).await?;
    let sent = tx.send("billing", NewRecord::new(vec![b'x'; 60_000])).await;
    ensure!(matches!(sent, Err(Error::TooLarge { limit: LIMIT, .. })), "{sent:?}");
    // The refused ones are not part of it, and another value of the same key replaces the first.
    tx.put(b"k", &[b'x'; 190_000]).await?;
    tx.delete(b"k").await?;
    tx.send("billing", NewRecord::new(vec![b'x'; 190_000])).await?;
    tx.rollback().await?;
    let mut tx = store.begin(&consumer).await?;
    let value = tx.put(b"k", &[b'x'; 300_000]).await;
    ensure!(
        matches!(
            value,
            Err(Error::TooLarge {
                what: "value",
                limit: LIMIT,
                ..
            })
        ),
        "{value:?}"
    );
    let sent = tx.send("billing", large()).await;
    ensure!(matches!(sent, Err(Error::TooLarge { limit: LIMIT, .. })), "{sent:?}");
    drop(tx);
    let position = rabbit(&node).await?.store().position(&consumer).await?;
    ensure!(position.is_none(), "{position:?}");
    commit(&store, &consumer, &[150_000]).await?;
    Ok(())
}

pub(crate) async fn a_letter_too_large_for_the_broker_is_refused_before_it_is_sent() -> Outcome {
    let (node, consumer) = (node()?, ConsumerId::new("shipping")?);
    let rabbit = rabbit(&node).await?;
    // The broker names its limit when it is exceeded.
    let learned = rabbit.log("orders").await?.append(&[large()]).await;
    ensure!(is_too_large(&learned), "{learned:?}");
    let letter = |size| DeadLetter::new(Record::new(1.into(), UNIX_EPOCH, vec![b'x'; size]), 1, "", UNIX_EPOCH);
    let store = rabbit.store();
    let mut tx = store.begin(&consumer).await?;
    for (size, refused_as) in [(300_000, "dead letter"), (LIMIT - 100, "transaction")] {
        let parked = tx.park(&letter(size)).await;
        let is_refused = matches!(&parked, Err(Error::TooLarge { what, .. }) if *what == refused_as);
        ensure!(is_refused, "{size} bytes: {parked:?}");
    }
    tx.park(&letter(LIMIT - 2_000)).await?;
    tx.commit(advance(0)).await?;
    let mut tx = rabbit.store().begin(&consumer).await?;
    let found = tx.letter(1.into()).await?;
    ensure!(found == Some(letter(LIMIT - 2_000)), "it came back as another");
    Ok(())
}

pub(crate) async fn a_snapshot_is_cut_to_what_the_broker_takes() -> Outcome {
    let (node, consumer) = (node()?, ConsumerId::new("shipping")?);
    let store = rabbit(&node).await?.store();
    for revision in 0..4u8 {
        let mut tx = store.begin(&consumer).await?;
        tx.put(&[revision], &[revision; 150_000]).await?;
        tx.commit(advance(revision.into())).await?;
    }
    store.snapshot(&consumer).await?;
    let mut tx = rabbit(&node).await?.store().begin(&consumer).await?;
    for revision in 0..4u8 {
        let value = tx.get(&[revision]).await?;
        ensure!(
            value.is_some_and(|value| value[..] == [revision; 150_000]),
            "{revision}"
        );
    }
    Ok(())
}

/// The broker returns messages without a stream and confirms them, possibly together with messages
/// that it stored in the meantime.
pub(crate) async fn an_append_next_to_a_returned_one_reports_its_outcome() -> Outcome {
    let node = crate::common::shared_node()?;
    let connection = Connection::connect(&url(node.port()), ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let mut returned = 0;
    for round in 0..20 {
        let name = fresh("late");
        let log = options().connect(&url(node.port())).await?.log(&name).await?;
        // As on a broker that has just started, the stream does not exist at the first append.
        channel
            .queue_delete(name.as_str().into(), QueueDeleteOptions::default())
            .await?;
        let appending: JoinSet<_> = (0..200)
            .map(|number| {
                let log = log.clone();
                async move { (number, log.append(&[NewRecord::new(format!("{number}"))]).await) }
            })
            .collect();
        let log = options().connect(&url(node.port())).await?.log(&name).await?;
        let results = appending.join_all().await;
        let stored: Vec<_> = read_log(&log).await?.into_iter().map(|record| record.payload).collect();
        for (number, result) in results {
            let is_stored = stored.iter().any(|payload| *payload == number.to_string().as_bytes());
            returned += u32::from(!is_stored);
            let is_true = match &result {
                Ok(_) => is_stored,
                Err(Error::Indeterminate { .. }) => true,
                Err(_) => !is_stored,
            };
            ensure!(
                is_true,
                "round {round}, record {number}: stored: {is_stored}, {result:?}"
            );
        }
    }
    ensure!(returned > 0, "the broker returned nothing");
    Ok(())
}

/// Puts more than a commit can hold in one batch of the log.
struct Large;

#[async_trait]
impl Handler<RabbitTx> for Large {
    async fn handle(&mut self, record: &Record, tx: &mut RabbitTx) -> Result<(), HandlerError> {
        tx.put(&record.payload, &[b'x'; 80_000]).await?;
        Ok(())
    }
}

pub(crate) async fn a_batch_too_large_for_one_commit_is_committed_in_parts() -> Outcome {
    const RECORDS: u64 = 10;
    let (node, consumer) = (node()?, ConsumerId::new("shipping")?);
    let rabbit = rabbit(&node).await?;
    let (log, store) = (rabbit.log("orders").await?, rabbit.store());
    // The first time, only the broker knows that it is too much. Later it is known before the
    // commit.
    for round in 0..2 {
        let records: Vec<_> = (0..RECORDS)
            .map(|number| NewRecord::new(format!("{round} {number}")))
            .collect();
        log.append(&records).await?;
        let running = Consumer::essentially_once(consumer.clone(), log.clone(), store.clone(), Large)
            .max_batch(RECORDS as usize)
            .min_backoff(Duration::from_millis(5))
            .max_backoff(Duration::from_millis(20))
            .run_until_caught_up();
        let report = timeout(crate::common::LIMIT, running).await??;
        ensure!(report.handled == RECORDS && report.failed == 0, "{report}");
    }
    let mut tx = rabbit.store().begin(&consumer).await?;
    for key in (0..2).flat_map(|round| (0..RECORDS).map(move |number| format!("{round} {number}"))) {
        let value = tx.get(key.as_bytes()).await?;
        ensure!(value.is_some_and(|value| value.len() == 80_000), "{key} is not there");
    }
    Ok(())
}

/// Cannot handle the first record.
struct RejectFirst;

#[async_trait]
impl Handler<RabbitTx> for RejectFirst {
    async fn handle(&mut self, record: &Record, _: &mut RabbitTx) -> Result<(), HandlerError> {
        match record.payload.len() {
            1 => Err(HandlerError::reject("the first record")),
            _ => Ok(()),
        }
    }
}

pub(crate) async fn letters_too_large_for_one_commit_are_parked_in_parts() -> Outcome {
    const RECORDS: usize = 10;
    let (node, consumer) = (node()?, ConsumerId::new("shipping")?);
    let rabbit = rabbit(&node).await?;
    let (log, store) = (rabbit.log("orders").await?, rabbit.store());
    log.append(&[NewRecord::new("x").key("a")]).await?;
    // The first time, only the broker knows that it is too much. Later it is known before the
    // commit.
    for round in 1..3 {
        let records = vec![NewRecord::new(vec![b'x'; 80_000]).key("a"); RECORDS];
        for record in &records {
            log.append(std::slice::from_ref(record)).await?;
        }
        let running = Consumer::essentially_once(consumer.clone(), log.clone(), store.clone(), RejectFirst)
            .dead_letters(DeadLetterOptions::new())
            .max_batch(RECORDS)
            .min_backoff(Duration::from_millis(5))
            .max_backoff(Duration::from_millis(20))
            .run_until_caught_up();
        let report = timeout(crate::common::LIMIT, running).await??;
        ensure!(report.handled == 0, "{report}");
        let letters = dead_letters::list(&consumer, &rabbit.store(), None, 100).await?;
        ensure!(letters.len() == 1 + round * RECORDS, "{} letters", letters.len());
    }
    Ok(())
}

pub(crate) async fn a_limit_that_was_raised_is_learned_again() -> Outcome {
    let node = node()?;
    let log = rabbit(&node).await?.log("orders").await?;
    let refused = log.append(&[large()]).await;
    ensure!(is_too_large(&refused), "{refused:?}");
    let file = node.folder().join("rabbitmq.conf");
    let settings = fs::read_to_string(&file)?.replace(&LIMIT.to_string(), "400000");
    fs::write(&file, settings)?;
    block_in_place(|| node.restart())?;
    let (small, large) = ([NewRecord::new("small")], [large()]);
    insist(|| log.append(&small)).await?;
    insist(|| log.append(&large)).await?;
    Ok(())
}
