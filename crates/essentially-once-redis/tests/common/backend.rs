//! Redis as a backend of the shared tests.

use std::time::Duration;

use essentially_once::{Error, async_trait};
use essentially_once_redis::{Redis, RedisLog, RedisOptions, RedisStore};
use test_servers::{Backend, RedisServer};

pub(crate) struct OnRedis(Redis);

#[async_trait]
impl Backend for OnRedis {
    type Server = RedisServer;
    type Log = RedisLog;
    type Store = RedisStore;

    const COMMIT: &'static [u8] = b"EVALSHA\r\n";
    const COMMITS_LATE: bool = false;

    fn start() -> Result<RedisServer, test_servers::Error> {
        RedisServer::durable().start()
    }

    fn url(port: u16) -> String {
        format!("redis://127.0.0.1:{port}")
    }

    async fn connect(url: &str, timeout: Option<Duration>) -> Result<Self, Error> {
        let options = RedisOptions::new();
        let options = timeout.map_or(options.clone(), |timeout| options.timeout(timeout));
        Ok(Self(options.connect(url).await?))
    }

    async fn log(&self, name: &str) -> Result<RedisLog, Error> {
        self.0.log(name).await
    }

    fn store(&self) -> RedisStore {
        self.0.store()
    }

    /// A bulk string.
    fn in_request(payload: &[u8]) -> Vec<u8> {
        let length = format!("${}\r\n", payload.len());
        [length.as_bytes(), payload, b"\r\n"].concat()
    }
}
