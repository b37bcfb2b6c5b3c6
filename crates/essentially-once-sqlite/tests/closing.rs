//! Closing a file, the size of its WAL, and copying and restoring it while it is in use.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue, Log, NewRecord, Offset, OffsetStore, ReadState,
    Record, async_trait,
};
use essentially_once_sqlite::{Sqlite, SqliteOptions, SqliteTx, rusqlite::Connection};
use tempfile::TempDir;
use tracing::{Event, Metadata, Subscriber, field, span};

fn numbered(range: std::ops::Range<u64>) -> Vec<NewRecord> {
    range.map(|n| NewRecord::new(n.to_string())).collect()
}

fn counting() -> ConsumerId {
    ConsumerId::new("counting").expect("name")
}

struct Count;

#[async_trait]
impl Handler<SqliteTx> for Count {
    async fn handle(&mut self, record: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        tx.put(b"last", &record.offset.lo().to_be_bytes()).await?;
        tx.execute("CREATE TABLE IF NOT EXISTS handled (record INTEGER PRIMARY KEY)", [])?;
        tx.execute("INSERT INTO handled VALUES (?1)", [record.offset.lo() as i64])?;
        Ok(())
    }
}

async fn consume(sqlite: &Sqlite) -> Result<u64, Error> {
    let log = sqlite.log("orders").await?;
    let consumer = Consumer::essentially_once(counting(), log, sqlite.store(), Count);
    Ok(consumer.run_until_caught_up().await?.handled)
}

/// The number of handled records, according to the file at `path` alone.
fn handled(path: &Path) -> i64 {
    let copy = Connection::open(path).expect("open");
    copy.query_row("SELECT count(*) FROM handled", [], |row| row.get(0))
        .expect("handled")
}

fn sibling(path: &Path, ending: &str) -> PathBuf {
    format!("{}{ending}", path.display()).into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_closing_the_file_alone_holds_everything() {
    let folder = tempfile::tempdir().expect("folder");
    for round in 0..20 {
        let path = folder.path().join(format!("{round}.db"));
        let sqlite = Sqlite::open(&path).await.expect("open");
        let log = sqlite.log("orders").await.expect("log");
        log.append(&numbered(0..2_000)).await.expect("append");
        assert_eq!(consume(&sqlite).await.expect("run"), 2_000);
        sqlite.store().pulse(&counting()).await.expect("pulse");
        // This reader is used again only after the file was closed.
        let mut reader = log.read(Offset::ZERO).await.expect("read");
        sqlite.close().await.expect("close");
        assert!(!sibling(&path, "-wal").exists(), "no connection has it open");
        let copy = folder.path().join("copy.db");
        fs::copy(&path, &copy).expect("copy");
        assert_eq!(handled(&copy), 2_000);

        sqlite.close().await.expect("closed already");
        let store = sqlite.store();
        for error in [
            sqlite.log("orders").await.map(drop).expect_err("closed"),
            log.append(&numbered(0..1)).await.map(drop).expect_err("closed"),
            log.bounds().await.map(drop).expect_err("closed"),
            log.read(Offset::ZERO).await.map(drop).expect_err("closed"),
            reader.next(1).await.map(drop).expect_err("closed"),
            store.begin(&counting()).await.map(drop).expect_err("closed"),
            store.position(&counting()).await.map(drop).expect_err("closed"),
            store.pulse(&counting()).await.map(drop).expect_err("closed"),
            store.read_state(&counting(), &[]).await.map(drop).expect_err("closed"),
        ] {
            assert!(matches!(error, Error::Failed { .. }), "{error:?}");
            assert!(error.to_string().contains("Sqlite::close"), "{error}");
        }
    }
}

#[tokio::test]
async fn closing_waits_for_the_open_transaction() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(80));
    let sqlite = options.open(&path).await.expect("open");
    let tx = sqlite.store().begin(&counting()).await.expect("begin");
    let error = sqlite.close().await.expect_err("a transaction is open");
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    sqlite.log("orders").await.expect_err("locked");
    drop(tx);
    sqlite.log("orders").await.expect("nothing was closed");
    sqlite.close().await.expect("close");
}

