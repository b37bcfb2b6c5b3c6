//! Why the program ends without having done what it was told to.

use std::{fmt, io, process::ExitCode};

use essentially_once::Error;

#[derive(Debug)]
pub(crate) enum Failure {
    /// It failed or was refused.
    Failed(String),
    /// The arguments are wrong.
    Usage(String),
    /// Whoever reads the output has seen enough.
    ClosedOutput,
}

impl Failure {
    pub(crate) fn refused(reason: impl Into<String>) -> Self {
        Self::Failed(reason.into())
    }

    pub(crate) fn usage(reason: impl Into<String>) -> Self {
        Self::Usage(reason.into())
    }

    /// The failure to go to a place that an operator named. The error of the library is about a
    /// consumer whose log lost records.
    pub(crate) fn of_place(error: Error) -> Self {
        match error {
            Error::OutOfRange { requested, end, .. } if requested > end => {
                Self::refused(format!("offset {requested} does not exist; the log ends at {end}"))
            }
            error => error.into(),
        }
    }

    pub(crate) fn status(&self) -> ExitCode {
        match self {
            Self::Failed(_) => ExitCode::from(1),
            Self::Usage(_) => ExitCode::from(2),
            Self::ClosedOutput => ExitCode::SUCCESS,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::ClosedOutput,
            _ => Self::Failed(format!("cannot write the output: {error}")),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(reason) | Self::Usage(reason) => f.write_str(reason),
            Self::ClosedOutput => f.write_str("the output was closed"),
        }
    }
}
