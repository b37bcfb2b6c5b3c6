//! Every fault, and every pair of faults, on the in-memory backend. Prints the number of plans.

#![allow(clippy::print_stdout, reason = "the output of `cargo test` should show the numbers")]

mod broken;
mod wrapped;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use essentially_once::{
    ConsumerId, Error, Log, NewRecord, OffsetStore,
    backend::{Advance, Revision, Transaction},
    memory::Memory,
};
use essentially_once_testkit::{
    Expectation, Harness, Suite, Violation,
    faults::{Explorer, Faults, FaultyStore, Plan},
    memory::MemoryHarness,
};

use crate::{
    broken::{
        Broken, Flaw,
        letters::{BrokenLetters, LetterFlaw},
    },
    wrapped::Wrapped,
};

const DELIVERIES: [Expectation; 3] = [
    Expectation::EssentiallyOnce,
    Expectation::AtLeastOnce,
    Expectation::AtMostOnce,
];

/// How many random plans with dead letters to run.
const SAMPLED_PLANS: usize = 1_000;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    for delivery in DELIVERIES {
        for max_batch in [1, 2] {
            let name = format!("memory::every_pair_of_faults::{delivery}::max_batch_{max_batch}");
            suite = suite.test(&name, move || every_pair(delivery, max_batch));
        }
    }
    for max_batch in [2, 4] {
        let name = format!("memory::dead_letters::every_event::max_batch_{max_batch}");
        suite = suite.test(&name, move || every_event(max_batch));
    }
    for max_batch in [1, 2, 4] {
        let name = format!("memory::dead_letters::sampled::max_batch_{max_batch}");
        suite = suite.test(&name, move || sampled_events(max_batch));
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
        .test("records_sent_outside_the_transaction_differ_from_the_state", || {
            is_found(
                &Broken(Flaw::SentAtOnce),
                Expectation::EssentiallyOnce,
                "sent records and state differ: ",
            )
        })
        .test("records_sent_by_fenced_commits_differ_from_the_state", || {
            is_found(
                &Broken(Flaw::SentUnfenced),
                Expectation::EssentiallyOnce,
                "sent records and state differ: ",
            )
        })
        .async_test(
            "a_fault_strikes_a_send",
            Duration::from_secs(10),
            a_fault_strikes_a_send,
        )
        .async_test(
            "wrappers_without_an_explorer_never_stop",
            Duration::from_secs(10),
            wrappers_never_stop,
        )
        .test("a_reader_that_skips_loses", || {
            is_found(&Broken(Flaw::Skipping), Expectation::AtLeastOnce, "lost: ")
        })
        .test("dead_letters_without_a_flaw", || {
            let plans = 500;
            Explorer::dead_letters(&BrokenLetters(LetterFlaw::None)).sample(fastrand::u64(..), plans)?;
            Ok(())
        })
        .test("a_letter_parked_outside_the_transaction_stays", || {
            letter_flaw_is_found(LetterFlaw::ParkedAtOnce, "has a dead letter at that offset")
        })
        .test("a_record_that_is_moved_past_and_not_parked_is_lost", || {
            letter_flaw_is_found(LetterFlaw::NotParked, "lost: ")
        })
        .test("a_letter_removed_by_a_commit_that_failed_is_lost", || {
            letter_flaw_is_found(LetterFlaw::RemovedInVain, "lost: ")
        })
        .test("a_letter_that_is_not_due_when_the_first_leaves_stays", || {
            letter_flaw_is_found(LetterFlaw::NextNotDue, "letters are left ")
        })
        .test("letters_kept_on_seek_stay", || {
            letter_flaw_is_found(LetterFlaw::KeptOnSeek, "has a dead letter at that offset")
        })
        .test("unfenced_commits_of_letters_differ_from_the_effects", || {
            letter_flaw_is_found(LetterFlaw::Unfenced, "although an operator skipped it")
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

/// Every trouble, and every fault and call at each operation of runs with some troubles.
fn every_event(max_batch: usize) -> Result<(), Violation> {
    let started = Instant::now();
    let explored = Explorer::dead_letters(&MemoryHarness).max_batch(max_batch).explore()?;
    println!(
        "memory, dead letters, max_batch {max_batch}: {explored}, in {:.1} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Combinations of troubles, faults and calls.
fn sampled_events(max_batch: usize) -> Result<(), Violation> {
    let seed = fastrand::u64(..);
    let started = Instant::now();
    let explored = Explorer::dead_letters(&MemoryHarness)
        .max_batch(max_batch)
        .sample(seed, SAMPLED_PLANS)?;
    println!(
        "memory, dead letters, max_batch {max_batch}, seed {seed}: {explored}, in {:.1} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Sending is an operation of its own. An error before it leaves nothing staged, and one after it
/// does.
async fn a_fault_strikes_a_send() -> Result<(), Violation> {
    for (plan, expected) in [("2:error-before", 0), ("2:error-after", 1)] {
        let (faults, memory) = (Faults::new(plan.parse()?), Memory::new());
        let store = FaultyStore::new(memory.store(), &faults.process());
        let mut tx = store.begin(&ConsumerId::new("shipping")?).await?;
        let outbox = tx
            .outbox()
            .ok_or_else(|| Violation::new("the outbox is not passed on"))?;
        let sent = outbox.send("outbox", NewRecord::new("1")).await;
        if !matches!(sent, Err(Error::Unavailable { .. })) {
            return Err(Violation::new(format!("{plan}: sending returned {sent:?}")));
        }
        let id = memory.log("orders")?.id().clone();
        tx.commit(Advance::new(id, 1.into(), Revision::NONE, Revision::NONE.next_epoch()))
            .await?;
        let end = memory.log("outbox")?.bounds().await?.end;
        if end != expected.into() {
            return Err(Violation::new(format!(
                "{plan}: the outbox ends at {end}, not at {expected}"
            )));
        }
    }
    Ok(())
}

/// Only an explorer takes a run with many operations for one that is stuck.
async fn wrappers_never_stop() -> Result<(), Violation> {
    let faults = Faults::new(Plan::default());
    let store = FaultyStore::new(Memory::new().store(), &faults.process());
    for _ in 0..20_000 {
        store.position(&ConsumerId::new("shipping")?).await?;
    }
    Ok(())
}

/// The same for a store whose dead letters are broken.
fn letter_flaw_is_found(flaw: LetterFlaw, what: &str) -> Result<(), Violation> {
    find(&Explorer::dead_letters(&BrokenLetters(flaw)), what)
}

/// The explorer finds the fault, and replaying its plan from text leads to the same finding.
fn is_found<H: Harness>(harness: &H, delivery: Expectation, what: &str) -> Result<(), Violation> {
    find(&Explorer::new(harness, delivery), what)
}

fn find<H: Harness>(explorer: &Explorer<'_, H>, what: &str) -> Result<(), Violation> {
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
