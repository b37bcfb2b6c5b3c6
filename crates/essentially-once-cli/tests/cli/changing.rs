//! The verbs that change something.

use std::process::Stdio;

use crate::support::{Called, Shop};

const BECAUSE: [&str; 2] = ["--because", "a comma"];

#[test]
fn letters_are_retried_edited_and_discarded() {
    let shop = Shop::with_letters();
    let change = |arguments: &[&str]| {
        let called = shop.call(&[&["dead-letters"], arguments, &BECAUSE].concat());
        assert_eq!(called.status, Some(0), "{arguments:?}: {}", called.error);
    };
    change(&["retry", "1"]);
    change(&["edit", "3", "--payload", "9.99"]);
    let report = shop.consume(true);
    assert_eq!(report.handled, 3, "the two, and the one behind the first");
    assert!(shop.json(&["dead-letters", "list"]).is_empty());

    shop.place(&[("Peru", "n/a")]);
    shop.consume(true);
    change(&["discard", "5"]);
    assert!(shop.json(&["dead-letters", "list"]).is_empty());
    let actions: Vec<_> = shop
        .journal()
        .into_iter()
        .map(|[by, action, reason]| (by, reason, action))
        .collect();
    assert_eq!(actions.len(), 3);
    assert!(
        actions
            .iter()
            .all(|(by, reason, _)| (by.as_str(), reason.as_str()) == ("ann", "a comma")),
        "{actions:?}"
    );
}

#[test]
fn many_letters_are_changed_at_once_by_a_filter() {
    let shop = Shop::with_letters();
    let retried = shop.json(&["dead-letters", "retry", "--all", "--yes"]);
    assert_eq!(retried.last().map(|line| &line["retried"]), Some(&2.into()), "two keys");
    let discarded = shop.json(&["dead-letters", "discard", "--key", "Chile", "--yes"]);
    assert_eq!(discarded.last().map(|line| &line["discarded"]), Some(&2.into()));
    assert_eq!(shop.json(&["dead-letters", "list"]).len(), 1);
    assert_eq!(shop.journal().len(), 2);
}

#[test]
fn more_than_one_letter_is_changed_only_after_a_yes() {
    let shop = Shop::with_letters();
    let discard = ["dead-letters", "discard", "--reason", "invalid"];
    shop.call(&discard).failed(
        1,
        "discard 2 letters for good, without their effects, and nobody can be asked",
    );
    assert_eq!(shop.json(&["dead-letters", "list"]).len(), 3);
}

#[test]
fn a_dry_run_changes_nothing() {
    let shop = Shop::with_letters();
    let before = (shop.json(&["status"]), shop.json(&["dead-letters", "list"]));
    for (arguments, shown) in [
        (&["pause"][..], "would pause consumer shipping at 5"),
        (
            &["seek", "earliest"],
            "from 5 to 0: handle 5 records again, and remove 3 dead letters, whose records are",
        ),
        (
            &["dead-letters", "retry", "--all"],
            "would retry 2 letters, each the first one of its key",
        ),
        (&["dead-letters", "retry", "1"], "would retry the letter at 1"),
        (&["dead-letters", "discard", "--key", "Peru"], "would discard 1 letter"),
        (&["dead-letters", "discard", "3"], "would discard the letter at 3"),
        (&["dead-letters", "edit", "3", "--payload", "1"], "n/a by 1"),
    ] {
        let called = shop.call(&[arguments, &["--dry-run"]].concat());
        assert_eq!(called.status, Some(0), "{}", called.error);
        assert!(called.output.contains(shown), "{shown:?} is not in: {}", called.output);
    }
    assert_eq!((shop.json(&["status"]), shop.json(&["dead-letters", "list"])), before);
    assert!(shop.journal().is_empty());
}

#[test]
fn a_dry_run_fails_where_the_verb_would() {
    let shop = Shop::with_letters();
    for (arguments, why) in [
        (
            &["dead-letters", "retry", "4"][..],
            "the letter at 1 of the same key comes first",
        ),
        (
            &["dead-letters", "edit", "3", "--payload", "n/a"],
            "the record is the same",
        ),
        (
            &["dead-letters", "discard", "--key", "Cuba"],
            "no letter meets all conditions",
        ),
        (&["skip", "9"], "no such record"),
        (&["resume"], "not paused"),
    ] {
        shop.call(&[arguments, &["--dry-run"]].concat()).failed(1, why);
        shop.call(&[arguments, &["--yes"]].concat()).failed(1, why);
    }
    assert!(shop.journal().is_empty());
    let retry = ["dead-letters", "retry", "--all", "--yes"];
    assert!(shop.call(&retry).output.contains("2 letters are due now"));
    shop.call(&retry).failed(1, "is due already");
    assert_eq!(shop.journal().len(), 1);
}

#[test]
fn a_time_ago_is_in_the_past() {
    let shop = Shop::with_letters();
    for before in ["2h", "2h ago", "-2h"] {
        let before = format!("--before={before}");
        shop.call(&["dead-letters", "discard", &before, "--yes"])
            .failed(1, "no letter meets all conditions");
        let since = before.replace("before", "since");
        let called = shop.call(&["dead-letters", "discard", &since, "--dry-run"]);
        assert!(called.output.contains("3 letters"), "{}", called.output);
    }
}

