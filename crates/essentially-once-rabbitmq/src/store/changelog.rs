//! One consumer's changelog, as one handle of the store sees it: what it has read of it is folded in memory.

use std::{
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::SystemTime,
};

use essentially_once::{Advance, ConsumerId, Error, LogId, NewRecord, Offset, Position};
use tokio::sync::Mutex;

use super::{
    Limits,
    cover::{Cover, OVERHEAD},
    entry::{Entry, Parsed, encode_commit, encode_mark, parse},
    fold::{Commit, Fold, Missing, Token, Verdict},
    names::{self, Kind},
    sent::Nothing,
    snapshots::{Snapshots, message},
    state::{Sent, State, StateChange, Writes},
};
use crate::{
    packed,
    publisher::Publisher,
    server::Server,
    tail::{Delivered, Tail},
};

pub(super) struct Changelog {
    pub(super) server: Arc<Server>,
    pub(super) consumer: ConsumerId,
    pub(super) limits: Limits,
    pub(super) stream: String,
    publisher: Publisher,
    pub(super) snapshots: Arc<Snapshots>,
    /// A true prefix of the changelog at any time; only who holds `replica` changes it.
    fold: RwLock<Fold<State>>,
    /// What reads; none before the first use and after an error.
    pub(super) replica: Mutex<Option<Replica>>,
}

pub(super) struct Replica {
    pub(super) tail: Tail,
    /// The fold holds what this handle's last `position` or `commit` told its caller, and no transaction was begun since.
    pub(super) fresh: bool,
    /// Bytes read, from the snapshot on.
    pub(super) read: u64,
    pub(super) cover: Arc<Cover>,
    /// Held while a snapshot is written: which stream takes the next, if that is known.
    pub(super) target: Arc<Mutex<Option<usize>>>,
}

impl Changelog {
    pub(super) fn new(server: &Arc<Server>, consumer: &ConsumerId, limits: Limits) -> Self {
        let stream = names::name(&server.options.prefix, consumer, Kind::Changelog);
        Self {
            server: Arc::clone(server),
            consumer: consumer.clone(),
            limits,
            publisher: Publisher::sharing(Arc::clone(server), stream.clone()),
            stream,
            snapshots: Arc::new(Snapshots::new(server, consumer)),
            fold: RwLock::default(),
            replica: Mutex::new(None),
        }
    }

    pub(super) fn fold(&self) -> RwLockReadGuard<'_, Fold<State>> {
        self.fold.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn fold_mut(&self) -> RwLockWriteGuard<'_, Fold<State>> {
        self.fold.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn reading(&self) -> String {
        format!("read stream {}", self.stream)
    }

    pub(super) fn on(&self, verb: &str) -> String {
        self.server
            .on(format!("{verb} consumer {} in stream {}", self.consumer, self.stream))
    }

    /// The position, no older than the call.
    pub(super) async fn position(&self) -> Result<Option<Position>, Error> {
        let mut slot = self.replica.lock().await;
        self.refresh(&mut slot).await?;
        let fold = self.fold();
        Ok(fold.place.clone().map(|(log, next)| Position {
            log,
            next,
            revision: fold.revision,
            windows: fold
                .state
                .windows()
                .map(|(producer, window)| (producer.clone(), window.clone()))
                .collect(),
        }))
    }

    /// The revision that a transaction builds on.
    pub(super) async fn begin(&self) -> Result<u64, Error> {
        let mut slot = self.replica.lock().await;
        let replica = self.loaded(&mut slot).await?;
        if !std::mem::take(&mut replica.fresh) {
            self.refresh(&mut slot).await?;
        }
        if let Some(replica) = slot.as_mut() {
            replica.fresh = false;
        }
        Ok(self.fold().revision)
    }

    /// Who wants to go on reading by himself begins here: a fold without the state, no older than the call, and where what was sent ends.
    pub(super) async fn base(&self) -> Result<(Fold<Nothing>, Offset), Error> {
        let mut slot = self.replica.lock().await;
        self.refresh(&mut slot).await?;
        let fold = self.fold();
        let base = Fold {
            offset: fold.offset,
            revision: fold.revision,
            token: fold.token,
            place: fold.place.clone(),
            state: Nothing,
        };
        Ok((base, fold.state.sent_end))
    }

