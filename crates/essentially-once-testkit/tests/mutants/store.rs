//! The model's store: what commits changed, and what of it a restart keeps.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, atomic::AtomicBool},
};

use bytes::Bytes;
use essentially_once::{
    Advance, ConsumerId, Durability, Epoch, Error, LogId, Numbering, Offset, OffsetStore, Position, Revision, Window,
    async_trait,
};

use crate::{
    defect::Defect,
    model::{Shared, Stage},
    transaction::{ModelTx, Staged},
};

/// How many consumers the defect that forgets some keeps.
const CONSUMERS_KEPT: usize = 500;
/// How many sequences the defect with the small window keeps.
const SMALL_WINDOW: u64 = 64;

/// What is kept of one consumer.
#[derive(Clone, Default)]
pub(crate) struct Stored {
    pub(crate) position: Option<Position>,
    pub(crate) windows: BTreeMap<Numbering, Window>,
}

impl Stored {
    pub(crate) fn revision(&self) -> Revision {
        self.position
            .as_ref()
            .map_or(Revision::NONE, |position| position.revision)
    }
}

/// All that can be lost or kept at a restart.
#[derive(Clone, Default)]
pub(crate) struct Contents {
    pub(crate) consumers: HashMap<String, Stored>,
    /// By consumer, then by key.
    pub(crate) state: BTreeMap<(String, Bytes), Bytes>,
}

#[derive(Default)]
pub(crate) struct StoreState {
    pub(crate) live: Contents,
    /// What a restart comes back with, where a defect makes that something else than what is live.
    flushed: Option<Contents>,
    /// Counts the commits of all consumers.
    pub(crate) commits: u64,
    /// A lock that only a defect takes.
    pub(crate) locked: bool,
    /// What a cancelled commit left to be taken back, which only a defect does.
    pub(crate) leftover: Option<Contents>,
}

impl StoreState {
    /// To be called before each change: defects that flush late come back with what was there then.
    pub(crate) fn before_change(&mut self, shared: &Shared) {
        if shared.is(Defect::CommitAcknowledgedBeforeDurable) {
            self.flushed = Some(self.live.clone());
        }
    }

    pub(crate) fn restart(&mut self, shared: &Shared) {
        match shared.defect {
            Defect::CommitAcknowledgedBeforeDurable => self.live = self.flushed.take().unwrap_or_default(),
            Defect::StateNotDurable => self.live.state.clear(),
            Defect::WindowsNotDurable => {
                for stored in self.live.consumers.values_mut() {
                    stored.windows.clear();
                }
            }
            _ => {}
        }
        self.locked = false;
    }

    /// The check that is part of every commit; a defect may let something through, or leave something behind.
    pub(crate) fn check(
        &mut self,
        shared: &Shared,
        consumer: &ConsumerId,
        staged: &Staged,
        advance: &Advance,
    ) -> Result<(), Error> {
        let stored = self.live.consumers.get(&position_key(shared.defect, consumer));
        let revision = stored.map_or(Revision::NONE, Stored::revision);
        let log = stored
            .and_then(|stored| stored.position.as_ref())
            .map(|position| position.log.clone());
        let expected = advance.expected;
        let is_current = match shared.defect {
            Defect::NoRevisionCheck => true,
            Defect::FirstCommitNotChecked if expected == Revision::NONE => true,
            Defect::LaterRevisionAccepted => expected >= revision,
            _ => expected == revision,
        };
        if let Some(log) = log.as_ref().filter(|log| !log.is_same_log(&advance.log))
            && shared.is(Defect::WrongLogBeforeFenced)
        {
            return self.refuse_log(shared, consumer, staged, advance, log.clone());
        }
        if !is_current {
            let mut left = advance.clone();
            match shared.defect {
                Defect::FencedCommitMovesOffset => {
                    left.windows.clear();
                    self.write_position(shared, consumer, left);
                }
                Defect::FencedCommitLeavesWindows => {
                    if let Some(stored) = self.live.consumers.get_mut(consumer.as_str()) {
                        stored.windows.extend(left.windows);
                    }
                }
                Defect::FencedCommitLeavesState => self.write_state(shared, consumer, staged),
                Defect::FencedToldAsFailure => return Err(Error::failed("commit", "constraint violated")),
                _ => {}
            }
            let expected = if shared.is(Defect::FencedTellsWrongRevision) {
                revision
            } else {
                expected
            };
            return Err(Error::Fenced {
                consumer: consumer.clone(),
                expected,
            });
        }
        match log {
            Some(stored) if !stored.is_same_log(&advance.log) => {
                self.refuse_log(shared, consumer, staged, advance, stored)
            }
            _ => Ok(()),
        }
    }

