//! A Redis Sentinel.

use super::{RedisBuilder, RedisServer};
use crate::{
    Error,
    process::{START_LIMIT, wait_until},
};

/// A sentinel that watches a master alone (quorum 1). It promotes a replica half a second after the
/// master falls silent.
pub struct RedisSentinel {
    name: String,
    server: RedisServer,
}

impl RedisSentinel {
    /// Starts a sentinel that knows the master by this name, and returns when it sees the master
    /// and all replicas.
    ///
    /// # Errors
    /// If it cannot start, or does not reach the master within a minute.
    pub fn start(name: &str, master: &RedisServer) -> Result<Self, Error> {
        let server = RedisBuilder::default()
            .sentinel()
            .with(&[
                ("sentinel", &format!("monitor {name} 127.0.0.1 {} 1", master.port())),
                ("sentinel", &format!("down-after-milliseconds {name} 500")),
                ("sentinel", &format!("failover-timeout {name} 3000")),
            ])
            .start()?;
        let sentinel = Self {
            name: name.into(),
            server,
        };
        let replicas = master.command(&["INFO", "replication"])?;
        let replicas = replicas.line("connected_slaves").unwrap_or("0").to_owned();
        wait_until("the sentinel sees its master and replicas", START_LIMIT, || {
            let seen = sentinel.server.command(&["SENTINEL", "MASTER", &sentinel.name])?;
            let field = |name| seen.field(name).map(|value| value.text());
            Ok(field("flags") == Some("master") && field("num-slaves") == Some(&replicas))
        })?;
        Ok(sentinel)
    }

    /// The port of the current master, as the sentinel reports it to clients.
    ///
    /// # Errors
    /// If the sentinel does not answer.
    pub fn master_port(&self) -> Result<u16, Error> {
        let address = self
            .server
            .command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", &self.name])?;
        let port = address.list().get(1).map(|port| port.text());
        Ok(port.ok_or("the sentinel does not know its master's address")?.parse()?)
    }

    /// The name of the master.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The sentinel's own server process.
    pub fn server(&self) -> &RedisServer {
        &self.server
    }
}
