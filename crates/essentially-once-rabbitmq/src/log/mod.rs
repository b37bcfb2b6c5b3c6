//! A stream as a log.

pub(crate) mod codec;
pub(crate) mod packed;
pub(crate) mod reader;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    Error, Log, NewRecord, Offset,
    backend::{Bounds, Durability, LogId, LogReader},
};
use lapin::types::{AMQPValue, FieldTable};

use self::{
    codec::{decode, encode_all},
    reader::RabbitReader,
};
use crate::{
    connection::{
        deliveries::Delivered,
        publisher::Publisher,
        server::Server,
        stream::{self, Ends, MAX_LENGTH, MAX_SEGMENT},
        tail::Tail,
    },
    options::LogOptions,
    store::names,
};

/// How long a replica may show nothing after its start, until its leader reports what is
/// committed.
const SHOWS: Duration = Duration::from_millis(250);

/// A stream as a log; see [`Rabbit::log`](crate::Rabbit::log).
///
/// - An offset is the message's offset in the stream and, within a [packed](LogOptions::packed)
///   message, the index of the record: `17-0` is the first record of message 17. Offsets rise and
///   may have holes.
/// - AMQP does not report the offset of a published message, so `append` returns `None`.
/// - RabbitMQ does not distinguish incarnations of a stream. A stream that was deleted and created
///   again is detected only if it is shorter than a reader's offset. Give a consumer of the old
///   stream another name, or use `seek`. An append through a handle of the deleted stream fails
///   until a stream of that name exists again, and then goes to the new one: the broker routes
///   messages by the name alone.
/// - A reader holds about 8 MiB of messages that the broker sends ahead. The broker counts
///   messages, not bytes. If they suddenly grow, up to 32 messages of the new size may arrive
///   once.
/// - A confirmed record is on more than half of the stream's replicas, and survives if their
///   brokers are killed and restarted. RabbitMQ does not sync it to disk first: it can be lost if
///   more than half of the machines lose power at once.
/// - In a cluster, `bounds` are those of the replica that is asked, which may lag. A position past
///   the end is an error only if it stays past the end for the
///   [timeout](crate::RabbitOptions::timeout).
/// - If retention, say by a policy, has removed every record of a stream, the broker reports no
///   offset. `bounds` and `read` are [`Error::Unavailable`] until there is another record.
/// - RabbitMQ 3.10 forgets the first stream that a node ever had if the node is killed within the
///   next second or two.
/// - A reader positioned directly after a removed segment gets [`Error::Truncated`], although it
///   may have read that segment to its end: the number of records in the last message is no longer
///   known.
#[derive(Clone)]
pub struct RabbitLog {
    inner: Arc<Inner>,
}

struct Inner {
    server: Arc<Server>,
    id: LogId,
    publisher: Publisher,
    options: LogOptions,
}

impl RabbitLog {
    pub(crate) async fn open(server: Arc<Server>, name: &str, options: LogOptions) -> Result<Self, Error> {
        let id = LogId::new(name)?;
        if let Some((prefix, consumer)) = names::owner(name)
            && prefix == server.options.prefix
        {
            return Err(Error::InvalidName {
                kind: "log",
                name: name.into(),
                reason: format!(
                    "it is the name of one of the store's own streams or outboxes, of consumer {consumer}; choose another name, \
                     or read the records that this consumer sent with `RabbitStore::sent` or `sent_to`"
                ),
            });
        }
        let most = names::most_bytes(server.vhost());
        if name.len() > most {
            return Err(Error::InvalidName {
                kind: "log",
                name: name.chars().take(60).collect(),
                reason: format!(
                    "it has {} bytes, and RabbitMQ takes {most} for a stream in this virtual host",
                    name.len()
                ),
            });
        }
        options.check()?;
        let connection = server.asking.connection().await?;
        let found = match options.existing {
            true => stream::require(&server, &connection, name).await,
            false => stream::declare(&server, &connection, name, arguments(&options)).await,
        };
        server.asking.used(&connection, found).await?;
        Ok(Self {
            inner: Arc::new(Inner {
                publisher: Publisher::new(Arc::clone(&server), name.into()),
                server,
                id,
                options,
            }),
        })
    }
}

