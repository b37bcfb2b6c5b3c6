//! How to connect, and how to open a log.

use std::{ops::RangeInclusive, time::Duration};

use essentially_once::{Error, backend::Retention};

use crate::store::names;

/// The bounds of [`RabbitOptions::timeout`].
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(24 * 60 * 60);

/// A segment must have room for a table of up to 255 publishers. With less, RabbitMQ 3.10 keeps
/// starting new segments forever.
const LEAST_SEGMENT: u64 = 64 * 1024;

/// RabbitMQ's default segment size.
const USUAL_SEGMENT: u64 = 500_000_000;

/// The shortest age in `x-max-age`, which counts whole seconds.
const LEAST_AGE: Duration = Duration::from_secs(1);

/// How to connect to RabbitMQ; see [`Rabbit::connect`](crate::Rabbit::connect).
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
#[derive(Clone, Debug)]
pub struct RabbitOptions {
    pub(crate) timeout: Duration,
    pub(crate) record_limit: usize,
    pub(crate) prefetch: u16,
    pub(crate) prefix: String,
    pub(crate) replicas: Option<u16>,
    #[cfg(feature = "tls")]
    pub(crate) root_certificates: Vec<Pem>,
    #[cfg(feature = "tls")]
    pub(crate) without_system_roots: bool,
    #[cfg(feature = "tls")]
    pub(crate) client_certificate: Option<Pem>,
    #[cfg(feature = "tls")]
    pub(crate) client_key: Option<Pem>,
}

/// A certificate or key in PEM format.
#[cfg(feature = "tls")]
#[derive(Clone)]
pub(crate) struct Pem(pub(crate) Vec<u8>);

/// Hides the contents, which may be a key.
#[cfg(feature = "tls")]
impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pem(..)")
    }
}

impl RabbitOptions {
    /// The defaults: a timeout of 10 seconds, records of up to 15 MiB, a prefetch of 8 messages,
    /// prefix `essentially-once`, and as many replicas as the broker chooses.
    pub fn new() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            record_limit: 15 * 1024 * 1024,
            prefetch: 8,
            prefix: "essentially-once".into(),
            replicas: None,
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

    /// How long to wait for a connection, for each reply and confirm, and for other calls that must
    /// finish first. From 1 millisecond to 1 day; other values are refused. 10 seconds by default.
    ///
    /// Every call of a log or store on a broker that does not answer ends within twice this time.
    /// The exception is `next`, which waits for records and only asks the broker after a while.
    ///
    /// A message that was published but not confirmed in time is [`Error::Indeterminate`].
    /// Everything else is [`Error::Unavailable`]. A replica may lag for this long before a position
    /// that it does not reach becomes an [`Error::OutOfRange`].
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
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

    /// How many messages the broker may send ahead to each reader, and fewer if they are large:
    /// about 8 MiB in total. At least 1, and 8 by default.
    ///
    /// A reader gets at most this many messages per round trip. On the same machine or network, 8
    /// messages keep it busy. Raise it for a distant broker: with a round trip of 10 ms, 8 messages
    /// are 800 per second. But AMQP counts messages and not bytes, so if small messages are
    /// suddenly followed by large ones, this many large ones fill the memory.
    #[must_use]
    pub fn prefetch(mut self, messages: u16) -> Self {
        self.prefetch = messages;
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

    /// Trusts this certificate authority (PEM) in addition to the system's, for `amqps://`. May be
    /// called more than once.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn add_root_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.root_certificates.push(Pem(pem.into()));
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

    /// Presents this certificate (PEM), or chain of certificates, to the broker, for `amqps://`.
    /// Needs [`client_key`](Self::client_key).
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn client_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.client_certificate = Some(Pem(pem.into()));
        self
    }

    /// The private key (PEM) of [`client_certificate`](Self::client_certificate).
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn client_key(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.client_key = Some(Pem(pem.into()));
        self
    }

    /// Refuses options out of their bounds.
    pub(crate) fn check(&self) -> Result<(), Error> {
        names::check_prefix(&self.prefix)?;
        if !TIMEOUT.contains(&self.timeout) {
            return invalid("timeout", "it must be from 1 millisecond to 1 day".into());
        }
        if self.prefetch == 0 {
            return invalid("prefetch", "it is 0 and must be at least 1".into());
        }
        if self.replicas == Some(0) {
            return invalid("replicas", "a stream needs at least one".into());
        }
        #[cfg(feature = "tls")]
        match (&self.client_certificate, &self.client_key) {
            (Some(_), None) => return invalid("client_certificate", "it needs `client_key`".into()),
            (None, Some(_)) => return invalid("client_key", "it needs `client_certificate`".into()),
            _ => {}
        }
        Ok(())
    }

