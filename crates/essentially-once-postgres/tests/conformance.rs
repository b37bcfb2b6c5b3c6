//! Runs all conformance cases of the test kit on PostgreSQL, each on a private server.

use std::{process::ExitCode, sync::Arc, time::Duration};

use essentially_once::{ConsumerId, Error, Log, Offset, async_trait, backend::Source};
use essentially_once_postgres::{LogOptions, Pg, PgOptions, PgStore, PgTx, Retention};
use essentially_once_testkit::{Backend, Capabilities, Cut, Harness, Proxy, Request, StateReader, Suite, Support};
use test_servers::PostgresServer;
use tokio::sync::OnceCell;

const RECORD_LIMIT: usize = 1024 * 1024;

fn main() -> ExitCode {
    match test_servers::postgres_bin() {
        Ok(_) => Suite::new().backend("postgres", PgHarness).run(),
        Err(why) => Suite::new().missing::<PgHarness>("postgres", &why).run(),
    }
}

struct PgHarness;

#[async_trait]
impl Harness for PgHarness {
    type Backend = Server;

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::minimal();
        capabilities.restart = Support::Yes;
        capabilities.restart_amid_transaction = Support::No(
            "a transaction ends with its connection, so its reads fail from then on, and not only at first",
        );
        capabilities.truncate = Support::Yes;
        capabilities.truncate_all = Support::Yes;
        capabilities.recreate = Support::Yes;
        capabilities.delete = Support::Yes;
        capabilities.delete_record = Support::No("records are removed from the front only, and a hole is `Truncated`");
        capabilities.remove_before = Support::Yes;
        capabilities.refuse = Support::Yes;
        capabilities.wire = Support::Yes;
        capabilities.native = Support::Yes;
        capabilities.read_state = Support::Yes;
        capabilities.consumers = Support::Yes;
        capabilities.beats = Support::Yes;
        capabilities.commits_are_cheap = Support::No("each commit is synced to the disk");
        capabilities.paced_rounds = 500;
        capabilities.malformed = Support::Yes;
        capabilities.foreign = Support::Yes;
        capabilities.tail = Support::Yes;
        capabilities.damage_letter = Support::Yes;
        capabilities.outbox = Support::Yes;
        capabilities.shared_outboxes = Support::Yes;
        capabilities.record_limit = Some(RECORD_LIMIT);
        capabilities.value_limit = Some(RECORD_LIMIT);
        capabilities.key_limit = Some(2_048);
        capabilities
    }

    async fn start(&self, _: &str) -> Result<Server, Source> {
        let server = PostgresServer::start()?;
        server.run_sql("CREATE TABLE written (name text NOT NULL)")?;
        Ok(Server {
            server,
            proxy: OnceCell::new(),
        })
    }
}

/// A private server, killed and removed when this value is dropped.
struct Server {
    server: PostgresServer,
    /// Started by the cases that cut connections. Handles opened later connect through it.
    proxy: OnceCell<Proxy>,
}

impl Server {
    /// Each caller gets its own handle, so callers only share the server, as processes do.
    async fn open(&self) -> Result<Pg, Error> {
        let options = PgOptions::new().record_limit(RECORD_LIMIT);
        match self.proxy.get() {
            Some(proxy) => {
                let url = format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port());
                options.connect(&url).await
            }
            None => options.connect(&self.server.url()).await,
        }
    }

    fn sql(&self, sql: &str) -> Result<String, Source> {
        Ok(self.server.run_sql(sql)?.trim().to_owned())
    }

    /// Runs SQL as a program that does not use this crate.
    fn append(&self, log: &str, columns: &str, values: &str) -> Result<(), Source> {
        self.sql(&format!(
            "WITH log AS (UPDATE essentially_once.logs SET next = next + 1 WHERE name = '{log}' RETURNING id, next - 1 AS place)
             INSERT INTO essentially_once.records (log, \"offset\", {columns}) SELECT id, place, {values} FROM log"
        ))
        .map(drop)
    }
}

