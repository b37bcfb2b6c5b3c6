//! Chooses which plans to run, and reports the findings.

use std::{fmt, io, time::Duration};

use essentially_once::backend::Source;
use tokio::{
    runtime::{Builder, Runtime},
    task::yield_now,
    time::timeout,
};

use super::{
    control::{Faults, Step},
    letters::{self, Call, LetterScene, Times, Verb},
    plan::{Fault, FaultKind, Plan},
    scene::Scene,
};
use crate::{
    checker::Expectation,
    harness::{Harness, Support},
    violation::Violation,
};

/// The time limit of a plan on a backend that does I/O.
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// How long a consumer stays frozen or slow at most. Another one may need a lock that it holds.
pub(super) const PATIENCE: Duration = Duration::from_millis(500);
/// The same with dead letters, where operators need that lock, too, and often.
const PATIENCE_WITH_OPERATORS: Duration = Duration::from_millis(100);
/// How long a handler may take for a record if one hangs.
const RECORD_TIME_LIMIT: Duration = Duration::from_millis(30);
/// When the successor of a process that dies of a record takes over.
const STANDBY_AFTER: Duration = Duration::from_millis(50);

/// Runs a consumer with a fault at each operation. See the [module](super).
///
/// The log holds four records with two keys. One record is sent twice. All methods block, each in
/// its own single-threaded tokio runtime.
#[derive(Debug)]
pub struct Explorer<'h, H> {
    harness: &'h H,
    delivery: Expectation,
    max_batch: usize,
    is_real_time: bool,
    has_letters: bool,
}

/// What a run did, and how it ended.
pub(super) struct Outcome<T = ()> {
    /// The operations of the run, until the consumers had caught up.
    pub(super) trace: Vec<Step>,
    pub(super) verdict: Result<T, Violation>,
}

/// The size of an exploration that found nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Explored {
    /// The number of plans run, including the one without faults.
    pub plans: usize,
    /// The number of faults that struck. A sampled plan may name an operation that its run never
    /// reaches.
    pub faults: usize,
    /// The number of operations in the run without faults.
    pub operations: usize,
}

/// A plan under which a delivery breaks its promise.
#[derive(Debug)]
#[non_exhaustive]
pub struct Counterexample {
    /// The plan. [`Explorer::replay`] runs it again.
    pub plan: Plan,
    /// The delivery.
    pub delivery: Expectation,
    /// The consumer's `max_batch`.
    pub max_batch: usize,
    /// The seed of the sample that produced the plan.
    pub seed: Option<u64>,
    /// Where the faults struck: `7 is Commit by consumer 0`.
    pub places: Vec<String>,
    /// The broken promise.
    pub finding: Violation,
}

impl<'h, H: Harness> Explorer<'h, H> {
    /// Creates an explorer of one delivery on the harness's backend. Time is paused, and advances
    /// only when all consumers wait. This is fast and deterministic, but works only for backends
    /// that do no I/O.
    pub fn new(harness: &'h H, delivery: Expectation) -> Self {
        Self {
            harness,
            delivery,
            max_batch: 2,
            is_real_time: false,
            has_letters: false,
        }
    }

    /// Creates an explorer of what becomes of records that cannot be handled, on a backend whose
    /// transactions keep dead letters.
    ///
    /// The log holds seven records: four messages with two keys and one without, two of them sent
    /// twice. The consumer is essentially-once and sets records aside. Handlers are in
    /// [trouble](super::Trouble) with some records, and operators [act](super::Call) between two
    /// operations. In the end a healthy consumer handles what is left.
    ///
    /// Every record must have taken effect once, or have been discarded or skipped by an operator,
    /// in the order of its key. Behind a seek back, records take effect again. A record is never
    /// both a letter and handled, and an edited one takes effect as it was edited.
    pub fn dead_letters(harness: &'h H) -> Self {
        Self {
            has_letters: true,
            ..Self::new(harness, Expectation::EssentiallyOnce)
        }
    }

    /// Sets the consumer's [`max_batch`](essentially_once::Consumer::max_batch) and its read-ahead.
    /// The default is 2.
    #[must_use]
    pub fn max_batch(mut self, records: usize) -> Self {
        self.max_batch = records;
        self
    }

    /// Uses real time, for a backend that does I/O.
    #[must_use]
    pub fn real_time(mut self) -> Self {
        self.is_real_time = true;
        self
    }

