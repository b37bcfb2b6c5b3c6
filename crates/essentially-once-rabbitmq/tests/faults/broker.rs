//! A broker that is short of memory, and one that dies.

use std::time::Duration;

use essentially_once::{ConsumerId, Error, Log as _, Offset};
use essentially_once_rabbitmq::LogOptions;
use test_servers::RabbitNode;
use tokio::task::block_in_place;

use crate::common::{Outcome, Running, Sending, ensure, insist, judge, message, options, url};

const KILLS: u64 = 3;

/// Streams that are not up yet when a restarted node answers.
const STREAMS: usize = 40;

/// Tests after a restart need not retry if only the restart is in their way.
pub(crate) async fn a_restarted_node_answers_for_all_its_streams_at_once() -> Outcome {
    let node = block_in_place(RabbitNode::start)?;
    let names: Vec<_> = (0..STREAMS).map(|number| format!("orders.{number}")).collect();
    let rabbit = options().connect(&url(node.port())).await?;
    for name in &names {
        rabbit.log(name).await?.append(&[message(0)]).await?;
    }
    block_in_place(|| node.restart())?;
    let rabbit = options().connect(&url(node.port())).await?;
    for name in names.iter().rev() {
        let log = rabbit.log_with(name, LogOptions::new().existing()).await?;
        let end = log.bounds().await?.end;
        ensure!(end == Offset::new(0, 1), "{name} ends at {end}");
        log.append(&[message(1)]).await?;
    }
    Ok(())
}

/// Other cases still close their connections, so a consumer waits for that.
pub(crate) async fn limits_that_are_reached_pass() -> Outcome {
    let node = block_in_place(RabbitNode::start)?;
    let consumer = ConsumerId::new("shipping")?;
    let rabbit = options().connect(&url(node.port())).await?;
    let log = rabbit.log("orders").await?;
    log.append(&[message(0)]).await?;
    // Two are open, and no more are allowed.
    let limit = |limits: &str| block_in_place(|| node.ctl(&["set_vhost_limits", "-p", "/", limits]));
    limit(r#"{"max-connections": 2}"#)?;
    let refused = options()
        .connect(&url(node.port()))
        .await
        .err()
        .ok_or("it was let in")?;
    ensure!(
        matches!(refused, Error::Unavailable { .. }) && refused.to_string().contains("limit"),
        "{refused}"
    );
    let mut running = Running::start(&consumer, log.clone(), rabbit.store());
    running.resets(1).await?;
    limit("{}")?;
    running.handles(1).await?;
    running.stop().await?;
    limit(r#"{"max-queues": 1}"#)?;
    let refused = rabbit.log("others").await.err().ok_or("it was declared")?;
    ensure!(matches!(refused, Error::Unavailable { .. }), "{refused}");
    limit("{}")?;
    rabbit.log("others").await?;
    judge(&rabbit, "orders", &consumer, 1).await
}

pub(crate) async fn an_alarm_holds_up_commits_and_nothing_is_lost() -> Outcome {
    let node = block_in_place(RabbitNode::start)?;
    let consumer = ConsumerId::new("shipping")?;
    let (url, impatient) = (node.url(), options().timeout(Duration::from_secs(3)));
    let rabbit = insist(|| impatient.clone().connect(&url)).await?;
    let log = insist(|| rabbit.log("orders")).await?;
    let mut sending = Sending::start(log.clone());
    let mut running = Running::start(&consumer, log, rabbit.store());
    running.goes_on(20).await?;
    let watermark = |value| block_in_place(|| node.ctl(&["set_vm_memory_high_watermark", value]));
    // During an alarm, no new records would arrive to commit.
    running.hold(true);
    sending.sends(10).await?;
    let before = running.seen();
    watermark("0")?;
    running.hold(false);
    running.resets(before.resets + 1).await?;
    let held = (sending.sent(), running.seen().handled);
    running.resets(before.resets + 2).await?;
    let still = (sending.sent(), running.seen().handled);
    ensure!(still == held, "a commit passed: {held:?}, then {still:?}");
    watermark("0.4")?;
    sending.sends(20).await?;
    running.handles(sending.sent()).await?;
    let (messages, failed) = sending.stop().await?;
    ensure!(failed > 0, "no append was held up");
    running.stop().await?;
    judge(&rabbit, "orders", &consumer, messages).await
}

pub(crate) async fn a_broker_killed_and_restarted_under_a_consumer_loses_nothing() -> Outcome {
    let node = block_in_place(RabbitNode::start)?;
    let consumer = ConsumerId::new("shipping")?;
    let rabbit = options().connect(&url(node.port())).await?;
    let mut sending = Sending::start(rabbit.log("orders").await?);
    let mut running = Running::start(&consumer, rabbit.log("orders").await?, rabbit.store());
    for kill in 0..KILLS {
        // At an arbitrary record.
        running.goes_on(20 + fastrand::u64(..40)).await?;
        block_in_place(|| node.restart())?;
        running.resets(kill + 1).await?;
    }
    sending.sends(20).await?;
    running.handles(sending.sent()).await?;
    let (messages, failed) = sending.stop().await?;
    ensure!(failed > 0, "no append failed");
    let report = running.stop().await?;
    ensure!(report.restarts >= KILLS, "{report}");
    judge(&rabbit, "orders", &consumer, messages).await
}
