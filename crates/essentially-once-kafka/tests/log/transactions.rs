//! Transactions, and the offsets that have no record.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use essentially_once::{
    Consumer, ConsumerId, Error, KeyValue as _, Log as _, NewRecord, Offset, Record,
    backend::Source,
    handler_fn,
    memory::{Memory, MemoryTx},
};
use essentially_once_kafka::{
    Appends, KafkaOptions, LogOptions,
    rdkafka::{
        consumer::{BaseConsumer, Consumer as _},
        producer::Producer as _,
    },
};
use test_servers::Cut;
use tokio::runtime;

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

pub(crate) async fn a_commit_whose_connection_is_cut_appends_once_or_fails() -> Outcome {
    let stage = Stage::start().await?;
    let options = LogOptions::new().appends(Appends::Transactional);
    let log = stage.kafka.log_with("orders", options).await?;
    log.append(&[NewRecord::new("a")]).await?;
    let mut expected = vec!["a".to_owned()];
    for (round, cut) in [Cut::BeforeReply, Cut::BeforeRequest, Cut::BeforeReply]
        .into_iter()
        .enumerate()
    {
        // The request that ends a transaction, and its version.
        stage.server.proxy().cut_at(b"\0\x1A\0\x01", cut);
        let batch = [0, 1, 2].map(|n| format!("{round}.{n}"));
        let appended = soon(log.append(&batch.clone().map(NewRecord::new))).await?;
        ensure!(stage.server.proxy().fired() == round + 1, "the commit was not cut");
        match appended {
            Ok(_) => expected.extend(batch),
            Err(Error::Indeterminate { .. }) => {
                let found = payloads(&records(&log, Offset::ZERO).await?);
                expected.extend(batch.into_iter().filter(|payload| found.contains(payload)));
            }
            Err(error) => return Err(error.into()),
        }
    }
    let found = payloads(&records(&log, Offset::ZERO).await?);
    ensure!(found == expected && (found.len() - 1).is_multiple_of(3), "{found:?}");
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

pub(crate) async fn a_dropped_pipelined_append_leaves_a_prefix_before_what_follows() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    let mut expected_ends = Vec::new();
    for round in 0..20_u64 {
        let all: Vec<NewRecord> = (0..1_000).map(|n| NewRecord::new(format!("{round}.{n}"))).collect();
        let _ = tokio::time::timeout(Duration::from_micros(round * 250), log.append(&all)).await;
        log.append(&[NewRecord::new(format!("{round}"))]).await?;
        expected_ends.push(format!("{round}"));
    }
    let found = payloads(&records(&log, Offset::ZERO).await?);
    let (mut ends, mut next) = (Vec::new(), 0);
    for payload in found {
        match payload.split_once('.') {
            Some((round, n)) => {
                ensure!(round == ends.len().to_string() && n == next.to_string(), "{payload}");
                next += 1;
            }
            None => {
                ends.push(payload);
                next = 0;
            }
        }
    }
    ensure!(ends == expected_ends, "{ends:?}");
    Ok(())
}

/// A runtime that ends in the middle of an append leaves its transaction open.
pub(crate) async fn the_next_append_ends_a_transaction_that_was_left_open() -> Outcome {
    const TRIES: usize = 10;
    let stage = Stage::start().await?;
    let options = LogOptions::new().appends(Appends::Transactional);
    let log = stage.kafka.log_with("orders", options).await?;
    let all = vec![NewRecord::new("b"); 100_000];
    for _ in 0..TRIES {
        log.append(&[NewRecord::new("a")]).await?;
        let before = written(&stage).await?;
        let other = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let (appending, batch) = (log.clone(), all.clone());
        drop(other.spawn(async move { appending.append(&batch).await }));
        while written(&stage).await? == before {}
        other.shutdown_background();
        // The broker would take records that it works on for the next transaction.
        let last = AtomicI64::new(written(&stage).await?);
        test_servers::eventually(async || {
            let now = written(&stage).await?;
            Ok(match last.swap(now, Ordering::Relaxed) == now {
                true => Ok(()),
                false => Err(format!("{now} offsets are used")),
            })
        })
        .await?;
        log.append(&[NewRecord::new("z")]).await?;
        let found = payloads(&records(&log, Offset::ZERO).await?);
        ensure!(found.last().is_some_and(|last| last == "z"), "{} records", found.len());
        match found.iter().filter(|payload| *payload == "b").count() {
            0 => return Ok(()),
            // Its commit was faster.
            count => ensure!(count.is_multiple_of(all.len()), "{count} of {} records", all.len()),
        }
    }
    Err("each append had ended before its runtime".into())
}

/// How many offsets are used, also by transactions that are open.
async fn written(stage: &Stage) -> Result<i64, Source> {
    let mut config = stage.config();
    config.set("isolation.level", "read_uncommitted");
    let client: BaseConsumer = config.create()?;
    let (_, end) = tokio::task::block_in_place(|| client.fetch_watermarks("orders", 0, LIMIT))?;
    Ok(end)
}
