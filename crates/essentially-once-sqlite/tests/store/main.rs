//! The contract of the store, in short form, and SQL in its transaction.

mod letters;
mod position;
mod sql;
mod write_lock;

use essentially_once::{
    ConsumerId, KeyValue, OffsetStore,
    backend::{Advance, LogId, Revision},
};
use essentially_once_sqlite::{Sqlite, SqliteStore, SqliteTx};
use tempfile::TempDir;

async fn open() -> (TempDir, Sqlite, SqliteStore) {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
    let store = sqlite.store();
    (folder, sqlite, store)
}

fn shipping() -> ConsumerId {
    ConsumerId::new("shipping").expect("name")
}

fn orders() -> LogId {
    LogId::new("orders").expect("name")
}

/// The revision after this many commits of one session.
fn revision(commits: u64) -> Revision {
    match commits {
        0 => Revision::NONE,
        count => Revision::new(1, count),
    }
}

fn advance(next: u64, commits: u64) -> Advance {
    let expected = revision(commits);
    Advance::new(orders(), next.into(), expected, revision(commits.saturating_add(1)))
}

async fn state(store: &SqliteStore, consumer: &ConsumerId, key: &str) -> Option<String> {
    let mut tx = store.begin(consumer).await.expect("begin");
    let value = tx.get(key.as_bytes()).await.expect("get")?;
    Some(String::from_utf8(value.to_vec()).expect("text"))
}

async fn staged(store: &SqliteStore, value: &str) -> SqliteTx {
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.put(b"k", value.as_bytes()).await.expect("put");
    tx
}
