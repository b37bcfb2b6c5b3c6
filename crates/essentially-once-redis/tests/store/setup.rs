//! Server set-ups: settings, permissions, replicas, protocol.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    sync::Arc,
    time::{Duration, Instant},
};

use essentially_once::{
    Consumer, Error, Handler, HandlerError, KeyValue, Log as _, NewRecord, OffsetStore, Record, async_trait,
    backend::{Durability, Source, Transaction, Window},
};
use essentially_once_redis::{
    Redis, RedisOptions, RedisStore, RedisTx,
    redis::{self, cmd},
};
use test_servers::RedisServer;

use crate::support::{Outcome, Stage, advance, assert_error, changed, command, numbering, revision, text_of};

pub(crate) async fn settings_that_lose_data_are_named() -> Outcome {
    let stage = Stage::start().await?;
    assert_eq!(stage.store.durability().await?, Durability::Durable);
    for (settings, undo, named) in [
        ("appendfsync everysec", "appendfsync always", "set `appendfsync always`"),
        ("appendfsync no", "appendfsync always", "set `appendfsync always`"),
        (
            "no-appendfsync-on-rewrite yes",
            "no-appendfsync-on-rewrite no",
            "set `no-appendfsync-on-rewrite no`",
        ),
        (
            "maxmemory 1gb maxmemory-policy allkeys-lru",
            "maxmemory 0 maxmemory-policy noeviction",
            "`maxmemory-policy noeviction`",
        ),
        ("appendonly no", "appendonly yes", "set `appendonly yes`"),
    ] {
        stage.ask(&format!("CONFIG SET {settings}"))?;
        match stage.store.durability().await? {
            Durability::Volatile(why) => assert!(
                why.contains(named) && why.matches("set `").count() == 1,
                "{settings}: {why}"
            ),
            other => panic!("{settings}: {other:?}"),
        }
        stage.ask(&format!("CONFIG SET {undo}"))?;
    }
    stage.ask("CONFIG SET maxmemory 1gb maxmemory-policy volatile-lru")?;
    assert_eq!(stage.store.durability().await?, Durability::Durable);
    stage.ask("CONFIG SET maxmemory-policy allkeys-random appendfsync no")?;
    let replicated = RedisOptions::new()
        .min_replicas(2, Duration::from_millis(10))
        .connect(&stage.server.url())
        .await?;
    match replicated.store().durability().await? {
        Durability::Volatile(why) => {
            for part in [
                "appendfsync is no",
                "allkeys-random",
                "0 replicas are connected, and `min_replicas` requires 2",
            ] {
                assert!(why.contains(part), "{why}");
            }
        }
        other => panic!("{other:?}"),
    }
    Ok(())
}

/// A store that authenticates as a user with these permissions.
pub(crate) async fn signed_in(stage: &Stage, rights: &str) -> Result<RedisStore, Source> {
    stage.ask(&format!("ACL SETUSER app reset on >hunter2 ~* &* {rights}"))?;
    let url = format!("redis://app:hunter2@127.0.0.1:{}", stage.server.port());
    Ok(Redis::connect(&url).await?.store())
}

pub(crate) async fn a_server_that_hides_its_settings_is_unknown() -> Outcome {
    let stage = Stage::start().await?;
    let store = signed_in(&stage, "+@all -config").await?;
    match store.durability().await? {
        Durability::Unknown(why) => assert!(why.contains("grant") && why.contains("config|get"), "{why}"),
        other => panic!("{other:?}"),
    }
    let store = signed_in(&stage, "+@all -config +config|get").await?;
    assert_eq!(store.durability().await?, Durability::Durable);
    Ok(())
}

