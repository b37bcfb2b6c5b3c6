//! What several brokers do, and what a broker refuses, on the mock cluster of the client library.

use std::{sync::mpsc, thread};

use essentially_once::{Error, Log as _, NewRecord, Offset, backend::Source};
use essentially_once_kafka::{
    Appends, Kafka, KafkaLog, KafkaOptions, LogOptions,
    rdkafka::{
        mocking::MockCluster,
        producer::DefaultProducerContext,
        types::{RDKafkaApiKey as Request, RDKafkaRespErr as Code},
    },
};
use tokio::sync::oneshot;

use crate::support::{Outcome, PATIENCE, assert_error, ensure, payloads, records, soon};

const TOPIC: &str = "orders";

/// How many records the client takes before it has sent some.
const QUEUE: usize = 100;

type Cluster = MockCluster<'static, DefaultProducerContext>;
type Change = Box<dyn FnOnce(&Cluster) + Send>;

/// Brokers that share one topic of one partition. They stay on their thread.
struct Mock {
    changes: mpsc::Sender<Change>,
    kafka: Kafka,
}

impl Mock {
    async fn start(brokers: i32) -> Result<Self, Source> {
        let (changes, received) = mpsc::channel::<Change>();
        let (starting, started) = oneshot::channel();
        thread::spawn(move || {
            let cluster = match MockCluster::new(brokers) {
                Ok(cluster) => cluster,
                Err(error) => return drop(starting.send(Err(error))),
            };
            let created = cluster.create_topic(TOPIC, 1, brokers);
            let _ = starting.send(created.map(|()| cluster.bootstrap_servers()));
            received.into_iter().for_each(|change| change(&cluster));
        });
        let url = format!("kafka://{}", started.await??);
        let options = KafkaOptions::new()
            .timeout(PATIENCE)
            .setting("queue.buffering.max.messages", QUEUE.to_string());
        let kafka = options.connect(&url).await?;
        Ok(Self { changes, kafka })
    }

    async fn log(&self, appends: Appends) -> Result<KafkaLog, Error> {
        let options = LogOptions::new().existing().appends(appends);
        self.kafka.log_with(TOPIC, options).await
    }

    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Cluster) -> T + Send + 'static,
    ) -> Result<T, Source> {
        let (changing, changed) = oneshot::channel();
        let change = move |cluster: &Cluster| drop(changing.send(change(cluster)));
        self.changes
            .send(Box::new(change))
            .map_err(|_| "the brokers have ended")?;
        Ok(changed.await?)
    }

    /// Answers the next requests of this kind with an error.
    async fn refuse(&self, request: Request, code: Code, times: usize) -> Outcome {
        let refuse = move |cluster: &Cluster| cluster.request_errors(request, &vec![code; times]);
        self.change(refuse).await
    }

    async fn stop_refusing(&self, request: Request) -> Outcome {
        self.change(move |cluster| cluster.clear_request_errors(request)).await
    }
}

pub(crate) async fn an_append_without_rights_is_refused() -> Outcome {
    let mock = Mock::start(1).await?;
    for (appends, request, code, advice) in [
        (
            Appends::Pipelined,
            Request::Produce,
            Code::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
            "grant the user Read, Write and Describe on the topic",
        ),
        (
            Appends::Transactional,
            Request::AddPartitionsToTxn,
            Code::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
            "grant the user Read, Write and Describe on the topic",
        ),
        (
            Appends::Pipelined,
            Request::InitProducerId,
            Code::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED,
            "grant the user IdempotentWrite on the cluster",
        ),
        (
            Appends::Transactional,
            Request::InitProducerId,
            Code::RD_KAFKA_RESP_ERR_TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
            "grant the user Write and Describe on the transactional ids",
        ),
    ] {
        let log = mock.log(appends).await?;
        let before = payloads(&records(&log, Offset::ZERO).await?);
        // Of the last ones, the client refuses what it has no place for.
        for count in [1, QUEUE, 10 * QUEUE] {
            mock.refuse(request, code, 3).await?;
            assert_error!(
                soon(log.append(&vec![NewRecord::new("refused"); count])).await?,
                Error::Failed { .. },
                advice
            );
            mock.stop_refusing(request).await?;
        }
        // Somebody grants the right.
        soon(log.append(&[NewRecord::new("a")])).await??;
        let found = payloads(&records(&log, Offset::ZERO).await?);
        ensure!(found == [before, vec!["a".into()]].concat(), "{appends:?}: {found:?}");
    }
    Ok(())
}

