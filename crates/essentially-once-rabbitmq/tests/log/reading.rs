//! How far readers read ahead, and retention that overtakes them.

use std::sync::Arc;

use essentially_once::{Error, Log, NewRecord, Offset, Record, backend::Retention};
use essentially_once_rabbitmq::{LogOptions, Rabbit};
use test_servers::{RabbitNode, insist};

use crate::{Outcome, fresh, impatient};

/// Small records, and then large ones: a prefetch that is right for the first must not be kept for
/// the others.
pub(crate) async fn bounded(node: Arc<RabbitNode>) -> Outcome {
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
            assert!(ahead > 0, "nothing was sent ahead, so the count is wrong");
        }
    }
    let last = log.append(&[NewRecord::new(vec![b'x'; 2 * FETCH])]).await;
    last?;
    assert_eq!(reader.next(usize::MAX).await?.len(), 1, "a single record may be larger");
    Ok(())
}

/// The most messages of a channel that were sent and not acknowledged.
fn unacknowledged(node: &RabbitNode) -> Result<usize, Box<dyn std::error::Error + Send + Sync>> {
    let most = "lists:max([proplists:get_value(messages_unacknowledged, I) || \
                I <- rabbit_channel:info_all([messages_unacknowledged])]).";
    Ok(node.ctl(&["eval", most])?.trim().parse()?)
}

pub(crate) async fn overtaken(node: Arc<RabbitNode>) -> Outcome {
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

pub(crate) async fn emptied(node: Arc<RabbitNode>) -> Outcome {
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
