//! Random histories of an outbox, its relays, and the consumer behind them. After each one, the
//! consumer must have handled every record once and in order. Three planted defects show that the
//! histories find such mistakes.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use essentially_once::{
    Offset, Outbox as _,
    backend::{Advance, Bounds, Durability, LogId, LogReader, Revision, Transaction as _},
    consumer::remove_passed,
};
use proptest::test_runner::{RngAlgorithm, TestError, TestRng, TestRunner};
use tokio::task::JoinHandle;

use super::*;

/// More records than the window of a consumer reaches back.
const FAR: u64 = Window::SIZE + 200;
/// Longer than any pause of a relay. Time is paused, so this only lets all tasks go on until they
/// wait for something else.
const SETTLED: Duration = Duration::from_secs(5);
const KEYS: u64 = 3;

/// A mistake in a relay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Defect {
    None,
    /// The relay numbers the records that are left for it to send.
    NumbersAtTheRelay,
    /// The relay gives a record that it sends again another origin.
    NewOriginWhenResent,
    /// The relay removes records from the outbox when it has read them.
    RemovesBeforeItSends,
}

/// Something that happens to one batch of a relay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Event {
    /// The bus is away.
    Away,
    /// The bus appends this many records, and the reply is lost.
    Lost(usize),
    /// The bus refuses the batch for one of its records.
    Refused,
    /// The relay freezes before the bus gets the batch.
    FrozenBefore,
    /// The relay freezes after the bus appended this many records.
    FrozenAfter(usize),
}

/// A part of a history.
#[derive(Clone, Debug)]
enum Step {
    /// A transaction sends this many records.
    Send(u64),
    /// The next batches of a relay go wrong.
    Trouble(usize, Vec<Event>),
    Start(usize),
    /// A process dies.
    Kill(usize),
    /// Both processes die amid a batch. Some of the records since the last commit of a relay are
    /// deleted or get another route before one of them starts again.
    Crash {
        event: Event,
        sends: u64,
        gone: Vec<(u64, Leaves)>,
    },
    /// A relay freezes, and wakes up when the other one has passed many records.
    Zombie {
        relay: usize,
        event: Event,
        sends: u64,
        passed: u64,
        cleans: bool,
        trims: bool,
    },
    /// What the relay has passed is removed from the outbox.
    Clean,
    /// The consumer handles what is on the bus.
    Receive,
    /// What the consumer has passed is removed from the bus.
    Trim,
    /// Everything frozen wakes up.
    Wake,
}

/// What the histories of a test have reached. A test that never does proves nothing.
#[derive(Clone, Copy, Default, Debug)]
struct Reached {
    duplicates: u64,
    cleaned: u64,
    trimmed: u64,
    refused: u64,
    killed_amid_batches: u64,
    gone: u64,
    late_zombies: u64,
}

/// What happens to the batches of one process.
#[derive(Default)]
struct Control {
    events: Mutex<VecDeque<Event>>,
    wakes: Notify,
    is_frozen: AtomicBool,
}

impl Control {
    async fn freeze(&self) {
        self.is_frozen.store(true, Ordering::SeqCst);
        self.wakes.notified().await;
        self.is_frozen.store(false, Ordering::SeqCst);
    }
}

/// The way to the bus.
struct Bus {
    bus: MemoryLog,
    outbox: MemoryLog,
    control: Arc<Control>,
    defect: Defect,
    gone: Arc<Gone>,
    /// The next number of a relay that draws one whenever it sends.
    number: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
}

/// How a record leaves the way from the outbox to the bus.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leaves {
    Deleted,
    Rerouted,
}

/// The records of the outbox that the bus does not get any more.
#[derive(Default)]
struct Gone(Mutex<BTreeMap<Offset, Leaves>>);

impl Gone {
    fn add(&self, offset: Offset, leaves: Leaves) {
        self.0.lock().unwrap().entry(offset).or_insert(leaves);
    }

    fn get(&self, offset: Offset) -> Option<Leaves> {
        self.0.lock().unwrap().get(&offset).copied()
    }

    /// The number of records before an offset that are gone.
    fn before(&self, offset: Offset) -> u64 {
        self.0.lock().unwrap().range(..offset).count() as u64
    }
}

