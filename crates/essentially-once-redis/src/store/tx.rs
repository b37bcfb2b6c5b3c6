//! A transaction, staged in memory and sent at the commit.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, OnceLock},
};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, Outbox,
    backend::{Advance, DeadLetters, Transaction, check_entry_size, check_size},
};
use redis::{Cmd, FromRedisValue, RedisResult, Value};

use crate::{
    connection::Link,
    error::{printable, read_failed},
    store::{
        commit::{Commit, State},
        keys::{Keys, Ours, hash_tag},
        letters::Letters,
        native::{Catalog, Command, Staged, arguments, increment, refused},
        outbox::Outgoing,
    },
};

/// Redis closes a connection that sends more than a gibibyte at once (`client-query-buffer-limit`).
const MAX_BYTES: usize = 768 * 1024 * 1024;

/// An open transaction. It keeps its changes in memory and sends them as one script when it
/// commits. It locks nothing, and dropping it costs nothing.
///
/// Besides the portable [`KeyValue`] state it takes [commands](Self::command) on your own keys,
/// which other consumers and programs can see as well, and it [sends](essentially_once::Outbox)
/// records to logs.
///
/// # Sending
/// [`Outbox::send`] names a log by the key of its stream. The commit appends the records behind all
/// that may fail, so they are not among the commands of a partial commit. A transaction cannot
/// both send to a stream and run a command on it. [`RedisLog`](crate::RedisLog#as-an-outbox)
/// describes origins, retention and keys.
///
/// In a cluster, the key must contain the [`hash_tag`](Self::hash_tag), as in
/// `{shipping}:shipped`, like the keys of commands. So each consumer has outboxes of its own there.
///
/// # When a command fails
/// Redis never rolls back. The script therefore runs every possible check first: that the server
/// knows each command, that the user may run it, that its keys have the right type, and that a
/// value to be incremented is an integer. If the commit's first command fails, nothing was applied.
/// If a later command fails nevertheless (an index out of range, an overflow, a malformed option),
/// the commands before it stay applied. The commit then returns [`Error::PartiallyApplied`], the
/// position does not move, and the consumer is blocked, even after a restart, until you call
/// [`RedisStore::resolve_partial`](crate::RedisStore::resolve_partial). Stage commands whose
/// success depends on the data first, or check the data with [`query`](Self::query).
///
/// # When a read fails
/// After an error of [`get`](KeyValue::get) or [`query`](Self::query), an [`Error::Unavailable`] of
/// [`command`](Self::command), or any error but [`Error::TooLarge`] of a method of [`DeadLetters`],
/// the transaction can only be rolled back. It keeps the first of
/// these errors. The commit then fails with that error and applies nothing, even if the handler
/// ignored it.
pub struct RedisTx {
    consumer: ConsumerId,
    pub(super) link: Arc<Link>,
    pub(super) keys: Arc<Keys>,
    catalog: Arc<Catalog>,
    state: State,
    /// The values read so far, so that a transaction sees one value per key.
    read: BTreeMap<Vec<u8>, Option<Bytes>>,
    pub(super) staged: Staged,
    pub(super) letters: Letters,
    pub(super) outgoing: Outgoing,
    /// Most transactions repeat one command.
    last: Option<Arc<Command>>,
    /// The size of `state`. `staged`, `letters` and `outgoing` have theirs.
    bytes: usize,
    /// The size of the largest key, value or argument.
    pub(super) largest: usize,
    /// `query` sets it through `&self`.
    failure: OnceLock<Failure>,
}

/// The first read that failed.
struct Failure {
    transient: bool,
    error: String,
}

impl RedisTx {
    pub(crate) fn new(consumer: ConsumerId, link: Arc<Link>, keys: Arc<Keys>, catalog: Arc<Catalog>) -> Self {
        Self {
            consumer,
            link,
            keys,
            catalog,
            state: State::new(),
            read: BTreeMap::new(),
            staged: Staged::default(),
            letters: Letters::default(),
            outgoing: Outgoing::default(),
            last: None,
            bytes: 0,
            largest: 0,
            failure: OnceLock::new(),
        }
    }

