//! PostgreSQL as a backend of the shared tests.

use std::time::Duration;

use essentially_once::{Error, async_trait};
use essentially_once_postgres::{Pg, PgLog, PgOptions, PgStore};
use test_servers::{Backend, PostgresServer};

pub(crate) struct OnPostgres(Pg);

#[async_trait]
impl Backend for OnPostgres {
    type Server = PostgresServer;
    type Log = PgLog;
    type Store = PgStore;

    const COMMIT: &'static [u8] = b"COMMIT\0";
    // The connection is cut at the reply to `BEGIN`, which is before the commit is made.
    const COMMITS_LATE: bool = true;

    fn start() -> Result<PostgresServer, test_servers::Error> {
        PostgresServer::start()
    }

    fn url(port: u16) -> String {
        format!("postgres://postgres@127.0.0.1:{port}/postgres")
    }

    async fn connect(url: &str, timeout: Option<Duration>) -> Result<Self, Error> {
        let mut options = PgOptions::new();
        if let Some(timeout) = timeout {
            options = options.timeout(timeout);
            if timeout < Duration::from_secs(10) {
                // It must be shorter.
                options = options.lock_timeout(timeout / 2);
            }
        }
        Ok(Self(options.connect(url).await?))
    }

    async fn log(&self, name: &str) -> Result<PgLog, Error> {
        self.0.log(name).await
    }

    fn store(&self) -> PgStore {
        self.0.store()
    }
}
