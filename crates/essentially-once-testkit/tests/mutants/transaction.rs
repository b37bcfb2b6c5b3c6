//! The model's transaction. It takes no lock until it commits, so transactions race as they do
//! between machines.

use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, Outbox, async_trait,
    backend::{Advance, DeadLetters, Position, Transaction},
};
use essentially_once_testkit::{Cut, Request};
use tokio::{task::yield_now, time::sleep};

use crate::{
    defect::Defect,
    letters,
    model::{KEY_LIMIT, Shared, Stage, State, VALUE_LIMIT, in_doubt},
    outbox::{self, Sent},
    store::{Contents, Handle, state_key},
};

/// The pause between a check and the write that it should be part of. Long enough for every rival
/// to be checked too.
const CHECK_TO_WRITE: Duration = Duration::from_millis(1);
/// How late a cancelled commit arrives: after the rounds of a case, and before the case checks
/// again.
const LATE: Duration = Duration::from_millis(30);

/// The staged writes. `None` deletes.
pub(crate) type Staged = BTreeMap<Bytes, Option<Bytes>>;

pub(crate) struct ModelTx {
    pub(crate) shared: Arc<Shared>,
    generation: u64,
    pub(crate) handle: Arc<Handle>,
    pub(crate) consumer: ConsumerId,
    pub(crate) staged: Staged,
    /// The names under which this transaction wrote natively.
    native: Vec<String>,
    /// The records to send.
    pub(crate) sent: Vec<Sent>,
    /// Whether a defect keeps it from committing.
    pub(crate) is_spoiled: bool,
    finished: bool,
    /// The numbers of beats, snapshots and positions read when it began.
    begun: (u64, u64, u64),
}

impl ModelTx {
    pub(crate) async fn begin(
        shared: Arc<Shared>,
        generation: u64,
        handle: Arc<Handle>,
        consumer: &ConsumerId,
    ) -> Result<Self, Error> {
        while shared.is(Defect::DroppedTransactionKeepsLock) && mem::replace(&mut shared.state().store.locked, true) {
            sleep(CHECK_TO_WRITE).await;
        }
        if shared.is(Defect::BeginCountsARevision) {
            let mut state = shared.connected(generation)?;
            let stored = state.store.live.consumers.get_mut(consumer.as_str());
            if let Some(position) = stored.and_then(|stored| stored.position.as_mut()) {
                position.revision = position.revision.next_count();
            }
        }
        let begun = {
            let mut state = shared.state();
            if shared.is(Defect::ConsumersListedFromBegin) {
                state.store.list(consumer);
            }
            state.store.open += 1;
            (state.store.beats, state.store.snapshots, state.store.positions)
        };
        Ok(Self {
            shared,
            generation,
            handle,
            consumer: consumer.clone(),
            staged: Staged::new(),
            native: Vec::new(),
            sent: Vec::new(),
            is_spoiled: false,
            finished: false,
            begun,
        })
    }

    pub(crate) fn put_natively(&mut self, name: &str) -> Result<(), Error> {
        let mut state = self.connected()?;
        if self.shared.is(Defect::NativeAppliedAtOnce) {
            state.store.write_natively(&[name.to_owned()]);
            return Ok(());
        }
        drop(state);
        self.native.push(name.to_owned());
        Ok(())
    }

    /// Applies the native writes, as often as a defect demands.
    fn apply_natively(&self, state: &mut State) {
        let times = match self.shared.defect {
            Defect::NativeNotCommitted => 0,
            Defect::NativeAppliedTwice => 2,
            _ => 1,
        };
        for _ in 0..times {
            state.store.write_natively(&self.native);
        }
    }

    /// Refuses a key over the limit, or one that a defect does not accept.
    fn check_key(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        let limit = match self.shared.defect {
            Defect::EmptyKeyRefused if key.is_empty() => return Err(Error::failed("put", "the key is empty")),
            Defect::ValuesOf64KibRefused if value.len() > usize::from(u16::MAX) => {
                return Err(Error::failed("put", "the value is too long"));
            }
            Defect::KeysOver255Refused => 255,
            Defect::KeyLimitIsExclusive => KEY_LIMIT - 1,
            Defect::NoKeyLimit => usize::MAX,
            _ => KEY_LIMIT,
        };
        if key.len() <= limit {
            return Ok(());
        }
        if self.shared.is(Defect::RefusedKeyStaged) {
            let fits = Bytes::copy_from_slice(&key[..limit]);
            self.staged.insert(fits, Some(Bytes::copy_from_slice(value)));
        }
        Err(Error::TooLarge {
            what: "key",
            size: key.len(),
            limit,
        })
    }

