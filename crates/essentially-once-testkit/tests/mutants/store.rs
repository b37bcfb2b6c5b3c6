//! The model's store: the changes that commits made, and which of them a restart keeps.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Epoch, Error, Offset, OffsetStore, ProducerId, ReadState, async_trait,
    backend::{
        Advance, Durability, Journal, LogId, Note, Numbering, Owner, Position, Pulse, Revision, Snapshot, Window,
    },
};
use tokio::{
    sync::watch,
    task::yield_now,
    time::{sleep, timeout},
};

use crate::{
    defect::Defect,
    letters,
    model::{Shared, Stage, State},
    names,
    outbox::Sent,
    transaction::{ModelTx, Staged},
};

/// How many consumers the forgetting defect keeps.
const CONSUMERS_KEPT: usize = 500;
/// How many sequences the defect with the small window keeps.
const SMALL_WINDOW: u64 = 64;
/// How many bytes of a key the cutting defect keeps.
const KEY_CUT: usize = 1_000;
/// The pause between two parts of a read, long enough for a commit.
const BETWEEN_PARTS: Duration = Duration::from_millis(1);
/// How far a pulse lags.
const LAG: Duration = Duration::from_millis(10);
/// The name under which the defect that shares windows keeps them.
const SHARED_WINDOWS: &str = "*";

/// The data of one consumer.
#[derive(Clone, Default)]
pub(crate) struct Stored {
    /// The consumer that committed first, with its full name.
    pub(crate) consumer: Option<ConsumerId>,
    pub(crate) position: Option<Position>,
    pub(crate) windows: BTreeMap<Numbering, Window>,
    /// The number of its commits.
    commits: u64,
    beats: u64,
    /// The position of the first commit, and that of the one before the last. Only defects use
    /// them.
    first: Option<Position>,
    previous: Option<Position>,
    /// When the pulse last changed, and its value before.
    changed: Option<(Instant, Pulse)>,
}

impl Stored {
    fn pulse(&self, defect: Defect) -> Pulse {
        if let Some((when, before)) = &self.changed
            && defect == Defect::PulseLags
            && when.elapsed() < LAG
        {
            return *before;
        }
        let position = match defect {
            Defect::PulseOnlyOfBeats => self.first.as_ref(),
            _ => self.position.as_ref(),
        };
        Pulse::new(position, self.beats)
    }

    /// Must be called before each change of the pulse.
    fn changes(&mut self) {
        self.changed = Some((Instant::now(), Pulse::new(self.position.as_ref(), self.beats)));
    }

    pub(crate) fn revision(&self) -> Revision {
        self.position
            .as_ref()
            .map_or(Revision::NONE, |position| position.revision)
    }
}

/// All data that a restart can lose or keep.
#[derive(Clone, Default)]
pub(crate) struct Contents {
    pub(crate) consumers: HashMap<String, Stored>,
    /// By consumer, then by key.
    pub(crate) state: BTreeMap<(String, Bytes), Bytes>,
    /// The commit that last wrote each value. Only defects use it.
    written: BTreeMap<(String, Bytes), u64>,
    pub(crate) native: BTreeMap<String, u64>,
}

#[derive(Default)]
pub(crate) struct StoreState {
    pub(crate) live: Contents,
    /// All letters ever parked. The state names their places here.
    pub(crate) letters: Vec<letters::Parked>,
    /// The data after a restart, where a defect makes it differ from the live data.
    flushed: Option<Contents>,
    /// The number of commits by all consumers.
    pub(crate) commits: u64,
    /// A lock that only a defect takes.
    pub(crate) locked: bool,
    /// The data to which a defect reverts after a cancelled commit.
    pub(crate) leftover: Option<Contents>,
    /// The number of open transactions, and of all beats, snapshots and
    /// positions read. Only defects use them.
    pub(crate) open: usize,
    pub(crate) beats: u64,
    pub(crate) snapshots: u64,
    pub(crate) positions: u64,
    /// The writes staged by open transactions, where a defect shows them to others.
    pub(crate) staging: BTreeMap<(String, Bytes), Option<Bytes>>,
    /// The data before the last commit, where a defect shows it.
    behind: Option<Contents>,
}

