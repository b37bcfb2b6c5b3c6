//! Files from before logs had senders.

use essentially_once::{
    Epoch, Log as _, NewRecord, OffsetStore as _, Outbox as _, Record,
    backend::{Advance, Revision, Transaction as _},
    consumer::dead_letters,
};
use essentially_once_sqlite::{LogOptions, Retention, Sqlite, SqliteLog, rusqlite::Connection};

use super::{consumer, copy_of};

async fn records(log: &SqliteLog, from: u64, count: usize) -> Vec<Record> {
    let mut reader = log.read(from.into()).await.expect("read");
    let records = reader.next(count).await.expect("next");
    assert_eq!(records.len(), count);
    records
}

/// Opens a log, and lifts the retention that the fixture has stored.
async fn keep_all(sqlite: &Sqlite, log: &str) -> SqliteLog {
    let all = LogOptions::new().retention(Retention::new());
    sqlite.log_with(log, all).await.expect("log")
}

/// The log `events` has had 7 records, and holds none of them any more.
#[tokio::test]
async fn logs_of_schema_5_become_outboxes_that_continue_their_numbers() {
    let (_folder, path) = copy_of("schema-5.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let store = sqlite.store();
    let shipping = consumer("shipping");
    let position = store.position(&shipping).await.expect("position").expect("some");
    assert_eq!(
        (position.next, position.revision),
        (5.into(), Revision::new(19_739_537_853, 1))
    );
    let entries = position.journal.entries();
    assert_eq!(
        entries.iter().map(|entry| &*entry.by).collect::<Vec<_>>(),
        ["ann", "ben"]
    );
    assert!(position.journal.paused().is_some());
    let letters = dead_letters::list(&shipping, &store, None, 10).await.expect("list");
    assert_eq!(letters.len(), 2);
    assert_eq!(letters[0].record.payload, "order 1");
    let edit = letters[0].edit.as_ref().expect("an edit");
    assert_eq!(edit.original.payload, "bad order 1");

    let orders = sqlite.log("orders").await.expect("log");
    let events = keep_all(&sqlite, "events").await;
    let before = records(&orders, 0, 5).await;
    let mut tx = store.begin(&shipping).await.expect("begin");
    for log in ["orders", "events", "new"] {
        tx.send(log, NewRecord::new("sent")).await.expect("send");
    }
    let (log, revision) = (position.log, position.revision);
    tx.commit(Advance::new(log, 5.into(), revision, revision.next_count()))
        .await
        .expect("commit");
    let new = sqlite.log("new").await.expect("log");
    for (log, next) in [(&orders, 5), (&events, 7), (&new, 0)] {
        let sent = records(log, next, 1).await.remove(0);
        let origin = sent.origin.expect("an origin");
        assert_eq!((origin.sequence, origin.numbering.epoch()), (next, Epoch::STABLE));
        let producer = origin.numbering.producer().as_str();
        assert!(producer.starts_with(&format!("{}@", log.id().name())), "{producer}");
    }
    assert_eq!(records(&orders, 0, 6).await[..5], before, "they keep their origins");
}

/// Runs the statements of schema 5. They append without numbers, and leave the sender alone.
#[tokio::test]
async fn a_process_of_schema_5_appends_to_an_outbox_without_numbers() {
    let (_folder, path) = copy_of("schema-5.db");
    let old = Connection::open(&path).expect("open");
    let mut status = old
        .prepare(
            "SELECT next, keep_records, keep_age_ms,
                 (SELECT min(\"offset\") FROM main.essentially_once_log_2 WHERE \"offset\" >= 0),
                 (SELECT max(\"offset\") FROM main.essentially_once_log_2)
             FROM main.essentially_once_logs WHERE id = 2",
        )
        .expect("schema 5");
    let mut insert = old
        .prepare(
            "INSERT INTO main.essentially_once_log_2 \
                 (\"offset\", appended_at, key, headers, payload, producer, sequence) \
             VALUES (?1, ?2, NULL, NULL, ?3, NULL, NULL)",
        )
        .expect("schema 5");
    let mut end = old
        .prepare("UPDATE main.essentially_once_logs SET next = ?1 WHERE name = 'events'")
        .expect("schema 5");
    let mut create = old
        .prepare("INSERT INTO main.essentially_once_logs (name, incarnation, next) VALUES ('late', 'ab', 0)")
        .expect("schema 5");

    let sqlite = Sqlite::open(&path).await.expect("open");
    let (store, shipping) = (sqlite.store(), consumer("shipping"));
    let send = async || {
        let position = store.position(&shipping).await.expect("position").expect("some");
        let mut tx = store.begin(&shipping).await.expect("begin");
        tx.send("events", NewRecord::new("sent")).await.expect("send");
        let (log, revision) = (position.log, position.revision);
        tx.commit(Advance::new(log, 5.into(), revision, revision.next_count()))
            .await
            .expect("commit");
    };
    let events = keep_all(&sqlite, "events").await;
    send().await;
    let next: i64 = status.query_row([], |row| row.get(0)).expect("status");
    assert_eq!(next, 8);
    insert.execute((next, 0, &b"old"[..])).expect("insert");
    end.execute([next + 1]).expect("update");
    create.execute([]).expect("create");
    send().await;
    let records = records(&events, 7, 3).await;
    let sequences: Vec<_> = records
        .iter()
        .map(|record| record.origin.as_ref().map(|origin| origin.sequence))
        .collect();
    assert_eq!(sequences, [Some(7), None, Some(9)]);
    let numberings = [0, 2].map(|n| records[n].origin.as_ref().map(|origin| &origin.numbering));
    assert_eq!(numberings[0], numberings[1]);
}
