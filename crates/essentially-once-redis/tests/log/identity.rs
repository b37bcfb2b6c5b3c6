//! The identity of a stream, and the permissions that it needs.

use essentially_once::{Error, Log, Offset};
use essentially_once_redis::{LogOptions, Redis, RedisOptions, Retention};
use test_servers::{RedisServer, Reply};

use crate::support::{admin, assert_waits, numbered, orders, payloads, read, read_error, server, soon, take, texts};

pub(crate) async fn a_recreated_stream_is_another_log() {
    let (server, redis, old) = orders().await;
    old.append(&numbered(0..5)).await.expect("append");
    let end = old.bounds().await.expect("bounds").end;
    let (mut waiting, mut waiting_too) = (old.read(end).await.expect("read"), old.read(end).await.expect("read"));
    assert_waits(&mut *waiting).await;

    admin(&server, &["DEL", "orders"]);
    let error = soon(waiting.next(1)).await.expect_err("the stream is gone");
    assert!(
        matches!(error, Error::OutOfRange { requested, end: left, .. } if requested == end && left == Offset::ZERO),
        "{error}"
    );
    let is_gone = |error: Error| assert!(error.to_string().contains("deleted or created again"), "{error}");
    is_gone(old.append(&numbered(0..1)).await.expect_err("gone"));
    is_gone(old.bounds().await.expect_err("gone"));
    assert_eq!(
        admin(&server, &["EXISTS", "orders"]),
        Reply::Int(0),
        "an old handle made the stream again"
    );

    let new = redis.log("orders").await.expect("log");
    assert!(!old.id().is_same_log(new.id()), "{} and {}", old.id(), new.id());
    // The new stream reuses ids of the old one.
    admin(
        &server,
        &["XADD", "orders", &format!("{}-{}", end.hi() + 1, 0), "payload", "other"],
    );
    is_gone(old.append(&numbered(0..1)).await.expect_err("gone"));
    is_gone(old.bounds().await.expect_err("gone"));
    for error in [
        soon(waiting_too.next(1)).await.expect_err("gone"),
        read_error(&old, Offset::ZERO).await,
    ] {
        assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
    }
}

pub(crate) async fn handles_of_one_stream_agree() {
    let (server, redis, log) = orders().await;
    let same = Redis::connect(&server.url())
        .await
        .expect("connect")
        .log("orders")
        .await
        .expect("log");
    assert_eq!(log.id(), same.id());
    assert_eq!(log.id().incarnation().map(str::len), Some(16));
    let other = redis.log("invoices").await.expect("log");
    assert_ne!(log.id().incarnation(), other.id().incarnation());
    // Opening a log keeps the entries of an existing stream.
    admin(&server, &["XADD", "returns", "*", "payload", "0"]);
    let returns = redis.log("returns").await.expect("log");
    assert_eq!(payloads(&read(&returns, Offset::ZERO, 1).await), ["0"]);
    tokio::task::block_in_place(|| server.restart()).expect("restart");
    let again = redis.log("returns").await.expect("log");
    assert_eq!(returns.id(), again.id());
}