#[tokio::test]
async fn closing_reports_who_keeps_the_wal() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(80));
    let sqlite = options.open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    log.append(&numbered(0..1)).await.expect("append");
    let other = Connection::open(&path).expect("open");
    other
        .execute_batch("BEGIN; SELECT count(*) FROM essentially_once_logs")
        .expect("read");
    log.append(&numbered(1..2)).await.expect("append");
    let error = sqlite.close().await.expect_err("another connection reads");
    assert!(
        matches!(error, Error::Unavailable { .. }) && error.to_string().contains("VACUUM INTO"),
        "{error}"
    );
    other.execute_batch("COMMIT").expect("end");
    let again = options.open(&path).await.expect("open");
    let log = again.log("orders").await.expect("log");
    assert_eq!(log.bounds().await.expect("bounds").end, 2.into(), "nothing is lost");
    again.close().await.expect("another connection is open but idle");
    assert_eq!(fs::metadata(sibling(&path, "-wal")).map_or(0, |wal| wal.len()), 0);
}

/// Collects the texts of warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>, Arc<AtomicU64>);

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(self.1.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        struct Text(String);
        impl field::Visit for Text {
            fn record_debug(&mut self, field: &field::Field, value: &dyn std::fmt::Debug) {
                self.0.push_str(&format!("{field}={value:?} "));
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().expect("lock").push(text.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[tokio::test]
async fn a_wal_over_its_limit_is_warned_about_while_someone_reads_and_cut_back_afterwards() {
    const LIMIT: u64 = 256 * 1024;
    let warnings = Warnings::default();
    let _logging = tracing::subscriber::set_default(warnings.clone());
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = SqliteOptions::new().wal_limit(LIMIT).open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let wal = || fs::metadata(sibling(&path, "-wal")).map_or(0, |wal| wal.len());
    let append = async || {
        let record = [NewRecord::new(vec![7; 10_000])];
        for _ in 0..100 {
            log.append(&record).await.expect("append");
        }
    };
    append().await;
    assert!(wal() <= 2 * LIMIT, "{} bytes without readers", wal());
    assert!(warnings.0.lock().expect("lock").is_empty());

    let other = Connection::open(&path).expect("open");
    other
        .execute_batch("BEGIN; SELECT count(*) FROM essentially_once_logs")
        .expect("read");
    append().await;
    append().await;
    assert!(wal() > 2 * LIMIT, "{} bytes", wal());
    let said = warnings.0.lock().expect("lock").clone();
    assert_eq!(said.len(), 1, "once a minute: {said:?}");
    assert!(
        said[0].contains("read transaction") && said[0].contains("a.db-wal"),
        "{said:?}"
    );
    other.execute_batch("COMMIT").expect("end");
    append().await;
    assert!(wal() <= 2 * LIMIT, "{} bytes afterwards", wal());
}

/// Follows the guide in the crate's documentation: copies a file while a consumer works, and
/// restores the copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_file_in_use_is_whole_and_can_be_put_back() {
    let folder: TempDir = tempfile::tempdir().expect("folder");
    let path = folder.path().join("shop.db");
    let copy = folder.path().join("copy.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    log.append(&numbered(0..3_000)).await.expect("append");
    let working = {
        let sqlite = sqlite.clone();
        tokio::spawn(async move {
            let log = sqlite.log("orders").await.expect("log");
            let consumer = Consumer::essentially_once(counting(), log, sqlite.store(), Count).max_batch(7);
            consumer.run_until_caught_up().await.expect("run")
        })
    };
    let source = path.clone();
    let target = copy.clone();
    let copying = tokio::task::spawn_blocking(move || {
        let shell = Connection::open(source).expect("open");
        shell.busy_timeout(Duration::from_secs(30)).expect("timeout");
        // Waits until the consumer is at work.
        while shell
            .query_row("SELECT count(*) FROM handled", [], |row| row.get::<_, i64>(0))
            .map_or(true, |handled| handled < 100)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        shell
            .execute("VACUUM INTO ?1", [target.to_str().expect("text")])
            .expect("copy");
    });
    copying.await.expect("no panic");
    working.await.expect("no panic");
    assert_eq!(handled(&path), 3_000);
    let at_the_copy = handled(&copy);
    assert!((100..=3_000).contains(&at_the_copy), "{at_the_copy}");

    log.append(&numbered(3_000..3_100))
        .await
        .expect("lost with the restore");
    sqlite.close().await.expect("close");
    for ending in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(sibling(&path, ending));
    }
    fs::copy(&copy, &path).expect("restore");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    assert_eq!(log.bounds().await.expect("bounds").end, 3_000.into());
    assert_eq!(consume(&sqlite).await.expect("run"), 3_000 - at_the_copy as u64);
    sqlite.close().await.expect("close");
    assert_eq!(handled(&path), 3_000);
}
