//! The kit can fail. Backends with one defect each fail the cases named for it, and a correct
//! backend passes them all.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::Duration,
};

use essentially_once_testkit::{Case, Harness, Suite, Support, Violation, conformance_cases};

#[path = "mutants/defect.rs"]
mod defect;
#[path = "mutants/letters.rs"]
mod letters;
#[path = "mutants/log.rs"]
mod log;
#[path = "mutants/model.rs"]
mod model;
#[path = "mutants/names.rs"]
mod names;
#[path = "mutants/outbox.rs"]
mod outbox;
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
    table::{MUTANTS, Mutant, SOUND, STUCK, Sound},
};

/// How long a case waits before a stuck mutant counts as found.
const STUCK_AFTER: Duration = Duration::from_secs(1);
/// How long any other mutant may take to be found.
const FOUND_WITHIN: Duration = Duration::from_secs(50);
/// The defects that the newer cases must find and the variants that they must accept.
const PLANNED: &str = include_str!("../DEFECTS.md");
/// How much of a violation is printed.
const SHOWN_CHARS: usize = 160;

fn main() -> ExitCode {
    let mut suite = Suite::new()
        .test("table::no_case_is_ignored", no_case_is_ignored)
        .test("table::every_case_has_a_mutant", every_case_has_a_mutant)
        .test(
            "table::every_defect_is_found_by_a_case",
            every_defect_is_found_by_a_case,
        )
        .test("table::every_sound_variant_is_run", every_sound_variant_is_run)
        .test("table::the_list_of_planned_defects_is_kept", the_planned_list_is_kept);
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
    for sound in SOUND {
        let name = format!("sound::{}_passes_{}", snake_case(sound.variant), sound.case);
        suite = suite.test(&name, || must_pass(sound));
    }
    suite.run()
}

fn must_pass(Sound { variant, case }: &Sound) -> Result<(), Violation> {
    find(case)?.run_within(&ModelHarness(*variant), FOUND_WITHIN)
}

fn find(name: &str) -> Result<Case<ModelHarness>, Violation> {
    let mut cases = conformance_cases::<ModelHarness>().into_iter();
    let found = cases.find(|case| case.name() == name);
    found.ok_or_else(|| Violation::new(format!("no case is named {name}")))
}

fn must_fail(mutant: &Mutant) -> Result<(), Violation> {
    let Mutant { defect, case, finding } = mutant;
    let found = find(case)?;
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
    nothing_in(
        "cases that the model ignores",
        ignored.map(|case| case.name().to_owned()),
    )
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
        "defects that no case must find",
        unused.map(|defect| format!("{defect:?}")),
    )
}

fn every_sound_variant_is_run() -> Result<(), Violation> {
    let unused = Defect::SOUND
        .iter()
        .filter(|variant| SOUND.iter().all(|sound| sound.variant != **variant));
    nothing_in(
        "sound variants that no case must accept",
        unused.map(|variant| format!("{variant:?}")),
    )
}

/// Row by row, the list and the tables name the same defects and variants: at least two defects,
/// and one variant.
fn the_planned_list_is_kept() -> Result<(), Violation> {
    let mut differing = Vec::new();
    let mut rows = 0;
    for row in PLANNED.lines().filter(|line| line.starts_with("| `")) {
        let mut columns = row.split('|').map(names_in).skip(1);
        let mut next = || columns.next().unwrap_or_default();
        let (case, defects, variants) = (next(), next(), next());
        let case = case.first().cloned().unwrap_or_default();
        let of_case: BTreeMap<_, _> = MUTANTS
            .iter()
            .filter(|mutant| mutant.case == case)
            .map(|mutant| (format!("{:?}", mutant.defect), mutant))
            .collect();
        let sound = SOUND.iter().filter(|sound| sound.case == case);
        let sound: BTreeSet<_> = sound.map(|sound| format!("{:?}", sound.variant)).collect();
        let is_kept =
            defects.len() >= 2 && !variants.is_empty() && defects.iter().eq(of_case.keys()) && variants == sound;
        if !is_kept {
            differing.push(case);
        }
        rows += 1;
    }
    if rows == 0 {
        return Err(Violation::new("DEFECTS.md has no rows"));
    }
    nothing_in("rows of DEFECTS.md that differ from the tables", differing.into_iter())
}

/// The names between backquotes.
fn names_in(column: &str) -> BTreeSet<String> {
    column.split('`').skip(1).step_by(2).map(str::to_owned).collect()
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
