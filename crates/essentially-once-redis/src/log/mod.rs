//! The log: a Redis stream.

mod append;
mod codec;
mod extent;
mod reader;
mod stream;
mod tail;
mod trim;

use std::sync::Arc;

use async_trait::async_trait;
use essentially_once::{
    Error, Log, NewRecord, Offset,
    backend::{Bounds, Durability, LogId, LogReader},
};

pub(crate) use self::{
    append::{check, largest_value, weight},
    codec::{arguments, encode, producer_at, shown},
};
use crate::{
    connection::{Server, durability},
    log::{reader::RedisReader, stream::Stream},
    options::LogOptions,
};

/// A log in a Redis stream; see [`Redis::log`](crate::Redis::log). An offset is a stream id:
/// `1700000000000-3`.
///
/// The stream is an ordinary stream. Other programs may add to it, read it, and have their own
/// consumer groups.
///
/// # Incarnation
/// If a stream is deleted and created again, old ids get a new meaning. Each stream therefore has
/// an incarnation, a consumer group without consumers named `essentially-once:<incarnation>`.
/// Opening a log creates the stream and the group if they do not exist. The group is part of the
/// stream, so it disappears with the stream. Deleting the group by hand is like deleting the
/// stream. A user without the permission to create it gets a log without an incarnation, and a
/// warning. Such a log only notices that it became shorter.
///
/// A failover keeps the incarnation and may lose the stream's tail. A reader past the new end gets
/// [`Error::OutOfRange`]. If the stream grows past the reader's place before the reader continues,
/// nothing shows that it once held other records. Records that were handled are then missing from
/// the log. If the new master's clock is slower, new records may get ids before the reader's place,
/// and are never read. To avoid this, wait for replicas
/// ([`RedisOptions::min_replicas`](crate::RedisOptions::min_replicas)), or keep the state on the
/// same server, where it goes back too.
///
/// # Appending
/// Up to 1,000 records and about a megabyte are appended in one step, all or none, before the next
/// step is sent. After [`Error::Indeterminate`], any number of these steps may have been applied. A
/// record may have up to 3,000 headers.
///
/// A value over the server's `proto-max-bulk-len` fails with [`Error::TooLarge`] before anything is
/// sent, if the user may read that setting (`+config|get`). Otherwise the first such append fails
/// midway and closes the connection, which other calls may be using. From then on the handle
/// refuses values of that size.
///
/// # As an outbox
/// A handler's [`RedisTx`](crate::RedisTx#sending) sends to any log of its server, and in a cluster
/// to logs in the hash slot of its consumer. Open the log like any other to read it, or to
/// [relay](essentially_once::relay::Relay) it to another log. `send` names the log by the key of
/// its stream:
///
/// ```
/// # use essentially_once::Error;
/// # use essentially_once_redis::{LogOptions, Redis};
/// use essentially_once::relay::Relay;
/// use essentially_once::{Consumer, ConsumerId, NewRecord, Outbox, Record, handler_fn};
/// use essentially_once_redis::RedisTx;
///
/// # async fn example(shop: Redis, bus: Redis) -> Result<(), Error> {
/// let ship = handler_fn(|order: &Record, tx: &mut RedisTx| {
///     Box::pin(async move {
///         tx.send("{shipping}:shipped", NewRecord::new("shipped").key(order.payload.clone())).await?;
///         Ok(())
///     })
/// });
/// let shipping = ConsumerId::new("shipping")?;
/// let orders = shop.log("orders").await?;
/// let shipping = Consumer::essentially_once(shipping, orders, shop.store(), ship);
///
/// let options = LogOptions::new().stream("{shipping}:shipped");
/// let outbox = shop.log_with("outbox", options).await?;
/// let relay = Relay::to(bus.log("shipped").await?);
/// let relay = Consumer::at_least_once(ConsumerId::new("relay")?, outbox, shop.store(), relay);
/// let (shipping, relay) = tokio::join!(shipping.run(), relay.run());
/// # (shipping?, relay?);
/// # Ok(())
/// # }
/// ```
///
/// The commit gives each record an [`Origin`](essentially_once::Origin) in the stable epoch. Its
/// producer belongs to the log, and its sequence is the next number of the log. Both are in a hash:
///
/// | key | field | value |
/// |---|---|---|
/// | `<prefix>:{<tag>}:outbox:<stream>` | `producer` | drawn for the first record that was sent |
/// | | `next` | the sequence of the next record |
///
/// Services that send to one stream need the same [prefix](crate::RedisOptions::prefix), or the
/// stream gets a producer for each of them.
///
/// The tag is the hash tag of the stream's key, or the whole key if it has none. The hash stays
/// when records are removed and when the stream is deleted, so numbers are not used again. A commit
/// that finds a damaged hash fails with [`Error::Failed`] and applies nothing.
///
/// Numbers are used again if the server loses acknowledged commits: after a failover to a replica
/// that was behind, after a crash without `appendfsync always`, or when an older copy of the data
/// is restored. Consumers behind a relay then drop new records as copies of those that the relay
/// had passed on. Wait for replicas
/// ([`RedisOptions::min_replicas`](crate::RedisOptions::min_replicas)) to make such a failover less
/// likely. Before you start the processes on restored data, delete these hashes on each master of a
/// cluster, with your prefix, and each outbox gets a new producer:
///
/// ```text
/// redis-cli --scan --pattern 'essentially-once:{*}:outbox:*' | xargs redis-cli DEL
/// ```
///
/// If it was forgotten, and after a failover, the relay
/// [stops](essentially_once::relay::Relay#a-restored-outbox) before the first record that consumers
/// would drop, in most cases.
///
/// [`append`](Log::append) numbers nothing. A relay rejects the records that it leaves in an outbox
/// without an origin.
///
/// A commit removes no old records. To limit an outbox, open it with a
/// [retention](crate::LogOptions::retention) and call [`trim`](Self::trim) from time to time.
/// Choose a `max_age` that is longer than the relay may be away. A relay from which records were
/// removed ends with [`Error::Truncated`]. Or call
/// [`remove_passed`](essentially_once::consumer::remove_passed) from time to time. It removes the
/// records that the relay has passed, and no others.
///
/// # Removed records
/// A stream reports how many entries were removed, but not which. After our own
/// [retention](crate::LogOptions::retention) or [`remove_before`](Log::remove_before), a reader
/// knows exactly. After `XTRIM`, `XADD … MAXLEN` or `XDEL` by another program,
/// [`Error::Truncated`] may be a false alarm, if the last record that a stopped consumer has read
/// is also the last one removed. The opposite error never happens. A reader that was online has
/// counted the entries, and is exact. Readers silently pass over entries deleted from the middle of
/// a stream (`XDEL`).
///
/// Redis before 7.0 did not count removed entries. If a newer Redis loads such data, entries that
/// were removed earlier go unnoticed.
///
/// # Wire format
/// Any client can write an entry in our format, as in `XADD orders * essentially-once 1 payload
/// 32.38`. Its fields are:
///
/// | field | value |
/// |---|---|
/// | `essentially-once` | `1`, the version of this format; must be the first field |
/// | `key` | the record's key; optional |
/// | `producer`, `sequence` | the record's [`Origin`](essentially_once::Origin): a name, followed by `#` and the epoch unless that is the stable one (`web#17`), and a decimal number below 2^64; both or neither |
/// | `h:<name>` | a header; any number of them, in order; the name is UTF-8 |
/// | `payload` | the message; required |
///
/// A log also reads entries in any other format. The [payload
/// field](crate::LogOptions::payload_field) is the payload (empty if it is missing), the [key
/// field](crate::LogOptions::key_field) is the key, and all other fields are headers.
///
/// An entry in our format that breaks these rules, or any entry with a field name that is not
/// UTF-8, becomes a [`malformed`](essentially_once::Record::malformed) record. Its payload is the
/// RESP array of all its fields and values (`*2\r\n$16\r\nessentially-once\r\n$1\r\n2\r\n`).
///
/// The append time comes from the id, so an entry that was added with an id such as `5-0` dates
/// from 1970.
///
/// # Permissions
/// - Reading: `EVAL_RO`, `XINFO`, `XRANGE`, `XREVRANGE`, `XREAD`, `HMGET`, and `INFO`, without
///   which a reader cannot replace a lost connection.
/// - Opening for the first time: `EVAL`, `XGROUP`.
/// - Appending: `EVAL`, `XADD`, `XINFO`.
/// - Sending to it as an outbox: see [`RedisStore`](crate::RedisStore#permissions).
/// - Retention and [`remove_before`](Log::remove_before): also `XTRIM`, `XRANGE`, `XREVRANGE`,
///   `XLEN`, `TIME`, `HMGET`, `HSET`.
/// - Keys: the stream, and `<prefix>:retention:*`.
/// - [`durability`](Log::durability) uses `CONFIG GET`, and so does each new connection, to find
///   the largest value.
#[derive(Clone, Debug)]
pub struct RedisLog {
    stream: Arc<Stream>,
}

