//! What earlier versions wrote is read, and written again in the same bytes.

use std::sync::Arc;

use essentially_once::{
    NewRecord,
    consumer::{Operator, OperatorAction},
};

use super::{
    super::{letter::Letter, sending::tests::part},
    *,
};

/// Bodies of messages in a fixture.
pub(in super::super) fn bodies(fixture: &str) -> impl Iterator<Item = Vec<u8>> {
    let bodies = fixture.lines().filter_map(|line| line.strip_prefix("body "));
    bodies.map(|digits| {
        let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal digits");
        (0..digits.len()).step_by(2).map(byte).collect()
    })
}

/// Returns the versions of the commits in a fixture, each of which must keep its bytes.
fn versions_kept(fixture: &str) -> Vec<u8> {
    let mut versions = Vec::new();
    for body in bodies(fixture) {
        if let Parsed::Entry(Entry::Commit(commit)) = parse(body.clone().into()) {
            assert_eq!(encode_commit(&commit), body);
            versions.push(body[MAGIC.len()]);
        }
    }
    versions
}

/// So a process that cannot keep letters goes on while there are none.
#[test]
fn commits_without_letters_are_encoded_as_they_were_before_letters() {
    let fixture = include_str!("../../../tests/fixtures/version-2.txt");
    assert_eq!(versions_kept(fixture), [VERSION; 4]);
}

/// So a process of an earlier state of 0.2 goes on until a commit sends to an outbox.
#[test]
fn commits_with_journals_and_edits_are_encoded_as_they_were_before_outboxes() {
    let fixture = include_str!("../../../tests/fixtures/version-4.txt");
    let versions = [
        VERSION,
        LETTERS_VERSION,
        JOURNAL_VERSION,
        JOURNAL_VERSION,
        JOURNAL_VERSION,
        VERSION,
    ];
    assert_eq!(versions_kept(fixture), versions);
}

#[test]
fn sending_to_an_outbox_makes_a_new_version_of_the_entry() {
    let fixture = include_str!("../../../tests/fixtures/version-4.txt");
    let mut sending = 0;
    for body in bodies(fixture) {
        let Parsed::Entry(Entry::Commit(mut commit)) = parse(body.into()) else {
            continue;
        };
        let Some(sent) = &mut commit.change.sent else {
            continue;
        };
        assert!(sent.parts.is_empty(), "an earlier version knows no outboxes");
        let all: Vec<_> = (0..packed::count(&sent.packed) as u32).collect();
        sent.parts.push(part("billing", &all));
        let encoded = encode_commit(&commit);
        assert_eq!(encoded[MAGIC.len()], OUTBOX_VERSION);
        assert_eq!(parse(encoded.into()), Parsed::Entry(Entry::Commit(commit)));
        sending += 1;
    }
    assert_eq!(sending, 2);
}

/// So a process that knows letters goes on until an operator edits one or uses the journal.
#[test]
fn commits_with_letters_are_encoded_as_they_were_before_edits_and_journals() {
    let fixture = include_str!("../../../tests/fixtures/version-3.txt");
    let with_letters = [LETTERS_VERSION; 3];
    assert_eq!(
        versions_kept(fixture),
        [&[VERSION], &with_letters[..], &[VERSION]].concat()
    );
}

#[test]
fn a_journal_or_an_edit_makes_a_new_version_of_the_entry() {
    let fixture = include_str!("../../../tests/fixtures/version-3.txt");
    let commits = bodies(fixture).filter_map(|body| match parse(body.into()) {
        Parsed::Entry(Entry::Commit(commit)) => Some(commit),
        _ => None,
    });
    for commit in commits {
        let mut with_journal = commit.clone();
        with_journal.journal = Some(Journal::default());
        assert_eq!(encode_commit(&with_journal)[MAGIC.len()], JOURNAL_VERSION);
        let mut edited = commit;
        let parked = edited.change.letters.parked.first_mut();
        let Some((parked, letter)) = parked.map(|parked| (parked.read().expect("decodes"), parked)) else {
            continue;
        };
        let mut parked = parked;
        parked.edit(NewRecord::new("edited"), &Operator::new("ann"));
        *letter = Arc::new(Letter::new(&parked));
        assert_eq!(encode_commit(&edited)[MAGIC.len()], JOURNAL_VERSION);
    }
}

#[test]
fn a_journal_that_cannot_be_read_makes_the_entry_unreadable() {
    let body = bodies(include_str!("../../../tests/fixtures/version-3.txt"))
        .nth(1)
        .expect("a commit");
    let Parsed::Entry(Entry::Commit(mut commit)) = parse(body.into()) else {
        panic!("no commit")
    };
    commit.journal = Some(Journal::default().with(&Operator::new("ann"), OperatorAction::Pause));
    let mut encoded = encode_commit(&commit);
    let journal = commit.journal.as_ref().map_or(0, |journal| journal.encode().len());
    let start = encoded.len() - journal;
    encoded[start] = 9;
    assert!(matches!(parse(encoded.into()), Parsed::Unreadable(why) if why.contains("journal has a version")));
}
