//! The plans to explore.

use super::{
    operator::{Call, Verb},
    trouble::{Trouble, TroubleKind},
};
use crate::faults::plan::{Fault, FaultKind, Plan};

/// How many records the log holds.
const RECORDS: usize = 7;

/// How many operations after each other the operators of a [`Base`] act.
const BETWEEN_CALLS: usize = 8;

/// Records in trouble, and what operators do about it. One more event is added at each operation.
pub(in crate::faults) struct Base {
    troubles: &'static [Trouble],
    verbs: &'static [Verb],
    /// Whether one more operator acts at each operation. A fault strikes in any case.
    pub(in crate::faults) with_calls: bool,
}

impl Base {
    /// The plan without operators.
    pub(in crate::faults) fn without_calls(&self) -> Plan {
        Plan::none().with_troubles(self.troubles.iter().copied())
    }

    /// The plan, and the first operation at which it differs from that of others. `operations` is
    /// the length of the run without operators. They act in its last third.
    pub(in crate::faults) fn plan(&self, operations: usize) -> (Plan, usize) {
        let begin = operations * 2 / 3;
        let numbers = (begin..).step_by(BETWEEN_CALLS);
        let calls = numbers
            .zip(self.verbs)
            .map(|(operation, &verb)| Call { operation, verb });
        let plan = self.without_calls().with_calls(calls);
        let first = match self.verbs.is_empty() {
            // No record is in trouble yet.
            true => operations / 4,
            false => begin,
        };
        (plan, first.max(1))
    }
}

pub(in crate::faults) const BASES: [Base; 6] = [
    // Two keys, and letters behind another.
    Base {
        troubles: &[
            troubled(0, TroubleKind::FailsTimes(3)),
            troubled(1, TroubleKind::Rejects),
        ],
        verbs: &[],
        with_calls: true,
    },
    // Letters are retried while records wait.
    Base {
        troubles: &[
            troubled(0, TroubleKind::FailsTimes(2)),
            troubled(4, TroubleKind::Panics),
        ],
        verbs: &[Verb::RetryAll],
        with_calls: true,
    },
    // A letter behind another is gone when its key is retried.
    Base {
        troubles: &[troubled(0, TroubleKind::FailsTimes(2))],
        verbs: &[Verb::DiscardLast, Verb::Edit],
        with_calls: false,
    },
    // The records of letters are read again.
    Base {
        troubles: &[troubled(0, TroubleKind::FailsTimes(3))],
        verbs: &[Verb::SeekToStart],
        with_calls: false,
    },
    // In a batch of four, the records before a rejected one are handled again.
    Base {
        troubles: &[troubled(1, TroubleKind::FailsAgain), troubled(3, TroubleKind::Rejects)],
        verbs: &[],
        with_calls: false,
    },
    Base {
        troubles: &[troubled(3, TroubleKind::Kills)],
        verbs: &[Verb::Pause],
        with_calls: false,
    },
];

const fn troubled(record: usize, kind: TroubleKind) -> Trouble {
    Trouble { record, kind }
}

/// Every kind of trouble at every record.
pub(in crate::faults) fn single_troubles() -> impl Iterator<Item = Plan> {
    (0..RECORDS).flat_map(|record| TroubleKind::ALL.map(|kind| Plan::none().with_troubles([Trouble { record, kind }])))
}

/// One or two troubles, up to two faults, and up to three calls.
pub(in crate::faults) fn random_plan(rng: &mut fastrand::Rng, operations: usize) -> Plan {
    // What a retry or a crash adds to the run is to be hit, too.
    let operations = 2 * operations.max(1);
    let troubles: Vec<Trouble> = (0..rng.usize(1..=2))
        .map(|_| Trouble {
            record: rng.usize(..RECORDS),
            kind: TroubleKind::ALL[rng.usize(..TroubleKind::ALL.len())],
        })
        .collect();
    let faults: Vec<Fault> = (0..rng.usize(..=2))
        .map(|_| Fault {
            operation: rng.usize(1..=operations),
            kind: FaultKind::ALL[rng.usize(..FaultKind::ALL.len())],
        })
        .collect();
    let calls: Vec<Call> = (0..rng.usize(..=3))
        .map(|_| Call {
            operation: rng.usize(1..=operations),
            verb: Verb::ALL[rng.usize(..Verb::ALL.len())],
        })
        .collect();
    Plan::new(faults).with_calls(calls).with_troubles(troubles)
}
