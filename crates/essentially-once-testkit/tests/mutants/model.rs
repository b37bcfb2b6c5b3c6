//! A small backend with every capability, correct except for one defect. A restart keeps durable
//! data and drops the rest.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use essentially_once::{
    ConsumerId, Error, Log, Offset, Record, async_trait,
    backend::{Durability, LogId, Source},
};
use essentially_once_testkit::{Backend, Capabilities, Cut, Harness, Request, StateReader, Support};
use tokio::{sync::watch, task::yield_now};

use crate::{
    defect::Defect,
    log::{LogState, ModelLog},
    names,
    store::{ModelStore, StoreState},
    transaction::ModelTx,
};

/// The largest record that the model accepts, in bytes.
pub(crate) const RECORD_LIMIT: usize = 200_000;
/// The largest key that the model accepts, in bytes.
pub(crate) const KEY_LIMIT: usize = 2_000;
/// The largest value that the model accepts, in bytes.
pub(crate) const VALUE_LIMIT: usize = 300_000;
/// The stored bytes of an entry that the model cannot decode.
const UNDECODABLE: &[u8] = b"\xFFno record\0";

/// More steps than any append or commit takes.
const STEPS_TO_A_STAGE: usize = 50;

/// How many requests a slow model refuses after each restart.
const REFUSALS: usize = 5;

/// Starts models with one defect.
pub(crate) struct ModelHarness(pub(crate) Defect);

/// Starts models without a defect that need time after a restart before they are ready, as servers
/// do.
pub(crate) struct SlowModelHarness;

#[async_trait]
impl Harness for ModelHarness {
    type Backend = Model;

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::minimal();
        capabilities.restart = Support::Yes;
        capabilities.restart_amid_transaction = Support::Yes;
        capabilities.truncate = Support::Yes;
        capabilities.recreate = Support::Yes;
        capabilities.truncate_all = Support::Yes;
        capabilities.delete = Support::Yes;
        capabilities.delete_record = Support::Yes;
        capabilities.remove_before = Support::Yes;
        capabilities.refuse = Support::Yes;
        capabilities.wire = Support::Yes;
        capabilities.native = Support::Yes;
        capabilities.read_state = Support::Yes;
        capabilities.consumers = Support::Yes;
        capabilities.beats = Support::Yes;
        capabilities.commits_are_cheap = Support::Yes;
        capabilities.malformed = Support::Yes;
        capabilities.foreign = Support::Yes;
        capabilities.tail = Support::Yes;
        capabilities.damage_letter = Support::Yes;
        capabilities.outbox = Support::Yes;
        capabilities.shared_outboxes = Support::Yes;
        capabilities.record_limit = Some(RECORD_LIMIT);
        capabilities.value_limit = Some(VALUE_LIMIT);
        capabilities.key_limit = Some(KEY_LIMIT);
        capabilities
    }

    async fn start(&self, _: &str) -> Result<Model, Source> {
        Ok(Model::new(self.0, 0))
    }
}

#[async_trait]
impl Harness for SlowModelHarness {
    type Backend = Model;

    fn capabilities(&self) -> Capabilities {
        ModelHarness(Defect::None).capabilities()
    }

    async fn start(&self, _: &str) -> Result<Model, Source> {
        Ok(Model::new(Defect::None, REFUSALS))
    }
}

/// The stage of an append or commit at which the backend restarts.
#[derive(Clone, Copy)]
pub(crate) enum Stage {
    Idle,
    Request,
    /// The first of several steps is done.
    Begun,
    Halfway,
    Reply,
}

/// One backend. Its handles share the data that a server would hold.
pub(crate) struct Model {
    shared: Arc<Shared>,
    refuses_after_restart: usize,
}

impl Model {
    fn new(defect: Defect, refuses_after_restart: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                defect,
                state: Mutex::default(),
                stage: AtomicUsize::default(),
                asked: AtomicUsize::default(),
                refusals: AtomicUsize::default(),
                changes: watch::Sender::new(()),
                commits: watch::Sender::new(()),
                armed: Mutex::default(),
                cuts: AtomicUsize::default(),
            }),
            refuses_after_restart,
        }
    }
}

pub(crate) struct Shared {
    pub(crate) defect: Defect,
    state: Mutex<State>,
    /// The [`Stage`] of the current operation.
    stage: AtomicUsize,
    /// The number of requests for durability.
    asked: AtomicUsize,
    /// How many more requests to refuse.
    refusals: AtomicUsize,
    /// Wakes all waiting readers.
    pub(crate) changes: watch::Sender<()>,
    /// Wakes everyone who watches a consumer.
    pub(crate) commits: watch::Sender<()>,
    /// The request whose connection to cut, and when.
    armed: Mutex<Option<(Request, Cut)>>,
    /// The number of cuts made.
    cuts: AtomicUsize,
}