impl Bus {
    /// The batch as a relay with a defect sends it.
    async fn outgoing(&self, records: &[NewRecord]) -> Result<Vec<NewRecord>, Error> {
        let mut outgoing = records.to_vec();
        match self.defect {
            Defect::None => {}
            Defect::NumbersAtTheRelay => {
                for record in &mut outgoing {
                    let number = record.origin.as_ref().map_or(0, |origin| origin.sequence);
                    record.origin = Some(origin(number - self.gone.before(number.into())));
                }
            }
            Defect::NewOriginWhenResent => {
                for record in &mut outgoing {
                    record.origin = Some(origin(self.number.fetch_add(1, Ordering::SeqCst)));
                }
            }
            Defect::RemovesBeforeItSends => {
                let last = records.iter().filter_map(|record| record.origin.as_ref()).next_back();
                // The offsets of this backend are the numbers.
                let end = last.map_or(0, |last| last.sequence + 1);
                self.outbox.remove_before(end.into()).await?;
            }
        }
        Ok(outgoing)
    }
}

#[async_trait]
impl Destination for Bus {
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error> {
        let event = self.control.events.lock().unwrap().pop_front();
        let outgoing = self.outgoing(records).await?;
        let append = async |count: usize| self.bus.append(&outgoing[..count.min(outgoing.len())]).await;
        match event {
            None => drop(append(usize::MAX).await?),
            Some(Event::Away) => return Err(Error::unavailable("append", "the bus is away")),
            Some(Event::Lost(count)) => {
                append(count).await?;
                return Err(Error::indeterminate("append", "the reply was lost"));
            }
            Some(Event::Refused) => {
                self.refused.fetch_add(1, Ordering::SeqCst);
                return Err(Error::failed("append", "one of the records is refused"));
            }
            Some(Event::FrozenBefore) => {
                self.control.freeze().await;
                append(usize::MAX).await?;
            }
            Some(Event::FrozenAfter(count)) => {
                append(count).await?;
                self.control.freeze().await;
                if count < outgoing.len() {
                    return Err(Error::indeterminate("append", "the connection was cut meanwhile"));
                }
            }
        }
        Ok(())
    }
}

/// The outbox, from which records can be deleted one at a time.
#[derive(Clone)]
struct Holey {
    log: MemoryLog,
    gone: Arc<Gone>,
}

#[async_trait]
impl Log for Holey {
    fn id(&self) -> &LogId {
        self.log.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.log.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let (reader, gone) = (self.log.read(from).await?, Arc::clone(&self.gone));
        Ok(Box::new(HoleyReader { reader, gone }))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.log.bounds().await
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.log.remove_before(offset).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.log.durability().await
    }
}

struct HoleyReader {
    reader: Box<dyn LogReader>,
    gone: Arc<Gone>,
}

#[async_trait]
impl LogReader for HoleyReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        loop {
            let mut records = self.reader.next(max).await?;
            records.retain(|record| self.gone.get(record.offset) != Some(Leaves::Deleted));
            if !records.is_empty() {
                return Ok(records);
            }
        }
    }
}

/// A process with a relay.
struct Process {
    control: Arc<Control>,
    run: JoinHandle<Result<Report, Error>>,
}

struct World {
    memory: Memory,
    outbox: Holey,
    bus: MemoryLog,
    defect: Defect,
    processes: [Option<Process>; 2],
    /// Trouble for a process that does not run yet.
    waiting: [Vec<Event>; 2],
    number: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    /// What the consumer has handled, in order.
    handled: Arc<Mutex<Vec<u64>>>,
    sent: u64,
    reached: Reached,
}

fn relay() -> ConsumerId {
    ConsumerId::new("relay").unwrap()
}

fn receiver() -> ConsumerId {
    ConsumerId::new("receiver").unwrap()
}

impl World {
    fn new(defect: Defect) -> Self {
        let memory = Memory::new();
        Self {
            outbox: Holey {
                log: memory.log("outbox").unwrap(),
                gone: Arc::default(),
            },
            bus: memory.log("bus").unwrap(),
            memory,
            defect,
            processes: [None, None],
            waiting: [Vec::new(), Vec::new()],
            number: Arc::default(),
            refused: Arc::default(),
            handled: Arc::default(),
            sent: 0,
            reached: Reached::default(),
        }
    }

