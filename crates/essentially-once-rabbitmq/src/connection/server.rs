//! A broker and the connections to it.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use essentially_once::Error;
use lapin::uri::AMQPScheme;

use super::{
    Connection, Tls,
    connections::Connections,
    endpoint::{Endpoint, invalid_url, parse},
};
use crate::{error::message_limit, options::RabbitOptions};

/// A broker or cluster, and the shared connections to it.
pub(crate) struct Server {
    pub(crate) options: RabbitOptions,
    endpoint: Arc<Endpoint>,
    /// For short questions. The broker closes the connection of a client that asks for a stream
    /// which is not up yet, so nothing else uses it.
    pub(crate) asking: Connections,
    /// For the stores. Publishing and reading are kept apart, since the broker may stop reading
    /// from connections that publish.
    pub(crate) publishing: Connections,
    pub(crate) reading: Connections,
    /// See [`message_limit`](Self::message_limit).
    message_limit: Mutex<Option<Learned>>,
}

/// A limit, and the connection on which the broker named it.
struct Learned {
    limit: usize,
    connection: Arc<Connection>,
}

impl Server {
    /// Connects once, to check that the broker accepts the user.
    pub(crate) async fn connect(options: RabbitOptions, url: &str) -> Result<Arc<Self>, Error> {
        options.check()?;
        let uri = parse(url)?;
        let tls = tls(&options, uri.scheme == AMQPScheme::AMQPS)?;
        let endpoint = Arc::new(Endpoint::new(uri, tls, options.timeout));
        let connections = || Connections::new(Arc::clone(&endpoint));
        let server = Arc::new(Self {
            options,
            asking: connections(),
            publishing: connections(),
            reading: connections(),
            message_limit: Mutex::default(),
            endpoint,
        });
        server.asking.connection().await?;
        Ok(server)
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
}

impl Deref for Server {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

/// Shows the address only: the connections know the user.
impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.endpoint.fmt(f)
    }
}

#[cfg(feature = "tls")]
fn tls(options: &RabbitOptions, is_tls: bool) -> Result<Tls, Error> {
    match is_tls {
        true => super::tls::config(options).map(Some),
        false if options.has_certificates() => Err(invalid_url("certificates are set, so it must begin with amqps://")),
        false => Ok(None),
    }
}

#[cfg(not(feature = "tls"))]
fn tls(_: &RabbitOptions, is_tls: bool) -> Result<Tls, Error> {
    match is_tls {
        true => Err(invalid_url("this build has no TLS; enable the crate's feature `tls`")),
        false => Ok(None),
    }
}
