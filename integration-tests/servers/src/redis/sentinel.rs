//! Sentinel.

use super::{RedisBuilder, RedisServer};
use crate::{
    Error,
    process::{START_LIMIT, wait_until},
};

/// A sentinel that watches a master alone (quorum 1), and makes a replica master half a second after it went silent.
pub struct RedisSentinel {
    name: String,
    server: RedisServer,
}

impl RedisSentinel {
    /// Starts a sentinel that knows the master by this name, and returns when it sees the master and all of its replicas.
    ///
    /// # Errors
    /// It cannot be started, or does not reach the master within a minute.
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

    /// The port of the present master, as clients are told.
    ///
    /// # Errors
    /// The sentinel does not answer.
    pub fn master_port(&self) -> Result<u16, Error> {
        let address = self
            .server
            .command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", &self.name])?;
        let port = address.list().get(1).map(|port| port.text());
        Ok(port.ok_or("the sentinel does not know its master's address")?.parse()?)
    }

    /// The name that the master is known by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The sentinel's own process and port.
    pub fn server(&self) -> &RedisServer {
        &self.server
    }
}
