//! Crash tests of handlers on SQLite.

use std::sync::Arc;

use essentially_once::{Error, Handler, HandlerError, Log, NewRecord, Record, async_trait, backend::Source};
use essentially_once_sqlite::{Sqlite, SqliteStore, SqliteTx, rusqlite::Connection};
use essentially_once_testkit::{Backend, Capabilities, CrashFindings, CrashTest, Harness, Ledger, Mistake, Probe};
use tempfile::TempDir;

const TABLE: &str = "CREATE TABLE shipped (offset TEXT PRIMARY KEY, total TEXT NOT NULL)";

/// How many plans a test runs. Each makes a file.
const PLANS: usize = 20;

/// Each run begins with a new file.
struct NewFile;

struct Shop {
    sqlite: Sqlite,
    _folder: TempDir,
}

#[async_trait]
impl Harness for NewFile {
    type Backend = Shop;

    fn capabilities(&self) -> Capabilities {
        Capabilities::minimal()
    }

    async fn start(&self, _: &str) -> Result<Shop, Source> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("shop.db");
        Connection::open(&path)?.execute_batch(TABLE)?;
        Ok(Shop {
            sqlite: Sqlite::open(path).await?,
            _folder: folder,
        })
    }
}

#[async_trait]
impl Backend for Shop {
    type Store = SqliteStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.sqlite.log(name).await?))
    }

    async fn store(&self) -> Result<SqliteStore, Error> {
        Ok(self.sqlite.store())
    }
}

/// What is compared after each run.
async fn shipments(shop: &Shop) -> Result<Vec<(String, String)>, Source> {
    let connection = Connection::open(shop.sqlite.path())?;
    let mut rows = connection.prepare("SELECT offset, total FROM shipped")?;
    let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Writes the running total beside each order. It keeps the total in memory, and resets it or not.
struct Totals {
    total: Option<i64>,
    resets: bool,
}

#[async_trait]
impl Handler<SqliteTx> for Totals {
    async fn handle(&mut self, order: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        let before = match self.total {
            Some(total) => total,
            None => tx.query("SELECT count(*) FROM shipped", [], |row| row.get(0))?[0],
        };
        self.total = Some(before + 1);
        let row = [order.offset.to_string(), (before + 1).to_string()];
        tx.execute("INSERT INTO shipped (offset, total) VALUES (?1, ?2)", row)?;
        Ok(())
    }

    async fn reset(&mut self) {
        if self.resets {
            self.total = None;
        }
    }
}

/// Ships, and sends mail outside the transaction.
struct Mail(Probe);

#[async_trait]
impl Handler<SqliteTx> for Mail {
    async fn handle(&mut self, order: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        let row = [order.offset.to_string()];
        tx.execute("INSERT INTO shipped (offset, total) VALUES (?1, 'mailed')", row)?;
        self.0.call("POST /mail");
        Ok(())
    }
}

fn test(resets: bool) -> CrashTest<NewFile> {
    CrashTest::native(NewFile, move |_| Totals { total: None, resets })
        .records(orders())
        .limit(PLANS)
        .observe(shipments)
}

fn orders() -> [NewRecord; 3] {
    ["Brazil", "Chile", "Brazil"].map(NewRecord::new)
}

async fn finds(test: CrashTest<NewFile>, mistake: Mistake) {
    let found = test.seed(3).run().await.expect_err("nothing was found");
    let only = found.findings.iter().all(|finding| finding.mistake == mistake);
    assert!(only, "{found}");
}

#[tokio::test]
async fn a_portable_handler_passes() -> Result<(), CrashFindings> {
    let test = CrashTest::on(NewFile, |_| Ledger).limit(PLANS);
    test.records(orders()).run().await?;
    Ok(())
}

#[tokio::test]
async fn a_handler_with_sql_passes() -> Result<(), CrashFindings> {
    test(true).run().await?;
    Ok(())
}

#[tokio::test]
async fn a_total_that_is_not_reset_is_found() {
    finds(test(false), Mistake::KeptInMemory).await;
}

#[tokio::test]
async fn a_call_outside_the_transaction_is_found() {
    let test = CrashTest::native(NewFile, |probe| Mail(probe.clone()));
    let test = test.records(orders()).limit(PLANS).observe(shipments);
    finds(test, Mistake::EffectRepeated).await;
}
