//! Connections that are closed, blocked, dropped while opening, or unused.

mod common;

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue as _, Log as _, NewRecord, Offset, OffsetStore as _,
    ReadState as _, Record, async_trait,
    backend::{Advance, Owner, Revision, Source, Transaction as _},
};
use essentially_once_redis::{LogOptions, Redis, RedisLog, RedisOptions, RedisStore, Retention};
use test_servers::{Proxy, RedisServer, eventually, insist};
use tokio::time::timeout;

use common::{LIMIT, Outcome, cases, ensure, run};

fn main() -> ExitCode {
    run(cases![
        an_idle_producer_is_not_in_doubt,
        an_idle_reader_goes_on,
        an_idle_reader_does_not_go_on_elsewhere,
        an_idle_store_commits,
        a_slow_handler_runs_once_for_each_record,
        a_connection_that_was_cut_is_replaced_before_use,
        nothing_is_sent_on_an_idle_connection_that_is_silent,
        a_frozen_server_holds_up_no_call_for_long,
        calls_that_are_dropped_leave_no_connection,
        unused_connections_are_closed,
        handles_work_on_a_second_runtime,
        an_older_protocol_is_spoken_where_the_url_names_it,
    ])
}

/// A server that closes connections that were idle for a second.
fn impatient() -> Result<RedisServer, Source> {
    RedisServer::durable().with(&[("timeout", "1")]).start()
}

/// The number of clients connected over TCP. The query itself uses the socket.
fn clients(server: &RedisServer) -> Result<usize, Source> {
    let list = server.command(&["CLIENT", "LIST", "TYPE", "NORMAL"])?;
    Ok(list
        .text()
        .lines()
        .filter(|client| client.contains("addr=127.0.0.1:"))
        .count())
}

/// Waits until at most this many clients are connected.
async fn until_clients(server: &RedisServer, most: usize) -> Outcome {
    eventually(|| async {
        Ok(match clients(server)? {
            count if count <= most => Ok(()),
            count => Err(format!("{count} clients, for {most}")),
        })
    })
    .await
}

fn records(range: std::ops::Range<usize>) -> Vec<NewRecord> {
    range.map(|n| NewRecord::new(n.to_string())).collect()
}

fn advance(log: &RedisLog, commits: u64) -> Advance {
    let (expected, made) = (Revision::new(0, commits), Revision::new(0, commits + 1));
    Advance::new(log.id().clone(), Offset::ZERO, expected, made)
}

async fn an_idle_producer_is_not_in_doubt() -> Outcome {
    let server = impatient()?;
    let log = Redis::connect(&server.url()).await?.log("orders").await?;
    for n in 0..3 {
        log.append(&records(n..n + 1)).await?;
        until_clients(&server, 0).await?;
    }
    ensure!(log.bounds().await?.earliest != Offset::ZERO, "nothing is there");
    Ok(())
}

async fn an_idle_reader_goes_on() -> Outcome {
    let server = impatient()?;
    let log = Redis::connect(&server.url()).await?.log("orders").await?;
    log.append(&records(0..30)).await?;
    let mut reader = log.read(Offset::ZERO).await?;
    let mut seen = Vec::new();
    // First with more records to read, then at the end.
    for most in [10, 10, 10, 1] {
        if seen.len() == 30 {
            log.append(&records(30..31)).await?;
        }
        for record in timeout(LIMIT, reader.next(most)).await?? {
            seen.push(String::from_utf8_lossy(&record.payload).into_owned());
        }
        until_clients(&server, 0).await?;
    }
    let expected: Vec<_> = (0..31).map(|n| n.to_string()).collect();
    ensure!(seen == expected, "{seen:?}");
    Ok(())
}

