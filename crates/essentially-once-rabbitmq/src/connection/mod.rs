//! Connections on their own runtime.
//!
//! lapin reads and writes on a thread of its own. For heartbeats and socket readiness it uses the
//! runtime that it was started on. On the caller's runtime, a handler that blocks it would stop
//! both, and the broker would close the connection.

pub(crate) mod connections;
pub(crate) mod deliveries;
pub(crate) mod endpoint;
pub(crate) mod publisher;
pub(crate) mod server;
pub(crate) mod stream;
pub(crate) mod tail;
#[cfg(feature = "tls")]
mod tls;

use std::{
    io,
    net::{Shutdown, TcpStream},
    ops::Deref,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use lapin::{ConnectionProperties, ConnectionState, ErrorKind, tcp::AsyncTcpStream, uri::AMQPUri};
use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};

/// How long the broker may take to confirm that a connection is closed before its socket is shut
/// down.
const CLOSING: Duration = Duration::from_secs(5);

/// An open connection. Dropping it closes it, even if the broker does not answer.
#[derive(Debug)]
pub(crate) struct Connection {
    inner: Arc<lapin::Connection>,
    socket: Arc<Socket>,
}

/// An open channel. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Channel {
    inner: lapin::Channel,
}

/// How to encrypt a connection.
#[cfg(feature = "tls")]
pub(crate) type Tls = Option<Arc<rustls::ClientConfig>>;
#[cfg(not(feature = "tls"))]
pub(crate) type Tls = Option<Arc<std::convert::Infallible>>;

/// Why a connection could not be opened.
pub(crate) enum Refusal {
    /// No answer within the limit.
    Silence,
    Error(lapin::Error),
}

impl Connection {
    /// Connects within the limit.
    ///
    /// Dropping the call leaves nothing behind: the attempt continues in the background, and its
    /// connection is closed.
    pub(crate) async fn open(uri: AMQPUri, tls: Tls, limit: Duration) -> Result<Self, Refusal> {
        let runtime = runtime().map_err(|error| Refusal::Error(io::Error::other(error).into()))?;
        let (sender, opened) = oneshot::channel();
        runtime.spawn(async move {
            // The caller may be gone. Then the connection is dropped, which closes it.
            let _ = sender.send(attempt(uri, tls, limit).await);
        });
        opened.await.unwrap_or(Err(Refusal::Silence))
    }

    /// Opens a channel. Dropping the call leaves none behind.
    pub(crate) async fn create_channel(&self) -> lapin::Result<Channel> {
        let connection = Arc::clone(&self.inner);
        let (sender, opened) = oneshot::channel();
        spawn(async move {
            let created = connection.create_channel().await;
            let _ = sender.send(created.map(|inner| Channel { inner }));
        })?;
        let gone = |_| Err(ErrorKind::InvalidConnectionState(ConnectionState::Closed).into());
        opened.await.unwrap_or_else(gone)
    }
}

impl Deref for Connection {
    type Target = lapin::Connection;

    fn deref(&self) -> &lapin::Connection {
        &self.inner
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let (connection, socket) = (Arc::clone(&self.inner), Arc::clone(&self.socket));
        // The runtime exists, since the connection does.
        let _ = spawn(async move {
            // An error means that it is already closed.
            let _ = timeout(CLOSING, connection.close(200, "OK".into())).await;
            socket.shut();
        });
    }
}

impl Deref for Channel {
    type Target = lapin::Channel;

    fn deref(&self) -> &lapin::Channel {
        &self.inner
    }
}

/// lapin also closes a dropped channel, but not while it waits for a reply on it.
impl Drop for Channel {
    fn drop(&mut self) {
        if !self.inner.status().connected() {
            return;
        }
        let channel = self.inner.clone();
        let _ = spawn(async move {
            let _ = timeout(CLOSING, channel.close(200, "OK".into())).await;
        });
    }
}

async fn attempt(uri: AMQPUri, tls: Tls, limit: Duration) -> Result<Connection, Refusal> {
    let socket = Arc::new(Socket::default());
    match timeout(limit, connect(uri, tls, Arc::clone(&socket))).await {
        Ok(Ok(connection)) => Ok(Connection {
            inner: Arc::new(connection),
            socket,
        }),
        Ok(Err(error)) => Err(Refusal::Error(error)),
        Err(_) => {
            // lapin's thread would wait for the broker forever.
            socket.shut();
            Err(Refusal::Silence)
        }
    }
}

async fn connect(uri: AMQPUri, tls: Tls, socket: Arc<Socket>) -> lapin::Result<lapin::Connection> {
    let properties = ConnectionProperties::default().with_connection_name("essentially-once".into());
    // lapin's own recovery stays off: the caller must judge what was in progress when a connection
    // broke.
    lapin::Connection::connector(
        uri,
        lapin::runtime::default_runtime()?,
        async move |uri: AMQPUri, runtime| {
            let (host, port) = (uri.authority.host.clone(), uri.authority.port);
            let addresses = runtime.to_socket_addrs((host, port));
            let stream = AsyncTcpStream::connect(&runtime, addresses).await?;
            if let AsyncTcpStream::Plain(stream) = &stream {
                socket.keep(duplicate(stream.get_ref())?)?;
            }
            // `into_tls` would install a provider of cryptography for the whole process.
            #[cfg(feature = "tls")]
            if let Some(config) = tls.clone() {
                return Ok(stream.into_rustls(&config.into(), &uri.authority.host).await?);
            }
            let _ = &tls;
            Ok(stream)
        },
        properties,
    )
    .await
}

/// A second handle to a connection's socket, to end whatever waits for it.
#[derive(Debug, Default)]
struct Socket {
    handle: Mutex<Option<TcpStream>>,
    is_shut: AtomicBool,
}

impl Socket {
    fn keep(&self, handle: TcpStream) -> lapin::Result<()> {
        let mut kept = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_shut.load(Ordering::Relaxed) {
            return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into());
        }
        *kept = Some(handle);
        Ok(())
    }

    /// Shuts the socket down, and any socket that is kept later.
    fn shut(&self) {
        let mut kept = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_shut.store(true, Ordering::Relaxed);
        if let Some(handle) = kept.take() {
            // An error means that the peer was faster.
            let _ = handle.shutdown(Shutdown::Both);
        }
    }
}

#[cfg(unix)]
fn duplicate(stream: &impl std::os::fd::AsFd) -> io::Result<TcpStream> {
    stream.as_fd().try_clone_to_owned().map(TcpStream::from)
}

#[cfg(windows)]
fn duplicate(stream: &impl std::os::windows::io::AsSocket) -> io::Result<TcpStream> {
    stream.as_socket().try_clone_to_owned().map(TcpStream::from)
}

/// Runs the future to its end, even if the returned handle is dropped.
pub(crate) fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> io::Result<JoinHandle<T>> {
    runtime().map(|runtime| runtime.spawn(future)).map_err(io::Error::other)
}

/// The runtime of all connections of this process: one thread, on which nothing ever blocks.
fn runtime() -> Result<&'static Handle, &'static str> {
    static RUNTIME: OnceLock<Result<Handle, String>> = OnceLock::new();
    let start = || {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        thread::Builder::new()
            .name("essentially-once-rabbitmq".into())
            .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
        Ok(handle)
    };
    let started = RUNTIME.get_or_init(|| start().map_err(|error: io::Error| error.to_string()));
    started.as_ref().map_err(String::as_str)
}
