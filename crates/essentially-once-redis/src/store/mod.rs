//! The store: positions, windows and state, in three hashes per consumer, and dead letters in a
//! fourth one with three indices. An outbox has a hash with its numbers.

mod commit;
pub(crate) mod keys;
mod layout;
mod letters;
mod native;
mod outbox;
mod tx;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, OffsetStore, ReadState,
    backend::{Durability, Journal, LogId, Note, Owner, Position, Pulse, Snapshot, Source, Window},
};
use redis::{Cmd, FromRedisValue, RedisResult, Value};

pub use self::tx::RedisTx;
use crate::{
    connection::{Link, Server, SharedConnection, durability},
    error::{partially_applied, printable, read_failed, write_failed},
    store::{
        keys::{Keys, consumer_of_position, position_pattern},
        native::Catalog,
    },
};

/// How many keys the server looks at in one step of a scan.
const SCAN_COUNT: u32 = 1_000;

/// Reads all of them at one moment. The server would refuse a `MULTI` while it is out of memory,
/// which must not make a position unreadable.
const READ: &str = include_str!("values.lua");
const BEAT: &str = concat!("#!lua flags=allow-oom\n", include_str!("beat.lua"));
const RELEASE: &str = concat!("#!lua flags=allow-oom\n", include_str!("release.lua"));

/// Positions and state in Redis; see [`Redis::store`](crate::Redis::store).
///
/// A consumer has three hashes in one cluster slot: `<prefix>:{<consumer>}:position`, `:windows`
/// (by producer) and `:state` (the [`KeyValue`](essentially_once::KeyValue) state). Clones share
/// one connection per consumer.
///
/// # Dead letters
/// A consumer that has [dead letters](essentially_once::consumer::dead_letters) has four more keys
/// in the same slot. A field or member names an offset by two numbers of 20 digits each, so that
/// the order of the texts is that of the offsets: `00000001700000000000-00000000000000000003`.
///
/// | key | type | contents |
/// |---|---|---|
/// | `:letters` | hash | the letters by offset |
/// | `:letters-by-offset` | sorted set | `<offset>`, or `<offset> <key>`, with score 0 |
/// | `:letters-by-key` | sorted set | `<key>`, a zero byte, `<offset>`, with score 0; a zero byte in the key is followed by a byte 255 |
/// | `:letters-due` | sorted set | `<offset>` of letters that are tried again, with the time as score |
///
/// The indices leave the key of a malformed record out, because it cannot be trusted.
///
/// A letter is a [MessagePack](https://msgpack.org) array of strings, which the server can unpack:
///
/// ```text
/// redis-cli ZRANGE essentially-once:{billing}:letters-by-offset 0 -1
/// redis-cli EVAL "return cmsgpack.unpack(redis.call('HGET', KEYS[1], ARGV[1]))" 1 \
///     essentially-once:{billing}:letters 00000001700000000000-00000000000000000003
/// ```
///
/// The array alternates names and values, like an entry of a [log](crate::RedisLog#wire-format).
/// Times are in milliseconds since 1970. Numbers are decimal.
///
/// | name | value |
/// |---|---|
/// | `essentially-once` | `1`, the version of this format; always the first name |
/// | `tries` | how often the record was tried |
/// | `first_reason`, `last_reason` | why the first and the last try failed |
/// | `parked_at`, `last_failed_at` | when the record was set aside, and when it failed last |
/// | `due` | when it is tried again; missing if it waits for an operator or another letter |
/// | `version` | rises with every change of the letter |
/// | `appended_at` | when the record was appended |
/// | `malformed` | why the record cannot be decoded; missing if it can |
/// | `key` | the record's key; missing if it has none |
/// | `producer`, `sequence` | the record's origin; missing if it has none |
/// | `edit` | the record before an operator changed it, and who did; missing if nobody did |
/// | `h:<name>` | a header; any number of them, in order |
/// | `payload` | the message |
///
/// A letter may be larger than the [record limit](crate::RedisOptions::record_limit) by two reasons
/// of [`REASON_LIMIT`](essentially_once::backend::DeadLetter::REASON_LIMIT) bytes. Its edit counts
/// like the rest of it. Do not remove a field of `:letters` by hand, because the indices would
/// still name it. A consumer that comes upon such an entry stops with [`Error::Failed`]. Discard
/// letters with [`dead_letters::discard`](essentially_once::consumer::dead_letters::discard).
///
/// # Permissions
/// A user with restricted permissions needs:
///
/// - these keys, and `+evalsha +eval +hget +hgetall +hmget +hset +hdel`;
/// - `+hlen +zcard`, with which each session of a consumer looks for dead letters; if it has any,
///   also `+zadd +zrem +zrange +zlexcount`;
/// - `+scan` to [list](OffsetStore::consumers) the consumers. It shows the names of all keys;
/// - `+config|get` to find out whether the server is durable, and how large a value may be;
/// - to [send](RedisTx#sending) records, also `+xadd +xinfo|stream`, the stream of each outbox, and
///   its hash `<prefix>:{<tag>}:outbox:<stream>`;
/// - with [`min_replicas`](crate::RedisOptions::min_replicas), `+wait` and `+info`;
/// - for [native commands](RedisTx::command), these commands and their keys, `+command|info
///   +command|getkeys`, and, for the checks before a commit, `+mget +hlen +llen +scard +zcard
///   +strlen +xlen`.
#[derive(Clone, Debug)]
pub struct RedisStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    server: Arc<Server>,
    /// For requests that concern no consumer.
    link: Link,
    consumers: Mutex<HashMap<ConsumerId, Consumer>>,
    catalog: Arc<Catalog>,
}

