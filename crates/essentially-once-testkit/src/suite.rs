//! Runs cases as named tests, under `cargo test` and nextest.

use std::{
    fmt,
    fs::OpenOptions,
    future::Future,
    io::Write as _,
    num::NonZero,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::available_parallelism,
    time::{Duration, Instant},
};

use essentially_once::{OffsetStore, backend::Transaction as _};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::{
    case::{Case, block_on},
    cases,
    checker::Expectation,
    faults::{sampled, sampled_with_dead_letters},
    harness::{Backend, Harness, Support},
    violation::{CaseResult, Violation},
};

const FAULT_CASES: [(&str, Expectation); 3] = [
    ("faults_essentially_once", Expectation::EssentiallyOnce),
    ("faults_at_least_once", Expectation::AtLeastOnce),
    ("faults_at_most_once", Expectation::AtMostOnce),
];

const LETTER_CASE: &str = "faults_dead_letters";

/// Returns all conformance cases, in the order of the contract's bullets.
pub fn conformance_cases<H: Harness>() -> Vec<Case<H>> {
    cases::all()
}

/// The main function of a test target with `harness = false`.
///
/// It runs every case on each backend as a test named `<backend>::<case>`. It accepts the arguments
/// of `cargo test`, so cases can be filtered by name, and it works under nextest. Cases mostly wait
/// for a server, so twice as many run at a time as there are cores, unless `--test-threads` says
/// otherwise.
///
/// It adds one argument: `--repeat N` runs each case and each sample of faults `N` times, each time
/// on a fresh backend, and stops at the first failure. Timing bugs show only now and then, so
/// repeat a case before you trust it: `cargo test --test conformance -- s9_ --repeat 50`. Tests
/// that you add with [`test`](Self::test) run once.
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
    /// How often to run each case. 0 until the arguments are parsed.
    repeat: Arc<AtomicUsize>,
}

impl Suite {
    /// Creates a suite without cases.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds all cases for a backend, under that name, plus a
    /// [sample](crate::faults::Explorer::sample) of faults for each delivery, and one with dead
    /// letters if the store keeps them. When a sample fails, its message holds the command that
    /// replays it.
    #[must_use]
    pub fn backend<H: Harness>(mut self, name: &str, harness: H) -> Self {
        let harness = Arc::new(harness);
        let capabilities = harness.capabilities();
        for case in conformance_cases::<H>() {
            let harness = Arc::clone(&harness);
            let full_name = format!("{name}::{}", case.name);
            self.trials.push(match case.support(&capabilities) {
                Support::Yes => self.repeated(full_name, move |_| case.run(&harness)),
                Support::No(why) => ignored(full_name, why),
            });
        }
        for (case, delivery) in FAULT_CASES {
            let harness = Arc::clone(&harness);
            let full_name = format!("{name}::{case}");
            self.trials
                .push(self.repeated(full_name, move |name| sampled(&*harness, delivery, name)));
        }
        let full_name = format!("{name}::{LETTER_CASE}");
        self.trials.push(match keeps_dead_letters::<H>() {
            true => self.repeated(full_name, move |name| sampled_with_dead_letters(&*harness, name)),
            false => ignored(full_name, "the store keeps no dead letters"),
        });
        self
    }

    /// Adds a test that runs as often as the arguments say.
    fn repeated(&self, name: String, test: impl Fn(&str) -> CaseResult + Send + 'static) -> Trial {
        let repeat = Arc::clone(&self.repeat);
        Trial::test(name.clone(), move || {
            let times = repeat.load(Ordering::SeqCst).max(1);
            again(times, || timed(&name, || test(&name))).map_err(Failed::from)
        })
    }

    /// Adds all cases for a backend that cannot start here. They show as ignored, with the reason.
    #[must_use]
    pub fn missing<H: Harness>(mut self, name: &str, why: &str) -> Self {
        let cases = conformance_cases::<H>();
        let cases = cases.iter().map(|case| case.name);
        for case in cases.chain(FAULT_CASES.map(|(case, _)| case)).chain([LETTER_CASE]) {
            self.trials.push(ignored(format!("{name}::{case}"), why));
        }
        self
    }

    /// Adds your own test.
    #[must_use]
    pub fn test(mut self, name: &str, test: impl FnOnce() -> Result<(), Violation> + Send + 'static) -> Self {
        let full_name = name.to_owned();
        self.trials
            .push(Trial::test(name, move || timed(&full_name, test).map_err(Failed::from)));
        self
    }

    /// Adds your own asynchronous test, which fails if it exceeds the limit. It runs in its own
    /// tokio runtime with two worker threads.
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

