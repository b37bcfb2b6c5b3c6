//! What a crash test found, and how it says so.

use std::{collections::BTreeMap, fmt};

use crate::faults::{explorer::Explored, plan::Plan};

/// The size of a crash test that found nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct CrashReport {
    /// What was run.
    pub explored: Explored,
    /// The number of pairs of faults that exist. 0 if they were not counted, in real time.
    pub pairs: usize,
    /// The seed of the sample, if not every plan was run.
    pub seed: Option<u64>,
}

/// The mistakes that a crash test found, each with the first plan that shows it. [`Debug`] shows
/// the same text as [`Display`](fmt::Display), because a test that fails prints it.
#[derive(Clone)]
#[non_exhaustive]
pub struct CrashFindings {
    /// One for each mistake, or for each repeated call.
    pub findings: Vec<CrashFinding>,
    /// What was run.
    pub explored: Explored,
    /// The seed of the sample, if the plans were sampled.
    pub seed: Option<u64>,
}

/// A mistake, and how it shows.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct CrashFinding {
    /// The likely mistake.
    pub mistake: Mistake,
    /// The faults under which it shows. No plan of fewer faults was found to show it.
    pub plan: Plan,
    /// Where the faults struck: `7 is Commit by consumer 0`.
    pub places: Vec<String>,
    /// What differs from the undisturbed run.
    pub differences: Vec<Difference>,
    /// Details, such as the error that ended a run; empty if there are none.
    pub details: String,
}

/// A difference from the undisturbed run.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Difference {
    /// What differs: a key, the records sent with a key to an outbox, a dead letter, an observed
    /// value, or a call.
    pub what: String,
    /// Its value in the undisturbed run. `None` if it is absent there.
    pub expected: Option<String>,
    /// Its value in the run with faults. `None` if it is absent there.
    pub found: Option<String>,
}

/// What is probably wrong with a handler.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Mistake {
    /// A call outside the transaction was made more often than in the undisturbed run.
    EffectRepeated,
    /// A call outside the transaction was made less often than in the undisturbed run.
    EffectLost,
    /// The result differs, but not if every rollback makes a new handler: the handler kept
    /// something in memory across a rollback.
    KeptInMemory,
    /// The result differs even if every rollback makes a new handler, or it depends on when another
    /// program acts: the handler reads or writes something outside its transaction.
    OutsideTransaction,
    /// Two undisturbed runs differ.
    NotRepeatable,
    /// An undisturbed run with another batch size differs.
    DependsOnBatches,
    /// The consumer ended with an error, or did not end.
    Stopped,
    /// The test has no records, or the undisturbed run has no effect that the test can see, or it
    /// writes nothing under a name given with [`key`](super::CrashTest::key) or
    /// [`outbox`](super::CrashTest::outbox).
    NothingToCompare,
    /// The handler failed at every record of the undisturbed run.
    NothingHandled,
}

/// Everything that is compared, by name.
pub(super) type Effects = BTreeMap<String, String>;

/// How many differences of a finding are shown.
const SHOWN: usize = 5;

