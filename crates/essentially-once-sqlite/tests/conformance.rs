//! Runs all conformance cases of the test kit on SQLite.

use std::{process::ExitCode, sync::Arc, time::Duration};

use essentially_once::{ConsumerId, Error, Log, Offset, async_trait, backend::Source};
use essentially_once_sqlite::{
    LogOptions, Retention, Sqlite, SqliteOptions, SqliteStore, SqliteTx,
    rusqlite::{Connection, params},
};
use essentially_once_testkit::{Backend, Capabilities, Harness, StateReader, Suite, Support};
use tempfile::TempDir;

const RECORD_LIMIT: usize = 1024 * 1024;

fn main() -> ExitCode {
    Suite::new().backend("sqlite", SqliteHarness).run()
}

struct SqliteHarness;

#[async_trait]
impl Harness for SqliteHarness {
    type Backend = File;

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::minimal();
        capabilities.restart = Support::Yes;
        capabilities.restart_amid_transaction =
            Support::No("a transaction holds the lock that the next process waits for; unit tests interrupt its reads");
        capabilities.truncate = Support::Yes;
        capabilities.truncate_all = Support::Yes;
        capabilities.recreate = Support::Yes;
        capabilities.delete = Support::Yes;
        capabilities.delete_record = Support::No("records are removed from the front only, and a hole is `Truncated`");
        capabilities.remove_before = Support::Yes;
        capabilities.refuse = Support::Yes;
        capabilities.wire = Support::No("this process opens the file itself, without a wire");
        capabilities.native = Support::Yes;
        capabilities.read_state = Support::Yes;
        capabilities.consumers = Support::Yes;
        capabilities.beats = Support::Yes;
        capabilities.commits_are_cheap = Support::No("each commit is synced to the disk");
        capabilities.malformed = Support::Yes;
        capabilities.foreign = Support::Yes;
        capabilities.tail = Support::Yes;
        capabilities.damage_letter = Support::Yes;
        capabilities.outbox = Support::Yes;
        capabilities.shared_outboxes = Support::Yes;
        capabilities.record_limit = Some(RECORD_LIMIT);
        capabilities.value_limit = Some(RECORD_LIMIT);
        capabilities
    }

    async fn start(&self, _: &str) -> Result<File, Source> {
        Ok(File {
            folder: tempfile::tempdir()?,
        })
    }
}

/// A file in a temporary folder.
struct File {
    folder: TempDir,
}

impl File {
    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("test.db")
    }

    /// Opens a new handle for each caller, so that callers share only the file, as processes do.
    async fn open(&self) -> Result<Sqlite, Error> {
        SqliteOptions::new()
            .record_limit(RECORD_LIMIT)
            .busy_timeout(Duration::from_secs(30))
            .open(self.path())
            .await
    }

    /// Opens a connection for actions of a foreign program, and returns it with the name of the
    /// log's table.
    fn as_someone_else(&self, log: &str) -> Result<(Connection, String), Source> {
        let connection = Connection::open(self.path())?;
        connection.busy_timeout(Duration::from_secs(30))?;
        let find = "SELECT id FROM essentially_once_logs WHERE name = ?1";
        let id: i64 = connection.query_row(find, [log], |row| row.get(0))?;
        Ok((connection, format!("essentially_once_log_{id}")))
    }
}