impl StoreState {
    /// Must be called before each change. Defects that flush late restart with this data.
    pub(crate) fn before_change(&mut self, shared: &Shared, is_empty: bool) {
        match shared.defect {
            Defect::CommitAcknowledgedBeforeDurable => self.flushed = Some(self.live.clone()),
            Defect::EmptyCommitNotDurable if is_empty => drop(self.flushed.get_or_insert_with(|| self.live.clone())),
            Defect::EmptyCommitNotDurable => self.flushed = None,
            Defect::SnapshotServedStale => self.behind = Some(self.live.clone()),
            _ => {}
        }
    }

    pub(crate) fn write_natively(&mut self, names: &[String]) {
        for name in names {
            *self.live.native.entry(name.clone()).or_default() += 1;
        }
    }

    pub(crate) fn restart(&mut self, shared: &Shared) {
        match shared.defect {
            Defect::CommitAcknowledgedBeforeDurable => self.live = self.flushed.take().unwrap_or_default(),
            Defect::EmptyCommitNotDurable => {
                if let Some(flushed) = self.flushed.take() {
                    self.live = flushed;
                }
            }
            Defect::StateNotDurable => self.live.state.clear(),
            Defect::WindowsNotDurable => {
                for stored in self.live.consumers.values_mut() {
                    stored.windows.clear();
                }
            }
            _ => {}
        }
        self.locked = false;
        self.open = 0;
    }

    /// The check within every commit. A defect may accept too much, or leave something behind.
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
        if let Some(log) = log
            .as_ref()
            .filter(|log| !is_same_log(shared.defect, log, &advance.log))
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
            if shared.is(Defect::FencedConsumersListed) {
                self.list(consumer);
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
            Some(stored) if !is_same_log(shared.defect, &stored, &advance.log) => {
                self.refuse_log(shared, consumer, staged, advance, stored)
            }
            _ => Ok(()),
        }
    }

    /// Lists a consumer that has no position.
    pub(crate) fn list(&mut self, consumer: &ConsumerId) {
        let stored = self.live.consumers.entry(consumer.as_str().to_owned()).or_default();
        stored.consumer.get_or_insert_with(|| consumer.clone());
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
        let stored = self.live.consumers.get(&position_key(defect, consumer));
        let commits = stored.map_or(0, |stored| stored.commits);
        for (key, value) in staged {
            let key = state_key(defect, consumer, key);
            if let Defect::ValuesLostAfter256Commits | Defect::ValuesLostAfter65536Commits = defect {
                self.live.written.insert(key.clone(), commits);
            }
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
        if defect == Defect::ForgottenForAllConsumers {
            for stored in self.live.consumers.values_mut() {
                stored
                    .windows
                    .retain(|numbering, _| !advance.forgotten.contains(numbering));
            }
        }
        if defect == Defect::WindowsSharedBetweenConsumers {
            let shared = self.live.consumers.entry(SHARED_WINDOWS.into()).or_default();
            shared.windows.extend(advance.windows.iter().cloned());
        }
        let stored = self.live.consumers.entry(position_key(defect, consumer)).or_default();
        stored.consumer.get_or_insert_with(|| consumer.clone());
        stored.changes();
        stored.commits += 1;
        if defect == Defect::BeatsStartOverAtCommits {
            stored.beats = 0;
        }
        let lost = match defect {
            Defect::ValuesLostAfter256Commits => stored.commits.checked_sub(256),
            Defect::ValuesLostAfter65536Commits => stored.commits.checked_sub(65_536),
            _ => None,
        };
        if let Some(lost) = lost {
            let written = &self.live.written;
            self.live
                .state
                .retain(|key, _| written.get(key).is_some_and(|commit| *commit >= lost));
        }
        let before = stored.position.take();
        stored.previous = before.clone().map(|mut previous| {
            previous.windows = stored.windows.clone().into_iter().collect();
            previous
        });
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
        position.note = match (defect, &before) {
            (Defect::NoteNotKept, _) => Note::default(),
            (Defect::NoteStays, Some(before)) if advance.note == Note::default() => before.note.clone(),
            (Defect::NoteOfFixedLength, _) if advance.note.tried().is_some() => Note::default(),
            _ => advance.note,
        };
        position.journal = match (defect, &before, advance.journal) {
            (Defect::JournalDropped, _, None) => Journal::default(),
            (Defect::JournalWrittenOnce, Some(before), _) if before.journal != Journal::default() => {
                before.journal.clone()
            }
            (Defect::JournalsOver4KibLost, _, Some(journal)) if journal.encode().len() > 4_096 => Journal::default(),
            (_, Some(before), None) => before.journal.clone(),
            (_, _, journal) => journal.unwrap_or_default(),
        };
        stored.first.get_or_insert_with(|| position.clone());
        stored.position = Some(position);
        match defect {
            Defect::CommitsCountedInAByte if stored.commits.is_multiple_of(256) => stored.position = None,
            Defect::CommitsCountedIn16Bits if stored.commits.is_multiple_of(65_536) => stored.position = None,
            _ => {}
        }
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
            stored
                .windows
                .insert(kept_numbering(defect, &numbering), kept_window(defect, &window));
        }
        for producer in &advance.forgotten {
            match defect {
                Defect::ForgottenWindowsStay => {}
                Defect::ForgettingTakesAllWindows => stored.windows.clear(),
                _ => drop(stored.windows.remove(&kept_numbering(defect, producer))),
            }
        }
    }
}