/// Each consumer has its own connection, so that its waiting for replicas does not delay others.
#[derive(Clone, Debug)]
struct Consumer {
    link: Arc<Link>,
    keys: Arc<Keys>,
}

impl RedisStore {
    pub(crate) fn new(server: Arc<Server>) -> Self {
        Self {
            shared: Arc::new(Shared {
                link: Link::new(Arc::clone(&server), server.options.prefix.as_bytes()),
                server,
                consumers: Mutex::default(),
                catalog: Arc::default(),
            }),
        }
    }

    /// Unblocks a consumer whose transaction was partially applied ([`Error::PartiallyApplied`]).
    ///
    /// Repair the data first by undoing the commands that were applied. The position did not move,
    /// so the consumer handles the records of that transaction again. If you completed the
    /// transaction by hand instead, `seek` the consumer past these records.
    ///
    /// Dropping the future leaves the outcome unknown, as [`Error::Indeterminate`] does. Calling it
    /// again does no harm.
    ///
    /// # Errors
    /// [`Error::Failed`] if no transaction of the consumer is partially applied;
    /// [`Error::Unavailable`], [`Error::Indeterminate`].
    pub async fn resolve_partial(&self, consumer: &ConsumerId) -> Result<(), Error> {
        let action = || {
            self.shared
                .server
                .on(format!("resolve the transaction of consumer {consumer}"))
        };
        let Consumer { link, keys } = self.consumer(consumer);
        let mut connection = link.connection().await?;
        let mut command = redis::cmd("HDEL");
        command.arg(&keys.position).arg("partial");
        let removed: RedisResult<u32> = command.query_async(&mut connection).await;
        match removed {
            Ok(0) => Err(Error::failed(action(), "no transaction is partially applied")),
            Ok(_) => Ok(()),
            Err(error) => {
                link.check(&error);
                Err(write_failed(action(), error))
            }
        }
    }

    /// The position and some values, all as of one commit.
    async fn read(&self, consumer: &ConsumerId, state: &[&[u8]]) -> Result<Snapshot, Error> {
        let Consumer { link, keys } = self.consumer(consumer);
        let action = || {
            let Keys { position, windows, .. } = &*keys;
            let what = match state {
                [] => format!("read position of consumer {consumer} (HGETALL of keys {position} and {windows})"),
                _ => format!(
                    "read state of consumer {consumer} (HGETALL of keys {position} and {windows}, HMGET of key {})",
                    keys.state
                ),
            };
            link.server.on(what)
        };
        let mut ask = redis::cmd("EVAL");
        ask.arg(READ)
            .arg(3)
            .arg(&keys.position)
            .arg(&keys.windows)
            .arg(&keys.state);
        ask.arg(state);
        type Answer = (Hash, Hash, Vec<Option<Vec<u8>>>);
        let answer: RedisResult<Answer> = ask_link(&link, &ask).await?;
        let (position, windows, values) = answer.map_err(|error| read_failed(action(), error))?;
        if let Some(done) = position.get(&b"partial"[..]) {
            return Err(partially_applied(consumer, printable(done)));
        }
        let position = match position.is_empty() {
            true => None,
            false => Some(decode(&position, &windows).map_err(|error| Error::failed(action(), error))?),
        };
        let values = values.into_iter().map(|value| value.map(Bytes::from)).collect();
        Ok(Snapshot::new(position, values))
    }

