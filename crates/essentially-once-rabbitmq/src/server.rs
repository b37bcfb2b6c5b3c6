//! A broker and its connections.

use std::{
    fmt,
    future::Future,
    net::Ipv6Addr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use essentially_once::Error;
use lapin::{tcp::OwnedTLSConfig, uri::AMQPUri};

use crate::{
    connection::{Connection, Refusal},
    error::{message_limit, not_done},
    options::RabbitOptions,
    shared::Shared,
};

/// Seconds between heartbeats, unless the URL says otherwise. A peer that is silent for twice as
/// long is gone.
const HEARTBEAT: u16 = 10;

/// The size of headers that a message can always have. A frame has 128 KiB unless someone
/// configured less.
const HEADERS_LIMIT: usize = 32 * 1024;

/// A broker or cluster, and how to talk to it.
pub(crate) struct Server {
    pub(crate) options: RabbitOptions,
    uri: AMQPUri,
    /// For short questions. The broker closes the connection of a client that asks for a stream
    /// which is not up yet, so nothing else uses it.
    pub(crate) asking: Shared,
    /// For the stores. Publishing and reading are kept apart, since the broker may stop reading
    /// from connections that publish.
    pub(crate) publishing: Shared,
    pub(crate) reading: Shared,
    /// See [`message_limit`](Self::message_limit).
    message_limit: Mutex<Option<Learned>>,
    /// See [`headers_limit`](Self::headers_limit).
    headers_limit: AtomicUsize,
}

/// A limit, and the connection on which the broker named it.
struct Learned {
    limit: usize,
    connection: Arc<Connection>,
}

impl Server {
    /// Connects once, to check that the broker accepts the user.
    pub(crate) async fn connect(options: RabbitOptions, url: &str) -> Result<Arc<Self>, Error> {
        let uri = parse(url, &options)?;
        let server = Arc::new(Self::new(options, uri));
        server.asking.connection(&server).await?;
        Ok(server)
    }

    fn new(options: RabbitOptions, uri: AMQPUri) -> Self {
        Self {
            options,
            uri,
            asking: Shared::default(),
            publishing: Shared::default(),
            reading: Shared::default(),
            message_limit: Mutex::default(),
            headers_limit: AtomicUsize::new(HEADERS_LIMIT),
        }
    }

    /// Opens a new connection.
    pub(crate) async fn open_connection(&self) -> Result<Connection, Error> {
        let action = || format!("connect to {self}");
        let limit = match self.uri.query.connection_timeout {
            Some(millis) => self.options.timeout.min(Duration::from_millis(millis)),
            None => self.options.timeout,
        };
        let opened = Connection::open(self.uri.clone(), self.tls(), limit).await;
        let connection = opened.map_err(|refusal| match refusal {
            Refusal::Error(error) => not_done(action(), error),
            Refusal::Silence => Error::unavailable(action(), format!("no answer within {limit:?}")),
        })?;
        // 0 means no limit.
        let half_a_frame = match connection.configuration().frame_max() as usize / 2 {
            0 => HEADERS_LIMIT,
            half => half.min(HEADERS_LIMIT),
        };
        self.headers_limit.store(half_a_frame, Ordering::Relaxed);
        Ok(connection)
    }

    /// Waits for a lock within the time limit. Its holder may be waiting for a broker that does not
    /// answer.
    pub(crate) async fn in_turn<T>(&self, turn: impl Future<Output = T>) -> Result<T, Error> {
        let limit = self.options.timeout;
        tokio::time::timeout(limit, turn).await.map_err(|_| {
            Error::unavailable(
                self.on("wait for other calls"),
                format!("they did not finish within {limit:?}"),
            )
        })
    }

    /// Awaits the reply to a request that changes nothing, within the time limit.
    pub(crate) async fn reply<T>(
        &self,
        action: impl Fn() -> String,
        reply: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T, Error> {
        let limit = self.options.timeout;
        match tokio::time::timeout(limit, reply).await {
            Ok(replied) => replied.map_err(|error| not_done(self.on(action()), error)),
            Err(_) => Err(Error::unavailable(
                self.on(action()),
                format!("no answer within {limit:?}"),
            )),
        }
    }

    /// The largest message body that the broker takes (`max_message_size`), once it has refused a
    /// larger one. AMQP has no request for it.
    ///
    /// The limit is forgotten with the connection on which the broker named it, since a node reads
    /// the setting when it starts.
    pub(crate) fn message_limit(&self) -> usize {
        let mut learned = self.learned();
        learned.take_if(|learned| !learned.connection.status().connected());
        learned.as_ref().map_or(usize::MAX, |learned| learned.limit)
    }

    /// Remembers the limit that this error names, and returns it. The nodes of a cluster may have
    /// different limits; [`message_limit`](Self::message_limit) returns the smallest.
    pub(crate) fn learn_message_limit(&self, error: &lapin::Error, connection: &Arc<Connection>) -> Option<usize> {
        let limit = message_limit(error)?;
        if limit < self.message_limit() {
            *self.learned() = Some(Learned {
                limit,
                connection: Arc::clone(connection),
            });
        }
        Some(limit)
    }

    fn learned(&self) -> MutexGuard<'_, Option<Learned>> {
        self.message_limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The size of headers that a message can have. They must fit one frame with room to spare.
    pub(crate) fn headers_limit(&self) -> usize {
        self.headers_limit.load(Ordering::Relaxed)
    }

    /// Names the action and the broker.
    pub(crate) fn on(&self, action: impl fmt::Display) -> String {
        format!("{action} on {self}")
    }

    #[cfg(feature = "tls")]
    fn tls(&self) -> OwnedTLSConfig {
        // rustls panics in a program with two cryptography providers unless one is chosen.
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let identity = self.options.client_certificate.clone();
        OwnedTLSConfig {
            identity: identity.map(|(pem, key)| lapin::tcp::OwnedIdentity::PKCS8 { pem, key }),
            cert_chain: self.options.root_certificate.clone(),
        }
    }

    pub(crate) fn vhost(&self) -> &str {
        &self.uri.vhost
    }

    #[cfg(not(feature = "tls"))]
    fn tls(&self) -> OwnedTLSConfig {
        OwnedTLSConfig::default()
    }
}

/// Host, port and virtual host; never the user or password.
impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authority = &self.uri.authority;
        let vhost = self.uri.vhost.replace('/', "%2f");
        match authority.host.parse::<Ipv6Addr>() {
            Ok(host) => write!(f, "RabbitMQ [{host}]:{}/{vhost}", authority.port),
            Err(_) => write!(f, "RabbitMQ {}:{}/{vhost}", authority.host, authority.port),
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

/// Parses a URL. lapin's message for a malformed one may quote it with the password, so it is not
/// used.
fn parse(url: &str, options: &RabbitOptions) -> Result<AMQPUri, Error> {
    let invalid = |reason: &str| Error::InvalidSetting {
        setting: "RabbitMQ URL",
        reason: format!("{reason}; expected amqp://[user:password@]host[:port][/vhost], or amqps:// for TLS"),
    };
    let mut uri: AMQPUri = url.parse().map_err(|_| invalid("it cannot be parsed"))?;
    // lapin takes names and IPv4 addresses only, and replaces anything else by `localhost`.
    if let Some(host) = ipv6_host(url) {
        uri.authority.host = host.to_string();
    }
    if uri.vhost.len() > 255 {
        return Err(invalid("the virtual host's name is longer than 255 bytes"));
    }
    let is_tls = url.starts_with("amqps:");
    if is_tls && !cfg!(feature = "tls") {
        return Err(invalid("this build has no TLS; enable the crate's feature `tls`"));
    }
    #[cfg(feature = "tls")]
    if !is_tls && (options.root_certificate.is_some() || options.client_certificate.is_some()) {
        return Err(invalid("certificates are set, so it must begin with amqps://"));
    }
    let _ = options;
    uri.query.heartbeat.get_or_insert(HEARTBEAT);
    Ok(uri)
}

/// The host of a URL such as `amqp://user@[::1]:5672`.
fn ipv6_host(url: &str) -> Option<Ipv6Addr> {
    let authority = url.split_once("://")?.1.split(['/', '?', '#']).next()?;
    let host = authority.rsplit('@').next()?.strip_prefix('[')?;
    host.split_once(']')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<Server, Error> {
        let options = RabbitOptions::new();
        parse(url, &options).map(|uri| Server::new(options, uri))
    }

    #[test]
    fn urls_are_read_as_the_specification_says() {
        for (url, shown) in [
            ("amqp://localhost", "RabbitMQ localhost:5672/%2f"),
            ("amqps://shop:secret@rabbit.example", "RabbitMQ rabbit.example:5671/%2f"),
            ("amqp://shop:secret@[::1]:1234/orders", "RabbitMQ [::1]:1234/orders"),
            ("amqp://127.0.0.1:99/a%2fb", "RabbitMQ 127.0.0.1:99/a%2fb"),
        ] {
            assert_eq!(parsed(url).expect(url).to_string(), shown);
        }
        let server = parsed("amqp://localhost/%2f?heartbeat=3&connection_timeout=500").expect("valid");
        assert_eq!(server.uri.query.heartbeat, Some(3));
        assert_eq!(server.uri.query.connection_timeout, Some(500));
    }

    #[test]
    fn no_password_is_shown() {
        for bad in [
            "http://shop:secret@host",
            "amqp://shop:secret@host:port",
            "secret",
            "amqp://shop:secret@host/?heartbeat=x",
        ] {
            let error = parsed(bad).expect_err(bad).to_string();
            assert!(!error.contains("secret"), "{error}");
        }
        let server = parsed("amqp://shop:secret@host").expect("valid");
        assert!(!format!("{server:?} {server} {:?}", server.options).contains("secret"));
    }
}
