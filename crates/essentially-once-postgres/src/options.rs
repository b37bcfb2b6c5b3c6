//! How to connect, and how to open a log.

use std::{fmt, time::Duration};

use essentially_once::{Error, backend::Retention};

/// PostgreSQL limits a message, and a value, to 1 GiB. An append sends all its records in one
/// message.
const MAX_RECORD_LIMIT: usize = 256 * 1024 * 1024;

/// How to connect to PostgreSQL; see [`Pg::connect`](crate::Pg::connect).
///
/// ```no_run
/// # use essentially_once_postgres::{Isolation, PgOptions};
/// # use std::time::Duration;
/// # async fn example() -> Result<(), essentially_once::Error> {
/// let pg = PgOptions::new()
///     .schema("shop_once")
///     .isolation(Isolation::RepeatableRead)
///     .lock_timeout(Duration::from_secs(2))
///     .connect("postgres://shop:secret@db.example/shop?sslmode=require")
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct PgOptions {
    pub(crate) timeout: Duration,
    pub(crate) lock_timeout: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) statement_timeout: Duration,
    pub(crate) record_limit: usize,
    pub(crate) schema: String,
    pub(crate) isolation: Isolation,
    pub(crate) state_memory: usize,
    pub(crate) existing: bool,
    #[cfg(feature = "tls")]
    pub(crate) root_certificates: Vec<Vec<u8>>,
    #[cfg(feature = "tls")]
    pub(crate) without_system_roots: bool,
    #[cfg(feature = "tls")]
    pub(crate) client_certificate: Option<Vec<u8>>,
    #[cfg(feature = "tls")]
    pub(crate) client_key: Option<Vec<u8>>,
}

/// What a transaction sees of the commits that others make while it is open; see
/// [PostgreSQL's documentation](https://www.postgresql.org/docs/current/transaction-iso.html).
///
/// The promise of this library holds at each level, since the commit checks the revision of the
/// position. The level matters for what a handler reads from tables that others write too.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum Isolation {
    /// Each statement sees what was committed before it.
    #[default]
    ReadCommitted,
    /// All statements see what was committed before the first one. A transaction that changes a row
    /// which another one has changed meanwhile fails, and the consumer handles its records again.
    RepeatableRead,
    /// As if transactions ran one after the other. More of them fail, and are handled again.
    Serializable,
}

impl Isolation {
    pub(crate) const fn begin(self) -> &'static str {
        match self {
            Self::ReadCommitted => "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",
            Self::RepeatableRead => "BEGIN ISOLATION LEVEL REPEATABLE READ READ WRITE",
            Self::Serializable => "BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE",
        }
    }
}

impl PgOptions {
    /// The defaults: the schema `essentially_once`, read committed, records of up to 16 MiB, 10
    /// seconds for an answer, 5 seconds for a lock, 10 seconds for a handler's pause between two
    /// statements, and a minute for its statement.
    pub fn new() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            lock_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(10),
            statement_timeout: Duration::from_secs(60),
            record_limit: 16 * 1024 * 1024,
            schema: "essentially_once".into(),
            isolation: Isolation::ReadCommitted,
            state_memory: 16 * 1024 * 1024,
            existing: false,
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

    /// Sets how long to wait for a connection, and for the answer to each request of this crate,
    /// from 1 ms to 24 h. A commit or append without an answer in that time fails with
    /// [`Error::Indeterminate`]. Waiting for a lock counts, so keep it above the
    /// [`lock_timeout`](Self::lock_timeout).
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets how long a statement waits for a lock before [`Error::Unavailable`], from 1 ms to 24 h;
    /// the server's `lock_timeout`.
    ///
    /// A handler that has changed rows keeps others from changing them until its transaction ends,
    /// even while its process is suspended.
    #[must_use]
    pub fn lock_timeout(mut self, timeout: Duration) -> Self {
        self.lock_timeout = timeout;
        self
    }