    fn refuse_log(
        &mut self,
        shared: &Shared,
        consumer: &ConsumerId,
        staged: &Staged,
        advance: &Advance,
        stored: LogId,
    ) -> Result<(), Error> {
        match shared.defect {
            Defect::OtherLogAccepted => return Ok(()),
            Defect::OtherLogMovesOffset => self.write_position(shared, consumer, advance.clone()),
            Defect::OtherLogLeavesState => self.write_state(shared, consumer, staged),
            _ => {}
        }
        Err(Error::WrongLog {
            consumer: consumer.clone(),
            stored: if shared.is(Defect::WrongLogNamesTheGiven) {
                advance.log.clone()
            } else {
                stored
            },
            given: advance.log.clone(),
        })
    }

    pub(crate) fn write_state(&mut self, shared: &Shared, consumer: &ConsumerId, staged: &Staged) {
        let defect = shared.defect;
        if defect == Defect::CommitWipesStateOfOthers {
            self.live.state.retain(|(owner, _), _| owner == consumer.as_str());
        }
        for (key, value) in staged {
            let key = state_key(defect, consumer, key);
            match value {
                Some(value) => self.live.state.insert(key, kept_value(defect, value)),
                None if defect == Defect::DeletesNotCommitted => None,
                None => self.live.state.remove(&key),
            };
        }
    }

    pub(crate) fn write_position(&mut self, shared: &Shared, consumer: &ConsumerId, advance: Advance) {
        let defect = shared.defect;
        self.commits += 1;
        let full = self.live.consumers.len() >= CONSUMERS_KEPT;
        if defect == Defect::OldConsumersForgotten && full {
            self.live.consumers.clear();
        }
        let stored = self.live.consumers.entry(position_key(defect, consumer)).or_default();
        let before = stored.position.take();
        let log = match (defect, &before) {
            (Defect::IncarnationNotKept, _) => LogId::new(advance.log.name()).unwrap_or(advance.log),
            (Defect::IncarnationWiped, _) | (_, None) => advance.log,
            (_, Some(before)) if advance.log.incarnation().is_none() => before.log.clone(),
            _ => advance.log,
        };
        let next = match (defect, &before) {
            (Defect::HighPartOfOffsetNotKept, _) => advance.next.lo().into(),
            (Defect::PositionNeverGoesBack, Some(before)) => advance.next.max(before.next),
            (Defect::PositionNotCommitted, Some(before)) => before.next,
            _ => advance.next,
        };
        let revision = match (defect, &before) {
            (Defect::RevisionNotCounted, Some(before)) => before.revision,
            (Defect::RevisionsCountedForAll, _) => Revision::new(advance.revision.epoch(), self.commits),
            (Defect::RevisionCountedByTheStore, Some(before)) => before.revision.next_count(),
            (Defect::EpochOfRevisionNotKept, _) => Revision::new(1, advance.revision.count()),
            _ => advance.revision,
        };
        let mut position = Position::new(log, next, revision);
        position.owner = match (defect, &before) {
            (Defect::OwnerNotKept, _) => None,
            (Defect::OwnerKeptForever, Some(before)) => before.owner.or(advance.owner),
            _ => advance.owner,
        };
        position.passed = match (defect, &before) {
            (Defect::PassedNotKept, _) => None,
            (Defect::PassedStays, Some(before)) => advance.passed.or(before.passed),
            _ => advance.passed,
        };
        stored.position = Some(position);
        match defect {
            Defect::WindowsNotPersisted => return,
            Defect::WindowsReplacedAsAWhole if !advance.windows.is_empty() => stored.windows.clear(),
            _ => {}
        }
        for (mut numbering, window) in advance.windows {
            if defect == Defect::WindowsWrittenOnce && stored.windows.contains_key(&numbering) {
                continue;
            }
            if defect == Defect::WindowsByProducerOnly {
                numbering = Numbering::new(numbering.producer().clone(), Epoch::STABLE);
            }
            stored.windows.insert(numbering, kept_window(defect, &window));
        }
        for producer in &advance.forgotten {
            match defect {
                Defect::ForgottenWindowsStay => {}
                Defect::ForgettingTakesAllWindows => stored.windows.clear(),
                _ => drop(stored.windows.remove(producer)),
            }
        }
    }
}

