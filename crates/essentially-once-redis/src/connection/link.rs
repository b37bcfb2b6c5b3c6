//! Access to the server that holds one key.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use essentially_once::{Error, backend::check_size};
use tokio::sync::Mutex;

use crate::{
    connection::{
        live::{Connection, PING_LIMIT, SharedConnection},
        server::Server,
    },
    error::{is_protocol_error, spoils_connection},
};

/// Access to the server that holds one key. It connects on demand, and again after a failure.
pub(crate) struct Link {
    pub(crate) server: Arc<Server>,
    key: Vec<u8>,
    /// One per runtime.
    connections: Arc<Mutex<Vec<Connection>>>,
    /// The largest value that the server accepts; `usize::MAX` while unknown.
    value_limit: AtomicUsize,
}

/// The room that the server needs in its buffer besides a value.
const BUFFER_MARGIN: usize = 64 * 1024;

/// A connection is closed when it has not been used for this long.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

impl Link {
    pub(crate) fn new(server: Arc<Server>, key: impl Into<Vec<u8>>) -> Self {
        Self {
            server,
            key: key.into(),
            connections: Arc::default(),
            value_limit: AtomicUsize::new(usize::MAX),
        }
    }

    /// A clone of the shared connection. Never send a blocking command on it.
    ///
    /// A connection that is closed, or does not answer after it was idle, is replaced before any
    /// request is sent on it.
    pub(crate) async fn connection(&self) -> Result<SharedConnection, Error> {
        let limit = self.server.connect_limit().saturating_add(PING_LIMIT);
        self.server.within(limit, "connect", self.connected()).await
    }

    async fn connected(&self) -> Result<SharedConnection, Error> {
        let mut connections = self.connections.lock().await;
        connections.retain(|connection| !connection.has_ended());
        if let Some(at) = connections.iter().position(Connection::is_driven_here) {
            if connections[at].is_good().await {
                return Ok(connections[at].inner.clone());
            }
            connections.swap_remove(at);
        }
        let connection = self.server.open(&self.key).await?;
        if let Some(limit) = ask_value_limit(connection.inner.clone()).await {
            self.value_limit.store(limit, Ordering::Relaxed);
        }
        let (shared, number) = (connection.inner.clone(), connection.number);
        connections.push(connection);
        tokio::spawn(close_idle(Arc::downgrade(&self.connections), number));
        Ok(shared)
    }

    /// Whether it has a connection, or another task is just opening one.
    pub(crate) fn is_connected(&self) -> bool {
        let connections = self.connections.try_lock();
        connections.map_or(true, |connections| !connections.is_empty())
    }

    /// Refuses a value that the server would not accept. The server would close the connection, and
    /// every other call on it would fail.
    pub(crate) fn check_value(&self, size: usize) -> Result<(), Error> {
        let limit = self.value_limit.load(Ordering::Relaxed);
        check_size(
            "value (server settings `proto-max-bulk-len`, `client-query-buffer-limit`)",
            size,
            limit,
        )
    }

    /// Learns the limit from a refused request, given the size of its largest value. A server that
    /// shows its settings never gets here.
    pub(crate) fn learn(&self, error: &redis::RedisError, largest: usize) {
        if is_protocol_error(error) {
            self.value_limit.fetch_min(largest.saturating_sub(1), Ordering::Relaxed);
        }
    }

    /// Drops the connection if the error shows that it is unusable. The request is never sent again
    /// from here.
    pub(crate) fn check(&self, error: &redis::RedisError) {
        // A task that holds the lock is already checking the connection.
        if spoils_connection(error)
            && let Ok(mut connections) = self.connections.try_lock()
        {
            connections.retain(|connection| !connection.is_driven_here());
        }
    }
}

/// Closes the connection with this number after [`IDLE_LIMIT`] without use. The next use opens
/// another. Ends when the connection is gone for any reason.
async fn close_idle(connections: Weak<Mutex<Vec<Connection>>>, number: u64) {
    let mut pause = IDLE_LIMIT;
    loop {
        tokio::time::sleep(pause).await;
        let Some(connections) = connections.upgrade() else {
            return;
        };
        let mut connections = connections.lock().await;
        let Some(at) = connections.iter().position(|connection| connection.number == number) else {
            return;
        };
        let idle = connections[at].idle();
        if idle >= IDLE_LIMIT {
            connections.swap_remove(at);
            return;
        }
        pause = IDLE_LIMIT - idle;
    }
}

/// Asks how large a value may be; `None` if the user may not read the settings.
async fn ask_value_limit(mut connection: SharedConnection) -> Option<usize> {
    let mut command = redis::cmd("CONFIG");
    command
        .arg("GET")
        .arg(&["proto-max-bulk-len", "client-query-buffer-limit"]);
    let settings: HashMap<String, usize> = command.query_async(&mut connection).await.ok()?;
    let bulk = settings.get("proto-max-bulk-len");
    let buffer = settings.get("client-query-buffer-limit");
    let buffer = buffer.map(|bytes| bytes.saturating_sub(BUFFER_MARGIN));
    bulk.copied().into_iter().chain(buffer).min()
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("server", &self.server.to_string())
            .finish_non_exhaustive()
    }
}
