//! Which fault strikes at which operation, as text that can be replayed.

use std::{fmt, str::FromStr};

use essentially_once::Error;

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
}

impl Plan {
    /// Creates a plan with these faults. If two name the same operation, the first one counts.
    pub fn new(faults: impl IntoIterator<Item = Fault>) -> Self {
        let mut faults: Vec<Fault> = faults.into_iter().collect();
        faults.sort_by_key(|fault| fault.operation);
        faults.dedup_by_key(|fault| fault.operation);
        Self { faults }
    }

    /// Creates a plan without faults.
    pub fn none() -> Self {
        Self::default()
    }

    /// The faults, in the order in which they strike.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
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
        let Some((first, others)) = self.faults.split_first() else {
            return f.write_str("none");
        };
        first.fmt(f)?;
        others.iter().try_for_each(|fault| write!(f, ",{fault}"))
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
        let faults: Result<Vec<Fault>, Error> = text.split(',').map(str::parse).collect();
        Ok(Self::new(faults?))
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
    }
}