pub(crate) async fn a_read_without_rights_is_refused() -> Outcome {
    const DENIED: Code = Code::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    const ADVICE: &str = "grant the user Read, Write and Describe on the topic";
    let mock = Mock::start(1).await?;
    let log = mock.log(Appends::Pipelined).await?;
    log.append(&[NewRecord::new("a")]).await?;
    let mut reader = log.read(Offset::ZERO).await?;
    mock.refuse(Request::Fetch, DENIED, 3).await?;
    assert_error!(soon(reader.next(1)).await?, Error::Failed { .. }, ADVICE);
    mock.stop_refusing(Request::Fetch).await?;
    mock.refuse(Request::ListOffsets, DENIED, 3).await?;
    assert_error!(soon(log.bounds()).await?, Error::Failed { .. }, ADVICE);
    mock.stop_refusing(Request::ListOffsets).await?;
    mock.change(|cluster| cluster.topic_error(TOPIC, DENIED)).await??;
    assert_error!(soon(mock.log(Appends::Pipelined)).await?, Error::Failed { .. }, ADVICE);
    Ok(())
}

pub(crate) async fn a_fenced_producer_is_replaced() -> Outcome {
    let mock = Mock::start(1).await?;
    let log = mock.log(Appends::Transactional).await?;
    let mut expected = vec!["a".to_owned()];
    log.append(&[NewRecord::new("a")]).await?;
    for (round, request) in [Request::AddPartitionsToTxn, Request::Produce, Request::EndTxn]
        .into_iter()
        .enumerate()
    {
        for code in [
            Code::RD_KAFKA_RESP_ERR_PRODUCER_FENCED,
            Code::RD_KAFKA_RESP_ERR_INVALID_PRODUCER_EPOCH,
        ] {
            mock.refuse(request, code, 1).await?;
            let fenced = soon(log.append(&[NewRecord::new(format!("{round} fenced"))])).await?;
            mock.stop_refusing(request).await?;
            let Err(error) = fenced else {
                return Err(format!("{code:?} at {round}: appended").into());
            };
            ensure!(error.is_transient(), "{code:?} at {round}: {error}");
            // Only the end of the transaction leaves a doubt.
            let is_in_doubt = matches!(error, Error::Indeterminate { .. });
            ensure!(
                is_in_doubt == (request == Request::EndTxn),
                "{code:?} at {round}: {error}"
            );
            let next = format!("{round} {code:?}");
            soon(log.append(&[NewRecord::new(next.clone())])).await??;
            expected.push(next);
        }
    }
    // The mock cluster shows the records of transactions that were not committed.
    let mut found = payloads(&records(&log, Offset::ZERO).await?);
    found.retain(|payload| !payload.ends_with("fenced"));
    ensure!(found == expected, "{found:?}");
    Ok(())
}

pub(crate) async fn a_partition_that_moves_between_brokers_loses_and_repeats_nothing() -> Outcome {
    const ROUNDS: usize = 9;
    let mock = Mock::start(3).await?;
    for appends in [Appends::Pipelined, Appends::Transactional] {
        let log = mock.log(appends).await?;
        let first = log.bounds().await?.end;
        let mut reader = log.read(first).await?;
        let mut found = Vec::new();
        for round in 0..ROUNDS {
            let leader = Some(1 + (round % 3) as i32);
            mock.change(move |cluster| cluster.partition_leader(TOPIC, 0, leader))
                .await??;
            let batch: Vec<NewRecord> = (0..10).map(|n| NewRecord::new(format!("{round}.{n}"))).collect();
            soon(log.append(&batch)).await??;
            while found.len() < 10 * (round + 1) {
                found.extend(soon(reader.next(100)).await??);
            }
        }
        let expected = (0..ROUNDS).flat_map(|round| (0..10).map(move |n| format!("{round}.{n}")));
        ensure!(expected.eq(payloads(&found)), "{appends:?}: {found:?}");
    }
    Ok(())
}

pub(crate) async fn an_append_waits_until_enough_replicas_are_in_sync() -> Outcome {
    let mock = Mock::start(3).await?;
    let log = mock.log(Appends::Pipelined).await?;
    log.append(&[NewRecord::new("a")]).await?;
    mock.refuse(Request::Produce, Code::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS, 3)
        .await?;
    // Of several records, the mock cluster may take a later request after it has refused an earlier
    // one, which no broker of Kafka does. The client then takes the earlier record for stored.
    soon(log.append(&[NewRecord::new("b")])).await??;
    let found = payloads(&records(&log, Offset::ZERO).await?);
    ensure!(found == ["a", "b"], "{found:?}");
    Ok(())
}
