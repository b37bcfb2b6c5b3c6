//! What a handler's transaction sends.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use essentially_once::{
    Consumer, ConsumerId, Error, HandlerError, KeyValue as _, Log as _, NewRecord, OffsetStore as _, Outbox as _,
    Record, backend::Transaction as _, handler_fn,
};
use essentially_once_postgres::{LogOptions, PgTx};
use tokio::task::JoinSet;

use crate::{
    common::{Outcome, Stage, advance, assert_error, ensure, payloads, records},
    numbered, send_alone,
};

const DELETE: &str =
    "DELETE FROM essentially_once.records WHERE log = (SELECT id FROM essentially_once.logs WHERE name = 'out');
     DELETE FROM essentially_once.logs WHERE name = 'out'";

pub(crate) async fn a_transaction_sends_with_its_commit_or_not_at_all() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    tx.put(b"k", b"v").await?;
    tx.send("out", NewRecord::new("undone")).await?;
    tx.rollback().await?;
    let mut tx = stage.begin().await?;
    tx.send("out", NewRecord::new("fenced")).await?;
    stage.begin().await?.commit(advance(0, 1)).await?;
    let fenced = tx.commit(advance(0, 1)).await;
    ensure!(matches!(fenced, Err(Error::Fenced { .. })), "{fenced:?}");
    // It was created at once, and stays empty.
    let out = stage.pg.log_with("out", LogOptions::new().existing()).await?;
    ensure!(out.bounds().await?.end == 0.into(), "a record was sent");
    let mut tx = stage.begin().await?;
    for payload in ["a", "b"] {
        tx.send("out", NewRecord::new(payload)).await?;
        tx.send("other", NewRecord::new(payload)).await?;
    }
    ensure!(out.bounds().await?.end == 0.into(), "sent before the commit");
    tx.commit(advance(1, 2)).await?;
    let (sent, producer) = numbered(&out).await?;
    let (other, another) = numbered(&stage.pg.log("other").await?).await?;
    ensure!(sent == ["a", "b"] && other == sent, "{sent:?}, {other:?}");
    ensure!(producer != another, "one producer for two logs");
    Ok(())
}

pub(crate) async fn a_slow_handler_that_has_sent_delays_no_append() -> Outcome {
    let stage = Stage::start().await?;
    let out = stage.other().await?.log("out").await?;
    let mut slow = stage.begin().await?;
    slow.send("out", NewRecord::new("slow")).await?;
    // It has read, so it is open on the server.
    slow.get(b"k").await?;
    slow.execute("CREATE TABLE orders (n int)", &[]).await?;
    let quick = ConsumerId::new("quick")?;
    let begun = Instant::now();
    for n in 0..20 {
        out.append(&[NewRecord::new("appended")]).await?;
        let mut tx = stage.store.begin(&quick).await?;
        tx.send("out", NewRecord::new("quick")).await?;
        tx.commit(advance(n, 1)).await?;
    }
    let took = begun.elapsed();
    // One that waited would fail after 5 seconds.
    ensure!(took < Duration::from_secs(5), "they took {took:?}");
    slow.commit(advance(0, 1)).await?;
    let found = payloads(&records(&out).await?);
    ensure!(found.len() == 41 && found[40] == "slow", "{found:?}");
    Ok(())
}

pub(crate) async fn transactions_that_send_to_the_same_logs_in_any_order_do_not_deadlock() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    let mut running = JoinSet::new();
    for (name, logs) in [("a", ["x", "y", "z"]), ("b", ["z", "y", "x"]), ("c", ["y", "z", "x"])] {
        let (stage, id) = (Arc::clone(&stage), ConsumerId::new(name)?);
        running.spawn(async move {
            for n in 0..40 {
                let mut tx = stage.store.begin(&id).await?;
                for log in logs {
                    tx.send(log, NewRecord::new(name)).await?;
                }
                tx.commit(advance(n, 1)).await?;
            }
            Ok::<_, Error>(())
        });
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    for log in ["x", "y", "z"] {
        let (sent, _) = numbered(&stage.pg.log(log).await?).await?;
        ensure!(sent.len() == 120, "{} records in {log}", sent.len());
    }
    Ok(())
}

