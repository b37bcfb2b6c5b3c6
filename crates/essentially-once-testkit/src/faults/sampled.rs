//! Runs the sample of plans as a test, with a new seed on each run or the seed from the
//! environment.

use std::env;

use super::explorer::{Counterexample, Explorer};
use crate::{checker::Expectation, harness::Harness, violation::Violation};

const SEED: &str = "ESSENTIALLY_ONCE_SEED";
const PLAN: &str = "ESSENTIALLY_ONCE_PLAN";

/// Runs the sample, or the plan that the environment names. `test` is the test's full name.
pub(crate) fn sampled<H: Harness>(harness: &H, delivery: Expectation, test: &str) -> Result<(), Violation> {
    let plans = harness.capabilities().fault_plans;
    run(Explorer::new(harness, delivery), plans, test)
}

/// The same with dead letters. Runs are longer, so there are fewer of them.
pub(crate) fn sampled_with_dead_letters<H: Harness>(harness: &H, test: &str) -> Result<(), Violation> {
    let plans = harness.capabilities().fault_plans.div_ceil(4);
    run(Explorer::dead_letters(harness), plans, test)
}

fn run<H: Harness>(explorer: Explorer<'_, H>, plans: usize, test: &str) -> Result<(), Violation> {
    let explorer = explorer.real_time();
    let seed = from_env(SEED)?.unwrap_or_else(|| fastrand::u64(..));
    let result = match from_env(PLAN)? {
        Some(plan) => explorer.replay(&plan),
        None => explorer.sample(seed, plans).map(drop),
    };
    result.map_err(|found| Violation::new(format!("{found}\nreplay: {}", command(&found, seed, test))))
}

/// The command that repeats the finding.
fn command(found: &Counterexample, seed: u64, test: &str) -> String {
    let package = env::var("CARGO_PKG_NAME").map_or(String::new(), |name| format!(" -p {name}"));
    format!(
        "{SEED}={seed} {PLAN}={} cargo test{package} -- --exact {test}",
        found.plan
    )
}

fn from_env<T: std::str::FromStr<Err: std::fmt::Display>>(name: &str) -> Result<Option<T>, Violation> {
    let Ok(text) = env::var(name) else {
        return Ok(None);
    };
    let value = text.parse();
    value
        .map(Some)
        .map_err(|error| Violation::new(format!("environment variable {name}: {text:?}: {error}")))
}

#[cfg(test)]
mod tests {
    use essentially_once::{async_trait, backend::Source, memory::Memory};

    use super::*;
    use crate::harness::Capabilities;

    struct Missing;

    #[async_trait]
    impl Harness for Missing {
        type Backend = Memory;

        fn capabilities(&self) -> Capabilities {
            Capabilities::minimal()
        }

        async fn start(&self, _: &str) -> Result<Memory, Source> {
            Err("no server".into())
        }
    }

    #[test]
    fn a_failure_names_the_seed_and_the_command() {
        let result = sampled(&Missing, Expectation::AtLeastOnce, "mine::faults_at_least_once");
        let message = result.expect_err("it cannot start").to_string();
        for part in [
            "no server",
            ", seed ",
            "replay: ESSENTIALLY_ONCE_SEED=",
            " ESSENTIALLY_ONCE_PLAN=none cargo test -p essentially-once-testkit -- --exact mine::faults_at_least_once",
        ] {
            assert!(message.contains(part), "{part:?} is missing: {message}");
        }
    }
}
