//! Finding the server that holds a key, and connecting to it.

use std::{
    collections::HashMap,
    fmt,
    net::Ipv6Addr,
    str::FromStr as _,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use essentially_once::Error;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ProtocolVersion, RedisResult, Value,
    aio::MultiplexedConnection,
};
use tokio::sync::Mutex;

use crate::{
    connection::{Connection, Ended, PING_LIMIT},
    error::{connect_failed, is_protocol_error, lacks_resp3, read_failed, spoils_connection},
    options::RedisOptions,
};

/// A Redis server, a cluster, or a master behind Sentinels.
pub(crate) struct Server {
    pub(crate) options: RedisOptions,
    seeds: Vec<ConnectionInfo>,
    sentinels: Vec<ConnectionInfo>,
    kind: Kind,
    /// Set when the server has refused RESP3.
    lacks_resp3: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Single,
    Cluster,
}

impl Server {
    pub(crate) async fn connect(options: RedisOptions, url: &str) -> Result<Arc<Self>, Error> {
        let parse = |url: &str| parse(url, &options);
        let first = parse(url)?;
        let mut seeds = vec![first.clone()];
        for url in &options.other_nodes {
            seeds.push(first.clone().set_addr(parse(url)?.addr().clone()));
        }
        let sentinels = match &options.sentinel {
            Some(sentinel) if sentinel.urls.is_empty() => {
                return Err(Error::InvalidSetting {
                    setting: "sentinel",
                    reason: "it needs at least one Sentinel".into(),
                });
            }
            Some(sentinel) => sentinel.urls.iter().map(|url| parse(url)).collect::<Result<_, _>>()?,
            None => Vec::new(),
        };
        let mut server = Self {
            options,
            seeds,
            sentinels,
            kind: Kind::Single,
            lacks_resp3: AtomicBool::new(false),
        };
        server.kind = server.identify().await?;
        Ok(Arc::new(server))
    }

    /// Checks the version, and finds out whether the server is a node of a cluster.
    async fn identify(&self) -> Result<Kind, Error> {
        let mut connection = self.connect_any().await?;
        let action = || self.on("ask for the version");
        let answer: RedisResult<String> = redis::cmd("INFO").query_async(&mut connection.inner).await;
        let info = match answer {
            Ok(info) => info,
            // Some cloud providers hide this command.
            Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => {
                tracing::warn!(server = %self, %error, "the server refuses INFO: assuming a single server, Redis 7.0 or later");
                return Ok(Kind::Single);
            }
            Err(error) => return Err(read_failed(action(), error)),
        };
        let field = |name: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        if let Some(version) = field("redis_version")
            && let Some(Ok(major)) = version.split('.').next().map(u32::from_str)
            && major < 7
        {
            let why = format!(
                "it is Redis {version}; upgrade to 7.0 or later, which counts the entries removed from a stream"
            );
            return Err(Error::failed(action(), why));
        }
        match field("cluster_enabled") {
            Some("1") => Ok(Kind::Cluster),
            _ => Ok(Kind::Single),
        }
    }

    /// A new connection to the server that holds `key`. Dropping the future closes the connections
    /// that it opened.
    pub(crate) async fn open(&self, key: &[u8]) -> Result<Connection, Error> {
        self.within(self.connect_limit(), "connect", self.open_unbounded(key))
            .await
    }

    /// How long connecting may take: the timeout, once for each address that is tried.
    fn connect_limit(&self) -> Duration {
        let addresses = self.seeds.len().max(self.sentinels.len());
        self.options
            .timeout
            .saturating_mul(u32::try_from(addresses).unwrap_or(u32::MAX))
    }

    async fn within<T>(
        &self,
        limit: Duration,
        action: &str,
        doing: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(limit, doing).await {
            Ok(done) => done,
            Err(_) => Err(Error::unavailable(
                self.on(action),
                format!("no answer within {limit:?}"),
            )),
        }
    }

    async fn open_unbounded(&self, key: &[u8]) -> Result<Connection, Error> {
        let mut connection = self.connect_any().await?;
        if self.kind == Kind::Single {
            return Ok(connection);
        }
        let action = || self.on("find the cluster node of a key");
        let failed = |error| read_failed(action(), error);
        let slot: u64 = redis::cmd("CLUSTER")
            .arg("KEYSLOT")
            .arg(key)
            .query_async(&mut connection.inner)
            .await
            .map_err(failed)?;
        let ranges: Vec<Vec<Value>> = redis::cmd("CLUSTER")
            .arg("SLOTS")
            .query_async(&mut connection.inner)
            .await
            .map_err(failed)?;
        match ranges.iter().find_map(|range| master_of(range, slot)) {
            Some((host, port)) => {
                // An empty host means the node that answered.
                let node = at(&self.seeds[0], (!host.is_empty()).then_some(host), port);
                let connected = self.connect_to(&node).await;
                connected
                    .map_err(|error| connect_failed(format!("connect to {}", shown(node.addr())), error, is_tls(&node)))
            }
            None => Err(Error::unavailable(action(), format!("no node serves slot {slot} now"))),
        }
    }

