//! The log: a partition of a topic.

mod append;
mod codec;
mod reader;

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use essentially_once::{
    Error, Log, NewRecord, Offset,
    backend::{Bounds, Durability, LogId, LogReader},
};
use rdkafka::{
    TopicPartitionList,
    admin::{AdminOptions, NewTopic, TopicReplication},
    consumer::Consumer as _,
    error::{KafkaError, RDKafkaErrorCode},
};
use tokio::time::{self, Instant};

use self::{
    append::Appender,
    codec::offset_of,
    reader::{Client, KafkaReader},
};
use crate::{
    connection::{Cluster, durability},
    error::{Fault, read_failed, write_failed},
    options::LogOptions,
};

/// A log in one partition of a topic; see [`Kafka::log`](crate::Kafka::log). An offset is Kafka's.
///
/// The topic is an ordinary one. Other programs may produce to it and consume from it, in groups or
/// not.
///
/// # Offsets
/// Offsets rise and have holes: transactions take an offset for their end, and those of an aborted
/// transaction or of a compacted record are never read. A reader sees only committed records, and
/// waits at the first record of a transaction that is still open. The numbers of records that
/// [`count_from`](Log::count_from), [`tail`](Log::tail) and [`remove_before`](Log::remove_before)
/// work with are numbers of offsets.
///
/// # Incarnation
/// Kafka's client does not show whether a topic was deleted and created again. A reader of the old
/// topic notices only if the new one is shorter than its place. The digest that a consumer keeps of
/// its last records finds more of them. Give a consumer of the old topic another name, or use
/// `seek`. Records that are appended through a handle of the old topic go to the new one.
///
/// # Appending
/// [`Appends`](crate::Appends) says what an append that fails may leave. Kafka's own sequence
/// numbers keep a retry of the client from appending a record twice. A retry of the caller, after
/// [`Error::Indeterminate`], may. Consumers drop such duplicates if the records have an
/// [`Origin`](essentially_once::Origin).
///
/// # Format
/// A record's key, headers, payload and time are the message's. Its origin is in two more headers:
///
/// | header | value |
/// |---|---|
/// | `essentially-once-producer` | the producer's name, followed by `#` and the epoch unless that is the stable one (`web#17`) |
/// | `essentially-once-sequence` | a decimal number below 2^64 |
/// | `essentially-once-header` | a header with a name that is empty, begins with `essentially-once-` or has a zero byte: the length of the name in bytes, `:`, the name, the value |
///
/// Messages of any other program are records without an origin. A payload or header value of `null`
/// is read as an empty one. A message that breaks the rules of the table, or has a header whose
/// name is not UTF-8, is a [`malformed`](essentially_once::Record::malformed) record.
///
/// # Rights
/// - Reading: `Read` and `Describe` on the topic, and `Read` on the group `essentially-once`, which
///   the client asks for and never joins.
/// - Appending: `Write` on the topic, and `IdempotentWrite` on the cluster for brokers before 2.8.
///   In transactions also `Write` and `Describe` on the transactional ids that begin with
///   `essentially-once-`.
/// - Creating the topic: `Create`. [`remove_before`](Log::remove_before): `Delete`.
///   [`durability`](Log::durability): `DescribeConfigs`.
#[derive(Clone)]
pub struct KafkaLog {
    partition: Arc<Partition>,
    appender: Arc<Appender>,
}

/// A partition of a topic.
struct Partition {
    cluster: Arc<Cluster>,
    id: LogId,
    topic: String,
    number: i32,
    /// Looks for the last record. `None` until the first look, during one, and after one that was
    /// dropped or failed.
    looking: Mutex<Option<Client>>,
}

impl KafkaLog {
    pub(crate) async fn open(cluster: Arc<Cluster>, name: &str, options: LogOptions) -> Result<Self, Error> {
        let topic = options.topic.as_deref().unwrap_or(name);
        let number = i32::try_from(options.partition).map_err(|_| Error::InvalidSetting {
            setting: "partition",
            reason: format!("{} is more than {}", options.partition, i32::MAX),
        })?;
        check_topic(topic)?;
        let name = match number {
            0 => name.to_owned(),
            number => format!("{name}/{number}"),
        };
        let partition = Partition {
            id: LogId::new(name)?,
            cluster,
            topic: topic.to_owned(),
            number,
            looking: Mutex::new(None),
        };
        partition
            .require(options.existing || number != 0, &options.topic_settings)
            .await?;
        let appender = Appender::new(
            Arc::clone(&partition.cluster),
            topic.to_owned(),
            number,
            options.appends,
        );
        Ok(Self {
            partition: Arc::new(partition),
            appender: Arc::new(appender),
        })
    }
}

