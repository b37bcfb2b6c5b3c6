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
/// It frees memory, so it also runs where memory is full, and writes down what it removed.
const TRIM: &str = concat!(
    "#!lua flags=allow-oom\n",
    include_str!("incarnation.lua"),
    include_str!("trim.lua")
);

/// A chunk of records is appended in one step, during which the server does nothing else: so many records, and about so many bytes.
const CHUNK_RECORDS: usize = 1_000;
const CHUNK_BYTES: usize = 1024 * 1024;

/// What a field or value costs beside its bytes.
const ARGUMENT_BYTES: usize = 32;

/// Lua hands 8,000 arguments to a command at most.
const MAX_HEADERS: usize = 3_000;

/// How often appends trim, at most.
const TRIM_EVERY: Duration = Duration::from_secs(1);

/// What a log is made of, and what it keeps; see [`Redis::log_with`](crate::Redis::log_with).
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
    /// The defaults: a stream is created if there is none, the log's name is the stream's key, the
    /// fields of other people's entries are `payload` and `key`, and everything is kept.
    pub fn new() -> Self {
        Self {
            stream: None,
            payload_field: "payload".into(),
            key_field: "key".into(),
            retention: Retention::default(),
            existing: false,
        }
    }

    /// Refuses a log whose stream does not exist, instead of creating it: for services that only
    /// read, and would wait at a mistyped name.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// The key of the stream, if it is not the log's name. Braces in it must be those of a cluster's hash tag.
    #[must_use]
    pub fn stream(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.stream = Some(key.into());
        self
    }

    /// Which field of other people's entries is the payload.
    #[must_use]
    pub fn payload_field(mut self, name: impl Into<String>) -> Self {
        self.payload_field = name.into();
        self
    }

    /// Which field of other people's entries is the key.
    #[must_use]
    pub fn key_field(mut self, name: impl Into<String>) -> Self {
        self.key_field = name.into();
        self
    }

    /// What the log keeps. It is a matter of this handle: its appends remove what is no longer kept, at most once a second and
    /// after the append was answered; [`RedisLog::trim`] does it at once.
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

/// A log in a Redis stream; see [`Redis::log`](crate::Redis::log). An offset is a stream id: `1700000000000-3`.
///
/// The stream is an ordinary one: other programs may add to it, read it and have consumer groups of their own.
///
/// # Which stream it is
/// A stream that is deleted and made again gives old ids a new meaning. Each has therefore an incarnation: opening a log creates the stream
/// if there is none, and in it a consumer group without consumers named `essentially-once:<incarnation>`, which goes where the stream goes.
/// Deleting that group by hand is like deleting the stream. A user without the right to create it gets a log without incarnation, and a
/// warning: then only a log that became shorter is noticed.
///
/// A fail-over keeps the incarnation and may lose the stream's tail. A reader behind the new end is told ([`Error::OutOfRange`]). If the stream
/// has grown past the reader's place again before it reads on, nothing shows that other records were there: records that were handled
/// are gone from the log, and on a master with a slower clock new ones may get ids before the reader's place and never be read. Wait for
/// replicas ([`RedisOptions::min_replicas`](crate::RedisOptions::min_replicas)), or keep the state on the same server, where it goes back too.
///
/// # Appending
/// Up to 1,000 records and about a megabyte are appended in one step, all or none, before the next are sent. After
/// [`Error::Indeterminate`] any number of these steps may have been made. A record may have 3,000 headers.
///
/// A value over the server's `proto-max-bulk-len` is [`Error::TooLarge`] before anything is sent, if the user may ask for that
/// (`+config|get`). Otherwise the first such append fails in the middle and closes the connection under other calls, and the handle
/// refuses values of that size from then on.
///
/// # What was removed
/// A stream says how many entries were removed, not which. After our own [`Retention`] it is known exactly. After `XTRIM`,
/// `XADD … MAXLEN` or `XDEL` by someone else, [`Error::Truncated`] may be a false alarm, if the last record that a stopped consumer has
/// read is the very last that was removed; never the other way. A reader that was online counts along, and is exact. Entries deleted from the
/// middle of a stream (`XDEL`) are passed over in silence.
///
/// Redis older than 7.0 did not count: what was removed before its data was loaded by a newer one goes unnoticed.
///
/// # Wire format
/// An entry of ours is what any client can write with `XADD orders * essentially-once 1 payload 32.38`. Fields, the first one first:
///
/// | field | value |
/// |---|---|
/// | `essentially-once` | `1`, the version of this format; must be the first field |
/// | `key` | what the record is about; optional |
/// | `producer`, `sequence` | the record's [`Origin`](essentially_once::Origin): a name, with `#` and the epoch behind it unless that is the stable one (`web#17`), and a decimal number below 2^64; both or neither |
/// | `h:<name>` | a header; any number, in this order; the name is UTF-8 |
/// | `payload` | the message; required |
///
/// Other entries are read too: the [payload field](LogOptions::payload_field) is the payload (empty if there is none), the
/// [key field](LogOptions::key_field) is the key, and all other fields are headers.
///
/// An entry of ours that breaks these rules, or any entry with a field name that is not UTF-8, is yielded as
/// [`malformed`](essentially_once::Record::malformed); its payload then is the RESP array of all its fields and values
/// (`*2\r\n$16\r\nessentially-once\r\n$1\r\n2\r\n`).
///
/// The append time is taken from the id, so an entry that was added with an id such as `5-0` is of 1970.
///
/// # Rights
/// Reading: `EVAL_RO`, `XINFO`, `XRANGE`, `XREVRANGE`, `XREAD`, `HMGET`, and `INFO`, without which
/// a reader does not outlive its connection; opening for the first time: `EVAL`, `XGROUP`;
/// appending: `EVAL`, `XADD`, `XINFO`; retention also `XTRIM`, `XRANGE`, `XREVRANGE`, `XLEN`,
/// `TIME`, `HMGET`, `HSET`. Keys: the stream, and `<prefix>:retention:*`.
/// [`durability`](Log::durability) asks `CONFIG GET`, as does each new connection for the largest
/// value.
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
    /// Whether an append may create the stream: a log that was there and is gone must not come back
    /// as an empty one.
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

    /// Removes every record that the log's retention no longer keeps, and returns how many.
    ///
    /// Dropping the future may leave some of the work undone.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`]; [`Error::Indeterminate`] if some may have been removed.
    pub async fn trim(&self) -> Result<u64, Error> {
        self.inner.trim().await
    }
}