    /// Whether keys are spread over several nodes.
    pub(crate) fn is_cluster(&self) -> bool {
        self.kind == Kind::Cluster
    }

    /// Describes an action on this server, for an error.
    pub(crate) fn on(&self, action: impl fmt::Display) -> String {
        format!("{action} on {self}")
    }

    async fn connect_any(&self) -> Result<Connection, Error> {
        if let Some(sentinel) = &self.options.sentinel {
            return self.connect_by_sentinel(&sentinel.master).await;
        }
        let mut last = None;
        for seed in &self.seeds {
            match self.connect_to(seed).await {
                Ok(connection) => return Ok(connection),
                Err(error) => {
                    last = Some(connect_failed(
                        format!("connect to {}", shown(seed.addr())),
                        error,
                        is_tls(seed),
                    ))
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::unavailable(self.on("connect"), "no address")))
    }

    async fn connect_by_sentinel(&self, master: &str) -> Result<Connection, Error> {
        let mut last = Error::unavailable(format!("ask for master {master}"), "no Sentinel answered");
        for sentinel in &self.sentinels {
            let asked = shown(sentinel.addr());
            let found = match self.ask_sentinel(sentinel, master).await {
                Ok(found) => found,
                Err(error) => {
                    last = connect_failed(
                        format!("ask Sentinel {asked} for master {master}"),
                        error,
                        is_tls(sentinel),
                    );
                    continue;
                }
            };
            let Some((host, port)) = found else {
                // This may pass: operators remove a master and add it again to change it.
                last = Error::unavailable(
                    format!("ask Sentinel {asked}"),
                    format!("it does not monitor a master named {master:?}: check the name"),
                );
                continue;
            };
            let node = at(&self.seeds[0], Some(host), port);
            match self.connect_to_master(&node).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn ask_sentinel(&self, sentinel: &ConnectionInfo, master: &str) -> RedisResult<Option<(String, u16)>> {
        let mut connection = self.connect_to(sentinel).await?;
        redis::cmd("SENTINEL")
            .arg("GET-MASTER-ADDR-BY-NAME")
            .arg(master)
            .query_async(&mut connection.inner)
            .await
    }

    /// A Sentinel's answer may be out of date, so the server must confirm that it is a master.
    async fn connect_to_master(&self, node: &ConnectionInfo) -> Result<Connection, Error> {
        let action = || format!("connect to {}", shown(node.addr()));
        let connected = self.connect_to(node).await;
        let mut connection = connected.map_err(|error| connect_failed(action(), error, is_tls(node)))?;
        let role: Vec<Value> = redis::cmd("ROLE")
            .query_async(&mut connection.inner)
            .await
            .map_err(|error| read_failed(action(), error))?;
        match role.first() {
            Some(Value::BulkString(role)) if role != b"master" => Err(Error::unavailable(
                action(),
                "Sentinel names it as the master, but its role is another one now",
            )),
            _ => Ok(connection),
        }
    }

    async fn connect_to(&self, node: &ConnectionInfo) -> RedisResult<Connection> {
        // `WAIT` delays the reply by up to its own timeout.
        let waiting = self.options.min_replicas.map_or(Duration::ZERO, |min| min.timeout);
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.options.timeout))
            .set_response_timeout(Some(self.options.timeout.saturating_add(waiting)));
        let wants_resp3 = node.redis_settings().protocol().supports_resp3();
        if wants_resp3 && !self.lacks_resp3.load(Ordering::Relaxed) {
            // The library reports a closed connection only with RESP3.
            let ended = Ended::default();
            let config = config.clone().set_push_sender(ended.notice());
            match self
                .client(node)?
                .get_multiplexed_async_connection_with_config(&config)
                .await
            {
                Ok(connection) => return Ok(Connection::new(connection, ended)),
                Err(error) if lacks_resp3(&error) => self.lacks_resp3.store(true, Ordering::Relaxed),
                Err(error) => return Err(error),
            }
        }
        let settings = node.redis_settings().clone().set_protocol(ProtocolVersion::RESP2);
        let node = node.clone().set_redis_settings(settings);
        let connection = self
            .client(&node)?
            .get_multiplexed_async_connection_with_config(&config)
            .await?;
        Ok(Connection::new(connection, Ended::default()))
    }

    #[cfg(feature = "tls")]
    fn client(&self, node: &ConnectionInfo) -> RedisResult<Client> {
        // A program with two cryptography providers must choose one, or rustls panics: if it did
        // not, it is this.
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        match &self.options.certificates {
            Some(certificates) => Client::build_with_tls(node.clone(), certificates.clone()),
            None => Client::open(node.clone()),
        }
    }

    #[cfg(not(feature = "tls"))]
    fn client(&self, node: &ConnectionInfo) -> RedisResult<Client> {
        Client::open(node.clone())
    }
}

/// Shows the first address, and never the user or password.
impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.options.sentinel {
            Some(sentinel) => write!(f, "Redis master {}", sentinel.master),
            None => write!(f, "Redis {}", shown(self.seeds[0].addr())),
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.to_string())
            .finish_non_exhaustive()
    }
}

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