/// Kafka's rules for the name of a topic.
fn check_topic(topic: &str) -> Result<(), Error> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let reason = match topic {
        "" | "." | ".." => "Kafka has no topic of that name",
        _ if topic.len() > 249 => "Kafka takes at most 249 characters",
        _ if !topic.chars().all(is_allowed) => {
            "Kafka takes letters, digits, `.`, `_` and `-` in the name of a topic; name it with `LogOptions::topic`"
        }
        _ => return Ok(()),
    };
    Err(Error::InvalidName {
        kind: "log",
        name: topic.chars().take(60).collect(),
        reason: reason.into(),
    })
}

impl Partition {
    fn action(&self, verb: &str) -> String {
        self.cluster.on(format!("{verb} log {}", self.id))
    }

    /// Fails unless the partition exists. Creates the topic first, unless it must exist.
    async fn require(&self, existing: bool, settings: &[(String, String)]) -> Result<(), Error> {
        const VERB: &str = "open";
        let begun = Instant::now();
        let mut created = false;
        loop {
            match self.partitions().await {
                Ok(Some(count)) if self.number < count => return Ok(()),
                Ok(Some(count)) => {
                    let cause = format!("the topic has only {count} partitions, which are counted from 0");
                    return Err(Error::failed(self.action(VERB), cause));
                }
                Ok(None) if existing => {
                    let advice = match self.number {
                        0 => "create it, or check the name",
                        _ => "create it with enough partitions, or check the name",
                    };
                    let cause = format!("there is no topic {}: {advice}", self.topic);
                    return Err(Error::failed(self.action(VERB), cause));
                }
                Ok(None) if !created => {
                    self.create(settings).await?;
                    created = true;
                }
                // The brokers hear of a new topic one by one.
                Ok(None) if begun.elapsed() < self.cluster.options.timeout => time::sleep(SOON).await,
                Ok(None) => {
                    let cause = "the topic was created, and no broker knows it yet";
                    return Err(Error::unavailable(self.action(VERB), cause));
                }
                Err(fault) => return Err(read_failed(self.action(VERB), fault)),
            }
        }
    }

    /// The number of partitions, or `None` if there is no such topic.
    async fn partitions(&self) -> Result<Option<i32>, Fault> {
        let name = self.topic.clone();
        let found = self.cluster.ask(move |client, timeout| {
            let metadata = client.fetch_metadata(Some(&name), timeout)?;
            let topic = metadata.topics().iter().find(|topic| topic.name() == name);
            match topic.map(|topic| (topic.error(), topic.partitions().len())) {
                None => Ok(None),
                Some((None, 0)) => Ok(None),
                Some((None, count)) => Ok(Some(count as i32)),
                Some((Some(error), _)) => Err(KafkaError::MetadataFetch(error.into())),
            }
        });
        match found.await {
            Err(fault) => match fault.code() {
                Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => Ok(None),
                _ => Err(fault),
            },
            found => found,
        }
    }

    async fn create(&self, settings: &[(String, String)]) -> Result<(), Error> {
        let cluster = &self.cluster;
        let admin = cluster.admin()?;
        let options = AdminOptions::new()
            .request_timeout(Some(cluster.options.timeout))
            .operation_timeout(Some(cluster.options.timeout));
        // -1 is the broker's default.
        let topic = NewTopic::new(&self.topic, 1, TopicReplication::Fixed(-1));
        let topic = settings
            .iter()
            .fold(topic, |topic, (name, value)| topic.set(name, value));
        let created = admin.create_topics([&topic], &options).await;
        let complaint = || admin.inner().context().complaint();
        let action = || cluster.on(format!("create topic {}", self.topic));
        let results = created.map_err(|error| read_failed(action(), Fault::new(error, complaint())))?;
        for result in results {
            if let Err((_, code)) = result
                && code != RDKafkaErrorCode::TopicAlreadyExists
            {
                return Err(read_failed(
                    action(),
                    Fault::new(KafkaError::AdminOp(code), complaint()),
                ));
            }
        }
        Ok(())
    }

    /// The range of offsets that are used, and committed or aborted.
    async fn extent(&self) -> Result<Bounds, Error> {
        let (topic, number) = (self.topic.clone(), self.number);
        let found = self
            .cluster
            .ask(move |client, timeout| client.fetch_watermarks(&topic, number, timeout));
        let (earliest, end) = found
            .await
            .map_err(|fault| read_failed(self.action("read bounds of"), fault))?;
        let offset = |offset| Offset::from(u64::try_from(offset).unwrap_or(0));
        Ok(Bounds {
            earliest: offset(earliest),
            end: offset(end),
        })
    }

