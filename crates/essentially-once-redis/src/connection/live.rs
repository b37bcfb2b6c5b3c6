//! A connection, and whether it can take another request.

use std::{
    ops::{Deref, DerefMut},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use redis::{
    Cmd, Pipeline, PushInfo, PushKind, RedisFuture, Value,
    aio::{AsyncPushSender, ConnectionLike, MultiplexedConnection, SendError},
};
use tokio::{
    runtime::{Handle, Id},
    task::AbortHandle,
    time::Instant,
};

use crate::error::spoils_connection;

/// A connection that was idle for this long must answer a `PING` before it gets a request. Servers
/// and routers drop idle connections, some of them silently, and nobody knows whether a request
/// that was lost on one ran.
const PING_AFTER: Duration = Duration::from_secs(1);

/// How long to wait for that answer before reconnecting.
pub(crate) const PING_LIMIT: Duration = Duration::from_secs(1);

/// A connection, and the runtime that drives it.
pub(crate) struct Connection {
    pub(crate) inner: SharedConnection,
    /// Unique in this process.
    pub(crate) number: u64,
    ended: Ended,
    runtime: Option<Id>,
    used: Instant,
}

impl Connection {
    pub(crate) fn new(inner: SharedConnection, ended: Ended) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Self {
            inner,
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            ended,
            runtime: this_runtime(),
            used: Instant::now(),
        }
    }

    /// Whether it was closed, or its runtime has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.0.load(Ordering::Acquire)
    }

    /// Whether the calling task's runtime drives it. Another runtime may be blocked while this one
    /// waits.
    pub(crate) fn is_driven_here(&self) -> bool {
        self.runtime == this_runtime()
    }

    /// Whether it can take a request. Cancel-safe.
    pub(crate) async fn is_good(&mut self) -> bool {
        if self.has_ended() || !self.is_driven_here() {
            return false;
        }
        if self.idle() >= PING_AFTER {
            let ping = redis::cmd("PING");
            let answer = tokio::time::timeout(PING_LIMIT, ping.query_async::<Value>(&mut self.inner)).await;
            match answer {
                // An error reply is an answer too: the user may not run `PING`, or the server is
                // loading.
                Ok(Err(error)) if spoils_connection(&error) => return false,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
        self.touch();
        true
    }

    /// Notes that it answered just now.
    pub(crate) fn touch(&mut self) {
        self.used = Instant::now();
    }

    pub(crate) fn idle(&self) -> Duration {
        self.used.elapsed()
    }
}

/// A connection that several tasks share.
#[derive(Clone)]
pub(crate) struct SharedConnection {
    inner: MultiplexedConnection,
    /// Set if this crate started the driver. The client library ends its own drivers.
    _driver: Option<Arc<Driver>>,
}

/// Ends the task that drives a connection when the last clone of the connection is dropped, as the
/// client library does. The task could otherwise wait forever for a server that reads nothing.
struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl SharedConnection {
    /// A connection with the task that drives it.
    #[cfg(feature = "tls")]
    pub(crate) fn driven_by(inner: MultiplexedConnection, driver: AbortHandle) -> Self {
        Self {
            inner,
            _driver: Some(Arc::new(Driver(driver))),
        }
    }
}

impl From<MultiplexedConnection> for SharedConnection {
    fn from(inner: MultiplexedConnection) -> Self {
        Self { inner, _driver: None }
    }
}

impl Deref for SharedConnection {
    type Target = MultiplexedConnection;

    fn deref(&self) -> &MultiplexedConnection {
        &self.inner
    }
}

impl DerefMut for SharedConnection {
    fn deref_mut(&mut self) -> &mut MultiplexedConnection {
        &mut self.inner
    }
}

impl ConnectionLike for SharedConnection {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        self.inner.req_packed_command(command)
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        self.inner.req_packed_commands(pipeline, offset, count)
    }

    fn get_db(&self) -> i64 {
        self.inner.get_db()
    }
}

/// The runtime of the calling task.
pub(crate) fn this_runtime() -> Option<Id> {
    Handle::try_current().ok().map(|runtime| runtime.id())
}

/// Set when the task that drives a connection sees it closed, or ends.
#[derive(Clone, Default)]
pub(crate) struct Ended(Arc<AtomicBool>);

impl Ended {
    /// The end of this flag that the driving task holds.
    pub(crate) fn notice(&self) -> impl AsyncPushSender {
        Notice(self.clone())
    }
}

struct Notice(Ended);

impl AsyncPushSender for Notice {
    fn send(&self, info: PushInfo) -> Result<(), SendError> {
        if info.kind == PushKind::Disconnection {
            self.0.0.store(true, Ordering::Release);
        }
        Ok(())
    }
}

impl Drop for Notice {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Release);
    }
}