    pub(crate) fn connected(&self) -> Result<MutexGuard<'_, State>, Error> {
        self.shared.connected(self.generation)
    }

    /// Refuses a value over the limit. A defect may act on it first.
    fn check_size(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        let limit = match self.shared.defect {
            Defect::ValueLimitIsExclusive => VALUE_LIMIT - 1,
            _ => VALUE_LIMIT,
        };
        if value.len() <= limit || self.shared.is(Defect::NoValueLimit) {
            return Ok(());
        }
        match self.shared.defect {
            Defect::RefusedValueStaged => {
                let fits = Bytes::copy_from_slice(&value[..limit]);
                self.staged.insert(Bytes::copy_from_slice(key), Some(fits));
            }
            Defect::RefusedValueDropsTheStaged => self.staged.clear(),
            Defect::ValueRefusalNamesNoLimit => return Err(Error::failed("put", "too large")),
            _ => {}
        }
        Err(Error::TooLarge {
            what: "value",
            size: value.len(),
            limit,
        })
    }

    /// Applies the staged writes and the position: in one step, unless a defect separates them.
    async fn apply(&self, staged: &Staged, advance: &Advance) -> Result<(), Error> {
        if self.shared.is(Defect::RevisionCheckedOutside) {
            self.connected()?
                .store
                .check(&self.shared, &self.consumer, staged, advance)?;
            sleep(CHECK_TO_WRITE).await;
        }
        {
            let mut state = self.connected().map_err(in_doubt)?;
            let store = &mut state.store;
            if let Some(leftover) = store.leftover.take() {
                store.live = leftover;
            }
            if !self.shared.is(Defect::RevisionCheckedOutside) {
                store.check(&self.shared, &self.consumer, staged, advance)?;
            }
            outbox::commit(self, &mut state)?;
            let store = &mut state.store;
            store.before_change(&self.shared, staged.is_empty() && advance.windows.is_empty());
            if self.shared.is(Defect::EmptyCommitKeptInTheHandle) && staged.is_empty() {
                let mut kept = Position::new(advance.log.clone(), advance.next, advance.revision);
                (kept.owner, kept.note) = (advance.owner, advance.note.clone());
                let mut positions = self.handle.positions.lock().unwrap_or_else(PoisonError::into_inner);
                positions.insert(self.consumer.to_string(), kept);
                return Ok(());
            }
            if self.shared.is(Defect::NativeAppliedFirst) {
                self.apply_natively(&mut state);
            }
            let store = &mut state.store;
            if self.shared.is(Defect::StateKeptInTheHandle) {
                let mut cache = self.handle.cache.lock().unwrap_or_else(PoisonError::into_inner);
                for (key, value) in staged {
                    cache.insert(state_key(Defect::None, &self.consumer, key), value.clone());
                }
            } else {
                store.write_state(&self.shared, &self.consumer, staged);
            }
            match self.shared.defect {
                Defect::OffsetCommittedApart | Defect::SnapshotSeesHalfACommit | Defect::SentApartFromTheCommit => {}
                Defect::WindowsWrittenApart => {
                    let mut alone = advance.clone();
                    alone.windows.clear();
                    store.write_position(&self.shared, &self.consumer, alone);
                }
                defect => {
                    store.write_position(&self.shared, &self.consumer, advance.clone());
                    if defect != Defect::NativeAppliedFirst {
                        self.apply_natively(&mut state);
                    }
                    return Ok(());
                }
            }
        }
        if matches!(
            self.shared.defect,
            Defect::SnapshotSeesHalfACommit | Defect::WindowsWrittenApart | Defect::SentApartFromTheCommit
        ) {
            sleep(CHECK_TO_WRITE).await;
        }
        self.shared
            .travel(self.generation, Stage::Halfway)
            .await
            .map_err(in_doubt)?;
        let mut state = self.connected().map_err(in_doubt)?;
        state
            .store
            .write_position(&self.shared, &self.consumer, advance.clone());
        Ok(())
    }

    /// Applies the commits that a defect acknowledged before, and delays this one.
    fn apply_the_one_before(&self, staged: Staged, advance: Advance) -> Result<(), Error> {
        let mut waiting = self
            .handle
            .not_yet_applied
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut state = self.connected()?;
        for (consumer, staged, advance) in waiting.drain(..) {
            state.store.write_state(&self.shared, &consumer, &staged);
            state.store.write_position(&self.shared, &consumer, advance);
        }
        waiting.push((self.consumer.clone(), staged, advance));
        Ok(())
    }
}

