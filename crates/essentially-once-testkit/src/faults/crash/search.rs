//! Chooses the plans of a crash test, and names the mistakes that they show.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
};

use essentially_once::{
    Log,
    backend::Transaction,
    memory::{Memory, MemoryLog},
};
use tokio::runtime::Runtime;

use super::{
    CrashFinding, CrashFindings, CrashReport, CrashTest, Difference, Mistake, TxOf,
    findings::differences,
    probe::Calls,
    run::{NAME, Played, Run, Seen, Setup, empty_names},
};
use crate::{
    faults::{
        control::Step,
        explorer::{Explored, faults, new_runtime, pairs_from, place, places, random_plan, release},
        plan::{Fault, Plan},
    },
    harness::Harness,
    violation::Violation,
};

pub(super) struct Search<'t, H: Harness> {
    test: &'t CrashTest<H>,
    is_cancelled: &'t AtomicBool,
    /// `None` once it was released.
    runtime: Option<Runtime>,
    log: MemoryLog,
    has_letters: bool,
    /// What the undisturbed run left behind.
    expected: Seen,
    explored: Explored,
    pairs: usize,
    findings: Vec<CrashFinding>,
    seed: u64,
    is_sampled: bool,
}

/// A test that could not run.
pub(super) fn failed(details: String) -> CrashFindings {
    let mut finding = CrashFinding::new(Mistake::Stopped, &Plan::none());
    finding.details = details;
    CrashFindings {
        findings: vec![finding],
        explored: Explored::new(0),
        seed: None,
    }
}

impl<'t, H: Harness> Search<'t, H> {
    pub(super) fn new(test: &'t CrashTest<H>, is_cancelled: &'t AtomicBool) -> Result<Self, CrashFindings> {
        if test.most_plans() == 0 {
            return Err(failed(
                "the limit is 0, so no fault would be tried; raise `CrashTest::limit`".into(),
            ));
        }
        let runtime = new_runtime(test.is_real_time).map_err(|error| failed(error.to_string()))?;
        let log = Memory::new().log(NAME).map_err(|error| failed(error.to_string()))?;
        let appended = runtime.block_on(log.append(&test.records));
        appended.map_err(|error| failed(format!("the records cannot be appended: {error}")))?;
        Ok(Self {
            test,
            is_cancelled,
            runtime: Some(runtime),
            log,
            has_letters: false,
            expected: Seen::default(),
            explored: Explored::new(0),
            pairs: 0,
            findings: Vec::new(),
            seed: test.seed.unwrap_or_else(|| fastrand::u64(..)),
            is_sampled: false,
        })
    }

    pub(super) fn run(mut self) -> Result<CrashReport, CrashFindings> {
        self.run_undisturbed();
        if self.findings.is_empty() {
            self.run_with_faults();
        }
        if let Some(runtime) = self.runtime.take() {
            release(runtime);
        }
        let seed = self.is_sampled.then_some(self.seed);
        let (explored, pairs) = (self.explored, self.pairs);
        if self.findings.is_empty() {
            return Ok(CrashReport { explored, pairs, seed });
        }
        self.findings.sort_by_key(|finding| finding.mistake);
        Err(CrashFindings {
            findings: self.findings,
            explored,
            seed,
        })
    }

    fn run_undisturbed(&mut self) {
        if self.test.records.is_empty() {
            return self.found_nothing(
                Mistake::NothingToCompare,
                "there are no records; give some to `CrashTest::records`".into(),
            );
        }
        let mut first = self.play(&Plan::none(), self.setup());
        let mut first_error = None;
        if first.said.unhandled.is_some() && TxOf::<H>::KEEPS_DEAD_LETTERS {
            self.has_letters = true;
            first_error = first.said.unhandled.take();
            first = self.play(&Plan::none(), self.setup());
        }
        self.explored = Explored::new(first.outcome.trace.len());
        let expected = match first.outcome.verdict {
            Ok(seen) => seen,
            Err(violation) => return self.stopped(&Plan::none(), &[], &violation),
        };
        if first.said.handled == 0
            && let Some(error) = first_error
        {
            return self.found_nothing(Mistake::NothingHandled, format!("the first error was: {error}"));
        }
        if expected.effects.is_empty() && expected.calls.is_empty() {
            return self.found_nothing(Mistake::NothingToCompare, String::new());
        }
        let empty = empty_names(self.test, &expected.effects);
        if !empty.is_empty() {
            let details = format!("named, but without a value or record: {}", empty.join("; "));
            return self.found_nothing(Mistake::NothingToCompare, details);
        }
        self.expected = expected;
        self.run_again(Mistake::NotRepeatable, self.setup());
        if self.findings.is_empty() && self.test.max_batch > 1 {
            let max_batch = 1;
            self.run_again(
                Mistake::DependsOnBatches,
                Setup {
                    max_batch,
                    ..self.setup()
                },
            );
        }
        if self.test.meanwhile.is_some() {
            for act_before in 2..=self.explored.operations {
                if !self.findings.is_empty() || self.is_cancelled.load(Ordering::Relaxed) {
                    break;
                }
                let trace = self.run_again(
                    Mistake::OutsideTransaction,
                    Setup {
                        act_before,
                        ..self.setup()
                    },
                );
                if let Some(found) = self.findings.last_mut() {
                    let place = place(act_before, &trace);
                    let when = format!("without faults, when the other program acted before operation {place}");
                    found.details = match &*found.details {
                        "" => when,
                        why => format!("{when}: {why}"),
                    };
                }
            }
        }
    }

