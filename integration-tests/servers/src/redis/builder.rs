//! The settings of a server before it starts.

use std::path::Path;

use super::RedisServer;
use crate::{Error, port::Port, process::address_in_use};

/// A server that is not started yet. See [`RedisServer::durable`].
#[derive(Clone, Default)]
#[must_use = "the server runs only after `start`"]
pub struct RedisBuilder {
    directives: Vec<(String, String)>,
    pub(super) tls: bool,
    pub(super) cluster: bool,
    pub(super) sentinel: bool,
}

impl RedisBuilder {
    /// Adds lines to the configuration file: a directive and its value in the file's syntax
    /// (`("save", "\"\"")`). Later lines override earlier ones.
    pub fn with(mut self, directives: &[(&str, &str)]) -> Self {
        let directives = directives.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        self.directives.extend(directives);
        self
    }

    /// Also serves TLS, on a separate port ([`RedisServer::tls_url`]). Clients need no certificate
    /// unless `tls-auth-clients` says so.
    pub fn tls(mut self, certificate: &Path, key: &Path, authority: &Path) -> Self {
        self.tls = true;
        let quoted = |path: &Path| format!("{:?}", path.to_string_lossy());
        self.with(&[
            ("tls-cert-file", &quoted(certificate)),
            ("tls-key-file", &quoted(key)),
            ("tls-ca-cert-file", &quoted(authority)),
            ("tls-auth-clients", "no"),
        ])
    }

    /// Replicates another server. It may take a moment after the start to catch up.
    pub fn replica_of(self, master: &RedisServer) -> Self {
        self.with(&[("replicaof", &format!("127.0.0.1 {}", master.port()))])
    }

    pub(super) fn cluster(mut self) -> Self {
        self.cluster = true;
        self
    }

    pub(super) fn sentinel(mut self) -> Self {
        self.sentinel = true;
        self
    }

    /// Starts the server, and returns when it answers.
    ///
    /// # Errors
    /// If `ESSENTIALLY_ONCE_REDIS_SERVER` is not set, or if the server ended or did not answer
    /// within 20 s. The error then holds the end of its log.
    pub fn start(&self) -> Result<RedisServer, Error> {
        let mut tries = 0..20;
        loop {
            tries.next();
            match RedisServer::start(self) {
                Err(error) if address_in_use(&error) && !tries.is_empty() => {}
                done => return done,
            }
        }
    }

    /// The text of the configuration file, with the caller's directives last.
    pub(super) fn config(&self, folder: &Path, ports: &Ports) -> String {
        let socket = format!("{:?}", folder.join("redis.sock").to_string_lossy());
        let mut lines = vec![
            ("bind", "127.0.0.1".to_owned()),
            ("port", ports.plain.number().to_string()),
            ("protected-mode", "no".into()),
            ("daemonize", "no".into()),
            ("dir", format!("{:?}", folder.to_string_lossy())),
            ("unixsocket", socket),
            // Administration keeps working whatever a test does to the default user.
            ("user", format!("{ADMINISTRATOR} on nopass ~* &* +@all")),
        ];
        if let Some(port) = &ports.tls {
            lines.push(("tls-port", port.number().to_string()));
        }
        if let Some(port) = &ports.cluster {
            lines.push(("cluster-enabled", "yes".into()));
            lines.push(("cluster-port", port.number().to_string()));
            lines.push(("cluster-node-timeout", "2000".into()));
        }
        let own = lines.iter().map(|(name, value)| format!("{name} {value}\n"));
        let given = self.directives.iter().map(|(name, value)| format!("{name} {value}\n"));
        own.chain(given).collect()
    }
}

/// The user for [`RedisServer::command`].
pub(super) const ADMINISTRATOR: &str = "test-servers";

/// The ports that a server listens on.
pub(super) struct Ports {
    pub(super) plain: Port,
    pub(super) tls: Option<Port>,
    pub(super) cluster: Option<Port>,
}

impl Ports {
    pub(super) fn claim(builder: &RedisBuilder) -> Result<Self, Error> {
        Ok(Self {
            plain: Port::claim()?,
            tls: builder.tls.then(Port::claim).transpose()?,
            cluster: builder.cluster.then(Port::claim).transpose()?,
        })
    }
}
