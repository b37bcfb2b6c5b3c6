//! A broker that says nothing, and a client that seems silent.

use std::{
    fmt::Debug,
    future::Future,
    pin::Pin,
    thread,
    time::{Duration, Instant},
};

use essentially_once::{
    Consumer, ConsumerId, Error, Log as _, Offset, OffsetStore as _, ReadState as _,
    backend::{Owner, Pulse, Source, Transaction as _},
    consumer::Report,
    handler_fn,
};
use test_servers::RabbitNode;
use tokio::{sync::oneshot, task::block_in_place, time::timeout};

use crate::{
    common::{LIMIT, Outcome, ensure, fresh, insist, message, options, shared_node},
    dropped::{advance, count_down},
};

/// Heartbeats are due every second, and a client that misses two is cut off.
const BLOCKED: Duration = Duration::from_secs(6);

/// The timeout of the calls below.
const TIMEOUT: Duration = Duration::from_secs(3);

pub(crate) async fn heartbeats_go_on_while_a_handler_blocks_its_runtime() -> Outcome {
    let (node, name) = (shared_node()?, fresh("blocking"));
    let url = format!("amqp://guest:guest@127.0.0.1:{}/%2f?heartbeat=1", node.port());
    let (done, report) = oneshot::channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let run = async move {
            let rabbit = options().connect(&url).await?;
            let log = rabbit.log(&name).await?;
            log.append(&[message(0), message(1)]).await?;
            let blocking = handler_fn(|_, _| {
                thread::sleep(BLOCKED / 2);
                Box::pin(async { Ok(()) })
            });
            let consumer = Consumer::essentially_once(ConsumerId::new(&name)?, log, rabbit.store(), blocking);
            consumer.run_until_caught_up().await
        };
        let report: Result<Report, Source> = runtime
            .map_err(Source::from)
            .and_then(|runtime| runtime.block_on(run).map_err(Source::from));
        let _ = done.send(report);
    });
    let report = timeout(LIMIT, report).await???;
    ensure!(report.handled == 2 && report.restarts == 0, "{report}");
    Ok(())
}

type Call = Pin<Box<dyn Future<Output = (&'static str, Duration, Result<(), Error>)> + Send>>;

/// Measures the time of a call.
fn call<T: Debug>(name: &'static str, call: impl Future<Output = Result<T, Error>> + Send + 'static) -> Call {
    Box::pin(async move {
        let started = Instant::now();
        let result = call.await;
        (name, started.elapsed(), result.map(drop))
    })
}

pub(crate) async fn every_call_on_a_frozen_broker_ends_within_twice_the_time_out() -> Outcome {
    let node = block_in_place(RabbitNode::start)?;
    // Without heartbeats, which would detect it too.
    let url = format!("amqp://guest:guest@127.0.0.1:{}/%2f?heartbeat=0", node.port());
    let patient = || options().timeout(TIMEOUT);
    let rabbit = patient().connect(&url).await?;
    let (consumer, owner) = (ConsumerId::new("shipping")?, Owner::new(7));
    let log = rabbit.log("orders").await?;
    log.append(&[message(0)]).await?;
    let store = rabbit.store();
    store.begin(&consumer).await?.commit(advance(0, owner)).await?;
    let mut reader = log.read(Offset::ZERO).await?;
    reader.next(1).await?;
    let tx = store.begin(&consumer).await?;

    node.freeze();
    let mut calls = vec![call("commit", tx.commit(advance(1, owner)))];
    calls.push(call("next", async move { reader.next(1).await }));
    for _ in 0..3 {
        let handles = || (rabbit.clone(), log.clone(), store.clone(), consumer.clone());
        let fresh_url = url.clone();
        calls.push(call("connect", async move { patient().connect(&fresh_url).await }));
        let (rabbit, ..) = handles();
        calls.push(call("log", async move { rabbit.log("others").await }));
        let (_, log, ..) = handles();
        calls.push(call("append", async move { log.append(&[message(1)]).await }));
        let (_, log, ..) = handles();
        calls.push(call("read", async move { log.read(Offset::ZERO).await.map(drop) }));
        let (_, log, ..) = handles();
        calls.push(call("bounds", async move { log.bounds().await }));
        let (_, log, ..) = handles();
        calls.push(call("durability", async move { log.durability().await }));
        let (.., store, id) = handles();
        calls.push(call("position", async move { store.position(&id).await }));
        let (.., store, id) = handles();
        calls.push(call("begin", async move { store.begin(&id).await }));
        let (.., store, id) = handles();
        calls.push(call("beat", async move { store.beat(&id, owner).await }));
        let (.., store, id) = handles();
        calls.push(call("release", async move { store.release(&id, owner).await }));
        let (.., store, id) = handles();
        calls.push(call("pulse", async move { store.pulse(&id).await }));
        let (.., store, id) = handles();
        calls.push(call("watch", async move {
            store.watch(&id, &Pulse::default(), TIMEOUT).await
        }));
        let (.., store, id) = handles();
        calls.push(call("read_state", async move { store.read_state(&id, &[b"k"]).await }));
        let (.., store, id) = handles();
        calls.push(call("snapshot", async move { store.snapshot(&id).await }));
        let (.., store, id) = handles();
        calls.push(call("sent", async move {
            store.sent(&id)?.read(Offset::ZERO).await.map(drop)
        }));
        let (rabbit, .., id) = handles();
        calls.push(call("position of a new handle", async move {
            rabbit.store().position(&id).await
        }));
    }
    let running: Vec<_> = calls.into_iter().map(tokio::spawn).collect();
    let mut late = Vec::new();
    for running in running {
        let ended = timeout(LIMIT, running).await;
        let (name, took, result) = ended.map_err(|_| "a call waits for a frozen broker forever")??;
        // Calls that need no answer may succeed.
        let answered = ["pulse", "watch", "beat"].contains(&name) || result.is_err();
        let transient = result.as_ref().err().is_none_or(Error::is_transient);
        // The machine may be slow as well.
        if took > 2 * TIMEOUT + Duration::from_secs(4) || !answered || !transient {
            late.push(format!("{name}: {result:?} after {took:?}"));
        }
    }
    node.thaw();
    ensure!(late.is_empty(), "{}", late.join("\n"));
    let last = [message(2)];
    insist(|| log.append(&last)).await?;
    insist(|| store.position(&consumer)).await?;
    drop((rabbit, log, store));
    count_down(&node, 0, 0).await
}
