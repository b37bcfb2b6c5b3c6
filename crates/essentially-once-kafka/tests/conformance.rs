//! Runs the conformance cases of the test kit that need a log on Kafka, each on a private broker,
//! with pipelined and with transactional appends.

use std::{process::ExitCode, sync::Arc, time::Duration};

use essentially_once::{
    Error, Log, Offset, async_trait,
    backend::Source,
    memory::{Memory, MemoryStore},
};
use essentially_once_kafka::{
    Appends, Kafka, KafkaOptions, LogOptions,
    rdkafka::{
        ClientConfig,
        message::{Header, OwnedHeaders},
        producer::{FutureProducer, FutureRecord},
    },
};
use essentially_once_testkit::{Backend, Capabilities, Cut, Harness, Request, Suite, Support, conformance_cases};
use test_servers::KafkaServer;

const RECORD_LIMIT: usize = 512 * 1024;

fn main() -> ExitCode {
    let (pipelined, transactional) = (
        KafkaHarness {
            appends: Appends::Pipelined,
        },
        KafkaHarness {
            appends: Appends::Transactional,
        },
    );
    if let Err(why) = test_servers::kafka_server() {
        return Suite::new().missing::<KafkaHarness>("kafka", &why).run();
    }
    let capabilities = transactional.capabilities();
    let mut suite = Suite::new().backend("kafka", pipelined);
    for case in conformance_cases::<KafkaHarness>() {
        let name = format!("kafka_transactional::{}", case.name());
        suite = match case.support(&capabilities) {
            Support::Yes if COUNTED.contains(&case.name()) => {
                suite.ignored(&name, "a transaction takes an offset, so the log cannot count records")
            }
            Support::Yes if case.name() == RESTARTED_MEANWHILE => {
                let why = "the test broker confirms a transaction that was open when it restarted, and aborts it";
                suite.ignored(&name, why)
            }
            Support::Yes => {
                let appends = Appends::Transactional;
                suite.test(&name, move || case.run(&KafkaHarness { appends }))
            }
            Support::No(why) => suite.ignored(&name, why),
        };
    }
    suite.run()
}

/// Cases that expect an exact number of records.
const COUNTED: [&str; 5] = [
    "l11_offsets_are_not_reused_after_a_restart",
    "l11_offsets_of_removed_records_are_not_reused",
    "l11_records_appended_meanwhile_stay",
    "l12_the_tail_holds_the_last_records",
    "l12_the_tail_is_what_retention_left",
];

/// A case that restarts the broker during appends.
const RESTARTED_MEANWHILE: &str = "l7_a_failed_append_reports_its_outcome";

struct KafkaHarness {
    appends: Appends,
}

#[async_trait]
impl Harness for KafkaHarness {
    type Backend = Broker;

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::minimal();
        capabilities.store = Support::No("Kafka keeps no state of a consumer");
        capabilities.restart = Support::Yes;
        capabilities.truncate = Support::Yes;
        capabilities.truncate_all = Support::Yes;
        capabilities.recreate = Support::No("Kafka's client does not show whether a topic was created again");
        capabilities.delete = Support::No("Kafka's client does not show whether a topic was created again");
        capabilities.delete_record = Support::No("Kafka removes single records only by compaction");
        capabilities.remove_before = Support::Yes;
        capabilities.refuse = Support::No("a broker refuses records only for their size");
        capabilities.wire = Support::Yes;
        capabilities.malformed = Support::Yes;
        capabilities.foreign = Support::Yes;
        capabilities.tail = Support::Yes;
        capabilities.record_limit = Some(RECORD_LIMIT);
        capabilities.paced_rounds = 500;
        // Each takes a second or two.
        capabilities.fault_plans = 12;
        capabilities
    }

    async fn start(&self, _: &str) -> Result<Broker, Source> {
        Ok(Broker {
            server: tokio::task::spawn_blocking(KafkaServer::start).await??,
            store: Memory::new().store(),
            appends: self.appends,
        })
    }
}

/// A private broker, and a store in memory.
struct Broker {
    server: KafkaServer,
    store: MemoryStore,
    appends: Appends,
}

impl Broker {
    async fn open(&self) -> Result<Kafka, Error> {
        let options = KafkaOptions::new().record_limit(RECORD_LIMIT);
        options.connect(&self.server.url()).await
    }

    /// As a program that does not use this crate.
    fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", format!("127.0.0.1:{}", self.server.port()));
        config
    }

    async fn produce(&self, log: &str, payload: &[u8], headers: OwnedHeaders) -> Result<(), Source> {
        let producer: FutureProducer = self.config().create()?;
        let topic = topic(log);
        let record = FutureRecord::<[u8], [u8]>::to(&topic)
            .partition(0)
            .payload(payload)
            .headers(headers);
        let sent = producer.send(record, Duration::from_secs(30)).await;
        sent.map_err(|(error, _)| error)?;
        Ok(())
    }
}

/// A topic for a log whose name has characters that Kafka does not take.
fn topic(log: &str) -> String {
    let escaped = log.chars().map(|c| match c {
        c if c.is_ascii_alphanumeric() || c == '-' || c == '.' => c.to_string(),
        c => format!("_{:x}_", u32::from(c)),
    });
    escaped.collect()
}

#[async_trait]
impl Backend for Broker {
    type Store = MemoryStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        let options = LogOptions::new().topic(topic(name)).appends(self.appends);
        Ok(Arc::new(self.open().await?.log_with(name, options).await?))
    }

    async fn store(&self) -> Result<MemoryStore, Error> {
        Ok(self.store.clone())
    }

    /// Stops the broker and starts it again. This one loses what it has not written if it is
    /// killed.
    async fn restart(&self) -> Result<(), Source> {
        tokio::task::block_in_place(|| self.server.restart())
    }

    async fn cut_next(&self, _: Request, cut: Cut) -> Result<(), Source> {
        // Partition 0 of the topic, in a list of one each. Opening a log names no partition.
        let pattern: &[u8] = match self.appends {
            // It is first added to the transaction.
            Appends::Transactional => b"\0\x06orders\0\0\0\x01\0\0\0\0",
            _ => b"\x07orders\x02\0\0\0\0",
        };
        self.server.proxy().cut_at(pattern, cut);
        Ok(())
    }

    fn cuts(&self) -> usize {
        self.server.proxy().fired()
    }

    async fn truncate(&self, log: &str, before: Offset) -> Result<(), Source> {
        self.log(log).await?.remove_before(before).await?;
        Ok(())
    }

    async fn append_malformed(&self, log: &str) -> Result<Vec<u8>, Source> {
        let payload = b"\xFF\0\xFE";
        let header = Header {
            key: "essentially-once-sequence",
            value: Some("-1"),
        };
        self.produce(log, payload, OwnedHeaders::new().insert(header)).await?;
        Ok(payload.into())
    }

    async fn append_foreign(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        self.produce(log, payload, OwnedHeaders::new()).await
    }
}