    #[cfg(feature = "tls")]
    pub(crate) fn has_certificates(&self) -> bool {
        !self.root_certificates.is_empty() || self.without_system_roots || self.client_certificate.is_some()
    }
}

impl Default for RabbitOptions {
    fn default() -> Self {
        Self::new()
    }
}

fn invalid(setting: &'static str, reason: String) -> Result<(), Error> {
    Err(Error::InvalidSetting { setting, reason })
}

/// How a log's stream is declared and how records are written to it; see
/// [`Rabbit::log_with`](crate::Rabbit::log_with).
///
/// RabbitMQ enforces retention itself. It removes whole segments, and never the last one.
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    pub(crate) existing: bool,
    pub(crate) retention: Retention,
    segment_bytes: Option<u64>,
    pub(crate) packed: Option<Packing>,
    pub(crate) compressed: bool,
}

impl LogOptions {
    /// A stream that keeps everything, with one message per record.
    pub fn new() -> Self {
        Self::default()
    }

    /// Opens the stream however it was declared, and fails if it does not exist. Without this
    /// option the stream is declared, which fails if it exists with other settings. RabbitMQ cannot
    /// change a stream's arguments, so [`Rabbit::log_with`](crate::Rabbit::log_with) refuses this
    /// option together with [`retention`](Self::retention) or
    /// [`segment_bytes`](Self::segment_bytes). An operator can change both with a policy.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// Which records the stream keeps: by age, by bytes, or both. [`Rabbit::log_with`] refuses a
    /// number of records, which RabbitMQ cannot keep.
    ///
    /// - [`max_age`](Retention::max_age) removes segments whose records are all older
    ///   (`x-max-age`). It counts whole seconds, rounded down, and at least one.
    /// - [`max_bytes`](Retention::max_bytes) removes the oldest segments while the stream is larger
    ///   (`x-max-length-bytes`). At least two segments must fit. With fewer, RabbitMQ would remove
    ///   everything, read or not, whenever a segment is full.
    ///
    /// [`Rabbit::log_with`]: crate::Rabbit::log_with
    #[must_use]
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = retention;
        self
    }

    /// The size of segments (`x-stream-max-segment-size-bytes`), from 64 KiB to 3 GB. By default
    /// 500 MB, or a quarter of [`max_bytes`](Retention::max_bytes) if that is less.
    #[must_use]
    pub fn segment_bytes(mut self, bytes: u64) -> Self {
        self.segment_bytes = Some(bytes);
        self
    }

    /// Writes many records of one append into one message. This is many times faster, but clients
    /// that do not know [the format](crate#packed-messages) cannot read such messages. Readers of
    /// this crate read both kinds, also mixed.
    ///
    /// The records of one message are confirmed together and removed together. A message must not
    /// be larger than the broker's `max_message_size`.
    #[must_use]
    pub fn packed(mut self, packing: Packing) -> Self {
        self.packed = Some(packing);
        self
    }

    /// Compresses packed messages with LZ4 if that makes them smaller.
    #[must_use]
    pub fn compressed(mut self) -> Self {
        self.compressed = true;
        self
    }

    /// The segment size to ask for, if it is not the default.
    pub(crate) fn segment(&self) -> Option<u64> {
        let quarter = self.retention.bytes.map(|max| (max / 4).max(LEAST_SEGMENT));
        self.segment_bytes
            .or(quarter.filter(|quarter| *quarter < USUAL_SEGMENT))
    }

    /// Refuses options out of their bounds, and options of the declaration if nothing is declared.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if let Some(packing) = &self.packed {
            packing.check()?;
        }
        if self.existing {
            let why = "cannot be combined with `existing`, since RabbitMQ cannot change a declared stream; leave it out, \
                       or change the stream with a policy (`rabbitmqctl set_policy`)";
            for (setting, is_set) in [
                ("retention", self.retention != Retention::default()),
                ("segment_bytes", self.segment_bytes.is_some()),
            ] {
                if is_set {
                    return invalid(setting, format!("it {why}"));
                }
            }
            return Ok(());
        }
        self.retention.refuse_records("RabbitMQ")?;
        self.retention.check()?;
        if self.retention.age.is_some_and(|age| age < LEAST_AGE) {
            return invalid("retention", "RabbitMQ needs a `max_age` of at least 1 second".into());
        }
        let segment = self.segment().unwrap_or(USUAL_SEGMENT);
        if segment < LEAST_SEGMENT {
            let why = "each begins with a table of publishers and must hold more than that";
            return invalid("segment_bytes", format!("a segment needs {LEAST_SEGMENT} bytes: {why}"));
        }
        if self.retention.bytes.is_some_and(|max| max / 2 < segment) {
            let why = "or the broker removes everything whenever one is full";
            let reason = format!("two segments of {segment} bytes must fit into `max_bytes`, {why}");
            return invalid("retention", reason);
        }
        Ok(())
    }
}

