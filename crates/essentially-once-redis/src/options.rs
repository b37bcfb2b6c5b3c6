//! How to connect, and how to open a log.

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

/// How many replicas must confirm a write, and how long to wait for them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MinReplicas {
    pub(crate) replicas: u32,
    pub(crate) timeout: Duration,
}

/// The Sentinels that know the master's address.
#[derive(Clone)]
pub(crate) struct Sentinel {
    pub(crate) master: String,
    pub(crate) urls: Vec<String>,
}

impl RedisOptions {
    /// The defaults: a timeout of 10 seconds, records of up to 16 MiB, the prefix
    /// `essentially-once`, and no waiting for replicas.
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

    /// How long to wait for a connection, and for each reply. From a millisecond to a day. A commit
    /// or append without a reply in that time fails with [`Error::Indeterminate`].
    ///
    /// A call to a server that does not answer fails after at most twice this time plus a second:
    /// one second to check an idle connection, then this time to reconnect, then this time for the
    /// reply. Each [further node](Self::other_nodes) and each [Sentinel](Self::sentinel) adds this
    /// time once. [Replicas](Self::min_replicas) add their own timeout, and a reader that waits for
    /// the next record takes two seconds more. An append of many megabytes waits for one reply per
    /// megabyte.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.clamp(Duration::from_millis(1), Duration::from_secs(24 * 60 * 60));
        self
    }

    /// The largest record (key, headers and payload together), state key or state value, in bytes.
    /// Redis itself accepts 512 MiB (`proto-max-bulk-len`).
    #[must_use]
    pub fn record_limit(mut self, bytes: usize) -> Self {
        self.record_limit = bytes;
        self
    }

    /// The prefix of this crate's own keys, as in `<prefix>:{<consumer>}:position`. Two services
    /// that share a server and have consumers of the same name need different prefixes.
    ///
    /// A prefix must not contain braces, because a cluster computes slots from the text between
    /// them. After the first segment it must not contain the segment `retention`
    /// (`shop:retention`), because keys of two prefixes could then be equal.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Waits after each append and commit until this many replicas have it (`WAIT`). If they do not
    /// confirm within `timeout`, the call fails with [`Error::Indeterminate`], since the master has
    /// the write and the replicas may not. This makes it less likely that a failover loses
    /// acknowledged writes. Redis cannot rule it out. With 0 replicas nothing is waited for, as by
    /// default.
    #[must_use]
    pub fn min_replicas(mut self, replicas: u32, timeout: Duration) -> Self {
        self.min_replicas = (replicas > 0).then_some(MinReplicas { replicas, timeout });
        self
    }

    /// Further nodes of a cluster, as URLs. They are asked for the cluster's layout when the node
    /// given to [`connect`](Self::connect) does not answer. Only their addresses are used.
    #[must_use]
    pub fn other_nodes(mut self, urls: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.other_nodes = urls.into_iter().map(Into::into).collect();
        self
    }

    /// Asks Sentinels for the address of the master with this name, for every new connection. Each
    /// Sentinel's URL may have its own user and password. The URL given to
    /// [`connect`](Self::connect) then supplies the master's user, password, database and TLS. Its
    /// host and port are ignored.
    #[must_use]
    pub fn sentinel(mut self, master: impl Into<String>, urls: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.sentinel = Some(Sentinel {
            master: master.into(),
            urls: urls.into_iter().map(Into::into).collect(),
        });
        self
    }

    /// Trusts this certificate authority (PEM) instead of the system's, for `rediss://` URLs.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn root_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.certificates().root_cert = Some(pem.into());
        self
    }

    /// Presents this certificate and key (PEM) to the server, for `rediss://` URLs.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn client_certificate(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.certificates().client_tls = Some(redis::ClientTlsConfig {
            client_cert: certificate.into(),
            client_key: key.into(),
        });
        self
    }

    /// Connects to `redis://[user:password@]host[:port][/database]`, to `rediss://…` with TLS, or
    /// to `redis+unix:///path` through a socket.
    ///
    /// Uses RESP3 if the server supports it, because only then does the client library report at
    /// once that a connection was closed. `?protocol=resp2` in the URL forces the older protocol,
    /// for instance for a proxy.
    ///
    /// # Errors
    /// - [`Error::InvalidSetting`];
    /// - [`Error::Failed`] for an untrusted certificate, a rejected user or password, or a server
    ///   older than Redis 7.0;
    /// - [`Error::Unavailable`] if the server cannot be reached.
    ///
    /// No message contains the URL's user or password.
    pub async fn connect(self, url: &str) -> Result<Redis, Error> {
        check_prefix(&self.prefix)?;
        #[cfg(feature = "tls")]
        self.check_certificates()?;
        Server::connect(self, url).await.map(Redis::new)
    }

    /// Without this check, a file without a certificate would show up as an untrusted server.
    #[cfg(feature = "tls")]
    fn check_certificates(&self) -> Result<(), Error> {
        use rustls::pki_types::{CertificateDer, pem::PemObject as _};

        let root = self.certificates.as_ref().and_then(|given| given.root_cert.as_ref());
        match root.map(|pem| CertificateDer::pem_slice_iter(pem).next()) {
            None | Some(Some(Ok(_))) => Ok(()),
            Some(_) => Err(Error::InvalidSetting {
                setting: "root_certificate",
                reason: "it contains no certificate in PEM format".into(),
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
    /// Shows only the number of nodes and Sentinels, since their URLs may contain passwords.
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