#[test]
fn a_consumer_is_paused_and_resumed() {
    let shop = Shop::with_letters();
    assert_eq!(
        shop.call(&["pause", "--because", "the carrier is down"]).status,
        Some(0)
    );
    let status = &shop.json(&["status"])[0];
    assert_eq!(
        (&status["paused"]["by"], &status["paused"]["reason"]),
        (&"ann".into(), &"the carrier is down".into())
    );
    shop.call(&["pause"]).failed(1, "paused already");
    assert_eq!(shop.call(&["resume"]).status, Some(0));
    shop.call(&["resume"]).failed(1, "not paused");
    assert!(shop.json(&["status"])[0]["paused"].is_null());
}

#[test]
fn a_position_moves_forward_and_back() {
    let shop = Shop::with_letters();
    shop.place(&[("Chile", "7.00"), ("Peru", "8.00"), ("Cuba", "9.00")]);
    let planned = shop.json(&["skip", "5", "--dry-run"]);
    assert_eq!(
        planned[0]["dry_run"],
        "pass the record at 5 for consumer shipping, without its effects: [Chile] 7.00"
    );
    assert_eq!(shop.call(&["skip", "5"]).status, Some(0));
    for arguments in [&["skip", "7"][..], &["skip", "7", "--dry-run"]] {
        shop.call(arguments)
            .failed(1, "the next record of the consumer is at 6");
    }
    shop.call(&["seek", "latest"])
        .failed(1, "pass 2 records without handling them");
    assert_eq!(shop.call(&["seek", "latest", "--yes"]).status, Some(0));
    assert_eq!(shop.json(&["status"])[0]["next"], "8");
    assert_eq!(shop.call(&["seek", "7"]).status, Some(0), "one record needs no yes");
    assert_eq!(
        shop.json(&["seek", "earliest", "--yes"])
            .last()
            .map(|line| &line["letters_removed"]),
        Some(&3.into())
    );
    assert_eq!(shop.journal().len(), 4);
    assert_eq!(shop.consume(true).handled, 6, "all but one, and the one behind it");
}

#[test]
fn counts_have_the_right_number() {
    let shop = Shop::with_letters();
    shop.place(&[("Peru", "7.00")]);
    for (arguments, text) in [
        (&["status"][..], "1 record; the next one, at 5"),
        (
            &["seek", "6", "--dry-run"],
            "from 5 to 6: pass 1 record without handling it\n",
        ),
        (
            &["seek", "4", "--dry-run"],
            "handle 1 record again, and remove 1 dead letter, whose record is handled again",
        ),
        (&["seek", "5"], "set the position of consumer shipping to 5 again"),
        (
            &["dead-letters", "discard", "--key", "Peru", "--dry-run"],
            "discard 1 letter for good, without its effects",
        ),
    ] {
        let called = shop.call(arguments);
        assert!(
            called.output.contains(text),
            "{text:?} is not in: {}{}",
            called.output,
            called.error
        );
    }
    let [_, action, _] = &shop.journal()[0];
    assert_eq!(action, "set the position to 5 again");
    assert_eq!(
        shop.call(&["seek", "4"]).status,
        Some(1),
        "a record and a letter need a yes"
    );
    assert_eq!(shop.call(&["seek", "4", "--yes"]).status, Some(0));
    let [_, action, _] = &shop.journal()[1];
    assert_eq!(action, "moved the position from 5 to 4 and removed 1 letter");
}

#[test]
fn an_operator_without_a_name_is_unknown() {
    let shop = Shop::with_letters();
    shop.call(&["pause", "--by", ""]);
    let mut command = shop.command(&["resume"]);
    Called::of(command.env("USER", "").output().expect("start"));
    let names: Vec<_> = shop.journal().into_iter().map(|[by, ..]| by).collect();
    assert_eq!(names, ["unknown", "unknown"]);
}

#[test]
fn nothing_changes_if_nobody_reads_the_output() {
    let shop = Shop::with_letters();
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    drop(reader);
    let mut command = shop.command(&["dead-letters", "discard", "3"]);
    let child = command
        .stdout(Stdio::from(writer))
        .stderr(Stdio::piped())
        .spawn()
        .expect("start");
    Called::of(child.wait_with_output().expect("wait")).failed(1, "nothing was changed");
    assert_eq!(shop.json(&["dead-letters", "list"]).len(), 3);

    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    drop(reader);
    let mut command = shop.command(&["tail"]);
    let child = command
        .stdout(Stdio::from(writer))
        .stderr(Stdio::piped())
        .spawn()
        .expect("start");
    let called = Called::of(child.wait_with_output().expect("wait"));
    assert_eq!(
        (called.status, called.error.as_str()),
        (Some(0), ""),
        "as `head` wants it"
    );
}

#[test]
fn of_two_operators_only_one_discards() {
    let shop = Shop::with_letters();
    let start = || {
        let mut command = shop.command(&["dead-letters", "discard", "3"]);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start")
    };
    let children = [start(), start()];
    let called = children.map(|child| Called::of(child.wait_with_output().expect("wait")));
    let mut statuses = called.each_ref().map(|called| called.status);
    statuses.sort();
    assert_eq!(statuses, [Some(0), Some(1)]);
    let refused = called.iter().find(|called| called.status == Some(1)).expect("one");
    assert!(refused.error.contains("handled or discarded"), "{}", refused.error);
    assert_eq!(shop.journal().len(), 1);
}
