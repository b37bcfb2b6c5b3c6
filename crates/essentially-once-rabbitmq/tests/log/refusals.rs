//! Streams, names, messages and passwords that the broker refuses.

use std::sync::Arc;

use essentially_once::{
    ConsumerId, Error, Log, NewRecord, Offset, OffsetStore as _,
    backend::{Advance, Retention, Revision, Transaction as _},
};
use essentially_once_rabbitmq::{LogOptions, Rabbit, RabbitOptions};
use lapin::{
    options::QueueDeclareOptions,
    types::{AMQPValue, FieldTable},
};
use test_servers::{Proxy, RabbitNode};

use crate::{Outcome, fresh, plain_client, through};

pub(crate) async fn mismatch(node: Arc<RabbitNode>) -> Outcome {
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
    rabbit.log_with(&name, LogOptions::new().existing()).await?;
    let keep = Retention::new().max_bytes(1_000_000);
    let both = rabbit
        .log_with(&name, LogOptions::new().retention(keep).existing())
        .await;
    let error = both.err().ok_or("it was taken")?.to_string();
    assert!(error.contains("retention") && error.contains("existing"), "{error}");
    let missing = rabbit.log_with(&fresh("missing"), LogOptions::new().existing()).await;
    let error = missing.err().ok_or("it was found")?.to_string();
    assert!(error.contains("does not exist"), "{error}");
    Ok(())
}

pub(crate) async fn no_stream(node: Arc<RabbitNode>) -> Outcome {
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

pub(crate) async fn longest_name(node: Arc<RabbitNode>) -> Outcome {
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
pub(crate) async fn nack(node: Arc<RabbitNode>) -> Outcome {
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

pub(crate) async fn refused(node: Arc<RabbitNode>) -> Outcome {
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
