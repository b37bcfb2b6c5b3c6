//! Logs that were deleted, edited or restored, and triggers on them.

use std::time::Duration;

use essentially_once::{Error, Log, NewRecord, OffsetStore, Outbox, backend::Transaction};
use essentially_once_sqlite::{LogOptions, Retention, Sqlite};

use super::{advance, begin, existing, numbered, open, send, send_alone, shipping, users};

#[tokio::test]
async fn an_outbox_that_was_recreated_is_another_one() {
    let (_folder, sqlite) = open().await;
    let store = sqlite.store();
    let other = Sqlite::open(sqlite.path()).await.expect("another handle").store();
    for (commits, store) in [(0, &store), (1, &other)] {
        let mut tx = store.begin(&shipping()).await.expect("begin");
        send(&mut tx, "out", "old").await;
        tx.commit(advance(commits, commits)).await.expect("commit");
    }
    let (_, producer) = numbered(&existing(&sqlite, "out").await).await;
    let user = users(&sqlite);
    user.execute_batch("DELETE FROM essentially_once_logs; DROP TABLE essentially_once_log_1")
        .expect("delete");
    let mut tx = store.begin(&shipping()).await.expect("begin");
    send(&mut tx, "out", "0").await;
    tx.commit(advance(2, 2)).await.expect("commit");
    // The row alone was deleted.
    let mut tx = other.begin(&shipping()).await.expect("begin");
    send(&mut tx, "out", "1").await;
    tx.commit(advance(3, 3)).await.expect("commit");
    let (payloads, new) = numbered(&existing(&sqlite, "out").await).await;
    assert_eq!(payloads, ["0", "1"]);
    assert_ne!(new, producer);
}

/// The advice for a file that was restored or copied: the numbers after the copy were used before.
#[tokio::test]
async fn without_its_sender_a_log_draws_another_one() {
    let (_folder, sqlite) = open().await;
    send_alone(&sqlite, "out", "0", 0).await;
    let out = existing(&sqlite, "out").await;
    let (_, before) = numbered(&out).await;
    users(&sqlite)
        .execute("UPDATE essentially_once_logs SET sender = NULL", [])
        .expect("the documented advice");
    send_alone(&sqlite, "out", "1", 1).await;
    let origins: Vec<_> = super::all(&out)
        .await
        .into_iter()
        .map(|record| record.origin.expect("an origin"))
        .collect();
    assert_eq!(*origins[0].numbering.producer(), before);
    assert_ne!(*origins[1].numbering.producer(), before);
    assert_eq!(origins[1].sequence, 1);
}

#[tokio::test]
async fn records_appended_without_a_number_leave_a_gap_in_the_sequence() {
    let (_folder, sqlite) = open().await;
    let out = sqlite.log("out").await.expect("log");
    out.append(&[NewRecord::new("a"), NewRecord::new("b")])
        .await
        .expect("append");
    send_alone(&sqlite, "out", "c", 0).await;
    out.append(&[NewRecord::new("d")]).await.expect("append");
    users(&sqlite)
        .execute("INSERT INTO essentially_once_log_1 (payload) VALUES ('e')", [])
        .expect("by hand");
    send_alone(&sqlite, "out", "f", 1).await;
    let sequences: Vec<_> = super::all(&out)
        .await
        .into_iter()
        .map(|record| record.origin.map(|origin| origin.sequence))
        .collect();
    assert_eq!(sequences, [None, None, Some(2), None, None, Some(5)]);
}

#[tokio::test]
async fn the_number_of_a_row_inserted_by_hand_is_not_used_again_when_retention_has_removed_it() {
    let (_folder, sqlite) = open().await;
    let day = Retention::new().max_age(Duration::from_secs(86_400));
    let out = sqlite.log_with("out", LogOptions::new().retention(day)).await;
    let out = out.expect("log");
    users(&sqlite)
        .execute(
            "INSERT INTO essentially_once_log_1 (appended_at, payload) VALUES (0, 'old')",
            [],
        )
        .expect("by hand");
    assert_eq!(out.trim().await.expect("trim"), 1);
    // SQLite gives the first row of an empty table the number 1.
    assert_eq!(out.bounds().await.expect("bounds").end, 2.into());
    send_alone(&sqlite, "out", "new", 0).await;
    assert_eq!(numbered(&out).await.0, ["new"]);
}

/// Otherwise the next transaction would draw another producer, and use numbers again.
#[tokio::test]
async fn a_change_of_the_logs_row_that_is_not_made_is_an_error() {
    let (_folder, sqlite) = open().await;
    send_alone(&sqlite, "out", "0", 0).await;
    users(&sqlite)
        .execute_batch("CREATE TRIGGER keep BEFORE UPDATE ON essentially_once_logs BEGIN SELECT RAISE(IGNORE); END")
        .expect("trigger");
    let mut tx = begin(&sqlite).await;
    send(&mut tx, "out", "1").await;
    let error = tx.commit(advance(1, 1)).await.expect_err("the end is not stored");
    assert!(matches!(error, Error::Failed { .. }), "{error:?}");
    assert_eq!(numbered(&existing(&sqlite, "out").await).await.0, ["0"]);
}

#[tokio::test]
async fn a_trigger_can_watch_but_not_swallow_records() {
    let (_folder, sqlite) = open().await;
    send_alone(&sqlite, "out", "0", 0).await;
    let user = users(&sqlite);
    user.execute_batch(
        "CREATE TABLE audit (sequence INTEGER);
         CREATE TRIGGER watch AFTER INSERT ON essentially_once_log_1
             BEGIN INSERT INTO audit VALUES (NEW.sequence); END;
         CREATE TRIGGER swallow BEFORE INSERT ON essentially_once_log_1 WHEN NEW.payload = CAST('bad' AS BLOB)
             BEGIN SELECT RAISE(IGNORE); END",
    )
    .expect("triggers");
    let mut tx = begin(&sqlite).await;
    let error = tx.send("out", NewRecord::new("bad")).await.expect_err("swallowed");
    assert!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("trigger"),
        "{error:?}"
    );
    let error = tx
        .send("out", NewRecord::new("fine"))
        .await
        .expect_err("only rolled back");
    assert!(error.to_string().contains("trigger"), "{error}");
    assert!(tx.commit(advance(1, 1)).await.is_err());
    send_alone(&sqlite, "out", "1", 1).await;
    let out = existing(&sqlite, "out").await;
    let error = out.append(&[NewRecord::new("bad")]).await.expect_err("swallowed");
    assert!(error.to_string().contains("trigger"), "{error}");
    assert_eq!(numbered(&out).await.0, ["0", "1"]);
    let audited: i64 = user
        .query_row("SELECT sum(sequence) FROM audit", [], |row| row.get(0))
        .expect("audit");
    assert_eq!(audited, 1);
}

#[tokio::test]
async fn the_greatest_offset_ends_a_log() {
    let (_folder, sqlite) = open().await;
    send_alone(&sqlite, "out", "0", 0).await;
    let user = users(&sqlite);
    let insert = "INSERT INTO essentially_once_log_1 (\"offset\", payload) VALUES (?1, 'by hand')";
    user.execute(insert, [i64::MAX - 2]).expect("near the end");
    send_alone(&sqlite, "out", "last", 1).await;
    let mut tx = begin(&sqlite).await;
    let error = tx.send("out", NewRecord::new("one too many")).await.expect_err("full");
    assert!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("new log"),
        "{error:?}"
    );
    drop(tx);
    let end = existing(&sqlite, "out").await.bounds().await.expect("bounds").end;
    assert_eq!(end, (i64::MAX as u64).into());
}