fn position_key(defect: Defect, consumer: &ConsumerId) -> String {
    match defect {
        Defect::PositionSharedBetweenConsumers => "all".to_owned(),
        _ => consumer_key(defect, consumer),
    }
}

/// The name under which a consumer is stored.
fn consumer_key(defect: Defect, consumer: &ConsumerId) -> String {
    let name = consumer.as_str();
    match defect {
        Defect::ConsumerNamesIgnoreCase => names::without_case(name),
        Defect::ConsumerNamesCut => names::cut(name),
        Defect::ConsumerSeparatorsFallTogether => names::without_separators(name),
        Defect::NamesKeptAsDigests => names::digest(name.as_bytes()),
        _ => name.to_owned(),
    }
}

/// The name under which a producer is stored.
fn kept_numbering(defect: Defect, numbering: &Numbering) -> Numbering {
    let name = numbering.producer().as_str();
    let kept = match defect {
        Defect::ProducerNamesIgnoreCase => names::without_case(name),
        Defect::ProducerNamesCut => names::cut(name),
        Defect::ProducerSeparatorsFallTogether => names::without_separators(name),
        _ => return numbering.clone(),
    };
    let producer = ProducerId::new(kept).unwrap_or_else(|_| numbering.producer().clone());
    Numbering::new(producer, numbering.epoch())
}

fn is_same_log(defect: Defect, stored: &LogId, given: &LogId) -> bool {
    match (defect, stored.incarnation(), given.incarnation()) {
        (Defect::UnknownIncarnationRefused, Some(_), None) | (Defect::KnownIncarnationRefused, None, Some(_)) => false,
        (Defect::UnknownIncarnationMatchesAnyName, _, None) => true,
        _ => stored.is_same_log(given),
    }
}