#[derive(Default)]
pub(crate) struct State {
    /// The number of restarts. A handle of an earlier generation has lost its connection.
    pub(crate) generation: u64,
    /// The number of logs created, which distinguishes their incarnations.
    created: u64,
    pub(crate) logs: HashMap<String, LogState>,
    pub(crate) store: StoreState,
}

impl Shared {
    pub(crate) fn is(&self, defect: Defect) -> bool {
        self.defect == defect
    }

    /// A panic fails only its own case, so a poisoned lock does not matter.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, unless the backend was restarted after the handle was opened.
    pub(crate) fn connected(&self, generation: u64) -> Result<MutexGuard<'_, State>, Error> {
        let state = self.state();
        match state.generation == generation {
            true => Ok(state),
            false => Err(Error::unavailable("reach the model", "it was restarted")),
        }
    }

    /// The cut that hits this request, if any.
    pub(crate) fn cut(&self, request: Request) -> Option<Cut> {
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, cut) = armed.take_if(|(armed, _)| *armed == request)?;
        self.cuts.fetch_add(1, Ordering::SeqCst);
        Some(cut)
    }

    /// The durability that log and store report, each with its own defects.
    pub(crate) fn durability(&self, [fails, wavers, unreasoned]: [Defect; 3]) -> Result<Durability, Error> {
        let asked = self.asked.fetch_add(1, Ordering::SeqCst);
        match self.defect {
            defect if defect == fails => Err(Error::failed("read durability", "no such setting")),
            defect if defect == wavers && asked > 0 => Ok(Durability::Volatile("it was asked before".into())),
            defect if defect == unreasoned => Ok(Durability::Volatile(String::new())),
            _ => Ok(Durability::Durable),
        }
    }

    /// Carries a request to the backend or back. A restart may overtake it.
    pub(crate) async fn travel(&self, generation: u64, stage: Stage) -> Result<(), Error> {
        self.pause(stage).await;
        // Nothing has happened yet.
        if matches!(stage, Stage::Request | Stage::Idle) && self.refuses() {
            return Err(Error::unavailable("reach the model", "it is not ready yet"));
        }
        self.connected(generation).map(drop)
    }

    fn refuses(&self) -> bool {
        let left = |refusals: usize| refusals.checked_sub(1);
        let counted = self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left);
        counted.is_ok()
    }

    /// Yields to other tasks, and shows a restart which stage it would hit.
    pub(crate) async fn pause(&self, stage: Stage) {
        self.stage.store(stage as usize, Ordering::SeqCst);
        yield_now().await;
        self.stage.store(Stage::Idle as usize, Ordering::SeqCst);
    }
}

/// A restart hit the operation when it may have taken effect.
pub(crate) fn in_doubt(_: Error) -> Error {
    Error::indeterminate("read the model's reply", "it was restarted before it replied")
}

impl State {
    /// The log of that name, created empty on the first call.
    pub(crate) fn log(&mut self, shared: &Shared, name: &str) -> Result<&mut LogState, Error> {
        let key = self.log_key(shared, name);
        if !self.logs.contains_key(&key) {
            self.created += 1;
            self.logs.insert(key.clone(), LogState::new(self.created));
        }
        self.logs
            .get_mut(&key)
            .ok_or_else(|| Error::failed("open a log", "it was just created"))
    }

    /// The key under which the log of that name is stored.
    fn log_key(&self, shared: &Shared, name: &str) -> String {
        match shared.defect {
            Defect::LogsShareRecords => "shared".into(),
            Defect::LogNamesIgnoreCase => names::without_case(name),
            Defect::LogNamesCut => names::cut(name),
            Defect::LogSeparatorsFallTogether => names::without_separators(name),
            Defect::LogNamesMatchPrefixes => {
                let mut known = self.logs.keys();
                known
                    .find(|known| known.starts_with(name))
                    .map_or(name, String::as_str)
                    .into()
            }
            Defect::NamesKeptAsDigests => names::digest(name.as_bytes()),
            _ => name.into(),
        }
    }
}