fn position_key(defect: Defect, consumer: &ConsumerId) -> String {
    match defect {
        Defect::PositionSharedBetweenConsumers => "all".to_owned(),
        _ => consumer.to_string(),
    }
}

/// Where a value is kept: a case sees to it that no two consumers and no two keys share one place.
pub(crate) fn state_key(defect: Defect, consumer: &ConsumerId, key: &[u8]) -> (String, Bytes) {
    let owner = consumer.to_string();
    let text = || String::from_utf8_lossy(key).into_owned();
    match defect {
        Defect::StateSharedBetweenConsumers => (String::new(), Bytes::copy_from_slice(key)),
        Defect::KeysJoinedToNames => (String::new(), [owner.as_bytes(), b":", key].concat().into()),
        Defect::KeysAppendedToNames => (String::new(), [owner.as_bytes(), key].concat().into()),
        Defect::KeysKeptAsText => (owner, text().into()),
        Defect::KeysIgnoreCase => (owner, text().to_lowercase().into()),
        Defect::KeysEndAtZero => {
            let end = key.iter().position(|byte| *byte == 0).unwrap_or(key.len());
            (owner, Bytes::copy_from_slice(&key[..end]))
        }
        _ => (owner, Bytes::copy_from_slice(key)),
    }
}

fn kept_value(defect: Defect, value: &Bytes) -> Bytes {
    match defect {
        Defect::LargeValuesCut => value.slice(..value.len().min(65_535)),
        Defect::ValuesKeptAsText => String::from_utf8_lossy(value).into_owned().into(),
        _ => value.clone(),
    }
}

/// A window as it comes back: rebuilt from its numbers, where a defect keeps it as such.
fn kept_window(defect: Defect, window: &Window) -> Window {
    let mut encoded = window.encode();
    let size = match defect {
        Defect::WindowReadAsSigned => {
            encoded[1] &= 0x7F;
            return Window::decode(&encoded).unwrap_or_else(|_| window.clone());
        }
        Defect::WindowTooSmall => SMALL_WINDOW,
        Defect::WindowLosesItsLastOffset => Window::SIZE,
        _ => return window.clone(),
    };
    let highest = encoded[1..9]
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte));
    let mut kept = Window::new(highest);
    for sequence in (highest.saturating_sub(size)..highest).filter(|sequence| window.is_seen(*sequence)) {
        kept.mark(sequence);
    }
    kept
}

/// What a handle of the store has of its own, beside its connection: of use to defects only.
#[derive(Default)]
pub(crate) struct Handle {
    pub(crate) dead: AtomicBool,
    pub(crate) cache: Mutex<HashMap<(String, Bytes), Option<Bytes>>>,
    pub(crate) not_yet_applied: Mutex<Vec<(ConsumerId, Staged, Advance)>>,
}

/// A handle of the store, as one process would have it.
pub(crate) struct ModelStore {
    shared: Arc<Shared>,
    generation: u64,
    handle: Arc<Handle>,
}

impl ModelStore {
    pub(crate) fn new(shared: Arc<Shared>, generation: u64) -> Self {
        Self {
            shared,
            generation,
            handle: Arc::default(),
        }
    }
}

#[async_trait]
impl OffsetStore for ModelStore {
    type Tx = ModelTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.shared.travel(self.generation, Stage::Idle).await?;
        let state = self.shared.connected(self.generation)?;
        let stored = state
            .store
            .live
            .consumers
            .get(&position_key(self.shared.defect, consumer));
        let found = stored.and_then(|stored| {
            let mut position = stored.position.clone()?;
            position.windows = stored.windows.clone().into_iter().collect();
            Some(position)
        });
        match found {
            None if self.shared.is(Defect::FreshStoreHasAPosition) => Ok(Some(Position::new(
                LogId::new("unknown")?,
                Offset::ZERO,
                Revision::NONE,
            ))),
            found => Ok(found),
        }
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<ModelTx, Error> {
        self.shared.travel(self.generation, Stage::Idle).await?;
        ModelTx::begin(
            Arc::clone(&self.shared),
            self.generation,
            Arc::clone(&self.handle),
            consumer,
        )
        .await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.shared.durability([
            Defect::StoreDurabilityFails,
            Defect::StoreDurabilityWavers,
            Defect::StoreVolatileWithoutReason,
        ])
    }
}
