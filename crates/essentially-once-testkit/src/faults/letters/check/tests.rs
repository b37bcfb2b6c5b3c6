use std::time::UNIX_EPOCH;

use essentially_once::{Epoch, ProducerId};

use super::*;

/// Two keys, and a message that was sent twice: as 0 and as 2.
fn log() -> Vec<Record> {
    let producer = ProducerId::new("sender").expect("a name");
    let record = |offset: u64, key: &'static str, sequence: Option<u64>| {
        let mut record = Record::new(offset.into(), UNIX_EPOCH, format!("{offset}"));
        record.key = Some(key.into());
        record.origin = sequence.map(|sequence| Origin::new(producer.clone(), Epoch::STABLE, sequence));
        record
    };
    vec![
        record(0, "a", Some(1)),
        record(1, "b", None),
        record(2, "a", Some(1)),
        record(3, "a", None),
    ]
}

/// What the check says after this history, with the position past all records and no letters.
fn judged(history: &[Done]) -> String {
    let check = Check {
        records: &log(),
        history,
        next: 4.into(),
        letters: &[],
    };
    check
        .judge()
        .map_or_else(|found| found.to_string(), |()| "nothing".into())
}

fn handled(offset: u64) -> Done {
    Done::Handled(offset.into(), offset.to_string())
}

#[test]
fn each_message_once_in_the_order_of_its_key_is_nothing() {
    assert_eq!(judged(&[handled(1), handled(0), handled(3)]), "nothing");
}

#[test]
fn what_operators_discard_or_skip_takes_no_effect() {
    let history = [Done::Skipped(1.into()), Done::Discarded(0.into()), handled(3)];
    assert_eq!(judged(&history), "nothing");
    let history = [history.as_slice(), &[handled(1)]].concat();
    assert!(judged(&history).contains("doubled: the record at 1 was handled, although an operator skipped it"));
    let history = [handled(0), Done::Discarded(0.into())];
    assert!(judged(&history).contains("discarded, although it was handled before"));
}

#[test]
fn lost_doubled_and_reordered_are_found() {
    assert!(judged(&[handled(0), handled(1)]).starts_with("lost: the record at 3"));
    assert!(judged(&[handled(0), handled(0)]).contains("although it was handled before"));
    assert!(judged(&[handled(0), handled(2)]).contains("although it is a duplicate"));
    assert!(judged(&[handled(3)]).contains("reordered: the record at 3 was handled before the one at 0"));
    assert!(judged(&[handled(9)]).starts_with("phantom: "));
}

#[test]
fn an_edited_record_takes_effect_as_it_was_edited() {
    let edited = Done::Handled(0.into(), format!("0{EDIT}"));
    let history = [Done::Edited(0.into()), edited, handled(1), handled(3)];
    assert_eq!(judged(&history), "nothing");
    assert!(judged(&[Done::Edited(0.into()), handled(0)]).contains(r#"handled as "0" instead of "0+""#));
}

#[test]
fn behind_a_move_back_records_take_effect_again() {
    let back = |from: u64, to: u64| Done::Moved {
        from: from.into(),
        to: to.into(),
    };
    let history = [handled(0), handled(1), back(3, 1), handled(1), handled(2), handled(3)];
    assert_eq!(judged(&history), "nothing", "no copy is known any more");
    let history = [handled(0), back(2, 1), handled(1), handled(0)];
    assert!(judged(&history).contains("the record at 0 was handled, although it was handled before"));
    let history = [handled(1), back(2, 1), handled(1), handled(2)];
    assert!(judged(&history).contains("reordered: the record at 2 was handled before the one at 0"));
    let history = [back(0, 3), handled(3)];
    assert_eq!(judged(&history), "nothing", "a move ahead passes records over");
}

#[test]
fn a_letter_must_be_owed() {
    let record = log().remove(3);
    let letter = DeadLetter::new(record, 1, "why", UNIX_EPOCH);
    let judged = |history: &[Done]| {
        let check = Check {
            records: &log(),
            history,
            next: 4.into(),
            letters: std::slice::from_ref(&letter),
        };
        check
            .judge()
            .map_or_else(|found| found.to_string(), |()| "nothing".into())
    };
    assert_eq!(judged(&[handled(0), handled(1)]), "nothing");
    let found = judged(&[handled(0), handled(1), handled(3)]);
    assert_eq!(
        found,
        "the record at 3 is a dead letter, although it was handled before"
    );
    let found = judged(&[handled(0), handled(1), Done::Edited(3.into())]);
    assert!(found.contains("instead of"), "{found}");
}