    /// Sets how long a handler may leave its transaction idle between two statements before the
    /// server rolls it back, from 1 ms to 24 h; the server's `idle_in_transaction_session_timeout`.
    ///
    /// It bounds how long an instance that is suspended keeps its locks, so it is also how long
    /// another instance may have to wait before it takes over. A handler that waits for longer
    /// between two statements, such as for an answer of another service, fails with
    /// [`Error::Unavailable`] and is called again.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// Sets how long a statement of a handler may run, from 1 ms to 24 h; the server's
    /// `statement_timeout`.
    #[must_use]
    pub fn statement_timeout(mut self, timeout: Duration) -> Self {
        self.statement_timeout = timeout;
        self
    }

    /// Sets the size limit of a record (key, headers and payload together), a state key and a state
    /// value, in bytes; at most 256 MiB. A state key is also limited to 2,048 bytes, because
    /// PostgreSQL cannot index a longer one.
    #[must_use]
    pub fn record_limit(mut self, bytes: usize) -> Self {
        self.record_limit = bytes;
        self
    }

    /// Sets the schema for this crate's tables: lower-case letters, digits and `_`, at most 63, and
    /// no digit first. Two services that share a database and have consumers of the same name need
    /// different schemas.
    #[must_use]
    pub fn schema(mut self, name: impl Into<String>) -> Self {
        self.schema = name.into();
        self
    }

    /// Sets the isolation level of handlers' transactions.
    #[must_use]
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// Sets how much of each consumer's [`KeyValue`](essentially_once::KeyValue) state a store
    /// remembers, in bytes; 16 MiB by default. With 0 it remembers nothing.
    ///
    /// A transaction that reads asks for the revision of the position first. If that is the one
    /// that the store remembers the state of, or if there is at most 1 MiB of state, its reads take
    /// no more round trips. The commit checks the same revision, so it never applies what was
    /// computed from an older state. If you change the table `state` by hand, stop the consumer
    /// first.
    #[must_use]
    pub fn state_memory(mut self, bytes: usize) -> Self {
        self.state_memory = bytes;
        self
    }

    /// Fails if the schema does not exist, or was not made by this version of the crate, instead of
    /// creating or migrating it. For programs that look after the data of others.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// Trusts the certificate authorities in this PEM text, in addition to the system's, for URLs
    /// with `sslmode=require`. Several calls add up.
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

    /// Presents this certificate (PEM, with its chain) to the server. It needs a
    /// [`client_key`](Self::client_key).
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
        for (setting, timeout) in [
            ("timeout", self.timeout),
            ("lock_timeout", self.lock_timeout),
            ("idle_timeout", self.idle_timeout),
            ("statement_timeout", self.statement_timeout),
        ] {
            check_timeout(setting, timeout)?;
        }
        let invalid = |setting, reason| Err(Error::InvalidSetting { setting, reason });
        if self.timeout <= self.lock_timeout {
            let (timeout, lock) = (self.timeout, self.lock_timeout);
            let reason = format!("{timeout:?} must be more than the `lock_timeout` of {lock:?}");
            return invalid("timeout", reason);
        }
        if self.record_limit > MAX_RECORD_LIMIT {
            let limit = self.record_limit;
            return invalid(
                "record_limit",
                format!("{limit} bytes is more than the limit of {MAX_RECORD_LIMIT}"),
            );
        }
        let name = &self.schema;
        let is_plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
        let starts_well = name.bytes().next().is_some_and(|first| !first.is_ascii_digit());
        if !starts_well || name.len() > 63 || !name.bytes().all(is_plain) || name.starts_with("pg_") {
            let reason = format!(
                "{:?} is not a name of 1 to 63 lower-case letters, digits and `_`; it must not begin with a digit or `pg_`",
                name.chars().take(70).collect::<String>()
            );
            return invalid("schema", reason);
        }
        Ok(())
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

impl Default for PgOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for PgOptions {
    /// Leaves out certificates and keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgOptions")
            .field("timeout", &self.timeout)
            .field("lock_timeout", &self.lock_timeout)
            .field("idle_timeout", &self.idle_timeout)
            .field("statement_timeout", &self.statement_timeout)
            .field("record_limit", &self.record_limit)
            .field("schema", &self.schema)
            .field("isolation", &self.isolation)
            .field("state_memory", &self.state_memory)
            .field("existing", &self.existing)
            .finish_non_exhaustive()
    }
}

