//! Appends, by a producer of the client library.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use essentially_once::{Error, NewRecord, Offset, backend::unique};
use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _, PurgeConfig},
    util::Timeout,
};
use tokio::sync::Mutex;

use super::codec::headers;
use crate::{
    connection::{Cluster, Complaint, Context, client},
    error::{Fault, is_refused, read_failed, write_failed},
    options::Appends,
};

/// A producer, and what it complains about.
#[derive(Clone)]
struct Client {
    producer: FutureProducer<Context>,
    context: Context,
}

/// What the format and the protocol add to a record.
const OVERHEAD: usize = 64 * 1024;

/// The client library's own limit of a batch, in bytes.
const MAX_BATCH: usize = 1_000_000;

/// Appends to a partition.
pub(super) struct Appender {
    cluster: Arc<Cluster>,
    topic: String,
    partition: i32,
    appends: Appends,
    /// The same for each producer, so that a new one fences the one before.
    transactional_id: String,
    /// `None` until the first append, after an error that ends a producer, and during a
    /// transaction.
    client: Mutex<Option<Client>>,
}

/// What became of the messages of an append.
#[derive(Default)]
struct Sent {
    last: Option<i64>,
    /// The first error.
    failed: Option<KafkaError>,
    /// Whether a message was appended, or may have been.
    any: bool,
}

impl Sent {
    /// Counts what became of a message.
    fn landed(&mut self, delivery: <DeliveryFuture as Future>::Output) {
        match delivery {
            Ok(Ok(delivery)) => {
                self.any = true;
                self.last = Some(delivery.offset);
            }
            Ok(Err((error, _))) => self.failed(error),
            Err(_) => self.failed(KafkaError::Canceled),
        }
    }

    fn failed(&mut self, error: KafkaError) {
        self.any |= !is_refused(&error);
        self.failed.get_or_insert(error);
    }
}

impl Appender {
    pub(super) fn new(cluster: Arc<Cluster>, topic: String, partition: i32, appends: Appends) -> Self {
        Self {
            cluster,
            topic,
            partition,
            appends,
            transactional_id: format!("essentially-once-{:032x}", unique()),
            client: Mutex::new(None),
        }
    }

    fn action(&self, verb: &str) -> String {
        self.cluster
            .on(format!("{verb} partition {} of topic {}", self.partition, self.topic))
    }

    /// Appends the records in order. One append follows another, so that their records do not mix.
    pub(super) async fn append(self: &Arc<Self>, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        if records.is_empty() {
            return Ok(None);
        }
        if self.appends == Appends::Pipelined {
            return self.append_now(records).await;
        }
        // In a task of its own, so that a dropped call leaves no transaction open.
        let (this, records) = (Arc::clone(self), records.to_vec());
        let appended = tokio::spawn(async move { this.append_now(&records).await }).await;
        appended.unwrap_or_else(|_| {
            Err(Error::indeterminate(
                self.action("append to"),
                "the runtime is shutting down",
            ))
        })
    }

    async fn append_now(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let mut place = self.client.lock().await;
        let client = match place.take() {
            Some(client) => client,
            None => self.start().await?,
        };
        if self.appends == Appends::Pipelined {
            // It also sends what a dropped call leaves, before anything that follows.
            *place = Some(client.clone());
        }
        let appended = match self.appends {
            Appends::Pipelined => self.pipeline(&client, records).await,
            Appends::Transactional => self.transact(&client, records).await,
        };
        // A producer that has failed for good is replaced.
        let has_failed = || self.appends == Appends::Transactional || client.producer.client().fatal_error().is_some();
        match appended.is_err() && has_failed() {
            true => {
                *place = None;
                end(client);
            }
            false => *place = Some(client),
        }
        appended
    }

    /// Starts a producer.
    async fn start(&self) -> Result<Client, Error> {
        let cluster = &self.cluster;
        // A producer would wait for the topic, and then could not say that nothing was sent.
        let topic = self.topic.clone();
        let found = cluster.ask(move |client, timeout| {
            use rdkafka::consumer::Consumer as _;
            client.fetch_metadata(Some(&topic), timeout).map(drop)
        });
        found
            .await
            .map_err(|fault| read_failed(self.action("append to"), fault))?;
        let mut config = cluster.config();
        let timeout = cluster.options.timeout.as_millis().to_string();
        config
            .set("acks", "all")
            .set("enable.idempotence", "true")
            // After an error, no later message of the append may be appended.
            .set("enable.gapless.guarantee", "true")
            .set("linger.ms", "0")
            .set("message.timeout.ms", &timeout)
            .set("request.timeout.ms", &timeout)
            .set(
                "message.max.bytes",
                (cluster.options.record_limit + OVERHEAD).to_string(),
            );
        if config.get("batch.size").is_none() {
            // A broker's limit of a record is that of a batch.
            config.set("batch.size", cluster.options.record_limit.min(MAX_BATCH).to_string());
        }
        if self.appends == Appends::Transactional {
            config
                .set("transactional.id", &self.transactional_id)
                .set("transaction.timeout.ms", &timeout);
        }
        let context = Context::default();
        let client = Client {
            producer: client(&config, context.clone())?,
            context,
        };
        if self.appends == Appends::Transactional {
            let ready = self
                .block(&client, |producer, timeout| producer.init_transactions(timeout))
                .await;
            if let Err(fault) = ready {
                end(client);
                return Err(read_failed(self.action("start to append to"), fault));
            }
        }
        Ok(client)
    }