    /// Adds a mistake that leaves nothing to try faults on.
    fn found_nothing(&mut self, mistake: Mistake, details: String) {
        let mut finding = CrashFinding::new(mistake, &Plan::none());
        finding.details = details;
        self.findings.push(finding);
    }

    /// Runs without faults, and finds this mistake if the result differs.
    fn run_again(&mut self, mistake: Mistake, setup: Setup) -> Vec<Step> {
        let again = self.play(&Plan::none(), setup).outcome;
        match again.verdict {
            Err(violation) => self.stopped(&Plan::none(), &again.trace, &violation),
            Ok(seen) => {
                let mut differences = differences(&self.expected.effects, &seen.effects);
                // Calls in `flush` are as many as batches.
                if mistake == Mistake::NotRepeatable {
                    differences.extend(
                        differing_calls(&self.expected.calls, &seen.calls).map(|(_, _, difference)| difference),
                    );
                }
                if !differences.is_empty() {
                    let mut finding = CrashFinding::new(mistake, &Plan::none());
                    finding.differences = differences;
                    self.findings.push(finding);
                }
            }
        }
        again.trace
    }

    fn run_with_faults(&mut self) {
        if let Some(plan) = self.test.only.clone() {
            let operations = self.run_plan(&plan);
            let is_late = |fault: &&Fault| fault.operation > operations;
            if let (true, Some(late)) = (self.findings.is_empty(), plan.faults().iter().find(is_late)) {
                self.add(Mistake::Stopped, &plan, &[], Vec::new());
                if let Some(found) = self.findings.last_mut() {
                    found.details = format!(
                        "the fault at operation {} did not strike: the run has {operations} operations",
                        late.operation
                    );
                }
            }
            return;
        }
        let mut rng = fastrand::Rng::with_seed(self.seed);
        if self.test.is_real_time {
            self.is_sampled = true;
            for _ in 0..self.test.most_plans() {
                let plan = random_plan(&mut rng, self.explored.operations);
                self.run_plan(&plan);
            }
            return;
        }
        let mut singles: Vec<Fault> = faults(1..=self.explored.operations).collect();
        if singles.len() > self.test.most_plans() {
            self.is_sampled = true;
            rng.shuffle(&mut singles);
            singles.truncate(self.test.most_plans());
            singles.sort_by_key(|fault| fault.operation);
        }
        let mut firsts = Vec::new();
        for fault in singles {
            let operations = self.run_plan(&Plan::new([fault]));
            firsts.push((fault, operations));
        }
        let seconds = |(first, operations): &(Fault, usize)| pairs_from(*first, *operations).count();
        let counts: Vec<usize> = firsts.iter().map(seconds).collect();
        self.pairs = counts.iter().sum();
        if !self.findings.is_empty() {
            return;
        }
        let room = self.test.most_plans().saturating_sub(firsts.len());
        let chosen: BTreeSet<usize> = if self.pairs > room {
            self.is_sampled = true;
            let mut chosen = BTreeSet::new();
            while chosen.len() < room {
                chosen.insert(rng.usize(..self.pairs));
            }
            chosen
        } else {
            (0..self.pairs).collect()
        };
        let mut begin = 0;
        for ((first, operations), count) in firsts.into_iter().zip(counts) {
            let mut seconds = pairs_from(first, operations);
            let mut taken = 0;
            for number in chosen.range(begin..begin + count).map(|number| number - begin) {
                if let Some(plan) = seconds.nth(number - taken) {
                    self.run_plan(&plan);
                }
                taken = number + 1;
            }
            begin += count;
        }
    }

