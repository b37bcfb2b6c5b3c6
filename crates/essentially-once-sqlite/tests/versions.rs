//! Files that earlier versions wrote: what is in them goes on, and a process that still runs the old version fails.

use std::{fs, path::PathBuf};

use essentially_once::{
    Consumer, ConsumerId, Handler, HandlerError, Log as _, LogId, NewRecord, Numbering, Offset, OffsetStore as _,
    Origin, Record, Revision, async_trait,
};
use essentially_once_sqlite::{Sqlite, SqliteTx};
use rusqlite::Connection;
use tempfile::TempDir;

/// A copy of the file that schema version 1 wrote; `fixtures/README.md` says what is in it.
fn schema_1() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("shop.db");
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/schema-1.db");
    fs::copy(fixture, &path).expect("copy");
    (folder, path)
}

fn consumer(name: &str) -> ConsumerId {
    ConsumerId::new(name).expect("name")
}

struct Count;

#[async_trait]
impl Handler<SqliteTx> for Count {
    async fn handle(&mut self, _: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        tx.execute("CREATE TABLE IF NOT EXISTS handled (n INTEGER)", [])?;
        tx.execute("INSERT INTO handled VALUES (1)", [])?;
        Ok(())
    }
}

#[tokio::test]
async fn positions_of_schema_1_are_kept() {
    let (_folder, path) = schema_1();
    let sqlite = Sqlite::open(&path).await.expect("open");
    let store = sqlite.store();
    for (name, next, revision, windows) in [
        ("shipping", Offset::from(250), 5, 2),
        ("billing", 90.into(), 1, 0),
        ("audit", Offset::new(7, 9), 1, 0),
    ] {
        let position = store
            .position(&consumer(name))
            .await
            .expect("position")
            .expect("it is there");
        assert_eq!(
            (position.next, position.revision),
            (next, Revision::new(0, revision)),
            "{name}"
        );
        assert_eq!((position.owner, position.passed), (None, None), "{name}");
        assert_eq!(position.windows.len(), windows, "{name}");
    }
    let audit = store
        .position(&consumer("audit"))
        .await
        .expect("position")
        .expect("some");
    assert_eq!(audit.log, LogId::new("elsewhere").expect("name"));
}

#[tokio::test]
async fn a_consumer_of_schema_1_goes_on_where_it_was_and_knows_its_duplicates() {
    let (_folder, path) = schema_1();
    let sqlite = Sqlite::open(&path).await.expect("open");
    let orders = sqlite.log("orders").await.expect("log");
    // Seen before the upgrade, and sent again after it.
    let web: Numbering = "web".parse().expect("numbering");
    let again = Origin::new(web.producer().clone(), web.epoch(), 125);
    orders
        .append(&[NewRecord::new("again").origin(again)])
        .await
        .expect("append");
    let report = Consumer::essentially_once(consumer("shipping"), orders, sqlite.store(), Count)
        .run_until_caught_up()
        .await
        .expect("run");
    assert_eq!((report.handled, report.duplicates), (50, 1), "{report}");
    let position = sqlite
        .store()
        .position(&consumer("shipping"))
        .await
        .expect("position")
        .expect("some");
    assert_eq!(position.revision.epoch(), 1, "the first new session opens an epoch");
}

/// What the old version runs at each commit.
#[tokio::test]
async fn a_process_of_schema_1_that_still_runs_fails_at_its_next_commit() {
    let (_folder, path) = schema_1();
    let old = Connection::open(&path).expect("open");
    let commit = "UPDATE main.essentially_once_positions SET revision = revision + 1 WHERE consumer = 'shipping'";
    let mut prepared = old.prepare(commit).expect("schema 1");
    drop(Sqlite::open(&path).await.expect("open"));
    let error = prepared.execute([]).expect_err("the table is gone").to_string();
    assert!(error.contains("no such table"), "{error}");
}
