//! What a handler's transaction sends.

use std::time::Duration;

use essentially_once::{
    Epoch, Error, KeyValue, Log, NewRecord, Offset, OffsetStore, Origin, Outbox, ProducerId, backend::Transaction,
};
use essentially_once_sqlite::{LogOptions, Retention, Sqlite, SqliteOptions};
use tokio::time::{Instant, timeout};

use super::{
    SOON, advance, all, begin, existing, is_missing, numbered, open, payloads, send, send_alone, send_with, shipping,
    users,
};

#[tokio::test]
async fn a_commit_sends_records_with_its_state_and_nobody_sees_them_before() {
    let (_folder, sqlite) = open().await;
    let mut tx = begin(&sqlite).await;
    let binary: Vec<u8> = (0..=255).collect();
    let new = NewRecord::new(binary.clone())
        .key(binary.clone())
        .header("h", binary.clone())
        .header("h", "");
    tx.put(b"k", b"1").await.expect("put");
    tx.send("out", new.clone()).await.expect("send");
    tx.outbox()
        .expect("SQLite has outboxes")
        .send("out", NewRecord::new(""))
        .await
        .expect("send");
    assert!(is_missing(&sqlite, "out").await, "the transaction is still open");
    tx.commit(advance(1, 0)).await.expect("commit");

    let out = existing(&sqlite, "out").await;
    let records = all(&out).await;
    assert_eq!(records.len(), 2);
    assert_eq!(
        (&records[0].key, &records[0].headers, &records[0].payload),
        (&new.key, &new.headers, &new.payload)
    );
    for (n, record) in (0..).zip(&records) {
        let origin = record.origin.as_ref().expect("an origin");
        assert_eq!((record.offset, origin.sequence), (n.into(), n));
        assert_eq!(origin.numbering.epoch(), Epoch::STABLE);
        assert!(origin.numbering.producer().as_str().starts_with("out@"), "{origin}");
        assert!(record.appended_at.elapsed().expect("past") < SOON);
    }
    let mut tx = begin(&sqlite).await;
    assert_eq!(tx.get(b"k").await.expect("get").as_deref(), Some(&b"1"[..]));
    send(&mut tx, "out", "later").await;
    assert_eq!(
        out.bounds().await.expect("bounds").end,
        2.into(),
        "the transaction is still open"
    );
    tx.commit(advance(2, 1)).await.expect("commit");
    assert_eq!(all(&out).await[2].payload, "later");
}

#[tokio::test]
async fn a_transaction_that_does_not_commit_sends_nothing() {
    let (_folder, sqlite) = open().await;
    // It remembers logs that were created in vain.
    let store = sqlite.store();
    for logs in [&["new"][..], &["old", "new"]] {
        let mut tx = store.begin(&shipping()).await.expect("begin");
        for log in logs {
            send(&mut tx, log, "rolled back").await;
        }
        tx.rollback().await.expect("rollback");
        let mut tx = store.begin(&shipping()).await.expect("begin");
        for log in logs {
            send(&mut tx, log, "dropped").await;
        }
        drop(tx);
        let mut tx = store.begin(&shipping()).await.expect("begin");
        for log in logs {
            send(&mut tx, log, "fenced").await;
        }
        let error = tx.commit(advance(9, 7)).await.expect_err("another revision");
        assert!(matches!(error, Error::Fenced { .. }), "{error:?}");
        assert!(is_missing(&sqlite, "new").await, "not even the log");
        if logs.len() == 1 {
            send_with(&store, "old", "0", 0).await;
        }
    }
    send_with(&store, "old", "1", 1).await;
    send_with(&store, "new", "0", 2).await;
    assert_eq!(numbered(&existing(&sqlite, "old").await).await.0, ["0", "1"]);
    assert_eq!(numbered(&existing(&sqlite, "new").await).await.0, ["0"]);
}

