//! A TCP proxy that cuts connections at chosen moments, between a backend's client and its server.

use std::{
    fmt,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use essentially_once::backend::Source;

/// How much of what a connection sent is remembered, to find a pattern that came in pieces.
const TAIL: usize = 4096;

/// When [`Proxy::cut_at`] cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The request is not passed on: the server did not see it.
    BeforeRequest,
    /// The request is passed on, and the client is cut off when the server has begun to reply: it was done, and the client does not know.
    ///
    /// Exact for a client that has one request under way on a connection. Of several, it may be the reply to an earlier one
    /// that shows first; the server still gets, and does, whatever the client had sent.
    BeforeReply,
}

/// Stands between clients and a server, on a port of 127.0.0.1.
///
/// It passes bytes on and understands none of them, so it serves any protocol that is not encrypted. Give clients its
/// [`port`](Self::port) in place of the server's. It blocks nothing: each connection has threads of its own. Dropping it closes
/// its connections and its port.
///
/// ```no_run
/// use essentially_once_testkit::{Cut, Proxy};
///
/// let proxy = Proxy::start(6379)?;
/// let url = format!("redis://127.0.0.1:{}", proxy.port());
/// // The next command that holds these bytes is done, and its reply is lost.
/// proxy.cut_at(b"EVALSHA", Cut::BeforeReply);
/// # drop(url);
/// # Ok::<(), essentially_once::backend::Source>(())
/// ```
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// Told of every change of the state.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    refuse: bool,
    hold: bool,
    closed: bool,
    armed: Option<(Vec<u8>, Cut)>,
    fired: usize,
    next: u64,
    connections: Vec<Connection>,
}

struct Connection {
    id: u64,
    client: TcpStream,
    server: TcpStream,
    /// Its client is to be cut off at the server's next bytes.
    reply_lost: bool,
}

impl Proxy {
    /// Listens on a free port, and connects whatever connects to it with that port of 127.0.0.1.
    ///
    /// # Errors
    /// There is no free port.
    pub fn start(target: u16) -> Result<Self, Source> {
        Self::to((Ipv4Addr::LOCALHOST, target).into())
    }

