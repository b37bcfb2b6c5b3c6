//! Finds the backend that a URL names.

use std::sync::Arc;

use essentially_once::Log;
#[cfg(feature = "kafka")]
use essentially_once_kafka::{Kafka, KafkaOptions};
#[cfg(feature = "postgres")]
use essentially_once_postgres::{Pg, PgOptions};
#[cfg(feature = "rabbitmq")]
use essentially_once_rabbitmq::{Rabbit, RabbitOptions};
#[cfg(feature = "redis")]
use essentially_once_redis::{Redis, RedisOptions};
#[cfg(feature = "sqlite")]
use essentially_once_sqlite::{Sqlite, SqliteOptions};

use crate::{failure::Failure, store::Store};

/// How many messages a broker sends ahead.
#[cfg(feature = "rabbitmq")]
const PREFETCH: u16 = 500;

/// A URL without the name of the log.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Address {
    url: String,
    kind: Kind,
    pub(crate) log: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sqlite,
    Postgres,
    Redis,
    Rabbitmq,
    Kafka,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "SQLite",
            Self::Postgres => "PostgreSQL",
            Self::Redis => "Redis",
            Self::Rabbitmq => "RabbitMQ",
            Self::Kafka => "Kafka",
        }
    }
}

/// The beginnings of URLs, for messages.
const SCHEMES: &str =
    "`sqlite:`, `postgres:`, `redis:`, `rediss:`, `redis+unix:`, `amqp:`, `amqps:`, `kafka:` or `kafkas:`";

impl Address {
    /// Splits a URL. `option` is the argument that it was given for. A message never repeats the
    /// URL, since it may hold a password.
    pub(crate) fn parse(url: &str, option: &str) -> Result<Self, Failure> {
        let (url, log) = match url.split_once('#') {
            Some((_, "")) => {
                return Err(Failure::usage(format!(
                    "{option}: there is no name of a log after the `#`"
                )));
            }
            Some((url, log)) => (url, Some(log.to_owned())),
            None => (url, None),
        };
        if let Some(log) = &log
            && log.contains('@')
            && !url.contains('@')
        {
            return Err(Failure::usage(format!(
                "{option}: there is an `@` after the `#`; if the `#` belongs to a password, write it as `%23`"
            )));
        }
        let Some((scheme, rest)) = url.split_once(':') else {
            return Err(Failure::usage(format!("{option}: the URL must begin with {SCHEMES}")));
        };
        let (kind, url) = match scheme {
            // `sqlite:///a/b.db` and `sqlite:/a/b.db` are the same file.
            "sqlite" => (Kind::Sqlite, rest.strip_prefix("//").unwrap_or(rest)),
            "postgres" | "postgresql" => (Kind::Postgres, url),
            "redis" | "rediss" | "redis+unix" | "valkey" | "valkeys" => (Kind::Redis, url),
            "amqp" | "amqps" => (Kind::Rabbitmq, url),
            "kafka" | "kafkas" => (Kind::Kafka, url),
            // The scheme itself may be the beginning of something secret.
            _ => {
                return Err(Failure::usage(format!(
                    "{option}: no backend has this scheme; the URL must begin with {SCHEMES}"
                )));
            }
        };
        Ok(Self {
            url: url.to_owned(),
            kind,
            log,
        })
    }

    /// Connects, and creates nothing.
    pub(crate) async fn open(&self, prefix: Option<&str>) -> Result<Backend, Failure> {
        match self.kind {
            #[cfg(feature = "sqlite")]
            Kind::Sqlite => match prefix {
                None => Ok(Backend::Sqlite(SqliteOptions::new().existing().open(&self.url).await?)),
                Some(_) => Err(Failure::usage(
                    "a SQLite file has no prefix: leave `--prefix` out, and ESSENTIALLY_ONCE_PREFIX unset",
                )),
            },
            // The prefix of the tables is their schema.
            #[cfg(feature = "postgres")]
            Kind::Postgres => {
                let mut options = PgOptions::new().existing();
                if let Some(prefix) = prefix {
                    options = options.schema(prefix);
                }
                Ok(Backend::Postgres(options.connect(&self.url).await?))
            }
            #[cfg(feature = "redis")]
            Kind::Redis => {
                let mut options = RedisOptions::new();
                if let Some(prefix) = prefix {
                    options = options.prefix(prefix);
                }
                Ok(Backend::Redis(options.connect(&self.url).await?))
            }
            #[cfg(feature = "rabbitmq")]
            Kind::Rabbitmq => {
                // One call reads a whole changelog, and the broker may be far away.
                let mut options = RabbitOptions::new().prefetch(PREFETCH);
                if let Some(prefix) = prefix {
                    options = options.prefix(prefix);
                }
                Ok(Backend::Rabbitmq(options.connect(&self.url).await?))
            }
            #[cfg(feature = "kafka")]
            Kind::Kafka => Ok(Backend::Kafka(KafkaOptions::new().connect(&self.url).await?)),
            #[allow(unreachable_patterns, reason = "with all features, every kind is above")]
            kind => Err(Failure::usage(format!(
                "this program was built without {}: install it with that feature",
                kind.name()
            ))),
        }
    }

