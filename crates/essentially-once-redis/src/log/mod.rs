//! The log: a Redis stream.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use essentially_once::{
    Error, Log, NewRecord, Offset,
    backend::{Bounds, Durability, LogId, LogReader, Retention},
};
use redis::{Cmd, Pipeline, RedisError, Value};

use crate::{
    codec::{arguments, encode, parse_id},
    durability::durability,
    error::{read_failed, write_failed},
    names::RetentionKeys,
    native::printable,
    reader::RedisReader,
    retention::trim_arguments,
    server::{Link, Server},
    snapshot::{self, Snapshot},
};

const OPEN: &str = concat!(include_str!("incarnation.lua"), include_str!("open.lua"));
const APPEND: &str = concat!(include_str!("incarnation.lua"), include_str!("append.lua"));
/// It frees memory and records what it removed, so it must also run while memory is full.
const TRIM: &str = concat!(
    "#!lua flags=allow-oom\n",
    include_str!("incarnation.lua"),
    include_str!("trim.lua")
);

/// A chunk of records is appended in one step, and the server does nothing else meanwhile. Hence
/// these limits on its records and bytes.
const CHUNK_RECORDS: usize = 1_000;
const CHUNK_BYTES: usize = 1024 * 1024;

/// The overhead of a field or value, in bytes.
const ARGUMENT_BYTES: usize = 32;

/// Lua passes at most 8,000 arguments to a command.
const MAX_HEADERS: usize = 3_000;

/// Appends trim at most once in this time.
const TRIM_EVERY: Duration = Duration::from_secs(1);

/// How to open a log, and what it keeps; see [`Redis::log_with`](crate::Redis::log_with).
///
/// ```
/// # use essentially_once_redis::{LogOptions, Retention};
/// let options = LogOptions::new()
///     .stream("{shop}:orders")
///     .payload_field("json")
///     .retention(Retention::new().max_records(1_000_000));
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogOptions {
    stream: Option<Vec<u8>>,
    pub(crate) payload_field: String,
    pub(crate) key_field: String,
    retention: Retention,
    existing: bool,
}

impl LogOptions {
    /// The defaults: a missing stream is created, the log's name is the stream's key, entries of
    /// other programs have the fields `payload` and `key`, and everything is kept.
    pub fn new() -> Self {
        Self {
            stream: None,
            payload_field: "payload".into(),
            key_field: "key".into(),
            retention: Retention::default(),
            existing: false,
        }
    }

    /// Fails if the stream does not exist, instead of creating it. Useful for services that only
    /// read, which would otherwise wait forever at a misspelled name.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// The key of the stream, if it differs from the log's name. Braces in it must form a hash tag,
    /// as a cluster uses them.
    #[must_use]
    pub fn stream(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.stream = Some(key.into());
        self
    }

    /// The field that holds the payload in entries of other programs.
    #[must_use]
    pub fn payload_field(mut self, name: impl Into<String>) -> Self {
        self.payload_field = name.into();
        self
    }

    /// The field that holds the key in entries of other programs.
    #[must_use]
    pub fn key_field(mut self, name: impl Into<String>) -> Self {
        self.key_field = name.into();
        self
    }

    /// Which records the log keeps. This applies to the handle and is not stored: its appends
    /// remove expired records, at most once a second and after the append has returned.
    /// [`RedisLog::trim`] removes them at once. Redis cannot keep a limit in bytes, and opening the
    /// log with one fails with [`Error::InvalidSetting`].
    #[must_use]
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = retention;
        self
    }
}

impl Default for LogOptions {
    fn default() -> Self {
        Self::new()
    }
}

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
/// # Removed records
/// A stream reports how many entries were removed, but not which. After our own [`Retention`], a
/// reader knows exactly. After `XTRIM`, `XADD … MAXLEN` or `XDEL` by another program,
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
/// 32.38`. The fields are, in this order:
///
/// | field | value |
/// |---|---|
/// | `essentially-once` | `1`, the version of this format; must be the first field |
/// | `key` | the record's key; optional |
/// | `producer`, `sequence` | the record's [`Origin`](essentially_once::Origin): a name, followed by `#` and the epoch unless that is the stable one (`web#17`), and a decimal number below 2^64; both or neither |
/// | `h:<name>` | a header; any number of them, in order; the name is UTF-8 |
/// | `payload` | the message; required |
///
/// A log also reads entries in any other format. The [payload field](LogOptions::payload_field) is
/// the payload (empty if it is missing), the [key field](LogOptions::key_field) is the key, and all
/// other fields are headers.
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
/// - Retention: also `XTRIM`, `XRANGE`, `XREVRANGE`, `XLEN`, `TIME`, `HMGET`, `HSET`.
/// - Keys: the stream, and `<prefix>:retention:*`.
/// - [`durability`](Log::durability) uses `CONFIG GET`, and so does each new connection, to find
///   the largest value.
#[derive(Clone)]
pub struct RedisLog {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) link: Link,
    pub(crate) id: LogId,
    pub(crate) options: LogOptions,
    pub(crate) stream: Vec<u8>,
    pub(crate) kept: RetentionKeys,
    trimmed: Mutex<Option<Instant>>,
    /// Whether an append may create the stream. A deleted log must not come back as an empty one.
    may_create: AtomicBool,
}

