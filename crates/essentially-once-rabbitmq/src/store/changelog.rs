//! One consumer's changelog as one handle of the store sees it: folded in memory.

use std::{
    future::pending,
    io,
    pin::pin,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, NewRecord, Offset,
    backend::{Advance, LogId, Owner, Position, Pulse, Revision, Snapshot},
};
use tokio::{
    sync::{Mutex, MutexGuard, Notify},
    time::{Instant, sleep_until},
};

use super::{
    HEAD, Limits,
    cover::{Cover, OVERHEAD},
    entry::{Entry, MARK_LEN, Parsed, encode_commit, encode_mark, parse},
    fold::{Commit, Fold, Hint, Missing, Token, Verdict},
    names::{self, Kind},
    sent::Nothing,
    snapshots::{Snapshots, message},
    state::{Sent, State, StateChange, Writes},
};
use crate::{
    connection, packed,
    publisher::Publisher,
    server::Server,
    stream,
    tail::{Delivered, Tail},
};

pub(super) struct Changelog {
    pub(super) server: Arc<Server>,
    pub(super) consumer: ConsumerId,
    pub(super) limits: Limits,
    pub(super) stream: String,
    publisher: Arc<Publisher>,
    pub(super) snapshots: Arc<Snapshots>,
    /// Always a true prefix of the changelog. Only the holder of `replica` changes it.
    pub(super) fold: Arc<RwLock<Fold<State>>>,
    /// The reader of the stream; `None` before the first use and after an error.
    replica: Mutex<Option<Replica>>,
    /// Whether the fold was loaded.
    has_loaded: AtomicBool,
    turns: Turns,
    /// Wakes tasks that watch the fold.
    changed: Notify,
    /// Whether a beat of the owner is in progress.
    is_beating: Arc<AtomicBool>,
}

/// Lets a task that only waits for entries release the replica when another needs it.
#[derive(Default)]
struct Turns {
    waiting: AtomicUsize,
    called: Notify,
}

/// A beat in progress.
struct Beating(Arc<AtomicBool>);

impl Drop for Beating {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// A task that waits for the replica.
struct Turn<'a>(&'a Turns);