pub(crate) async fn an_outbox_that_was_recreated_heals_with_the_next_attempt() -> Outcome {
    let stage = Stage::start().await?;
    send_alone(&stage, "out", "old", 0).await?;
    let (_, before) = numbered(&stage.pg.log("out").await?).await?;
    for (commits, is_recreated) in [(1, false), (2, true)] {
        stage.sql(DELETE)?;
        if is_recreated {
            stage.other().await?.log("out").await?;
        }
        let mut tx = stage.begin().await?;
        tx.put(b"k", b"v").await?;
        tx.send("out", NewRecord::new("lost")).await?;
        assert_error!(
            tx.commit(advance(commits, 1)).await,
            Error::Unavailable { .. },
            "log out was deleted or recreated"
        );
        ensure!(stage.value("k").await?.is_none(), "applied");
        send_alone(&stage, "out", "new", commits).await?;
        let (sent, producer) = numbered(&stage.pg.log("out").await?).await?;
        ensure!(sent == ["new"] && producer != before, "{sent:?} of {producer}");
    }
    Ok(())
}

pub(crate) async fn an_outbox_that_is_deleted_under_a_consumer_costs_no_record() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    let orders = stage.pg.log("orders").await?;
    orders.append(&crate::common::numbered(0..4)).await?;
    let admin = Arc::clone(&stage);
    let mut is_deleted = false;
    let handler = handler_fn(move |record: &Record, tx: &mut PgTx| {
        let admin = Arc::clone(&admin);
        let deletes = record.offset == 2.into() && !std::mem::replace(&mut is_deleted, record.offset == 2.into());
        Box::pin(async move {
            tx.send("out", NewRecord::new(record.payload.clone())).await?;
            if deletes {
                admin.sql(DELETE).map_err(HandlerError::fatal)?;
            }
            Ok(())
        })
    });
    let consumer = Consumer::essentially_once(stage.consumer.clone(), orders, stage.store.clone(), handler);
    let report = consumer.retries(0).max_batch(1).run_until_caught_up().await?;
    ensure!(report.handled == 4 && report.restarts == 1, "{report}");
    let (sent, _) = numbered(&stage.pg.log("out").await?).await?;
    ensure!(sent == ["2", "3"], "{sent:?}");
    Ok(())
}

/// The advice for a database that was restored or copied: the numbers after the copy were used
/// before.
pub(crate) async fn without_its_sender_a_log_draws_another_one() -> Outcome {
    let stage = Stage::start().await?;
    send_alone(&stage, "out", "0", 0).await?;
    stage.sql("UPDATE essentially_once.logs SET sender = NULL")?;
    let mut tx = stage.begin().await?;
    tx.send("out", NewRecord::new("1")).await?;
    match tx.commit(advance(1, 1)).await {
        // This store still knows the log as one with a sender.
        Err(error) if error.is_transient() => send_alone(&stage, "out", "1", 1).await?,
        done => done?,
    }
    let found = records(&stage.pg.log("out").await?).await?;
    let origins: Vec<_> = found.iter().filter_map(|record| record.origin.as_ref()).collect();
    ensure!(origins.len() == 2 && origins[1].sequence == 1, "{origins:?}");
    ensure!(
        origins[0].numbering.producer() != origins[1].numbering.producer(),
        "the numbers of the old one go on"
    );
    Ok(())
}

pub(crate) async fn many_records_of_one_transaction_are_sent_in_order() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    // More than one statement takes.
    for n in 0..5 {
        tx.send("large", NewRecord::new(vec![n; 10 * 1024 * 1024])).await?;
    }
    for n in 0..10_000 {
        tx.send("out", NewRecord::new(n.to_string())).await?;
    }
    tx.commit(advance(0, 1)).await?;
    let large = records(&stage.pg.log("large").await?).await?;
    let first: Vec<u8> = large.iter().map(|record| record.payload[0]).collect();
    ensure!(first == [0, 1, 2, 3, 4], "{first:?}");
    let (sent, _) = numbered(&stage.pg.log("out").await?).await?;
    let expected: Vec<_> = (0..10_000).map(|n| n.to_string()).collect();
    ensure!(sent == expected, "the order differs");
    Ok(())
}