#[async_trait]
impl Backend for File {
    type Store = SqliteStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.open().await?.log(name).await?))
    }

    async fn outbox(&self, log: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.open().await?.log(log).await?))
    }

    async fn store(&self) -> Result<SqliteStore, Error> {
        Ok(self.open().await?.store())
    }

    /// SQLite has no server to restart. This copies the files that a crash would leave, while work
    /// goes on, and checks that the copy is a sound database. Other tests crash the working process
    /// itself.
    async fn restart(&self) -> Result<(), Source> {
        let crashed = tempfile::tempdir()?;
        let copy = crashed.path().join("test.db");
        // The lock keeps the two files consistent, as a crash does.
        let connection = Connection::open(self.path())?;
        connection.busy_timeout(Duration::from_secs(30))?;
        connection.execute_batch("BEGIN IMMEDIATE")?;
        std::fs::copy(self.path(), &copy)?;
        std::fs::copy(self.path().with_extension("db-wal"), crashed.path().join("test.db-wal"))?;
        connection.execute_batch("ROLLBACK")?;
        let check: String = Connection::open(copy)?.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        if check != "ok" {
            return Err(format!("what a crash would leave is damaged: {check}").into());
        }
        Ok(())
    }

    async fn truncate(&self, log: &str, before: Offset) -> Result<(), Source> {
        let sqlite = self.open().await?;
        let with = |retention| LogOptions::new().existing().retention(retention);
        let keep = sqlite.log(log).await?.bounds().await?.end.lo() - before.lo();
        let retention = match keep {
            // A limit on the number keeps at least one record. A limit on the age removes all.
            0 => Retention::new().max_age(Duration::from_millis(1)),
            keep => Retention::new().max_records(keep),
        };
        let trimmed = sqlite.log_with(log, with(retention)).await?;
        tokio::time::sleep(Duration::from_millis(5)).await;
        trimmed.trim().await?;
        sqlite.log_with(log, with(Retention::new())).await?;
        Ok(())
    }

    async fn recreate(&self, log: &str) -> Result<(), Source> {
        self.delete(log).await?;
        self.open().await?.log(log).await?;
        Ok(())
    }

    async fn delete(&self, log: &str) -> Result<(), Source> {
        let (connection, table) = self.as_someone_else(log)?;
        connection.execute_batch(&format!("DROP TABLE {table}"))?;
        connection.execute("DELETE FROM essentially_once_logs WHERE name = ?1", [log])?;
        Ok(())
    }

    /// Refuses the payload with a trigger that reports a full disk.
    async fn refuse(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        let (connection, table) = self.as_someone_else(log)?;
        let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
        connection.execute_batch(&format!(
            "CREATE TRIGGER refuse_{hex} AFTER INSERT ON {table} WHEN NEW.payload = x'{hex}'
             BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        ))?;
        Ok(())
    }

    async fn native_put(&self, tx: &mut SqliteTx, name: &str) -> Result<(), Error> {
        tx.execute("CREATE TABLE IF NOT EXISTS written (name TEXT NOT NULL)", [])?;
        tx.execute("INSERT INTO written (name) VALUES (?1)", [name])?;
        Ok(())
    }

    async fn native_count(&self, name: &str) -> Result<u64, Source> {
        let connection = Connection::open(self.path())?;
        connection.busy_timeout(Duration::from_secs(30))?;
        let is_there = "SELECT count(*) FROM sqlite_schema WHERE name = 'written'";
        if connection.query_row(is_there, [], |row| row.get::<_, i64>(0))? == 0 {
            return Ok(0);
        }
        let count = "SELECT count(*) FROM written WHERE name = ?1";
        Ok(connection
            .query_row(count, [name], |row| row.get::<_, i64>(0))?
            .try_into()?)
    }

    async fn state_reader(&self) -> Result<StateReader<SqliteStore>, Source> {
        Ok(Arc::new(self.store().await?))
    }

    async fn append_malformed(&self, log: &str) -> Result<Vec<u8>, Source> {
        let (connection, table) = self.as_someone_else(log)?;
        let insert = format!("INSERT INTO {table} (headers, payload) VALUES (?1, ?2)");
        let payload = b"\xFFpayload\0";
        connection.execute(&insert, params![b"no headers", payload])?;
        Ok(payload.into())
    }

    async fn damage_letter(&self, consumer: &ConsumerId, offset: Offset) -> Result<(), Source> {
        let connection = Connection::open(self.path())?;
        connection.busy_timeout(Duration::from_secs(30))?;
        let damage = "UPDATE essentially_once_letters SET tries = 'many'
            WHERE consumer = ?1 AND offset_hi = ?2 AND offset_lo = ?3";
        let place = params![consumer.as_str(), offset.hi() as i64, offset.lo() as i64];
        match connection.execute(damage, place)? {
            1 => Ok(()),
            rows => Err(format!("{rows} rows are of the letter at {offset}").into()),
        }
    }

    async fn append_foreign(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        let (connection, table) = self.as_someone_else(log)?;
        connection.execute(&format!("INSERT INTO {table} (payload) VALUES (?1)"), [payload])?;
        Ok(())
    }
}