#[tokio::test]
async fn a_savepoint_takes_its_records_back() {
    let (_folder, sqlite) = open().await;
    let mut tx = begin(&sqlite).await;
    let sql = |tx: &mut essentially_once_sqlite::SqliteTx, sql: &str| tx.execute(sql, []).map(drop).expect("SQL");
    // The log itself is taken back.
    sql(&mut tx, "SAVEPOINT a");
    send(&mut tx, "out", "undone").await;
    sql(&mut tx, "ROLLBACK TO a");
    // It gets the number of the table that was taken back.
    send(&mut tx, "other", "0").await;
    send(&mut tx, "out", "0").await;
    sql(&mut tx, "SAVEPOINT b");
    send(&mut tx, "out", "undone").await;
    send(&mut tx, "undone", "undone").await;
    sql(&mut tx, "ROLLBACK TO b");
    send(&mut tx, "out", "1").await;
    sql(&mut tx, "RELEASE b");
    send(&mut tx, "out", "2").await;
    // Nothing is sent between the last rollback and the commit.
    sql(&mut tx, "SAVEPOINT c");
    send(&mut tx, "out", "undone").await;
    send(&mut tx, "other", "undone").await;
    sql(&mut tx, "/* spelled as it may be */ rollback to c");
    tx.commit(advance(1, 0)).await.expect("commit");
    assert!(is_missing(&sqlite, "undone").await);

    let (out, other) = (existing(&sqlite, "out").await, existing(&sqlite, "other").await);
    assert_eq!(numbered(&out).await.0, ["0", "1", "2"]);
    assert_eq!(numbered(&other).await.0, ["0"]);
    // Where the logs end is stored, and needs no record.
    users(&sqlite)
        .execute_batch("DELETE FROM essentially_once_log_1; DELETE FROM essentially_once_log_2")
        .expect("delete");
    send_alone(&sqlite, "out", "3", 1).await;
    send_alone(&sqlite, "other", "1", 2).await;
    for (log, earliest) in [(&out, 3), (&other, 1)] {
        assert_eq!(log.bounds().await.expect("bounds").earliest, earliest.into());
        assert_eq!(numbered(log).await.0, [earliest.to_string()]);
    }
}

#[tokio::test]
async fn a_refused_record_is_not_sent_and_the_transaction_goes_on() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().record_limit(1_000);
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let mut tx = begin(&sqlite).await;
    let origin = Origin::new(ProducerId::new("web").expect("name"), Epoch::STABLE, 1);
    let numbered_before = NewRecord::new("x").origin(origin);
    let error = tx.send("out", numbered_before).await.expect_err("an origin");
    assert!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("Relay"),
        "{error:?}"
    );
    let error = tx.send("out", NewRecord::new(vec![1; 999]).key("ab")).await;
    assert!(
        matches!(
            error,
            Err(Error::TooLarge {
                size: 1_001,
                limit: 1_000,
                ..
            })
        ),
        "{error:?}"
    );
    for name in ["", "two words", "x\0"] {
        let error = tx.send(name, NewRecord::new("x")).await;
        assert!(matches!(error, Err(Error::InvalidName { .. })), "{error:?}");
    }
    send(&mut tx, "out", "fine").await;
    tx.commit(advance(1, 0)).await.expect("commit");
    assert_eq!(numbered(&existing(&sqlite, "out").await).await.0, ["fine"]);
}

#[tokio::test]
async fn numbers_never_start_over() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    for n in 0..3 {
        send_alone(&sqlite, "out", &n.to_string(), n).await;
    }
    let (_, producer) = numbered(&existing(&sqlite, "out").await).await;
    sqlite.close().await.expect("close");

    let sqlite = Sqlite::open(&path).await.expect("open again");
    let soon = LogOptions::new().retention(Retention::new().max_age(Duration::from_secs(1)));
    let out = sqlite.log_with("out", soon).await.expect("log");
    let age = "UPDATE essentially_once_log_1 SET appended_at = 0";
    users(&sqlite).execute(age, []).expect("age");
    assert_eq!(out.trim().await.expect("trim"), 3, "it is empty now");
    sqlite.close().await.expect("close");

    let sqlite = Sqlite::open(&path).await.expect("open again");
    send_alone(&sqlite, "out", "3", 3).await;
    send_alone(&sqlite, "out", "4", 4).await;
    let out = existing(&sqlite, "out").await;
    assert_eq!(out.bounds().await.expect("bounds").earliest, 3.into());
    assert_eq!(numbered(&out).await, (vec!["3".into(), "4".into()], producer));
}

