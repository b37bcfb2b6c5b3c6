//! Counts the operations of all consumers in a run, and injects the planned faults.

use std::{
    collections::{BTreeSet, VecDeque},
    fmt,
    future::{Future, pending},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
};

use bytes::Bytes;
use tokio::{sync::Notify, task::yield_now};

use super::{
    letters::Verb,
    plan::{FaultKind, Plan},
};

/// A run of an explorer with more operations is stuck in a loop.
pub(super) const OPERATION_LIMIT: usize = 10_000;

/// How many operations later a slow one takes effect. The other consumer loads the position in that
/// time.
const SLOW_OPERATIONS: usize = 2;

/// An operation that a consumer performs on its log, store or handler.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Operation {
    /// `Log::bounds`.
    Bounds,
    /// `Log::read`.
    Read,
    /// `LogReader::next`, counted when it is called, even if no record is available yet.
    Next,
    /// `durability` of the log or store.
    Durability,
    /// `OffsetStore::position`.
    Position,
    /// `OffsetStore::begin`.
    Begin,
    /// `KeyValue::get`.
    Get,
    /// `KeyValue::put`.
    Put,
    /// `KeyValue::delete`.
    Delete,
    /// `Transaction::commit`.
    Commit,
    /// `Transaction::rollback`.
    Rollback,
    /// `Backend::native_put`.
    Native,
    /// `Log::readable_end`.
    ReadableEnd,
    /// `OffsetStore::pulse` or `OffsetStore::watch`.
    Pulse,
    /// `OffsetStore::beat`.
    Beat,
    /// `OffsetStore::release`.
    Release,
    /// A method of `DeadLetters`.
    Letters,
    /// `Outbox::send`.
    Send,
    /// `Handler::handle`.
    Handle,
    /// `Handler::flush`, in a [crash test](crate::CrashTest).
    Flush,
}

/// What another program does once in a run.
pub(super) type Act = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where a run's transactions wrote, whether or not they were committed.
#[derive(Clone, Default)]
pub(super) struct Touched {
    pub(super) keys: BTreeSet<Bytes>,
    pub(super) outboxes: BTreeSet<String>,
}

/// The plan and the operation count of a run. All its wrappers share them, and so do clones.
#[derive(Clone)]
pub struct Faults {
    shared: Arc<Shared>,
}

/// One consumer of a run. It dies, freezes and wakes as a whole.
#[derive(Clone, Debug)]
pub struct Process {
    faults: Faults,
    number: usize,
}

/// One operation of a run, and the consumer that performed it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Step {
    pub(super) operation: Operation,
    pub(super) process: usize,
}

/// What the driver must do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Event {
    Crashed(usize),
    Frozen(usize),
    Slowed(usize),
    /// An operator acts, and the process waits for it.
    Called(usize, Verb),
    Runaway,
}

/// How an operation fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Failure {
    NotDone,
    ReplyLost,
}

struct Shared {
    state: Mutex<State>,
    /// Notified when a gate opens or a slow operation is due.
    changed: Notify,
}

struct State {
    plan: Plan,
    trace: Vec<Step>,
    gates: Vec<Gate>,
    /// Processes with a slow operation, and the count at which it takes effect.
    slow: Vec<(usize, usize)>,
    is_race: bool,
    takes_turns: bool,
    tests_handler: bool,
    touched: Touched,
    act: Option<(usize, Act)>,
    events: VecDeque<Event>,
    driver: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    Frozen,
    Dead,
}

impl Faults {
    /// Creates the planned faults. Only an [`Explorer`](super::Explorer) ends crashes and freezes.
    /// Without one, such an operation and all later ones of its process wait forever.
    pub fn new(plan: Plan) -> Self {
        let state = State {
            plan,
            trace: Vec::new(),
            gates: Vec::new(),
            slow: Vec::new(),
            is_race: false,
            takes_turns: false,
            tests_handler: false,
            touched: Touched::default(),
            act: None,
            events: VecDeque::new(),
            driver: None,
        };
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                changed: Notify::new(),
            }),
        }
    }

    /// Adds a process, whose log, store and handler are to be wrapped.
    pub fn process(&self) -> Process {
        let gates = &mut self.lock().gates;
        gates.push(Gate::Open);
        Process {
            faults: self.clone(),
            number: gates.len() - 1,
        }
    }

    pub(super) fn trace(&self) -> Vec<Step> {
        self.lock().trace.clone()
    }

    /// Returns the next event. If there is none yet, the waker is called when one arrives.
    pub(super) fn next_event(&self, driver: &Waker) -> Option<Event> {
        let mut state = self.lock();
        let event = state.events.pop_front();
        if event.is_none() && !state.driver.as_ref().is_some_and(|known| known.will_wake(driver)) {
            state.driver = Some(driver.clone());
        }
        event
    }

    pub(super) fn has_events(&self) -> bool {
        !self.lock().events.is_empty()
    }

    /// Sets whether consumers run concurrently. They then take turns at each operation, which an
    /// in-memory backend would never do on its own.
    pub(super) fn set_race(&self, is_race: bool) {
        self.lock().is_race = is_race;
    }

    /// Lets the tasks of a single consumer take turns, too. One that waits for a dead letter may
    /// otherwise never let its reader run.
    pub(super) fn take_turns(self) -> Self {
        self.lock().takes_turns = true;
        self
    }

    /// Tests a handler and not a backend. Flushes then count as operations, and a transaction in
    /// which a read or write failed does not commit (S6), as the handler may rely on.
    pub(super) fn test_handler(self) -> Self {
        self.lock().tests_handler = true;
        self
    }

    /// Lets another program act before that operation.
    pub(super) fn with_act(self, operation: usize, act: Act) -> Self {
        self.lock().act = Some((operation, act));
        self
    }

    pub(super) fn touched(&self) -> Touched {
        self.lock().touched.clone()
    }

    /// Resumes a frozen process, or its slow operation.
    pub(super) fn wake(&self, process: usize) {
        let mut state = self.lock();
        if state.gates[process] == Gate::Frozen {
            state.gates[process] = Gate::Open;
        }
        state.slow.retain(|(slow, _)| *slow != process);
        drop(state);
        self.shared.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn has_turns(&self) -> bool {
        self.is_race || self.takes_turns
    }

    fn report(&mut self, event: Event) {
        self.events.push_back(event);
        if let Some(driver) = &self.driver {
            driver.wake_by_ref();
        }
    }
}

