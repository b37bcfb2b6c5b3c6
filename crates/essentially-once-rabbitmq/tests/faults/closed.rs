//! Channels and connections that the broker closes.

use std::fs;

use essentially_once::{ConsumerId, Error, Log as _, NewRecord, Offset, backend::Source};
use test_servers::{RabbitNode, eventually};
use tokio::{task::block_in_place, time::timeout};

use crate::common::{LIMIT, Outcome, Running, ensure, insist, judge, message, options, send};

/// The broker closes a channel with an unacknowledged delivery after `consumer_timeout`, and one
/// that publishes a message over the limit.
const SETTINGS: &str = "consumer_timeout = 8000\nmax_message_size = 100000";

pub(crate) async fn channels_closed_by_the_broker_are_replaced() -> Outcome {
    let node = block_in_place(|| RabbitNode::start_with(SETTINGS))?;
    // How often a channel checks that timeout.
    ctl(
        &node,
        &["eval", "application:set_env(rabbit, channel_tick_interval, 500)."],
    )?;
    let rabbit = options().connect(&node.url()).await?;
    let (log, consumer) = (rabbit.log("orders").await?, ConsumerId::new("shipping")?);
    send(&log, 0..20).await?;
    let mut running = Running::start(&consumer, log.clone(), rabbit.store());
    running.handles(20).await?;

    let large = log.append(&[NewRecord::new(vec![b'x'; 200_000])]).await;
    let error = large.err().ok_or("the broker took it")?;
    ensure!(matches!(error, Error::TooLarge { limit: 100_000, .. }), "{error}");
    log.append(&[message(20)]).await?;
    running.handles(21).await?;

    a_reader_that_takes_nothing_gets_an_error(&node).await?;
    // A consumer that waited in the meantime handles everything.
    let closed = closed_channels(&node)?;
    ensure!(closed == 1, "the broker closed {closed} channels instead of one");
    send(&log, 21..30).await?;
    running.handles(30).await?;
    ensure!(running.seen().resets == 0, "{:?}", running.seen());

    ctl(&node, &["close_all_connections", "because of a test"])?;
    running.resets(1).await?;
    send(&log, 30..40).await?;
    running.handles(40).await?;
    running.stop().await?;
    judge(&rabbit, "orders", &consumer, 40).await
}

async fn a_reader_that_takes_nothing_gets_an_error(node: &RabbitNode) -> Outcome {
    let rabbit = options().connect(&node.url()).await?;
    let log = rabbit.log("orders").await?;
    let mut reader = log.read(Offset::ZERO).await?;
    reader.next(1).await?;
    // Only the broker knows when, until the reader asks.
    eventually(|| async {
        Ok(match closed_channels(node)? {
            0 => Err("no closed channel".to_owned()),
            _ => Ok(()),
        })
    })
    .await?;
    // First the earlier records.
    let outcome = async {
        loop {
            if let Err(error) = reader.next(100).await {
                break error;
            }
        }
    };
    let error = timeout(LIMIT, outcome).await.map_err(|_| "the reader waits forever")?;
    ensure!(
        matches!(error, Error::Unavailable { .. }) && error.to_string().contains("acknowledgement"),
        "{error}"
    );
    let mut reader = insist(|| log.read(Offset::ZERO)).await?;
    reader.next(1).await?;
    Ok(())
}

/// How many channels the broker has closed because of an unacknowledged delivery.
fn closed_channels(node: &RabbitNode) -> Result<usize, Source> {
    let log = fs::read_to_string(node.folder().join("server.log"))?;
    Ok(log.matches("delivery acknowledgement on channel").count())
}

fn ctl(node: &RabbitNode, arguments: &[&str]) -> Outcome {
    block_in_place(|| node.ctl(arguments))?;
    Ok(())
}
