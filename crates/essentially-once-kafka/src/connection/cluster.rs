//! A cluster, as clients find it.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use essentially_once::Error;
use rdkafka::{
    ClientConfig, ClientContext,
    admin::AdminClient,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
};

use super::address::Address;
use crate::{
    error::{Fault, not_connected},
    options::KafkaOptions,
};

/// What a client of the library has last complained about. Its errors only say that time ran out.
#[derive(Clone, Default)]
pub(crate) struct Context {
    complaint: Arc<Mutex<Option<Complaint>>>,
}

/// A complaint of a client.
#[derive(Clone, Debug)]
pub(crate) struct Complaint {
    pub(crate) code: Option<RDKafkaErrorCode>,
    pub(crate) reason: String,
}

impl Context {
    pub(crate) fn complaint(&self) -> Option<Complaint> {
        self.lock().clone()
    }

    /// Drops a complaint that is not about what comes now.
    pub(crate) fn forget(&self) {
        *self.lock() = None;
    }

    /// Keeps the last complaint with a code, or else the first.
    fn note(&self, code: Option<RDKafkaErrorCode>, reason: &str) {
        let mut complaint = self.lock();
        if code.is_some() || complaint.is_none() {
            let reason = reason.to_owned();
            *complaint = Some(Complaint { code, reason });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Complaint>> {
        self.complaint.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(?level, facility, message, "librdkafka");
        // The client only logs that a broker has closed the connection.
        if facility == "FAIL" {
            let reason = message.split_once("]: ").map_or(message, |(_, reason)| reason);
            self.note(None, reason);
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
        // The client reports that all brokers are down after it has reported why.
        let code = error.rdkafka_error_code();
        self.note(code.filter(|code| *code != RDKafkaErrorCode::AllBrokersDown), reason);
    }
}

impl ConsumerContext for Context {}

/// The brokers, and a client that asks them questions.
pub(crate) struct Cluster {
    address: Address,
    pub(crate) options: KafkaOptions,
    /// `None` only while it is dropped.
    asking: Option<Arc<BaseConsumer<Context>>>,
}

impl Cluster {
    pub(crate) async fn connect(mut options: KafkaOptions, url: &str) -> Result<Self, Error> {
        let address = Address::parse(url)?;
        options.settings.extend(address.settings.iter().cloned());
        options.check()?;
        let mut config = config(&address, &options);
        for (name, value) in READING {
            config.set(name, value);
        }
        let asking: BaseConsumer<Context> = client(&config, Context::default())?;
        let cluster = Self {
            address,
            options,
            asking: Some(Arc::new(asking)),
        };
        let answered = cluster
            // The answer for all topics may be large, and this one need not exist.
            .ask(|client, timeout| client.fetch_metadata(Some("essentially-once"), timeout).map(drop))
            .await;
        answered.map_err(|fault| not_connected(cluster.on("connect"), fault))?;
        Ok(cluster)
    }

    /// Names an action and where it was done.
    pub(crate) fn on(&self, action: impl fmt::Display) -> String {
        format!("{action} on {}", self.address)
    }

    /// Properties of all clients.
    pub(crate) fn config(&self) -> ClientConfig {
        config(&self.address, &self.options)
    }

    /// Asks the brokers, on a thread on which that may take a while.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&BaseConsumer<Context>, Duration) -> KafkaResult<T> + Send + 'static,
    ) -> Result<T, Fault> {
        let (Some(client), timeout) = (self.asking.clone(), self.options.timeout) else {
            return Err(Fault::ended());
        };
        let asked = tokio::task::spawn_blocking(move || {
            let answer = question(&client, timeout);
            // What the client logs and complains about waits in a queue until somebody looks. Each
            // look takes one of them, and does not say whether there was one.
            let looks = if answer.is_ok() { LOOKS / 10 } else { LOOKS };
            for _ in 0..looks {
                let _ = client.poll(Duration::ZERO);
            }
            match answer {
                Ok(answer) => {
                    client.context().forget();
                    Ok(answer)
                }
                Err(error) => Err(Fault::new(error, client.context().complaint())),
            }
        });
        asked.await.unwrap_or_else(|_| Err(Fault::ended()))
    }

    /// A client that changes topics. It ends when it is dropped.
    pub(crate) fn admin(&self) -> Result<AdminClient<Context>, Error> {
        client(&self.config(), Context::default())
    }
}

/// Ending a client waits for its threads.
impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(asking) = self.asking.take() {
            std::thread::spawn(move || drop(asking));
        }
    }
}

/// How often to look after a failure. A client that tries in vain for ten seconds logs and
/// complains less often.
const LOOKS: usize = 200;

/// The properties of clients that read. Without a group, the library refuses to assign a partition.
/// No group is joined, and no offset is committed.
pub(crate) const READING: [(&str, &str); 9] = [
    ("group.id", "essentially-once"),
    ("enable.auto.commit", "false"),
    ("enable.auto.offset.store", "false"),
    ("isolation.level", "read_committed"),
    ("auto.offset.reset", "error"),
    ("allow.auto.create.topics", "false"),
    ("check.crcs", "true"),
    // How far to read ahead, and when to look whether there is room again. The default is a second.
    ("queued.max.messages.kbytes", "8192"),
    ("fetch.queue.backoff.ms", "5"),
];

/// A client with these properties.
pub(crate) fn client<C: FromClientConfigAndContext<Context>>(
    config: &ClientConfig,
    context: Context,
) -> Result<C, Error> {
    config
        .create_with_context(context)
        .map_err(|error| Error::InvalidSetting {
            setting: "setting",
            reason: match error {
                // The library's text repeats the value, which may be a password.
                KafkaError::ClientConfig(_, _, name, _) => {
                    format!("librdkafka does not know `{name}`, or refuses its value")
                }
                error => error.to_string(),
            },
        })
}

fn config(address: &Address, options: &KafkaOptions) -> ClientConfig {
    let mut config = ClientConfig::new();
    let timeout = options.timeout.as_millis().to_string();
    config
        .set("bootstrap.servers", &address.brokers)
        .set("client.id", "essentially-once")
        .set("socket.timeout.ms", &timeout)
        .set("reconnect.backoff.max.ms", "1000");
    let protocol = match (&address.user, address.tls) {
        (None, false) => "plaintext",
        (None, true) => "ssl",
        (Some(_), false) => "sasl_plaintext",
        (Some(_), true) => "sasl_ssl",
    };
    config.set("security.protocol", protocol);
    if let Some((user, password)) = &address.user {
        config
            .set("sasl.mechanism", "PLAIN")
            .set("sasl.username", user)
            .set("sasl.password", password);
    }
    for (name, value) in &options.settings {
        config.set(name, value);
    }
    config.set_log_level(RDKafkaLogLevel::Info);
    config
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("address", &self.address)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
