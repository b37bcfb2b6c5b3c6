//! Where the broker is, and how to connect to it.

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

/// Seconds between heartbeats, where the URL does not say: a peer that is silent for twice as long is gone.
const HEARTBEAT: u16 = 10;

/// What the headers of a message may take in any case. A frame has 128 KiB unless someone chose less.
const HEADERS_LIMIT: usize = 32 * 1024;

/// A broker or cluster, and how to talk to it.
pub(crate) struct Server {
    pub(crate) options: RabbitOptions,
    uri: AMQPUri,
    /// For what is soon answered. The broker ends the connection of who asks for a stream that is not up yet, so nothing else is on it.
    pub(crate) asking: Shared,
    /// For the stores: what publishes and what reads is kept apart, since the broker may stop reading from the first.
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
    /// Checks that the broker lets us in.
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

    /// A new connection.
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
        // 0 means that there is no limit.
        let half_a_frame = match connection.configuration().frame_max() as usize / 2 {
            0 => HEADERS_LIMIT,
            half => half.min(HEADERS_LIMIT),
        };
        self.headers_limit.store(half_a_frame, Ordering::Relaxed);
        Ok(connection)
    }

    /// Waits for a turn, within the time limit: others may wait for a broker that does not answer.
    pub(crate) async fn in_turn<T>(&self, turn: impl Future<Output = T>) -> Result<T, Error> {
        let limit = self.options.timeout;
        tokio::time::timeout(limit, turn).await.map_err(|_| {
            Error::unavailable(
                self.on("wait for other calls"),
                format!("they did not end within {limit:?}"),
            )
        })
    }

    /// Awaits the reply to something that changes nothing, within the time limit.
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

    /// The largest body of a message that the broker takes (`max_message_size`), once it has refused a
    /// larger one. AMQP has no request for it.
    ///
    /// It is forgotten with the connection on which the broker named it: a node reads the setting when
    /// it starts.
    pub(crate) fn message_limit(&self) -> usize {
        let mut learned = self.learned();
        learned.take_if(|learned| !learned.connection.status().connected());
        learned.as_ref().map_or(usize::MAX, |learned| learned.limit)
    }

    /// The limit that this error names, if it does; it is remembered. The nodes of a cluster may have
    /// different ones: the smallest is what [`message_limit`](Self::message_limit) says.
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

    /// What the headers of a message may take: they must fit one frame, with something to spare.
    pub(crate) fn headers_limit(&self) -> usize {
        self.headers_limit.load(Ordering::Relaxed)
    }

    /// What was attempted, and on which broker.
    pub(crate) fn on(&self, action: impl fmt::Display) -> String {
        format!("{action} on {self}")
    }

    #[cfg(feature = "tls")]
    fn tls(&self) -> OwnedTLSConfig {
        // A program with two cryptography providers must choose one, or rustls panics: if it did not, it is this.
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

/// Parses a URL. The library's words for a bad one may quote it, with the password, so ours do not.
fn parse(url: &str, options: &RabbitOptions) -> Result<AMQPUri, Error> {
    let invalid = |reason: &str| Error::InvalidSetting {
        setting: "RabbitMQ URL",
        reason: format!("{reason}; expected amqp://[user:password@]host[:port][/vhost], or amqps:// for TLS"),
    };
    let mut uri: AMQPUri = url.parse().map_err(|_| invalid("it cannot be parsed"))?;
    // The library takes only names and IPv4 addresses, and `localhost` in place of anything else.
    if let Some(host) = ipv6_host(url) {
        uri.authority.host = host.to_string();
    }
    if uri.vhost.len() > 255 {
        return Err(invalid("the virtual host's name is longer than 255 bytes"));
    }
    let is_tls = url.starts_with("amqps:");
    if is_tls && !cfg!(feature = "tls") {
        return Err(invalid("this build has no TLS: enable the crate's feature `tls`"));
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