#[async_trait]
impl Backend for Server {
    type Store = PgStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.open().await?.log(name).await?))
    }

    async fn outbox(&self, log: &str) -> Result<Arc<dyn Log>, Error> {
        self.log(log).await
    }

    async fn store(&self) -> Result<PgStore, Error> {
        Ok(self.open().await?.store())
    }

    /// Kills the server and starts it again on its files.
    async fn restart(&self) -> Result<(), Source> {
        tokio::task::block_in_place(|| self.server.restart())
    }

    async fn truncate(&self, log: &str, before: Offset) -> Result<(), Source> {
        let pg = self.open().await?;
        let with = |retention| LogOptions::new().existing().retention(retention);
        let keep = pg.log(log).await?.bounds().await?.end.lo() - before.lo();
        let retention = match keep {
            // A limit on the number keeps at least one record. A limit on the age removes all.
            0 => Retention::new().max_age(Duration::from_millis(1)),
            keep => Retention::new().max_records(keep),
        };
        let trimmed = pg.log_with(log, with(retention)).await?;
        // The last record expires a millisecond after its append.
        while trimmed.bounds().await?.earliest < before {
            trimmed.trim().await?;
        }
        pg.log_with(log, with(Retention::new())).await?;
        Ok(())
    }

    async fn recreate(&self, log: &str) -> Result<(), Source> {
        self.delete(log).await?;
        self.open().await?.log(log).await?;
        Ok(())
    }

    async fn delete(&self, log: &str) -> Result<(), Source> {
        self.sql(&format!(
            "DELETE FROM essentially_once.records WHERE log = (SELECT id FROM essentially_once.logs WHERE name = '{log}');
             DELETE FROM essentially_once.logs WHERE name = '{log}'"
        ))
        .map(drop)
    }

    /// Refuses the payload with a trigger.
    async fn refuse(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
        self.sql(&format!(
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = 'disk_full'; END $$;
             CREATE TRIGGER refuse_{hex} BEFORE INSERT ON essentially_once.records FOR EACH ROW
                 WHEN (NEW.payload = '\\x{hex}') EXECUTE FUNCTION refuse()"
        ))?;
        let _ = log;
        Ok(())
    }

    /// Only an append has an array of numbers, of which some are missing. A commit contains the
    /// other text.
    async fn cut_next(&self, request: Request, cut: Cut) -> Result<(), Source> {
        // Creates the schema, so that no later handle commits to open.
        self.open().await?;
        let start = async || Proxy::start(self.server.port());
        let pattern: &[u8] = match request {
            Request::Append => &[0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 20],
            Request::Commit => b"COMMIT\0",
        };
        self.proxy.get_or_try_init(start).await?.cut_at(pattern, cut);
        Ok(())
    }

    fn cuts(&self) -> usize {
        self.proxy.get().map_or(0, Proxy::fired)
    }

    async fn native_put(&self, tx: &mut PgTx, name: &str) -> Result<(), Error> {
        tx.queue("INSERT INTO written (name) VALUES ($1)", &[&name]).await
    }

    async fn native_count(&self, name: &str) -> Result<u64, Source> {
        Ok(self
            .sql(&format!("SELECT count(*) FROM written WHERE name = '{name}'"))?
            .parse()?)
    }

    async fn state_reader(&self) -> Result<StateReader<PgStore>, Source> {
        Ok(Arc::new(self.store().await?))
    }

    async fn append_malformed(&self, log: &str) -> Result<Vec<u8>, Source> {
        self.append(log, "headers, payload", "'no headers', '\\xff7061796c6f616400'")?;
        Ok(b"\xFFpayload\0".into())
    }

    async fn damage_letter(&self, consumer: &ConsumerId, offset: Offset) -> Result<(), Source> {
        let (hi, lo) = (offset.hi() as i64, offset.lo() as i64);
        let damaged = self.sql(&format!(
            "WITH damaged AS (UPDATE essentially_once.letters SET tries = -1
                 WHERE consumer = '{consumer}' AND offset_hi = {hi} AND offset_lo = {lo} RETURNING 1)
             SELECT count(*) FROM damaged"
        ))?;
        match &*damaged {
            "1" => Ok(()),
            rows => Err(format!("{rows} rows are of the letter at {offset}").into()),
        }
    }

    async fn append_foreign(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
        self.append(log, "payload", &format!("'\\x{hex}'"))
    }
}
