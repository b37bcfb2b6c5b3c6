//! A server that is out of memory. Reading and trimming still work, since both help to free it.

use essentially_once::{
    ConsumerId, Error, KeyValue as _, Log, Offset, OffsetStore as _, ReadState as _, backend::Owner,
};
use test_servers::Reply;

use crate::support::{admin, keeping, numbered, orders, payloads, read, read_error, soon, take, texts};

pub(crate) async fn a_full_server_is_read() {
    let (server, redis, log) = orders().await;
    log.append(&numbered(0..5_000)).await.expect("append");
    let mut early = log.read(Offset::ZERO).await.expect("read");
    assert_eq!(payloads(&take(&mut *early, 10).await), texts(0..10));
    admin(&server, &["CONFIG", "SET", "maxmemory", "1"]);
    assert_eq!(payloads(&take(&mut *early, 4_990).await), texts(10..5_000));
    assert_eq!(payloads(&read(&log, Offset::ZERO, 5_000).await), texts(0..5_000));
    let bounds = log.bounds().await.expect("bounds");
    assert_eq!(log.readable_end().await.expect("end"), bounds.end);
    assert_eq!(redis.log("orders").await.expect("opened again").id(), log.id());
    let (store, id, owner) = (redis.store(), ConsumerId::new("c").expect("a name"), Owner::draw());
    assert_eq!(store.position(&id).await.expect("position"), None);
    assert_eq!(store.read_state(&id, &[b"key"]).await.expect("state").values, [None]);
    assert_eq!(
        store.begin(&id).await.expect("begin").get(b"key").await.expect("get"),
        None
    );
    store.pulse(&id).await.expect("pulse");
    store.beat(&id, owner).await.expect("beat");
    store.release(&id, owner).await.expect("release");
    // A waiting reader wakes when the server has memory again.
    let error = log.append(&numbered(0..1)).await.expect_err("no memory");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    admin(&server, &["CONFIG", "SET", "maxmemory", "0"]);
    log.append(&numbered(5_000..5_001)).await.expect("append");
    assert_eq!(payloads(&take(&mut *early, 1).await), ["5000"]);
}

pub(crate) async fn a_full_server_is_trimmed() {
    let (server, redis, log) = orders().await;
    log.append(&numbered(0..500)).await.expect("append");
    let all = read(&log, Offset::ZERO, 500).await;
    admin(&server, &["CONFIG", "SET", "maxmemory", "1"]);
    // A refused append trims.
    let ours = keeping(&redis, 10).await;
    let error = ours.append(&numbered(500..501)).await.expect_err("no memory");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    soon(async {
        while admin(&server, &["XLEN", "orders"]) != Reply::Int(10) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    // The removal is recorded, so readers know whether they lost records.
    let after = |n: usize| all[n].offset.successor();
    assert_eq!(read(&log, after(489), 10).await, all[490..]);
    assert!(matches!(read_error(&log, after(488)).await, Error::Truncated { .. }));
    // An explicit trim works too.
    assert_eq!(keeping(&redis, 3).await.trim().await.expect("trim"), 7);
    assert_eq!(read(&log, after(496), 3).await, all[497..]);
}

pub(crate) async fn offsets_of_removed_records_are_not_used_again() {
    let (server, redis, _) = orders().await;
    // The id is far ahead of the clock, so that the clock alone would not raise it.
    let far = Offset::new(5_000_000_000_000, 7);
    admin(&server, &["XADD", "orders", "5000000000000-7", "payload", "x"]);
    let by_age = essentially_once_redis::Retention::new().max_age(std::time::Duration::from_millis(1));
    let options = essentially_once_redis::LogOptions::new().retention(by_age);
    let log = redis.log_with("orders", options).await.expect("log");
    // An id in the future never expires. In an empty stream, everything has expired.
    assert_eq!(log.trim().await.expect("trim"), 0);
    admin(&server, &["XTRIM", "orders", "MAXLEN", "0"]);
    for expected in [8, 9] {
        let last = log.append(&numbered(0..1)).await.expect("append");
        assert_eq!(last, Some(Offset::new(far.hi(), expected)));
        admin(&server, &["XTRIM", "orders", "MAXLEN", "0"]);
    }
}