    /// Adds a test that cannot run here. It shows as ignored, with the reason.
    #[must_use]
    pub fn ignored(mut self, name: &str, why: &str) -> Self {
        self.trials.push(ignored(name.to_owned(), why));
        self
    }

    /// Runs the suite with the process's arguments.
    pub fn run(self) -> ExitCode {
        match take_repeat(std::env::args()) {
            Ok((repeat, arguments)) => {
                self.repeat.store(repeat, Ordering::SeqCst);
                let mut arguments = Arguments::from_iter(arguments);
                let cores = available_parallelism().map_or(1, NonZero::get);
                arguments.test_threads.get_or_insert(2 * cores);
                libtest_mimic::run(&arguments, self.trials).exit_code()
            }
            Err(wrong) => {
                eprintln!("error: {wrong}");
                ExitCode::from(2)
            }
        }
    }
}

fn keeps_dead_letters<H: Harness>() -> bool {
    <<H::Backend as Backend>::Store as OffsetStore>::Tx::KEEPS_DEAD_LETTERS
}

/// Runs a test `times` times, or until it fails.
fn again(times: usize, test: impl Fn() -> CaseResult) -> CaseResult {
    for run in 1..=times {
        test().map_err(|violation| match times {
            1 => violation,
            times => Violation::new(format!("run {run} of {times}: {violation}")),
        })?;
    }
    Ok(())
}

/// Takes `--repeat N` or `--repeat=N` out of the arguments, because the test runner does not know
/// it.
fn take_repeat(arguments: impl IntoIterator<Item = String>) -> Result<(usize, Vec<String>), String> {
    const NAME: &str = "--repeat";
    let (mut repeat, mut others) = (1, Vec::new());
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let value = match argument.strip_prefix(NAME) {
            Some("") => arguments.next().ok_or(format!("{NAME} needs a number"))?,
            Some(value) if value.starts_with('=') => value[1..].to_owned(),
            _ => {
                others.push(argument);
                continue;
            }
        };
        repeat = match value.parse() {
            Ok(times @ 1..) => times,
            _ => return Err(format!("{NAME} needs a number of at least 1, not {value:?}")),
        };
    }
    Ok((repeat, others))
}

/// Runs a test. If `ESSENTIALLY_ONCE_TEST_TIMES` names a file, appends the test's seconds and name
/// to it.
fn timed<T>(name: &str, test: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = test();
    if let Some(path) = std::env::var_os("ESSENTIALLY_ONCE_TEST_TIMES") {
        let line = format!("{:.3} {name}\n", started.elapsed().as_secs_f64());
        // A line that cannot be written only makes the summary incomplete.
        let file = OpenOptions::new().append(true).create(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
    result
}

/// Adds the reason as the test's kind, which shows as `test [why] name ... ignored`.
fn ignored(name: String, why: &str) -> Trial {
    let reason = Failed::from(why.to_owned());
    Trial::test(name, move || Err(reason))
        .with_kind(why)
        .with_ignored_flag(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeat_is_taken_out_of_the_arguments() {
        let take = |arguments: &[&str]| take_repeat(arguments.iter().map(ToString::to_string));
        let others = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(take(&["test", "s9_"]), Ok((1, others(&["test", "s9_"]))));
        assert_eq!(
            take(&["test", "--repeat", "50", "--exact", "s9_"]),
            Ok((50, others(&["test", "--exact", "s9_"])))
        );
        assert_eq!(take(&["test", "--repeat=3"]), Ok((3, others(&["test"]))));
        assert_eq!(take(&["test", "--repeated"]), Ok((1, others(&["test", "--repeated"]))));
        for wrong in [&["--repeat"][..], &["--repeat", "0"], &["--repeat=many"]] {
            assert!(
                take(wrong).is_err_and(|error| error.contains("--repeat needs a number")),
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn a_case_is_run_as_often_as_asked_and_the_failing_run_is_named() {
        let runs = AtomicUsize::new(0);
        let fails_at = |failing| {
            runs.store(0, Ordering::SeqCst);
            again(9, || match runs.fetch_add(1, Ordering::SeqCst) + 1 {
                run if run == failing => Err(Violation::new("found")),
                _ => Ok(()),
            })
        };
        assert!(fails_at(10).is_ok());
        assert_eq!(runs.load(Ordering::SeqCst), 9);
        let violation = fails_at(4).expect_err("the fourth");
        assert_eq!(
            (violation.to_string().as_str(), runs.load(Ordering::SeqCst)),
            ("run 4 of 9: found", 4)
        );
    }
}
