//! Streams that differ from what a consumer has seen.

use std::ops::Range;

use essentially_once::{
    Consumer, ConsumerId, Epoch, Error, Log, NewRecord, Offset, OffsetStore as _, Origin, ProducerId, StartAt,
    backend::{Retention, Source},
    consumer::Operator,
    seek,
};
use essentially_once_rabbitmq::LogOptions;
use essentially_once_testkit::{Ledger, read_ledger, read_log};
use lapin::{Connection, ConnectionProperties, options::QueueDeleteOptions};
use test_servers::Proxy;

use crate::common::{Outcome, Running, ensure, fresh, insist, options, send, shared_node, url};

/// The broker routes messages by the name alone, so an old handle appends to any stream that now
/// has it.
pub(crate) async fn an_append_to_a_deleted_stream_fails_until_there_is_another() -> Outcome {
    let (node, name) = (shared_node()?, fresh("again"));
    let rabbit = options().connect(&url(node.port())).await?;
    let log = rabbit.log(&name).await?;
    send(&log, 0..3).await?;
    delete(&url(node.port()), &name).await?;
    let void = log.append(&[NewRecord::new("lost")]).await;
    ensure!(matches!(void, Err(Error::Unavailable { .. })), "{void:?}");
    let missing = rabbit.log_with(&name, LogOptions::new().existing()).await;
    let words = missing.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(words.contains("does not exist"), "{words}");
    insist(|| rabbit.log(&name)).await?;
    let records = [NewRecord::new("found")];
    insist(|| log.append(&records)).await?;
    let stored = read_log(&log).await?;
    ensure!(stored.len() == 1 && stored[0].payload == "found", "{stored:?}");
    Ok(())
}

/// Detected because the stream is shorter. RabbitMQ gives a stream no identity but its name.
pub(crate) async fn a_stream_deleted_and_recreated_is_noticed() -> Outcome {
    let (node, name) = (shared_node()?, fresh("anew"));
    let consumer = ConsumerId::new(&name)?;
    let proxy = Proxy::start(node.port())?;
    let through = options().connect(&url(proxy.port())).await?;
    let rabbit = options().connect(&url(node.port())).await?;
    let log = rabbit.log(&name).await?;
    send(&log, 0..20).await?;
    let reading = insist(|| through.log(&name)).await?;
    let mut running = Running::start(&consumer, reading, through.store());
    let stored = || async { rabbit.store().position(&consumer).await };
    while insist(stored).await?.is_none_or(|position| position.next != behind(19)) {}
    // It must not look while no stream exists.
    proxy.refuse(true);
    proxy.cut();
    running.resets(1).await?;
    delete(&url(node.port()), &name).await?;
    let log = insist(|| rabbit.log(&name)).await?;
    send(&log, 20..25).await?;
    proxy.refuse(false);
    is_past_the_end(running.fails().await?)?;
    // A new run does not skip it either.
    let again = Running::start(&consumer, log.clone(), rabbit.store());
    is_past_the_end(again.fails().await?)?;
    let applied = read_ledger(&rabbit.store(), &consumer).await?;
    ensure!(applied.len() == 20, "{} records were applied", applied.len());
    seek(
        &consumer,
        &log,
        &rabbit.store(),
        StartAt::Earliest,
        &Operator::new("test"),
    )
    .await?;
    let rest = Consumer::essentially_once(consumer.clone(), log, rabbit.store(), Ledger);
    let report = rest.run_until_caught_up().await?;
    ensure!(report.handled == 5, "{report}");
    Ok(())
}

fn is_past_the_end(error: Error) -> Outcome {
    match error {
        Error::OutOfRange { requested, end, .. } if (requested, end) == (behind(19), behind(4)) => Ok(()),
        error => Err(format!("another error: {error}").into()),
    }
}

async fn delete(url: &str, stream: &str) -> Result<(), Source> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel
        .queue_delete(stream.into(), QueueDeleteOptions::default())
        .await?;
    Ok(())
}

