//! How to connect, and how to open a log.

use std::{fmt, time::Duration};

use essentially_once::Error;

/// The client library's limit of a message, less what the format adds.
const MAX_RECORD_LIMIT: usize = 900 * 1024 * 1024;

/// How to connect to Kafka; see [`Kafka::connect`](crate::Kafka::connect).
///
/// ```no_run
/// # use essentially_once_kafka::KafkaOptions;
/// # use std::time::Duration;
/// # async fn example() -> Result<(), essentially_once::Error> {
/// let kafka = KafkaOptions::new()
///     .timeout(Duration::from_secs(5))
///     .setting("sasl.mechanism", "SCRAM-SHA-512")
///     .connect("kafkas://shop:secret@broker-1.example:9093,broker-2.example:9093")
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct KafkaOptions {
    pub(crate) timeout: Duration,
    pub(crate) record_limit: usize,
    pub(crate) settings: Vec<(String, String)>,
}

impl KafkaOptions {
    /// The defaults: 10 seconds for an answer, and records of up to 1,000,000 bytes.
    pub fn new() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            record_limit: 1_000_000,
            settings: Vec::new(),
        }
    }

    /// Sets how long to wait for an answer, from 1 s to 10 minutes. An append without an answer in
    /// that time fails with [`Error::Indeterminate`]. A transaction of a process that died keeps
    /// readers from what was appended after it for as long.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the size limit of a record (key, headers and payload together) in bytes. The brokers
    /// have their own, `message.max.bytes`, and so has a topic, `max.message.bytes`. By default
    /// they allow slightly more than a megabyte. Theirs is also one of a batch, so records are sent
    /// in batches of up to this size.
    #[must_use]
    pub fn record_limit(mut self, bytes: usize) -> Self {
        self.record_limit = bytes;
        self
    }

    /// Sets a [property of librdkafka](https://docs.confluent.io/platform/current/clients/librdkafka/html/md_CONFIGURATION.html)
    /// for all clients, such as `ssl.ca.location` or `client.rack`. Those that the guarantees of a
    /// log depend on are refused.
    #[must_use]
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Refuses values that are out of range.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let invalid = |setting, reason| Err(Error::InvalidSetting { setting, reason });
        if self.timeout < Duration::from_secs(1) || self.timeout > Duration::from_secs(600) {
            return invalid("timeout", format!("{:?} is not from 1 s to 10 minutes", self.timeout));
        }
        if !(1_000..=MAX_RECORD_LIMIT).contains(&self.record_limit) {
            let limit = self.record_limit;
            return invalid(
                "record_limit",
                format!("{limit} is not from 1,000 to {MAX_RECORD_LIMIT} bytes"),
            );
        }
        match self.settings.iter().find(|(name, _)| OURS.contains(&&**name)) {
            Some((name, _)) => invalid("setting", format!("the guarantees of a log depend on `{name}`")),
            None => Ok(()),
        }
    }
}

/// Properties that are not for the user to set.
const OURS: [&str; 17] = [
    "acks",
    "auto.offset.reset",
    "bootstrap.servers",
    "delivery.timeout.ms",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.gapless.guarantee",
    "enable.idempotence",
    "enable.partition.eof",
    "isolation.level",
    "message.send.max.retries",
    "message.timeout.ms",
    "metadata.broker.list",
    "request.required.acks",
    "retries",
    "transaction.timeout.ms",
    "transactional.id",
];

impl Default for KafkaOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// Values of settings may be passwords.
impl fmt::Debug for KafkaOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings: Vec<&str> = self.settings.iter().map(|(name, _)| &**name).collect();
        f.debug_struct("KafkaOptions")
            .field("timeout", &self.timeout)
            .field("record_limit", &self.record_limit)
            .field("settings", &settings)
            .finish()
    }
}

/// How records are appended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum Appends {
    /// By Kafka's idempotent producer, without waiting for one message before the next is sent.
    /// After [`Error::Indeterminate`], any number of the records from the first one on may have
    /// been appended.
    #[default]
    Pipelined,
    /// Each append is a transaction, so all of its records are appended or none. It takes longer:
    /// several requests, and readers see nothing before its end. Each transaction also takes an
    /// offset of its own.
    Transactional,
}

/// How to open a log; see [`Kafka::log_with`](crate::Kafka::log_with).
///
/// ```
/// # use essentially_once_kafka::{Appends, LogOptions};
/// let options = LogOptions::new().partition(3).existing().appends(Appends::Transactional);
/// ```
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    pub(crate) topic: Option<String>,
    pub(crate) partition: u32,
    pub(crate) existing: bool,
    pub(crate) appends: Appends,
    pub(crate) topic_settings: Vec<(String, String)>,
}

impl LogOptions {
    /// Partition 0 of a topic that is created if it does not exist, with pipelined appends.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the topic. The default is the name of the log, which may have characters that Kafka
    /// does not take in a topic.
    #[must_use]
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.topic = Some(topic.into());
        self
    }

    /// Sets the partition; 0 by default. `/` and the number of any other one are added to the log's
    /// name, so that no two partitions share a position.
    #[must_use]
    pub fn partition(mut self, partition: u32) -> Self {
        self.partition = partition;
        self
    }

    /// Fails if the topic does not exist, instead of creating it. A topic is only created for
    /// partition 0.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// Sets a property of the topic if it is created, such as `flush.messages` or `retention.ms`. A
    /// topic that exists stays as it is.
    #[must_use]
    pub fn topic_setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.topic_settings.push((name.into(), value.into()));
        self
    }

    /// Sets how records are appended.
    #[must_use]
    pub fn appends(mut self, appends: Appends) -> Self {
        self.appends = appends;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused() {
        let options = KafkaOptions::new;
        for (options, setting) in [
            (options().timeout(Duration::ZERO), "timeout"),
            (options().timeout(Duration::MAX), "timeout"),
            (options().record_limit(0), "record_limit"),
            (options().record_limit(usize::MAX), "record_limit"),
            (options().setting("acks", "1"), "acks"),
            (
                options().setting("isolation.level", "read_uncommitted"),
                "isolation.level",
            ),
        ] {
            let error = options.check().expect_err(setting).to_string();
            assert!(error.contains(setting), "{error}");
        }
        assert!(options().setting("client.rack", "a").check().is_ok());
    }

    #[test]
    fn values_of_settings_are_not_shown() {
        let options = KafkaOptions::new().setting("sasl.password", "hunter2");
        let shown = format!("{options:?}");
        assert!(shown.contains("sasl.password") && !shown.contains("hunter2"), "{shown}");
    }
}
