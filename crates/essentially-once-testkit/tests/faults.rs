//! Every fault, and every pair of faults, on the in-memory backend. Prints the number of plans.

#![allow(clippy::print_stdout, reason = "the output of `cargo test` should show the numbers")]

mod broken;
mod wrapped;

use std::{process::ExitCode, time::Instant};

use essentially_once_testkit::{Expectation, Harness, Suite, Violation, faults::Explorer, memory::MemoryHarness};

use crate::{
    broken::{Broken, Flaw},
    wrapped::Wrapped,
};

const DELIVERIES: [Expectation; 3] = [
    Expectation::EssentiallyOnce,
    Expectation::AtLeastOnce,
    Expectation::AtMostOnce,
];

fn main() -> ExitCode {
    let mut suite = Suite::new();
    for delivery in DELIVERIES {
        for max_batch in [1, 2] {
            let name = format!("memory::every_pair_of_faults::{delivery}::max_batch_{max_batch}");
            suite = suite.test(&name, move || every_pair(delivery, max_batch));
        }
    }
    suite
        .backend("memory_in_wrappers_without_faults", Wrapped)
        .test("unfenced_commits_double_under_essentially_once", || {
            is_found(&Broken(Flaw::AnyRevision), Expectation::EssentiallyOnce, "doubled: ")
        })
        .test("unfenced_commits_double_under_at_most_once", || {
            is_found(&Broken(Flaw::AnyRevision), Expectation::AtMostOnce, "doubled: ")
        })
        .test("writes_outside_the_transaction_double", || {
            is_found(&Broken(Flaw::Leaky), Expectation::EssentiallyOnce, "doubled: ")
        })
        .test("forgotten_windows_double", || {
            is_found(
                &Broken(Flaw::ForgottenWindows),
                Expectation::EssentiallyOnce,
                "doubled: ",
            )
        })
        .test("native_writes_outside_the_transaction_differ_from_the_state", || {
            is_found(
                &Broken(Flaw::NativeAtOnce),
                Expectation::EssentiallyOnce,
                "native writes and state differ: ",
            )
        })
        .test("native_writes_of_fenced_commits_differ_from_the_state", || {
            is_found(
                &Broken(Flaw::NativeUnfenced),
                Expectation::EssentiallyOnce,
                "native writes and state differ: ",
            )
        })
        .test("a_reader_that_skips_loses", || {
            is_found(&Broken(Flaw::Skipping), Expectation::AtLeastOnce, "lost: ")
        })
        .run()
}

fn every_pair(delivery: Expectation, max_batch: usize) -> Result<(), Violation> {
    let started = Instant::now();
    let explored = Explorer::new(&MemoryHarness, delivery).max_batch(max_batch).explore()?;
    println!(
        "memory, {delivery}, max_batch {max_batch}: {explored}, in {:.1} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The explorer finds the fault, and replaying its plan from text leads to the same finding.
fn is_found<H: Harness>(harness: &H, delivery: Expectation, what: &str) -> Result<(), Violation> {
    let explorer = Explorer::new(harness, delivery);
    let found = match explorer.explore() {
        Ok(explored) => return Err(Violation::new(format!("the explorer found nothing in {explored}"))),
        Err(found) => found,
    };
    println!("found: {found}");
    let plan = found.plan.to_string().parse()?;
    let again = match explorer.replay(&plan) {
        Ok(()) => return Err(Violation::new(format!("replaying plan {plan} finds nothing"))),
        Err(again) => again,
    };
    let (found, again) = (found.to_string(), again.to_string());
    match found == again && found.contains(what) {
        true => Ok(()),
        false => Err(Violation::new(format!("expected {what:?}: {found}; replayed: {again}"))),
    }
}