    /// Runs every plan with one fault, then every plan with two, each on a fresh backend. That
    /// order makes the first counterexample as simple as possible.
    ///
    /// With dead letters, it runs every trouble alone, and then some troubles with every fault and
    /// every call at each operation.
    ///
    /// # Errors
    /// The first plan that breaks the promise, or that behaves differently when it is run again.
    pub fn explore(&self) -> Result<Explored, Box<Counterexample>> {
        let runtime = self.runtime(&Plan::none())?;
        let run = |plan: &Plan| self.run_on_fresh_backend(&runtime, plan);
        if self.has_letters {
            return self.explore_letters(run);
        }
        let operations = run(&Plan::none())?.len();
        let mut explored = Explored::new(operations);
        let mut pairs = Vec::new();
        for first in faults(1..=operations) {
            let plan = Plan::new([first]);
            let trace = run(&plan)?;
            explored.count(&plan, &trace);
            pairs.extend(pairs_from(first, trace.len()));
        }
        for plan in pairs {
            let trace = run(&plan)?;
            if explored.count(&plan, &trace) < plan.faults().len() {
                let finding = Violation::new("a fault did not strike: the backend behaves differently from run to run");
                return Err(self.counterexample(&plan, &trace, finding));
            }
        }
        Ok(explored)
    }

    fn explore_letters(
        &self,
        run: impl Fn(&Plan) -> Result<Vec<Step>, Box<Counterexample>>,
    ) -> Result<Explored, Box<Counterexample>> {
        let mut explored = Explored::new(run(&Plan::none())?.len());
        for plan in letters::single_troubles() {
            explored.count(&plan, &run(&plan)?);
        }
        for base in letters::BASES {
            let with_calls = base.with_calls;
            let (base, begin) = base.plan(run(&base.without_calls())?.len());
            let operations = begin..=run(&base)?.len();
            for plan in faults(operations.clone()).map(|fault| base.clone().with_fault(fault)) {
                explored.count(&plan, &run(&plan)?);
            }
            for plan in calls(operations)
                .filter(|_| with_calls)
                .map(|call| base.clone().with_call(call))
            {
                explored.count(&plan, &run(&plan)?);
            }
        }
        Ok(explored)
    }

    /// Runs `plans` random plans with one or two faults. All share one backend, but each has its
    /// own log and consumer. Equal seeds give equal plans.
    ///
    /// # Errors
    /// The first plan that breaks the promise.
    pub fn sample(&self, seed: u64, plans: usize) -> Result<Explored, Box<Counterexample>> {
        let runtime = self.runtime(&Plan::none())?;
        let result = runtime.block_on(self.run_sample(seed, plans));
        release(runtime);
        result.map_err(|mut found| {
            found.seed = Some(seed);
            found
        })
    }

    /// Runs one plan on a fresh backend.
    ///
    /// # Errors
    /// The plan, if it breaks the promise.
    pub fn replay(&self, plan: &Plan) -> Result<(), Box<Counterexample>> {
        let runtime = self.runtime(plan)?;
        let result = self.run_on_fresh_backend(&runtime, plan);
        release(runtime);
        result.map(drop)
    }

    async fn run_sample(&self, seed: u64, plans: usize) -> Result<Explored, Box<Counterexample>> {
        let backend = self.harness.start(&self.namespace()).await;
        let backend = &backend.map_err(|error| self.failed_to_start(&Plan::none(), error))?;
        let run = async |plan: &Plan, name: String| {
            let outcome = self.play(backend, name, plan).await;
            self.judge(plan, outcome)
        };
        let operations = run(&Plan::none(), "none".into()).await?.len();
        let mut explored = Explored::new(operations);
        let mut rng = fastrand::Rng::with_seed(seed);
        for number in 0..plans {
            let plan = match self.has_letters {
                true => letters::random_plan(&mut rng, operations),
                false => random_plan(&mut rng, operations),
            };
            let trace = run(&plan, format!("plan-{number}")).await?;
            explored.count(&plan, &trace);
        }
        Ok(explored)
    }

    fn run_on_fresh_backend(&self, runtime: &Runtime, plan: &Plan) -> Result<Vec<Step>, Box<Counterexample>> {
        runtime.block_on(async {
            let backend = self.harness.start(&self.namespace()).await;
            let backend = backend.map_err(|error| self.failed_to_start(plan, error))?;
            let outcome = self.play(&backend, "plan".into(), plan).await;
            self.judge(plan, outcome)
        })
    }