    /// Publishes an entry, and reads on until it comes back: then it is known whether it came first.
    pub(super) async fn commit(
        &self,
        based_on: u64,
        writes: Writes,
        sent: Vec<NewRecord>,
        advance: Advance,
    ) -> Result<(), Error> {
        let mut slot = self.replica.lock().await;
        let replica = self.loaded(&mut slot).await?;
        replica.fresh = false;
        let expected = advance.expected_revision;
        if based_on != expected {
            return Err(self.fenced(expected));
        }
        let given = advance.log.clone();
        let (token, entry) = self.prepare(writes, sent, advance)?;
        self.make_room(replica, entry.len()).await?;
        let size = entry.len();
        match self.publisher.publish(vec![message(entry)]).await {
            Err(Error::TooLarge { limit, .. }) => return Err(self.entry_too_large(size, limit)),
            published => published?,
        }
        let verdict = match self.read_until(replica, token).await {
            Ok(verdict) => verdict,
            Err(error) => {
                self.discard(&mut slot).await;
                return Err(Error::indeterminate(self.on("commit of"), error));
            }
        };
        match verdict {
            Verdict::Applied => {
                replica.fresh = true;
                self.snapshot_if_due(replica);
                Ok(())
            }
            Verdict::Late => Err(self.fenced(expected)),
            Verdict::OtherLog => Err(self.wrong_log(given)),
        }
    }

    /// The entry, unless it is known beforehand that it will not do.
    fn prepare(&self, writes: Writes, sent: Vec<NewRecord>, advance: Advance) -> Result<(Token, Vec<u8>), Error> {
        let fold = self.fold();
        if fold.revision != advance.expected_revision {
            return Err(self.fenced(advance.expected_revision));
        }
        if !fold.is_same_log(&advance.log) {
            drop(fold);
            return Err(self.wrong_log(advance.log));
        }
        let Advance { windows, forgotten, .. } = advance;
        let change = StateChange {
            windows,
            forgotten,
            writes: writes.into_iter().collect(),
            sent: (!sent.is_empty()).then(|| Sent {
                before: fold.state.sent_end,
                packed: packed::encode(&sent, SystemTime::now(), false),
            }),
        };
        self.check_state_size(fold.state.size(), fold.state.size_after(&change))?;
        let commit = Commit {
            token: draw_token(),
            parent: fold.token,
            revision: fold.revision + 1,
            log: advance.log,
            next: advance.next,
            change,
        };
        drop(fold);
        let entry = encode_commit(&commit);
        match (entry.len(), self.limits.entry.min(self.server.message_limit())) {
            (size, limit) if size > limit => Err(self.entry_too_large(size, limit)),
            _ => Ok((commit.token, entry)),
        }
    }

    fn entry_too_large(&self, size: usize, limit: usize) -> Error {
        let raise = match limit < self.limits.entry {
            true => "raise `max_message_size` of the broker",
            false => "raise `record_limit` if the broker takes larger messages",
        };
        Error::failed(
            self.on("commit of"),
            format!(
                "all that it changes and sends takes {size} bytes, and one commit can hold {limit}: handle fewer records at a time (the \
                 consumer's `max_batch`), or {raise}; nothing was published"
            ),
        )
    }

    /// The largest key, value or record that a commit can hold.
    pub(super) fn value_limit(&self) -> usize {
        self.limits.value.min(self.server.message_limit())
    }

    /// Refuses to let the state grow beyond its limit.
    pub(super) fn check_state_size(&self, before: usize, after: usize) -> Result<(), Error> {
        match self.limits.state {
            limit if after > limit && after > before => Err(Error::failed(
                self.on("change the state of"),
                format!(
                    "it would take about {after} bytes of memory, over the limit of {limit} (`RabbitStore::state_limit`): delete what \
                     is not needed, or keep the state in a database, with a store of its own"
                ),
            )),
            _ => Ok(()),
        }
    }

    fn fenced(&self, expected: u64) -> Error {
        Error::Fenced {
            consumer: self.consumer.clone(),
            expected,
        }
    }

    fn wrong_log(&self, given: LogId) -> Error {
        let stored = self
            .fold()
            .place
            .as_ref()
            .map_or_else(|| given.clone(), |(log, _)| log.clone());
        Error::WrongLog {
            consumer: self.consumer.clone(),
            stored,
            given,
        }
    }

    /// Reads all that was there when this was called: a mark is behind it, wherever the stream's end is said to be.
    async fn refresh(&self, slot: &mut Option<Replica>) -> Result<(), Error> {
        let replica = self.loaded(slot).await?;
        let refreshed = self.read_to_mark(replica).await;
        match &refreshed {
            Ok(()) => replica.fresh = true,
            Err(_) => self.discard(slot).await,
        }
        refreshed
    }

