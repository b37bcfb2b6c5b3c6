//! Connections that are cut, silent or blocked.

use std::{sync::Arc, time::Duration};

use essentially_once::{Error, Log, NewRecord, Offset};
use essentially_once_rabbitmq::Rabbit;
use test_servers::{Cut, Proxy, RabbitNode, insist};

use crate::{Outcome, fresh, impatient, read, through};

pub(crate) async fn cut(node: Arc<RabbitNode>) -> Outcome {
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

pub(crate) async fn silent(node: Arc<RabbitNode>) -> Outcome {
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
pub(crate) async fn alarm() -> Outcome {
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