    pub(crate) fn is_file(&self) -> bool {
        self.kind == Kind::Sqlite
    }

    /// Whether it keeps positions, and not only logs.
    pub(crate) fn is_store(&self) -> bool {
        self.kind != Kind::Kafka
    }

    /// Whether its services may have set a prefix.
    pub(crate) fn has_prefix(&self) -> bool {
        !matches!(self.kind, Kind::Sqlite | Kind::Kafka)
    }

    /// What to call the backend. It shows no password.
    pub(crate) fn shown(&self) -> String {
        match self.kind {
            Kind::Sqlite => format!("SQLite file {}", self.url),
            Kind::Postgres | Kind::Redis | Kind::Rabbitmq | Kind::Kafka => {
                let (scheme, rest) = self.url.split_once("//").unwrap_or_default();
                let rest = rest.split('?').next().unwrap_or_default();
                // A socket's path has no password, which is in the query.
                let is_socket = scheme.contains("unix");
                let (server, path) = match rest.rsplit_once('@') {
                    _ if is_socket => (rest, ""),
                    Some((_, server)) => server.split_once('/').unwrap_or((server, "")),
                    None => rest.split_once('/').unwrap_or((rest, "")),
                };
                let database = match path.parse::<u32>() {
                    Ok(number @ 1..) if self.kind == Kind::Redis => format!(", database {number}"),
                    _ if self.kind == Kind::Postgres && is_name(path) => format!(", database {path}"),
                    _ => String::new(),
                };
                match is_socket || server.split(',').all(is_address) {
                    true => format!("{} at {server}{database}", self.kind.name()),
                    false => self.kind.name().into(),
                }
            }
        }
    }
}

/// Whether it is the name of a database, and not a part of something secret.
fn is_name(path: &str) -> bool {
    !path.is_empty() && path.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
}

/// Whether it is a host with or without a port, and not a part of something secret.
fn is_address(server: &str) -> bool {
    let (host, port) = match server.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (server, ""),
    };
    let is_host = |c: char| c.is_ascii_alphanumeric() || ".:-_[]".contains(c);
    host.chars().all(is_host) && port.chars().all(|c| c.is_ascii_digit())
}

/// What to do about a store on Kafka.
pub(crate) const NO_STORE: &str = "Kafka keeps the log, and no position, state or dead letter of a consumer: give the \
                                   backend that does with `--store`, or set ESSENTIALLY_ONCE_STORE";

/// A backend that answers.
pub(crate) enum Backend {
    #[cfg(feature = "sqlite")]
    Sqlite(Sqlite),
    #[cfg(feature = "postgres")]
    Postgres(Pg),
    #[cfg(feature = "redis")]
    Redis(Redis),
    #[cfg(feature = "rabbitmq")]
    Rabbitmq(Rabbit),
    #[cfg(feature = "kafka")]
    Kafka(Kafka),
}

impl Backend {
    /// Opens a log that must exist.
    pub(crate) async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Failure> {
        Ok(match self {
            #[cfg(feature = "sqlite")]
            Self::Sqlite(sqlite) => {
                let options = essentially_once_sqlite::LogOptions::new().existing();
                Arc::new(sqlite.log_with(name, options).await?)
            }
            #[cfg(feature = "postgres")]
            Self::Postgres(pg) => {
                let options = essentially_once_postgres::LogOptions::new().existing();
                Arc::new(pg.log_with(name, options).await?)
            }
            #[cfg(feature = "redis")]
            Self::Redis(redis) => {
                let options = essentially_once_redis::LogOptions::new().existing();
                Arc::new(redis.log_with(name, options).await?)
            }
            #[cfg(feature = "rabbitmq")]
            Self::Rabbitmq(rabbit) => match rabbit.store().sent_named(name)? {
                Some(outbox) => Arc::new(outbox),
                None => {
                    let options = essentially_once_rabbitmq::LogOptions::new().existing();
                    Arc::new(rabbit.log_with(name, options).await?)
                }
            },
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => {
                let options = essentially_once_kafka::LogOptions::new().existing();
                // A log's name ends in the number of its partition, unless that is 0.
                let numbered = name.rsplit_once('/').map(|(topic, number)| (topic, number.parse()));
                let (name, options) = match numbered {
                    Some((topic, Ok(number @ 1..))) => (topic, options.partition(number)),
                    _ => (name, options),
                };
                Arc::new(kafka.log_with(name, options).await?)
            }
        })
    }

