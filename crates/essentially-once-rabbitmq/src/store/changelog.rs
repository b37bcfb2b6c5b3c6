//! One consumer's changelog as one handle of the store sees it: folded in memory.

use std::{
    future::pending,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use essentially_once::{
    Error, Offset,
    backend::{Advance, Owner, Position, Pulse, Revision, Snapshot, new_producer, unique},
};
use tokio::{
    sync::{Mutex, MutexGuard},
    time::{Instant, sleep_until},
};

use super::{
    entry::{MARK_LEN, encode_commit, encode_mark},
    guard::{Guard, Guards},
    hints::Hints,
    replica::Replica,
    rule::{Commit, Fold, Hint, Token, Verdict, wish_token},
    scope::{Scope, nothing_done},
    snapshots::Snapshots,
    state::{SharedFold, State, StateChange, journal_size},
    turns::Turns,
    tx::Staged,
};
use crate::connection::{
    publisher::{Message, Publisher},
    stream,
};

pub(super) struct Changelog {
    pub(super) scope: Arc<Scope>,
    pub(super) fold: SharedFold,
    publisher: Arc<Publisher>,
    hints: Hints,
    pub(super) guards: Arc<Guards>,
    snapshots: Arc<Snapshots>,
    /// The reader of the stream; `None` before the first use and after an error.
    replica: Mutex<Option<Replica>>,
    /// Whether the fold was loaded.
    has_loaded: AtomicBool,
    /// Whether this handle's last commit came too late.
    has_lost: AtomicBool,
    turns: Turns,
}

impl Changelog {
    pub(super) fn new(scope: Scope, guards: Vec<Guard>) -> Self {
        let scope = Arc::new(scope);
        let publisher = Publisher::sharing(Arc::clone(&scope.server), scope.stream.clone());
        let publisher = Arc::new(publisher);
        Self {
            fold: SharedFold::default(),
            hints: Hints::new(&scope, &publisher),
            guards: Arc::new(Guards::new(guards, scope.limits.unrelayed)),
            publisher,
            snapshots: Arc::new(Snapshots::new(&scope.server, &scope.consumer)),
            replica: Mutex::new(None),
            has_loaded: AtomicBool::new(false),
            has_lost: AtomicBool::new(false),
            turns: Turns::default(),
            scope,
        }
    }

    /// The position, no older than the call.
    pub(super) async fn position(&self) -> Result<Option<Position>, Error> {
        let mut slot = self.replica().await?;
        self.refresh(&mut slot).await?;
        Ok(position_of(&self.fold.read()))
    }

    /// The position and the values of these keys, no older than the call.
    pub(super) async fn read_state(&self, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        let mut slot = self.replica().await?;
        self.refresh(&mut slot).await?;
        let fold = self.fold.read();
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
        Ok(pulse_of(&self.fold.read()))
    }

    /// Waits until the pulse changes, but not much longer than `interval`.
    pub(super) async fn watch(&self, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        let deadline = Instant::now() + interval;
        loop {
            let mut changed = pin!(self.fold.changed());
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

    /// Shows that the owner lives, with one beat at a time. Also reads it back: an owner that
    /// handles a record for long reads nothing else, and the broker ends a channel that is idle for
    /// too long.
    pub(super) async fn beat(&self, owner: Owner) -> Result<(), Error> {
        if self.is_in_vain(owner).await? {
            return Ok(());
        }
        let Some(beating) = self.hints.begin_beat() else {
            return Ok(());
        };
        if let Ok(slot) = self.replica.try_lock()
            && let Some(replica) = slot.as_ref()
            && !replica.policy.has_room(MARK_LEN)
        {
            // A standby that takes over is better than a state that retention has cut off.
            replica.policy.write_if_due();
            return Ok(());
        }
        self.hints
            .publish(Hint::Beat.token(owner), Some(beating))
            .await
            .map_err(nothing_done)?;
        // The holder of the replica reads and writes snapshots, too.
        if let Ok(mut slot) = self.replica.try_lock() {
            self.read_ready(&mut slot).await?;
            if let Some(replica) = slot.as_ref() {
                replica.policy.write_if_due();
            }
        }
        Ok(())
    }

    /// Gives the position up.
    pub(super) async fn release(&self, owner: Owner) -> Result<(), Error> {
        if self.is_in_vain(owner).await? {
            return Ok(());
        }
        self.hints.publish(Hint::Release.token(owner), None).await
    }

    /// The revision that a transaction builds on.
    pub(super) async fn begin(&self) -> Result<Revision, Error> {
        let mut slot = self.replica().await?;
        let has_lost = self.has_lost.swap(false, Ordering::Relaxed);
        let replica = self.loaded(&mut slot).await?;
        if !std::mem::take(&mut replica.fresh) {
            let token = if has_lost {
                wish_token(draw_token())
            } else {
                draw_token()
            };
            self.refresh_to(&mut slot, token).await?;
        }
        if let Some(replica) = slot.as_mut() {
            replica.fresh = false;
        }
        Ok(self.fold.read().revision)
    }

    /// The starting point of an independent reader: a fold without the state, no older than the
    /// call, and the end of the records sent to the outbox, or of all sent records.
    pub(super) async fn base(&self, outbox: Option<&str>) -> Result<(Fold<()>, Offset), Error> {
        let mut slot = self.replica().await?;
        self.refresh(&mut slot).await?;
        let fold = self.fold.read();
        let end = match outbox {
            Some(outbox) => fold.state.outboxes.end(outbox),
            None => fold.state.sent_end,
        };
        Ok((fold.without_state(), end))
    }

    pub(super) async fn snapshot(&self) -> Result<(), Error> {
        let mut slot = self.replica().await?;
        // Others may have committed since this handle last read.
        self.refresh(&mut slot).await?;
        self.loaded(&mut slot).await?.policy.write_now().await
    }

    /// Publishes an entry and reads on until it comes back, which shows whether it came first.
    pub(super) async fn commit(&self, based_on: Revision, staged: Staged, advance: Advance) -> Result<(), Error> {
        let mut slot = self.replica().await?;
        let replica = self.loaded(&mut slot).await?;
        replica.fresh = false;
        let expected = advance.expected;
        if based_on != expected {
            return Err(self.lost(expected));
        }
        if let Err(error) = replica.give_way().await {
            self.discard(&mut slot).await;
            return Err(nothing_done(error));
        }
        let given = advance.log.clone();
        let (token, entry) = self.prepare(staged, advance)?;
        replica.policy.make_room(entry.len()).await?;
        let size = entry.len();
        match self.publisher.publish(vec![Message::new(entry)]).await {
            Err(Error::TooLarge { limit, .. }) => return Err(self.scope.entry_too_large(size, limit)),
            published => published?,
        }
        let verdict = match replica.read_until(token).await {
            Ok(verdict) => verdict,
            Err(error) => {
                self.discard(&mut slot).await;
                return Err(Error::indeterminate(self.scope.on("commit of"), error));
            }
        };
        match verdict {
            Verdict::Applied => {
                replica.fresh = true;
                replica.policy.write_if_due();
                Ok(())
            }
            Verdict::Late => Err(self.lost(expected)),
            Verdict::OtherLog => {
                let fold = self.fold.read();
                let stored = fold.place.as_ref().map_or(&given, |(log, _)| log);
                Err(self.scope.wrong_log(stored.clone(), given))
            }
        }
    }

    /// The error of a commit that comes too late. The next transaction says that it wishes to
    /// commit.
    fn lost(&self, expected: Revision) -> Error {
        self.has_lost.store(true, Ordering::Relaxed);
        self.scope.fenced(expected)
    }

    /// Makes the entry, unless it would certainly not apply.
    fn prepare(&self, staged: Staged, advance: Advance) -> Result<(Token, Vec<u8>), Error> {
        let fold = self.fold.read();
        let stored = fold.place.as_ref().map(|(log, _)| (fold.revision, log));
        advance.check(&self.scope.consumer, stored)?;
        let change = StateChange {
            windows: advance.windows,
            forgotten: advance.forgotten,
            writes: staged.writes.into_iter().collect(),
            letters: staged.letters.into_change(),
            sent: staged
                .sent
                .numbered(&fold.state.outboxes, fold.state.sent_end, |outbox| {
                    new_producer(self.scope.outbox(outbox)?.name())
                })?,
        };
        // The journal counts before and after, so that an operator can always pause.
        let journal = journal_size(advance.journal.as_ref().unwrap_or(&fold.journal));
        self.scope
            .check_state_size(fold.state.size() + journal, fold.state.size_after(&change) + journal)?;
        let commit = Commit {
            token: draw_token(),
            parent: fold.token,
            expected: advance.expected,
            revision: advance.revision,
            log: advance.log,
            next: advance.next,
            owner: advance.owner,
            note: advance.note,
            journal: advance.journal,
            change,
        };
        drop(fold);
        let entry = encode_commit(&commit);
        match (entry.len(), self.scope.entry_limit()) {
            (size, limit) if size > limit => Err(self.scope.entry_too_large(size, limit)),
            _ => Ok((commit.token, entry)),
        }
    }

    /// Locks the replica.
    async fn replica(&self) -> Result<MutexGuard<'_, Option<Replica>>, Error> {
        let _turn = self.turns.wait();
        self.scope.server.in_turn(self.replica.lock()).await
    }

    /// Makes sure that there is a replica.
    async fn loaded<'a>(&self, slot: &'a mut Option<Replica>) -> Result<&'a mut Replica, Error> {
        let replica = match slot.take() {
            Some(replica) => replica,
            None => {
                let replica = Replica::load(&self.scope, &self.snapshots, &self.fold, &self.guards).await?;
                self.has_loaded.store(true, Ordering::Relaxed);
                self.fold.notify();
                replica
            }
        };
        Ok(slot.insert(replica))
    }

    /// Reads everything published before this call: a mark follows it, wherever the broker says
    /// that the stream ends.
    async fn refresh(&self, slot: &mut Option<Replica>) -> Result<(), Error> {
        self.refresh_to(slot, draw_token()).await
    }

    /// As [`refresh`](Self::refresh), with a mark of that token.
    async fn refresh_to(&self, slot: &mut Option<Replica>, token: Token) -> Result<(), Error> {
        let replica = self.loaded(slot).await?;
        let refreshed = self.read_to_mark(replica, token).await;
        match &refreshed {
            Ok(()) => replica.fresh = true,
            Err(_) => self.discard(slot).await,
        }
        refreshed
    }

    async fn read_to_mark(&self, replica: &mut Replica, token: Token) -> Result<(), Error> {
        let mark = encode_mark(token);
        replica.policy.make_room(mark.len()).await?;
        self.publisher
            .publish(vec![Message::new(mark)])
            .await
            .map_err(nothing_done)?;
        replica.read_until(token).await?;
        Ok(())
    }

    /// Makes the next call start over, on another connection.
    async fn discard(&self, slot: &mut Option<Replica>) {
        if let Some(replica) = slot.take() {
            replica.discard().await;
        }
    }

    /// Waits for an entry.
    async fn follow(&self) -> Result<(), Error> {
        loop {
            let mut called = pin!(self.turns.called());
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
                followed = replica.follow() => followed,
            };
            if followed.is_err() {
                self.discard(&mut slot).await;
            }
            return followed;
        }
    }

    /// Reads the entries that have arrived, without waiting for more.
    async fn read_ready(&self, slot: &mut Option<Replica>) -> Result<(), Error> {
        let Some(replica) = slot else { return Ok(()) };
        let read = replica.read_ready().await;
        if read.is_err() {
            self.discard(slot).await;
        }
        read
    }

    async fn exists(&self) -> Result<bool, Error> {
        let asking = &self.scope.server.asking;
        let connection = asking.connection().await?;
        let found = stream::exists(&self.scope.server, &connection, &self.scope.stream).await;
        // The broker has closed a channel to say no.
        if !matches!(found, Ok(true)) {
            asking.forget(&connection).await;
        }
        found
    }

    /// Whether a hint of this owner has no effect for certain: the position has another owner or
    /// does not exist.
    async fn is_in_vain(&self, owner: Owner) -> Result<bool, Error> {
        match self.has_loaded.load(Ordering::Relaxed) {
            true => Ok(self.fold.read().owner != Some(owner)),
            false => Ok(!self.exists().await?),
        }
    }
}

fn position_of(fold: &Fold<State>) -> Option<Position> {
    let (log, next) = fold.place.clone()?;
    let mut position = Position::new(log, next, fold.revision);
    (position.owner, position.note) = (fold.owner, fold.note.clone());
    position.journal = fold.journal.clone();
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
    unique().max(1)
}