impl Mistake {
    fn diagnosis(self) -> &'static str {
        match self {
            Self::EffectRepeated => "effect outside the transaction: a call was repeated",
            Self::EffectLost => "effect outside the transaction: a call was lost",
            Self::KeptInMemory => "the handler kept something in memory across a rollback",
            Self::OutsideTransaction => "the handler uses something outside its transaction",
            Self::NotRepeatable => "two runs without faults differ",
            Self::DependsOnBatches => "the result depends on which records share a batch",
            Self::Stopped => "the consumer stopped",
            Self::NothingToCompare => "the run without faults leaves nothing that the test can compare",
            Self::NothingHandled => "no record was handled, even without faults",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::EffectRepeated => {
                "A call outside the transaction is at-least-once. Send a record to an outbox in the transaction and \
                 make the call from there, or let the receiver drop repeated calls and accept this one with \
                 `CrashTest::idempotent`."
            }
            Self::EffectLost => {
                "The handler noted the call as made before it made it. Note it in the transaction only, or send a \
                 record to an outbox in the transaction and make the call from there."
            }
            Self::KeptInMemory => {
                "With a new handler after each rollback, the same plan gives the expected result. Drop everything \
                 cached or gathered since the last commit in `Handler::reset`, or read it from the transaction for \
                 each record."
            }
            Self::OutsideTransaction => {
                "A new handler after each rollback does not help. Look for a field that begins again after a restart, \
                 because the handler does not load it from the transaction. Or look for another consumer's state, a \
                 second store or connection, a static, or something that `make_handler` shares between instances: it \
                 is neither rolled back nor read together with the state. Keep it in the transaction's own state, or \
                 put it in the record."
            }
            Self::NotRepeatable => {
                "The result depends on something other than the records and the transaction: a clock, a random \
                 number, the order of a hash map, another store, or something that `make_handler` keeps from run to \
                 run. Take it from the record or the transaction, or reset it with `CrashTest::before_each`."
            }
            Self::DependsOnBatches => {
                "Faults change where batches end. Compute the result from records and state alone, and gather no more \
                 in a batch than can be written for each record."
            }
            Self::Stopped => {
                "Return a backend's error as it is, with `?`, so that the consumer goes back to its position and tries \
                 again. Only a record that can never be handled is rejected, and only a handler that can never go on \
                 is fatal."
            }
            Self::NothingToCompare => {
                "Name what the handler writes with `CrashTest::key`, `outbox` or `observe`, spelled as it writes them, \
                 report its calls to the probe, and give records that it handles."
            }
            Self::NothingHandled => {
                "Mend the handler, or give records that it handles too: with dead letters alone, no fault shows \
                 anything."
            }
        }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.diagnosis())
    }
}

/// The values that differ, by name.
pub(super) fn differences(expected: &Effects, found: &Effects) -> Vec<Difference> {
    let absent = found.keys().filter(|name| !expected.contains_key(*name));
    let mut names: Vec<_> = expected.keys().chain(absent).collect();
    names.sort();
    let differs = names.into_iter().filter(|name| expected.get(*name) != found.get(*name));
    differs
        .map(|name| Difference {
            what: name.clone(),
            expected: expected.get(name).cloned(),
            found: found.get(name).cloned(),
        })
        .collect()
}

impl CrashFinding {
    pub(super) fn new(mistake: Mistake, plan: &Plan) -> Self {
        Self {
            mistake,
            plan: plan.clone(),
            places: Vec::new(),
            differences: Vec::new(),
            details: String::new(),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".into());
        let (expected, found) = (value(&self.expected), value(&self.found));
        write!(f, "{}: expected {expected}, found {found}", self.what)
    }
}

impl fmt::Display for CrashFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.mistake)?;
        for difference in self.differences.iter().take(SHOWN) {
            write!(f, "\n   {difference}")?;
        }
        if let more @ 1.. = self.differences.len().saturating_sub(SHOWN) {
            write!(f, "\n   and {more} more")?;
        }
        if !self.details.is_empty() {
            write!(f, "\n   {}", self.details)?;
        }
        if self.plan != Plan::none() {
            write!(f, "\n   under plan {} ({})", self.plan, self.places.join(", "))?;
        }
        write!(f, "\n   {}", self.mistake.advice())
    }
}

impl fmt::Display for CrashFindings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.findings.len();
        let mistakes = if count == 1 { "mistake" } else { "mistakes" };
        write!(f, "the crash test found {count} {mistakes} in {}", self.explored)?;
        if let Some(seed) = self.seed {
            write!(f, ", seed {seed}")?;
        }
        for (number, finding) in (1..).zip(&self.findings) {
            write!(f, "\n{number}. {finding}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for CrashFindings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for CrashFindings {}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.explored)?;
        match self.seed {
            Some(seed) => write!(f, ", sampled with seed {seed}"),
            None => Ok(()),
        }
    }
}