    /// One transaction of the service that sends.
    async fn send(&mut self, count: u64) {
        let (orders, store) = (self.memory.log("orders").unwrap(), self.memory.store());
        let service = ConsumerId::new("service").unwrap();
        let (next, expected, revision) = match store.position(&service).await.unwrap() {
            Some(position) => (position.next, position.revision, position.revision.next_count()),
            None => (Offset::ZERO, Revision::NONE, Revision::NONE.next_epoch()),
        };
        let mut tx = store.begin(&service).await.unwrap();
        for n in self.sent..self.sent + count {
            let record = NewRecord::new(n.to_string()).key((n % KEYS).to_string());
            tx.send("outbox", record).await.unwrap();
        }
        let advance = Advance::new(orders.id().clone(), next.successor(), expected, revision);
        tx.commit(advance).await.unwrap();
        self.sent += count;
    }

    fn start(&mut self, process: usize) {
        if self.processes[process]
            .as_ref()
            .is_some_and(|process| !process.run.is_finished())
        {
            return;
        }
        let control = Arc::new(Control {
            events: Mutex::new(std::mem::take(&mut self.waiting[process]).into()),
            ..Control::default()
        });
        let bus = Bus {
            bus: self.bus.clone(),
            outbox: self.outbox.log.clone(),
            control: Arc::clone(&control),
            defect: self.defect,
            gone: Arc::clone(&self.outbox.gone),
            number: Arc::clone(&self.number),
            refused: Arc::clone(&self.refused),
        };
        let gone = Arc::clone(&self.outbox.gone);
        let route = move |record: &Record| (gone.get(record.offset) != Some(Leaves::Rerouted)).then_some(0);
        let consumer = Consumer::at_least_once(
            relay(),
            self.outbox.clone(),
            self.memory.store(),
            Relay::routed(vec![bus], route),
        );
        let run = consumer
            .max_batch(16)
            .read_ahead_records(64)
            .min_backoff(Duration::from_millis(1))
            .max_backoff(Duration::from_millis(10))
            .standby_after(Duration::ZERO)
            .run();
        let run = tokio::spawn(run);
        self.processes[process] = Some(Process { control, run });
    }

    /// Kills a process. Fails if its run had ended for a reason that it should not have.
    async fn kill(&mut self, process: usize) -> Result<(), String> {
        let Some(Process { control, run }) = self.processes[process].take() else {
            return Ok(());
        };
        if control.is_frozen.load(Ordering::SeqCst) {
            self.reached.killed_amid_batches += 1;
        }
        if !run.is_finished() {
            run.abort();
        }
        match run.await {
            // A record that is refused alone ends the run.
            Ok(Err(Error::Unhandled { .. })) | Err(_) => Ok(()),
            Ok(ended) => Err(format!("a relay ended with {ended:?}")),
        }
    }

    fn trouble(&mut self, process: usize, events: &[Event]) {
        match &self.processes[process] {
            Some(process) if !process.run.is_finished() => process.control.events.lock().unwrap().extend(events),
            _ => self.waiting[process].extend_from_slice(events),
        }
    }

    fn wake(&self) {
        for process in self.processes.iter().flatten() {
            if process.control.is_frozen.load(Ordering::SeqCst) {
                process.control.wakes.notify_one();
            }
        }
    }

    fn forget_trouble(&mut self) {
        self.waiting.iter_mut().for_each(Vec::clear);
        for process in self.processes.iter().flatten() {
            process.control.events.lock().unwrap().clear();
        }
    }

    /// The next offset of the relays' position.
    async fn passed(&self) -> u64 {
        let position = self.memory.store().position(&relay()).await.unwrap();
        position.map_or(0, |position| position.next.lo())
    }

    async fn clean(&mut self) -> Result<(), String> {
        if self.memory.store().position(&relay()).await.unwrap().is_none() {
            return Ok(());
        }
        let removed = remove_passed(&self.outbox, &self.memory.store(), &[relay()]).await;
        self.reached.cleaned += removed.map_err(|error| format!("cleaning failed: {error}"))?;
        Ok(())
    }

    async fn receive(&mut self) -> Result<(), String> {
        let handled = Arc::clone(&self.handled);
        let handle = handler_fn(move |record: &Record, _: &mut MemoryTx| {
            let number = str::from_utf8(&record.payload).unwrap().parse().unwrap();
            handled.lock().unwrap().push(number);
            Box::pin(async { Ok(()) })
        });
        let run = Consumer::essentially_once(receiver(), self.bus.clone(), self.memory.store(), handle)
            .accept_volatile()
            .run_until_caught_up();
        let report = run.await.map_err(|error| format!("the receiver ended with {error}"))?;
        self.reached.duplicates += report.duplicates;
        Ok(())
    }

