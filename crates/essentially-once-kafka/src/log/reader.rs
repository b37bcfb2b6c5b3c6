//! Readers: a client each, which is assigned the partition at an exact offset.

use std::{iter, sync::Arc};

use async_trait::async_trait;
use essentially_once::{
    Error, Offset, Record,
    backend::{FetchBudget, LogReader},
};
use futures_util::{FutureExt as _, StreamExt as _};
use rdkafka::{
    TopicPartitionList,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
};

use super::{Partition, codec::Decoder};
use crate::{
    connection::{Complaint, Context, READING, client},
    error::{Fault, read_failed},
};

/// Reads a partition.
pub(super) struct KafkaReader {
    partition: Arc<Partition>,
    client: Client,
    decoder: Decoder,
    next: Offset,
    /// A record that no answer held yet.
    held: Option<Record>,
    /// The error that follows it. The client reports it only once.
    failed: Option<KafkaError>,
}

impl KafkaReader {
    pub(super) async fn open(partition: Arc<Partition>, from: Offset) -> Result<Self, Error> {
        partition.bounds().await?.check(&partition.id, from)?;
        Ok(Self {
            client: Client::open(&partition, from, false)?,
            decoder: Decoder::default(),
            partition,
            next: from,
            held: None,
            failed: None,
        })
    }

    /// Explains why the broker refused to read on.
    async fn explain(&self) -> Error {
        let error = self.failed.clone().unwrap_or(KafkaError::Canceled);
        let is_outside = matches!(
            error.rdkafka_error_code(),
            Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange)
        );
        if is_outside {
            match self.partition.bounds().await {
                Ok(bounds) => {
                    if let Err(error) = bounds.check(&self.partition.id, self.next) {
                        return error;
                    }
                }
                Err(error) => return error,
            }
        }
        let fault = Fault::new(error, self.client.complaint());
        read_failed(self.partition.action("read from"), fault)
    }
}

#[async_trait]
impl LogReader for KafkaReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        if self.held.is_none() && self.failed.is_none() {
            match self.client.next().await {
                Ok(message) => self.held = Some(self.decoder.record(&message)),
                Err(error) => self.failed = Some(error),
            }
        }
        let Some(first) = self.held.take() else {
            // The error stays, so that a call that is dropped here does not lose it.
            return Err(self.explain().await);
        };
        // Nothing is awaited from here on, so a dropped call has taken nothing.
        self.decoder.begin();
        let mut budget = FetchBudget::new();
        budget.admits(first.size());
        let mut records = vec![first];
        let mut arrived = self.client.arrived();
        while records.len() < max
            && self.failed.is_none()
            && let Some(next) = arrived.next()
        {
            match next.map(|message| self.decoder.record(&message)) {
                Ok(record) if budget.admits(record.size()) => records.push(record),
                Ok(record) => {
                    self.held = Some(record);
                    break;
                }
                Err(error) => self.failed = Some(error),
            }
        }
        drop(arrived);
        if let Some(last) = records.last() {
            self.next = last.offset.successor();
        }
        Ok(records)
    }
}

/// A client that reads one partition.
pub(super) struct Client {
    /// `None` only while it is dropped.
    consumer: Option<StreamConsumer<Context>>,
}

impl Client {
    /// `sees_end` makes the client report the end of the partition as an error.
    pub(super) fn open(partition: &Partition, from: Offset, sees_end: bool) -> Result<Self, Error> {
        let cluster = &partition.cluster;
        let mut config = cluster.config();
        for (name, value) in READING {
            config.set(name, value);
        }
        let limit = cluster.options.record_limit.max(1024 * 1024).to_string();
        // The client reports the end of the partition at an empty answer, which the broker holds
        // back for this long.
        let wait = if sees_end { "10" } else { "500" };
        config
            .set("enable.partition.eof", sees_end.to_string())
            .set("fetch.wait.max.ms", wait)
            .set("fetch.message.max.bytes", limit);
        let opened = Self {
            consumer: Some(client(&config, Context::default())?),
        };
        opened.go_to(partition, from)?;
        Ok(opened)
    }

    /// Continues at another place.
    pub(super) fn go_to(&self, partition: &Partition, from: Offset) -> Result<(), Error> {
        let mut assigned = TopicPartitionList::new();
        let place = i64::try_from(from.lo()).unwrap_or(i64::MAX);
        let result = assigned
            .add_partition_offset(&partition.topic, partition.number, rdkafka::Offset::Offset(place))
            .and_then(|()| match &self.consumer {
                Some(consumer) => consumer.assign(&assigned),
                None => Err(KafkaError::Canceled),
            });
        result.map_err(|error| read_failed(partition.action("read from"), Fault::new(error, None)))
    }

    /// The next message. Dropping the future loses none.
    pub(super) async fn next(&self) -> Result<BorrowedMessage<'_>, KafkaError> {
        let Some(consumer) = &self.consumer else {
            return Err(KafkaError::Canceled);
        };
        loop {
            match consumer.recv().await {
                Ok(message) => return Ok(message),
                // The client reconnects by itself, and says so if it finds no broker.
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Stops reading until the next [`go_to`](Self::go_to).
    pub(super) fn rest(&self) {
        if let Some(Err(error)) = self.consumer.as_ref().map(|consumer| consumer.unassign()) {
            tracing::debug!(%error, "could not stop reading");
        }
    }

    /// What has arrived, without waiting.
    fn arrived(&self) -> impl Iterator<Item = Result<BorrowedMessage<'_>, KafkaError>> {
        // One for all messages, because each takes a lock.
        let mut stream = self.consumer.as_ref().map(StreamConsumer::stream);
        iter::from_fn(move || {
            loop {
                match stream.as_mut()?.next().now_or_never()?? {
                    Ok(message) => return Some(Ok(message)),
                    Err(error) if is_passing(&error) => {}
                    Err(error) => return Some(Err(error)),
                }
            }
        })
    }

    fn complaint(&self) -> Option<Complaint> {
        self.consumer
            .as_ref()
            .and_then(|consumer| consumer.context().complaint())
    }
}

/// Ending a client waits for its threads.
impl Drop for Client {
    fn drop(&mut self) {
        if let Some(consumer) = self.consumer.take() {
            std::thread::spawn(move || drop(consumer));
        }
    }
}

fn is_passing(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::Resolve
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::RequestTimedOut
        )
    )
}
