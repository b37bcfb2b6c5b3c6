//! How to connect, and how to open a log.

use std::{fmt, time::Duration};

use bytes::Bytes;
use essentially_once::{Error, backend::Retention};
use redis::Pipeline;

use crate::store::keys::check_prefix;

/// How to connect to Redis; see [`Redis::connect`](crate::Redis::connect).
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
    pub(crate) root_certificates: Vec<Vec<u8>>,
    #[cfg(feature = "tls")]
    pub(crate) without_system_roots: bool,
    #[cfg(feature = "tls")]
    pub(crate) client_certificate: Option<Vec<u8>>,
    #[cfg(feature = "tls")]
    pub(crate) client_key: Option<Vec<u8>>,
}

/// How many replicas must confirm a write, and how long to wait for them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MinReplicas {
    pub(crate) replicas: u32,
    pub(crate) timeout: Duration,
}

impl MinReplicas {
    /// Adds the command that waits for them. `check` keeps the timeout above 0, which `WAIT` takes
    /// as "forever".
    pub(crate) fn wait(self, pipeline: &mut Pipeline) {
        let millis = u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX);
        pipeline.cmd("WAIT").arg(self.replicas).arg(millis);
    }
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
            root_certificates: Vec::new(),
            #[cfg(feature = "tls")]
            without_system_roots: false,
            #[cfg(feature = "tls")]
            client_certificate: None,
            #[cfg(feature = "tls")]
            client_key: None,
        }
    }

    /// How long to wait for a connection, and for each reply: from 1 ms to 24 h. A commit or append
    /// without a reply in that time fails with [`Error::Indeterminate`].
    ///
    /// A call to a server that does not answer fails after at most twice this time plus a second:
    /// one second to check an idle connection, then this time to reconnect, then this time for the
    /// reply. Each [further node](Self::other_nodes) and each [Sentinel](Self::sentinel) adds this
    /// time once. [Replicas](Self::min_replicas) add their own timeout, and a reader that waits for
    /// the next record takes two seconds more. An append of many megabytes waits for one reply per
    /// megabyte.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
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
    /// acknowledged writes. Redis cannot rule it out. With 0 replicas, as by default, calls do not
    /// wait. The timeout is from 1 ms to 24 h.
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

    /// Trusts the certificate authorities in this PEM text, in addition to the system's, for
    /// `rediss://` URLs. Several calls add up.
    ///
    /// TLS uses the process's default cryptography provider of `rustls` if the program has
    /// installed one, and `ring` otherwise. This crate installs none.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn add_root_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.root_certificates.push(pem.into());
        self
    }

    /// Trusts only the authorities of [`add_root_certificate`](Self::add_root_certificate), and not
    /// the system's. At least one must be added.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn without_system_roots(mut self) -> Self {
        self.without_system_roots = true;
        self
    }

    /// Presents this certificate (PEM, with its chain) to the server, for `rediss://` URLs. It
    /// needs a [`client_key`](Self::client_key).
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn client_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.client_certificate = Some(pem.into());
        self
    }

    /// The private key (PEM) of the [`client_certificate`](Self::client_certificate).
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn client_key(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.client_key = Some(pem.into());
        self
    }

    /// Refuses values that are out of range.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check_timeout("timeout", self.timeout)?;
        if let Some(min) = self.min_replicas {
            check_timeout("min_replicas", min.timeout)?;
        }
        check_prefix(&self.prefix)
    }

    /// Whether TLS is configured, so that a URL without it must be a mistake.
    pub(crate) fn has_certificates(&self) -> bool {
        #[cfg(feature = "tls")]
        return !self.root_certificates.is_empty()
            || self.without_system_roots
            || self.client_certificate.is_some()
            || self.client_key.is_some();
        #[cfg(not(feature = "tls"))]
        return false;
    }
}

fn check_timeout(setting: &'static str, timeout: Duration) -> Result<(), Error> {
    const LEAST: Duration = Duration::from_millis(1);
    const MOST: Duration = Duration::from_secs(24 * 60 * 60);
    if (LEAST..=MOST).contains(&timeout) {
        return Ok(());
    }
    Err(Error::InvalidSetting {
        setting,
        reason: format!("a timeout of {timeout:?} is out of range: choose 1 ms to 24 h"),
    })
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

/// How to open a log, and what it keeps; see [`Redis::log_with`](crate::Redis::log_with).
///
/// ```
/// # use essentially_once_redis::{LogOptions, Retention};
/// let options = LogOptions::new()
///     .stream("{shop}:orders")
///     .payload_field("json")
///     .retention(Retention::new().max_records(1_000_000));
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogOptions {
    pub(crate) stream: Option<Bytes>,
    pub(crate) payload_field: String,
    pub(crate) key_field: String,
    pub(crate) retention: Retention,
    pub(crate) existing: bool,
}

impl LogOptions {
    /// The defaults: a missing stream is created, the log's name is the stream's key, entries of
    /// other programs have the fields `payload` and `key`, and everything is kept.
    pub fn new() -> Self {
        Self {
            stream: None,
            payload_field: "payload".into(),
            key_field: "key".into(),
            retention: Retention::default(),
            existing: false,
        }
    }

    /// Fails if the stream does not exist, instead of creating it. Useful for services that only
    /// read, which would otherwise wait forever at a misspelled name.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// The key of the stream, if it differs from the log's name. Braces in it must form a hash tag,
    /// as a cluster uses them.
    #[must_use]
    pub fn stream(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.stream = Some(key.into().into());
        self
    }

    /// The field that holds the payload in entries of other programs.
    #[must_use]
    pub fn payload_field(mut self, name: impl Into<String>) -> Self {
        self.payload_field = name.into();
        self
    }

    /// The field that holds the key in entries of other programs.
    #[must_use]
    pub fn key_field(mut self, name: impl Into<String>) -> Self {
        self.key_field = name.into();
        self
    }

    /// Which records the log keeps. This applies to the handle and is not stored: its appends
    /// remove expired records, at most once a second and after the append has returned.
    /// [`RedisLog::trim`](crate::RedisLog::trim) removes them at once. Redis cannot keep a limit in
    /// bytes, and opening the log with one fails with [`Error::InvalidSetting`].
    #[must_use]
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = retention;
        self
    }
}

impl Default for LogOptions {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_out_of_range_are_refused() {
        let day = Duration::from_secs(24 * 60 * 60);
        let with = |timeout| RedisOptions::new().timeout(timeout);
        let waiting = |timeout| RedisOptions::new().min_replicas(1, timeout);
        for timeout in [Duration::from_millis(1), Duration::from_secs(10), day] {
            with(timeout).check().expect("in range");
            waiting(timeout).check().expect("in range");
        }
        for timeout in [
            Duration::ZERO,
            Duration::from_micros(999),
            day + Duration::from_nanos(1),
        ] {
            for (options, name) in [(with(timeout), "timeout"), (waiting(timeout), "min_replicas")] {
                let error = options.check().expect_err("out of range");
                assert!(
                    matches!(error, Error::InvalidSetting { setting, .. } if setting == name),
                    "{error}"
                );
            }
        }
    }
}
