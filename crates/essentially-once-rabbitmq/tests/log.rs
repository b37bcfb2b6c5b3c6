//! Cases that only a RabbitMQ log has: other clients, retention by segments, alarms, cut and silent
//! connections.

use std::{
    future::Future,
    pin::Pin,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use essentially_once::{
    ConsumerId, Epoch, Error, Log, NewRecord, Offset, OffsetStore as _, Origin, ProducerId, Record,
    backend::{Advance, Retention, Revision, Transaction as _},
};
use essentially_once_rabbitmq::{LogOptions, Packing, Rabbit, RabbitLog, RabbitOptions};
use essentially_once_testkit::Suite;
use futures_core::Stream as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use test_servers::{Cut, Proxy, RabbitNode, insist};

/// How long a test may take. Only a stuck test takes this long.
const LIMIT: Duration = Duration::from_secs(100);

type Test = fn(Arc<RabbitNode>) -> Pin<Box<dyn Future<Output = Outcome>>>;
type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 16] = [
        ("messages_of_other_clients_are_records", |node| Box::pin(others(node))),
        ("other_clients_can_read_records", |node| Box::pin(readable(node))),
        ("many_and_large_headers_come_back", |node| Box::pin(headers(node))),
        ("a_stream_keeps_no_nested_headers", |node| Box::pin(nested(node))),
        ("a_fetch_and_what_is_sent_ahead_are_bounded_in_bytes", |node| {
            Box::pin(bounded(node))
        }),
        ("plain_and_packed_records_mix", |node| Box::pin(mixed(node))),
        ("a_slow_reader_is_told_that_retention_overtook_it", |node| {
            Box::pin(overtaken(node))
        }),
        ("a_stream_that_retention_emptied_says_so", |node| {
            Box::pin(emptied(node))
        }),
        ("another_declaration_is_refused_by_name", |node| {
            Box::pin(mismatch(node))
        }),
        ("a_queue_that_is_no_stream_is_refused", |node| Box::pin(no_stream(node))),
        ("the_longest_name_is_taken_and_a_longer_one_refused", |node| {
            Box::pin(longest_name(node))
        }),
        ("a_refused_message_is_not_taken_for_stored", |node| Box::pin(nack(node))),
        ("a_refused_password_is_not_shown", |node| Box::pin(refused(node))),
        ("a_cut_amid_an_append_leaves_doubt_and_the_next_works", |node| {
            Box::pin(cut(node))
        }),
        ("a_silent_connection_is_noticed", |node| Box::pin(silent(node))),
        ("an_alarm_holds_up_appends_and_no_reads", |_| Box::pin(alarm())),
    ];
    static NODE: OnceLock<Result<Arc<RabbitNode>, String>> = OnceLock::new();
    let mut suite = Suite::new();
    for (name, test) in tests {
        suite = match test_servers::rabbitmq_server() {
            Err(why) => suite.ignored(name, &why),
            Ok(_) => suite.async_test(name, LIMIT, move || async move {
                let start = || RabbitNode::start().map(Arc::new).map_err(|error| error.to_string());
                let node = tokio::task::block_in_place(|| NODE.get_or_init(start));
                test(node.clone()?).await
            }),
        };
    }
    suite.run()
}

fn fresh(name: &str) -> String {
    format!("{name}-{:08x}", fastrand::u32(..))
}

async fn plain_client(node: &RabbitNode) -> Result<(Connection, Channel), lapin::Error> {
    let connection = Connection::connect(&node.url(), ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok((connection, channel))
}

async fn read(log: &dyn Log, count: usize) -> Result<Vec<Record>, Error> {
    let mut reader = log.read(log.bounds().await?.earliest).await?;
    let mut records = Vec::new();
    while records.len() < count {
        records.extend(reader.next(count - records.len()).await?);
    }
    Ok(records)
}

fn header<'a>(record: &'a Record, name: &str) -> &'a [u8] {
    record.header(name).map_or(b"none", |value| &value[..])
}

