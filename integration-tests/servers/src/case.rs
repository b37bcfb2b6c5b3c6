//! Cases: tests that are async functions, and end with an error if they find a fault.

use std::{future::Future, pin::Pin, process::ExitCode, time::Duration};

use essentially_once_testkit::Suite;

use crate::Error;

/// The limit for every wait. Only a stuck test reaches it.
pub const LIMIT: Duration = Duration::from_secs(120);

/// What a case found.
pub type Outcome = Result<(), Error>;

/// A case that can be started.
pub type Case = fn() -> Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// Names each case after its function: `case` or `module::case`.
#[macro_export]
macro_rules! cases {
    ($($case:ident),+ $(,)?) => {
        [$((stringify!($case), (|| Box::pin($case())) as $crate::Case)),+]
    };
    ($($module:ident::$case:ident),+ $(,)?) => {
        [$((
            concat!(stringify!($module), "::", stringify!($case)),
            (|| Box::pin($module::$case())) as $crate::Case
        )),+]
    };
}

/// Ends the case unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($finding:tt)+) => {
        if !$condition {
            return Err(format!($($finding)+).into());
        }
    };
}

/// Runs each case as a test, for up to twice the `limit` of its waits. If something is missing, all
/// are ignored for that reason.
pub fn run_cases(
    missing: Option<String>,
    limit: Duration,
    cases: impl IntoIterator<Item = (&'static str, Case)>,
) -> ExitCode {
    add_cases(Suite::new(), missing, limit, cases).run()
}

/// Adds cases to a suite, as [`run_cases`] runs them.
pub fn add_cases(
    suite: Suite,
    missing: Option<String>,
    limit: Duration,
    cases: impl IntoIterator<Item = (&'static str, Case)>,
) -> Suite {
    cases.into_iter().fold(suite, |suite, (name, case)| match &missing {
        Some(why) => suite.ignored(name, why),
        None => suite.async_test(name, 2 * limit, case),
    })
}