    async fn read_to_mark(&self, replica: &mut Replica) -> Result<(), Error> {
        let token = draw_token();
        let mark = encode_mark(token);
        self.make_room(replica, mark.len()).await?;
        self.publisher
            .publish(vec![message(mark)])
            .await
            .map_err(nothing_done)?;
        self.read_until(replica, token).await?;
        Ok(())
    }

    /// The next call begins anew, and on another connection.
    async fn discard(&self, slot: &mut Option<Replica>) {
        if let Some(replica) = slot.take() {
            self.server.reading.forget(&replica.tail.connection).await;
        }
    }

    /// Reads up to the entry of that token, and what came with it.
    async fn read_until(&self, replica: &mut Replica, token: Token) -> Result<Verdict, Error> {
        let reading = async {
            loop {
                let delivered = replica
                    .tail
                    .next(usize::MAX)
                    .await
                    .map_err(|error| self.read_error(error))?;
                let mut fold = self.fold_mut();
                let mut own = None;
                for delivered in delivered {
                    replica.read += delivered.body.len() as u64 + OVERHEAD;
                    own = self.take(&mut fold, delivered, token)?.or(own);
                }
                if let Some(verdict) = own {
                    return Ok(verdict);
                }
            }
        };
        let verdict = self.within_limit(reading).await?;
        // Who uses it next, and when, is not known. Should it fail, the next call notices.
        let _ = replica.tail.settle().await;
        Ok(verdict)
    }

    pub(super) async fn within_limit<T>(&self, reading: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let limit = self.server.options.timeout;
        tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| {
            Err(Error::unavailable(
                self.on("read"),
                format!("what was published did not come back within {limit:?}"),
            ))
        })
    }

    /// Folds a message, and tells what became of it if it has that token.
    pub(super) fn take(
        &self,
        fold: &mut Fold<State>,
        delivered: Delivered,
        token: Token,
    ) -> Result<Option<Verdict>, Error> {
        let offset = delivered.offset;
        match parse(delivered.body.into()) {
            Parsed::Entry(Entry::Mark(found)) => {
                fold.pass(offset);
                Ok((found == token).then_some(Verdict::Applied))
            }
            Parsed::Entry(Entry::Commit(commit)) => {
                let found = commit.token;
                let verdict = fold
                    .apply(offset, commit)
                    .map_err(|missing| self.missing(offset, missing))?;
                Ok((found == token).then_some(verdict))
            }
            Parsed::Foreign => {
                tracing::warn!(
                    stream = self.stream,
                    offset,
                    "passed over a message that is not of this crate"
                );
                fold.pass(offset);
                Ok(None)
            }
            Parsed::Unreadable(why) => Err(self.unreadable(offset, why)),
        }
    }

    pub(super) fn unreadable(&self, offset: u64, why: &str) -> Error {
        Error::failed(
            self.on("read"),
            format!("the entry at offset {offset} cannot be read: {why}; to pass over it could lose a commit"),
        )
    }

    pub(super) fn missing(&self, offset: u64, missing: Missing) -> Error {
        self.lost(format!("at offset {offset}, {missing}"))
    }

    pub(super) async fn loaded<'a>(&self, slot: &'a mut Option<Replica>) -> Result<&'a mut Replica, Error> {
        let replica = match slot.take() {
            Some(replica) => replica,
            None => self.load().await?,
        };
        Ok(slot.insert(replica))
    }

    pub(super) fn lost(&self, what: String) -> Error {
        Error::failed(
            self.on("read"),
            format!("state lost: {what}; restore the streams, or use another consumer name to begin anew"),
        )
    }

    pub(super) fn read_error(&self, error: Error) -> Error {
        match error {
            // The next call starts from a newer snapshot.
            Error::Truncated { .. } => Error::unavailable(self.on("read"), error),
            Error::OutOfRange { end, .. } => {
                self.lost(format!("the changelog ends at {end}, before what was read of it: it was created anew, or the broker lost its tail"))
            }
            error => error,
        }
    }
}

/// Never 0, which stands for "none".
fn draw_token() -> Token {
    u128::from(fastrand::u64(1..)) << 64 | u128::from(fastrand::u64(..))
}

/// What is in doubt here changes neither state nor position.
pub(super) fn nothing_done(error: Error) -> Error {
    match error {
        Error::Indeterminate { action, source } => Error::Unavailable { action, source },
        error => error,
    }
}
