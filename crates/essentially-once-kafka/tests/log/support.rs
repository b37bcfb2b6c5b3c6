//! What the cases share.

use std::{future::Future, process::ExitCode, time::Duration};

use essentially_once::{Log, Offset, Record, backend::Source};
use essentially_once_kafka::{
    Kafka,
    rdkafka::{
        ClientConfig,
        admin::AdminClient,
        client::DefaultClientContext,
        producer::{BaseProducer, BaseRecord, Producer as _},
    },
};
use essentially_once_testkit::Suite;
use test_servers::{Case, KafkaServer, add_cases};
pub(crate) use test_servers::{Outcome, cases, ensure};

/// Long enough for a busy machine. A case that takes longer hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// How long a client waits that is to give up. A busy machine answers within it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Runs each case as a test. Without a broker, those that need one are ignored, with the reason.
pub(crate) fn run(
    with_broker: impl IntoIterator<Item = (&'static str, Case)>,
    mocked: impl IntoIterator<Item = (&'static str, Case)>,
) -> ExitCode {
    let suite = add_cases(Suite::new(), None, LIMIT, mocked);
    add_cases(suite, test_servers::kafka_server().err(), LIMIT, with_broker).run()
}

/// Fails unless the result is this kind of error with these texts.
macro_rules! assert_error {
    ($result:expr, $kind:pat, $($text:expr),+) => {
        match $result {
            Err(error @ $kind) => {
                let text = error.to_string();
                $(ensure!(text.contains($text), "{:?} is missing in: {text}", $text);)+
            }
            Err(error) => return Err(format!("another error: {error}").into()),
            Ok(_) => return Err("no error".into()),
        }
    };
}
pub(crate) use assert_error;

/// A broker and a handle to it.
pub(crate) struct Stage {
    pub(crate) server: KafkaServer,
    pub(crate) kafka: Kafka,
}

impl Stage {
    pub(crate) async fn start() -> Result<Self, Source> {
        let server = tokio::task::spawn_blocking(KafkaServer::start).await??;
        let kafka = Kafka::connect(&server.url()).await?;
        Ok(Self { server, kafka })
    }

    /// The properties of another program's client.
    pub(crate) fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", format!("127.0.0.1:{}", self.server.port()));
        config
    }

    pub(crate) fn admin(&self) -> Result<AdminClient<DefaultClientContext>, Source> {
        Ok(self.config().create()?)
    }

    /// A producer of another program, with transactions.
    pub(crate) fn transactional(&self, id: &str) -> Result<BaseProducer, Source> {
        let producer: BaseProducer = self.config().set("transactional.id", id).create()?;
        tokio::task::block_in_place(|| producer.init_transactions(LIMIT))?;
        Ok(producer)
    }
}

/// Sends records within an open transaction, and waits until the broker has them.
pub(crate) fn send(producer: &BaseProducer, topic: &str, payloads: &[&str]) -> Outcome {
    for payload in payloads {
        let record = BaseRecord::<[u8], str>::to(topic).partition(0).payload(payload);
        producer.send(record).map_err(|(error, _)| error)?;
    }
    tokio::task::block_in_place(|| producer.flush(LIMIT))?;
    Ok(())
}

/// The records from an offset to the end.
pub(crate) async fn records(log: &dyn Log, from: Offset) -> Result<Vec<Record>, Source> {
    let end = log.bounds().await?.end;
    let (mut records, mut next) = (Vec::<Record>::new(), from);
    if next < end {
        let mut reader = log.read(next).await?;
        while next < end {
            records.extend(soon(reader.next(100)).await??);
            next = records.last().map_or(end, |last| last.offset.successor());
        }
    }
    Ok(records)
}

pub(crate) fn payloads(records: &[Record]) -> Vec<String> {
    let text = |record: &Record| String::from_utf8_lossy(&record.payload).into_owned();
    records.iter().map(text).collect()
}

/// Waits for what must come.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> Result<T, Source> {
    let ended = tokio::time::timeout(LIMIT, future).await;
    ended.map_err(|_| format!("nothing within {LIMIT:?}").into())
}