impl Process {
    /// Counts an operation and runs it, unless a fault is planned for it. Cancel-safe if `act` is:
    /// after `act` completes, nothing else is awaited, except in a process that has frozen or died
    /// meanwhile.
    pub(super) async fn operate<T, E>(
        &self,
        operation: Operation,
        act: impl Future<Output = Result<T, E>>,
        fail: impl FnOnce(Failure) -> E,
    ) -> Result<T, E> {
        self.passes_gate().await;
        if self.faults.lock().has_turns() {
            yield_now().await;
            self.passes_gate().await;
        }
        let number = self.count(operation);
        if let Some(act) = self.act_at(number) {
            act.await;
        }
        self.passes_gate().await;
        let reply = match self.strike(number) {
            None => act.await,
            Some(FaultKind::ErrorBefore) => Err(fail(Failure::NotDone)),
            Some(FaultKind::ErrorAfter) => {
                let _ = act.await;
                Err(fail(Failure::ReplyLost))
            }
            Some(FaultKind::CrashBefore) => self.die().await,
            Some(FaultKind::CrashAfter) => {
                let _ = act.await;
                self.die().await
            }
            Some(FaultKind::Zombie) => {
                self.passes_gate().await;
                act.await
            }
            Some(FaultKind::Slow) => {
                self.is_due().await;
                act.await
            }
        };
        self.passes_gate().await;
        reply
    }

    /// Counts an operation, and calls the operator who is to act before it.
    fn count(&self, operation: Operation) -> usize {
        let mut state = self.faults.lock();
        state.trace.push(Step {
            operation,
            process: self.number,
        });
        let number = state.trace.len();
        let before = state.slow.len();
        state.slow.retain(|(_, due)| *due > number);
        if state.slow.len() < before {
            self.faults.shared.changed.notify_waiters();
        }
        if let Some(call) = state.plan.call_at(number) {
            state.gates[self.number] = Gate::Frozen;
            state.report(Event::Called(self.number, call.verb));
        }
        number
    }

    fn act_at(&self, number: usize) -> Option<Act> {
        let mut state = self.faults.lock();
        let due = state.act.take_if(|(operation, _)| *operation == number);
        due.map(|(_, act)| act)
    }

    pub(super) fn touch_key(&self, key: &[u8]) {
        let keys = &mut self.faults.lock().touched.keys;
        if !keys.contains(key) {
            keys.insert(Bytes::copy_from_slice(key));
        }
    }

    pub(super) fn touch_outbox(&self, log: &str) {
        let outboxes = &mut self.faults.lock().touched.outboxes;
        if !outboxes.contains(log) {
            outboxes.insert(log.to_owned());
        }
    }

    pub(super) fn tests_handler(&self) -> bool {
        self.faults.lock().tests_handler
    }

    fn strike(&self, number: usize) -> Option<FaultKind> {
        let mut state = self.faults.lock();
        if number > OPERATION_LIMIT && state.driver.is_some() {
            state.report(Event::Runaway);
            return Some(FaultKind::CrashBefore);
        }
        let fault = state.plan.at(number);
        match fault {
            Some(FaultKind::Zombie) => {
                state.gates[self.number] = Gate::Frozen;
                state.report(Event::Frozen(self.number));
            }
            Some(FaultKind::Slow) => {
                state.slow.push((self.number, number + SLOW_OPERATIONS));
                state.report(Event::Slowed(self.number));
            }
            _ => {}
        }
        fault
    }

    /// Ends the process for good.
    pub(super) async fn die<T>(&self) -> T {
        {
            let mut state = self.faults.lock();
            state.gates[self.number] = Gate::Dead;
            state.report(Event::Crashed(self.number));
        }
        pending().await
    }

    async fn passes_gate(&self) {
        self.wait_until(|state| state.gates[self.number] == Gate::Open).await;
    }

    async fn is_due(&self) {
        self.wait_until(|state| state.slow.iter().all(|(slow, _)| *slow != self.number))
            .await;
    }

    async fn wait_until(&self, condition: impl Fn(&State) -> bool) {
        while !condition(&self.faults.lock()) {
            let changed = self.faults.shared.changed.notified();
            // Checked again, because it may have changed before `changed` was registered.
            if condition(&self.faults.lock()) {
                return;
            }
            changed.await;
        }
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Faults")
            .field("plan", &state.plan)
            .field("operations", &state.trace.len())
            .finish_non_exhaustive()
    }
}
