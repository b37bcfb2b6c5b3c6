//! Tests the handler on SQLite itself, with a crash, a lost reply or a second instance at each
//! step:
//! `cargo test -p hello-sqlite`.

use std::sync::Arc;

use essentially_once::{Error, Log, NewRecord, async_trait, backend::Source};
use essentially_once_sqlite::{Sqlite, SqliteStore, rusqlite::Connection};
use essentially_once_testkit::{Backend, Capabilities, CrashFindings, CrashTest, Harness};
use tempfile::TempDir;

use crate::{Ship, TABLE};

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
    let mut rows = connection.prepare("SELECT country, count(*) FROM shipments GROUP BY country")?;
    let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.to_string())))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

#[tokio::test]
async fn each_order_is_shipped_once_whatever_fails() -> Result<(), CrashFindings> {
    let orders = ["Brazil", "Chile", "Brazil"].map(NewRecord::new);
    let test = CrashTest::native(NewFile, |_| Ship).records(orders).observe(shipments);
    let report = test.run().await?;
    assert!(report.explored.plans > 0);
    Ok(())
}