    /// Runs a script that only acts if the position belongs to this owner.
    async fn as_owner(&self, consumer: &ConsumerId, owner: Owner, script: &str, verb: &str) -> Result<(), Error> {
        let Consumer { link, keys } = self.consumer(consumer);
        let mut command = redis::cmd("EVAL");
        command.arg(script).arg(1).arg(&keys.position).arg(owner.to_string());
        let done: RedisResult<Value> = ask_link(&link, &command).await?;
        let done = done.and_then(Value::extract_error);
        done.map(drop).map_err(|error| {
            let action = format!("{verb} as owner {owner} of consumer {consumer}");
            write_failed(link.server.on(action), error)
        })
    }

    /// Adds the consumers whose positions this server holds. A cursor means nothing to another
    /// server, so it needs the same connection throughout.
    async fn scan(&self, connection: &mut SharedConnection, consumers: &mut BTreeSet<ConsumerId>) -> Result<(), Error> {
        let server = &self.shared.server;
        let action = || server.on("list the consumers (SCAN)");
        let prefix = &server.options.prefix;
        let pattern = position_pattern(prefix);
        let mut cursor = "0".to_owned();
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(&cursor)
                .arg("MATCH")
                .arg(&pattern)
                .arg("COUNT")
                .arg(SCAN_COUNT);
            let answer: RedisResult<(String, Vec<Vec<u8>>)> = scan.query_async(connection).await;
            let (next, keys) = answer.map_err(|error| read_failed(action(), error))?;
            for consumer in keys.iter().filter_map(|key| consumer_of_position(prefix, key)) {
                consumers.insert(consumer.map_err(|error| Error::failed(action(), error))?);
            }
            if next == "0" {
                return Ok(());
            }
            cursor = next;
        }
    }

    fn consumer(&self, consumer: &ConsumerId) -> Consumer {
        // A panic elsewhere leaves the map whole.
        let mut consumers = self.shared.consumers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = consumers.get(consumer) {
            return known.clone();
        }
        let server = &self.shared.server;
        let keys = Keys::new(&server.options.prefix, consumer);
        let new = Consumer {
            link: Arc::new(Link::new(Arc::clone(server), keys.position.as_bytes())),
            keys: Arc::new(keys),
        };
        // Forget consumers that have neither a connection nor a transaction.
        consumers.retain(|_, known| known.link.is_connected() || Arc::strong_count(&known.link) > 1);
        consumers.insert(consumer.clone(), new.clone());
        new
    }
}

#[async_trait]
impl OffsetStore for RedisStore {
    type Tx = RedisTx;

    /// Fails with [`Error::PartiallyApplied`] while a transaction of the consumer is partially
    /// applied.
    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        Ok(self.read(consumer, &[]).await?.position)
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<RedisTx, Error> {
        let Consumer { link, keys } = self.consumer(consumer);
        Ok(RedisTx::new(
            consumer.clone(),
            link,
            keys,
            Arc::clone(&self.shared.catalog),
        ))
    }

    async fn durability(&self) -> Result<Durability, Error> {
        durability(&self.shared.link).await
    }