impl RedisLog {
    pub(crate) async fn open(server: Arc<Server>, name: &str, options: LogOptions) -> Result<Self, Error> {
        let id = LogId::new(name)?;
        options.retention.check()?;
        options.retention.refuse_bytes("Redis")?;
        let stream = options.stream.clone().unwrap_or_else(|| name.into());
        let kept = RetentionKeys::new(&server.options.prefix, &stream)?;
        let mut inner = Inner {
            link: Link::new(server, stream.clone()),
            id,
            options,
            stream,
            kept,
            trimmed: Mutex::new(None),
            may_create: AtomicBool::new(false),
        };
        if let Some(incarnation) = inner.incarnation().await? {
            inner.id = inner.id.with_incarnation(incarnation)?;
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Removes the records that the log's retention no longer keeps, and returns their number.
    ///
    /// Dropping the future may leave some of them in place.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`]; [`Error::Indeterminate`] if some records may have
    /// been removed.
    pub async fn trim(&self) -> Result<u64, Error> {
        self.inner.trim().await
    }
}

impl Inner {
    /// The stream's incarnation, created if it is missing; `None` if this user may not create it.
    async fn incarnation(&self) -> Result<Option<String>, Error> {
        let snapshot = self.snapshot("open").await?;
        match &snapshot {
            Some(snapshot) if snapshot.incarnation().is_some() => return Ok(snapshot.incarnation().map(Into::into)),
            None if self.options.existing => return Err(self.missing()),
            _ => {}
        }
        let mut open = redis::cmd("EVAL");
        open.arg(OPEN)
            .arg(1)
            .arg(&self.stream)
            .arg(format!("{:016x}", fastrand::u64(..)))
            .arg(u8::from(!self.options.existing));
        match self.ask(&open).await? {
            Ok(Value::BulkString(found)) => Ok(Some(String::from_utf8_lossy(&found).into_owned())),
            Ok(_) => Err(self.not_understood("open")),
            // The stream was deleted in the meantime.
            Err(error) if error.to_string().contains("no such key") => Err(self.missing()),
            // Scripts report `ERR` for a command that the user may not run.
            Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => {
                tracing::warn!(log = %self.id, %error, "the stream gets no incarnation, so consumers may not notice that it was \
                    deleted and created again; grant the user XGROUP CREATE, or open the log once as a user with that permission");
                self.may_create.store(snapshot.is_none(), Ordering::Relaxed);
                Ok(None)
            }
            Err(error) => Err(write_failed(self.on("open"), error)),
        }
    }

    /// The stream's state now; `None` if the stream does not exist.
    async fn snapshot(&self, verb: &str) -> Result<Option<Snapshot>, Error> {
        match self.ask(&snapshot::ask(&self.stream, &self.kept)).await? {
            Ok(answer) => Snapshot::parse(&answer).map_err(|()| self.not_understood(verb)),
            Err(error) => Err(read_failed(self.on(verb), error)),
        }
    }

    async fn readable_end(&self) -> Result<Offset, Error> {
        const VERB: &str = "read the end of";
        let answer = self.ask(&snapshot::ask_end(&self.stream, &self.kept)).await?;
        let answer = answer.map_err(|error| read_failed(self.on(VERB), error))?;
        let parts = match answer {
            Value::Array(parts) => <[Value; 2]>::try_from(parts).ok(),
            _ => None,
        };
        let Some([state, last]) = parts else {
            return Err(self.not_understood(VERB));
        };
        let last = match last {
            Value::BulkString(id) => Some(parse_id(&id).ok_or_else(|| self.not_understood(VERB))?),
            _ => None,
        };
        let snapshot = Snapshot::parse(&state).map_err(|()| self.not_understood(VERB))?;
        Ok(self.require(snapshot, VERB)?.readable_end(last))
    }

    /// Sends a command over the shared connection. The inner error is the command's.
    async fn ask(&self, command: &Cmd) -> Result<Result<Value, RedisError>, Error> {
        let mut connection = self.link.connection().await?;
        let answer = connection
            .send_packed_command(command)
            .await
            .and_then(Value::extract_error);
        if let Err(error) = &answer {
            self.link.check(error);
        }
        Ok(answer)
    }

    /// Fails unless the snapshot is of the stream that was opened.
    fn require(&self, snapshot: Option<Snapshot>, verb: &str) -> Result<Snapshot, Error> {
        match (self.id.incarnation(), snapshot) {
            (Some(ours), Some(snapshot)) if snapshot.incarnation() == Some(ours) => Ok(snapshot),
            (Some(_), _) => Err(self.gone(verb)),
            (None, snapshot) => Ok(snapshot.unwrap_or_default()),
        }
    }

    /// Appends all records or none.
    async fn append(&self, records: &[NewRecord]) -> Result<Offset, Error> {
        let action = || self.on("append to");
        let mut pipeline = Pipeline::with_capacity(2);
        pipeline.add_command(self.append_command(records));
        let min_replicas = self.link.server.options.min_replicas;
        if let Some(min) = min_replicas {
            // WAIT takes 0 as "forever".
            let millis = u64::try_from(min.timeout.as_millis())
                .unwrap_or(u64::MAX)
                .clamp(1, i64::MAX as u64);
            pipeline.cmd("WAIT").arg(min.replicas).arg(millis);
        }
        let mut connection = self.link.connection().await?;
        let replies = connection.send_packed_commands(&pipeline, 0, pipeline.len()).await;
        let mut replies = match replies {
            Ok(replies) => replies.into_iter(),
            Err(error) => {
                self.link.check(&error);
                return Err(write_failed(action(), error));
            }
        };
        let largest = || records.iter().map(largest_value).max().unwrap_or(0);
        let last = match replies.next() {
            Some(Value::BulkString(id)) => {
                self.may_create.store(false, Ordering::Relaxed);
                parse_id(&id)
            }
            Some(Value::Nil) => return Err(self.gone("append to")),
            Some(Value::ServerError(error)) => {
                let error = RedisError::from(error);
                self.link.check(&error);
                self.link.learn(&error, largest());
                return Err(match error.code() {
                    Some("PARTIAL") => Error::indeterminate(action(), error),
                    _ => write_failed(action(), error),
                });
            }
            _ => None,
        };
        let last = last.ok_or_else(|| Error::indeterminate(action(), NOT_UNDERSTOOD))?;
        match (min_replicas, replies.next()) {
            (None, _) => Ok(last),
            (Some(min), Some(Value::Int(have))) if have >= min.replicas.into() => Ok(last),
            (Some(min), Some(Value::Int(have))) => Err(Error::indeterminate(
                action(),
                format!(
                    "the master has the records, but only {have} of {} replicas confirmed them within {:?}; a failover may lose them",
                    min.replicas, min.timeout
                ),
            )),
            (Some(_), Some(Value::ServerError(error))) => Err(Error::indeterminate(
                action(),
                format!("the master has the records, but it did not report how many replicas have them: {error}"),
            )),
            (Some(_), _) => Err(Error::indeterminate(action(), NOT_UNDERSTOOD)),
        }
    }

    fn append_command(&self, records: &[NewRecord]) -> Cmd {
        let count = records.iter().map(|record| arguments(record) + 1).sum::<usize>();
        let mut append = Cmd::with_capacity(count + 5, APPEND.len() + records.iter().map(weight).sum::<usize>());
        append.arg("EVAL").arg(APPEND).arg(1).arg(&self.stream);
        append.arg(self.id.incarnation().unwrap_or_default());
        append.arg(u8::from(self.may_create.load(Ordering::Relaxed)));
        for record in records {
            append.arg(arguments(record));
            encode(record, |argument| {
                append.arg(argument);
            });
        }
        append
    }

    async fn trim(&self) -> Result<u64, Error> {
        const VERB: &str = "trim";
        if self.options.retention == Retention::default() {
            return Ok(0);
        }
        let Some(incarnation) = self.id.incarnation() else {
            let why = "the log has no incarnation: grant the user XGROUP CREATE, and open it again";
            return Err(Error::failed(self.on(VERB), why));
        };
        let mut total = 0;
        loop {
            let mut trim = redis::cmd("EVAL");
            trim.arg(TRIM).arg(2).arg(&self.stream).arg(&self.kept.now);
            trim.arg(incarnation);
            trim.arg(&trim_arguments(&self.options.retention));
            let answer = self
                .ask(&trim)
                .await?
                .map_err(|error| write_failed(self.on(VERB), error))?;
            match answer {
                Value::Nil => return Err(self.gone(VERB)),
                Value::Array(parts) => match parts[..] {
                    [Value::Int(removed), Value::Int(more)] => {
                        total += u64::try_from(removed).unwrap_or(0);
                        if more == 0 {
                            return Ok(total);
                        }
                    }
                    _ => return Err(self.not_understood(VERB)),
                },
                _ => return Err(self.not_understood(VERB)),
            }
        }
    }

    /// Trims in the background, if it is time to.
    fn trim_aside(self: &Arc<Self>) {
        if self.options.retention == Retention::default() || self.id.incarnation().is_none() {
            return;
        }
        {
            let mut trimmed = self.trimmed.lock().unwrap_or_else(PoisonError::into_inner);
            if trimmed.is_some_and(|trimmed| trimmed.elapsed() < TRIM_EVERY) {
                return;
            }
            *trimmed = Some(Instant::now());
        }
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = inner.trim().await {
                tracing::warn!(log = %inner.id, %error, "could not remove expired records; the next append tries again");
            }
        });
    }