#[async_trait]
impl Transaction for ModelTx {
    const KEEPS_DEAD_LETTERS: bool = true;

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        Some(self)
    }

    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        Some(self)
    }

    async fn commit(mut self, advance: Advance) -> Result<(), Error> {
        self.finished = true;
        {
            let state = self.shared.state();
            let (beats, snapshots) = (state.store.beats != self.begun.0, state.store.snapshots != self.begun.1);
            let positions = state.store.positions != self.begun.2;
            match self.shared.defect {
                Defect::BeatEndsTransactions if beats => {
                    return Err(Error::failed("commit", "no transaction is open"));
                }
                Defect::PositionHoldsUpCommits if positions => {
                    return Err(Error::unavailable("commit", "a reader holds a lock"));
                }
                Defect::SnapshotHoldsUpCommits if snapshots => {
                    return Err(Error::unavailable("commit", "a reader holds a lock"));
                }
                _ => {}
            }
        }
        let mut staged = mem::take(&mut self.staged);
        letters::committed(self.shared.defect, &mut staged);
        if self.is_spoiled || self.handle.dead.load(Ordering::SeqCst) {
            return Err(Error::failed("commit", "the connection is in an aborted transaction"));
        }
        self.shared.travel(self.generation, Stage::Request).await?;
        let cut = self.shared.cut(Request::Commit);
        let lost = || Error::unavailable("commit", "the connection was cut");
        if cut == Some(Cut::BeforeRequest) {
            outbox::send_if(&self, &mut self.shared.state(), Defect::SentInAnEarlierRequest);
            return match self.shared.defect {
                Defect::LostCommitRequestToldAsSuccess => Ok(()),
                Defect::LostRepliesLookedUp | Defect::LostCommitReplyToldAsFailure => Err(lost()),
                _ => Err(in_doubt(lost())),
            };
        }
        if self.shared.is(Defect::CommitAppliedAfterReply) {
            return self.apply_the_one_before(staged, advance);
        }
        let mut watch = CancelWatch::new(&self, &staged, &advance);
        self.shared
            .travel(self.generation, Stage::Begun)
            .await
            .map_err(in_doubt)?;
        let applied = self.apply(&staged, &advance).await;
        if self.shared.is(Defect::CompactsEvery100Commits) && self.shared.state().store.commits.is_multiple_of(100) {
            for _ in 0..10 {
                yield_now().await;
            }
        }
        {
            let mut state = self.shared.state();
            state.store.locked = false;
            match applied {
                Err(Error::Fenced { .. }) => outbox::not_committed(&self, &mut state, Defect::SentAlthoughFenced),
                Err(Error::WrongLog { .. }) => outbox::not_committed(&self, &mut state, Defect::SentAlthoughWrongLog),
                _ => {}
            }
            if matches!(applied, Err(Error::Fenced { .. })) && self.shared.is(Defect::NativeNotFenced) {
                state.store.write_natively(&self.native);
            }
            if matches!(applied, Err(Error::Fenced { .. })) && self.shared.is(Defect::LettersNotFenced) {
                let letters = letters::only_letters(&staged);
                state.store.write_state(&self.shared, &self.consumer, &letters);
            }
            if matches!(applied, Err(Error::Fenced { .. })) && self.shared.is(Defect::JournalNotFenced) {
                let stored = state.store.live.consumers.get_mut(self.consumer.as_str());
                let position = stored.and_then(|stored| stored.position.as_mut());
                if let (Some(position), Some(journal)) = (position, &advance.journal) {
                    position.journal = journal.clone();
                }
            }
        }
        self.shared.commits.send_replace(());
        self.handle.own_commits.send_replace(());
        if matches!(applied, Err(Error::Fenced { .. })) && self.shared.is(Defect::HandleDeadAfterFenced) {
            self.handle.dead.store(true, Ordering::SeqCst);
        }
        let mut replied = self.shared.travel(self.generation, Stage::Reply).await;
        if cut == Some(Cut::BeforeReply) {
            outbox::send_if(&self, &mut self.shared.state(), Defect::SentAgainAfterLostReply);
            outbox::reply_lost(&self, &mut self.shared.state());
        }
        if cut == Some(Cut::BeforeReply) && !self.shared.is(Defect::LostRepliesLookedUp) {
            replied = Err(lost());
        }
        watch.finished = true;
        match (replied, self.shared.defect) {
            (Ok(()), _) => applied,
            (Err(error), Defect::LostCommitReplyToldAsFailure) => Err(error),
            (Err(error), Defect::CommitRetriedAfterLostReply) => {
                let mut state = self.shared.state();
                // The second attempt is checked like any other commit, so the first one fences it.
                state.store.check(&self.shared, &self.consumer, &staged, &advance)?;
                Err(in_doubt(error))
            }
            (Err(error), _) => Err(in_doubt(error)),
        }
    }

    async fn rollback(mut self) -> Result<(), Error> {
        self.finished = true;
        let mut state = self.connected()?;
        state.store.locked = false;
        outbox::not_committed(&self, &mut state, Defect::SentAlthoughRolledBack);
        if self.shared.is(Defect::RolledBackConsumersListed) {
            state.store.list(&self.consumer);
        }
        if self.shared.is(Defect::RollbackApplied) {
            state.store.write_state(&self.shared, &self.consumer, &self.staged);
        }
        Ok(())
    }
}

