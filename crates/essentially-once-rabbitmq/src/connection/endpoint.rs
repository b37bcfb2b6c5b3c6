//! The address of a broker, and how to wait for it.

use std::{
    fmt,
    future::Future,
    net::Ipv6Addr,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use essentially_once::Error;
use lapin::uri::AMQPUri;

use super::{Connection, Refusal, Tls};
use crate::error::not_done;

/// Seconds between heartbeats, unless the URL says otherwise. A peer that is silent for twice as
/// long is gone.
const HEARTBEAT: u16 = 10;

/// The size of headers that a message can always have. A frame has 128 KiB unless someone
/// configured less.
const HEADERS_LIMIT: usize = 32 * 1024;

/// A broker or cluster, and how to connect to it.
pub(crate) struct Endpoint {
    uri: AMQPUri,
    tls: Tls,
    /// The time limit for each step.
    pub(crate) timeout: Duration,
    /// See [`headers_limit`](Self::headers_limit).
    headers_limit: AtomicUsize,
}

impl Endpoint {
    pub(crate) fn new(uri: AMQPUri, tls: Tls, timeout: Duration) -> Self {
        Self {
            uri,
            tls,
            timeout,
            headers_limit: AtomicUsize::new(HEADERS_LIMIT),
        }
    }

    /// Opens a new connection.
    pub(crate) async fn open_connection(&self) -> Result<Connection, Error> {
        let action = || format!("connect to {self}");
        let limit = match self.uri.query.connection_timeout {
            Some(millis) => self.timeout.min(Duration::from_millis(millis)),
            None => self.timeout,
        };
        let opened = Connection::open(self.uri.clone(), self.tls.clone(), limit).await;
        let connection = opened.map_err(|refusal| match refusal {
            Refusal::Error(error) => not_done(action(), error),
            Refusal::Silence => Error::unavailable(
                action(),
                format!("no answer within {limit:?}; check that a broker listens at this port and speaks AMQP"),
            ),
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
        let limit = self.timeout;
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
        let limit = self.timeout;
        match tokio::time::timeout(limit, reply).await {
            Ok(replied) => replied.map_err(|error| not_done(self.on(action()), error)),
            Err(_) => Err(Error::unavailable(
                self.on(action()),
                format!("no answer within {limit:?}"),
            )),
        }
    }

    /// The size of headers that a message can have. They must fit one frame with room to spare.
    pub(crate) fn headers_limit(&self) -> usize {
        self.headers_limit.load(Ordering::Relaxed)
    }

    /// Names the action and the broker.
    pub(crate) fn on(&self, action: impl fmt::Display) -> String {
        format!("{action} on {self}")
    }

    pub(crate) fn vhost(&self) -> &str {
        &self.uri.vhost
    }
}

/// Host, port and virtual host; never the user or password.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authority = &self.uri.authority;
        let vhost = self.uri.vhost.replace('/', "%2f");
        match authority.host.parse::<Ipv6Addr>() {
            Ok(host) => write!(f, "RabbitMQ [{host}]:{}/{vhost}", authority.port),
            Err(_) => write!(f, "RabbitMQ {}:{}/{vhost}", authority.host, authority.port),
        }
    }
}

/// Parses a URL. lapin's message for a malformed one may quote it with the password, so it is not
/// used.
pub(crate) fn parse(url: &str) -> Result<AMQPUri, Error> {
    let mut uri: AMQPUri = url.parse().map_err(|_| invalid_url("it cannot be parsed"))?;
    // lapin takes names and IPv4 addresses only, and replaces anything else by `localhost`.
    if let Some(host) = ipv6_host(url) {
        uri.authority.host = host.to_string();
    }
    if uri.vhost.len() > 255 {
        return Err(invalid_url("the virtual host's name is longer than 255 bytes"));
    }
    uri.query.heartbeat.get_or_insert(HEARTBEAT);
    Ok(uri)
}

pub(crate) fn invalid_url(reason: &str) -> Error {
    Error::InvalidSetting {
        setting: "RabbitMQ URL",
        reason: format!("{reason}; expected amqp://[user:password@]host[:port][/vhost], or amqps:// for TLS"),
    }
}

/// The host of a URL such as `amqp://user@[::1]:5672`.
fn ipv6_host(url: &str) -> Option<Ipv6Addr> {
    let authority = url.split_once("://")?.1.split(['/', '?', '#']).next()?;
    let host = authority.rsplit('@').next()?.strip_prefix('[')?;
    host.split_once(']')?.0.parse().ok()
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<Endpoint, Error> {
        parse(url).map(|uri| Endpoint::new(uri, Tls::default(), Duration::from_secs(1)))
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
        let endpoint = parsed("amqp://localhost/%2f?heartbeat=3&connection_timeout=500").expect("valid");
        assert_eq!(endpoint.uri.query.heartbeat, Some(3));
        assert_eq!(endpoint.uri.query.connection_timeout, Some(500));
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
        let endpoint = parsed("amqp://shop:secret@host").expect("valid");
        assert!(!format!("{endpoint:?} {endpoint}").contains("secret"));
    }
}