    /// As [`start`](Self::start), with a server on any address, such as a container's.
    ///
    /// # Errors
    /// There is no free port.
    pub fn to(target: SocketAddr) -> Result<Self, Source> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for client in listener.incoming() {
                    let state = shared.lock();
                    match client {
                        _ if state.closed => break,
                        Ok(client) if !state.refuse => {
                            let shared = Arc::clone(&shared);
                            // A target that is down ends the client's connection too; there is nothing else to tell it.
                            thread::spawn(move || drop(shared.connect(client, target)));
                        }
                        _ => {}
                    }
                }
            }
        });
        Ok(Self {
            port,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Closes all present connections.
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        for connection in state.connections.drain(..) {
            connection.close();
        }
        self.shared.changed.notify_all();
    }

    /// Whether new connections are closed at once.
    pub fn refuse(&self, refuse: bool) {
        self.shared.lock().refuse = refuse;
    }

    /// Whether connections are kept open while nothing passes in either direction. What was held back passes afterwards.
    pub fn hold(&self, hold: bool) {
        self.shared.lock().hold = hold;
        self.shared.changed.notify_all();
    }

    /// Cuts the connection on which a client next sends these bytes, once. Replaces a cut that has not been made.
    pub fn cut_at(&self, pattern: &[u8], cut: Cut) {
        let mut state = self.shared.lock();
        for connection in &mut state.connections {
            connection.reply_lost = false;
        }
        state.armed = Some((pattern.to_vec(), cut));
    }

    /// How many cuts of [`cut_at`](Self::cut_at) were made.
    pub fn fired(&self) -> usize {
        self.shared.lock().fired
    }

    /// Waits until that many cuts of [`cut_at`](Self::cut_at) were made in all; `false` if they were not within the limit.
    #[must_use]
    pub fn wait_fired(&self, cuts: usize, limit: Duration) -> bool {
        let state = self.shared.lock();
        let waiting = self
            .shared
            .changed
            .wait_timeout_while(state, limit, |state| state.fired < cuts);
        waiting.unwrap_or_else(PoisonError::into_inner).0.fired >= cuts
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.cut();
        // Wakes the thread that accepts. Where it cannot be reached, it is left alone rather than waited for.
        if TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok()
            && let Some(acceptor) = self.acceptor.take()
        {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No panic leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes bytes on until one side ends.
    fn connect(self: Arc<Self>, client: TcpStream, target: SocketAddr) -> io::Result<()> {
        let server = TcpStream::connect(target)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (from_client, from_server) = (client.try_clone()?, server.try_clone()?);
        let (to_client, to_server) = (client.try_clone()?, server.try_clone()?);
        let mut state = self.lock();
        if state.closed {
            return Ok(());
        }
        state.next += 1;
        let id = state.next;
        state.connections.push(Connection {
            id,
            client,
            server,
            reply_lost: false,
        });
        drop(state);
        let replies = thread::spawn({
            let shared = Arc::clone(&self);
            move || shared.replies(id, from_server, to_client)
        });
        self.requests(id, from_client, to_server);
        let _ = replies.join();
        self.lock().connections.retain(|connection| connection.id != id);
        Ok(())
    }

    /// From the client to the server.
    fn requests(&self, id: u64, mut client: TcpStream, mut server: TcpStream) {
        let mut buffer = vec![0; 65_536];
        let mut tail = Vec::new();
        while let Ok(read @ 1..) = client.read(&mut buffer) {
            let Some(mut state) = self.pass(id) else { return };
            let old = tail.len();
            tail.extend_from_slice(&buffer[..read]);
            let cut = state.armed.take_if(|(pattern, _)| contains(&tail, old, pattern));
            tail.drain(..tail.len().saturating_sub(TAIL));
            match cut {
                Some((_, Cut::BeforeRequest)) => {
                    state
                        .connections
                        .retain(|connection| connection.id != id || connection.close());
                    return self.fire(state);
                }
                // Noted before the request is passed on, so that the reply cannot come first.
                Some((_, Cut::BeforeReply)) => state
                    .connections
                    .iter_mut()
                    .filter(|connection| connection.id == id)
                    .for_each(|connection| connection.reply_lost = true),
                None => {}
            }
            drop(state);
            if server.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = server.shutdown(Shutdown::Write);
    }

    /// From the server to the client.
    fn replies(&self, id: u64, mut server: TcpStream, mut client: TcpStream) {
        let mut buffer = vec![0; 65_536];
        while let Ok(read @ 1..) = server.read(&mut buffer) {
            let Some(state) = self.pass(id) else { return };
            let lost = |connection: &Connection| connection.id == id && connection.reply_lost;
            if state.connections.iter().any(lost) {
                let _ = client.shutdown(Shutdown::Both);
                self.fire(state);
                // Closed at once, the server's side could drop what the client sent before the server has read it.
                while let Ok(1..) = server.read(&mut buffer) {}
                return;
            }
            drop(state);
            if client.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Write);
    }

    /// Waits until bytes may pass; `None` if the connection was cut.
    fn pass(&self, id: u64) -> Option<MutexGuard<'_, State>> {
        let present = |state: &State| state.connections.iter().any(|connection| connection.id == id);
        let state = self
            .changed
            .wait_while(self.lock(), |state| state.hold && present(state));
        let state = state.unwrap_or_else(PoisonError::into_inner);
        present(&state).then_some(state)
    }

    fn fire(&self, mut state: MutexGuard<'_, State>) {
        state.fired += 1;
        self.changed.notify_all();
    }
}

impl Connection {
    /// Always `false`: it is not to be kept.
    fn close(&self) -> bool {
        // An error says that it is closed already.
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
        false
    }
}

/// Whether the pattern ends among the bytes from `new` on.
fn contains(bytes: &[u8], new: usize, pattern: &[u8]) -> bool {
    let from = (new + 1).saturating_sub(pattern.len());
    bytes[from..]
        .windows(pattern.len().max(1))
        .any(|window| window == pattern)
}