pub(crate) async fn missing_permissions_are_named() -> Outcome {
    let stage = Stage::start().await?;
    let store = signed_in(&stage, "+@all -evalsha").await?;
    assert_error!(
        store.begin(&stage.consumer).await?.commit(advance(0, 1)).await,
        Error::Failed { .. },
        "evalsha",
        "ACL SETUSER"
    );
    let store = signed_in(&stage, "+@all -hgetall").await?;
    assert_error!(
        store.position(&stage.consumer).await,
        Error::Failed { .. },
        "HGETALL",
        "ACL SETUSER"
    );
    let store = signed_in(&stage, "+@all -hget").await?;
    assert_error!(
        store.begin(&stage.consumer).await?.get(b"a").await,
        Error::Failed { .. },
        "hget",
        "ACL SETUSER"
    );
    let store = signed_in(&stage, "+@all -command").await?;
    let mut tx = store.begin(&stage.consumer).await?;
    assert_error!(
        tx.command(command("SET a 1")).await,
        Error::Failed { .. },
        "grant the user `command|info`"
    );
    // The documented permissions are enough.
    let store = signed_in(
        &stage,
        "+evalsha +eval +hget +hgetall +hmget +hset +hdel +incr +command|info +info +config|get",
    )
    .await?;
    let mut tx = store.begin(&stage.consumer).await?;
    tx.put(b"a", b"1").await?;
    tx.command(command("INCR count")).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(
        store.position(&stage.consumer).await?.map(|position| position.revision),
        Some(revision(1))
    );
    let mut tx = store.begin(&stage.consumer).await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"1"[..]));
    tx.delete(b"a").await?;
    tx.commit(advance(1, 2)).await?;
    Ok(())
}

pub(crate) async fn a_permission_missing_for_a_later_command_applies_nothing() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    for (rights, named) in [
        ("-rpush", "RPUSH"),
        ("-hset", "HSET"),
        ("-hdel", "HDEL"),
        ("resetkeys ~essentially-once:*", "ermissions to access"),
    ] {
        let store = signed_in(&stage, &format!("+@all {rights}")).await?;
        let mut tx = store.begin(&stage.consumer).await?;
        tx.delete(b"a").await?;
        tx.command(command("INCR count")).await?;
        tx.command(command("RPUSH list a")).await?;
        assert_error!(
            tx.commit(advance(1, 2)).await,
            Error::Failed { .. },
            "ACL SETUSER",
            named
        );
        assert_eq!(
            (stage.ask("DBSIZE")?.as_str(), stage.revision().await?),
            ("1", 1),
            "{rights}"
        );
    }
    Ok(())
}

pub(crate) async fn replicas_that_are_away_are_waited_for() -> Outcome {
    let stage = Stage::with(RedisOptions::new().min_replicas(1, Duration::from_secs(10))).await?;
    assert_error!(
        stage.store.durability().await,
        Error::Unavailable { .. },
        "0 replicas are connected",
        "connect more"
    );
    // A consumer that starts while the replica is down continues when it is back.
    let redis = Redis::connect(&stage.server.url()).await?;
    let log = redis.log("orders").await?;
    log.append(&[NewRecord::new("x")]).await?;
    let consumer = Consumer::essentially_once(stage.consumer.clone(), log, stage.store.clone(), Count);
    let running = tokio::spawn(
        consumer
            .min_backoff(Duration::from_millis(5))
            .max_backoff(Duration::from_millis(50))
            .run_until_caught_up(),
    );
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!running.is_finished(), "{:?}", running.await);
    let _replica = RedisServer::durable().replica_of(&stage.server).start()?;
    let report = tokio::time::timeout(Duration::from_secs(60), running).await???;
    assert_eq!(report.handled, 1, "{report}");
    assert_eq!(stage.store.durability().await?, Durability::Durable);
    // A condition that only a person can change is reported at once, with everything else that is
    // missing.
    stage.ask("CONFIG SET appendfsync no")?;
    assert!(matches!(stage.store.durability().await?, Durability::Volatile(_)));
    Ok(())
}

struct Count;

#[async_trait]
impl Handler<RedisTx> for Count {
    async fn handle(&mut self, _: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        tx.put(b"handled", b"1").await?;
        Ok(())
    }
}

pub(crate) async fn missing_replicas_leave_an_append_in_doubt() -> Outcome {
    let options = RedisOptions::new().min_replicas(1, Duration::from_millis(100));
    let stage = Stage::with(options.clone()).await?;
    assert_error!(
        stage.commit(0, [command("INCR count")]).await,
        Error::Indeterminate { .. },
        "only 0 of 1 replicas"
    );
    assert_eq!((stage.revision().await?, stage.ask("GET count")?.as_str()), (1, "1"));
    assert_error!(stage.commit(0, [command("INCR count")]).await, Error::Fenced { .. },);
    stage.ask("SCRIPT FLUSH")?;
    let replica = RedisServer::durable().replica_of(&stage.server).start()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut revision = 1;
    // Wait until the replica has caught up.
    while let Err(error) = stage.commit(revision, [command("INCR count")]).await {
        assert!(
            matches!(error, Error::Indeterminate { .. }) && Instant::now() < deadline,
            "{error}"
        );
        revision += 1;
    }
    assert_eq!(stage.store.durability().await?, Durability::Durable);
    assert_eq!(replica.command(&["GET", "count"])?.text(), (revision + 1).to_string());
    Ok(())
}