impl Drop for ModelTx {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state();
            state.store.open = state.store.open.saturating_sub(1);
            state.store.staging.clear();
            if !self.finished {
                outbox::not_committed(self, &mut state, Defect::SentAlthoughDropped);
            }
            if !self.finished && self.shared.is(Defect::NativeAppliedByDrop) {
                state.store.write_natively(&self.native);
            }
        }
        if !self.finished && self.shared.is(Defect::DroppedTransactionApplied) {
            let mut state = self.shared.state();
            state.store.write_state(&self.shared, &self.consumer, &self.staged);
        }
    }
}

/// Notices a cancelled commit, for the defects that act later.
struct CancelWatch {
    shared: Arc<Shared>,
    consumer: ConsumerId,
    staged: Staged,
    advance: Advance,
    before: Option<Contents>,
    finished: bool,
}

impl CancelWatch {
    fn new(tx: &ModelTx, staged: &Staged, advance: &Advance) -> Self {
        let takes_back = tx.shared.is(Defect::CancelledCommitTakenBackLater);
        Self {
            shared: Arc::clone(&tx.shared),
            consumer: tx.consumer.clone(),
            staged: staged.clone(),
            advance: advance.clone(),
            before: takes_back.then(|| tx.shared.state().store.live.clone()),
            finished: false,
        }
    }
}

impl Drop for CancelWatch {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Some(before) = self.before.take() {
            self.shared.state().store.leftover = Some(before);
        }
        if self.shared.is(Defect::CancelledCommitComesLateUnchecked) {
            let shared = Arc::clone(&self.shared);
            let (consumer, staged, advance) =
                (self.consumer.clone(), mem::take(&mut self.staged), self.advance.clone());
            tokio::spawn(async move {
                sleep(LATE).await;
                let mut state = shared.state();
                let revision = advance.revision;
                state.store.write_state(&shared, &consumer, &staged);
                state.store.write_position(&shared, &consumer, advance);
                let stored = state.store.live.consumers.get_mut(consumer.as_str());
                if let Some(position) = stored.and_then(|stored| stored.position.as_mut()) {
                    position.revision = revision;
                }
            });
        }
    }
}

#[async_trait]
impl KeyValue for ModelTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        let defect = self.shared.defect;
        if defect == Defect::FailedReadForgotten && self.connected().is_err() {
            self.generation = self.shared.state().generation;
            return Err(Error::unavailable("get", "the connection was lost"));
        }
        let state = self.connected()?;
        let place = state_key(defect, &self.consumer, key);
        let stored = state.store.live.state.get(&place).cloned();
        let staged = self.staged.get(key).filter(|staged| match defect {
            Defect::GetDoesNotSeePut => staged.is_none(),
            Defect::GetDoesNotSeeDelete => staged.is_some(),
            _ => true,
        });
        let found = match staged {
            Some(staged) => staged.clone(),
            None if defect == Defect::GetSeesOnlyOwnWrites => None,
            None => stored,
        };
        let mut cache = self.handle.cache.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(match defect {
            Defect::EmptyValueReadAsNone => found.filter(|found| !found.is_empty()),
            Defect::StateKeptInTheHandle => cache.get(&place).cloned().flatten(),
            Defect::GetServedFromAStaleCache => cache.entry(place).or_insert(found).clone(),
            _ => found,
        })
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        drop(self.connected()?);
        self.check_key(key, value)?;
        self.check_size(key, value)?;
        if self.shared.is(Defect::SnapshotSeesWhatIsStaged) {
            let place = state_key(self.shared.defect, &self.consumer, key);
            let value = Some(Bytes::copy_from_slice(value));
            self.connected()?.store.staging.insert(place, value);
        }
        let staged = self.staged.get(key);
        match (self.shared.defect, staged) {
            (Defect::SecondPutIgnored, Some(Some(_))) | (Defect::PutAfterDeleteIgnored, Some(None)) => {}
            _ => {
                let value = Bytes::copy_from_slice(value);
                self.staged.insert(Bytes::copy_from_slice(key), Some(value));
            }
        }
        Ok(())
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        drop(self.connected()?);
        if !self.shared.is(Defect::DeleteOfOwnPutIgnored) || !self.staged.contains_key(key) {
            self.staged.insert(Bytes::copy_from_slice(key), None);
        }
        Ok(())
    }
}
