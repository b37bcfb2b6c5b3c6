//! The model's transaction. It takes no lock until it commits, so that transactions race as they do between machines.

use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use essentially_once::{Advance, ConsumerId, Error, KeyValue, Transaction, async_trait};
use tokio::time::sleep;

use crate::{
    defect::Defect,
    model::{Shared, Stage, State, VALUE_LIMIT, in_doubt},
    store::{Contents, Handle, state_key},
};

/// Between a check and the write that it should be part of: time enough for every rival to be checked too.
const CHECK_TO_WRITE: Duration = Duration::from_millis(1);
/// How late a cancelled commit comes: after the rounds of a case, and before it looks again.
const LATE: Duration = Duration::from_millis(30);

/// What to write; `None` deletes.
pub(crate) type Staged = BTreeMap<Bytes, Option<Bytes>>;

pub(crate) struct ModelTx {
    shared: Arc<Shared>,
    generation: u64,
    handle: Arc<Handle>,
    consumer: ConsumerId,
    staged: Staged,
    finished: bool,
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
        Ok(Self {
            shared,
            generation,
            handle,
            consumer: consumer.clone(),
            staged: Staged::new(),
            finished: false,
        })
    }

    fn connected(&self) -> Result<MutexGuard<'_, State>, Error> {
        self.shared.connected(self.generation)
    }

    /// Refuses a value over the limit; a defect may do something with it before.
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

    /// Applies what was staged and the position: in one step, unless a defect parts it.
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
            store.before_change(&self.shared);
            if self.shared.is(Defect::StateKeptInTheHandle) {
                let mut cache = self.handle.cache.lock().unwrap_or_else(PoisonError::into_inner);
                for (key, value) in staged {
                    cache.insert(state_key(Defect::None, &self.consumer, key), value.clone());
                }
            } else {
                store.write_state(&self.shared, &self.consumer, staged);
            }
            if !self.shared.is(Defect::OffsetCommittedApart) {
                store.write_position(&self.shared, &self.consumer, advance.clone());
                return Ok(());
            }
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

    /// Applies the commits that a defect acknowledged before, and keeps this one back.
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
    async fn commit(mut self, advance: Advance) -> Result<(), Error> {
        self.finished = true;
        let staged = mem::take(&mut self.staged);
        if self.handle.dead.load(Ordering::SeqCst) {
            return Err(Error::failed("commit", "the connection is in an aborted transaction"));
        }
        self.shared.travel(self.generation, Stage::Request).await?;
        if self.shared.is(Defect::CommitAppliedAfterReply) {
            return self.apply_the_one_before(staged, advance);
        }
        let mut watch = CancelWatch::new(&self, &staged, &advance);
        self.shared
            .travel(self.generation, Stage::Begun)
            .await
            .map_err(in_doubt)?;
        let applied = self.apply(&staged, &advance).await;
        self.shared.state().store.locked = false;
        if matches!(applied, Err(Error::Fenced { .. })) && self.shared.is(Defect::HandleDeadAfterFenced) {
            self.handle.dead.store(true, Ordering::SeqCst);
        }
        let replied = self.shared.travel(self.generation, Stage::Reply).await;
        watch.finished = true;
        match (replied, self.shared.defect) {
            (Ok(()), _) => applied,
            (Err(error), Defect::LostCommitReplyToldAsFailure) => Err(error),
            (Err(error), Defect::CommitRetriedAfterLostReply) => {
                let mut state = self.shared.state();
                // The second try is checked as any commit is, and so fenced by the first.
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
        if self.shared.is(Defect::RollbackApplied) {
            state.store.write_state(&self.shared, &self.consumer, &self.staged);
        }
        Ok(())
    }
}

impl Drop for ModelTx {
    fn drop(&mut self) {
        if !self.finished && self.shared.is(Defect::DroppedTransactionApplied) {
            let mut state = self.shared.state();
            state.store.write_state(&self.shared, &self.consumer, &self.staged);
        }
    }
}

/// Sees a commit being cancelled, for the defects that then do something later.
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
        self.check_size(key, value)?;
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
