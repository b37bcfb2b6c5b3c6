//! Records that are sent in a transaction: atomic, numbered, in order.

mod append_in;
mod relaying;
mod sending;
mod troubles;

use std::time::Duration;

use essentially_once::{
    ConsumerId, Log, NewRecord, OffsetStore, Outbox, ProducerId, Record,
    backend::{Advance, LogId, Revision, Transaction},
};
use essentially_once_sqlite::{LogOptions, Sqlite, SqliteLog, SqliteStore, SqliteTx, rusqlite::Connection};
use tempfile::TempDir;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(60);

async fn open() -> (TempDir, Sqlite) {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
    (folder, sqlite)
}

fn shipping() -> ConsumerId {
    ConsumerId::new("shipping").expect("name")
}

fn advance(next: u64, commits: u64) -> Advance {
    let revision = |commits| match commits {
        0 => Revision::NONE,
        count => Revision::new(1, count),
    };
    let orders = LogId::new("orders").expect("name");
    Advance::new(orders, next.into(), revision(commits), revision(commits + 1))
}

async fn begin(sqlite: &Sqlite) -> SqliteTx {
    sqlite.store().begin(&shipping()).await.expect("begin")
}

async fn send(tx: &mut SqliteTx, log: &str, payload: &str) {
    tx.send(log, NewRecord::new(payload.to_owned())).await.expect("send");
}

/// Sends one record in a transaction of its own. `commits` is the number of commits before it.
async fn send_alone(sqlite: &Sqlite, log: &str, payload: &str, commits: u64) {
    send_with(&sqlite.store(), log, payload, commits).await;
}

/// Like [`send_alone`], with a store that knows the logs of earlier transactions.
async fn send_with(store: &SqliteStore, log: &str, payload: &str, commits: u64) {
    let mut tx = store.begin(&shipping()).await.expect("begin");
    send(&mut tx, log, payload).await;
    tx.commit(advance(commits, commits)).await.expect("commit");
}

/// Opens a log that must exist.
async fn existing(sqlite: &Sqlite, name: &str) -> SqliteLog {
    let existing = LogOptions::new().existing();
    sqlite.log_with(name, existing).await.expect("the log exists")
}

async fn is_missing(sqlite: &Sqlite, name: &str) -> bool {
    sqlite.log_with(name, LogOptions::new().existing()).await.is_err()
}

/// Reads every record, and checks that each is numbered by its offset and none is missing. Returns
/// the payloads and the producer.
async fn numbered(log: &SqliteLog) -> (Vec<String>, ProducerId) {
    let records = all(log).await;
    let bounds = log.bounds().await.expect("bounds");
    let mut producers: Vec<_> = Vec::new();
    for (offset, record) in (bounds.earliest.lo()..).zip(&records) {
        assert_eq!(record.offset, offset.into());
        assert_eq!(record.malformed, None);
        let origin = record.origin.as_ref().expect("an origin");
        assert_eq!(origin.sequence, offset);
        assert_eq!(origin.numbering.epoch(), essentially_once::Epoch::STABLE);
        producers.push(origin.numbering.producer().clone());
    }
    producers.dedup();
    let [producer] = &producers[..] else {
        panic!("one producer, not {producers:?}")
    };
    (payloads(&records), producer.clone())
}

/// Reads every record of a log.
async fn all(log: &SqliteLog) -> Vec<Record> {
    let bounds = log.bounds().await.expect("bounds");
    let mut reader = log.read(bounds.earliest).await.expect("read");
    let mut records: Vec<Record> = Vec::new();
    while records.last().map_or(bounds.earliest, |last| last.offset.successor()) < bounds.end {
        let next = timeout(SOON, reader.next(100)).await.expect("soon");
        records.extend(next.expect("next"));
    }
    records
}

fn payloads(records: &[Record]) -> Vec<String> {
    let text = |record: &Record| String::from_utf8(record.payload.to_vec()).expect("text");
    records.iter().map(text).collect()
}

/// A connection of the user.
fn users(sqlite: &Sqlite) -> Connection {
    Connection::open(sqlite.path()).expect("open")
}
