//! A TCP proxy that cuts connections between a client and its server at chosen moments.

use std::{
    fmt,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use essentially_once::backend::Source;

/// How many sent bytes each connection remembers, to find a pattern that arrived in pieces.
const TAIL: usize = 4096;

/// When [`Proxy::cut_at`] cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Before the request is passed on. The server never sees it.
    BeforeRequest,
    /// After the request is passed on, as soon as the server begins to reply. The server executed
    /// the request, and the client does not know.
    ///
    /// This is exact for a client with one request in flight per connection. With several, the
    /// first reply may answer an earlier request. The server still receives and executes everything
    /// the client had sent.
    BeforeReply,
}

/// A proxy between clients and a server, on a port of 127.0.0.1.
///
/// It forwards bytes without interpreting them, so it works with any unencrypted protocol, except
/// that [`kafka`](Self::kafka) replaces an address. Give clients its [`port`](Self::port) instead
/// of the server's. It blocks no runtime, because each connection has its own threads. Dropping it
/// closes its connections and its port.
///
/// ```no_run
/// use essentially_once_testkit::{Cut, Proxy};
///
/// let proxy = Proxy::start(6379)?;
/// let url = format!("redis://127.0.0.1:{}", proxy.port());
/// // The server executes the next command that contains these bytes, and its reply is lost.
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
    /// What the server says of its own address, and what to say instead.
    stated: Option<(Vec<u8>, Vec<u8>)>,
    state: Mutex<State>,
    /// Notified of every change of the state.
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
    /// Cut the client off at the server's next bytes.
    reply_lost: bool,
}

impl Proxy {
    /// Listens on a free port, and connects each client to the target port of 127.0.0.1.
    ///
    /// # Errors
    /// If no port is free.
    pub fn start(target: u16) -> Result<Self, Source> {
        Self::to((Ipv4Addr::LOCALHOST, target).into())
    }

    /// Like [`start`](Self::start), for a server at any address, such as a container's.
    ///
    /// # Errors
    /// If no port is free.
    pub fn to(target: SocketAddr) -> Result<Self, Source> {
        Self::listen(target, |_| None)
    }

    /// Like [`start`](Self::start), for a broker that speaks Kafka's protocol.
    ///
    /// Such a broker tells clients its own address, and they connect to that one. The proxy
    /// therefore replaces the port wherever a reply names the target port of `127.0.0.1`. It passes
    /// on whole replies.
    ///
    /// # Errors
    /// If no port is free.
    pub fn kafka(target: u16) -> Result<Self, Source> {
        // A port is a 32-bit number after the text of its host.
        let address = |port: u16| [&b"127.0.0.1"[..], &u32::from(port).to_be_bytes()].concat();
        Self::listen((Ipv4Addr::LOCALHOST, target).into(), |port| {
            Some((address(target), address(port)))
        })
    }

    fn listen(target: SocketAddr, stated: impl FnOnce(u16) -> Option<(Vec<u8>, Vec<u8>)>) -> Result<Self, Source> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            stated: stated(port),
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
                            // If the target is down, the client's connection ends too. A proxy has
                            // no other way to report it.
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

    /// The port that clients connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Closes all current connections.
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        for connection in state.connections.drain(..) {
            connection.close();
        }
        self.shared.changed.notify_all();
    }

    /// Sets whether new connections are closed at once.
    pub fn refuse(&self, refuse: bool) {
        self.shared.lock().refuse = refuse;
    }

    /// Sets whether traffic stops in both directions while connections stay open. Bytes held back
    /// are forwarded afterwards.
    pub fn hold(&self, hold: bool) {
        self.shared.lock().hold = hold;
        self.shared.changed.notify_all();
    }

    /// Cuts the connection on which a client next sends these bytes, once. Replaces a cut that has
    /// not been made.
    pub fn cut_at(&self, pattern: &[u8], cut: Cut) {
        let mut state = self.shared.lock();
        for connection in &mut state.connections {
            connection.reply_lost = false;
        }
        state.armed = Some((pattern.to_vec(), cut));
    }

    /// The number of cuts that [`cut_at`](Self::cut_at) has made.
    pub fn fired(&self) -> usize {
        self.shared.lock().fired
    }

    /// Waits until [`cut_at`](Self::cut_at) has made `cuts` cuts in total. Returns `false` if it
    /// has not within the limit.
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
        // Wakes the accepting thread. If it cannot be reached, it is left running, and the drop
        // does not wait for it.
        if TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok()
            && let Some(acceptor) = self.acceptor.take()
        {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic never leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forwards bytes until one side closes.
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

    /// Forwards bytes from the client to the server.
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
                // Set before the request is forwarded, so that the reply cannot arrive first.
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

    /// Forwards bytes from the server to the client.
    fn replies(&self, id: u64, mut server: TcpStream, mut client: TcpStream) {
        let mut buffer = Vec::new();
        while let Ok(1..) = self.read_reply(&mut server, &mut buffer) {
            let Some(state) = self.pass(id) else { return };
            let lost = |connection: &Connection| connection.id == id && connection.reply_lost;
            if state.connections.iter().any(lost) {
                let _ = client.shutdown(Shutdown::Both);
                self.fire(state);
                // Without this, closing the server's side could discard bytes that the server has
                // not read yet.
                while let Ok(1..) = self.read_reply(&mut server, &mut buffer) {}
                return;
            }
            drop(state);
            if client.write_all(&buffer).is_err() {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Write);
    }

    /// Reads a part of a reply, or a whole one if the address in it may have to be replaced.
    fn read_reply(&self, server: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<usize> {
        let Some((from, to)) = &self.stated else {
            buffer.resize(65_536, 0);
            let read = server.read(buffer)?;
            buffer.truncate(read);
            return Ok(read);
        };
        let mut size = [0; 4];
        server.read_exact(&mut size)?;
        buffer.clear();
        buffer.extend_from_slice(&size);
        let size = u64::from(u32::from_be_bytes(size));
        if server.take(size).read_to_end(buffer)? as u64 != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let places = (0..buffer.len()).filter(|place| buffer[*place..].starts_with(from));
        for place in places.collect::<Vec<_>>() {
            buffer[place..place + to.len()].copy_from_slice(to);
        }
        Ok(buffer.len())
    }

    /// Waits until bytes may pass. Returns `None` if the connection was cut.
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
    /// Always returns `false`, so that `retain` drops the connection.
    fn close(&self) -> bool {
        // An error means that it is already closed.
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
        false
    }
}

/// Whether the pattern ends within the bytes from `new` on.
fn contains(bytes: &[u8], new: usize, pattern: &[u8]) -> bool {
    let from = (new + 1).saturating_sub(pattern.len());
    bytes[from..]
        .windows(pattern.len().max(1))
        .any(|window| window == pattern)
}