    async fn trim(&mut self) -> Result<(), String> {
        self.receive().await?;
        let removed = remove_passed(&self.bus, &self.memory.store(), &[receiver()]).await;
        self.reached.trimmed += removed.map_err(|error| format!("trimming failed: {error}"))?;
        Ok(())
    }

    async fn crash(&mut self, event: Event, sends: u64, gone: &[(u64, Leaves)]) -> Result<(), String> {
        self.forget_trouble();
        self.wake();
        self.start(0);
        settle().await;
        self.trouble(0, &[event]);
        self.send(sends).await;
        settle().await;
        self.kill(0).await?;
        self.kill(1).await?;
        let from = self.passed().await;
        for (index, leaves) in gone {
            let offset = Offset::from(from + index % sends);
            if offset < self.sent.into() {
                self.outbox.gone.add(offset, *leaves);
                self.reached.gone += 1;
            }
        }
        self.start(0);
        Ok(())
    }

    async fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Send(count) => self.send(*count).await,
            Step::Trouble(process, events) => self.trouble(*process, events),
            Step::Start(process) => self.start(*process),
            Step::Kill(process) => self.kill(*process).await?,
            Step::Crash { event, sends, gone } => self.crash(*event, *sends, gone).await?,
            Step::Zombie {
                relay,
                event,
                sends,
                passed,
                cleans,
                trims,
            } => {
                self.forget_trouble();
                self.kill(1 - relay).await?;
                self.start(*relay);
                self.wake();
                settle().await;
                self.trouble(*relay, &[*event]);
                self.send(*sends).await;
                settle().await;
                let before = self.passed().await;
                self.start(1 - relay);
                self.send(*passed).await;
                settle().await;
                if self.passed().await > before + Window::SIZE {
                    self.reached.late_zombies += 1;
                }
                if *cleans {
                    self.clean().await?;
                }
                if *trims {
                    self.trim().await?;
                }
                self.wake();
            }
            Step::Clean => self.clean().await?,
            Step::Receive => self.receive().await?,
            Step::Trim => self.trim().await?,
            Step::Wake => self.wake(),
        }
        settle().await;
        Ok(())
    }

    /// Lets every record arrive, and checks what the consumer has handled.
    async fn check(mut self) -> Result<Reached, String> {
        self.forget_trouble();
        self.wake();
        settle().await;
        self.start(0);
        settle().await;
        for process in 0..2 {
            self.kill(process).await?;
        }
        self.receive().await?;
        self.reached.refused = self.refused.load(Ordering::SeqCst);
        let mut times: BTreeMap<u64, usize> = BTreeMap::new();
        let mut last = [None; KEYS as usize];
        for number in &*self.handled.lock().unwrap() {
            *times.entry(*number).or_default() += 1;
            let before = last[(number % KEYS) as usize].replace(*number);
            if before > Some(*number) {
                return Err(format!("record {number} was handled after {before:?} of its key"));
            }
        }
        for number in 0..self.sent {
            let times = times.get(&number).copied().unwrap_or_default();
            match times {
                1 => {}
                0 if self.outbox.gone.get(number.into()).is_some() => {}
                0 => return Err(format!("record {number} of {} was never handled", self.sent)),
                times => return Err(format!("record {number} was handled {times} times")),
            }
        }
        Ok(self.reached)
    }
}

async fn settle() {
    tokio::time::sleep(SETTLED).await;
}

fn run(history: &[Step], defect: Defect) -> Result<Reached, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut world = World::new(defect);
        for step in history {
            world.step(step).await?;
        }
        world.check().await
    })
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Away),
        (0..18_usize).prop_map(Event::Lost),
        Just(Event::Refused),
        Just(Event::FrozenBefore),
        (0..18_usize).prop_map(Event::FrozenAfter),
    ]
}

fn any_freeze() -> impl Strategy<Value = Event> {
    prop_oneof![Just(Event::FrozenBefore), (0..18_usize).prop_map(Event::FrozenAfter)]
}

