//! How to connect.

use std::{fmt, time::Duration};

use essentially_once::Error;

use crate::{Rabbit, server::Server, store::names};

/// How to connect to RabbitMQ; see [`Rabbit::connect`].
///
/// ```no_run
/// # use essentially_once_rabbitmq::RabbitOptions;
/// # use std::time::Duration;
/// # async fn example() -> Result<(), essentially_once::Error> {
/// let rabbit = RabbitOptions::new()
///     .timeout(Duration::from_secs(5))
///     .replicas(3)
///     .connect("amqps://shop:secret@rabbit.example/%2f?heartbeat=5")
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct RabbitOptions {
    pub(crate) timeout: Duration,
    pub(crate) record_limit: usize,
    pub(crate) prefix: String,
    pub(crate) replicas: Option<u16>,
    #[cfg(feature = "tls")]
    pub(crate) root_certificate: Option<String>,
    #[cfg(feature = "tls")]
    pub(crate) client_certificate: Option<(Vec<u8>, Vec<u8>)>,
}

impl RabbitOptions {
    /// The defaults: a timeout of 10 seconds, records of up to 15 MiB, prefix `essentially-once`,
    /// and as many replicas as the broker chooses.
    pub fn new() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            record_limit: 15 * 1024 * 1024,
            prefix: "essentially-once".into(),
            replicas: None,
            #[cfg(feature = "tls")]
            root_certificate: None,
            #[cfg(feature = "tls")]
            client_certificate: None,
        }
    }

    /// How long to wait for a connection, for each reply and confirm, and for other calls that must
    /// finish first. From 1 millisecond to 1 day; 10 seconds by default.
    ///
    /// Every call of a log or store on a broker that does not answer ends within twice this time.
    /// The exception is `next`, which waits for records and only asks the broker after a while.
    ///
    /// A message that was published but not confirmed in time is [`Error::Indeterminate`].
    /// Everything else is [`Error::Unavailable`]. A replica may lag for this long before a position
    /// that it does not reach becomes an [`Error::OutOfRange`].
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.clamp(Duration::from_millis(1), Duration::from_secs(24 * 60 * 60));
        self
    }

    /// The largest record (key, headers and payload together), state key or state value, in bytes.
    /// RabbitMQ itself takes messages of up to 128 MiB until version 3.13, and of 16 MiB since 4.0
    /// (`max_message_size`). The default of 15 MiB leaves room for what surrounds a record.
    ///
    /// A broker with a lower limit names it when it refuses the first message. From then on, this
    /// handle and its clones refuse larger messages with [`Error::TooLarge`] before they send
    /// anything. They forget the limit when the broker restarts or closes the connection on which
    /// it named the limit.
    #[must_use]
    pub fn record_limit(mut self, bytes: usize) -> Self {
        self.record_limit = bytes;
        self
    }

    /// The prefix of the names of the store's streams. Two services that share a virtual host and
    /// have consumers of the same name need different prefixes.
    ///
    /// A prefix has 1 to 200 bytes: ASCII letters, digits and `. _ - : / @ + =`, beginning with a
    /// letter or digit. Stream names double its dots.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// The number of replicas of the streams that this handle declares (`x-initial-cluster-size`).
    /// An append is confirmed when more than half of them have it. A stream declared with another
    /// number is refused.
    ///
    /// A smaller cluster uses all of its nodes and does not report it. RabbitMQ offers no way to
    /// ask over AMQP.
    #[must_use]
    pub fn replicas(mut self, replicas: u16) -> Self {
        self.replicas = Some(replicas);
        self
    }

    /// Trusts this certificate authority (PEM) in addition to the system's, for `amqps://`.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn root_certificate(mut self, pem: impl Into<String>) -> Self {
        self.root_certificate = Some(pem.into());
        self
    }

    /// Presents this certificate and key (PEM) to the broker, for `amqps://`.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn client_certificate(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    /// Connects to `amqp://[user:password@]host[:port][/vhost]`, or to `amqps://` for TLS. Write a
    /// `/` in the name of the virtual host as `%2f`.
    ///
    /// The URL may set `?heartbeat=` (seconds, 10 by default), `connection_timeout=`
    /// (milliseconds), `frame_max=`, `channel_max=` and `auth_mechanism=`.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for a malformed URL or an option out of its bounds.
    /// [`Error::Failed`] for a refused user, password or virtual host. [`Error::Unavailable`] if
    /// the broker cannot be reached. No message contains the user or password of the URL.
    pub async fn connect(self, url: &str) -> Result<Rabbit, Error> {
        names::check_prefix(&self.prefix)?;
        if self.replicas == Some(0) {
            return Err(Error::InvalidSetting {
                setting: "replicas",
                reason: "a stream needs at least one".into(),
            });
        }
        Server::connect(self, url).await.map(Rabbit::new)
    }
}

impl Default for RabbitOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RabbitOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitOptions")
            .field("timeout", &self.timeout)
            .field("record_limit", &self.record_limit)
            .field("prefix", &self.prefix)
            .field("replicas", &self.replicas)
            .finish_non_exhaustive()
    }
}