pub(crate) async fn large_transactions_are_taken() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    for number in 0..20_000_u32 {
        tx.put(&number.to_be_bytes(), b"value").await?;
        tx.delete(format!("not there {number}").as_bytes()).await?;
    }
    for number in 0..5_000 {
        tx.command(command(&format!("HINCRBY hash {} {number}", number % 100)))
            .await?;
        tx.command(command(&format!("SET key{number} {number}"))).await?;
    }
    tx.put(b"large", &vec![7; 1_000_000]).await?;
    tx.command(cmd("SET").arg("large").arg(vec![8_u8; 1_000_000]).take())
        .await?;
    tx.command(cmd("RPUSH").arg("list").arg(vec![1; 6_998]).take()).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(stage.ask("HLEN essentially-once:{c}:state")?, "20001");
    assert_eq!(stage.ask("HSTRLEN essentially-once:{c}:state large")?, "1000000");
    assert_eq!(stage.ask("STRLEN large")?, "1000000");
    assert_eq!(stage.ask("LLEN list")?, "6998");
    assert_eq!(
        stage.ask("HGET hash 99")?,
        (0..5_000).filter(|number| number % 100 == 99).sum::<u32>().to_string()
    );
    assert_eq!(stage.ask("DBSIZE")?, "5005");
    let mut tx = stage.begin().await?;
    for number in 0..20_000_u32 {
        tx.delete(&number.to_be_bytes()).await?;
    }
    tx.commit(advance(1, 2)).await?;
    assert_eq!(stage.ask("HLEN essentially-once:{c}:state")?, "1");
    Ok(())
}

pub(crate) async fn resp3_is_spoken() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    let store = Redis::connect(&format!("{}/?protocol=resp3", stage.server.url()))
        .await?
        .store();
    let mut tx = store.begin(&stage.consumer).await?;
    tx.put(b"a", b"1").await?;
    tx.command(command("INCR count")).await?;
    let windows = vec![(numbering("p"), Window::new(5))];
    tx.commit(changed(advance(0, 1), |advance| {
        advance.windows = windows;
    }))
    .await?;
    assert_eq!(
        store
            .position(&stage.consumer)
            .await?
            .expect("a position")
            .windows
            .len(),
        1
    );
    assert_eq!(store.durability().await?, Durability::Durable);
    assert_error!(
        store.begin(&stage.consumer).await?.commit(advance(0, 1)).await,
        Error::Fenced { .. },
    );
    let mut tx = store.begin(&stage.consumer).await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"1"[..]));
    tx.command(command("INCR count")).await?;
    tx.command(command("LSET list 5 x")).await?;
    assert_error!(
        tx.commit(advance(1, 2)).await,
        Error::PartiallyApplied { .. },
        "LSET list"
    );
    Ok(())
}

/// Answers each client with these bytes and closes the connection. Returns the port.
fn answering(bytes: &'static [u8]) -> Result<u16, Source> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 1024]).and_then(|_| stream.write_all(bytes));
        }
    });
    Ok(port)
}

