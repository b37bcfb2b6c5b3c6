//! Cases as named tests, under `cargo test` and nextest.

use std::{
    fmt,
    fs::OpenOptions,
    future::Future,
    io::Write as _,
    pin::Pin,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use essentially_once::{Error, Source};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::{Capabilities, Expectation, Harness, Support, cases, faults::sampled};

/// A case that takes longer is stuck: "waits for ever" is a failure like any other.
const TIME_LIMIT: Duration = Duration::from_secs(600);

const FAULT_CASES: [(&str, Expectation); 3] = [
    ("faults_essentially_once", Expectation::EssentiallyOnce),
    ("faults_at_least_once", Expectation::AtLeastOnce),
    ("faults_at_most_once", Expectation::AtMostOnce),
];

/// What a case found to be wrong.
#[derive(Debug)]
pub struct Violation(String);

impl Violation {
    /// A finding in words.
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

/// Ends the case with a [`Violation`] unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($finding:tt)+) => {
        if !$condition {
            return Err($crate::suite::Violation::new(format!($($finding)+)));
        }
    };
}
pub(crate) use ensure;

pub(crate) type CaseResult = Result<(), Violation>;
type CaseFuture<'a> = Pin<Box<dyn Future<Output = CaseResult> + Send + 'a>>;

/// One conformance case: a name that begins with the contract bullet it checks, and what it needs to run.
pub struct Case<H: Harness> {
    pub(crate) name: &'static str,
    pub(crate) needs: fn(&Capabilities) -> Support,
    pub(crate) run: for<'a> fn(&'a H, &'a H::Backend) -> CaseFuture<'a>,
}

impl<H: Harness> Case<H> {
    /// The case's name, such as `s2_a_stale_revision_is_fenced`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Whether a backend with these capabilities can be asked.
    pub fn support(&self, capabilities: &Capabilities) -> Support {
        (self.needs)(capabilities)
    }

    /// Runs the case on a backend of its own, in a tokio runtime of its own with two workers.
    ///
    /// # Errors
    /// What was found to be wrong, or that it took more than ten minutes.
    pub fn run(&self, harness: &H) -> Result<(), Violation> {
        self.run_within(harness, TIME_LIMIT)
    }

    /// As [`run`](Self::run), with another time limit.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub fn run_within(&self, harness: &H, limit: Duration) -> Result<(), Violation> {
        block_on(limit, async {
            let backend = harness.start(self.name).await?;
            (self.run)(harness, &backend).await
        })
    }
}

/// Runs a test in a runtime of its own.
fn block_on(limit: Duration, test: impl Future<Output = CaseResult>) -> CaseResult {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Violation::new(format!("no tokio runtime: {error}")))?;
    let result = runtime.block_on(async {
        tokio::time::timeout(limit, test)
            .await
            .unwrap_or_else(|_| Err(Violation::new(format!("still waiting after {limit:?}"))))
    });
    // Tasks that a stuck backend left behind must not hold up the other tests.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// All conformance cases, in the order of the contract's bullets.
pub fn conformance_cases<H: Harness>() -> Vec<Case<H>> {
    cases::all()
}

/// The main function of a test target with `harness = false`: runs all cases on the backend, each as a test named
/// `<backend>::<case>`. Understands the arguments of `cargo test`, so that cases can be filtered by name, and of nextest.
///
/// ```no_run
/// use essentially_once_testkit::{Suite, memory::MemoryHarness};
///
/// fn main() -> std::process::ExitCode {
///     Suite::new().backend("memory", MemoryHarness).run()
/// }
/// ```
#[derive(Default)]
pub struct Suite {
    trials: Vec<Trial>,
}

impl Suite {
    /// A suite without cases.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds all cases for a backend, under that name, and for each delivery a [sample](crate::faults::Explorer::sample) of
    /// faults. What a sample finds can be replayed: its message names the command.
    #[must_use]
    pub fn backend<H: Harness>(mut self, name: &str, harness: H) -> Self {
        let harness = Arc::new(harness);
        let capabilities = harness.capabilities();
        for case in conformance_cases::<H>() {
            let harness = Arc::clone(&harness);
            let full_name = format!("{name}::{}", case.name);
            self.trials.push(match case.support(&capabilities) {
                Support::Yes => Trial::test(full_name.clone(), move || {
                    timed(&full_name, || case.run(&harness)).map_err(Failed::from)
                }),
                Support::No(why) => ignored(full_name, why),
            });
        }
        for (case, delivery) in FAULT_CASES {
            let harness = Arc::clone(&harness);
            let full_name = format!("{name}::{case}");
            self.trials.push(Trial::test(full_name.clone(), move || {
                timed(&full_name, || sampled(&*harness, delivery, &full_name)).map_err(Failed::from)
            }));
        }
        self
    }

    /// Adds all cases for a backend that cannot be started here, as ignored, with the reason.
    #[must_use]
    pub fn missing<H: Harness>(mut self, name: &str, why: &str) -> Self {
        let cases = conformance_cases::<H>();
        let cases = cases.iter().map(|case| case.name);
        for case in cases.chain(FAULT_CASES.map(|(case, _)| case)) {
            self.trials.push(ignored(format!("{name}::{case}"), why));
        }
        self
    }

    /// Adds a test of your own.
    #[must_use]
    pub fn test(mut self, name: &str, test: impl FnOnce() -> Result<(), Violation> + Send + 'static) -> Self {
        let full_name = name.to_owned();
        self.trials
            .push(Trial::test(name, move || timed(&full_name, test).map_err(Failed::from)));
        self
    }

    /// Adds an asynchronous test of your own, which fails if it takes longer than the limit. It is run in a tokio runtime of its own with two
    /// workers.
    #[must_use]
    pub fn async_test<F, E>(self, name: &str, limit: Duration, test: impl FnOnce() -> F + Send + 'static) -> Self
    where
        F: Future<Output = Result<(), E>>,
        E: fmt::Display,
    {
        self.test(name, move || {
            let test = test();
            block_on(limit, async {
                test.await.map_err(|error| Violation::new(error.to_string()))
            })
        })
    }

    /// Adds a test that cannot be run here, shown as ignored with the reason.
    #[must_use]
    pub fn ignored(mut self, name: &str, why: &str) -> Self {
        self.trials.push(ignored(name.to_owned(), why));
        self
    }

    /// Runs the suite with the process's arguments.
    pub fn run(self) -> ExitCode {
        libtest_mimic::run(&Arguments::from_args(), self.trials).exit_code()
    }
}

/// Runs a test, and adds its seconds and name to the file that `ESSENTIALLY_ONCE_TEST_TIMES` names, if it is set.
fn timed<T>(name: &str, test: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = test();
    if let Some(path) = std::env::var_os("ESSENTIALLY_ONCE_TEST_TIMES") {
        let line = format!("{:.3} {name}\n", started.elapsed().as_secs_f64());
        // Only a summary is the worse for a line that cannot be written.
        let file = OpenOptions::new().append(true).create(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
    result
}

/// The reason is shown as the test's kind: `test [why] name ... ignored`.
fn ignored(name: String, why: &str) -> Trial {
    let reason = Failed::from(why.to_owned());
    Trial::test(name, move || Err(reason))
        .with_kind(why)
        .with_ignored_flag(true)
}