async fn an_idle_reader_does_not_go_on_elsewhere() -> Outcome {
    let server = RedisServer::durable().start()?;
    let log = Redis::connect(&server.url()).await?.log("orders").await?;
    log.append(&records(0..3)).await?;
    for elsewhere in ["restarted", "of another history", "unknown"] {
        let mut reader = log.read(Offset::ZERO).await?;
        ensure!(timeout(LIMIT, reader.next(10)).await??.len() == 3, "three records");
        match elsewhere {
            "restarted" => tokio::task::block_in_place(|| server.restart())?,
            "of another history" => {
                // Like a master that was a replica for a while, this server may hold another
                // server's data.
                server.command(&["REPLICAOF", "127.0.0.1", "1"])?;
                server.command(&["REPLICAOF", "NO", "ONE"])?;
            }
            _ => drop(server.command(&["ACL", "SETUSER", "default", "-info"])?),
        }
        server.command(&["CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES"])?;
        until_clients(&server, 0).await?;
        let error = timeout(LIMIT, reader.next(1)).await?.expect_err(elsewhere);
        ensure!(matches!(error, Error::Unavailable { .. }), "{elsewhere}: {error}");
        // On a busy machine, the client may learn only from its write that the connection is gone.
        let is_known = ["another server", "broken pipe"].map(|why| error.to_string().contains(why));
        ensure!(is_known.contains(&true), "{elsewhere}: {error}");
        // A new reader first checks its place.
        let mut reader = log.read(Offset::ZERO).await?;
        ensure!(timeout(LIMIT, reader.next(10)).await??.len() == 3, "three records");
    }
    Ok(())
}

async fn an_idle_store_commits() -> Outcome {
    let server = impatient()?;
    let redis = Redis::connect(&server.url()).await?;
    let (log, store, id) = (redis.log("orders").await?, redis.store(), ConsumerId::new("shipping")?);
    for commits in 0..3 {
        let mut tx = store.begin(&id).await?;
        ensure!(
            tx.get(b"key").await?.is_some() == (commits > 0),
            "not what was committed"
        );
        tx.put(b"key", b"value").await?;
        until_clients(&server, 0).await?;
        tx.commit(advance(&log, commits)).await?;
        until_clients(&server, 0).await?;
        let position = store.position(&id).await?;
        ensure!(
            position.is_some_and(|found| found.revision.count() == commits + 1),
            "no position"
        );
    }
    Ok(())
}

/// Takes longer than the server's idle timeout.
struct Slow(Arc<AtomicU64>);

#[async_trait]
impl<Tx: Send> Handler<Tx> for Slow {
    async fn handle(&mut self, _: &Record, _: &mut Tx) -> Result<(), HandlerError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        Ok(())
    }
}

async fn a_slow_handler_runs_once_for_each_record() -> Outcome {
    let server = impatient()?;
    let redis = Redis::connect(&server.url()).await?;
    let (log, id) = (redis.log("orders").await?, ConsumerId::new("shipping")?);
    log.append(&records(0..4)).await?;
    let calls = Arc::new(AtomicU64::new(0));
    let consumer = Consumer::essentially_once(id, log, redis.store(), Slow(Arc::clone(&calls))).max_batch(2);
    let report = timeout(LIMIT, consumer.run_until_caught_up()).await??;
    ensure!(
        report.restarts == 0 && calls.load(Ordering::Relaxed) == 4,
        "{report}; {calls:?} calls"
    );
    Ok(())
}

async fn a_connection_that_was_cut_is_replaced_before_use() -> Outcome {
    let server = RedisServer::durable().start()?;
    let proxy = Proxy::start(server.port())?;
    let log = Redis::connect(&format!("redis://127.0.0.1:{}", proxy.port()))
        .await?
        .log("orders")
        .await?;
    let mut at_once = 0;
    // The client's task may see the end a moment after the server, and the append before that.
    for n in 0..200 {
        proxy.cut();
        until_clients(&server, 0).await?;
        match log.append(&records(n..n + 1)).await {
            Ok(_) => at_once += 1,
            // The next cut needs a connection.
            Err(Error::Unavailable { .. } | Error::Indeterminate { .. }) => {
                let again = records(n..n + 1);
                insist(|| log.append(&again)).await?;
            }
            Err(error) => return Err(error.into()),
        }
        if at_once == 10 {
            return Ok(());
        }
    }
    Err(format!("{at_once} of 200 appends succeeded").into())
}

async fn nothing_is_sent_on_an_idle_connection_that_is_silent() -> Outcome {
    let server = RedisServer::durable().start()?;
    let proxy = Proxy::start(server.port())?;
    let options = RedisOptions::new().timeout(Duration::from_millis(500));
    let redis = options.connect(&format!("redis://127.0.0.1:{}", proxy.port())).await?;
    let (log, store, id) = (redis.log("orders").await?, redis.store(), ConsumerId::new("shipping")?);
    log.append(&records(0..1)).await?;
    store.position(&id).await?;
    // Idle long enough to need a `PING`.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    proxy.hold(true);
    let (records, tx) = (records(1..2), store.begin(&id).await?);
    let (append, commit) = tokio::join!(log.append(&records), tx.commit(advance(&log, 0)));
    ensure!(matches!(append, Err(Error::Unavailable { .. })), "{append:?}");
    ensure!(matches!(commit, Err(Error::Unavailable { .. })), "{commit:?}");
    proxy.hold(false);
    log.append(&records).await?;
    store.begin(&id).await?.commit(advance(&log, 0)).await?;
    let kept = server.command(&["XLEN", "orders"])?;
    ensure!(kept == test_servers::Reply::Int(2), "{kept:?}");
    Ok(())
}