pub(crate) async fn a_log_that_must_exist() {
    let (server, redis, log) = orders().await;
    let existing = LogOptions::new().existing();
    let error = redis
        .log_with("odrers", existing.clone())
        .await
        .expect_err("no such log");
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    for part in ["log odrers", "stream \"odrers\" does not exist", "check the name"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(admin(&server, &["EXISTS", "odrers"]), Reply::Int(0));
    let url = format!("{}/2", server.url().trim_end_matches('/'));
    let other = Redis::connect(&url).await.expect("connect");
    let error = other.log_with("orders", existing.clone()).await;
    let error = error.expect_err("another database").to_string();
    assert!(error.contains(" database 2:"), "{error}");
    let opened = redis.log_with("orders", existing.clone()).await.expect("log");
    assert_eq!(opened.id(), log.id());
    // A stream of another program gets an incarnation.
    admin(&server, &["XADD", "returns", "*", "payload", "x"]);
    let returns = redis.log_with("returns", existing).await.expect("log");
    assert!(returns.id().incarnation().is_some());
}

pub(crate) async fn a_lost_tail_is_out_of_range() {
    let (server, redis, log) = orders().await;
    log.append(&numbered(0..3)).await.expect("append");
    let from = copy(&server, "orders", "backup");
    log.append(&numbered(3..5)).await.expect("append");
    let end = log.bounds().await.expect("bounds").end;
    let mut waiting = log.read(end).await.expect("read");
    assert_waits(&mut *waiting).await;
    // A failover to a lagging replica has this effect.
    admin(&server, &["COPY", &from, "orders", "REPLACE"]);
    let again = redis.log("orders").await.expect("log");
    assert_eq!(log.id(), again.id());
    for error in [
        soon(waiting.next(1)).await.expect_err("lost"),
        read_error(&again, end).await,
    ] {
        assert!(
            matches!(error, Error::OutOfRange { requested, end: left, .. } if requested == end && left < end),
            "{error}"
        );
    }
}

fn copy(server: &RedisServer, from: &str, to: &str) -> String {
    admin(server, &["COPY", from, to]);
    to.into()
}

pub(crate) async fn monitoring_sees_no_lag() {
    let (server, _, log) = orders().await;
    let lag = || {
        let groups = admin(&server, &["XINFO", "GROUPS", "orders"]);
        assert_eq!(groups.list().len(), 1);
        groups.list()[0].field("lag").cloned()
    };
    assert_eq!(lag(), Some(Reply::Int(0)));
    log.append(&numbered(0..5)).await.expect("append");
    assert_eq!(lag(), Some(Reply::Nil));
}

pub(crate) async fn a_log_without_incarnation_is_not_opened_on_a_replica() {
    let (server, redis, log) = orders().await;
    admin(&server, &["XADD", "returns", "*", "payload", "x"]);
    admin(&server, &["REPLICAOF", "127.0.0.1", "1"]);
    // Without an incarnation, this handle could never distinguish two streams of this name.
    let error = redis.log("returns").await.expect_err("a replica");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert_eq!(redis.log("orders").await.expect("opened before").id(), log.id());
    admin(&server, &["REPLICAOF", "NO", "ONE"]);
    let returns = redis.log("returns").await.expect("a master again");
    assert!(returns.id().incarnation().is_some());
}

pub(crate) async fn a_key_of_another_type_fails() {
    let (server, redis) = server().await;
    admin(&server, &["SET", "orders", "x"]);
    let error = redis.log("orders").await.expect_err("no stream");
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    assert!(
        error.to_string().contains("another type") && error.to_string().contains("log orders"),
        "{error}"
    );
    // The key can also change its type while a handle is open.
    let invoices = redis.log("invoices").await.expect("log");
    let mut waiting = invoices.read(Offset::ZERO).await.expect("read");
    assert_waits(&mut *waiting).await;
    admin(&server, &["SET", "invoices", "x"]);
    for error in [
        soon(waiting.next(1)).await.expect_err("no stream"),
        read_error(&invoices, Offset::ZERO).await,
        invoices.bounds().await.expect_err("no stream"),
    ] {
        assert!(matches!(error, Error::Failed { .. }), "{error}");
    }
    invoices.append(&numbered(0..1)).await.expect_err("no stream");
    assert_eq!(admin(&server, &["GET", "invoices"]).text(), "x");
}

pub(crate) async fn a_user_who_may_only_read_reads() {
    let (server, redis) = server().await;
    let allow = ["on", ">pw", "%R~*", "+@read", "+eval_ro", "+info", "+ping"];
    admin(&server, &[&["ACL", "SETUSER", "reader"][..], &allow].concat());
    let url = format!("redis://reader:pw@127.0.0.1:{}", server.port());
    let reading = Redis::connect(&url).await.expect("connect");

    admin(&server, &["XADD", "orders", "*", "payload", "0"]);
    let unnamed = reading.log("orders").await.expect("log");
    assert_eq!(unnamed.id().incarnation(), None);
    assert_eq!(payloads(&read(&unnamed, Offset::ZERO, 1).await), ["0"]);

    let log = redis.log("orders").await.expect("log");
    let named = reading.log("orders").await.expect("log");
    assert_eq!(named.id(), log.id());
    let error = named.append(&numbered(0..1)).await.expect_err("not allowed");
    assert!(
        matches!(error, Error::Failed { .. }) && !error.to_string().contains("pw"),
        "{error}"
    );
    let mut reader = named.read(Offset::ZERO).await.expect("read");
    log.append(&numbered(1..3)).await.expect("append");
    assert_eq!(payloads(&take(&mut *reader, 3).await), texts(0..3));
    let keeping = LogOptions::new().retention(Retention::new().max_records(1));
    let trimming = reading.log_with("orders", keeping).await.expect("log");
    assert!(matches!(trimming.trim().await, Err(Error::Failed { .. })));
}

pub(crate) async fn a_user_without_scripts_learns_what_to_grant() {
    let (server, _) = server().await;
    admin(
        &server,
        &["ACL", "SETUSER", "plain", "on", ">pw", "~*", "+@all", "-@scripting"],
    );
    let url = format!("redis://plain:pw@127.0.0.1:{}", server.port());
    let redis = RedisOptions::new().connect(&url).await.expect("connect");
    let error = redis.log("orders").await.expect_err("not allowed");
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    assert!(
        error.to_string().contains("eval_ro") && error.to_string().contains("ACL SETUSER"),
        "{error}"
    );
}

pub(crate) async fn a_stream_under_another_key() {
    let (server, _) = server().await;
    let redis = Redis::connect(&format!("redis+unix://{}", server.socket().display()))
        .await
        .expect("over the socket");
    let options = LogOptions::new()
        .stream("{shop}:orders")
        .payload_field("json")
        .key_field("id")
        .retention(Retention::new().max_records(2));
    let log = redis.log_with("orders", options).await.expect("log");
    admin(
        &server,
        &["XADD", "{shop}:orders", "*", "id", "7", "json", "[]", "payload", "p"],
    );
    let record = read(&log, Offset::ZERO, 1).await.remove(0);
    assert_eq!(
        (record.key.as_deref(), &record.payload[..]),
        (Some(&b"7"[..]), &b"[]"[..])
    );
    assert_eq!(record.header("payload").map(|value| &value[..]), Some(&b"p"[..]));
    log.append(&numbered(1..4)).await.expect("append");
    log.trim().await.expect("trim");
    assert_eq!(admin(&server, &["XLEN", "{shop}:orders"]), Reply::Int(2));
    assert_eq!(
        admin(
            &server,
            &["EXISTS", "essentially-once:retention:{shop}:orders", "orders"]
        ),
        Reply::Int(1)
    );
    let error = redis
        .log_with("orders", LogOptions::new().stream("a{}"))
        .await
        .expect_err("no tag");
    assert!(matches!(error, Error::InvalidSetting { .. }), "{error}");
}
