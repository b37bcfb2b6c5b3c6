//! Dropped calls leave nothing behind.

use std::time::Duration;

use essentially_once::{
    ConsumerId, Log as _, Offset, OffsetStore as _, ReadState as _,
    backend::{Advance, LogId, Owner, Revision, Source, Transaction as _},
};
use essentially_once_rabbitmq::RabbitStore;
use test_servers::{RabbitNode, eventually};
use tokio::{task::block_in_place, time::timeout};

use crate::common::{Outcome, ensure, message, options, url};

/// Connections and channels, as the broker counts them.
pub(crate) fn count(node: &RabbitNode) -> Result<(u32, u32), Source> {
    // Erlang would show a list of small numbers as text.
    let counts = "{length(rabbit_networking:connections()), length(rabbit_channel:list())}.";
    let shown = block_in_place(|| node.ctl(&["eval", counts]))?;
    let mut numbers = shown.trim().trim_matches(['{', '}']).split(',').map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(connections), Some(channels)) => Ok((connections?, channels?)),
        _ => Err(format!("no counts: {shown}").into()),
    }
}

/// Waits until the broker counts no more than these.
pub(crate) async fn count_down(node: &RabbitNode, connections: u32, channels: u32) -> Outcome {
    eventually(|| async {
        Ok(match count(node)? {
            (some, few) if some <= connections && few <= channels => Ok(()),
            (some, few) => Err(format!(
                "{some} connections and {few} channels, for {connections} and {channels}"
            )),
        })
    })
    .await
}

pub(crate) fn advance(commits: u64, owner: Owner) -> Advance {
    let of = |count| Revision::new(0, count);
    let mut advance = Advance::new(
        LogId::new("orders").expect("a name"),
        1.into(),
        of(commits),
        of(commits + 1),
    );
    advance.owner = Some(owner);
    advance
}

async fn commit(store: &RabbitStore, consumer: &ConsumerId, commits: u64, owner: Owner) -> Outcome {
    let tx = store.begin(consumer).await?;
    Ok(tx.commit(advance(commits, owner)).await?)
}

/// Drops each call after 1 to 20 ms, in the middle of its work.
pub(crate) async fn dropped_calls_leave_nothing_open() -> Outcome {
    let node = block_in_place(RabbitNode::start)?;
    let (rabbit, consumer, owner) = (
        options().connect(&url(node.port())).await?,
        ConsumerId::new("shipping")?,
        Owner::new(7),
    );
    let log = rabbit.log("orders").await?;
    log.append(&[message(0)]).await?;
    let store = rabbit.store();
    commit(&store, &consumer, 0, owner).await?;
    let soon = || Duration::from_millis(fastrand::u64(1..20));
    for _ in 0..60 {
        let _ = timeout(soon(), log.read(Offset::ZERO)).await;
        let _ = timeout(soon(), log.bounds()).await;
        let _ = timeout(soon(), rabbit.log("orders")).await;
        let _ = timeout(soon(), options().connect(&url(node.port()))).await;
        let other = rabbit.store();
        let _ = timeout(soon(), other.position(&consumer)).await;
        let _ = timeout(soon(), other.begin(&consumer)).await;
        let _ = timeout(soon(), other.pulse(&consumer)).await;
        let _ = timeout(soon(), other.read_state(&consumer, &[b"k"])).await;
        if let Ok(sent) = other.sent(&consumer) {
            let _ = timeout(soon(), sent.read(Offset::ZERO)).await;
        }
        let another = rabbit.log("orders").await?;
        let _ = timeout(soon(), another.append(&[message(1)])).await;
    }
    // Connections for short questions, for publishing and reading of stores, and for the log's own
    // publisher; channels for the last three. After a dropped call, the store's other calls
    // continue with the old connections.
    count_down(&node, 6, 3).await?;
    commit(&store, &consumer, 1, owner).await?;
    log.append(&[message(2)]).await?;
    drop((rabbit, log, store));
    count_down(&node, 0, 0).await
}

/// A consumer drops its beats whenever a record is done.
pub(crate) async fn dropped_beats_do_not_spoil_the_channel_of_commits() -> Outcome {
    let node = block_in_place(RabbitNode::start)?;
    let (rabbit, consumer, owner) = (
        options().connect(&url(node.port())).await?,
        ConsumerId::new("shipping")?,
        Owner::new(7),
    );
    let store = rabbit.store();
    commit(&store, &consumer, 0, owner).await?;
    let channels = "lists:sort([proplists:get_value(pid, I) || I <- rabbit_channel:info_all([pid])]).";
    let channels = || block_in_place(|| node.ctl(&["eval", channels]));
    let before = channels()?;
    for commits in 1..40 {
        // Polled once, which publishes it.
        tokio::select! {
            biased;
            _ = store.beat(&consumer, owner) => {}
            () = std::future::ready(()) => {}
        }
        commit(&store, &consumer, commits, owner).await?;
    }
    let after = channels()?;
    ensure!(before == after, "the channels were {before}, and are {after}");
    Ok(())
}