    async fn play(&self, backend: &H::Backend, name: String, plan: &Plan) -> Outcome {
        let faults = match self.has_letters {
            true => Faults::new(plan.clone()).take_turns(),
            false => Faults::new(plan.clone()),
        };
        within_limit(&faults, async {
            match self.has_letters {
                true => self.letter_scene(backend, name).play(&faults, plan).await,
                false => self.scene(backend, name).play(&faults).await,
            }
        })
        .await
    }

    fn scene<'b>(&self, backend: &'b H::Backend, name: String) -> Scene<'b, H::Backend> {
        Scene {
            backend,
            name,
            delivery: self.delivery,
            max_batch: self.max_batch,
            pauses: self.pauses(),
            patience: self.is_real_time.then_some(PATIENCE),
            is_native: self.harness.capabilities().native == Support::Yes,
            sends: self.harness.capabilities().outbox == Support::Yes,
        }
    }

    fn letter_scene<'b>(&self, backend: &'b H::Backend, name: String) -> LetterScene<'b, H::Backend> {
        LetterScene {
            backend,
            name,
            max_batch: self.max_batch,
            times: Times {
                pauses: self.pauses(),
                record_time_limit: RECORD_TIME_LIMIT,
                standby_after: STANDBY_AFTER,
                patience: self.is_real_time.then_some(PATIENCE_WITH_OPERATORS),
            },
        }
    }

    fn pauses(&self) -> (Duration, Duration) {
        pauses(self.is_real_time)
    }

    fn runtime(&self, plan: &Plan) -> Result<Runtime, Box<Counterexample>> {
        new_runtime(self.is_real_time).map_err(|error| self.failed_to_start(plan, error.into()))
    }

    fn namespace(&self) -> String {
        match self.has_letters {
            true => "faults_dead_letters".into(),
            false => format!("faults_{}", self.delivery).replace('-', "_"),
        }
    }

    fn judge(&self, plan: &Plan, outcome: Outcome) -> Result<Vec<Step>, Box<Counterexample>> {
        let Outcome { trace, verdict } = outcome;
        match verdict {
            Ok(()) => Ok(trace),
            Err(finding) => Err(self.counterexample(plan, &trace, finding)),
        }
    }

    fn failed_to_start(&self, plan: &Plan, error: Source) -> Box<Counterexample> {
        self.counterexample(plan, &[], error.into())
    }

    fn counterexample(&self, plan: &Plan, trace: &[Step], finding: Violation) -> Box<Counterexample> {
        Box::new(Counterexample {
            plan: plan.clone(),
            delivery: self.delivery,
            max_batch: self.max_batch,
            seed: None,
            places: places(plan, trace),
            finding,
        })
    }
}

impl Explored {
    pub(super) fn new(operations: usize) -> Self {
        Self {
            plans: 1,
            faults: 0,
            operations,
        }
    }

    /// Counts a plan that was run. Returns how many of its faults struck.
    pub(super) fn count(&mut self, plan: &Plan, trace: &[Step]) -> usize {
        let faults = plan.faults().iter();
        let struck = faults.filter(|fault| fault.operation <= trace.len()).count();
        self.plans += 1;
        self.faults += struck;
        struck
    }
}

impl fmt::Display for Explored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = |count, noun| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
        let (plans, faults) = (counted(self.plans, "plan"), counted(self.faults, "fault"));
        write!(f, "{plans}, {faults}, over {}", counted(self.operations, "operation"))
    }
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, max_batch {}, plan {}", self.delivery, self.max_batch, self.plan)?;
        if !self.places.is_empty() {
            write!(f, " ({})", self.places.join(", "))?;
        }
        if let Some(seed) = self.seed {
            write!(f, ", seed {seed}")?;
        }
        write!(f, ": {}", self.finding)
    }
}

impl std::error::Error for Counterexample {}

impl From<Box<Counterexample>> for Violation {
    fn from(found: Box<Counterexample>) -> Self {
        Self::new(found.to_string())
    }
}

