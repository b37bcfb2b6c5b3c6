//! Why a case failed, and how it says so.

use std::fmt;

use essentially_once::{Error, backend::Source};

/// Why a case failed.
#[derive(Debug)]
pub struct Violation(String);

impl Violation {
    /// Creates a violation with this message.
    pub fn new(finding: impl Into<String>) -> Self {
        Self(finding.into())
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Violation {}

impl From<Error> for Violation {
    fn from(error: Error) -> Self {
        Self(format!("unexpected error: {error}"))
    }
}

impl From<Source> for Violation {
    fn from(error: Source) -> Self {
        Self(format!("the harness failed: {error}"))
    }
}

impl From<std::io::Error> for Violation {
    fn from(error: std::io::Error) -> Self {
        Source::from(error).into()
    }
}

/// Ends the case with a [`Violation`] unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($finding:tt)+) => {
        if !$condition {
            return Err($crate::violation::Violation::new(format!($($finding)+)));
        }
    };
}
pub(crate) use ensure;

pub(crate) type CaseResult = Result<(), Violation>;
