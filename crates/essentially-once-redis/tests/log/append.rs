//! The contents of a log after an append, and after a failed one.

use std::time::Duration;

use essentially_once::{Error, Log, NewRecord, Offset};
use essentially_once_redis::{LogOptions, Redis, RedisLog, RedisOptions};
use test_servers::{Cut, Proxy, RedisServer, Reply};
use tokio::sync::watch;

use crate::support::{admin, numbered, orders, payloads, read, server, texts};

pub(crate) async fn ten_thousand_records_in_order() {
    let (_server, _, log) = orders().await;
    let last = log.append(&numbered(0..10_000)).await.expect("append");
    let records = read(&log, Offset::ZERO, 10_000).await;
    assert_eq!(payloads(&records), texts(0..10_000));
    assert_eq!(records.last().map(|record| record.offset), last);
    assert!(records.is_sorted_by(|a, b| a.offset < b.offset));
}

pub(crate) async fn an_acknowledged_record_survives_kills_amid_appends() {
    let (server, redis, log) = orders().await;
    let mut sent = 0;
    let mut results = Vec::new();
    for round in 0..5 {
        let (acknowledged, mut progress) = watch::channel(());
        let appending = {
            let log = log.clone();
            tokio::spawn(async move {
                let mut results = Vec::new();
                loop {
                    let batch = sent + results.len();
                    let records: Vec<_> = (0..2_500).map(|n| NewRecord::new(format!("{batch}.{n}"))).collect();
                    results.push(log.append(&records).await.map(drop));
                    if results.last().is_some_and(Result::is_err) {
                        return results;
                    }
                    acknowledged.send_replace(());
                }
            })
        };
        // Kills after the first acknowledged batch, at different stages of the next one. An error
        // here means that the appender stopped, because the previous kill broke its connection.
        let _ = progress.changed().await;
        tokio::time::sleep(Duration::from_millis(3 + 7 * round)).await;
        tokio::task::block_in_place(|| server.restart()).expect("restart");
        results.extend(appending.await.expect("the appender"));
        sent = results.len();
    }
    let log = redis.log("orders").await.expect("log");
    log.append(&[NewRecord::new("end")]).await.expect("append");
    let mut found = Vec::new();
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    while found.last().is_none_or(|last| last != "end") {
        let records = reader.next(10_000).await.expect("next");
        found.extend(payloads(&records).into_iter().map(String::from));
    }
    assert!(
        results.iter().filter(|result| result.is_ok()).count() > 0,
        "{results:?}"
    );
    let mut rest = &found[..found.len() - 1];
    for (batch, result) in results.iter().enumerate() {
        let prefix = format!("{batch}.");
        let there = rest.iter().take_while(|payload| payload.starts_with(&prefix)).count();
        let in_order = rest[..there]
            .iter()
            .enumerate()
            .all(|(n, payload)| *payload == format!("{batch}.{n}"));
        assert!(in_order, "batch {batch} was appended in part");
        match result {
            Ok(()) => assert_eq!(there, 2_500, "batch {batch} was acknowledged"),
            Err(Error::Indeterminate { .. }) => {}
            Err(error) => assert_eq!(there, 0, "batch {batch}: {error}"),
        }
        rest = &rest[there..];
    }
    assert!(
        rest.is_empty(),
        "the log has more records than were appended: {:?}",
        &rest[..1]
    );
}

pub(crate) async fn without_memory_nothing_is_appended() {
    let (server, _, log) = orders().await;
    admin(&server, &["CONFIG", "SET", "maxmemory", "1"]);
    let error = log.append(&numbered(0..5)).await.expect_err("no memory");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains("maxmemory"), "{error}");
    admin(&server, &["CONFIG", "SET", "maxmemory", "0"]);
    assert_eq!(admin(&server, &["XLEN", "orders"]), test_servers::Reply::Int(0));
    log.append(&numbered(0..1)).await.expect("with memory again");
}