/// Whether a call that failed did so in time.
async fn frozen<T>(what: &str, call: impl Future<Output = Result<T, Error>>, limit: Duration) -> Outcome {
    match timeout(limit, call).await {
        Err(_) => Err(format!("{what} took more than {limit:?}").into()),
        Ok(Err(error)) if error.is_transient() => Ok(()),
        Ok(Err(error)) => Err(format!("{what}: {error}").into()),
        Ok(Ok(_)) => Err(format!("{what} was answered by a frozen server").into()),
    }
}

async fn a_frozen_server_holds_up_no_call_for_long() -> Outcome {
    let time_out = Duration::from_millis(400);
    // The limits that the documentation of the timeout states. The half second allows for a busy
    // machine.
    let limit = 2 * time_out + Duration::from_millis(1_500);
    let (server, id) = (RedisServer::durable().start()?, ConsumerId::new("shipping")?);
    let redis = RedisOptions::new().timeout(time_out).connect(&server.url()).await?;
    let retention = Retention::new().max_records(1);
    let log = redis.log_with("orders", LogOptions::new().retention(retention)).await?;
    let (store, owner) = (redis.store(), Owner::draw());
    let (mut waiting, mut tx) = (log.read(Offset::ZERO).await?, store.begin(&id).await?);
    ensure!(
        timeout(Duration::from_millis(100), waiting.next(1)).await.is_err(),
        "a record"
    );
    tx.get(b"key").await?;
    for idle in [Duration::ZERO, Duration::from_millis(1_100)] {
        // An idle connection is asked first whether it is alive.
        tokio::time::sleep(idle).await;
        server.freeze();
        let (one, keys): (_, [&[u8]; 1]) = (records(0..1), [b"key"]);
        frozen("append", log.append(&one), limit).await?;
        frozen("read", log.read(Offset::ZERO), limit).await?;
        frozen("bounds", log.bounds(), limit).await?;
        frozen("readable_end", log.readable_end(), limit).await?;
        frozen("durability of the log", log.durability(), limit).await?;
        frozen("trim", log.trim(), limit).await?;
        frozen("position", store.position(&id), limit).await?;
        frozen("read_state", store.read_state(&id, &keys), limit).await?;
        frozen("pulse", store.pulse(&id), limit).await?;
        frozen("beat", store.beat(&id, owner), limit).await?;
        frozen("release", store.release(&id, owner), limit).await?;
        frozen("resolve_partial", store.resolve_partial(&id), limit).await?;
        frozen("durability of the store", store.durability(), limit).await?;
        frozen("get", store.begin(&id).await?.get(b"key"), limit).await?;
        frozen("commit", store.begin(&id).await?.commit(advance(&log, 0)), limit).await?;
        frozen("log", redis.log("others"), limit).await?;
        frozen(
            "connect",
            RedisOptions::new().timeout(time_out).connect(&server.url()),
            limit,
        )
        .await?;
        if idle == Duration::ZERO {
            frozen("next", waiting.next(1), limit + Duration::from_secs(2)).await?;
        }
        server.thaw();
        common::insist(|| store.position(&id)).await?;
        common::insist(|| log.bounds()).await?;
    }
    common::insist(|| log.append(&[])).await?;
    Ok(())
}

async fn calls_that_are_dropped_leave_no_connection() -> Outcome {
    let server = RedisServer::durable().start()?;
    let redis = Redis::connect(&server.url()).await?;
    let (log, store) = (redis.log("orders").await?, redis.store());
    log.append(&records(0..10)).await?;
    let id = ConsumerId::new("shipping")?;
    store.position(&id).await?;
    let before = clients(&server)?;
    for round in 0..60 {
        let patience = Duration::from_micros(1_000 + round * 317);
        drop(timeout(patience, log.read(Offset::ZERO)).await);
        drop(timeout(patience / 3, redis.log("orders")).await);
        drop(timeout(patience / 3, redis.store().position(&id)).await);
        // This reader waits for its next record.
        let reading = async {
            let mut reader = log.read(Offset::ZERO).await?;
            loop {
                reader.next(1).await?;
            }
        };
        let _: Result<Result<(), Error>, _> = timeout(patience, reading).await;
    }
    until_clients(&server, before).await?;
    log.append(&records(10..11)).await?;
    store.position(&id).await?;
    Ok(())
}

