//! Each mutant breaks one thing, and the checker must find it.

use essentially_once::backend::Revision;
use stateright::{Checker, Model};

use super::{
    super::rule::{Fold, Missing, Verdict},
    Applied, Apply, Entry, System,
};

/// Checks that the broken system breaks this property.
fn found(system: System, property: &'static str) {
    let checker = system
        .checker()
        .threads(2)
        .finish_when(stateright::HasDiscoveries::AllOf([property].into()))
        .spawn_bfs()
        .join();
    assert!(
        checker.discovery(property).is_some(),
        "the checker did not find a violation of: {property}"
    );
}

/// The rule with another comparison of revisions.
fn apply_if(
    fold: &mut Fold<Applied>,
    offset: u64,
    mut entry: Entry,
    is_next: fn(Revision, Revision) -> bool,
) -> Result<Verdict, Missing> {
    if is_next(entry.revision, fold.revision) {
        (entry.expected, entry.revision) = (fold.revision, fold.revision.next_count());
        entry.parent = fold.token;
    } else {
        (entry.expected, entry.revision) = (Revision::NONE, Revision::NONE);
    }
    fold.apply(offset, entry)
}

#[test]
fn mutant_the_last_one_wins() {
    let apply: Apply = |fold, offset, entry| {
        let revision = entry.revision;
        let verdict = apply_if(fold, offset, entry, |_, _| true)?;
        fold.revision = revision;
        Ok(verdict)
    };
    found(
        System {
            apply,
            ..System::sound()
        },
        "at most one entry of a revision applies",
    );
}

#[test]
fn mutant_a_revision_applies_twice() {
    let apply: Apply = |fold, offset, entry| {
        let revision = entry.revision;
        let verdict = apply_if(fold, offset, entry, |found, current| found >= current)?;
        if verdict == Verdict::Applied {
            fold.revision = revision;
        }
        Ok(verdict)
    };
    found(
        System {
            apply,
            ..System::sound()
        },
        "at most one entry of a revision applies",
    );
}

/// Any higher revision applies. This alone is harmless, since a writer raises the revision by one.
/// But a snapshot that is off by one then goes unnoticed, and readers disagree silently. With the
/// true rule, the first of them to read on reports it.
#[test]
fn mutant_any_higher_revision_applies_after_a_snapshot_that_is_one_off() {
    let apply: Apply = |fold, offset, entry| {
        let revision = entry.revision;
        let verdict = apply_if(fold, offset, entry, |found, current| found > current)?;
        if verdict == Verdict::Applied {
            fold.revision = revision;
        }
        Ok(verdict)
    };
    let broken = || System {
        apply,
        snapshot_shift: 1,
        ..System::sound()
    };
    found(
        broken(),
        "a reader from the newest snapshot agrees with one from the first entry",
    );
    found(broken(), "a writer knows a part of the truth");
}

#[test]
fn mutant_a_snapshot_is_one_off() {
    let broken = || System {
        snapshot_shift: 1,
        ..System::sound()
    };
    found(
        broken(),
        "a reader from the newest snapshot agrees with one from the first entry",
    );
    found(broken(), "nothing is lost");
}

#[test]
fn mutant_a_confirm_counts_as_success() {
    found(
        System {
            trusts_confirms: true,
            ..System::sound()
        },
        "what was acknowledged is applied, once",
    );
}

#[test]
fn mutant_retention_knows_no_snapshots() {
    found(
        System {
            trims_at_will: true,
            ..System::sound()
        },
        "nothing is lost",
    );
}

#[test]
fn mutant_a_reader_jumps_over_what_retention_removed() {
    found(
        System {
            jumps: true,
            ..System::sound()
        },
        "a writer knows a part of the truth",
    );
}

#[test]
fn mutant_a_writer_numbers_what_it_tries_to_send() {
    found(
        System {
            counts_tries: true,
            ..System::sound()
        },
        "the numbers of sent records rise by one",
    );
}