    async fn pipeline(&self, client: &Client, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let sent = self.send_all(client, records).await;
        let Some(error) = sent.failed else {
            return Ok(sent.last.map(offset));
        };
        let fault = match client.producer.client().fatal_error() {
            Some((code, reason)) if is_dropped(&error) => {
                let complaint = Complaint {
                    code: Some(code),
                    reason,
                };
                Fault::new(KafkaError::MessageProduction(code), Some(complaint))
            }
            _ => Fault::new(error, client.context.complaint()),
        };
        Err(match sent.any {
            true => Error::indeterminate(self.action("append to"), fault.to_string()),
            false => self.nothing_appended(fault),
        })
    }

    /// A transaction. Until its commit was sent, nothing has happened.
    async fn transact(&self, client: &Client, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let complaint = || client.context.complaint();
        client
            .producer
            .begin_transaction()
            .map_err(|error| self.nothing_appended(Fault::new(error, complaint())))?;
        let sent = self.send_all(client, records).await;
        if let Some(error) = sent.failed {
            let fault = match is_dropped(&error) {
                // Only a commit, which the client then refuses, says why.
                true => match self.commit(client).await {
                    Err(fault) => fault,
                    Ok(()) => {
                        let cause = "the client committed the transaction although it had dropped some of its records";
                        return Err(Error::indeterminate(self.action("append to"), cause));
                    }
                },
                false => Fault::new(error, complaint()),
            };
            // If that fails too, the broker ends the transaction after its timeout.
            let _ = self
                .block(client, |producer, timeout| producer.abort_transaction(timeout))
                .await;
            return Err(self.nothing_appended(fault));
        }
        match self.commit(client).await {
            Ok(()) => Ok(sent.last.map(offset)),
            Err(fault) => Err(Error::indeterminate(self.action("append to"), fault.to_string())),
        }
    }

    /// The failure of an append that left no record.
    fn nothing_appended(&self, fault: Fault) -> Error {
        match write_failed(self.action("append to"), fault) {
            Error::Indeterminate { action, cause } => Error::Unavailable { action, cause },
            error => error,
        }
    }

    async fn commit(&self, client: &Client) -> Result<(), Fault> {
        self.block(client, |producer, timeout| producer.commit_transaction(timeout))
            .await
    }

    /// Sends all records, and waits until each is stored or refused.
    async fn send_all(&self, client: &Client, records: &[NewRecord]) -> Sent {
        client.context.forget();
        let mut sent = Sent::default();
        let mut flying = VecDeque::<DeliveryFuture>::new();
        let mut refused = None;
        'records: for record in records {
            let mut message = FutureRecord::<[u8], [u8]>::to(&self.topic)
                .partition(self.partition)
                .payload(&record.payload);
            message.key = record.key.as_deref();
            message.headers = headers(record);
            loop {
                match client.producer.send_result(message) {
                    Ok(delivery) => flying.push_back(delivery),
                    Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) if !flying.is_empty() => {
                        if let Some(delivery) = flying.pop_front() {
                            sent.landed(delivery.await);
                        }
                        message = again;
                        continue;
                    }
                    Err((error, _)) => {
                        refused = Some(error);
                        break 'records;
                    }
                }
                break;
            }
            if sent.failed.is_some() {
                break;
            }
        }
        for delivery in flying {
            sent.landed(delivery.await);
        }
        // The client has not taken this record, or any after it. Last, because it refuses what
        // follows a record that failed, and that error is the cause.
        if let Some(error) = refused {
            sent.failed.get_or_insert(error);
        }
        sent
    }

    /// Calls what the library only offers as a call that blocks.
    async fn block(
        &self,
        client: &Client,
        call: impl FnOnce(&FutureProducer<Context>, Timeout) -> Result<(), KafkaError> + Send + 'static,
    ) -> Result<(), Fault> {
        let (client, timeout) = (client.clone(), Timeout::After(self.cluster.options.timeout));
        let called = tokio::task::spawn_blocking(move || {
            call(&client.producer, timeout).map_err(|error| Fault::new(error, client.context.complaint()))
        });
        called.await.unwrap_or_else(|_| Err(Fault::ended()))
    }
}

/// Ending a producer waits for its threads.
impl Drop for Appender {
    fn drop(&mut self) {
        if let Some(client) = self.client.get_mut().take() {
            end(client);
        }
    }
}

/// Whether the client dropped or refused the record because the producer or its transaction has
/// failed.
fn is_dropped(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{Fatal, PurgeInflight, PurgeQueue, State};
    matches!(
        error.rdkafka_error_code(),
        Some(PurgeQueue | PurgeInflight | Fatal | State)
    )
}

/// Ends a producer on a thread that it may block.
fn end(client: Client) {
    client.producer.purge(PurgeConfig::default().queue().inflight());
    std::thread::spawn(move || {
        let _ = client.producer.flush(Duration::ZERO);
        drop(client);
    });
}

fn offset(offset: i64) -> Offset {
    u64::try_from(offset).unwrap_or(0).into()
}