/// A connection is closed when it was not used for this long.
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
    /// A connection that is closed, or does not answer after it was idle, is replaced. No request
    /// was sent on it.
    pub(crate) async fn connection(&self) -> Result<MultiplexedConnection, Error> {
        let limit = self.server.connect_limit().saturating_add(PING_LIMIT);
        self.server.within(limit, "connect", self.connected()).await
    }

    async fn connected(&self) -> Result<MultiplexedConnection, Error> {
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
    /// with it fail every other call.
    pub(crate) fn check_value(&self, size: usize) -> Result<(), Error> {
        let limit = self.value_limit.load(Ordering::Relaxed);
        match size > limit {
            true => Err(Error::TooLarge {
                what: "value (server settings `proto-max-bulk-len`, `client-query-buffer-limit`)",
                size,
                limit,
            }),
            false => Ok(()),
        }
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
async fn ask_value_limit(mut connection: MultiplexedConnection) -> Option<usize> {
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

/// Parses a URL. The library's message may quote the URL with its password, so this one replaces
/// it.
fn parse(url: &str, options: &RedisOptions) -> Result<ConnectionInfo, Error> {
    let invalid = |reason: &str| Error::InvalidSetting {
        setting: "Redis URL",
        reason: format!(
            "{reason}; expected redis://[user:password@]host[:port][/database], rediss:// for TLS, or redis+unix:///path"
        ),
    };
    let parsed = redis::parse_redis_url(url).ok_or_else(|| invalid("it cannot be parsed"))?;
    let names_protocol = parsed.query_pairs().any(|(name, _)| name == "protocol");
    let info = redis::IntoConnectionInfo::into_connection_info(parsed).map_err(|_| invalid("it cannot be parsed"))?;
    let info = match names_protocol {
        true => info,
        false => {
            let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
            info.set_redis_settings(settings)
        }
    };
    match info.addr() {
        addr if !addr.is_supported() => Err(invalid(
            "this build does not support TLS or Unix sockets: enable the crate's feature `tls`",
        )),
        ConnectionAddr::TcpTls { .. } => Ok(info),
        #[cfg(feature = "tls")]
        _ if options.certificates.is_some() => Err(invalid("certificates are set, so it must begin with rediss://")),
        _ => {
            let _ = options;
            Ok(info)
        }
    }
}

/// The same settings at another address; TLS stays on or off.
fn at(settings: &ConnectionInfo, host: Option<String>, port: u16) -> ConnectionInfo {
    let addr = match settings.addr().clone() {
        ConnectionAddr::TcpTls {
            host: old,
            insecure,
            tls_params,
            ..
        } => ConnectionAddr::TcpTls {
            host: host.unwrap_or(old),
            port,
            insecure,
            tls_params,
        },
        ConnectionAddr::Tcp(old, _) => ConnectionAddr::Tcp(host.unwrap_or(old), port),
        _ => ConnectionAddr::Tcp(host.unwrap_or_else(|| "127.0.0.1".into()), port),
    };
    settings.clone().set_addr(addr)
}

/// Host and port of the master, if this range of `CLUSTER SLOTS` contains the slot: `[first, last,
/// [host, port, …], replicas…]`.
fn master_of(range: &[Value], slot: u64) -> Option<(String, u16)> {
    let number = |value: &Value| match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    };
    let [first, last, Value::Array(master), ..] = range else {
        return None;
    };
    if !(number(first)?..=number(last)?).contains(&slot) {
        return None;
    }
    let host = match master.first()? {
        Value::BulkString(host) => String::from_utf8_lossy(host).into_owned(),
        Value::SimpleString(host) => host.clone(),
        _ => String::new(),
    };
    Some((host, u16::try_from(number(master.get(1)?)?).ok()?))
}

fn is_tls(node: &ConnectionInfo) -> bool {
    matches!(node.addr(), ConnectionAddr::TcpTls { .. })
}

fn shown(addr: &ConnectionAddr) -> String {
    match addr {
        ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => match host.parse::<Ipv6Addr>() {
            Ok(_) => format!("[{host}]:{port}"),
            Err(_) => format!("{host}:{port}"),
        },
        ConnectionAddr::Unix(path) => path.display().to_string(),
        _ => "an unknown kind of address".into(),
    }
}