async fn unused_connections_are_closed() -> Outcome {
    let server = Arc::new(RedisServer::durable().start()?);
    let moved = Arc::clone(&server);
    // The clock of this runtime can be moved.
    let test = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let redis = Redis::connect(&moved.url()).await?;
            let (log, store) = (redis.log("orders").await?, redis.store());
            for n in 0..200 {
                store.position(&ConsumerId::new(format!("consumer-{n}"))?).await?;
            }
            ensure!(clients(&moved)? >= 200, "each has a connection");
            tokio::time::pause();
            tokio::time::advance(Duration::from_secs(61)).await;
            tokio::time::resume();
            until_clients(&moved, 0).await?;
            log.append(&records(0..1)).await?;
            store.position(&ConsumerId::new("consumer-7")?).await?;
            ensure!(clients(&moved)? == 2, "{} clients", clients(&moved)?);
            Ok(())
        })
    };
    tokio::task::spawn_blocking(test).await?
}

async fn handles_work_on_a_second_runtime() -> Outcome {
    let server = Arc::new(RedisServer::durable().start()?);
    let url = server.url();
    let test = move || -> Outcome {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
        let (first, second) = (runtime()?, runtime()?);
        let id = ConsumerId::new("shipping")?;
        let (log, store, mut reader) = first.block_on(async {
            let redis = Redis::connect(&url).await?;
            let (log, store) = (redis.log("orders").await?, redis.store());
            log.append(&records(0..3)).await?;
            store.position(&id).await?;
            let mut reader = log.read(Offset::ZERO).await?;
            ensure!(reader.next(1).await?.len() == 1, "one record");
            Ok::<_, Source>((log, store, reader))
        })?;
        // The first runtime still exists, and is blocked.
        let mut seen = second.block_on(used(&log, &store, &mut *reader, 0))?;
        drop(second);
        seen += first.block_on(used(&log, &store, &mut *reader, 1))?;
        drop(first);
        seen += runtime()?.block_on(used(&log, &store, &mut *reader, 2))?;
        ensure!(seen == 3, "{seen} records");
        Ok(())
    };
    tokio::task::spawn_blocking(test).await?
}

/// Uses log, reader and store, and returns the number of records read.
async fn used(
    log: &RedisLog,
    store: &RedisStore,
    reader: &mut dyn essentially_once::backend::LogReader,
    commits: u64,
) -> Result<usize, Source> {
    let limit = Duration::from_secs(5);
    let id = ConsumerId::new("shipping")?;
    timeout(limit, log.append(&records(0..1))).await??;
    timeout(limit, store.begin(&id).await?.commit(advance(log, commits))).await??;
    let position = timeout(limit, store.position(&id)).await??;
    ensure!(position.is_some(), "no position");
    Ok(timeout(limit, reader.next(1)).await??.len())
}

async fn an_older_protocol_is_spoken_where_the_url_names_it() -> Outcome {
    let server = RedisServer::durable().start()?;
    for (query, version) in [
        ("", "resp=3"),
        ("?protocol=resp2", "resp=2"),
        ("?protocol=resp3", "resp=3"),
    ] {
        let redis = Redis::connect(&format!("{}/{query}", server.url())).await?;
        let log = redis.log("orders").await?;
        log.append(&records(0..1)).await?;
        let mut reader = log.read(Offset::ZERO).await?;
        ensure!(!reader.next(10).await?.is_empty(), "nothing is there");
        let list = server.command(&["CLIENT", "LIST", "TYPE", "NORMAL"])?.text().to_owned();
        let over_tcp = list.lines().filter(|client| client.contains("addr=127.0.0.1:"));
        ensure!(
            over_tcp.clone().count() == 2 && over_tcp.clone().all(|client| client.contains(version)),
            "{query}: {list}"
        );
        drop((log, reader));
        until_clients(&server, 0).await?;
    }
    Ok(())
}
