//! Topics that other programs use too.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use essentially_once::{Epoch, Log as _, NewRecord, Offset, Origin, ProducerId};
use essentially_once_kafka::{
    LogOptions,
    rdkafka::{
        Message as _, TopicPartitionList,
        admin::{AdminOptions, NewTopic, TopicReplication},
        consumer::{BaseConsumer, Consumer as _},
        message::{Header, Headers as _, OwnedHeaders},
        producer::{BaseProducer, BaseRecord, Producer as _},
    },
};

use crate::support::{LIMIT, Outcome, Stage, ensure, payloads, records};

pub(crate) async fn records_of_other_programs_are_read_whole() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    let producer: BaseProducer = stage.config().create()?;
    let headers = OwnedHeaders::new()
        .insert(Header {
            key: "trace",
            value: Some("1"),
        })
        .insert(Header {
            key: "trace",
            value: Some("2"),
        })
        .insert(Header::<&str> {
            key: "none",
            value: None,
        });
    let record = BaseRecord::<str, str>::to("orders")
        .partition(0)
        .key("k")
        .payload("p")
        .timestamp(1_700_000_000_123)
        .headers(headers);
    producer.send(record).map_err(|(error, _)| error)?;
    // A tombstone.
    let tombstone = BaseRecord::<str, str>::to("orders").partition(0).key("k");
    producer.send(tombstone).map_err(|(error, _)| error)?;
    tokio::task::block_in_place(|| producer.flush(LIMIT))?;
    let found = records(&log, Offset::ZERO).await?;
    ensure!(found.len() == 2, "{found:?}");
    let (record, tombstone) = (&found[0], &found[1]);
    ensure!(
        record.key.as_deref() == Some(b"k") && record.payload == "p",
        "{record:?}"
    );
    let headers = [("trace", "1"), ("trace", "2"), ("none", "")].map(|(name, value)| (name.to_owned(), value.into()));
    ensure!(record.headers == headers, "{:?}", record.headers);
    let at = UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
    ensure!(record.appended_at == at, "{:?}", record.appended_at);
    ensure!(record.origin.is_none() && record.malformed.is_none(), "{record:?}");
    ensure!(
        tombstone.payload.is_empty() && tombstone.malformed.is_none(),
        "{tombstone:?}"
    );
    Ok(())
}

pub(crate) async fn other_programs_read_our_records() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    let origin = Origin::new(ProducerId::new("web")?, Epoch::STABLE, 7);
    let record = NewRecord::new("p").key("k").header("trace", "1").origin(origin);
    let before = SystemTime::now();
    log.append(&[record, NewRecord::new("q")]).await?;
    let consumer: BaseConsumer = stage.config().set("group.id", "somebody").create()?;
    let mut all = TopicPartitionList::new();
    all.add_partition_offset("orders", 0, essentially_once_kafka::rdkafka::Offset::Beginning)?;
    consumer.assign(&all)?;
    let next = || tokio::task::block_in_place(|| consumer.poll(LIMIT)).ok_or("no message");
    let first = next()??;
    ensure!(first.key() == Some(b"k") && first.payload() == Some(b"p"), "{first:?}");
    let headers: Vec<_> = first.headers().into_iter().flat_map(|headers| headers.iter()).collect();
    let headers: Vec<(&str, &[u8])> = headers
        .iter()
        .map(|header| (header.key, header.value.unwrap_or_default()))
        .collect();
    let expected: [(&str, &[u8]); 3] = [
        ("essentially-once-producer", b"web"),
        ("essentially-once-sequence", b"7"),
        ("trace", b"1"),
    ];
    ensure!(headers == expected, "{headers:?}");
    let millis = first.timestamp().to_millis().unwrap_or(0) as u128;
    let now = before.duration_since(UNIX_EPOCH)?.as_millis();
    ensure!(millis + 1_000 > now && millis < now + 60_000, "{millis} and {now}");
    let second = next()??;
    ensure!(second.key().is_none() && second.payload() == Some(b"q"), "{second:?}");
    Ok(())
}

pub(crate) async fn headers_of_any_name_are_kept() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    let mut record = NewRecord::new("p");
    for name in ["", "a\0b", "essentially-once-producer", "essentially-once-x", "ü", "a"] {
        record = record.header(name, "1:a\0");
    }
    log.append(&[record.clone()]).await?;
    let found = records(&log, Offset::ZERO).await?;
    ensure!(found[0].headers == record.headers, "{:?}", found[0].headers);
    ensure!(
        found[0].origin.is_none() && found[0].malformed.is_none(),
        "{:?}",
        found[0]
    );
    Ok(())
}

pub(crate) async fn partitions_are_logs_of_their_own() -> Outcome {
    let stage = Stage::start().await?;
    let topic = NewTopic::new("orders", 3, TopicReplication::Fixed(1));
    for created in stage.admin()?.create_topics([&topic], &AdminOptions::new()).await? {
        created.map_err(|(_, code)| code)?;
    }
    let partition = async |number| {
        let options = LogOptions::new().partition(number).existing();
        stage.kafka.log_with("orders", options).await
    };
    for number in 0..3 {
        let log = partition(number).await?;
        log.append(&[NewRecord::new(number.to_string())]).await?;
    }
    for (number, name) in [(0, "orders"), (1, "orders/1"), (2, "orders/2")] {
        let log = partition(number).await?;
        ensure!(log.id().name() == name, "{}", log.id());
        let found = payloads(&records(&log, Offset::ZERO).await?);
        ensure!(found == [number.to_string()], "{found:?}");
    }
    Ok(())
}

pub(crate) async fn a_topic_has_another_name_than_its_log() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage
        .kafka
        .log_with("orders:new", LogOptions::new().topic("orders"))
        .await?;
    log.append(&[NewRecord::new("a")]).await?;
    ensure!(log.id().name() == "orders:new", "{}", log.id());
    let same = stage.kafka.log("orders").await?;
    ensure!(payloads(&records(&same, Offset::ZERO).await?) == ["a"], "another topic");
    Ok(())
}

pub(crate) async fn no_group_is_joined_and_no_offset_committed() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    log.append(&["a", "b"].map(NewRecord::new)).await?;
    let mut reader = log.read(Offset::ZERO).await?;
    reader.next(1).await?;
    let consumer: BaseConsumer = stage.config().set("group.id", "essentially-once").create()?;
    let groups = tokio::task::block_in_place(|| consumer.fetch_group_list(None, LIMIT))?;
    let members: usize = groups.groups().iter().map(|group| group.members().len()).sum();
    ensure!(members == 0, "{members} members");
    let mut asked = TopicPartitionList::new();
    asked.add_partition("orders", 0);
    let committed = tokio::task::block_in_place(|| consumer.committed_offsets(asked, LIMIT))?;
    let offset = committed.elements()[0].offset();
    ensure!(offset == essentially_once_kafka::rdkafka::Offset::Invalid, "{offset:?}");
    Ok(())
}