    /// The bounds of the records. Offsets without a record may follow the last one, so this looks
    /// at ever more of them before the end.
    async fn bounds(&self) -> Result<Bounds, Error> {
        let extent = self.extent().await?;
        let Bounds { earliest, end } = extent;
        let mut count = 1;
        loop {
            let from = Offset::from(end.lo().saturating_sub(count)).max(earliest);
            if from >= end {
                return Ok(extent);
            }
            if let Some(last) = self.last_in(from, end).await? {
                let end = last.successor();
                return Ok(Bounds { earliest, end });
            }
            if from == earliest {
                return Ok(Bounds {
                    earliest,
                    end: earliest,
                });
            }
            count *= 16;
        }
    }

    /// The last record in a range.
    async fn last_in(&self, from: Offset, end: Offset) -> Result<Option<Offset>, Error> {
        let looking = || self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = looking().take();
        let client = match kept {
            Some(client) => {
                client.go_to(self, from)?;
                client
            }
            None => Client::open(self, from, true)?,
        };
        let mut last = None;
        let reading = async {
            loop {
                match client.next().await {
                    Ok(message) if offset_of(&message) < end => {
                        let offset = offset_of(&message);
                        last = Some(offset);
                        // The broker answers at once only while it has records.
                        if offset.successor() == end {
                            return Ok(());
                        }
                    }
                    Ok(_) | Err(KafkaError::PartitionEOF(_)) => return Ok(()),
                    Err(error) => return Err(read_failed(self.action("read from"), Fault::new(error, None))),
                }
            }
        };
        match time::timeout(self.cluster.options.timeout, reading).await {
            Ok(read) => {
                read?;
                client.rest();
                *looking() = Some(client);
                Ok(last)
            }
            Err(_) => Err(Error::unavailable(
                self.action("read from"),
                format!("no answer within {:?}", self.cluster.options.timeout),
            )),
        }
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        let bounds = self.bounds().await?;
        if offset <= bounds.earliest {
            return Ok(0);
        }
        bounds.check(&self.id, offset)?;
        let admin = self.cluster.admin()?;
        let action = || self.action("remove records from");
        let failed = |error| write_failed(action(), Fault::new(error, admin.inner().context().complaint()));
        let mut place = TopicPartitionList::new();
        let before = i64::try_from(offset.lo()).unwrap_or(i64::MAX);
        place
            .add_partition_offset(&self.topic, self.number, rdkafka::Offset::Offset(before))
            .map_err(failed)?;
        let timeout = Some(self.cluster.options.timeout);
        let options = AdminOptions::new().request_timeout(timeout).operation_timeout(timeout);
        let removed = admin.delete_records(&place, &options).await.map_err(failed)?;
        for element in removed.elements() {
            element.error().map_err(failed)?;
        }
        Ok(offset.lo() - bounds.earliest.lo())
    }
}

/// How long to wait before looking again.
const SOON: std::time::Duration = std::time::Duration::from_millis(20);

#[async_trait]
impl Log for KafkaLog {
    fn id(&self) -> &LogId {
        &self.partition.id
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        for record in records {
            record.check_size(self.partition.cluster.options.record_limit)?;
        }
        self.appender.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        Ok(Box::new(KafkaReader::open(Arc::clone(&self.partition), from).await?))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.partition.bounds().await
    }

    /// Counts offsets, of which some have no record.
    async fn count_from(&self, from: Offset) -> Result<Option<u64>, Error> {
        let end = self.partition.extent().await?.end;
        Ok(Some(end.lo().saturating_sub(from.lo())))
    }

    /// Counts offsets, of which some have no record. The log then yields fewer records.
    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        let Bounds { earliest, end } = self.partition.bounds().await?;
        Ok(Some(earliest.max(Offset::from(end.lo().saturating_sub(count)))))
    }

    /// Returns the number of offsets that were removed, of which some had no record.
    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.partition.remove_before(offset).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        let Partition {
            cluster, topic, number, ..
        } = &*self.partition;
        durability(cluster, topic, *number).await
    }
}

impl fmt::Debug for KafkaLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaLog")
            .field("id", &self.partition.id)
            .field("cluster", &self.partition.cluster)
            .finish_non_exhaustive()
    }
}