    fn missing(&self) -> Error {
        let stream = printable(&self.stream);
        let why =
            format!("stream {stream:?} does not exist; check the name, or remove `LogOptions::existing` to create it");
        Error::failed(self.on("open"), why)
    }

    fn gone(&self, verb: &str) -> Error {
        let why = "the stream was deleted or created again after the log was opened; open it again";
        Error::failed(self.on(verb), why)
    }

    pub(crate) fn not_understood(&self, verb: &str) -> Error {
        Error::failed(self.on(verb), NOT_UNDERSTOOD)
    }

    pub(crate) fn on(&self, verb: &str) -> String {
        self.link.server.on(format!("{verb} log {}", self.id))
    }
}

const NOT_UNDERSTOOD: &str = "the server sent an unexpected reply; it must be Redis 7.0 or later, or Valkey";

/// The size that a record adds to a chunk.
fn weight(record: &NewRecord) -> usize {
    record.size() + ARGUMENT_BYTES * arguments(record)
}

/// The size of the largest value in the entry of a record.
fn largest_value(record: &NewRecord) -> usize {
    let headers = record.headers.iter();
    // The field of a header is its name with a prefix of two bytes.
    let headers = headers.flat_map(|(name, value)| [name.len() + 2, value.len()]);
    let key = record.key.as_ref().map_or(0, |key| key.len());
    headers.fold(key.max(record.payload.len()), usize::max)
}

