//! The interface of the shared tests to a backend.

use std::time::Duration;

use essentially_once::{Error, KeyValue, Log, OffsetStore, async_trait};

use crate::{Outcome, PostgresServer, RedisServer};

/// A server that can be killed. The calls block.
pub trait Server: Send + Sync + 'static {
    /// Where clients connect to.
    fn url(&self) -> String;

    /// The TCP port of 127.0.0.1 that it listens on.
    fn port(&self) -> u16;

    /// Whether it runs.
    fn is_running(&self) -> bool;

    /// Kills it with `SIGKILL`.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    fn kill(&self) -> Outcome;

    /// Ends it as a service manager would.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    fn stop(&self) -> Outcome;

    /// Starts it again on the same data and port. If it is running, it is killed first.
    ///
    /// # Errors
    /// If it does not start.
    fn restart(&self) -> Outcome;
}

macro_rules! servers {
    ($($server:ty),+) => {$(
        impl Server for $server {
            fn url(&self) -> String {
                <$server>::url(self)
            }

            fn port(&self) -> u16 {
                <$server>::port(self)
            }

            fn is_running(&self) -> bool {
                self.pid().is_some()
            }

            fn kill(&self) -> Outcome {
                <$server>::kill(self)
            }

            fn stop(&self) -> Outcome {
                <$server>::stop(self)
            }

            fn restart(&self) -> Outcome {
                <$server>::restart(self)
            }
        }
    )+};
}

servers!(PostgresServer, RedisServer);

/// A backend that has a log and a store on one server.
#[async_trait]
pub trait Backend: Sized + Send + Sync + 'static {
    /// What is killed.
    type Server: Server;
    /// The log.
    type Log: Log + Clone;
    /// The store.
    type Store: OffsetStore<Tx: KeyValue>;

    /// Bytes that are only in a request that commits.
    const COMMIT: &'static [u8];

    /// Whether a commit may still be made after its connection was cut, and then fences one that
    /// was begun in between.
    const COMMITS_LATE: bool;

    /// Starts a server that keeps what it acknowledges.
    ///
    /// # Errors
    /// If it does not start.
    fn start() -> Result<Self::Server, crate::Error>;

    /// The URL of such a server at this port of 127.0.0.1.
    fn url(port: u16) -> String;

    /// Connects, with this limit for the server's answers or with the default.
    ///
    /// # Errors
    /// Those of the backend.
    async fn connect(url: &str, timeout: Option<Duration>) -> Result<Self, Error>;

    /// Opens a log.
    ///
    /// # Errors
    /// Those of the backend.
    async fn log(&self, name: &str) -> Result<Self::Log, Error>;

    /// The store.
    fn store(&self) -> Self::Store;

    /// A payload as it is in a request, so that it is found there and in no other request.
    fn in_request(payload: &[u8]) -> Vec<u8> {
        payload.to_vec()
    }
}