    /// Runs a plan, and adds what it shows. Returns the number of its operations.
    fn run_plan(&mut self, plan: &Plan) -> usize {
        if self.is_cancelled.load(Ordering::Relaxed) {
            return 0;
        }
        let outcome = self.play(plan, self.setup()).outcome;
        self.explored.count(plan, &outcome.trace);
        match outcome.verdict {
            Err(violation) => self.stopped(plan, &outcome.trace, &violation),
            Ok(seen) => self.compare(plan, &outcome.trace, &seen),
        }
        outcome.trace.len()
    }

    fn compare(&mut self, plan: &Plan, trace: &[Step], seen: &Seen) {
        let is_accepted =
            |name: &str, mistake| mistake == Mistake::EffectRepeated && self.test.idempotent.contains(name);
        let calls: Vec<_> = differing_calls(&self.expected.calls, &seen.calls)
            .filter(|(name, mistake, _)| !is_accepted(name, *mistake))
            .map(|(_, mistake, difference)| (mistake, difference))
            .collect();
        for (mistake, difference) in calls {
            let is_known = |known: &CrashFinding| {
                known.mistake == mistake && known.differences.iter().any(|other| other.what == difference.what)
            };
            if !self.findings.iter().any(is_known) {
                self.add(mistake, plan, trace, vec![difference]);
            }
        }
        let differences = differences(&self.expected.effects, &seen.effects);
        if differences.is_empty() {
            return;
        }
        let is_renewed = true;
        let renewed = self
            .play(
                plan,
                Setup {
                    is_renewed,
                    ..self.setup()
                },
            )
            .outcome
            .verdict;
        let mistake = match renewed {
            Ok(renewed) if renewed.effects == self.expected.effects => Mistake::KeptInMemory,
            _ => Mistake::OutsideTransaction,
        };
        if !self.has_found(mistake) {
            self.add(mistake, plan, trace, differences);
        }
    }

    fn stopped(&mut self, plan: &Plan, trace: &[Step], violation: &Violation) {
        if !self.has_found(Mistake::Stopped) {
            self.add(Mistake::Stopped, plan, trace, Vec::new());
            if let Some(found) = self.findings.last_mut() {
                found.details = violation.to_string();
            }
        }
    }

    fn add(&mut self, mistake: Mistake, plan: &Plan, trace: &[Step], differences: Vec<Difference>) {
        let mut finding = CrashFinding::new(mistake, plan);
        finding.places = places(plan, trace);
        finding.differences = differences;
        self.findings.push(finding);
    }

    fn has_found(&self, mistake: Mistake) -> bool {
        self.findings.iter().any(|found| found.mistake == mistake)
    }

    fn setup(&self) -> Setup {
        Setup {
            max_batch: self.test.max_batch,
            has_letters: self.has_letters,
            is_renewed: false,
            act_before: 1,
        }
    }

    fn play(&self, plan: &Plan, setup: Setup) -> Played {
        let run = Run {
            test: self.test,
            log: &self.log,
            setup,
        };
        let runtime = self.runtime.as_ref().expect("released only at the end");
        runtime.block_on(run.play(plan))
    }
}

/// The calls that were made more or less often than expected.
fn differing_calls<'c>(expected: &'c Calls, found: &'c Calls) -> impl Iterator<Item = (&'c str, Mistake, Difference)> {
    let absent = found.keys().filter(|call| !expected.contains_key(*call));
    let calls = expected.keys().chain(absent);
    let times = |calls: &Calls, call| calls.get(call).copied().unwrap_or(0);
    calls
        .map(move |call| (call, times(expected, call), times(found, call)))
        .filter(|(_, expected, found)| expected != found)
        .map(|(call, expected, found)| {
            let mistake = match found > expected {
                true => Mistake::EffectRepeated,
                false => Mistake::EffectLost,
            };
            let shown = |times: usize| Some(format!("{times} {}", if times == 1 { "call" } else { "calls" }));
            let (what, expected, found) = (call.to_string(), shown(expected), shown(found));
            (&*call.name, mistake, Difference { what, expected, found })
        })
}
