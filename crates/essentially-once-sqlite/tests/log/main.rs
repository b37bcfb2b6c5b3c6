//! The contract of a log, in short form.

mod append;
mod identity;
mod reading;
mod retention;

use std::time::Duration;

use essentially_once::{Log, NewRecord, Record};
use essentially_once_sqlite::{Sqlite, SqliteLog};
use tempfile::TempDir;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(60);

async fn orders() -> (TempDir, Sqlite, SqliteLog) {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    (folder, sqlite, log)
}

fn numbered(range: std::ops::Range<u64>) -> Vec<NewRecord> {
    range.map(|n| NewRecord::new(n.to_string())).collect()
}

async fn read_to_end(log: &SqliteLog, from: u64, step: usize) -> Vec<Record> {
    let end = log.bounds().await.expect("bounds").end;
    let mut reader = log.read(from.into()).await.expect("read");
    let mut records = Vec::new();
    while records
        .last()
        .map_or(from.into(), |last: &Record| last.offset.successor())
        < end
    {
        let fetched = timeout(SOON, reader.next(step)).await.expect("soon").expect("next");
        assert!(!fetched.is_empty() && fetched.len() <= step);
        records.extend(fetched);
    }
    records
}

fn payloads(records: &[Record]) -> Vec<&str> {
    records
        .iter()
        .map(|record| str::from_utf8(&record.payload).expect("text"))
        .collect()
}