fn any_leave() -> impl Strategy<Value = Leaves> {
    prop_oneof![Just(Leaves::Deleted), Just(Leaves::Rerouted)]
}

fn any_step() -> impl Strategy<Value = Step> {
    let zombie = (
        0..2_usize,
        any_freeze(),
        1..40_u64,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    );
    prop_oneof![
        4 => (1..40_u64).prop_map(Step::Send),
        1 => Just(Step::Send(FAR)),
        3 => (0..2_usize, vec(any_event(), 1..4)).prop_map(|(process, events)| Step::Trouble(process, events)),
        3 => (0..2_usize).prop_map(Step::Start),
        2 => (0..2_usize).prop_map(Step::Kill),
        2 => (any_freeze(), 1..40_u64, vec((0..20_u64, any_leave()), 1..3))
            .prop_map(|(event, sends, gone)| Step::Crash { event, sends, gone }),
        2 => zombie.prop_map(|(relay, event, sends, is_far, cleans, trims)| {
            let passed = if is_far { FAR } else { sends };
            Step::Zombie { relay, event, sends, passed, cleans, trims }
        }),
        2 => Just(Step::Clean),
        2 => Just(Step::Receive),
        1 => Just(Step::Trim),
        1 => Just(Step::Wake),
    ]
}

/// Which histories are run.
#[derive(Clone, Copy)]
enum Histories {
    /// Others each time.
    Random,
    /// The same each time, so that what they reach does not depend on chance.
    Fixed,
}

/// Runs a hundred histories, and returns the first failure, or all that they have reached.
fn explore(defect: Defect, histories: Histories) -> Result<Reached, String> {
    let config = ProptestConfig {
        cases: 100,
        failure_persistence: None,
        max_shrink_iters: if defect == Defect::None { 200 } else { 0 },
        ..ProptestConfig::default()
    };
    let reached = RefCell::new(Reached::default());
    let mut runner = match histories {
        Histories::Random => TestRunner::new(config),
        Histories::Fixed => TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
    };
    let explored = runner.run(&vec(any_step(), 1..12), |history| {
        let of_this = run(&history, defect).map_err(TestCaseError::fail)?;
        let mut all = reached.borrow_mut();
        all.duplicates += of_this.duplicates;
        all.cleaned += of_this.cleaned;
        all.trimmed += of_this.trimmed;
        all.refused += of_this.refused;
        all.killed_amid_batches += of_this.killed_amid_batches;
        all.gone += of_this.gone;
        all.late_zombies += of_this.late_zombies;
        Ok(())
    });
    match explored {
        Ok(()) => Ok(reached.into_inner()),
        Err(TestError::Fail(why, history)) => Err(format!("{why}, after {history:#?}")),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn a_consumer_behind_an_outbox_handles_each_record_once_and_in_order() {
    explore(Defect::None, Histories::Random).unwrap_or_else(|why| panic!("{why}"));
}

#[test]
fn the_histories_reach_what_they_are_for() {
    let reached = explore(Defect::None, Histories::Fixed).unwrap_or_else(|why| panic!("{why}"));
    let Reached {
        duplicates,
        cleaned,
        trimmed,
        refused,
        killed_amid_batches,
        gone,
        late_zombies,
    } = reached;
    for count in [
        duplicates,
        cleaned,
        trimmed,
        refused,
        killed_amid_batches,
        gone,
        late_zombies,
    ] {
        assert!(count > 0, "no history reached one of them: {reached:?}");
    }
}

/// Explores with a planted defect until a history finds it, and returns what that history found.
fn find(defect: Defect) -> String {
    let Err(found) = explore(defect, Histories::Fixed) else {
        panic!("no history found {defect:?}");
    };
    found
}

#[test]
fn numbers_given_at_the_relay_are_found() {
    let found = find(Defect::NumbersAtTheRelay);
    assert!(found.contains("never handled"), "{found}");
}

#[test]
fn a_new_origin_for_a_record_that_is_sent_again_is_found() {
    let found = find(Defect::NewOriginWhenResent);
    assert!(
        found.contains("times") || found.contains("was handled after"),
        "{found}"
    );
}

#[test]
fn an_outbox_record_that_is_removed_before_it_was_appended_is_found() {
    let found = find(Defect::RemovesBeforeItSends);
    assert!(
        found.contains("Truncated") || found.contains("never handled"),
        "{found}"
    );
}
