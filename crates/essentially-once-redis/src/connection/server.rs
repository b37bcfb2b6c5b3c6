//! Finding the server that holds a key, and connecting to it.

use std::{
    collections::BTreeSet,
    fmt,
    str::FromStr as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use essentially_once::Error;
use redis::{AsyncConnectionConfig, Client, ConnectionInfo, ProtocolVersion, RedisResult, Value};

#[cfg(feature = "tls")]
use crate::connection::tls::Tls;
use crate::{
    connection::{
        address::{SLOTS, at, is_tls, master_of, parse, shown, slots_of},
        live::{Connection, Ended, SharedConnection},
    },
    error::{connect_failed, lacks_resp3, read_failed},
    options::RedisOptions,
};

/// A Redis server, a cluster, or a master behind Sentinels.
pub(crate) struct Server {
    pub(crate) options: RedisOptions,
    seeds: Vec<ConnectionInfo>,
    sentinels: Vec<ConnectionInfo>,
    kind: Kind,
    /// Name and version of the server; `None` if it hides them.
    pub(crate) version: Option<String>,
    #[cfg(feature = "tls")]
    tls: Option<Tls>,
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
        options.check()?;
        let parse = |url: &str| parse(url, &options);
        let first = parse(url)?;
        let mut seeds = vec![first.clone()];
        for url in &options.other_nodes {
            seeds.push(first.clone().set_addr(parse(url)?.addr().clone()));
        }
        let sentinels: Vec<ConnectionInfo> = match &options.sentinel {
            Some(sentinel) if sentinel.urls.is_empty() => {
                return Err(Error::InvalidSetting {
                    setting: "sentinel",
                    reason: "it needs at least one Sentinel".into(),
                });
            }
            Some(sentinel) => sentinel.urls.iter().map(|url| parse(url)).collect::<Result<_, _>>()?,
            None => Vec::new(),
        };
        #[cfg(feature = "tls")]
        let tls = match seeds.iter().chain(&sentinels).any(is_tls) {
            true => Some(Tls::new(&options)?),
            false => None,
        };
        let mut server = Self {
            options,
            seeds,
            sentinels,
            kind: Kind::Single,
            version: None,
            #[cfg(feature = "tls")]
            tls,
            lacks_resp3: AtomicBool::new(false),
        };
        (server.kind, server.version) = server.identify().await?;
        Ok(Arc::new(server))
    }

    /// Checks the version, and finds out whether the server is a node of a cluster.
    async fn identify(&self) -> Result<(Kind, Option<String>), Error> {
        let mut connection = self.connect_any().await?;
        let action = || self.on("ask for the version");
        let answer: RedisResult<String> = redis::cmd("INFO").query_async(&mut connection.inner).await;
        let info = match answer {
            Ok(info) => info,
            // Some cloud providers hide this command.
            Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => {
                tracing::warn!(server = %self, %error, "the server refuses INFO: assuming a single server, Redis 7.0 or later");
                return Ok((Kind::Single, None));
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
        let kind = match field("cluster_enabled") {
            Some("1") => Kind::Cluster,
            _ => Kind::Single,
        };
        // Valkey also names the Redis that it is compatible with.
        let valkey = field("valkey_version").map(|version| format!("Valkey {version}"));
        let version = valkey.or_else(|| Some(format!("Redis {}", field("redis_version")?)));
        Ok((kind, version))
    }

    /// A new connection to the server that holds `key`. Dropping the future closes the connections
    /// that it opened.
    pub(crate) async fn open(&self, key: &[u8]) -> Result<Connection, Error> {
        self.within(self.connect_limit(), "connect", self.open_unbounded(key))
            .await
    }

    /// How long connecting may take: the timeout, once for each address that is tried.
    pub(crate) fn connect_limit(&self) -> Duration {
        let addresses = self.seeds.len().max(self.sentinels.len());
        self.options
            .timeout
            .saturating_mul(u32::try_from(addresses).unwrap_or(u32::MAX))
    }

    pub(crate) async fn within<T>(
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
        let ranges = ask_ranges(&mut connection).await.map_err(failed)?;
        match ranges.iter().find_map(|range| master_of(range, slot)) {
            Some(node) => self.connect_to_node(node).await,
            None => Err(Error::unavailable(action(), format!("no node serves slot {slot} now"))),
        }
    }

    /// A new connection to the server, or to each master of a cluster.
    pub(crate) async fn open_masters(&self) -> Result<Vec<Connection>, Error> {
        let limit = self.connect_limit();
        let mut connection = self.within(limit, "connect", self.connect_any()).await?;
        if self.kind == Kind::Single {
            return Ok(vec![connection]);
        }
        let action = || self.on("find the masters of the cluster");
        let ranges = ask_ranges(&mut connection)
            .await
            .map_err(|error| read_failed(action(), error))?;
        let mut masters = BTreeSet::new();
        let mut served = 0;
        for (slots, node) in ranges.iter().filter_map(|range| slots_of(range)) {
            served += slots.count();
            masters.insert(node);
        }
        if served != SLOTS {
            return Err(Error::unavailable(
                action(),
                format!("nodes serve {served} of {SLOTS} slots now"),
            ));
        }
        let mut connections = Vec::new();
        for node in masters {
            connections.push(self.within(limit, "connect", self.connect_to_node(node)).await?);
        }
        Ok(connections)
    }

    /// Connects to a node of the cluster. An empty host means the node that was asked.
    async fn connect_to_node(&self, (host, port): (String, u16)) -> Result<Connection, Error> {
        let node = at(&self.seeds[0], (!host.is_empty()).then_some(host), port);
        let connected = self.connect_to(&node).await;
        connected.map_err(|error| connect_failed(format!("connect to {}", shown(node.addr())), error, is_tls(&node)))
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
            match self.dial(node, &config).await {
                Ok(connection) => return Ok(Connection::new(connection, ended)),
                Err(error) if lacks_resp3(&error) => self.lacks_resp3.store(true, Ordering::Relaxed),
                Err(error) => return Err(error),
            }
        }
        let settings = node.redis_settings().clone().set_protocol(ProtocolVersion::RESP2);
        let node = node.clone().set_redis_settings(settings);
        let connection = self.dial(&node, &config).await?;
        Ok(Connection::new(connection, Ended::default()))
    }

    async fn dial(&self, node: &ConnectionInfo, config: &AsyncConnectionConfig) -> RedisResult<SharedConnection> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls
            && is_tls(node)
        {
            return Box::pin(tls.connect(node, config, self.options.timeout)).await;
        }
        let client = Client::open(node.clone())?;
        let connecting = client.get_multiplexed_async_connection_with_config(config);
        // Boxed, since deeply nested futures exceed the compiler's recursion limit in callers.
        let connection = Box::pin(connecting).await?;
        Ok(connection.into())
    }
}

/// The ranges of slots, each with its nodes.
async fn ask_ranges(connection: &mut Connection) -> RedisResult<Vec<Vec<Value>>> {
    redis::cmd("CLUSTER")
        .arg("SLOTS")
        .query_async(&mut connection.inner)
        .await
}

/// Shows the first address and the database, and never the user or password.
impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = &self.seeds[0];
        match &self.options.sentinel {
            Some(sentinel) => write!(f, "Redis master {}", sentinel.master)?,
            None => write!(f, "Redis {}", shown(first.addr()))?,
        }
        match first.redis_settings().db() {
            0 => Ok(()),
            database => write!(f, " database {database}"),
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
