//! Runs all conformance cases of the test kit on Redis, each on a private server.

use std::{process::ExitCode, sync::Arc, time::Duration};

use essentially_once::{ConsumerId, Error, Log, Offset, async_trait, backend::Source};
use essentially_once_redis::{LogOptions, Redis, RedisOptions, RedisStore, RedisTx, Retention, redis};
use essentially_once_testkit::{
    Backend, Capabilities, Cut, Harness, Proxy, Request, StateReader, Suite, Support, conformance_cases,
};
use test_servers::{RedisServer, Reply, eventually};
use tokio::sync::OnceCell;

const RECORD_LIMIT: usize = 1024 * 1024;

fn main() -> ExitCode {
    if let Err(why) = test_servers::redis_server() {
        return Suite::new().missing::<RedisHarness>("redis", &why).run();
    }
    let mut suite = Suite::new().backend("redis", RedisHarness { trims: Trims::Others });
    for case in conformance_cases::<RedisHarness>() {
        if case.name().starts_with("l5_") {
            let name = format!("redis_own_retention::{}", case.name());
            let harness = RedisHarness {
                trims: Trims::Ourselves,
            };
            suite = match case.support(&harness.capabilities()) {
                Support::Yes => suite.test(&name, move || case.run(&harness)),
                Support::No(why) => suite.ignored(&name, why),
            };
        }
    }
    suite.run()
}

/// The party that removes old records.
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
        capabilities.truncate_all = match self.trims {
            Trims::Ourselves => Support::Yes,
            Trims::Others => Support::No("Redis does not report how far others have trimmed an empty stream"),
        };
        capabilities.recreate = Support::Yes;
        capabilities.delete = Support::Yes;
        capabilities.delete_record = Support::Yes;
        capabilities.remove_before = Support::Yes;
        capabilities.refuse = Support::No("an append is one script, which Redis refuses before its first write");
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
        capabilities
    }

    async fn start(&self, _: &str) -> Result<Server, Source> {
        let server = RedisServer::durable().start()?;
        Ok(Server {
            server,
            proxy: OnceCell::new(),
            trims: self.trims,
        })
    }
}

/// A private server, killed and removed when this value is dropped.
struct Server {
    server: RedisServer,
    /// Started by the cases that cut connections. Handles opened later connect through it.
    proxy: OnceCell<Proxy>,
    trims: Trims,
}

impl Server {
    /// Each caller gets its own handle, so callers only share the server, as processes do.
    async fn open(&self) -> Result<Redis, Error> {
        let options = RedisOptions::new().record_limit(RECORD_LIMIT);
        match self.proxy.get() {
            Some(proxy) => options.connect(&format!("redis://127.0.0.1:{}", proxy.port())).await,
            None => options.connect(&self.server.url()).await,
        }
    }
}

impl Server {
    /// Its clock, in milliseconds.
    fn now(&self) -> Result<u64, Source> {
        let time = self.server.command(&["TIME"])?;
        let parts: Result<Vec<u64>, _> = time.list().iter().map(|part| part.text().parse()).collect();
        match parts?[..] {
            [seconds, micros] => Ok(seconds * 1_000 + micros / 1_000),
            _ => Err("TIME returned something else than two numbers".into()),
        }
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
        if kept == 0 {
            // A limit on records keeps at least one. A limit on age can remove all.
            let retention = Retention::new().max_age(Duration::from_millis(1));
            let info = self.server.command(&["XINFO", "STREAM", log])?;
            let last = info.field("last-generated-id").and_then(|id| id.text().split_once('-'));
            let last: u64 = last.ok_or("the stream has no last id")?.0.parse()?;
            // By the server's clock, which also makes the ids.
            eventually(|| async {
                Ok(match self.now()? {
                    now if now > last + 1 => Ok(()),
                    now => Err(format!("it is {now}, and the last record is of {last}")),
                })
            })
            .await?;
            let options = LogOptions::new().retention(retention);
            self.open().await?.log_with(log, options).await?.trim().await?;
            return Ok(());
        }
        let retention = Retention::new().max_records(kept as u64);
        let options = LogOptions::new().retention(retention);
        self.open().await?.log_with(log, options).await?.trim().await?;
        Ok(())
    }

    async fn recreate(&self, log: &str) -> Result<(), Source> {
        self.delete(log).await?;
        self.open().await?.log(log).await?;
        Ok(())
    }

    async fn delete(&self, log: &str) -> Result<(), Source> {
        self.server.command(&["DEL", log])?;
        Ok(())
    }

    async fn delete_record(&self, log: &str, offset: Offset) -> Result<(), Source> {
        let id = format!("{}-{}", offset.hi(), offset.lo());
        self.server.command(&["XDEL", log, &id])?;
        Ok(())
    }

    /// Only an append contains the first pattern. A commit contains the second one, unless the
    /// server does not know its script.
    async fn cut_next(&self, request: Request, cut: Cut) -> Result<(), Source> {
        let start = async || Proxy::start(self.server.port());
        let pattern: &[u8] = match request {
            Request::Append => b"'NOMKSTREAM'",
            Request::Commit => b"EVALSHA",
        };
        self.proxy.get_or_try_init(start).await?.cut_at(pattern, cut);
        Ok(())
    }

    fn cuts(&self) -> usize {
        self.proxy.get().map_or(0, Proxy::fired)
    }

    /// An outbox is a log like any other.
    async fn outbox(&self, log: &str) -> Result<Arc<dyn Log>, Error> {
        self.log(log).await
    }

    async fn native_put(&self, tx: &mut RedisTx, name: &str) -> Result<(), Error> {
        tx.command(redis::cmd("INCR").arg(format!("written-{name}")).take())
            .await
    }

    async fn native_count(&self, name: &str) -> Result<u64, Source> {
        let reply = self.server.command(&["GET", &format!("written-{name}")])?;
        match reply.text() {
            "" => Ok(0),
            text => Ok(text.parse()?),
        }
    }

    async fn state_reader(&self) -> Result<StateReader<RedisStore>, Source> {
        Ok(Arc::new(self.store().await?))
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

    async fn damage_letter(&self, consumer: &ConsumerId, offset: Offset) -> Result<(), Source> {
        let letters = format!("essentially-once:{{{consumer}}}:letters");
        let field = format!("{:020}-{:020}", offset.hi(), offset.lo());
        match self.server.command(&["HSET", &letters, &field, "damaged"])? {
            Reply::Int(0) => Ok(()),
            other => Err(format!("{letters} has no letter {field}: HSET returned {other:?}").into()),
        }
    }

    async fn append_foreign(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        self.server
            .command(&[b"XADD", log.as_bytes(), b"*", b"payload", payload])?;
        Ok(())
    }
}