/// The key under which a value is stored. A case checks that no two consumers and no two keys share
/// one.
pub(crate) fn state_key(defect: Defect, consumer: &ConsumerId, key: &[u8]) -> (String, Bytes) {
    let owner = consumer_key(defect, consumer);
    let text = || String::from_utf8_lossy(key).into_owned();
    match defect {
        Defect::StateSharedBetweenConsumers => (String::new(), Bytes::copy_from_slice(key)),
        Defect::KeysJoinedToNames => (String::new(), [owner.as_bytes(), b":", key].concat().into()),
        Defect::KeysAppendedToNames => (String::new(), [owner.as_bytes(), key].concat().into()),
        Defect::KeysKeptAsText => (owner, text().into()),
        Defect::KeysKeptAsDigests => (owner, names::digest(key).into()),
        Defect::LongKeysCut => (owner, Bytes::copy_from_slice(&key[..key.len().min(KEY_CUT)])),
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

/// A window as it is read back. Where a defect keeps only its numbers, it is rebuilt from them.
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

/// A store handle's own data, besides its connection. Only defects use it.
#[derive(Default)]
pub(crate) struct Handle {
    pub(crate) dead: AtomicBool,
    pub(crate) cache: Mutex<HashMap<(String, Bytes), Option<Bytes>>>,
    pub(crate) not_yet_applied: Mutex<Vec<(ConsumerId, Staged, Advance)>>,
    pub(crate) positions: Mutex<HashMap<String, Position>>,
    /// Records that a defect sends with a later commit.
    pub(crate) unsent: Mutex<Vec<Sent>>,
    /// The next numbers of outboxes, where a defect keeps them here.
    pub(crate) numbers: Mutex<HashMap<String, u64>>,
    pulses: Mutex<HashMap<String, Pulse>>,
    /// The first list of consumers, where a defect keeps it.
    consumers: Mutex<Option<Vec<ConsumerId>>>,
    beats: AtomicU64,
    /// Wakes watches on this handle.
    pub(crate) own_commits: watch::Sender<()>,
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

    fn connected(&self) -> Result<MutexGuard<'_, State>, Error> {
        self.shared.connected(self.generation)
    }

    /// The current position.
    fn position_now(&self, contents: &Contents, consumer: &ConsumerId) -> Option<Position> {
        let defect = self.shared.defect;
        let key = position_key(defect, consumer);
        let kept = self.handle.positions.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = contents.consumers.get(&key)?;
        if defect == Defect::PositionServedStale {
            return stored.previous.clone();
        }
        let mut position = kept.get(&key).cloned().or(stored.position.clone())?;
        let windows = match defect {
            Defect::WindowsSharedBetweenConsumers => {
                contents.consumers.get(SHARED_WINDOWS).map(|shared| &shared.windows)
            }
            _ => Some(&stored.windows),
        };
        position.windows = windows
            .into_iter()
            .flatten()
            .map(|(name, window)| (name.clone(), window.clone()))
            .collect();
        if defect == Defect::WindowsInAnyOrder {
            let turn = stored.commits as usize % position.windows.len().max(1);
            position.windows.rotate_left(turn);
            position.windows.reverse();
        }
        Some(position)
    }

    /// The position as this handle reads it: at one moment or, with a defect, at several.
    async fn read_position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        let mut found = self.position_now(&self.connected()?.store.live, consumer);
        match self.shared.defect {
            Defect::PositionReadInSteps | Defect::WindowsReadApart | Defect::JournalReadApart => {
                sleep(BETWEEN_PARTS).await;
                let later = self.position_now(&self.connected()?.store.live, consumer);
                if let (Some(found), Some(later)) = (&mut found, later) {
                    match self.shared.is(Defect::JournalReadApart) {
                        true => found.journal = later.journal,
                        false => found.windows = later.windows,
                    }
                    if self.shared.is(Defect::PositionReadInSteps) {
                        (found.owner, found.note) = (later.owner, later.note);
                    }
                }
            }
            Defect::PositionReadFromACopy | Defect::SnapshotFromACopy => {
                for _ in 0..3 {
                    yield_now().await;
                }
            }
            _ => {}
        }
        Ok(found)
    }

    fn value_now(&self, state: &State, consumer: &ConsumerId, key: &[u8]) -> Option<Bytes> {
        let place = state_key(self.shared.defect, consumer, key);
        let store = &state.store;
        match self.shared.defect {
            Defect::SnapshotSeesWhatIsStaged if store.staging.contains_key(&place) => store.staging[&place].clone(),
            Defect::SnapshotServedStale => store.behind.as_ref()?.state.get(&place).cloned(),
            Defect::SnapshotMixesConsumers => {
                let own = store.live.state.get(&place);
                let others = || {
                    store
                        .live
                        .state
                        .iter()
                        .find(|((_, other), _)| other == key)
                        .map(|(_, value)| value)
                };
                own.or_else(others).cloned()
            }
            _ => store.live.state.get(&place).cloned(),
        }
    }

    fn consumers_now(&self) -> Result<Vec<ConsumerId>, Error> {
        let state = self.connected()?;
        let stored = state.store.live.consumers.values();
        let mut listed: Vec<_> = stored
            .filter_map(|stored| {
                let times = match self.shared.defect {
                    Defect::ConsumersListedPerCommit => stored.commits as usize,
                    _ => 1,
                };
                stored.consumer.clone().map(|consumer| vec![consumer; times])
            })
            .flatten()
            .collect();
        listed.sort_unstable();
        Ok(listed)
    }

    /// Changes the stored position, if there is one, outside any commit.
    fn amend(&self, consumer: &ConsumerId, change: impl FnOnce(&mut Stored, &mut Position)) -> Result<(), Error> {
        let mut state = self.connected()?;
        let key = position_key(self.shared.defect, consumer);
        if let Some(stored) = state.store.live.consumers.get_mut(&key)
            && let Some(mut position) = stored.position.clone()
        {
            stored.changes();
            change(stored, &mut position);
            stored.position = Some(position);
        }
        self.shared.commits.send_replace(());
        self.handle.own_commits.send_replace(());
        Ok(())
    }
}

