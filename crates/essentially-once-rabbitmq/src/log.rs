//! A stream as a log.

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

use crate::{
    codec::{decode, encode, encode_packed},
    publisher::{Message, Publisher},
    reader::RabbitReader,
    server::Server,
    store::names,
    stream::{self, Ends},
    tail::{Delivered, Tail},
};

/// A segment must have room for a table of up to 255 publishers. With less, RabbitMQ 3.10 keeps
/// starting new segments forever.
const LEAST_SEGMENT: u64 = 64 * 1024;

/// RabbitMQ's default segment size.
const USUAL_SEGMENT: u64 = 500_000_000;

/// How long a replica may show nothing after its start, until its leader tells it what is
/// committed.
const SHOWS: Duration = Duration::from_millis(250);

/// How a log's stream is declared and how records are written to it; see
/// [`Rabbit::log_with`](crate::Rabbit::log_with).
///
/// RabbitMQ enforces retention itself. It removes whole segments, and never the last one.
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    existing: bool,
    max_age: Option<Duration>,
    max_bytes: Option<u64>,
    segment_bytes: Option<u64>,
    packed: Option<(usize, usize)>,
    compressed: bool,
}

impl LogOptions {
    /// A stream that keeps everything, with one message per record.
    pub fn new() -> Self {
        Self::default()
    }

