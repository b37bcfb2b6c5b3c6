//! Dead letters under a model checker: two instances of a consumer, an operator, crashes, and
//! commits that arrive late or never.
//!
//! The model has the rules for parking records, for trying letters and for changing them by hand.
//! Each mutant makes one [`Mistake`], and the checker must find the damage that its test names.
//!
//! A revision never comes back: `revisions.rs` is about that. So this model has no numbers. What an
//! instance believes is either based on the stored position or stale, and a commit applies if it is
//! not stale.

#![allow(missing_docs, reason = "tests")]

mod rules;
mod world;

use rules::{AS_SEEN, DONE, DRAINS, IN_ORDER, Mistake, NEVER_BOTH, NOTHING_LOST, ONCE, Operator, Rules};
use stateright::{Checker, HasDiscoveries, Model};
use world::World;

const CHANGES_LETTERS: Operator = Operator {
    changes_letters: true,
    ..Operator::ABSENT
};
const SEEKS: Operator = Operator {
    seeks: 1,
    ..Operator::ABSENT
};

/// Fails if a property is broken, or if the model has fewer states than it should have.
fn holds(rules: Rules, states: usize) {
    let checker = rules.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    let found = checker.unique_state_count();
    assert!(found > states, "{found} states");
}

/// Fails if the mistake never breaks the property.
fn found(mistake: Mistake, operator: Operator, property: &'static str) {
    let rules = Rules {
        mistake: Some(mistake),
        operator,
        has_late_commits: false,
        // A mistake may be that something stale has effects.
        stale_ones_are_alike: false,
        ..Rules::SOUND
    };
    let checker = rules
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AllOf([property].into()))
        .spawn_bfs()
        .join();
    assert!(
        checker.discovery(property).is_some(),
        "the checker did not find the violation"
    );
}

#[test]
fn two_instances_lose_and_repeat_nothing() {
    holds(Rules::SOUND, 10_000);
}

#[test]
fn an_operator_may_retry_and_discard_letters_at_any_moment() {
    let rules = Rules {
        operator: CHANGES_LETTERS,
        has_late_commits: false,
        ..Rules::SOUND
    };
    holds(rules, 10_000);
}

#[test]
fn an_operator_may_seek_back_and_skip_at_any_moment() {
    let rules = Rules {
        operator: Operator { skips: true, ..SEEKS },
        ..Rules::SOUND
    };
    holds(rules, 100_000);
}

#[test]
fn an_operator_may_use_all_verbs_in_any_order() {
    let rules = Rules {
        operator: Operator {
            changes_letters: true,
            skips: true,
            seeks: 1,
        },
        batch: 1,
        has_late_commits: false,
        ..Rules::SOUND
    };
    holds(rules, 300_000);
}

#[test]
fn an_operator_may_seek_back_twice() {
    let rules = Rules {
        operator: Operator { seeks: 2, ..SEEKS },
        batch: 1,
        has_late_commits: false,
        ..Rules::SOUND
    };
    holds(rules, 10_000);
}

#[test]
fn what_a_stale_instance_would_commit_makes_no_difference() {
    let rules = Rules {
        has_late_commits: false,
        stale_ones_are_alike: false,
        ..Rules::SOUND
    };
    holds(rules, 10_000);
}

#[test]
fn a_key_drains_letter_by_letter_once_its_first_letter_is_due() {
    let one_by_one = Rules {
        begins: World::parked,
        batch: 1,
        ..Rules::SOUND
    };
    holds(one_by_one, 100);
    let stuck = Rules {
        mistake: Some(Mistake::HandlesAndLeavesTheNextWaiting),
        ..one_by_one
    };
    let checker = stuck.checker().threads(2).spawn_bfs().join();
    assert!(checker.discovery(DONE).is_none(), "the next letter was tried");
}

#[test]
fn mutant_a_letter_is_parked_outside_the_transaction() {
    found(Mistake::ParksOutsideTheTransaction, Operator::ABSENT, ONCE);
    found(Mistake::ParksOutsideTheTransaction, Operator::ABSENT, NEVER_BOTH);
}

