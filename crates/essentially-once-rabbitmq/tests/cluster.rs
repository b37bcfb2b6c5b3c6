//! A cluster of three nodes, of which one is stopped and another killed.

mod common;

use std::process::ExitCode;

use essentially_once::{ConsumerId, Error, Log as _, OffsetStore as _, backend::Source};
use essentially_once_rabbitmq::{Rabbit, RabbitStore};
use test_servers::{RabbitCluster, eventually};
use tokio::task::block_in_place;

use common::{Outcome, Running, Sending, cases, ensure, insist, judge, message, options, run, url};

fn main() -> ExitCode {
    run(cases![a_node_stopped_and_a_node_killed_lose_nothing])
}

async fn a_node_stopped_and_a_node_killed_lose_nothing() -> Outcome {
    let cluster = block_in_place(|| RabbitCluster::start(3))?;
    let [first, second] = [0, 1].map(|node: usize| url(cluster.nodes()[node].port()));
    let (rabbit, other) = (connect(&first).await?, connect(&second).await?);
    // The node that declares a stream leads it, so the leader of the log is the one killed.
    let elsewhere = insist(|| other.log("orders")).await?;
    let log = insist(|| rabbit.log("orders")).await?;
    let mut sending = Sending::start(log.clone());
    let (shipping, billing) = (ConsumerId::new("shipping")?, ConsumerId::new("billing")?);
    let mut near = Running::start(&shipping, log.clone(), rabbit.store());
    let mut far = Running::start(&billing, elsewhere.clone(), other.store());
    near.goes_on(20).await?;
    far.goes_on(20).await?;
    let streams = ["orders".into(), changelog(&shipping), changelog(&billing)];
    until_replicas(&cluster, &streams, 3).await?;
    let leaders = block_in_place(|| cluster.nodes()[0].ctl(&["-q", "list_queues", "name", "leader"]))?;
    let leads = format!("orders\t{}", cluster.nodes()[1].name());
    ensure!(leaders.lines().any(|line| line == leads), "{leaders}");

    block_in_place(|| cluster.nodes()[2].stop())?;
    until_replicas(&cluster, &streams, 2).await?;
    moves_on(&rabbit.store(), &shipping, &mut sending, &mut near).await?;
    far.goes_on(50).await?;
    block_in_place(|| cluster.nodes()[2].restart())?;
    until_replicas(&cluster, &streams, 3).await?;

    let resets = far.seen().resets;
    block_in_place(|| cluster.nodes()[1].kill())?;
    for error in [
        Rabbit::connect(&second).await.err().ok_or("it was let in")?,
        elsewhere.append(&[message(0)]).await.err().ok_or("it was confirmed")?,
        elsewhere.bounds().await.err().ok_or("it answered")?,
        other.store().position(&billing).await.err().ok_or("it answered")?,
    ] {
        ensure!(
            matches!(error, Error::Unavailable { .. } | Error::Indeterminate { .. }),
            "{error}"
        );
    }
    far.resets(resets + 1).await?;
    moves_on(&rabbit.store(), &shipping, &mut sending, &mut near).await?;
    block_in_place(|| cluster.nodes()[1].restart())?;
    let again = [message(0)];
    insist(|| elsewhere.append(&again)).await?;
    far.handles(sending.sent()).await?;

    sending.sends(20).await?;
    let (messages, _) = sending.stop().await?;
    near.handles(messages).await?;
    near.stop().await?;
    far.stop().await?;
    judge(&rabbit, "orders", &shipping, messages).await?;
    judge(&other, "orders", &billing, messages).await
}

async fn connect(url: &str) -> Result<Rabbit, Error> {
    insist(|| options().replicas(3).connect(url)).await
}

fn changelog(consumer: &ConsumerId) -> String {
    format!("essentially-once.{consumer}.changelog")
}

/// Appends, handles and commits records.
async fn moves_on(store: &RabbitStore, consumer: &ConsumerId, sending: &mut Sending, running: &mut Running) -> Outcome {
    let position = || async {
        let position = insist(|| store.position(consumer)).await?;
        let position = position.ok_or("there is no position")?;
        Ok::<_, Source>((position.next, position.revision))
    };
    let (next, revision) = position().await?;
    sending.sends(50).await?;
    running.goes_on(50).await?;
    let now = position().await?;
    ensure!(
        now.0.hi() >= next.hi() + 40 && now.1 > revision,
        "from {next} at revision {revision} to {now:?}"
    );
    Ok(())
}

/// Waits until each stream has this many replicas that are up.
async fn until_replicas(cluster: &RabbitCluster, streams: &[String], count: usize) -> Outcome {
    let arguments = ["-q", "list_queues", "name", "online", "--no-table-headers"];
    eventually(|| async {
        let seen = block_in_place(|| cluster.nodes()[0].ctl(&arguments))?;
        let up = |stream: &String| {
            let mut lines = seen.lines().filter_map(|line| line.split_once('\t'));
            let found = lines.find(|(name, _)| name == stream);
            found.is_some_and(|(_, nodes)| nodes.split(',').count() == count)
        };
        Ok(match streams.iter().all(up) {
            true => Ok(()),
            false => Err(format!("a stream does not have {count} replicas: {seen}")),
        })
    })
    .await
}