impl RedisLog {
    pub(crate) async fn open(server: Arc<Server>, name: &str, options: LogOptions) -> Result<Self, Error> {
        let stream = Stream::open(server, name, options).await?;
        Ok(Self {
            stream: Arc::new(stream),
        })
    }

    /// Removes the records that the log's retention no longer keeps, and returns their number.
    ///
    /// Dropping the future may leave some of them in place.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`]; [`Error::Indeterminate`] if some records may have
    /// been removed.
    pub async fn trim(&self) -> Result<u64, Error> {
        self.stream.trim().await
    }
}

#[async_trait]
impl Log for RedisLog {
    fn id(&self) -> &LogId {
        &self.stream.id
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.stream.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        Ok(Box::new(RedisReader::open(Arc::clone(&self.stream), from).await?))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        const VERB: &str = "read bounds of";
        let extent = self.stream.extent(VERB).await?;
        Ok(self.stream.require(extent, VERB)?.bounds())
    }

    async fn readable_end(&self) -> Result<Offset, Error> {
        self.stream.readable_end().await
    }

    /// Removes up to about 100,000 entries per step. Readers know exactly what was removed, as
    /// after our own [retention](RedisLog#removed-records).
    ///
    /// A log without an [incarnation](RedisLog#incarnation) removes nothing and returns
    /// [`Error::Failed`].
    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.stream.remove_before(offset).await
    }

    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        self.stream.tail(count).await.map(Some)
    }

    async fn durability(&self) -> Result<Durability, Error> {
        durability(&self.stream.link).await
    }
}