pub(crate) async fn what_is_wrong_with_an_address_is_named() -> Outcome {
    let stage = Stage::start().await?;
    let port = stage.server.port();
    stage.ask("ACL SETUSER app reset on >hunter2 ~* &* +@all")?;
    let web = answering(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")?;
    let silent = answering(b"")?;
    for (url, lasts, parts) in [
        (
            format!("redis://app:wrong-pw@127.0.0.1:{port}"),
            true,
            ["WRONGPASS", "check the URL's user and password"],
        ),
        (
            format!("redis://app:wrong-pw@127.0.0.1:{port}?protocol=resp2"),
            true,
            ["uthentication", "check the URL's user"],
        ),
        (
            format!("redis://127.0.0.1:{port}/99"),
            true,
            ["switch database", "check the database number"],
        ),
        (
            format!("redis://127.0.0.1:{web}"),
            true,
            ["does not speak the Redis protocol", "check host and port"],
        ),
        (
            format!("redis://127.0.0.1:{silent}"),
            false,
            ["connect to", "if the port is for TLS, use rediss://"],
        ),
        (
            "redis://127.0.0.1:1".into(),
            false,
            ["connect to 127.0.0.1:1", "refused"],
        ),
    ] {
        let error = Redis::connect(&url).await.expect_err(&url);
        let text = error.to_string();
        assert_eq!(matches!(error, Error::Failed { .. }), lasts, "{url}: {text}");
        assert!(text.contains("127.0.0.1") && !text.contains("wrong-pw"), "{text}");
        for part in parts {
            assert!(text.contains(part), "{part:?} is missing in {text}");
        }
    }
    // The server requires a password, and the URL has none.
    stage.ask("ACL SETUSER default off")?;
    let error = Redis::connect(&stage.server.url()).await.expect_err("no password");
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    assert!(error.to_string().contains("put them into the URL"), "{error}");
    Ok(())
}

pub(crate) async fn a_server_without_room_for_clients_is_a_passing_error() -> Outcome {
    let stage = Stage::start().await?;
    let held = redis::Client::open(stage.server.url())?;
    let held = held.get_multiplexed_async_connection().await?;
    // One connection for the administrator.
    stage.ask("CONFIG SET maxclients 1")?;
    for query in ["", "?protocol=resp2"] {
        let full = Redis::connect(&format!("{}/{query}", stage.server.url())).await;
        // The client sees the server's message if it reads before the connection is closed.
        assert_error!(full, Error::Unavailable { .. }, "maxclients");
    }
    drop(held);
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = Redis::connect(&stage.server.url()).await {
        assert!(
            matches!(error, Error::Unavailable { .. }) && Instant::now() < deadline,
            "{error}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

pub(crate) async fn a_busy_server_is_identified_later() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    stage.ask("CONFIG SET busy-reply-threshold 10")?;
    let busy = Arc::clone(&stage);
    let script = tokio::task::spawn_blocking(move || {
        let _ = busy.server.command(&["EVAL", "while true do end", "0"]);
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    // The script must run for a while first.
    let refused = loop {
        match Redis::connect(&stage.server.url()).await {
            Err(error) => break error,
            Ok(_) => assert!(Instant::now() < deadline, "the server is never busy"),
        }
    };
    assert!(matches!(refused, Error::Unavailable { .. }), "{refused}");
    assert!(refused.to_string().contains("another client's script"), "{refused}");
    stage.ask("SCRIPT KILL")?;
    script.await?;
    Redis::connect(&stage.server.url()).await?;
    Ok(())
}

pub(crate) async fn passwords_are_never_shown() -> Outcome {
    let stage = Stage::start().await?;
    let port = stage.server.port();
    stage.ask("ACL SETUSER app reset on >hunter2 ~* &* +@all")?;
    let good = Redis::connect(&format!("redis://app:hunter2@127.0.0.1:{port}")).await?;
    let store = good.store();
    let tx = store.begin(&stage.consumer).await?;
    let mut texts = vec![format!("{good:?} {store:?} {tx:?}")];
    for url in [
        format!("redis://app:hunter2-wrong@127.0.0.1:{port}"),
        "redis://app:hunter2@no-such-host.invalid:6379".into(),
        "redis://app:hunter2@127.0.0.1:1".into(),
        "redis://app:hunter2@127.0.0.1:port".into(),
        "http://app:hunter2@127.0.0.1".into(),
    ] {
        texts.push(text_of(Redis::connect(&url).await));
    }
    stage.server.kill()?;
    texts.push(text_of(tx.commit(advance(0, 1)).await));
    texts.push(text_of(store.position(&stage.consumer).await));
    texts.push(text_of(store.durability().await));
    for text in texts {
        assert!(!text.contains("hunter2"), "{text}");
    }
    Ok(())
}

pub(crate) async fn prefixes_with_which_names_could_meet_are_refused() -> Outcome {
    let stage = Stage::start().await?;
    for prefix in ["", "{shop}", "shop:retention"] {
        let connected = RedisOptions::new().prefix(prefix).connect(&stage.server.url()).await;
        assert_error!(
            connected.map(drop),
            Error::InvalidSetting { setting: "prefix", .. },
            prefix
        );
    }
    Ok(())
}