async fn others(node: Arc<RabbitNode>) -> Outcome {
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

async fn readable(node: Arc<RabbitNode>) -> Outcome {
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

async fn headers(node: Arc<RabbitNode>) -> Outcome {
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
async fn nested(node: Arc<RabbitNode>) -> Outcome {
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

/// Small records, and then large ones: a prefetch that is right for the first must not be kept for
/// the others.
async fn bounded(node: Arc<RabbitNode>) -> Outcome {
    const LARGE: usize = 256 * 1024;
    const FETCH: usize = 1024 * 1024;
    let (name, rabbit) = (fresh("bounded"), Rabbit::connect(&node.url()).await?);
    let log = rabbit.log(&name).await?;
    let small: Vec<_> = (0..12_000).map(|number| NewRecord::new(format!("{number}"))).collect();
    log.append(&small).await?;
    let mut reader = log.read(Offset::ZERO).await?;
    let large: Vec<_> = (0..300)
        .map(|_| NewRecord::new(vec![b'x'; LARGE - 1_000]).header("h", vec![b'y'; 1_000]))
        .collect();
    log.append(&large).await?;
    let mut seen = 0;
    while seen < 12_300 {
        let records = reader.next(usize::MAX).await?;
        let bytes: usize = records.iter().map(Record::size).sum();
        assert!(bytes <= FETCH, "{} records of {bytes} bytes at once", records.len());
        let is_first_large = seen < 12_000 && seen + records.len() >= 12_000;
        seen += records.len();
        if is_first_large {
            // Nothing more is requested, so nothing more may arrive.
            let node = Arc::clone(&node);
            let ahead = tokio::task::spawn_blocking(move || unacknowledged(&node)).await??;
            assert!(ahead * LARGE <= 64 * FETCH, "{ahead} messages are sent ahead");
            assert!(ahead > 0, "the count is of something else");
        }
    }
    let last = log.append(&[NewRecord::new(vec![b'x'; 2 * FETCH])]).await;
    last?;
    assert_eq!(reader.next(usize::MAX).await?.len(), 1, "a single one may be larger");
    Ok(())
}

/// The most messages of a channel that were sent and not acknowledged.
fn unacknowledged(node: &RabbitNode) -> Result<usize, Box<dyn std::error::Error + Send + Sync>> {
    let most = "lists:max([proplists:get_value(messages_unacknowledged, I) || \
                I <- rabbit_channel:info_all([messages_unacknowledged])]).";
    Ok(node.ctl(&["eval", most])?.trim().parse()?)
}

async fn mixed(node: Arc<RabbitNode>) -> Outcome {
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

async fn overtaken(node: Arc<RabbitNode>) -> Outcome {
    let (name, rabbit) = (fresh("overtaken"), Rabbit::connect(&node.url()).await?);
    let log = rabbit
        .log_with(
            &name,
            LogOptions::new()
                .segment_bytes(65_536)
                .retention(Retention::new().max_bytes(200_000)),
        )
        .await?;
    let batch: Vec<_> = (0..100).map(|_| NewRecord::new(vec![b'x'; 1_000])).collect();
    log.append(&batch).await?;
    let mut reader = log.read(log.bounds().await?.earliest).await?;
    let mut next = reader.next(1).await?[0].offset.successor();
    // More than the broker may send ahead.
    for _ in 0..30 {
        log.append(&batch).await?;
    }
    let error = loop {
        match reader.next(100).await {
            Ok(records) => {
                assert_eq!(
                    records[0].offset.hi(),
                    next.hi() + 1,
                    "it continued elsewhere without an error"
                );
                next = records[records.len() - 1].offset;
            }
            Err(error) => break error,
        }
    };
    let earliest = log.bounds().await?.earliest;
    match error {
        Error::Truncated {
            requested,
            earliest: reported,
            ..
        } => {
            assert_eq!(requested, next.successor());
            // The broker continues to remove records.
            assert!(
                requested < reported && reported <= earliest,
                "reported {reported}, but the earliest is {earliest}"
            );
            Ok(())
        }
        error => Err(format!("another error: {error}").into()),
    }
}

async fn emptied(node: Arc<RabbitNode>) -> Outcome {
    let (name, rabbit) = (fresh("emptied"), Rabbit::connect(&node.url()).await?);
    let log = rabbit.log_with(&name, LogOptions::new().segment_bytes(65_536)).await?;
    let impatient = insist(|| impatient(node.url(), &name)).await?;
    // It fills the segment, so that the next one begins after it.
    log.append(&[NewRecord::new(vec![b'x'; 70_000])]).await?;
    let (policy, pattern) = (name.clone(), format!("^{name}$"));
    tokio::task::spawn_blocking(move || {
        let keep_nothing = r#"{"max-length-bytes": 1}"#;
        node.ctl(&["set_policy", &policy, &pattern, keep_nothing, "--apply-to", "queues"])
    })
    .await??;
    loop {
        match impatient.bounds().await {
            Err(error) if error.is_transient() && error.to_string().contains("retention") => break,
            // A busy broker may be too slow to answer, too.
            Err(error) if !error.is_transient() => return Err(format!("another error: {error}").into()),
            Ok(_) | Err(_) => {}
        }
    }
    log.append(&[NewRecord::new("next")]).await?;
    let earliest = log.bounds().await?.earliest;
    assert!(earliest > Offset::ZERO, "{earliest}");
    match log.read(Offset::ZERO).await {
        Err(Error::Truncated { earliest: reported, .. }) if reported == earliest => Ok(()),
        Err(error) => Err(format!("another error: {error}").into()),
        Ok(_) => Err("it was read".into()),
    }
}

async fn mismatch(node: Arc<RabbitNode>) -> Outcome {
    let (name, rabbit) = (fresh("mismatch"), Rabbit::connect(&node.url()).await?);
    rabbit.log(&name).await?;
    let other = rabbit
        .log_with(
            &name,
            LogOptions::new().retention(Retention::new().max_bytes(1_000_000)),
        )
        .await;
    let error = other.err().ok_or("it was taken")?;
    assert!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("x-max-length-bytes"),
        "{error}"
    );
    let more = RabbitOptions::new()
        .replicas(3)
        .connect(&node.url())
        .await?
        .log(&name)
        .await;
    let error = more.err().ok_or("it was taken")?.to_string();
    assert!(error.contains("x-initial-cluster-size"), "{error}");
    rabbit
        .log_with(
            &name,
            LogOptions::new()
                .retention(Retention::new().max_bytes(1_000_000))
                .existing(),
        )
        .await?;
    let missing = rabbit.log_with(&fresh("missing"), LogOptions::new().existing()).await;
    let error = missing.err().ok_or("it was found")?.to_string();
    assert!(error.contains("does not exist"), "{error}");
    Ok(())
}

async fn no_stream(node: Arc<RabbitNode>) -> Outcome {
    let (name, rabbit) = (fresh("classic"), Rabbit::connect(&node.url()).await?);
    let (_connection, channel) = plain_client(&node).await?;
    channel
        .queue_declare(
            name.as_str().into(),
            QueueDeclareOptions::durable(),
            FieldTable::default(),
        )
        .await?;
    let error = rabbit.log(&name).await.err().ok_or("it was taken")?.to_string();
    assert!(error.contains("x-queue-type"), "{error}");
    let log = rabbit.log_with(&name, LogOptions::new().existing()).await?;
    log.append(&[NewRecord::new("x")]).await?;
    let error = log.read(Offset::ZERO).await.err().ok_or("it was read")?;
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    Ok(())
}

async fn longest_name(node: Arc<RabbitNode>) -> Outcome {
    let rabbit = RabbitOptions::new()
        .prefix("a".repeat(100))
        .connect(&node.url())
        .await?;
    let (log, store) = (rabbit.log("longest").await?, rabbit.store());
    // RabbitMQ makes one name of 255 bytes of the virtual host, the stream, and a number. The
    // longest of the store's names ends in `.snapshots.a`.
    let consumer = ConsumerId::new("c".repeat(120))?;
    let revision = Revision::NONE.next_epoch();
    let advance = Advance::new(log.id().clone(), 1.into(), Revision::NONE, revision);
    store.begin(&consumer).await?.commit(advance).await?;
    store.snapshot(&consumer).await?;
    store.snapshot(&consumer).await?;
    let longer = ConsumerId::new("c".repeat(121))?;
    let error = store.position(&longer).await.err().ok_or("it was taken")?;
    assert!(matches!(error, Error::InvalidSetting { .. }), "{error}");
    Ok(())
}

/// Streams take all that they can store. A queue with an overflow refuses.
async fn nack(node: Arc<RabbitNode>) -> Outcome {
    let (name, rabbit) = (fresh("full"), Rabbit::connect(&node.url()).await?);
    let (_connection, channel) = plain_client(&node).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    channel
        .queue_declare(name.as_str().into(), QueueDeclareOptions::durable(), arguments)
        .await?;
    let log = rabbit.log_with(&name, LogOptions::new().existing()).await?;
    log.append(&[NewRecord::new("fits")]).await?;
    let full = log.append(&[NewRecord::new("does not")]).await;
    let error = full.err().ok_or("a refusal was taken for a confirm")?;
    assert!(
        matches!(error, Error::Indeterminate { .. }) && error.to_string().contains("refusal"),
        "{error}"
    );
    Ok(())
}

async fn refused(node: Arc<RabbitNode>) -> Outcome {
    for (url, expected) in [
        (node.url().replace(":guest@", ":sesame@"), "ACCESS_REFUSED"),
        (node.url().replace("%2f", "none"), "vhost none not found"),
    ] {
        let error = Rabbit::connect(&url).await.err().ok_or("it was let in")?;
        let mut shown = format!("{error} {error:?}");
        let mut cause = error.cause().map(|cause| cause as &dyn std::error::Error);
        while let Some(error) = cause {
            shown += &format!(" {error} {error:?}");
            cause = error.source();
        }
        assert!(
            matches!(error, Error::Failed { .. }) && shown.contains(expected),
            "{shown}"
        );
        assert!(!shown.contains("sesame") && !shown.contains("guest"), "{shown}");
    }
    let proxy = Proxy::start(node.port())?;
    proxy.refuse(true);
    let error = Rabbit::connect(&through(&proxy)).await.err().ok_or("it was let in")?;
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    Ok(())
}

fn through(proxy: &Proxy) -> String {
    format!("amqp://guest:guest@127.0.0.1:{}/%2f", proxy.port())
}

/// A handle that considers the broker stuck after three seconds.
async fn impatient(url: String, log: &str) -> Result<RabbitLog, Error> {
    let options = RabbitOptions::new().timeout(Duration::from_secs(3));
    options
        .connect(&url)
        .await?
        .log_with(log, LogOptions::new().existing())
        .await
}

async fn cut(node: Arc<RabbitNode>) -> Outcome {
    let (name, proxy) = (fresh("cut"), Proxy::start(node.port())?);
    let log = Rabbit::connect(&through(&proxy)).await?.log(&name).await?;
    log.append(&[NewRecord::new("first")]).await?;
    for (round, cut) in [Cut::BeforeRequest, Cut::BeforeReply].into_iter().enumerate() {
        let marked = format!("cut here {round}");
        proxy.cut_at(marked.as_bytes(), cut);
        let error = log
            .append(&[NewRecord::new(marked.clone())])
            .await
            .err()
            .ok_or("it was confirmed")?;
        assert!(matches!(error, Error::Indeterminate { .. }), "{error}");
        log.append(&[NewRecord::new(format!("after {round}"))]).await?;
    }
    proxy.cut();
    // The connection is known to be broken before anything is sent on it.
    while let Err(error) = log.append(&[NewRecord::new("last")]).await {
        assert!(
            matches!(error, Error::Indeterminate { .. } | Error::Unavailable { .. }),
            "{error}"
        );
    }
    let read: Vec<_> = read(&log, 5).await?.into_iter().map(|record| record.payload).collect();
    assert_eq!(read[..5], ["first", "after 0", "cut here 1", "after 1", "last"]);
    Ok(())
}

async fn silent(node: Arc<RabbitNode>) -> Outcome {
    let (name, proxy) = (fresh("silent"), Proxy::start(node.port())?);
    let log = Rabbit::connect(&node.url()).await?.log(&name).await?;
    log.append(&[NewRecord::new("first")]).await?;
    let url = format!("{}?heartbeat=1", through(&proxy));
    let log = insist(|| impatient(url.clone(), &name)).await?;
    let mut reader = insist(async || {
        let mut reader = log.read(Offset::ZERO).await?;
        reader.next(1).await?;
        Ok(reader)
    })
    .await?;
    proxy.hold(true);
    let waiting = tokio::time::timeout(Duration::from_secs(60), reader.next(1)).await;
    let error = waiting
        .map_err(|_| "a reader waits on a dead connection forever")?
        .err()
        .ok_or("it read")?;
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    let appending = tokio::time::timeout(Duration::from_secs(60), log.append(&[NewRecord::new("lost")])).await;
    let error = appending
        .map_err(|_| "an append waits on a dead connection forever")?
        .err()
        .ok_or("it was confirmed")?;
    assert!(error.is_transient(), "{error}");
    proxy.hold(false);
    Ok(())
}

/// On its own node, since an alarm blocks everyone who publishes.
async fn alarm() -> Outcome {
    let node = Arc::new(tokio::task::block_in_place(RabbitNode::start)?);
    let (name, rabbit) = (fresh("alarm"), Rabbit::connect(&node.url()).await?);
    let log = rabbit.log(&name).await?;
    log.append(&[NewRecord::new("before")]).await?;
    let impatient = insist(|| impatient(node.url(), &name)).await?;
    let watermark = |value: &'static str| {
        let node = Arc::clone(&node);
        tokio::task::spawn_blocking(move || node.ctl(&["set_vm_memory_high_watermark", value]))
    };
    watermark("0").await??;
    let error = impatient
        .append(&[NewRecord::new("during")])
        .await
        .err()
        .ok_or("it was confirmed")?;
    assert!(matches!(error, Error::Indeterminate { .. }), "{error}");
    assert!(error.to_string().contains("memory or disk"), "{error}");
    let held = read(&log, 1).await;
    watermark("0.4").await??;
    assert_eq!(held?[0].payload, "before");
    while log.append(&[NewRecord::new("after")]).await.is_err() {}
    Ok(())
}
