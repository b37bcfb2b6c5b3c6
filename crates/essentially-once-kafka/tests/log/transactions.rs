//! Transactions, and the offsets that have no record.

use std::time::Duration;

use essentially_once::{
    Consumer, ConsumerId, Error, KeyValue as _, Log as _, NewRecord, Offset, Record, handler_fn,
    memory::{Memory, MemoryTx},
};
use essentially_once_kafka::{Appends, KafkaOptions, LogOptions, rdkafka::producer::Producer as _};

use crate::support::{LIMIT, Outcome, PATIENCE, Stage, ensure, payloads, records, send, soon};

pub(crate) async fn what_was_aborted_is_not_read_and_not_waited_for() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    let producer = stage.transactional("somebody")?;
    for (batch, is_committed) in [
        (["a", "b"], true),
        (["c", "d"], false),
        (["e", "f"], true),
        (["g", "h"], false),
    ] {
        producer.begin_transaction()?;
        send(&producer, "orders", &batch)?;
        tokio::task::block_in_place(|| match is_committed {
            true => producer.commit_transaction(LIMIT),
            false => producer.abort_transaction(LIMIT),
        })?;
    }
    let found = records(&log, Offset::ZERO).await?;
    ensure!(payloads(&found) == ["a", "b", "e", "f"], "{found:?}");
    // The end is directly after the last record, and three more offsets follow it.
    let bounds = log.bounds().await?;
    ensure!(bounds.end == found[3].offset.successor(), "{bounds:?}");
    // A consumer has caught up there, and begins there the next time.
    let (store, id) = (Memory::new().store(), ConsumerId::new("shipping")?);
    for (expected, appended) in [(4, "i"), (1, "j"), (1, "k")] {
        let ship = handler_fn(|order: &Record, tx: &mut MemoryTx| {
            Box::pin(async move { Ok(tx.put(&order.payload, b"").await?) })
        });
        let consumer = Consumer::essentially_once(id.clone(), log.clone(), store.clone(), ship).accept_volatile();
        let report = soon(consumer.run_until_caught_up()).await??;
        ensure!(report.handled == expected, "{report}");
        log.append(&[NewRecord::new(appended)]).await?;
    }
    Ok(())
}

pub(crate) async fn an_open_transaction_holds_readers_back() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    log.append(&[NewRecord::new("a")]).await?;
    let producer = stage.transactional("somebody")?;
    producer.begin_transaction()?;
    send(&producer, "orders", &["b"])?;
    log.append(&[NewRecord::new("c")]).await?;
    let found = payloads(&records(&log, Offset::ZERO).await?);
    ensure!(found == ["a"], "{found:?}");
    tokio::task::block_in_place(|| producer.commit_transaction(LIMIT))?;
    let found = payloads(&records(&log, Offset::ZERO).await?);
    ensure!(found == ["a", "b", "c"], "{found:?}");
    Ok(())
}

pub(crate) async fn a_log_of_nothing_but_aborted_records_is_empty() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    let producer = stage.transactional("somebody")?;
    for _ in 0..30 {
        producer.begin_transaction()?;
        send(&producer, "orders", &["a"])?;
        tokio::task::block_in_place(|| producer.abort_transaction(LIMIT))?;
    }
    let bounds = log.bounds().await?;
    ensure!(
        bounds.earliest == Offset::ZERO && bounds.end == Offset::ZERO,
        "{bounds:?}"
    );
    log.append(&[NewRecord::new("b")]).await?;
    let found = records(&log, Offset::ZERO).await?;
    ensure!(payloads(&found) == ["b"] && found[0].offset == 60.into(), "{found:?}");
    Ok(())
}

pub(crate) async fn a_transactional_append_is_all_or_nothing() -> Outcome {
    let stage = Stage::start().await?;
    let options = KafkaOptions::new().timeout(PATIENCE);
    let kafka = options.connect(&stage.server.url()).await?;
    let options = LogOptions::new().appends(Appends::Transactional);
    let options = options.topic_setting("max.message.bytes", "100000");
    let log = kafka.log_with("orders", options).await?;
    let all: Vec<NewRecord> = (0..2_000).map(|n| NewRecord::new(n.to_string())).collect();
    log.append(&all).await?;
    // The broker refuses the last record.
    let too_large = NewRecord::new("x".repeat(200_000));
    match log.append(&[&all[..], &[too_large]].concat()).await {
        Err(error @ Error::Failed { .. }) => ensure!(error.to_string().contains("max.message.bytes"), "{error}"),
        other => return Err(format!("{other:?}").into()),
    }
    // The broker falls silent before the append, until the client gives up. Later would be of no
    // use: this broker stores records that arrive when their transaction has ended.
    tokio::task::block_in_place(|| stage.server.freeze());
    let appended = soon(log.append(&all)).await?;
    stage.server.thaw();
    let is_undone =
        matches!(&appended, Err(error) if error.is_transient() && !matches!(error, Error::Indeterminate { .. }));
    ensure!(is_undone, "{appended:?}");
    while let Err(error) = soon(log.append(&[NewRecord::new("z")])).await? {
        ensure!(error.is_transient(), "{error}");
    }
    let found = payloads(&records(&log, Offset::ZERO).await?);
    let later = found.iter().skip(2_000);
    ensure!(
        found.len() > 2_000 && later.clone().all(|payload| payload == "z"),
        "{} records",
        found.len()
    );
    Ok(())
}

pub(crate) async fn a_dropped_append_leaves_no_open_transaction() -> Outcome {
    let stage = Stage::start().await?;
    let options = LogOptions::new().appends(Appends::Transactional);
    let log = stage.kafka.log_with("orders", options).await?;
    log.append(&[NewRecord::new("a")]).await?;
    let all: Vec<NewRecord> = (0..1_000).map(|n| NewRecord::new(n.to_string())).collect();
    for millis in 0..10 {
        let _ = tokio::time::timeout(Duration::from_millis(millis), log.append(&all)).await;
    }
    log.append(&[NewRecord::new("z")]).await?;
    // An open transaction would hold the last record back.
    let found = payloads(&records(&log, Offset::ZERO).await?);
    ensure!(found.last().is_some_and(|last| last == "z"), "{} records", found.len());
    ensure!((found.len() - 2).is_multiple_of(1_000), "{} records", found.len());
    Ok(())
}
