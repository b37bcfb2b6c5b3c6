use std::{ops::Range, path::Path, thread, time::Duration};

use essentially_once::async_trait;
use essentially_once_sqlite::{
    Sqlite, SqliteStore,
    rusqlite::{Connection, TransactionBehavior},
};
use tempfile::TempDir;
use tokio::task::spawn_blocking;

use super::{Run, Sides, records};
use crate::{
    PAYLOAD, Result,
    latency::{BATCH, POLL, timing::number},
    relay::open,
    sqlite::{self, Count},
};

/// The table of a file's first log, which the loop by hand reads.
const TABLE: &str = "essentially_once_log_1";

/// Fresh files in one folder.
pub(super) struct Files {
    pub(super) folder: TempDir,
}

#[async_trait(?Send)]
impl Sides for Files {
    async fn by_hand(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let path = self.folder.path().join(name);
        let append = append(&path).await?;
        let connection = sqlite::open_by_hand(&path, 1)?;
        let Run { arrivals, stop, .. } = run.clone();
        let consuming = spawn_blocking(move || {
            sqlite::consume_by_hand(&connection, TABLE, BATCH, 1, |rows| {
                match rows.is_empty() {
                    true => thread::sleep(POLL),
                    false => arrivals.note(rows.iter().map(|(_, payload)| number(payload))),
                }
                !stop.is_cancelled()
            })
        });
        run.append(append, consuming).await
    }

    async fn ours(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let path = self.folder.path().join(name);
        let append = append(&path).await?;
        let (store, count) = counting(&path).await?;
        let log = Sqlite::open(&path).await?.log("bench").await?;
        run.consume(name, append, log, store, count).await
    }
}

/// Appends as another process does.
async fn append(path: &Path) -> Result<impl FnMut(Range<usize>) -> Result<()> + use<>> {
    let log = Sqlite::open(path).await?.log("bench").await?;
    let mut connection = open(path)?;
    Ok(move |numbers| {
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        log.append_in(&tx, &records(numbers))?;
        Ok(tx.commit()?)
    })
}

/// A store, and a handler that counts in its file.
pub(super) async fn counting(path: &Path) -> Result<(SqliteStore, Count)> {
    let store = Sqlite::open(path).await?.store();
    sqlite::create_counters(&Connection::open(path)?, 1)?;
    Ok((store, Count::new(1, PAYLOAD.len())))
}
