//! Which fault strikes at which operation, as text that can be replayed.

use std::{fmt, str::FromStr};

use essentially_once::Error;

use super::letters::{Call, Trouble};

/// How an operation fails.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FaultKind {
    /// It fails and has no effect.
    ErrorBefore,
    /// It takes effect, but its reply is lost.
    ErrorAfter,
    /// The consumer dies before it and is started again.
    CrashBefore,
    /// The consumer dies after it and is started again.
    CrashAfter,
    /// The consumer freezes before it. Another one takes over and finishes. Then the first wakes up
    /// and carries on with the operation.
    Zombie,
    /// It takes so long that another consumer starts. Then both run concurrently.
    Slow,
}

impl FaultKind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::ErrorBefore,
        Self::ErrorAfter,
        Self::CrashBefore,
        Self::CrashAfter,
        Self::Zombie,
        Self::Slow,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::ErrorBefore => "error-before",
            Self::ErrorAfter => "error-after",
            Self::CrashBefore => "crash-before",
            Self::CrashAfter => "crash-after",
            Self::Zombie => "zombie",
            Self::Slow => "slow",
        }
    }
}

/// One fault. As text: `7:crash-after`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Fault {
    /// The operation's number in the run. The first operation is 1. Operations of all consumers are
    /// counted together.
    pub operation: usize,
    /// How that operation fails.
    pub kind: FaultKind,
}

/// The faults of one run, ordered by operation. As text: `7:crash-after,12:zombie`, or `none`.
///
/// In a run with [dead letters](super::Explorer::dead_letters), operators may also act, and
/// handlers may be in trouble: `7:crash-after,12:retry-all,record-2:rejects`.
///
/// ```
/// # use essentially_once_testkit::faults::{Fault, FaultKind, Plan};
/// let plan: Plan = "7:crash-after,12:zombie".parse()?;
/// assert_eq!(plan.faults()[1], Fault { operation: 12, kind: FaultKind::Zombie });
/// assert_eq!(plan.to_string(), "7:crash-after,12:zombie");
/// # Ok::<(), essentially_once::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Plan {
    faults: Vec<Fault>,
    calls: Vec<Call>,
    troubles: Vec<Trouble>,
}

impl Plan {
    /// Creates a plan with these faults. If two name the same operation, the first one counts.
    pub fn new(faults: impl IntoIterator<Item = Fault>) -> Self {
        let mut faults: Vec<Fault> = faults.into_iter().collect();
        faults.sort_by_key(|fault| fault.operation);
        faults.dedup_by_key(|fault| fault.operation);
        Self {
            faults,
            ..Self::default()
        }
    }

    /// The same plan with these calls of operators instead of its own. If two name the same
    /// operation, the first one counts.
    #[must_use]
    pub fn with_calls(mut self, calls: impl IntoIterator<Item = Call>) -> Self {
        self.calls = calls.into_iter().collect();
        self.calls.sort_by_key(|call| call.operation);
        self.calls.dedup_by_key(|call| call.operation);
        self
    }

    /// The same plan with these troubles instead of its own. If two name the same record, the first
    /// one counts.
    #[must_use]
    pub fn with_troubles(mut self, troubles: impl IntoIterator<Item = Trouble>) -> Self {
        self.troubles = troubles.into_iter().collect();
        self.troubles.sort_by_key(|trouble| trouble.record);
        self.troubles.dedup_by_key(|trouble| trouble.record);
        self
    }

    /// Creates a plan without faults.
    pub fn none() -> Self {
        Self::default()
    }

    /// The faults, in the order in which they strike.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    pub(super) fn with_fault(mut self, fault: Fault) -> Self {
        self.faults.push(fault);
        let (calls, troubles) = (self.calls, self.troubles);
        Self::new(self.faults).with_calls(calls).with_troubles(troubles)
    }

    /// Its call takes the place of one before the same operation.
    pub(super) fn with_call(self, call: Call) -> Self {
        let calls = [call].into_iter().chain(self.calls.clone());
        let calls: Vec<Call> = calls.collect();
        self.with_calls(calls)
    }

    /// What operators do, in order.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// The records in trouble, in order.
    pub fn troubles(&self) -> &[Trouble] {
        &self.troubles
    }

    pub(super) fn call_at(&self, operation: usize) -> Option<Call> {
        self.calls.iter().find(|call| call.operation == operation).copied()
    }

    pub(super) fn at(&self, operation: usize) -> Option<FaultKind> {
        let fault = self.faults.iter().find(|fault| fault.operation == operation)?;
        Some(fault.kind)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.operation, self.kind)
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults = self.faults.iter().map(ToString::to_string);
        let calls = self.calls.iter().map(ToString::to_string);
        let troubles = self.troubles.iter().map(ToString::to_string);
        let events: Vec<String> = faults.chain(calls).chain(troubles).collect();
        match events.is_empty() {
            true => f.write_str("none"),
            false => f.write_str(&events.join(",")),
        }
    }
}

impl FromStr for Fault {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = || Error::InvalidSetting {
            setting: "fault",
            reason: format!(
                "{text:?} is not `<operation>:<kind>`, such as `7:crash-after`; operations count from 1, kinds are {}",
                FaultKind::ALL.map(FaultKind::name).join(", ")
            ),
        };
        let (operation, name) = text.trim().split_once(':').ok_or_else(invalid)?;
        let kind = FaultKind::ALL.into_iter().find(|kind| kind.name() == name);
        match (operation.parse(), kind) {
            (Ok(operation @ 1..), Some(kind)) => Ok(Self { operation, kind }),
            _ => Err(invalid()),
        }
    }
}

impl FromStr for Plan {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.trim() == "none" {
            return Ok(Self::none());
        }
        let (mut faults, mut calls, mut troubles) = (Vec::new(), Vec::new(), Vec::new());
        for event in text.split(',') {
            if event.trim().starts_with("record-") {
                troubles.push(event.parse()?);
            } else if let Ok(call) = event.parse() {
                calls.push(call);
            } else {
                faults.push(event.parse()?);
            }
        }
        Ok(Self::new(faults).with_calls(calls).with_troubles(troubles))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_round_trip_as_text() {
        for text in [
            "none",
            "1:error-before",
            "2:error-after,3:crash-before,4:crash-after,5:zombie,60:slow",
            "7:retry-all,9:seek-to-start",
            "7:slow,7:pause,record-0:fails,record-2:fails-7,record-3:hangs-until-stopped",
        ] {
            assert_eq!(text.parse::<Plan>().expect(text).to_string(), text);
        }
        let plan: Plan = " 9:zombie, 3:slow ".parse().expect("spaces, any order");
        assert_eq!(plan.to_string(), "3:slow,9:zombie");
    }

    #[test]
    fn bad_plans_are_refused_naming_the_part() {
        for text in [
            "",
            "7",
            "0:slow",
            "7:",
            "x:slow",
            "-1:slow",
            "7:boom",
            "7:slow,",
            "7:slow;8:slow",
        ] {
            let error = text.parse::<Plan>().expect_err(text).to_string();
            assert!(error.contains("crash-after"), "{error}");
        }
        for text in ["record-1", "record-x:fails", "record-1:boom", "record-1:fails-x"] {
            let error = text.parse::<Plan>().expect_err(text).to_string();
            assert!(error.contains("hangs-until-stopped"), "{error}");
        }
    }
}