#[tokio::test]
async fn retention_applies_to_sent_records() {
    let (_folder, sqlite) = open().await;
    let keep = LogOptions::new().retention(Retention::new().max_records(3));
    let out = sqlite.log_with("out", keep).await.expect("log");
    for n in 0..10 {
        send_alone(&sqlite, "out", &n.to_string(), n).await;
    }
    assert_eq!(out.bounds().await.expect("bounds").earliest, 7.into());
    // The records of one transaction count too.
    let mut tx = begin(&sqlite).await;
    for n in 10..20 {
        send(&mut tx, "out", &n.to_string()).await;
    }
    tx.commit(advance(10, 10)).await.expect("commit");
    assert_eq!(numbered(&out).await.0, ["17", "18", "19"]);
    // So do those before the last savepoint, whether or not the last record is one of them.
    for (commits, is_last) in [(11, true), (12, false)] {
        let mut tx = begin(&sqlite).await;
        for n in 0..300 {
            tx.execute("SAVEPOINT a", []).expect("savepoint");
            send(&mut tx, "out", &n.to_string()).await;
            if n < 299 || is_last {
                tx.execute("RELEASE a", []).expect("release");
            }
        }
        tx.commit(advance(commits, commits)).await.expect("commit");
        assert_eq!(numbered(&out).await.0, ["297", "298", "299"]);
    }
}

/// The clock stands still until every task waits. A reader that only polled would let it go on.
#[tokio::test(start_paused = true)]
async fn a_commit_wakes_the_readers_of_the_process() {
    let (_folder, sqlite) = open().await;
    let other = Sqlite::open(sqlite.path()).await.expect("another handle");
    let logs = [
        sqlite.log("out").await.expect("log"),
        other.log("out").await.expect("log"),
    ];
    for (n, log) in (0..).zip(&logs) {
        let mut reader = log.read(Offset::from(n)).await.expect("read");
        let (before, payload) = (Instant::now(), n.to_string());
        // The reader is polled first, so it waits when the transaction begins.
        let (next, ()) = tokio::join!(timeout(SOON, reader.next(9)), send_alone(&sqlite, "out", &payload, n));
        assert_eq!(payloads(&next.expect("soon").expect("next")), [payload]);
        assert_eq!(before.elapsed(), Duration::ZERO, "woken, not polled");
    }
    let mut reader = logs[1].read(2.into()).await.expect("read");
    let undone = async {
        let mut tx = begin(&sqlite).await;
        tx.execute("SAVEPOINT a", []).expect("savepoint");
        send(&mut tx, "out", "undone").await;
        tx.execute("ROLLBACK TO a", []).expect("rollback");
        send(&mut tx, "out", "2").await;
        tx.execute("RELEASE a", []).expect("release");
        tx.commit(advance(2, 2)).await.expect("commit");
    };
    let before = Instant::now();
    let (next, ()) = tokio::join!(timeout(SOON, reader.next(9)), undone);
    assert_eq!(payloads(&next.expect("soon").expect("next")), ["2"]);
    assert_eq!(before.elapsed(), Duration::ZERO, "woken, not polled");
}

#[tokio::test]
async fn many_outboxes_take_their_records_in_order() {
    let (_folder, sqlite) = open().await;
    let store = sqlite.store();
    for round in 0..2 {
        let mut tx = store.begin(&shipping()).await.expect("begin");
        // More than the cache of tables holds.
        for n in 0..600 {
            send(&mut tx, &format!("out-{}", n % 300), &(round * 600 + n).to_string()).await;
        }
        tx.commit(advance(round, round)).await.expect("commit");
    }
    let mut producers = Vec::new();
    for n in [0, 1, 299] {
        let (payloads, producer) = numbered(&existing(&sqlite, &format!("out-{n}")).await).await;
        assert_eq!(payloads, [n, n + 300, n + 600, n + 900].map(|n| n.to_string()));
        producers.push(producer);
    }
    producers.dedup();
    assert_eq!(producers.len(), 3);
}