    /// Runs `SCAN` over all keys of the server, so it takes time where the server holds many
    /// others.
    ///
    /// On a cluster it scans the master of each slot, twice, since a key of a slot that moves
    /// meanwhile can be on neither node at the moment of its scan. It leaves a consumer out only if
    /// the slot of the consumer moves more than once during the call.
    ///
    /// A consumer whose first transaction was [partially applied](Error::PartiallyApplied) is
    /// listed too.
    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        let server = &self.shared.server;
        let mut consumers = BTreeSet::new();
        let passes = if server.is_cluster() { 2 } else { 1 };
        for _ in 0..passes {
            for mut connection in server.open_masters().await? {
                self.scan(&mut connection.inner, &mut consumers).await?;
            }
        }
        Ok(Some(consumers.into_iter().collect()))
    }

    /// Runs one `HMGET`. Fails with [`Error::PartiallyApplied`] like
    /// [`position`](OffsetStore::position).
    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        let Consumer { link, keys } = self.consumer(consumer);
        let action = || {
            link.server.on(format!(
                "read pulse of consumer {consumer} (HMGET of key {})",
                keys.position
            ))
        };
        let mut ask = redis::cmd("HMGET");
        ask.arg(&keys.position);
        ask.arg(&["partial", "next", "revision", "owner", "beats"]);
        let fields = ask_link(&link, &ask).await?;
        let [partial, next, revision, owner, beats]: [Option<Vec<u8>>; 5] =
            fields.map_err(|error| read_failed(action(), error))?;
        if let Some(done) = partial {
            return Err(partially_applied(consumer, printable(&done)));
        }
        let (Some(next), Some(revision)) = (next, revision) else {
            return Ok(Pulse::default());
        };
        let parsed = decode_pulse(&next, &revision, owner.as_deref(), beats.as_deref());
        parsed.map_err(|error| Error::failed(action(), error))
    }

    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        self.as_owner(consumer, owner, BEAT, "count a beat").await
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        self.as_owner(consumer, owner, RELEASE, "give up the position").await
    }
}

/// One script reads position and values, so they belong to one commit.
#[async_trait]
impl ReadState for RedisStore {
    /// Fails with [`Error::PartiallyApplied`] while a transaction of the consumer is partially
    /// applied.
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        self.read(consumer, keys).await
    }
}

/// Sends a command. The inner error is the command's.
async fn ask_link<T: FromRedisValue>(link: &Link, command: &Cmd) -> Result<RedisResult<T>, Error> {
    let mut connection = link.connection().await?;
    let answer = command.query_async(&mut connection).await;
    if let Err(error) = &answer {
        link.check(error);
    }
    Ok(answer)
}

fn decode_pulse(next: &[u8], revision: &[u8], owner: Option<&[u8]>, beats: Option<&[u8]>) -> Result<Pulse, Source> {
    let mut pulse = Pulse::default();
    pulse.next = str::from_utf8(next)?.parse()?;
    pulse.revision = str::from_utf8(revision)?.parse()?;
    let owner = owner
        .filter(|owner| !owner.is_empty())
        .map(str::from_utf8)
        .transpose()?;
    pulse.owner = owner.map(str::parse).transpose()?;
    pulse.beats = beats.map_or(Ok(0), |beats| str::from_utf8(beats)?.parse().map_err(Source::from))?;
    Ok(pulse)
}

/// Ordered, so that equal positions compare as equal.
type Hash = BTreeMap<Vec<u8>, Vec<u8>>;

fn decode(position: &Hash, windows: &Hash) -> Result<Position, Source> {
    let field = |name: &str| {
        position
            .get(name.as_bytes())
            .map(|value| std::str::from_utf8(value))
            .transpose()
    };
    let needed = |name: &str| field(name)?.ok_or_else(|| Source::from(format!("field {name:?} is missing")));
    let log = LogId::from_parts(needed("log")?, field("incarnation")?)?;
    let mut decoded = Position::new(log, needed("next")?.parse()?, needed("revision")?.parse()?);
    let owner = field("owner")?.filter(|owner| !owner.is_empty());
    decoded.owner = owner.map(str::parse).transpose()?;
    decoded.note = Note::decode(position.get(&b"passed"[..]).map_or(&[], |note| &note[..]));
    let journal = position.get(&b"journal"[..]).cloned();
    decoded.journal = Journal::decode(journal.unwrap_or_default())?;
    for (numbering, window) in windows {
        let numbering = std::str::from_utf8(numbering)?.parse()?;
        decoded.windows.push((numbering, Window::decode(window)?));
    }
    Ok(decoded)
}