    /// Adds a writing command, or `PUBLISH`, to the commit. The commands run in the order given, in
    /// the same step as state and position. Their replies are discarded. In a cluster, their keys
    /// must contain the [`hash_tag`](Self::hash_tag).
    ///
    /// ```
    /// # use essentially_once::Error;
    /// # use essentially_once_redis::{RedisTx, redis};
    /// # async fn example(tx: &mut RedisTx) -> Result<(), Error> {
    /// tx.command(redis::Cmd::hincr("freight", "Brazil", 32)).await?;
    /// tx.command(redis::cmd("PUBLISH").arg("shipped").arg("10248").take()).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The first use of a command name asks the server about it, with `COMMAND INFO`. Later uses
    /// send nothing, except for commands whose keys can be anywhere (`SORT`, `ZUNIONSTORE`), which
    /// need a `COMMAND GETKEYS`. Dropping the future stages nothing.
    ///
    /// # Errors
    /// The command is not staged. After [`Error::Failed`] and [`Error::TooLarge`] the transaction
    /// can continue. After [`Error::Unavailable`] it can only be rolled back.
    ///
    /// - [`Error::Failed`] for a command that does not exist, has too many or too few arguments,
    ///   does not write, may block, is not allowed in a script, names no key (`FLUSHALL`), names a
    ///   stream that the transaction sends to, or writes to a key of a store or log with this
    ///   [prefix](crate::RedisOptions::prefix);
    /// - [`Error::TooLarge`] if the transaction exceeds 768 MiB, or an argument the server's limit;
    /// - [`Error::Unavailable`] if the server could not be asked about the command.
    pub async fn command(&mut self, command: Cmd) -> Result<(), Error> {
        match self.stage_command(command).await {
            // A refused command is harmless. Only a failure to ask the server is transient.
            Err(error) if error.is_transient() => Err(self.remember(error)),
            done => done,
        }
    }

    async fn stage_command(&mut self, command: Cmd) -> Result<(), Error> {
        let link = &self.link;
        let arguments = arguments(&command);
        let known = match &self.last {
            Some(last) if last.is_named(&arguments) => Arc::clone(last),
            _ => self.catalog.find(link, &arguments).await?,
        };
        known.check_write(link, &arguments)?;
        let increment = increment(link, &known, &arguments)?;
        let keys = known.keys(link, &arguments).await?;
        if keys.is_empty() && !known.publishes() {
            return Err(refused(
                link,
                known.name(),
                "it names no key, so it could write anywhere",
            ));
        }
        for key in &keys {
            self.check_key(known.name(), key)?;
            let why = match Ours::parse(&link.server.options.prefix, key) {
                _ if self.outgoing.is_open(key) => {
                    "is a stream that this transaction sends to: run the command in another transaction"
                }
                Some(Ours::Consumer(..)) => "belongs to a store: change state with `put` and `delete`",
                Some(Ours::Outbox(_)) => "holds the numbers of an outbox, and only commits may change it",
                Some(Ours::Retention(_)) => "belongs to the retention of a log, and only the log may change it",
                None => continue,
            };
            return Err(refused(link, known.name(), format!("{:?} {why}", printable(key))));
        }
        let size = arguments.iter().map(|argument| argument.len()).sum();
        self.check_room(size)?;
        let largest = arguments.iter().map(|argument| argument.len()).max().unwrap_or(0);
        link.check_value(largest)?;
        if self.staged.note(&known, &keys, &arguments, increment) {
            self.staged.commands.push((command, increment));
        }
        self.largest = self.largest.max(largest);
        self.last = Some(known);
        Ok(())
    }

    /// Runs a reading command now, and returns its reply. The command sees the server's current
    /// data, without the changes staged in this transaction. Other programs may change that data
    /// before the commit. Other instances of this consumer cannot.
    ///
    /// ```
    /// # use essentially_once::Error;
    /// # use essentially_once_redis::{RedisTx, redis};
    /// # async fn example(tx: &RedisTx) -> Result<(), Error> {
    /// let price: Option<f64> = tx.query(redis::Cmd::hget("prices", "chai")).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Dropping the future has no effect.
    ///
    /// # Errors
    /// [`Error::Failed`] for a command that writes or may block, or whose reply is not a `T`;
    /// [`Error::Unavailable`]. After any error the transaction can only be rolled back.
    pub async fn query<T: FromRedisValue>(&self, command: Cmd) -> Result<T, Error> {
        let answer = self.run_query(command).await;
        answer.map_err(|error| self.remember(error))
    }

    async fn run_query<T: FromRedisValue>(&self, command: Cmd) -> Result<T, Error> {
        let arguments = arguments(&command);
        let known = self.catalog.find(&self.link, &arguments).await?;
        known.check_read(&self.link, &arguments)?;
        if self.link.server.is_cluster() {
            for key in known.keys(&self.link, &arguments).await? {
                self.check_key(known.name(), &key)?;
            }
        }
        let action = || self.action(&format!("run {}", known.name()));
        let answer = self.ask(&command, action).await?;
        redis::from_redis_value(answer).map_err(|error| Error::failed(action(), error))
    }

    /// The consumer that this transaction belongs to.
    pub fn consumer(&self) -> &ConsumerId {
        &self.consumer
    }

    /// `{<consumer>}`. In a cluster, the names of your keys must contain it, before any other
    /// brace, so that they are on the same node as the position.
    pub fn hash_tag(&self) -> String {
        format!("{{{}}}", self.consumer)
    }