/// How many records one [packed](LogOptions::packed) message holds at most. A single record that
/// is larger has its own message.
///
/// ```
/// # use essentially_once_rabbitmq::{LogOptions, Packing};
/// let options = LogOptions::new().packed(Packing::new().max_records(100).max_bytes(64 * 1024));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packing {
    pub(crate) records: usize,
    pub(crate) bytes: usize,
}

impl Packing {
    /// The defaults: 1,000 records and 1 MiB.
    pub const fn new() -> Self {
        Self {
            records: 1_000,
            bytes: 1024 * 1024,
        }
    }

    /// The most records in one message; from 1 to 4,294,967,295.
    #[must_use]
    pub const fn max_records(mut self, records: usize) -> Self {
        self.records = records;
        self
    }

    /// The most bytes of records in one message, before compression; at least 1.
    #[must_use]
    pub const fn max_bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    fn check(&self) -> Result<(), Error> {
        if self.records == 0 || u32::try_from(self.records).is_err() {
            return invalid("packed", "`max_records` must be from 1 to 4294967295".into());
        }
        if self.bytes == 0 {
            return invalid("packed", "`max_bytes` must be at least 1".into());
        }
        Ok(())
    }
}

impl Default for Packing {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeping(bytes: u64) -> LogOptions {
        LogOptions::new().retention(Retention::new().max_bytes(bytes))
    }

    #[test]
    fn segments_fit_what_is_kept() {
        for (options, segment) in [
            (LogOptions::new(), None),
            (LogOptions::new().segment_bytes(100_000), Some(100_000)),
            (keeping(u64::MAX), None),
            (keeping(1_000_000), Some(250_000)),
            (keeping(200_000), Some(LEAST_SEGMENT)),
        ] {
            assert!(options.check().is_ok(), "{options:?}");
            assert_eq!(options.segment(), segment, "{options:?}");
        }
        for (options, wrong) in [
            (LogOptions::new().segment_bytes(LEAST_SEGMENT - 1), "segment_bytes"),
            (keeping(2 * LEAST_SEGMENT - 1), "retention"),
            (keeping(1_000_000).segment_bytes(500_001), "retention"),
            (keeping(1_000_000).existing(), "retention"),
            (LogOptions::new().segment_bytes(100_000).existing(), "segment_bytes"),
        ] {
            let error = options.check();
            assert!(
                matches!(error, Err(Error::InvalidSetting { setting, .. }) if setting == wrong),
                "{error:?}"
            );
        }
    }

    #[test]
    fn bad_values_are_refused_and_not_clamped() {
        let limits = |limit: Retention| LogOptions::new().retention(limit).check();
        for refused in [
            limits(Retention::new().max_records(10)),
            limits(Retention::new().max_age(Duration::from_millis(999))),
            LogOptions::new().packed(Packing::new().max_records(0)).check(),
            LogOptions::new().packed(Packing::new().max_bytes(0)).check(),
            LogOptions::new().packed(Packing::new().max_bytes(0)).existing().check(),
            RabbitOptions::new().timeout(Duration::ZERO).check(),
            RabbitOptions::new().timeout(Duration::MAX).check(),
            RabbitOptions::new().replicas(0).check(),
            RabbitOptions::new().prefetch(0).check(),
        ] {
            assert!(matches!(refused, Err(Error::InvalidSetting { .. })), "{refused:?}");
        }
        assert!(limits(Retention::new().max_age(LEAST_AGE)).is_ok());
        assert!(RabbitOptions::new().timeout(*TIMEOUT.start()).check().is_ok());
        assert!(RabbitOptions::new().timeout(*TIMEOUT.end()).check().is_ok());
    }

    #[cfg(feature = "tls")]
    #[test]
    fn a_certificate_needs_a_key_and_debug_shows_neither() {
        let options = RabbitOptions::new().client_key("sesame");
        assert!(!format!("{options:?}").contains("sesame"));
        let text = options.check().expect_err("no certificate").to_string();
        assert!(text.contains("client_certificate"), "{text}");
        assert!(RabbitOptions::new().client_certificate("c").check().is_err());
        assert!(options.client_certificate("c").check().is_ok());
    }
}