/// The arguments that declare a log's stream.
fn arguments(options: &LogOptions) -> FieldTable {
    let mut arguments = FieldTable::default();
    let bytes = |bytes: u64| AMQPValue::LongLongInt(i64::try_from(bytes).unwrap_or(i64::MAX));
    if let Some(age) = options.retention.age {
        let age = format!("{}s", age.as_secs());
        arguments.insert("x-max-age".into(), AMQPValue::LongString(age.into()));
    }
    if let Some(max) = options.retention.bytes {
        arguments.insert(MAX_LENGTH.into(), bytes(max));
    }
    if let Some(segment) = options.segment() {
        arguments.insert(MAX_SEGMENT.into(), bytes(segment));
    }
    arguments
}

/// The bounds of a stream with these first and last messages.
fn bounds_of(ends: Option<&Ends>) -> Bounds {
    let Some(ends) = ends else {
        return Bounds {
            earliest: Offset::ZERO,
            end: Offset::ZERO,
        };
    };
    let last = &ends.last;
    let records = decode(last.offset, &last.properties, Bytes::copy_from_slice(&last.body));
    Bounds {
        earliest: Offset::new(ends.first.offset, 0),
        end: Offset::new(last.offset, records.len() as u64),
    }
}

#[async_trait]
impl Log for RabbitLog {
    fn id(&self) -> &LogId {
        &self.inner.id
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let inner = &self.inner;
        for record in records {
            record.check_size(inner.server.options.record_limit)?;
        }
        let headers_limit = inner.server.headers_limit();
        let messages = encode_all(records, SystemTime::now(), &inner.options, headers_limit);
        inner.publisher.publish(messages).await?;
        Ok(None)
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let id = &self.inner.id;
        let choose = |ends: Option<&Ends>| bounds_of(ends).check(id, from).map(|()| from.hi());
        let connection = Arc::new(self.inner.server.open_connection().await?);
        let tail = Tail::open_if(&self.inner.server, &connection, id.name(), choose).await?;
        let records = |message: Delivered| Ok(decode(message.offset, &message.properties, Bytes::from(message.body)));
        Ok(Box::new(RabbitReader::new(id.clone(), tail, from, records)))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        let (server, name) = (&self.inner.server, self.inner.id.name());
        let connection = server.asking.connection().await?;
        let ends = async {
            match stream::ends(server, &connection, name).await? {
                None => {
                    tokio::time::sleep(SHOWS).await;
                    stream::ends(server, &connection, name).await
                }
                ends => Ok(ends),
            }
        };
        let ends = server.asking.used(&connection, ends.await).await?;
        Ok(bounds_of(ends.as_ref()))
    }

    /// Counts offsets. A packed log yields more records than asked for. The broker leaves out an
    /// offset here and there, such as at the end of a segment, and the log then yields fewer.
    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        let Bounds { earliest, end } = self.bounds().await?;
        Ok(Some(match count {
            0 => end,
            _ => earliest.max(Offset::new(end.hi().saturating_sub(count - 1), 0)),
        }))
    }

    /// Streams are always durable. AMQP offers no way to ask for the number of replicas.
    async fn durability(&self) -> Result<Durability, Error> {
        let (server, name) = (&self.inner.server, self.inner.id.name());
        let connection = server.asking.connection().await?;
        let found = stream::require(server, &connection, name).await;
        server.asking.used(&connection, found).await?;
        Ok(Durability::Durable)
    }
}

impl fmt::Debug for RabbitLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitLog")
            .field("id", &self.inner.id)
            .field("server", &self.inner.server.to_string())
            .finish_non_exhaustive()
    }
}