    /// Prevents a commit, which reports the first remembered error.
    pub(super) fn remember(&self, error: Error) -> Error {
        self.failure.get_or_init(|| Failure {
            transient: error.is_transient(),
            error: error.to_string(),
        });
        error
    }

    /// Runs a reading command.
    pub(super) async fn ask(&self, command: &Cmd, action: impl Fn() -> String) -> Result<Value, Error> {
        let mut connection = self.link.connection().await?;
        let answer: RedisResult<Value> = command.query_async(&mut connection).await;
        match answer {
            Ok(answer) => Ok(answer),
            Err(error) => {
                self.link.check(&error);
                Err(read_failed(action(), error))
            }
        }
    }

    /// In a cluster, refuses a key that may be on another node.
    fn check_key(&self, command: &str, key: &[u8]) -> Result<(), Error> {
        if self.is_in_slot(key) {
            return Ok(());
        }
        let (key, tag) = (printable(key), self.hash_tag());
        let why = format!(
            "in a cluster, keys in this consumer's transactions must contain {tag}, as in {tag}:name; {key:?} does not"
        );
        Err(refused(&self.link, command, why))
    }

    /// Whether a key is certainly where the position is.
    pub(super) fn is_in_slot(&self, key: &[u8]) -> bool {
        !self.link.server.is_cluster() || hash_tag(key) == Some(self.consumer.as_str().as_bytes())
    }

    pub(super) fn check_room(&self, more: usize) -> Result<(), Error> {
        let bytes = self.bytes + self.staged.bytes + self.letters.bytes() + self.outgoing.bytes();
        check_size("transaction", bytes + more, MAX_BYTES)
    }

    fn stage(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        let limit = self.link.server.options.record_limit;
        check_entry_size(key, value.unwrap_or_default(), limit)?;
        let size = |value: Option<&[u8]>| key.len() + value.map_or(0, <[u8]>::len);
        self.check_room(size(value))?;
        let largest = key.len().max(value.map_or(0, <[u8]>::len));
        self.link.check_value(largest)?;
        self.largest = self.largest.max(largest);
        let old = match self.state.get_mut(key) {
            Some(staged) => Some(std::mem::replace(staged, value.map(Bytes::copy_from_slice))),
            None => self.state.insert(key.to_vec(), value.map(Bytes::copy_from_slice)),
        };
        self.bytes += size(value);
        if let Some(old) = old {
            self.bytes -= size(old.as_deref());
        }
        Ok(())
    }

    fn commit_action(&self) -> String {
        let consumer = &self.consumer;
        self.link
            .server
            .on(format!("commit a transaction of consumer {consumer}"))
    }

    pub(super) fn action(&self, verb: &str) -> String {
        let consumer = &self.consumer;
        self.link
            .server
            .on(format!("{verb} in a transaction of consumer {consumer}"))
    }
}

impl fmt::Debug for RedisTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisTx")
            .field("consumer", &self.consumer)
            .field("server", &self.link.server.to_string())
            .field("keys", &self.state.len())
            .field("commands", &self.staged.commands.len())
            .field("letters", &self.letters.len())
            .field("sent", &self.outgoing.len())
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transaction for RedisTx {
    const KEEPS_DEAD_LETTERS: bool = true;

    async fn commit(self, advance: Advance) -> Result<(), Error> {
        if let Some(Failure { transient, error }) = self.failure.get() {
            let why = format!("nothing was applied, because an earlier read failed: {error}");
            return Err(match transient {
                true => Error::unavailable(self.commit_action(), why),
                false => Error::failed(self.commit_action(), why),
            });
        }
        let Self {
            consumer,
            link,
            keys,
            state,
            staged,
            letters,
            outgoing,
            largest,
            ..
        } = self;
        Commit {
            link,
            consumer,
            keys,
            state,
            staged,
            letters,
            outgoing,
            largest,
            advance,
        }
        .run()
        .await
    }

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        Some(self)
    }

    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        Some(self)
    }

    async fn rollback(self) -> Result<(), Error> {
        Ok(())
    }
}

#[async_trait]
impl KeyValue for RedisTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        if let Some(known) = self.state.get(key).or_else(|| self.read.get(key)) {
            return Ok(known.clone());
        }
        let mut command = redis::cmd("HGET");
        command.arg(&self.keys.state).arg(key);
        let action = || self.action(&format!("get a key of {}", self.keys.state));
        let answer = self.ask(&command, action).await;
        let value: Result<Option<Vec<u8>>, Error> =
            answer.and_then(|answer| redis::from_redis_value(answer).map_err(|error| Error::failed(action(), error)));
        let value = value.map_err(|error| self.remember(error))?.map(Bytes::from);
        self.read.insert(key.to_vec(), value.clone());
        Ok(value)
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.stage(key, Some(value))
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.stage(key, None)
    }
}