/// How to open a log; see [`Pg::log_with`](crate::Pg::log_with).
///
/// ```no_run
/// # use essentially_once_postgres::{LogOptions, Pg, Retention};
/// # use std::time::Duration;
/// # async fn example(pg: Pg) -> Result<(), essentially_once::Error> {
/// let week = Duration::from_secs(7 * 24 * 60 * 60);
/// let keep = Retention::new().max_age(week).max_records(1_000_000);
/// let orders = pg.log_with("orders", LogOptions::new().retention(keep)).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LogOptions {
    pub(crate) existing: bool,
    pub(crate) retention: Option<Retention>,
}

impl LogOptions {
    /// Creates the log if it is missing, and keeps the stored retention.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fails if the log does not exist, instead of creating it. Without this, a consumer with a
    /// mistyped log name would wait on an empty log.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// Sets which records the log keeps. Opening the log stores this in the database, so it applies
    /// to appends of every process. Without this option, a log keeps the stored retention, and a
    /// new log keeps every record. [`Retention::new`] lifts all limits. If processes open a log
    /// with different retentions, the last one holds, and each change is logged as a warning.
    ///
    /// Appends remove expired records at most once a second, after they have returned.
    /// [`PgLog::trim`](crate::PgLog::trim) removes all of them at once. Of an outbox, these may be
    /// records that [no relay has sent](crate::PgLog#as-an-outbox).
    ///
    /// Opening the log fails with [`Error::InvalidSetting`] if the retention would keep no records
    /// or has [`max_bytes`](Retention::max_bytes), because this crate does not count bytes.
    #[must_use]
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = Some(retention);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_bounds_are_refused_by_name() {
        let options = PgOptions::new;
        options().check().expect("the defaults");
        options()
            .schema("a_1")
            .record_limit(MAX_RECORD_LIMIT)
            .check()
            .expect("at the bounds");
        let day = Duration::from_secs(24 * 60 * 60);
        for (options, setting, reason) in [
            (options().timeout(Duration::ZERO), "timeout", "1 ms"),
            (options().timeout(day * 2), "timeout", "24 h"),
            (
                options().lock_timeout(Duration::from_secs(11)),
                "timeout",
                "more than the `lock_timeout`",
            ),
            (options().lock_timeout(Duration::ZERO), "lock_timeout", "1 ms"),
            (options().idle_timeout(Duration::ZERO), "idle_timeout", "1 ms"),
            (options().statement_timeout(Duration::ZERO), "statement_timeout", "1 ms"),
            (
                options().record_limit(MAX_RECORD_LIMIT + 1),
                "record_limit",
                "268435456",
            ),
            (options().schema(""), "schema", "1 to 63"),
            (options().schema("Shop"), "schema", "lower-case"),
            (options().schema("a\"; DROP"), "schema", "lower-case"),
            (options().schema("1a"), "schema", "digit"),
            (options().schema("pg_shop"), "schema", "pg_"),
            (options().schema("a".repeat(64)), "schema", "63"),
        ] {
            match options.check() {
                Err(Error::InvalidSetting {
                    setting: found,
                    reason: why,
                }) => {
                    assert_eq!(found, setting, "{why}");
                    assert!(why.contains(reason), "{why}");
                }
                other => panic!("{setting}: {other:?}"),
            }
        }
    }
}