/// The number of records in the next chunk, at least one.
fn chunk(records: &[NewRecord]) -> usize {
    let mut bytes = 0;
    let fits = |record: &&NewRecord| {
        bytes += weight(record);
        bytes <= CHUNK_BYTES
    };
    records.iter().take(CHUNK_RECORDS).take_while(fits).count().max(1)
}

#[async_trait]
impl Log for RedisLog {
    fn id(&self) -> &LogId {
        &self.inner.id
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let inner = &self.inner;
        // Connecting finds out how large a value may be, which the checks below need.
        inner.link.connection().await?;
        for record in records {
            record.check_size(inner.link.server.options.record_limit)?;
            inner.link.check_value(largest_value(record))?;
            if record.headers.len() > MAX_HEADERS {
                let why = format!(
                    "a record has {} headers, and at most {MAX_HEADERS} are possible",
                    record.headers.len()
                );
                return Err(Error::failed(inner.on("append to"), why));
            }
        }
        let (mut last, mut appended) = (None, 0);
        while appended < records.len() {
            let rest = &records[appended..];
            let count = chunk(rest);
            let done = inner.append(&rest[..count]).await;
            // After a refusal too: trimming makes room for the next append.
            inner.trim_aside();
            match done {
                Ok(offset) => last = Some(offset),
                Err(error) if appended == 0 => return Err(error),
                Err(error) => {
                    let why = format!(
                        "the first {appended} of {} records were appended, then: {error}",
                        records.len()
                    );
                    return Err(Error::indeterminate(inner.on("append to"), why));
                }
            }
            appended += count;
        }
        Ok(last)
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        Ok(Box::new(RedisReader::open(Arc::clone(&self.inner), from).await?))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        const VERB: &str = "read bounds of";
        let snapshot = self.inner.snapshot(VERB).await?;
        Ok(self.inner.require(snapshot, VERB)?.bounds())
    }

    async fn readable_end(&self) -> Result<Offset, Error> {
        self.inner.readable_end().await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        durability(&self.inner.link).await
    }
}

impl fmt::Debug for RedisLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLog")
            .field("id", &self.inner.id)
            .field("server", &self.inner.link.server.to_string())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_bounded_by_records_and_bytes() {
        let small = vec![NewRecord::new("x"); 2_500];
        assert_eq!(chunk(&small), CHUNK_RECORDS);
        assert_eq!(chunk(&small[..7]), 7);
        let large = vec![NewRecord::new(vec![0; CHUNK_BYTES / 3]); 9];
        assert_eq!(chunk(&large), 2);
        let huge = vec![NewRecord::new(vec![0; 2 * CHUNK_BYTES]); 2];
        assert_eq!(chunk(&huge), 1);
    }
}