impl Inner {
    /// The stream's incarnation, which it is given if it has none; `None` if this user may not.
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
            // It was deleted since the question.
            Err(error) if error.to_string().contains("no such key") => Err(self.missing()),
            // A script says `ERR` of a command that the user may not run.
            Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => {
                tracing::warn!(log = %self.id, %error, "the stream's incarnation cannot be kept: a log that is deleted and made \
                    again may go unnoticed; grant XGROUP CREATE, or open the log once as a user who may");
                self.may_create.store(snapshot.is_none(), Ordering::Relaxed);
                Ok(None)
            }
            Err(error) => Err(write_failed(self.on("open"), error)),
        }
    }

    /// What the stream holds now; `None` if there is none.
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

    /// Sends a command over the shared connection; the inner error is that of the command.
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

    /// The snapshot of the stream that was opened.
    fn require(&self, snapshot: Option<Snapshot>, verb: &str) -> Result<Snapshot, Error> {
        match (self.id.incarnation(), snapshot) {
            (Some(ours), Some(snapshot)) if snapshot.incarnation() == Some(ours) => Ok(snapshot),
            (Some(_), _) => Err(self.gone(verb)),
            (None, snapshot) => Ok(snapshot.unwrap_or_default()),
        }
    }

    /// Appends all of the records or none.
    async fn append(&self, records: &[NewRecord]) -> Result<Offset, Error> {
        let action = || self.on("append to");
        let mut pipeline = Pipeline::with_capacity(2);
        pipeline.add_command(self.append_command(records));
        let min_replicas = self.link.server.options.min_replicas;
        if let Some(min) = min_replicas {
            // WAIT takes 0 as "for ever".
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
                    "the server has the records, but of {} replicas only {have} within {:?}: a fail-over may lose them",
                    min.replicas, min.timeout
                ),
            )),
            (Some(_), Some(Value::ServerError(error))) => Err(Error::indeterminate(
                action(),
                format!("the server has the records, but it is not known whether replicas have: {error}"),
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
            let why = "the log has no incarnation: grant XGROUP CREATE, and open it again";
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

    /// Trims, if it is time to, without anyone waiting for it.
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
                tracing::warn!(log = %inner.id, %error, "records that are no longer kept were not removed; the next append tries again");
            }
        });
    }

    fn missing(&self) -> Error {
        let stream = printable(&self.stream);
        let why = format!(
            "stream {stream:?} does not exist; check the name, or let it be created (without `LogOptions::existing`)"
        );
        Error::failed(self.on("open"), why)
    }

    fn gone(&self, verb: &str) -> Error {
        let why = "the stream was deleted or made anew since the log was opened; open it again";
        Error::failed(self.on(verb), why)
    }

    pub(crate) fn not_understood(&self, verb: &str) -> Error {
        Error::failed(self.on(verb), NOT_UNDERSTOOD)
    }

    pub(crate) fn on(&self, verb: &str) -> String {
        self.link.server.on(format!("{verb} log {}", self.id))
    }
}

const NOT_UNDERSTOOD: &str = "the server's reply is not understood: is it Redis 7.0 or later, or Valkey?";

/// What a record adds to a chunk.
fn weight(record: &NewRecord) -> usize {
    record.size() + ARGUMENT_BYTES * arguments(record)
}

/// The size of the largest value in the entry of a record.
fn largest_value(record: &NewRecord) -> usize {
    let headers = record.headers.iter();
    // A header's field is its name with a mark of two bytes.
    let headers = headers.flat_map(|(name, value)| [name.len() + 2, value.len()]);
    let key = record.key.as_ref().map_or(0, |key| key.len());
    headers.fold(key.max(record.payload.len()), usize::max)
}

/// How many of the records make the next chunk: at least one.
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
        // A new connection asks how large a value may be, and the check needs the answer.
        inner.link.connection().await?;
        for record in records {
            record.check_size(inner.link.server.options.record_limit)?;
            inner.link.check_value(largest_value(record))?;
            if record.headers.len() > MAX_HEADERS {
                let why = format!(
                    "a record has {} headers, and {MAX_HEADERS} are possible",
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
            // Also where the server refuses it: what is trimmed makes room for the next.
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
