//! What brokers and users get wrong.

use std::time::Duration;

use essentially_once::{
    Consumer, ConsumerId, Error, Log as _, NewRecord, Offset, Record,
    backend::Durability,
    handler_fn,
    memory::{Memory, MemoryTx},
};
use essentially_once_kafka::{Kafka, KafkaOptions, LogOptions};

use crate::support::{Outcome, PATIENCE, Stage, assert_error, ensure, payloads, records, soon};

pub(crate) async fn a_broker_that_does_not_answer_is_named_without_the_password() -> Outcome {
    let options = || KafkaOptions::new().timeout(Duration::from_secs(1));
    assert_error!(
        options().connect("kafka://shop:hunter2@127.0.0.1:1").await,
        Error::Unavailable { .. },
        "connect on Kafka 127.0.0.1:1"
    );
    for url in ["kafka://shop:hunter2@127.0.0.1:1", "kafka://shop:hunter2@", "hunter2"] {
        let Err(error) = options().connect(url).await else {
            return Err("no error".into());
        };
        let text = format!("{error} {error:?}");
        ensure!(!text.contains("hunter2"), "{text}");
    }
    let wrong = KafkaOptions::new()
        .setting("nonsense", "hunter2")
        .connect("kafka://127.0.0.1:1")
        .await;
    let Err(error) = wrong else {
        return Err("no error".into());
    };
    let text = format!("{error} {error:?}");
    ensure!(text.contains("`nonsense`") && !text.contains("hunter2"), "{text}");
    Ok(())
}

pub(crate) async fn a_missing_topic_or_partition_is_refused() -> Outcome {
    let stage = Stage::start().await?;
    let open = async |name: &str, options| stage.kafka.log_with(name, options).await;
    assert_error!(
        open("none", LogOptions::new().existing()).await,
        Error::Failed { .. },
        "there is no topic none"
    );
    assert_error!(
        open("none", LogOptions::new().partition(1)).await,
        Error::Failed { .. },
        "there is no topic none"
    );
    stage.kafka.log("orders").await?;
    assert_error!(
        open("orders", LogOptions::new().partition(9)).await,
        Error::Failed { .. },
        "only 1 partitions"
    );
    assert_error!(
        open("a:b", LogOptions::new()).await,
        Error::InvalidName { .. },
        "LogOptions::topic"
    );
    Ok(())
}

pub(crate) async fn a_record_over_the_limit_of_the_broker_is_refused() -> Outcome {
    let stage = Stage::start().await?;
    let options = KafkaOptions::new().record_limit(8_000_000);
    let log = options.connect(&stage.server.url()).await?.log("orders").await?;
    assert_error!(
        log.append(&[NewRecord::new(vec![0; 7_000_000])]).await,
        Error::Failed { .. },
        "max.message.bytes"
    );
    log.append(&[NewRecord::new("a")]).await?;
    ensure!(
        payloads(&records(&log, Offset::ZERO).await?) == ["a"],
        "it was appended"
    );
    Ok(())
}

pub(crate) async fn a_frozen_broker_leaves_an_append_in_doubt() -> Outcome {
    let stage = Stage::start().await?;
    let kafka = KafkaOptions::new()
        .timeout(PATIENCE)
        .connect(&stage.server.url())
        .await?;
    let log = kafka.log("orders").await?;
    log.append(&[NewRecord::new("a")]).await?;
    tokio::task::block_in_place(|| stage.server.freeze());
    assert_error!(
        soon(log.append(&[NewRecord::new("b")])).await?,
        Error::Indeterminate { .. },
        "append to partition 0 of topic orders"
    );
    assert_error!(
        soon(log.bounds()).await?,
        Error::Unavailable { .. },
        "read bounds of log orders"
    );
    stage.server.thaw();
    // The next producer appends after whatever became of it.
    test_servers::insist(|| log.append(&[])).await?;
    while let Err(error) = log.append(&[NewRecord::new("c")]).await {
        ensure!(error.is_transient(), "{error}");
    }
    let found = payloads(&records(&log, Offset::ZERO).await?);
    let is_sound = found.first().is_some_and(|first| first == "a") && found.last().is_some_and(|last| last == "c");
    ensure!(
        is_sound && found.iter().filter(|payload| *payload == "b").count() <= 1,
        "{found:?}"
    );
    Ok(())
}

pub(crate) async fn a_broker_that_is_gone_ends_a_reader() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    log.append(&[NewRecord::new("a")]).await?;
    let mut reader = log.read(Offset::ZERO).await?;
    reader.next(1).await?;
    tokio::task::block_in_place(|| stage.server.stop())?;
    assert_error!(
        soon(reader.next(1)).await?,
        Error::Unavailable { .. },
        "read from log orders"
    );
    tokio::task::block_in_place(|| stage.server.restart())?;
    let kafka = Kafka::connect(&stage.server.url()).await?;
    let found = payloads(&records(&kafka.log("orders").await?, Offset::ZERO).await?);
    ensure!(found == ["a"], "{found:?}");
    Ok(())
}

/// The client reports it once, directly after the records that it had read ahead.
pub(crate) async fn an_error_behind_records_is_not_lost() -> Outcome {
    let stage = Stage::start().await?;
    let options = KafkaOptions::new().timeout(PATIENCE);
    let log = options.connect(&stage.server.url()).await?.log("orders").await?;
    log.append(&["a", "b", "c"].map(NewRecord::new)).await?;
    let mut reader = log.read(Offset::ZERO).await?;
    ensure!(reader.next(1).await?.len() == 1, "more than asked for");
    tokio::task::block_in_place(|| stage.server.stop())?;
    // It takes the timeout to notice, and the reader's client notices meanwhile.
    while log.bounds().await.is_ok() {}
    ensure!(
        payloads(&soon(reader.next(100)).await??) == ["b", "c"],
        "not read ahead"
    );
    assert_error!(
        soon(reader.next(100)).await?,
        Error::Unavailable { .. },
        "read from log orders"
    );
    Ok(())
}

pub(crate) async fn a_topic_that_may_lose_records_is_refused() -> Outcome {
    let stage = Stage::start().await?;
    let synced = ("flush.messages", "1");
    for (topic, settings, advice) in [
        ("single", &[][..], Some("flush.messages=1")),
        (
            "compacted",
            &[synced, ("cleanup.policy", "compact")],
            Some("cleanup.policy=delete"),
        ),
        ("synced", &[synced], None),
    ] {
        let options = settings.iter().fold(LogOptions::new(), |options, (name, value)| {
            options.topic_setting(*name, *value)
        });
        let log = stage.kafka.log_with(topic, options).await?;
        let (id, store) = (ConsumerId::new("shipping")?, Memory::new().store());
        let nothing = handler_fn(|_: &Record, _: &mut MemoryTx| Box::pin(async { Ok(()) }));
        let consumer = Consumer::essentially_once(id, log.clone(), store, nothing);
        let run = soon(consumer.run_until_caught_up()).await?.map(drop);
        match (log.durability().await?, advice, run) {
            (Durability::Volatile(why), Some(advice), Err(error)) => {
                let named = why.contains(advice) && error.to_string().contains(advice);
                ensure!(named, "{topic}: {why}; {error}");
            }
            // The store is in memory.
            (Durability::Durable, None, Err(error)) => ensure!(!error.to_string().contains(topic), "{error}"),
            other => return Err(format!("{topic}: {other:?}").into()),
        }
    }
    Ok(())
}