#[async_trait]
impl ReadState for ModelStore {
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        let defect = self.shared.defect;
        while defect == Defect::SnapshotWaitsForTransactions && self.connected()?.store.open > 0 {
            sleep(BETWEEN_PARTS).await;
        }
        let mut keys = keys.to_vec();
        if defect == Defect::SnapshotSorted {
            keys.sort_unstable();
        }
        let (position, mut values) = {
            let mut state = self.connected()?;
            state.store.snapshots += 1;
            let position = match (defect, &state.store.behind) {
                (Defect::SnapshotServedStale, Some(behind)) => self.position_now(behind, consumer),
                _ => self.position_now(&state.store.live, consumer),
            };
            let values: Vec<_> = keys.iter().map(|key| self.value_now(&state, consumer, key)).collect();
            (position, values)
        };
        match defect {
            Defect::SnapshotReadInSteps => {
                for (value, key) in values.iter_mut().zip(&keys) {
                    sleep(BETWEEN_PARTS).await;
                    *value = self.value_now(&*self.connected()?, consumer, key);
                }
            }
            Defect::SnapshotLeavesOutMissing => values.retain(Option::is_some),
            Defect::SnapshotFromACopy => {
                for _ in 0..3 {
                    yield_now().await;
                }
            }
            _ => {}
        }
        Ok(Snapshot::new(position, values))
    }
}