#[test]
fn mutant_a_letter_is_parked_after_the_position_moved() {
    found(Mistake::ParksAfterTheMove, Operator::ABSENT, NOTHING_LOST);
}

#[test]
fn mutant_a_later_record_overtakes_a_letter() {
    found(Mistake::LetsRecordsOvertakeLetters, Operator::ABSENT, IN_ORDER);
}

#[test]
fn mutant_a_duplicate_is_parked_behind_its_original() {
    found(Mistake::ParksDuplicates, Operator::ABSENT, ONCE);
}

/// Another instance parks a record between the two.
#[test]
fn mutant_letters_are_counted_before_the_position_is_loaded() {
    found(Mistake::CountsLettersBeforeThePosition, Operator::ABSENT, IN_ORDER);
}

#[test]
fn mutant_the_next_session_keeps_the_counts_of_another_position() {
    found(Mistake::KeepsCountsOfAnotherPosition, Operator::ABSENT, IN_ORDER);
}

/// The batch was rolled back, but its records then count as seen.
#[test]
fn mutant_the_commit_that_counts_a_try_marks_the_records_of_its_batch() {
    found(Mistake::MarksWhatWasRolledBack, Operator::ABSENT, NOTHING_LOST);
}

#[test]
fn mutant_a_letter_is_removed_before_it_is_handled() {
    found(Mistake::RemovesBeforeHandling, Operator::ABSENT, NOTHING_LOST);
}

#[test]
fn mutant_a_letter_is_removed_after_it_was_handled() {
    found(Mistake::RemovesAfterHandling, Operator::ABSENT, ONCE);
}

/// Its own origin was marked when it was parked.
#[test]
fn mutant_a_letter_is_dropped_as_a_duplicate() {
    found(Mistake::DropsLettersAsDuplicates, Operator::ABSENT, NOTHING_LOST);
}

#[test]
fn mutant_the_origin_of_a_letter_is_marked_only_when_it_is_handled() {
    found(Mistake::MarksLettersOnlyWhenHandled, Operator::ABSENT, ONCE);
}

#[test]
fn mutant_the_next_letter_is_left_waiting_after_one_was_handled() {
    found(Mistake::HandlesAndLeavesTheNextWaiting, Operator::ABSENT, DRAINS);
}

#[test]
fn mutant_the_next_letter_is_left_waiting_after_one_was_discarded() {
    found(Mistake::DiscardsAndLeavesTheNextWaiting, CHANGES_LETTERS, DRAINS);
}

/// The letter was handled in the meantime.
#[test]
fn mutant_a_letter_is_retried_as_the_operator_saw_it() {
    found(Mistake::RetriesTheLetterAsSeen, CHANGES_LETTERS, ONCE);
    found(Mistake::RetriesTheLetterAsSeen, CHANGES_LETTERS, NEVER_BOTH);
}

#[test]
fn mutant_a_letter_is_discarded_though_it_has_changed() {
    found(Mistake::DiscardsWhateverIsThere, CHANGES_LETTERS, AS_SEEN);
}

/// After `seek`, the record is parked again, and its letter begins at the first version.
#[test]
fn mutant_a_letter_is_discarded_because_it_has_the_same_version() {
    let operator = Operator {
        seeks: 1,
        ..CHANGES_LETTERS
    };
    found(Mistake::DiscardsByVersionAlone, operator, AS_SEEN);
}

/// An instance still believes that the key has a letter, and parks a record behind it.
#[test]
fn mutant_a_discard_leaves_the_revision_as_it_is() {
    found(Mistake::DiscardsWithoutARevision, CHANGES_LETTERS, DRAINS);
}

#[test]
fn mutant_seek_back_keeps_letters() {
    found(Mistake::SeeksAndKeepsLetters, SEEKS, ONCE);
    found(Mistake::SeeksAndKeepsLetters, SEEKS, NEVER_BOTH);
}

#[test]
fn mutant_seek_back_keeps_the_windows() {
    found(Mistake::SeeksAndKeepsWindows, SEEKS, NOTHING_LOST);
}