impl Turns {
    fn wait(&self) -> Turn<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.called.notify_waiters();
        Turn(self)
    }

    fn are_waited_for(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(super) struct Replica {
    pub(super) tail: Tail,
    /// Whether the fold holds what this handle's last `position` or `commit` returned, and no
    /// transaction has begun since.
    pub(super) fresh: bool,
    /// Bytes read, from the snapshot on.
    pub(super) read: u64,
    pub(super) cover: Arc<Cover>,
    /// Locked while a snapshot is written. Holds the stream for the next one, if known.
    pub(super) target: Arc<Mutex<Option<usize>>>,
}

impl Changelog {
    pub(super) fn new(server: &Arc<Server>, consumer: &ConsumerId, limits: Limits) -> Self {
        let stream = names::name(&server.options.prefix, consumer, Kind::Changelog);
        Self {
            server: Arc::clone(server),
            consumer: consumer.clone(),
            limits,
            publisher: Arc::new(Publisher::sharing(Arc::clone(server), stream.clone())),
            stream,
            snapshots: Arc::new(Snapshots::new(server, consumer)),
            fold: Arc::default(),
            replica: Mutex::new(None),
            has_loaded: AtomicBool::new(false),
            turns: Turns::default(),
            changed: Notify::new(),
            is_beating: Arc::default(),
        }
    }

    /// Locks the replica.
    pub(super) async fn replica(&self) -> Result<MutexGuard<'_, Option<Replica>>, Error> {
        let _turn = self.turns.wait();
        self.server.in_turn(self.replica.lock()).await
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
        let mut slot = self.replica().await?;
        self.refresh(&mut slot).await?;
        Ok(position_of(&self.fold()))
    }

    /// The position and the values of these keys, no older than the call.
    pub(super) async fn read_state(&self, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        let mut slot = self.replica().await?;
        self.refresh(&mut slot).await?;
        let fold = self.fold();
        // Copied, since the caller may keep a value for long.
        let value = |key: &&[u8]| fold.state.get(key).map(|value| Bytes::copy_from_slice(value));
        Ok(Snapshot::new(position_of(&fold), keys.iter().map(value).collect()))
    }

    /// The pulse according to the entries that have arrived. Publishes nothing.
    pub(super) async fn pulse(&self) -> Result<Pulse, Error> {
        let slot = match self.has_loaded.load(Ordering::Relaxed) {
            // The holder of the replica reads, too.
            true => self.replica.try_lock().ok(),
            false => Some(self.replica().await?),
        };
        if let Some(mut slot) = slot {
            if slot.is_none() && !self.exists().await? {
                return Ok(Pulse::default());
            }
            self.loaded(&mut slot).await?;
            self.read_ready(&mut slot).await?;
        }
        Ok(pulse_of(&self.fold()))
    }

    /// Waits until the pulse changes, but not much longer than `interval`.
    pub(super) async fn watch(&self, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        let deadline = Instant::now() + interval;
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let pulse = self.pulse().await?;
            if pulse != *seen || Instant::now() >= deadline {
                return Ok(pulse);
            }
            // Marks and late entries also wake this task, and change nothing.
            tokio::select! {
                biased;
                () = changed => {}
                () = sleep_until(deadline) => {}
                followed = self.follow() => followed?,
            }
        }
    }

    /// Waits for an entry.
    async fn follow(&self) -> Result<(), Error> {
        loop {
            let mut called = pin!(self.turns.called.notified());
            called.as_mut().enable();
            let mut slot = self.replica.lock().await;
            // The lock is fair, so the waiting tasks get it first.
            if self.turns.are_waited_for() {
                continue;
            }
            let Some(replica) = slot.as_mut() else {
                // Another task failed to read. The next call of `pulse` starts over.
                return pending().await;
            };
            let followed = tokio::select! {
                biased;
                () = called => continue,
                followed = replica.tail.follow(usize::MAX) => followed,
            };
            let taken = followed
                .map_err(|error| self.read_error(error))
                .and_then(|delivered| self.take_all(replica, delivered, 0));
            return match taken {
                Ok(_) => Ok(()),
                Err(error) => {
                    self.discard(&mut slot).await;
                    Err(error)
                }
            };
        }
    }

    /// Reads the entries that have arrived, without waiting for more.
    async fn read_ready(&self, slot: &mut Option<Replica>) -> Result<(), Error> {
        // A bound, since others may publish as fast as we read.
        const ROUNDS: usize = 8;
        let Some(replica) = slot else { return Ok(()) };
        let reading = async {
            for _ in 0..ROUNDS {
                let delivered = replica.tail.ready().await.map_err(|error| self.read_error(error))?;
                if delivered.is_empty() {
                    break;
                }
                self.take_all(replica, delivered, 0)?;
            }
            // The next use may be far away.
            replica.tail.settle().await
        };
        let read = reading.await;
        if read.is_err() {
            self.discard(slot).await;
        }
        read
    }

    async fn exists(&self) -> Result<bool, Error> {
        let asking = &self.server.asking;
        let connection = asking.connection(&self.server).await?;
        let found = stream::exists(&self.server, &connection, &self.stream).await;
        // The broker has closed a channel to say no.
        if !matches!(found, Ok(true)) {
            asking.forget(&connection).await;
        }
        found
    }

    /// Shows that the owner lives, with one beat at a time. Also reads it back: an owner that
    /// handles a record for long reads nothing else, and the broker ends a channel that is idle for
    /// too long.
    pub(super) async fn beat(&self, owner: Owner) -> Result<(), Error> {
        if self.is_in_vain(owner).await? || self.is_beating.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let beating = Beating(Arc::clone(&self.is_beating));
        if let Ok(slot) = self.replica.try_lock()
            && let Some(replica) = slot.as_ref()
            && !replica.has_room(MARK_LEN)
        {
            // A standby that takes over is better than a state that retention has cut off.
            self.snapshot_if_due(replica);
            return Ok(());
        }
        self.publish_hint(Hint::Beat.token(owner), Some(beating))
            .await
            .map_err(nothing_done)?;
        // The holder of the replica reads and writes snapshots, too.
        if let Ok(mut slot) = self.replica.try_lock() {
            self.read_ready(&mut slot).await?;
            if let Some(replica) = slot.as_ref() {
                self.snapshot_if_due(replica);
            }
        }
        Ok(())
    }

    /// Gives the position up.
    pub(super) async fn release(&self, owner: Owner) -> Result<(), Error> {
        if self.is_in_vain(owner).await? {
            return Ok(());
        }
        self.publish_hint(Hint::Release.token(owner), None).await
    }

    /// Whether a hint of this owner has no effect for certain: the position has another owner or
    /// does not exist.
    async fn is_in_vain(&self, owner: Owner) -> Result<bool, Error> {
        match self.has_loaded.load(Ordering::Relaxed) {
            true => Ok(self.fold().owner != Some(owner)),
            false => Ok(!self.exists().await?),
        }
    }

    /// Publishes a mark in a task of its own. Consumers drop calls that beat, which would spoil the
    /// channel for the next commit.
    async fn publish_hint(&self, token: Token, beating: Option<Beating>) -> Result<(), Error> {
        let (publisher, mark) = (Arc::clone(&self.publisher), message(encode_mark(token)));
        let publishing = connection::spawn(async move {
            let _beating = beating;
            publisher.publish(vec![mark]).await
        });
        let failed = |error: io::Error| Error::unavailable(self.on("write for"), error);
        let published = publishing.map_err(failed)?.await;
        published.map_err(|error| failed(io::Error::other(error)))?
    }

    /// The revision that a transaction builds on.
    pub(super) async fn begin(&self) -> Result<Revision, Error> {
        let mut slot = self.replica().await?;
        let replica = self.loaded(&mut slot).await?;
        if !std::mem::take(&mut replica.fresh) {
            self.refresh(&mut slot).await?;
        }
        if let Some(replica) = slot.as_mut() {
            replica.fresh = false;
        }
        Ok(self.fold().revision)
    }

    /// The starting point of an independent reader: a fold without the state, no older than the
    /// call, and the end of the sent records.
    pub(super) async fn base(&self) -> Result<(Fold<Nothing>, Offset), Error> {
        let mut slot = self.replica().await?;
        self.refresh(&mut slot).await?;
        let fold = self.fold();
        let base = Fold {
            offset: fold.offset,
            revision: fold.revision,
            token: fold.token,
            place: fold.place.clone(),
            owner: fold.owner,
            beats: fold.beats,
            passed: fold.passed,
            state: Nothing,
        };
        Ok((base, fold.state.sent_end))
    }

    /// Publishes an entry and reads on until it comes back, which shows whether it came first.
    pub(super) async fn commit(
        &self,
        based_on: Revision,
        writes: Writes,
        sent: Vec<NewRecord>,
        advance: Advance,
    ) -> Result<(), Error> {
        let mut slot = self.replica().await?;
        let replica = self.loaded(&mut slot).await?;
        replica.fresh = false;
        let expected = advance.expected;
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

    /// Makes the entry, unless it would certainly not apply.
    fn prepare(&self, writes: Writes, sent: Vec<NewRecord>, advance: Advance) -> Result<(Token, Vec<u8>), Error> {
        let fold = self.fold();
        if fold.revision != advance.expected {
            return Err(self.fenced(advance.expected));
        }
        if !fold.is_same_log(&advance.log) {
            drop(fold);
            return Err(self.wrong_log(advance.log));
        }
        let change = StateChange {
            windows: advance.windows,
            forgotten: advance.forgotten,
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
            expected: advance.expected,
            revision: advance.revision,
            log: advance.log,
            next: advance.next,
            owner: advance.owner,
            passed: advance.passed,
            change,
        };
        drop(fold);
        let entry = encode_commit(&commit);
        match (entry.len(), self.entry_limit()) {
            (size, limit) if size > limit => Err(self.entry_too_large(size, limit)),
            _ => Ok((commit.token, entry)),
        }
    }

    /// The largest entry that this broker takes, as far as known.
    fn entry_limit(&self) -> usize {
        self.limits.entry.min(self.server.message_limit())
    }

    /// Refuses to stage more than a commit can hold.
    pub(super) fn check_entry_size(&self, staged: usize) -> Result<(), Error> {
        let (size, limit) = (staged + HEAD, self.entry_limit());
        match size > limit {
            true => Err(Error::TooLarge {
                what: "transaction",
                size,
                limit,
            }),
            false => Ok(()),
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
                "its changes and sent records take {size} bytes, and a commit can hold {limit}; handle fewer records at a time (the \
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
                    "it would take about {after} bytes of memory, over the limit of {limit} (`RabbitStore::state_limit`); delete \
                     keys that are not needed, or keep the state in a database with a store of its own"
                ),
            )),
            _ => Ok(()),
        }
    }

    fn fenced(&self, expected: Revision) -> Error {
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

    /// Reads everything published before this call: a mark follows it, wherever the broker says
    /// that the stream ends.
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

    /// Makes the next call start over, on another connection.
    async fn discard(&self, slot: &mut Option<Replica>) {
        if let Some(replica) = slot.take() {
            self.server.reading.forget(&replica.tail.connection).await;
        }
    }

    /// Reads up to the entry with that token, and the messages that arrived with it.
    async fn read_until(&self, replica: &mut Replica, token: Token) -> Result<Verdict, Error> {
        let reading = async {
            loop {
                let delivered = replica
                    .tail
                    .next(usize::MAX)
                    .await
                    .map_err(|error| self.read_error(error))?;
                if let Some(verdict) = self.take_all(replica, delivered, token)? {
                    return Ok(verdict);
                }
            }
        };
        let verdict = self.within_limit(reading).await?;
        // The next use may be far away. If this fails, the next call notices.
        let _ = replica.tail.settle().await;
        Ok(verdict)
    }

    pub(super) async fn within_limit<T>(&self, reading: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let limit = self.server.options.timeout;
        tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| {
            Err(Error::unavailable(
                self.on("read"),
                format!("the published entry did not come back within {limit:?}"),
            ))
        })
    }

    /// Folds messages. Returns the verdict on the one with that token, if it is among them.
    fn take_all(
        &self,
        replica: &mut Replica,
        delivered: Vec<Delivered>,
        token: Token,
    ) -> Result<Option<Verdict>, Error> {
        let mut own = None;
        let mut fold = self.fold_mut();
        for delivered in delivered {
            replica.read += delivered.body.len() as u64 + OVERHEAD;
            own = self.take(&mut fold, delivered, token)?.or(own);
        }
        drop(fold);
        self.changed.notify_waiters();
        Ok(own)
    }

    /// Folds a message. Returns the verdict on it if it has that token.
    pub(super) fn take(
        &self,
        fold: &mut Fold<State>,
        delivered: Delivered,
        token: Token,
    ) -> Result<Option<Verdict>, Error> {
        let offset = delivered.offset;
        match parse(delivered.body.into()) {
            Parsed::Entry(Entry::Mark(found)) => {
                fold.mark(offset, found);
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
                    "ignored a message that is not an entry of this crate"
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
            format!("the entry at offset {offset} cannot be read: {why}; ignoring it could lose a commit"),
        )
    }

    pub(super) fn missing(&self, offset: u64, missing: Missing) -> Error {
        self.lost(format!("at offset {offset}, {missing}"))
    }

    pub(super) async fn loaded<'a>(&self, slot: &'a mut Option<Replica>) -> Result<&'a mut Replica, Error> {
        let replica = match slot.take() {
            Some(replica) => replica,
            None => {
                let replica = self.load().await?;
                self.has_loaded.store(true, Ordering::Relaxed);
                self.changed.notify_waiters();
                replica
            }
        };
        Ok(slot.insert(replica))
    }

    pub(super) fn lost(&self, what: String) -> Error {
        Error::failed(
            self.on("read"),
            format!("state lost: {what}; restore the streams, or start over with another consumer name"),
        )
    }

    pub(super) fn read_error(&self, error: Error) -> Error {
        match error {
            // The next call starts from a newer snapshot.
            Error::Truncated { .. } => Error::unavailable(self.on("read"), error),
            Error::OutOfRange { end, .. } => {
                self.lost(format!("the changelog ends at {end}, before an entry that was read; it was created again, or the broker lost its tail"))
            }
            error => error,
        }
    }
}

fn position_of(fold: &Fold<State>) -> Option<Position> {
    let (log, next) = fold.place.clone()?;
    let mut position = Position::new(log, next, fold.revision);
    (position.owner, position.passed) = (fold.owner, fold.passed);
    let windows = fold.state.windows();
    position.windows = windows
        .map(|(numbering, window)| (numbering.clone(), window.clone()))
        .collect();
    Some(position)
}

fn pulse_of(fold: &Fold<State>) -> Pulse {
    let mut pulse = Pulse::default();
    if let Some((_, next)) = &fold.place {
        (pulse.next, pulse.revision, pulse.owner) = (*next, fold.revision, fold.owner);
        pulse.beats = fold.beats;
    }
    pulse
}

/// Never 0, which means "none".
fn draw_token() -> Token {
    u128::from(fastrand::u64(1..)) << 64 | u128::from(fastrand::u64(..))
}

/// An entry in doubt here changes neither state nor position.
pub(super) fn nothing_done(error: Error) -> Error {
    match error {
        Error::Indeterminate { action, cause } => Error::Unavailable { action, cause },
        error => error,
    }
}
