//! Redis under all conformance cases of the test kit, each on a private server.

use std::{process::ExitCode, sync::Arc};

use essentially_once::{Error, Log, Offset, Source, async_trait};
use essentially_once_redis::{LogOptions, Redis, RedisOptions, RedisStore, Retention};
use essentially_once_testkit::{Backend, Capabilities, Harness, Suite, Support, conformance_cases};
use test_servers::RedisServer;

const RECORD_LIMIT: usize = 1024 * 1024;

fn main() -> ExitCode {
    if let Err(why) = test_servers::redis_server() {
        return Suite::new().missing::<RedisHarness>("redis", &why).run();
    }
    let mut suite = Suite::new().backend("redis", RedisHarness { trims: Trims::Others });
    for case in conformance_cases::<RedisHarness>() {
        if case.name().starts_with("l5_") {
            let name = format!("redis_own_retention::{}", case.name());
            suite = suite.test(&name, move || {
                case.run(&RedisHarness {
                    trims: Trims::Ourselves,
                })
            });
        }
    }
    suite.run()
}

/// Who removes old records.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trims {
    Ourselves,
    Others,
}

struct RedisHarness {
    trims: Trims,
}

#[async_trait]
impl Harness for RedisHarness {
    type Backend = Server;

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::minimal();
        capabilities.restart = Support::Yes;
        capabilities.restart_amid_transaction = Support::Yes;
        capabilities.truncate = Support::Yes;
        capabilities.recreate = Support::Yes;
        capabilities.malformed = Support::Yes;
        capabilities.foreign = Support::Yes;
        capabilities.record_limit = Some(RECORD_LIMIT);
        capabilities.value_limit = Some(RECORD_LIMIT);
        capabilities
    }

    async fn start(&self, _: &str) -> Result<Server, Source> {
        let server = RedisServer::durable().start()?;
        Ok(Server {
            server,
            trims: self.trims,
        })
    }
}

/// A server of its own, killed and removed with this value.
struct Server {
    server: RedisServer,
    trims: Trims,
}

impl Server {
    /// A handle of its own for each caller: they meet in the server only, as processes do.
    async fn open(&self) -> Result<Redis, Error> {
        let options = RedisOptions::new().record_limit(RECORD_LIMIT);
        options.connect(&self.server.url()).await
    }
}

#[async_trait]
impl Backend for Server {
    type Store = RedisStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.open().await?.log(name).await?))
    }

    async fn store(&self) -> Result<RedisStore, Error> {
        Ok(self.open().await?.store())
    }

    /// Kills the server and starts it again on its files.
    async fn restart(&self) -> Result<(), Source> {
        tokio::task::block_in_place(|| self.server.restart())
    }

    async fn truncate(&self, log: &str, before: Offset) -> Result<(), Source> {
        let before = format!("{}-{}", before.hi(), before.lo());
        if self.trims == Trims::Others {
            self.server.command(&["XTRIM", log, "MINID", "=", &before])?;
            return Ok(());
        }
        let kept = self.server.command(&["XRANGE", log, &before, "+"])?.list().len();
        let retention = Retention {
            records: Some(kept as u64),
            age: None,
        };
        let options = LogOptions::new().retention(retention);
        self.open().await?.log_with(log, options).await?.trim().await?;
        Ok(())
    }

    async fn recreate(&self, log: &str) -> Result<(), Source> {
        self.server.command(&["DEL", log])?;
        self.open().await?.log(log).await?;
        Ok(())
    }

    async fn append_malformed(&self, log: &str) -> Result<Vec<u8>, Source> {
        self.server.command(&[
            b"XADD",
            log.as_bytes(),
            b"*",
            b"essentially-once",
            b"1",
            b"payload\xFF",
            b"\0",
        ])?;
        Ok(b"*4\r\n$16\r\nessentially-once\r\n$1\r\n1\r\n$8\r\npayload\xFF\r\n$1\r\n\0\r\n".into())
    }

    async fn append_foreign(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        self.server
            .command(&[b"XADD", log.as_bytes(), b"*", b"payload", payload])?;
        Ok(())
    }
}
