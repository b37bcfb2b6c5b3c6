//! How to connect.

use std::{fmt, time::Duration};

use essentially_once::Error;

use crate::{Redis, names::check_prefix, server::Server};

/// How to connect to Redis; see [`Redis::connect`].
///
/// ```no_run
/// # use essentially_once_redis::RedisOptions;
/// # use std::time::Duration;
/// # async fn example() -> Result<(), essentially_once::Error> {
/// let redis = RedisOptions::new()
///     .timeout(Duration::from_secs(5))
///     .min_replicas(1, Duration::from_secs(1))
///     .connect("rediss://shop:secret@redis.example:6380/2")
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct RedisOptions {
    pub(crate) timeout: Duration,
    pub(crate) record_limit: usize,
    pub(crate) prefix: String,
    pub(crate) min_replicas: Option<MinReplicas>,
    pub(crate) other_nodes: Vec<String>,
    pub(crate) sentinel: Option<Sentinel>,
    #[cfg(feature = "tls")]
    pub(crate) certificates: Option<redis::TlsCertificates>,
}

/// How many replicas must have a write before it counts, and how long to wait for them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MinReplicas {
    pub(crate) replicas: u32,
    pub(crate) timeout: Duration,
}

/// Who to ask for the master's address.
#[derive(Clone)]
pub(crate) struct Sentinel {
    pub(crate) master: String,
    pub(crate) urls: Vec<String>,
}

impl RedisOptions {
    /// The defaults: 10 seconds, 16 MiB, prefix `essentially-once`, no replicas waited for.
    pub fn new() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            record_limit: 16 * 1024 * 1024,
            prefix: "essentially-once".into(),
            min_replicas: None,
            other_nodes: Vec::new(),
            sentinel: None,
            #[cfg(feature = "tls")]
            certificates: None,
        }
    }

    /// How long to wait for a connection, and for each reply; from a millisecond to a day. A commit or append without a reply by then is
    /// [`Error::Indeterminate`].
    ///
    /// A call on a server that does not answer fails after twice this time and a second at most:
    /// the second is for asking whether a connection that was idle still works, and then come a new
    /// connection and the reply. Each [further node](Self::other_nodes) and
    /// [Sentinel](Self::sentinel) adds this time, [replicas](Self::min_replicas) add their own, and
    /// a reader that waits for the next record takes two seconds more. An append of many megabytes
    /// waits for a reply for each.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.clamp(Duration::from_millis(1), Duration::from_secs(24 * 60 * 60));
        self
    }

    /// Largest record (key, headers and payload together), state key or state value, in bytes. Redis itself takes 512 MiB
    /// (`proto-max-bulk-len`).
    #[must_use]
    pub fn record_limit(mut self, bytes: usize) -> Self {
        self.record_limit = bytes;
        self
    }

    /// What the names of this crate's own keys begin with: `<prefix>:{<consumer>}:position` and so on. Two services that share
    /// a server and have consumers of the same name need different ones.
    ///
    /// Braces are refused, because they mark what cluster slots are computed from, and so is a segment `retention` after the first
    /// (`shop:retention`): keys of two prefixes could be equal.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Waits after each append and commit until so many replicas have it (`WAIT`), for `timeout` at most: then it is
    /// [`Error::Indeterminate`], since the master has it and the replicas may not. It lowers the odds that a fail-over loses what was
    /// acknowledged; Redis cannot rule it out.
    #[must_use]
    pub fn min_replicas(mut self, replicas: u32, timeout: Duration) -> Self {
        self.min_replicas = (replicas > 0).then_some(MinReplicas { replicas, timeout });
        self
    }

    /// Further nodes of a cluster, as URLs, to ask for the others when the one given to [`connect`](Self::connect) does not answer. Only
    /// their addresses are used.
    #[must_use]
    pub fn other_nodes(mut self, urls: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.other_nodes = urls.into_iter().map(Into::into).collect();
        self
    }

    /// Asks Sentinels for the address of the master of that name, at every connection. Each Sentinel's URL may have a user and password
    /// of its own. The URL given to [`connect`](Self::connect) then says what holds for the master: user, password, database,
    /// TLS; its host and port are not used.
    #[must_use]
    pub fn sentinel(mut self, master: impl Into<String>, urls: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.sentinel = Some(Sentinel {
            master: master.into(),
            urls: urls.into_iter().map(Into::into).collect(),
        });
        self
    }

    /// Trusts this certificate authority (PEM) instead of the system's, for `rediss://`.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn root_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.certificates().root_cert = Some(pem.into());
        self
    }

    /// Shows this certificate and key (PEM) to the server, for `rediss://`.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn client_certificate(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.certificates().client_tls = Some(redis::ClientTlsConfig {
            client_cert: certificate.into(),
            client_key: key.into(),
        });
        self
    }

    /// Connects: `redis://[user:password@]host[:port][/database]`, `rediss://` for TLS,
    /// `redis+unix:///path` for a socket.
    ///
    /// RESP3 is spoken if the server knows it: only then does the client library report at once
    /// that a connection ended. `?protocol=resp2` keeps to the older protocol, for instance for a
    /// proxy.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`]; [`Error::Failed`] for a certificate that is not trusted, a refused user or password, or a server older than Redis 7.0;
    /// [`Error::Unavailable`] if the server cannot be reached. No message holds the URL's user or password.
    pub async fn connect(self, url: &str) -> Result<Redis, Error> {
        check_prefix(&self.prefix)?;
        #[cfg(feature = "tls")]
        self.check_certificates()?;
        Server::connect(self, url).await.map(Redis::new)
    }

    /// An authority without a certificate would show as a server that nobody trusts.
    #[cfg(feature = "tls")]
    fn check_certificates(&self) -> Result<(), Error> {
        use rustls::pki_types::{CertificateDer, pem::PemObject as _};

        let root = self.certificates.as_ref().and_then(|given| given.root_cert.as_ref());
        match root.map(|pem| CertificateDer::pem_slice_iter(pem).next()) {
            None | Some(Some(Ok(_))) => Ok(()),
            Some(_) => Err(Error::InvalidSetting {
                setting: "root_certificate",
                reason: "it holds no certificate in PEM format".into(),
            }),
        }
    }

    #[cfg(feature = "tls")]
    fn certificates(&mut self) -> &mut redis::TlsCertificates {
        self.certificates.get_or_insert(redis::TlsCertificates {
            client_tls: None,
            root_cert: None,
        })
    }
}

impl Default for RedisOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RedisOptions {
    /// Nodes and Sentinels are counted and not shown: their URLs may hold passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisOptions")
            .field("timeout", &self.timeout)
            .field("record_limit", &self.record_limit)
            .field("prefix", &self.prefix)
            .field("min_replicas", &self.min_replicas)
            .field("other_nodes", &self.other_nodes.len())
            .field(
                "sentinels",
                &self.sentinel.as_ref().map_or(0, |sentinel| sentinel.urls.len()),
            )
            .finish_non_exhaustive()
    }
}