pub(crate) async fn a_chunk_that_fails_leaves_those_before_it_in_doubt() {
    let (server, _, log) = orders().await;
    // Leave only a few ids.
    admin(
        &server,
        &[
            "XADD",
            "orders",
            "18446744073709551615-18446744073709551612",
            "payload",
            "first",
        ],
    );
    let error = log.append(&numbered(0..5)).await.expect_err("no id left");
    assert!(matches!(error, Error::Indeterminate { .. }), "{error}");
    assert_eq!(admin(&server, &["XLEN", "orders"]), test_servers::Reply::Int(4));
    let error = log.append(&numbered(0..5)).await.expect_err("no id left");
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    assert_eq!(admin(&server, &["XLEN", "orders"]), test_servers::Reply::Int(4));

    let again = server_with_room_for_a_chunk().await;
    let error = again.append(&numbered(0..2_500)).await.expect_err("no id left");
    assert!(matches!(error, Error::Indeterminate { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("the first 1000 of 2500 records were appended"),
        "{error}"
    );
}

/// A log with exactly a thousand ids left.
async fn server_with_room_for_a_chunk() -> impl Log {
    let (server, redis) = server().await;
    let log = redis.log("orders").await.expect("log");
    let id = format!("{}-{}", u64::MAX, u64::MAX - 1_000);
    admin(&server, &["XADD", "orders", &id, "payload", "first"]);
    // The server must outlive this function, so it lives as long as the process.
    std::mem::forget(server);
    log
}

pub(crate) async fn a_cut_connection_leaves_the_outcome_unknown() {
    let (server, _, direct) = orders().await;
    let proxy = Proxy::start(server.port()).expect("proxy");
    let redis = Redis::connect(&format!("redis://127.0.0.1:{}", proxy.port()))
        .await
        .expect("connect");
    let log = redis.log("orders").await.expect("log");
    for (cut, there) in [(Cut::BeforeRequest, 0), (Cut::BeforeReply, 3)] {
        let before = direct.bounds().await.expect("bounds").end;
        proxy.cut_at(b"XADD", cut);
        let error = log.append(&numbered(0..3)).await.expect_err("cut off");
        assert!(matches!(error, Error::Indeterminate { .. }), "{cut:?}: {error}");
        let mut found = Vec::new();
        if there > 0 {
            found = read(&direct, before, there).await;
        }
        assert_eq!(payloads(&found), texts(0..there), "{cut:?}");
        log.append(&numbered(9..10)).await.expect("over a new connection");
    }
    // The server does not answer, so the append is never sent.
    proxy.refuse(true);
    proxy.cut();
    let _ = log.append(&numbered(0..1)).await;
    let error = log.append(&numbered(0..1)).await.expect_err("no connection");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    proxy.refuse(false);
    log.append(&numbered(0..1)).await.expect("connected again");
}

pub(crate) async fn missing_replicas_leave_the_outcome_unknown() {
    let (server, _, direct) = orders().await;
    let options = RedisOptions::new().min_replicas(1, Duration::from_millis(20));
    let redis = options.connect(&server.url()).await.expect("connect");
    let log = redis.log_with("orders", LogOptions::new()).await.expect("log");
    let error = log.append(&numbered(0..3)).await.expect_err("no replica");
    assert!(matches!(error, Error::Indeterminate { .. }), "{error}");
    assert!(error.to_string().contains("only 0 of 1 replicas"), "{error}");
    assert_eq!(payloads(&read(&direct, Offset::ZERO, 3).await), texts(0..3));
}

pub(crate) async fn a_thousand_headers_are_taken_and_too_many_refused() {
    let (server, _, log) = orders().await;
    let with = |headers: usize| {
        let mut record = NewRecord::new("x");
        record.headers = (0..headers).map(|n| (format!("h{n}"), "v".into())).collect();
        record
    };
    log.append(&[with(3_000)]).await.expect("append");
    assert_eq!(read(&log, Offset::ZERO, 1).await[0].headers, with(3_000).headers);
    let error = log.append(&[with(0), with(3_001)]).await.expect_err("too many");
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    assert_eq!(admin(&server, &["XLEN", "orders"]), test_servers::Reply::Int(1));
}

pub(crate) async fn an_old_handle_never_recreates_a_deleted_stream() {
    let (server, redis, log) = orders().await;
    // This user may not give a stream an incarnation.
    let user = ["ACL", "SETUSER", "app", "on", ">pw", "~*", "+@all", "-xgroup"];
    admin(&server, &user);
    let app = Redis::connect(&format!("redis://app:pw@127.0.0.1:{}", server.port())).await;
    let app = app.expect("connect");
    // One stream exists, the first append creates another, and one has an incarnation.
    admin(&server, &["XADD", "returns", "*", "payload", "x"]);
    let unnamed = app.log("returns").await.expect("log");
    let created = app.log("invoices").await.expect("log");
    created.append(&numbered(0..1)).await.expect("append");
    let named = redis.log("orders").await.expect("log");
    for (name, log) in [
        ("returns", unnamed),
        ("invoices", created),
        ("orders", named),
        ("orders", log),
    ] {
        admin(&server, &["DEL", name]);
        let error = log.append(&numbered(0..1)).await.expect_err("it is gone");
        assert!(matches!(error, Error::Failed { .. }), "{name}: {error}");
        assert!(error.to_string().contains("open it again"), "{name}: {error}");
        assert_eq!(admin(&server, &["EXISTS", name]), Reply::Int(0), "{name}");
    }
}

/// A server that accepts values of up to 1 MiB, and a user with these permissions.
async fn with_small_values(rights: &[&str]) -> (RedisServer, RedisLog) {
    let small = RedisServer::durable().with(&[("proto-max-bulk-len", "1mb")]);
    let server = small.start().expect("a server");
    let user = ["ACL", "SETUSER", "app", "reset", "on", ">pw", "~*", "&*"];
    admin(&server, &[&user, rights].concat());
    let url = format!("redis://app:pw@127.0.0.1:{}", server.port());
    let redis = Redis::connect(&url).await.expect("connect");
    let log = redis.log("orders").await.expect("log");
    (server, log)
}

const OVER: usize = 1024 * 1024 + 1;

pub(crate) async fn a_value_over_the_servers_limit_is_refused_before_anything_is_sent() {
    let (server, log) = with_small_values(&["+@all"]).await;
    let large = [
        NewRecord::new(vec![0; OVER]),
        NewRecord::new("x").key(vec![0; OVER]),
        NewRecord::new("x").header("name", vec![0; OVER]),
        NewRecord::new("x").header("n".repeat(OVER - 2), ""),
    ];
    for large in large {
        let error = log.append(&[NewRecord::new("small"), large]).await;
        let error = error.expect_err("too large");
        assert!(
            matches!(error, Error::TooLarge { size: OVER, limit, .. } if limit == OVER - 1),
            "{error}"
        );
        assert!(error.to_string().contains("`proto-max-bulk-len`"), "{error}");
    }
    assert_eq!(admin(&server, &["XLEN", "orders"]), test_servers::Reply::Int(0));
    log.append(&[NewRecord::new(vec![0; OVER - 1])])
        .await
        .expect("as large as allowed");
}

pub(crate) async fn an_append_that_is_too_large_harms_no_other() {
    let (server, log) = with_small_values(&["+@all"]).await;
    for _ in 0..20 {
        let (small, large) = ([NewRecord::new("small")], [NewRecord::new(vec![0; 3 * OVER])]);
        let (small, large) = tokio::join!(log.append(&small), log.append(&large));
        small.expect("append");
        assert!(matches!(large, Err(Error::TooLarge { .. })), "{large:?}");
    }
    assert_eq!(admin(&server, &["XLEN", "orders"]), test_servers::Reply::Int(20));
}

pub(crate) async fn where_the_limit_is_hidden_no_append_is_misreported() {
    let (server, log) = with_small_values(&["+@all", "-config"]).await;
    let mut stored = 0;
    for round in 0..20 {
        let (first, second) = ([NewRecord::new("first")], [NewRecord::new("second")]);
        // This is below the size that the handle has learned to refuse.
        let large = [NewRecord::new(vec![0; 3 * OVER - round])];
        let (first, large, second) = tokio::join!(log.append(&first), log.append(&large), log.append(&second));
        assert!(
            matches!(large, Err(Error::Failed { .. } | Error::Indeterminate { .. })),
            "{large:?}"
        );
        let (mut sure, mut unsure) = (0, 0);
        for small in [first, second] {
            match small {
                Ok(_) => sure += 1,
                Err(Error::Indeterminate { .. }) => unsure += 1,
                Err(error) => panic!("round {round}: {error}"),
            }
        }
        let Reply::Int(length) = admin(&server, &["XLEN", "orders"]) else {
            panic!("no length")
        };
        let new = length - stored;
        assert!(
            (sure..=sure + unsure).contains(&new),
            "round {round}: {new} new, {sure} sure"
        );
        stored = length;
    }
    let error = log
        .append(&[NewRecord::new("small"), NewRecord::new(vec![0; 3 * OVER])])
        .await;
    assert!(matches!(error, Err(Error::TooLarge { .. })), "{error:?}");
    assert_eq!(admin(&server, &["XLEN", "orders"]), Reply::Int(stored));
}
