//! The kit can fail: backends that are wrong in one way each fail the cases named for it, and a correct one passes them all.

use std::{collections::BTreeSet, process::ExitCode, time::Duration};

use essentially_once_testkit::{Harness, Suite, Support, Violation, conformance_cases};

#[path = "mutants/defect.rs"]
mod defect;
#[path = "mutants/log.rs"]
mod log;
#[path = "mutants/model.rs"]
mod model;
#[path = "mutants/reader.rs"]
mod reader;
#[path = "mutants/store.rs"]
mod store;
#[path = "mutants/table.rs"]
mod table;
#[path = "mutants/transaction.rs"]
mod transaction;

use crate::{
    defect::Defect,
    model::{ModelHarness, SlowModelHarness},
    table::{MUTANTS, Mutant, STUCK},
};

/// How long a mutant that gets stuck may be stuck.
const STUCK_AFTER: Duration = Duration::from_secs(1);
/// How long any other mutant may take to be found.
const FOUND_WITHIN: Duration = Duration::from_secs(50);
/// As much of a violation as tells what was found.
const SHOWN_CHARS: usize = 160;

fn main() -> ExitCode {
    let mut suite = Suite::new()
        .test("table::no_case_is_ignored", no_case_is_ignored)
        .test("table::every_case_has_a_mutant", every_case_has_a_mutant)
        .test(
            "table::every_defect_is_found_by_a_case",
            every_defect_is_found_by_a_case,
        );
    for case in conformance_cases() {
        let name = format!("correct_model::{}", case.name());
        suite = suite.test(&name, move || case.run(&ModelHarness(Defect::None)));
    }
    for case in conformance_cases() {
        let name = format!("slow_model::{}", case.name());
        suite = suite.test(&name, move || case.run(&SlowModelHarness));
    }
    for mutant in MUTANTS {
        let name = format!("mutant::{}_fails_{}", snake_case(mutant.defect), mutant.case);
        suite = suite.test(&name, || must_fail(mutant));
    }
    suite.run()
}

fn must_fail(mutant: &Mutant) -> Result<(), Violation> {
    let Mutant { defect, case, finding } = mutant;
    let found = conformance_cases::<ModelHarness>()
        .into_iter()
        .find(|known| known.name() == *case)
        .ok_or_else(|| Violation::new(format!("there is no case {case}")))?;
    let limit = if *finding == STUCK { STUCK_AFTER } else { FOUND_WITHIN };
    match found.run_within(&ModelHarness(*defect), limit) {
        Ok(()) => Err(Violation::new(format!("{case} did not find {defect:?}"))),
        Err(violation) => {
            let violation = violation.to_string();
            let shown: String = violation.chars().take(SHOWN_CHARS).collect();
            eprintln!("{defect:?} fails {case}: {shown}");
            match violation.contains(finding) {
                true => Ok(()),
                false => Err(Violation::new(format!(
                    "{case} did not find {defect:?} ({finding:?}), but: {violation}"
                ))),
            }
        }
    }
}

fn no_case_is_ignored() -> Result<(), Violation> {
    let capabilities = ModelHarness(Defect::None).capabilities();
    let ignored = conformance_cases::<ModelHarness>()
        .into_iter()
        .filter(|case| case.support(&capabilities) != Support::Yes);
    nothing_in("ignored by the model", ignored.map(|case| case.name().to_owned()))
}

fn every_case_has_a_mutant() -> Result<(), Violation> {
    let named: BTreeSet<_> = MUTANTS.iter().map(|mutant| mutant.case).collect();
    let without = conformance_cases::<ModelHarness>()
        .into_iter()
        .map(|case| case.name().to_owned())
        .filter(|name| !named.contains(name.as_str()));
    nothing_in("cases that no mutant fails", without)
}

fn every_defect_is_found_by_a_case() -> Result<(), Violation> {
    let unused = Defect::ALL
        .iter()
        .filter(|defect| MUTANTS.iter().all(|mutant| mutant.defect != **defect));
    nothing_in(
        "defects that no case is named for",
        unused.map(|defect| format!("{defect:?}")),
    )
}

fn nothing_in(what: &str, names: impl Iterator<Item = String>) -> Result<(), Violation> {
    let names: Vec<_> = names.collect();
    match names.is_empty() {
        true => Ok(()),
        false => Err(Violation::new(format!("{what}: {}", names.join(", ")))),
    }
}

fn snake_case(defect: Defect) -> String {
    let mut name = String::new();
    for c in format!("{defect:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_lowercase());
    }
    name
}