pub(crate) async fn a_reader_of_a_deleted_stream_gets_an_error() -> Outcome {
    let (node, name) = (shared_node()?, fresh("deleted"));
    let rabbit = options().connect(&url(node.port())).await?;
    let log = rabbit.log(&name).await?;
    send(&log, 0..3).await?;
    let mut reader = log.read(Offset::ZERO).await?;
    reader.next(3).await?;
    delete(&url(node.port()), &name).await?;
    let error = loop {
        if let Err(error) = reader.next(1).await {
            break error;
        }
    };
    ensure!(matches!(error, Error::Unavailable { .. }), "{error}");
    // Appends fail instead of getting lost, and a new reader learns what is wrong.
    let error = log
        .append(&[NewRecord::new("lost")])
        .await
        .err()
        .ok_or("it was confirmed")?;
    ensure!(error.is_transient(), "{error}");
    let error = log.read(Offset::ZERO).await.err().ok_or("it was read")?;
    ensure!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("does not exist"),
        "{error}"
    );
    let log = insist(|| rabbit.log(&name)).await?;
    send(&log, 0..3).await?;
    Ok(())
}

pub(crate) async fn retention_overtaking_a_slow_consumer_is_reported() -> Outcome {
    let (node, name) = (shared_node()?, fresh("overtaken"));
    let consumer = ConsumerId::new(&name)?;
    let rabbit = options().connect(&url(node.port())).await?;
    let small = LogOptions::new()
        .segment_bytes(65_536)
        .retention(Retention::new().max_bytes(200_000));
    let log = rabbit.log_with(&name, small).await?;
    append(&log, 0..5).await?;
    let mut running = Running::start(&consumer, log.clone(), rabbit.store());
    running.handles(5).await?;
    running.stop().await?;
    let mut sent = 5;
    // The broker checks the length only when a segment is full.
    let earliest = loop {
        append(&log, sent..sent + 100).await?;
        sent += 100;
        let bounds = insist(|| log.bounds()).await?;
        if bounds.earliest > behind(4) {
            break bounds.earliest;
        }
    };
    let again = Running::start(&consumer, log.clone(), rabbit.store());
    match again.fails().await? {
        Error::Truncated {
            requested,
            earliest: reported,
            ..
        } => ensure!(
            requested == behind(4) && reported == earliest,
            "reported {requested} and {reported}, but the earliest is {earliest}"
        ),
        error => return Err(format!("another error: {error}").into()),
    }
    let position = rabbit.store().position(&consumer).await?;
    ensure!(position.is_some_and(|position| position.next == behind(4)), "it moved");
    // An explicit seek continues with the remaining records.
    seek(
        &consumer,
        &log,
        &rabbit.store(),
        StartAt::Earliest,
        &Operator::new("test"),
    )
    .await?;
    let rest = Consumer::essentially_once(consumer.clone(), log.clone(), rabbit.store(), Ledger);
    rest.run_until_caught_up().await?;
    let applied = read_ledger(&rabbit.store(), &consumer).await?;
    let applied: Vec<Offset> = applied.into_iter().map(|applied| applied.offset).collect();
    let left: Vec<Offset> = read_log(&log).await?.into_iter().map(|record| record.offset).collect();
    ensure!(
        applied[..5] == (0..5).map(|message| Offset::new(message, 0)).collect::<Vec<_>>() && applied[5..] == left,
        "applied {applied:?}, and {left:?} is left"
    );
    Ok(())
}

fn behind(message: u64) -> Offset {
    Offset::new(message, 0).successor()
}

/// Records of a kilobyte.
async fn append(log: &dyn Log, numbers: Range<u64>) -> Result<(), Error> {
    let producer = ProducerId::new("web")?;
    let record =
        |number| NewRecord::new(vec![b'x'; 1_000]).origin(Origin::new(producer.clone(), Epoch::STABLE, number));
    let records: Vec<NewRecord> = numbers.map(record).collect();
    log.append(&records).await?;
    Ok(())
}