    /// Opens the stream however it was declared, and fails if it does not exist. Without this
    /// option the stream is declared, which fails if it exists with other settings.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// Removes segments whose records are all older than this (`x-max-age`), in whole seconds.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = Some(age);
        self
    }

    /// Removes the oldest segments while the stream is larger than this (`x-max-length-bytes`). At
    /// least two segments must fit. With fewer, RabbitMQ would remove everything, read or not,
    /// whenever a segment is full.
    #[must_use]
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = Some(bytes);
        self
    }

    /// The size of segments (`x-stream-max-segment-size-bytes`), from 64 KiB to 3 GB. By default
    /// 500 MB, or a quarter of [`max_bytes`](Self::max_bytes) if that is less.
    #[must_use]
    pub fn segment_bytes(mut self, bytes: u64) -> Self {
        self.segment_bytes = Some(bytes);
        self
    }

    /// Writes up to this many records and bytes of one append into one message. This is many times
    /// faster, but clients that do not know [the format](crate#packed-messages) cannot read such
    /// messages. Readers of this crate read both kinds, also mixed.
    ///
    /// The records of one message are confirmed together and removed together. A message must not
    /// be larger than the broker's `max_message_size`.
    #[must_use]
    pub fn packed(mut self, records: usize, bytes: usize) -> Self {
        self.packed = Some((records.clamp(1, u32::MAX as usize), bytes));
        self
    }

    /// Compresses packed messages with LZ4 if that makes them smaller.
    #[must_use]
    pub fn compressed(mut self) -> Self {
        self.compressed = true;
        self
    }

    /// The segment size to ask for, if it is not the default.
    fn segment(&self) -> Option<u64> {
        let quarter = self.max_bytes.map(|max| (max / 4).max(LEAST_SEGMENT));
        self.segment_bytes
            .or(quarter.filter(|quarter| *quarter < USUAL_SEGMENT))
    }

    fn check(&self) -> Result<(), Error> {
        let segment = self.segment().unwrap_or(USUAL_SEGMENT);
        let (setting, reason) = if segment < LEAST_SEGMENT {
            let why = "each begins with a table of publishers and must hold more than that";
            ("segment_bytes", format!("a segment needs {LEAST_SEGMENT} bytes: {why}"))
        } else if self.max_bytes.is_some_and(|max| max / 2 < segment) {
            let why = "or the broker removes everything whenever one is full";
            ("max_bytes", format!("two segments of {segment} bytes must fit, {why}"))
        } else {
            return Ok(());
        };
        Err(Error::InvalidSetting { setting, reason })
    }

    fn arguments(&self) -> FieldTable {
        let mut arguments = FieldTable::default();
        let bytes = |bytes: u64| AMQPValue::LongLongInt(i64::try_from(bytes).unwrap_or(i64::MAX));
        if let Some(age) = self.max_age {
            arguments.insert(
                "x-max-age".into(),
                AMQPValue::LongString(format!("{}s", age.as_secs().max(1)).into()),
            );
        }
        if let Some(max) = self.max_bytes {
            arguments.insert("x-max-length-bytes".into(), bytes(max));
        }
        if let Some(segment) = self.segment() {
            arguments.insert("x-stream-max-segment-size-bytes".into(), bytes(segment));
        }
        arguments
    }

    fn messages(&self, records: &[NewRecord], now: SystemTime, headers_limit: usize) -> Vec<Message> {
        let Some((most, bytes)) = self.packed else {
            return records
                .iter()
                .map(|record| encode(record, now, headers_limit))
                .collect();
        };
        let mut messages = Vec::new();
        let mut rest = records;
        while !rest.is_empty() {
            let mut size = 0;
            let fits = |record: &&NewRecord| {
                size += record.size();
                size <= bytes
            };
            let count = rest.iter().take(most).take_while(fits).count().max(1);
            let (message, behind) = rest.split_at(count);
            messages.push(encode_packed(message, now, self.compressed));
            rest = behind;
        }
        messages
    }
}

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
///   messages, not bytes. If they suddenly grow, up to 128 messages of the new size may arrive
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
        if let Some((prefix, consumer, _)) = names::parse(name)
            && prefix == server.options.prefix
        {
            return Err(Error::InvalidName {
                kind: "log",
                name: name.into(),
                reason: format!(
                    "it is the name of one of the store's own streams, of consumer {consumer}; choose another name, or read the \
                     records that this consumer sent with `RabbitStore::sent`"
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
        if !options.existing {
            options.check()?;
        }
        let connection = server.asking.connection(&server).await?;
        let found = match options.existing {
            true => stream::require(&server, &connection, name).await,
            false => stream::declare(&server, &connection, name, options.arguments()).await,
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
        let messages = inner.options.messages(records, SystemTime::now(), headers_limit);
        inner.publisher.publish(messages).await?;
        Ok(None)
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let (log, requested) = (self.inner.id.clone(), from);
        let choose = |ends: Option<&Ends>| {
            let log = log.clone();
            let Bounds { earliest, end } = bounds_of(ends);
            if from < earliest {
                Err(Error::Truncated {
                    log,
                    requested,
                    earliest,
                })
            } else if from > end {
                Err(Error::OutOfRange { log, requested, end })
            } else {
                Ok(from.hi())
            }
        };
        let connection = Arc::new(self.inner.server.open_connection().await?);
        let tail = Tail::open_if(&self.inner.server, &connection, self.inner.id.name(), choose).await?;
        let records = |message: Delivered| Ok(decode(message.offset, &message.properties, Bytes::from(message.body)));
        Ok(Box::new(RabbitReader::new(self.inner.id.clone(), tail, from, records)))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        let (server, name) = (&self.inner.server, self.inner.id.name());
        let connection = server.asking.connection(server).await?;
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

    /// Streams are always durable. AMQP offers no way to ask for the number of replicas.
    async fn durability(&self) -> Result<Durability, Error> {
        let (server, name) = (&self.inner.server, self.inner.id.name());
        let connection = server.asking.connection(server).await?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_fit_what_is_kept() {
        for (options, segment) in [
            (LogOptions::new(), None),
            (LogOptions::new().segment_bytes(100_000), Some(100_000)),
            (LogOptions::new().max_bytes(u64::MAX), None),
            (LogOptions::new().max_bytes(1_000_000), Some(250_000)),
            (LogOptions::new().max_bytes(200_000), Some(LEAST_SEGMENT)),
        ] {
            assert!(options.check().is_ok(), "{options:?}");
            assert_eq!(options.segment(), segment, "{options:?}");
        }
        for (options, wrong) in [
            (LogOptions::new().segment_bytes(LEAST_SEGMENT - 1), "segment_bytes"),
            (LogOptions::new().max_bytes(2 * LEAST_SEGMENT - 1), "max_bytes"),
            (
                LogOptions::new().max_bytes(1_000_000).segment_bytes(500_001),
                "max_bytes",
            ),
        ] {
            let error = options.check();
            assert!(
                matches!(error, Err(Error::InvalidSetting { setting, .. }) if setting == wrong),
                "{error:?}"
            );
        }
    }
}