/// Plays a run, and ends it if it gets stuck.
pub(super) async fn within_limit<T>(faults: &Faults, run: impl Future<Output = Result<T, Violation>>) -> Outcome<T> {
    // Under paused time, the limit expires at once if all consumers wait for each other.
    let verdict = timeout(TIME_LIMIT, run)
        .await
        .unwrap_or_else(|_| Err(Violation::new(format!("still waiting after {TIME_LIMIT:?}"))));
    // Lets the tasks of dropped consumers end, so that they do not become part of the next run.
    yield_now().await;
    let trace = faults.trace();
    Outcome { trace, verdict }
}

/// A consumer's shortest and longest backoff.
pub(super) fn pauses(is_real_time: bool) -> (Duration, Duration) {
    match is_real_time {
        true => (Duration::from_millis(1), Duration::from_millis(20)),
        false => (Duration::ZERO, Duration::ZERO),
    }
}

/// Under paused time it has no I/O driver, because polling one would take most of the time.
pub(super) fn new_runtime(is_real_time: bool) -> io::Result<Runtime> {
    let mut builder = Builder::new_current_thread();
    match is_real_time {
        true => builder.enable_all(),
        false => builder.enable_time().start_paused(true),
    };
    builder.build()
}

/// Where the events of a plan struck.
pub(super) fn places(plan: &Plan, trace: &[Step]) -> Vec<String> {
    let faults = plan.faults().iter().map(|fault| fault.operation);
    let calls = plan.calls().iter().map(|call| call.operation);
    faults.chain(calls).map(|number| place(number, trace)).collect()
}

/// What the operation with this number is.
pub(super) fn place(number: usize, trace: &[Step]) -> String {
    match trace.get(number - 1) {
        Some(Step { operation, process }) => format!("{number} is {operation:?} by consumer {process}"),
        None => format!("{number} was not reached"),
    }
}

/// Tasks left behind by a stuck backend must not hold up the caller.
pub(super) fn release(runtime: Runtime) {
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// This fault and every later one, in a run of that many operations.
pub(super) fn pairs_from(first: Fault, operations: usize) -> impl Iterator<Item = Plan> {
    faults(first.operation + 1..=operations).map(move |second| Plan::new([first, second]))
}

/// Every kind of fault at each of these operations.
pub(super) fn faults(operations: impl Iterator<Item = usize>) -> impl Iterator<Item = Fault> {
    operations.flat_map(|operation| FaultKind::ALL.map(|kind| Fault { operation, kind }))
}

/// Every call at each of these operations.
fn calls(operations: impl Iterator<Item = usize>) -> impl Iterator<Item = Call> {
    operations.flat_map(|operation| Verb::ALL.map(|verb| Call { operation, verb }))
}

/// One or two faults. The second may strike an operation that exists only because of the first,
/// which makes the run longer.
pub(super) fn random_plan(rng: &mut fastrand::Rng, operations: usize) -> Plan {
    let mut fault = |range: std::ops::RangeInclusive<usize>| Fault {
        operation: rng.usize(range),
        kind: FaultKind::ALL[rng.usize(..FaultKind::ALL.len())],
    };
    let first = fault(1..=operations.max(1));
    let second = fault(first.operation + 1..=first.operation + operations.max(1));
    match rng.u8(..3) {
        0 => Plan::new([first]),
        _ => Plan::new([first, second]),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::memory::MemoryHarness;

    #[test]
    fn a_run_is_the_same_each_time() {
        for delivery in [
            Expectation::EssentiallyOnce,
            Expectation::AtLeastOnce,
            Expectation::AtMostOnce,
        ] {
            let explorer = Explorer::new(&MemoryHarness, delivery);
            let runtime = explorer.runtime(&Plan::none()).unwrap();
            for fault in faults(1..=30) {
                let plan = Plan::new([fault]);
                let new_runtime = explorer.runtime(&plan).unwrap();
                let run = |runtime| explorer.run_on_fresh_backend(runtime, &plan).unwrap();
                assert_eq!(run(&runtime), run(&new_runtime), "{delivery}, {plan}");
            }
        }
    }

    #[test]
    fn equal_seeds_give_equal_plans() {
        let plans = |seed| {
            let mut rng = fastrand::Rng::with_seed(seed);
            (0..50).map(|_| random_plan(&mut rng, 20)).collect::<Vec<_>>()
        };
        assert_eq!(plans(7), plans(7));
        assert_ne!(plans(7), plans(8));
    }
}
