//! Records and the messages of other clients.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use essentially_once::{Epoch, Log, NewRecord, Offset, Origin, ProducerId};
use essentially_once_rabbitmq::{LogOptions, Packing, Rabbit};
use futures_core::Stream as _;
use lapin::{
    BasicProperties,
    options::{BasicConsumeOptions, BasicPublishOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use test_servers::RabbitNode;

use crate::{Outcome, fresh, header, plain_client, read};

pub(crate) async fn others(node: Arc<RabbitNode>) -> Outcome {
    let (name, rabbit) = (fresh("others"), Rabbit::connect(&node.url()).await?);
    let log = rabbit.log(&name).await?;
    let (_connection, channel) = plain_client(&node).await?;
    let mut headers = FieldTable::default();
    headers.insert("text".into(), AMQPValue::LongString("any".into()));
    headers.insert("number".into(), AMQPValue::LongLongInt(-7));
    headers.insert("truth".into(), AMQPValue::Boolean(true));
    headers.insert("essentially-once-key".into(), AMQPValue::LongString("k".into()));
    headers.insert(
        "essentially-once-producer".into(),
        AMQPValue::LongString("python".into()),
    );
    headers.insert("essentially-once-sequence".into(), AMQPValue::LongLongInt(41));
    let properties = BasicProperties::default()
        .with_content_type("text/csv".into())
        .with_message_id("m-1".into())
        .with_priority(3)
        .with_timestamp(1_700_000_000)
        .with_headers(headers);
    for properties in [properties, BasicProperties::default()] {
        let options = BasicPublishOptions::default();
        channel
            .basic_publish("".into(), name.as_str().into(), options, b"a,b", properties)
            .await?
            .await?;
    }
    let records = read(&log, 2).await?;
    let first = &records[0];
    assert_eq!(first.payload, "a,b");
    assert_eq!(first.key.as_deref(), Some(&b"k"[..]));
    let origin = first.origin.as_ref().ok_or("no origin")?;
    assert_eq!((origin.numbering.to_string().as_str(), origin.sequence), ("python", 41));
    assert_eq!(first.appended_at, UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    let shown = [
        "text",
        "number",
        "truth",
        "amqp.content-type",
        "amqp.message-id",
        "amqp.priority",
    ];
    let shown = shown.map(|name| String::from_utf8_lossy(header(first, name)).into_owned());
    assert_eq!(shown, ["any", "-7", "true", "text/csv", "m-1", "3"]);
    assert_eq!(first.headers.len(), 6, "{:?}", first.headers);
    assert!(
        records[1].headers.is_empty() && records[1].appended_at == UNIX_EPOCH,
        "{:?}",
        records[1]
    );
    Ok(())
}

pub(crate) async fn readable(node: Arc<RabbitNode>) -> Outcome {
    let (name, rabbit) = (fresh("readable"), Rabbit::connect(&node.url()).await?);
    let log = rabbit.log(&name).await?;
    let producer = ProducerId::new("web-1")?;
    log.append(&[NewRecord::new("hello")
        .key("k")
        .header("source", "web")
        .origin(Origin::new(producer, Epoch::STABLE, 7))])
        .await?;
    let (_connection, channel) = plain_client(&node).await?;
    channel.basic_qos(10, BasicQosOptions::default()).await?;
    let mut first = FieldTable::default();
    first.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
    let mut consumer = channel
        .basic_consume(name.as_str().into(), "".into(), BasicConsumeOptions::default(), first)
        .await?;
    let next = std::future::poll_fn(|context| std::pin::Pin::new(&mut consumer).poll_next(context)).await;
    let delivery = next.ok_or("the consumer ended")??;
    assert_eq!(delivery.data, b"hello");
    let headers = delivery.properties.headers().clone().unwrap_or_default();
    for (name, value) in [
        ("source", "web"),
        ("essentially-once-key", "k"),
        ("essentially-once-producer", "web-1"),
        ("essentially-once-sequence", "7"),
    ] {
        assert_eq!(
            headers.inner().get(name),
            Some(&AMQPValue::LongString(value.into())),
            "{name}"
        );
    }
    Ok(())
}

pub(crate) async fn headers(node: Arc<RabbitNode>) -> Outcome {
    // The second URL has the smallest frame that RabbitMQ lets a client have.
    for (round, url) in [node.url(), format!("{}?frame_max=8192", node.url())]
        .iter()
        .enumerate()
    {
        let log = Rabbit::connect(url).await?.log(&fresh("headers")).await?;
        let named = |count: usize, size: usize| {
            let name = |number: usize| -> String {
                let letter = |place: usize| char::from(b'0' + (number / 64_usize.pow(place as u32) % 64) as u8);
                [letter(1), letter(0)]
                    .into_iter()
                    .chain((number >= 4_096).then(|| letter(2)))
                    .collect()
            };
            (0..count).fold(NewRecord::new("payload"), |record, number| {
                record.header(name(number), vec![b'x'; size])
            })
        };
        // Many, large, both, and enough of them that names and lengths are most of the size. Some
        // are out of order.
        let mut records: Vec<_> = [
            (300, 10),
            (300, 100),
            (300, 1_000),
            (3, 50_000),
            (4_000, 0),
            (16_000, 0),
        ]
        .map(|(count, size)| named(count, size))
        .into();
        let mut backwards = named(300, 3);
        backwards.headers.reverse();
        records.push(backwards);
        log.append(&records).await?;
        let all = read(&log, records.len()).await?;
        for (new, read) in records.iter().zip(&all) {
            assert!(read.malformed.is_none(), "round {round}: {:?}", read.malformed);
            assert_eq!(new.headers.len(), read.headers.len(), "round {round}");
            assert!(
                new.headers == read.headers && new.payload == read.payload,
                "round {round}"
            );
        }
    }
    Ok(())
}

/// The broker drops them when it stores a message, so no reader can see them.
pub(crate) async fn nested(node: Arc<RabbitNode>) -> Outcome {
    let (name, rabbit) = (fresh("nested"), Rabbit::connect(&node.url()).await?);
    let log = rabbit.log(&name).await?;
    let (_connection, channel) = plain_client(&node).await?;
    let (mut table, mut headers) = (FieldTable::default(), FieldTable::default());
    table.insert("inner".into(), AMQPValue::LongLongInt(7));
    headers.insert("table".into(), AMQPValue::FieldTable(table));
    headers.insert(
        "list".into(),
        AMQPValue::FieldArray(vec![AMQPValue::LongLongInt(7)].into()),
    );
    headers.insert("plain".into(), AMQPValue::LongString("kept".into()));
    let properties = BasicProperties::default().with_headers(headers);
    channel
        .basic_publish(
            "".into(),
            name.as_str().into(),
            BasicPublishOptions::default(),
            b"x",
            properties,
        )
        .await?
        .await?;
    let record = &read(&log, 1).await?[0];
    assert_eq!(record.headers, [("plain".to_owned(), "kept".into())]);
    Ok(())
}

pub(crate) async fn mixed(node: Arc<RabbitNode>) -> Outcome {
    let (name, rabbit) = (fresh("mixed"), Rabbit::connect(&node.url()).await?);
    let plain = rabbit.log(&name).await?;
    let packed = rabbit
        .log_with(
            &name,
            LogOptions::new().packed(Packing::new().max_records(4).max_bytes(1_000)),
        )
        .await?;
    let small = rabbit
        .log_with(
            &name,
            LogOptions::new()
                .packed(Packing::new().max_records(100).max_bytes(64 * 1024))
                .compressed(),
        )
        .await?;
    let new: Vec<_> = (0..30)
        .map(|n| {
            NewRecord::new(n.to_string())
                .key(vec![b'k'; 50])
                .header("n", n.to_string())
        })
        .collect();
    let before = SystemTime::now() - Duration::from_millis(1);
    plain.append(&new[..5]).await?;
    packed.append(&new[5..15]).await?;
    plain.append(&new[15..17]).await?;
    small.append(&new[17..]).await?;
    let all = read(&plain, 30).await?;
    for (new, read) in new.iter().zip(&all) {
        assert_eq!(
            (&new.key, &new.headers, &new.payload),
            (&read.key, &read.headers, &read.payload)
        );
        assert!(read.appended_at >= before, "{read:?}");
    }
    assert_eq!(all[6].offset, Offset::new(5, 1));
    assert_eq!(plain.bounds().await?.end, all[29].offset.successor());
    for (index, record) in all.iter().enumerate() {
        let from = plain.read(record.offset).await?.next(1).await?;
        assert_eq!(from[0], all[index]);
    }
    Ok(())
}