    pub(crate) fn store(&self) -> Result<Box<dyn Store>, Failure> {
        Ok(match self {
            #[cfg(feature = "sqlite")]
            Self::Sqlite(sqlite) => Box::new(sqlite.store()),
            #[cfg(feature = "postgres")]
            Self::Postgres(pg) => Box::new(pg.store()),
            #[cfg(feature = "redis")]
            Self::Redis(redis) => Box::new(redis.store()),
            #[cfg(feature = "rabbitmq")]
            Self::Rabbitmq(rabbit) => Box::new(rabbit.store()),
            #[cfg(feature = "kafka")]
            Self::Kafka(_) => return Err(Failure::usage(NO_STORE)),
        })
    }

    /// Name and version of the server or library; `None` if it does not tell.
    pub(crate) fn version(&self) -> Option<String> {
        match self {
            #[cfg(feature = "sqlite")]
            Self::Sqlite(_) => Some(format!("SQLite {}", essentially_once_sqlite::rusqlite::version())),
            #[cfg(feature = "postgres")]
            Self::Postgres(pg) => pg.version().map(str::to_owned),
            #[cfg(feature = "redis")]
            Self::Redis(redis) => redis.version().map(str::to_owned),
            // The client library hides what the broker says when it connects.
            #[cfg(feature = "rabbitmq")]
            Self::Rabbitmq(_) => None,
            // The protocol has versions, and the broker does not say its own.
            #[cfg(feature = "kafka")]
            Self::Kafka(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Address {
        Address::parse(url, "--log").unwrap_or_else(|_| panic!("{url}"))
    }

    #[test]
    fn a_url_names_a_backend_and_a_log() {
        for (url, shown, log) in [
            ("sqlite:a.db", "SQLite file a.db", None),
            ("sqlite:///var/a.db#orders", "SQLite file /var/a.db", Some("orders")),
            ("sqlite:/var/a.db", "SQLite file /var/a.db", None),
            (
                "postgres://ann:s3cret@h/shop?password=s3cret#orders",
                "PostgreSQL at h, database shop",
                Some("orders"),
            ),
            ("postgresql://h:5433", "PostgreSQL at h:5433", None),
            ("redis://h:6379/0#orders", "Redis at h:6379", Some("orders")),
            ("redis://ann:s3cret@h/2", "Redis at h, database 2", None),
            ("rediss://ann:s3cret@h/?protocol=resp2", "Redis at h", None),
            ("amqp://ann:s3c@ret@h/%2f#a/b", "RabbitMQ at h", Some("a/b")),
            ("redis+unix:///run/r.sock?pass=s3@cret", "Redis at /run/r.sock", None),
            ("redis://h/?pass=s3@cret", "Redis at h", None),
            ("redis://[::1]:6379#orders", "Redis at [::1]:6379", Some("orders")),
            ("redis://[::1]", "Redis at [::1]", None),
            ("redis://ann:s3cret", "Redis", None),
            (
                "kafka://ann:s3cret@a:1,b:2#orders/3",
                "Kafka at a:1,b:2",
                Some("orders/3"),
            ),
            ("kafkas://h", "Kafka at h", None),
        ] {
            let address = parsed(url);
            assert_eq!(
                (address.shown().as_str(), address.log.as_deref()),
                (shown, log),
                "{url}"
            );
        }
    }

    #[test]
    fn a_bad_url_is_refused_without_repeating_it() {
        for url in [
            "",
            "a.db",
            "http://ann:s3cret@h/",
            "redis://h#",
            "s3cret:x",
            "redis://ann:s3cret#more@h/0#orders",
        ] {
            let Err(failure) = Address::parse(url, "--store") else {
                panic!("{url} was taken");
            };
            let text = failure.to_string();
            assert!(text.contains("--store") && !text.contains("s3cret"), "{text}");
        }
    }
}