#[async_trait]
impl Backend for Model {
    type Store = ModelStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        let mut state = self.shared.state();
        let generation = state.generation;
        let incarnation = state.log(&self.shared, name)?.incarnation;
        let mut id = LogId::new(name)?;
        id = match self.shared.defect {
            Defect::OldOffsetWaitsInNewLog | Defect::OldOffsetTruncatedInNewLog => id,
            _ => id.with_incarnation(incarnation.to_string())?,
        };
        let key = state.log_key(&self.shared, name);
        Ok(Arc::new(ModelLog::new(
            Arc::clone(&self.shared),
            id,
            &key,
            incarnation,
            generation,
        )))
    }

    async fn store(&self) -> Result<ModelStore, Error> {
        let generation = self.shared.state().generation;
        Ok(ModelStore::new(Arc::clone(&self.shared), generation))
    }

    async fn restart(&self) -> Result<(), Source> {
        let generation = self.shared.state().generation;
        // Waits for an operation to hit, each time at another stage. None may be running, so the
        // wait is short.
        let stage = [Stage::Reply, Stage::Begun, Stage::Halfway, Stage::Request][generation as usize % 4];
        for _ in 0..STEPS_TO_A_STAGE {
            if self.shared.stage.load(Ordering::SeqCst) == stage as usize {
                break;
            }
            yield_now().await;
        }
        let mut state = self.shared.state();
        state.generation += 1;
        for log in state.logs.values_mut() {
            log.restart(&self.shared);
        }
        state.store.restart(&self.shared);
        self.shared.refusals.store(self.refuses_after_restart, Ordering::SeqCst);
        self.shared.changes.send_replace(());
        Ok(())
    }

    async fn truncate(&self, log: &str, before: Offset) -> Result<(), Source> {
        self.shared
            .state()
            .log(&self.shared, log)?
            .truncate(&self.shared, before);
        self.shared.changes.send_replace(());
        Ok(())
    }

    async fn recreate(&self, log: &str) -> Result<(), Source> {
        self.delete(log).await?;
        self.shared.state().log(&self.shared, log)?;
        Ok(())
    }

    async fn delete(&self, log: &str) -> Result<(), Source> {
        let mut state = self.shared.state();
        let key = state.log_key(&self.shared, log);
        state.logs.remove(&key);
        self.shared.changes.send_replace(());
        Ok(())
    }

    async fn delete_record(&self, log: &str, offset: Offset) -> Result<(), Source> {
        self.shared.state().log(&self.shared, log)?.delete(&self.shared, offset);
        Ok(())
    }

    async fn refuse(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        self.shared.state().log(&self.shared, log)?.refuse = Some(payload.to_vec());
        Ok(())
    }

    async fn cut_next(&self, request: Request, cut: Cut) -> Result<(), Source> {
        *self.shared.armed.lock().unwrap_or_else(PoisonError::into_inner) = Some((request, cut));
        Ok(())
    }

    fn cuts(&self) -> usize {
        self.shared.cuts.load(Ordering::SeqCst)
    }

    async fn native_put(&self, tx: &mut ModelTx, name: &str) -> Result<(), Error> {
        tx.put_natively(name)
    }

    async fn native_count(&self, name: &str) -> Result<u64, Source> {
        Ok(self
            .shared
            .state()
            .store
            .live
            .native
            .get(name)
            .copied()
            .unwrap_or_default())
    }

    async fn state_reader(&self) -> Result<StateReader<ModelStore>, Source> {
        Ok(Arc::new(self.store().await?))
    }

    async fn append_malformed(&self, log: &str) -> Result<Vec<u8>, Source> {
        let mut record = Record::new(Offset::ZERO, SystemTime::now(), UNDECODABLE);
        record.malformed = match self.shared.defect {
            Defect::MalformedNotMarked => None,
            Defect::MalformedWithoutReason => Some("".into()),
            _ => Some("it begins with an unknown version".into()),
        };
        let mut state = self.shared.state();
        let log = state.log(&self.shared, log)?;
        if self.shared.is(Defect::MalformedGarblesNeighbour)
            && let Some(before) = log.entries.last_mut()
        {
            before.payload = record.payload.clone();
        }
        if !self.shared.is(Defect::MalformedSkipped) {
            log.write(&self.shared, record);
        }
        Ok(UNDECODABLE.into())
    }

    async fn damage_letter(&self, consumer: &ConsumerId, offset: Offset) -> Result<(), Source> {
        self.shared.state().store.damage_letter(consumer, offset);
        Ok(())
    }

    async fn outbox(&self, log: &str) -> Result<Arc<dyn Log>, Error> {
        Backend::log(self, log).await
    }

    async fn append_foreign(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        let mut record = Record::new(Offset::ZERO, SystemTime::now(), payload.to_vec());
        match self.shared.defect {
            Defect::ForeignSkipped => return Ok(()),
            Defect::ForeignPayloadLost => record.payload.clear(),
            Defect::ForeignCalledMalformed => record.malformed = Some("no version".into()),
            Defect::ForeignGetsOrigin => record.origin = Some(crate::log::origin("unknown", 0)?),
            _ => {}
        }
        self.shared.state().log(&self.shared, log)?.write(&self.shared, record);
        Ok(())
    }
}