#[async_trait]
impl OffsetStore for ModelStore {
    type Tx = ModelTx;

    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        let defect = self.shared.defect;
        let key = position_key(defect, consumer);
        let state = self.connected()?;
        let stored = state.store.live.consumers.get(&key);
        let mut pulse = stored.map_or_else(Pulse::default, |stored| stored.pulse(defect));
        if defect == Defect::BeatsKeptInTheHandle {
            pulse.beats += self.handle.beats.load(Ordering::SeqCst);
        }
        let mut pulses = self.handle.pulses.lock().unwrap_or_else(PoisonError::into_inner);
        match defect {
            Defect::PulseKeptInTheHandle => Ok(*pulses.entry(key).or_insert(pulse)),
            _ => Ok(pulse),
        }
    }

    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        let (mut all, mut own) = (self.shared.commits.subscribe(), self.handle.own_commits.subscribe());
        let seen = match self.shared.defect {
            Defect::WatchForgetsWhatItSaw => self.pulse(consumer).await?,
            _ => *seen,
        };
        loop {
            let pulse = self.pulse(consumer).await?;
            if pulse != seen {
                return Ok(pulse);
            }
            // This handle owns the senders, so the channel stays open. After a time-out the watch
            // checks again.
            match self.shared.defect {
                Defect::WatchHearsOnlyItsHandle => drop(own.changed().await),
                _ => drop(timeout(interval, all.changed()).await),
            }
            if self.shared.is(Defect::WatchReturnsEarly) {
                return self.pulse(consumer).await;
            }
        }
    }

    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let defect = self.shared.defect;
        if defect == Defect::BeatCreatesAPosition {
            let mut state = self.connected()?;
            let stored = state
                .store
                .live
                .consumers
                .entry(position_key(defect, consumer))
                .or_default();
            if stored.position.is_none() {
                stored.consumer = Some(consumer.clone());
                stored.position = Some(Position::new(LogId::new("unknown")?, Offset::ZERO, Revision::NONE));
            }
        }
        let mut counts = false;
        self.amend(consumer, |stored, position| {
            if position.owner != Some(owner) && defect != Defect::BeatOfAnotherCounts {
                return;
            }
            counts = true;
            match defect {
                Defect::BeatsNotKept => {}
                Defect::BeatsKeptInTheHandle => drop(self.handle.beats.fetch_add(1, Ordering::SeqCst)),
                _ => stored.beats += 1,
            }
            if defect == Defect::BeatRaisesTheRevision {
                position.revision = position.revision.next_count();
            }
        })?;
        if counts {
            self.connected()?.store.beats += 1;
        }
        Ok(())
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let defect = self.shared.defect;
        self.amend(consumer, |_, position| {
            let is_own = position.owner == Some(owner);
            if (is_own || defect == Defect::ReleaseOfAnotherCounts) && defect != Defect::ReleaseIgnored {
                position.owner = None;
                if defect == Defect::ReleaseRaisesTheRevision {
                    position.revision = position.revision.next_count();
                }
            }
        })
    }

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.shared.travel(self.generation, Stage::Idle).await?;
        while self.shared.is(Defect::PositionWaitsForTransactions) && self.connected()?.store.open > 0 {
            sleep(BETWEEN_PARTS).await;
        }
        self.connected()?.store.positions += 1;
        match self.read_position(consumer).await? {
            None if self.shared.is(Defect::FreshStoreHasAPosition) => Ok(Some(Position::new(
                LogId::new("unknown")?,
                Offset::ZERO,
                Revision::NONE,
            ))),
            found => Ok(found),
        }
    }

    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        self.shared.travel(self.generation, Stage::Idle).await?;
        while self.shared.is(Defect::ConsumersWaitForTransactions) && self.connected()?.store.open > 0 {
            sleep(BETWEEN_PARTS).await;
        }
        let mut listed = self.consumers_now()?;
        match self.shared.defect {
            Defect::ConsumersUnknown => return Ok(None),
            Defect::LastConsumerNotListed => drop(listed.pop()),
            Defect::ConsumersListedBackwards => listed.reverse(),
            Defect::ConsumersListedOnce => {
                let mut kept = self.handle.consumers.lock().unwrap_or_else(PoisonError::into_inner);
                return Ok(Some(kept.get_or_insert(listed).clone()));
            }
            Defect::PositionReadFromACopy => {
                for _ in 0..3 {
                    yield_now().await;
                }
            }
            _ => {}
        }
        Ok(Some(listed))
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
