//! Runs the program as its users do.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use essentially_once_sqlite::rusqlite::Connection;
use serde_json::Value;

fn orders(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_orders"))
        .args(arguments)
        .output()
        .expect("the program starts")
}

/// The JSON of a run that must succeed.
fn deliveries(arguments: &[&str]) -> Vec<Value> {
    let output = orders(&[arguments, &["--json"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let json: Value = serde_json::from_slice(&output.stdout).expect("nothing but JSON on stdout");
    let deliveries = json["deliveries"].as_array().expect("a list").clone();
    let names: Vec<_> = deliveries.iter().map(|one| one["delivery"].as_str()).collect();
    assert_eq!(
        names,
        [Some("at-most-once"), Some("at-least-once"), Some("essentially-once")]
    );
    deliveries
}

fn number(delivery: &Value, name: &str) -> u64 {
    delivery[name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name} in {delivery}"))
}

/// Runs a bad command line, and returns the error. The program must not write anything.
fn refused(arguments: &[&str], folder: &Path) -> String {
    let untouched = folder.join("untouched");
    let output = orders(&[arguments, &["--dir", &untouched.to_string_lossy()]].concat());
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    assert!(!untouched.exists(), "{arguments:?}");
    String::from_utf8(output.stderr).expect("UTF-8")
}

#[test]
fn kills_lose_and_double_nothing_under_essentially_once() {
    let deliveries = deliveries(&["--orders", "2000", "--kills", "20", "--seed", "1"]);
    for delivery in &deliveries {
        assert_eq!(number(delivery, "orders"), 2_000);
        assert_eq!(number(delivery, "kills"), 20);
        let sum: u64 = ["shipped_once", "shipped_more", "never_shipped", "rejected"]
            .iter()
            .map(|name| number(delivery, name))
            .sum();
        assert_eq!(sum, 2_000, "{delivery}");
        assert!(delivery["seconds"].is_number());
    }
    let [at_most_once, at_least_once, essentially_once] = &deliveries[..] else {
        panic!("{deliveries:?}");
    };
    assert_eq!(number(at_most_once, "shipped_more"), 0);
    assert_eq!(number(at_least_once, "never_shipped"), 0);
    assert_eq!(number(essentially_once, "shipped_more"), 0);
    assert_eq!(number(essentially_once, "never_shipped"), 0);
    // If all twenty kills miss a batch in progress, they do not fall into the work.
    assert!(number(at_most_once, "never_shipped") > 0, "{at_most_once}");
    assert!(number(at_least_once, "shipped_more") > 0, "{at_least_once}");
}

#[test]
fn malformed_lines_are_set_aside_with_their_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let (input, kept) = (folder.path().join("orders.csv"), folder.path().join("kept"));
    let lines = "\u{feff}id,freight,name\r\n\
        1,32.38,Ann\r\n\
        2,11.61,\"Smith, Bob\"\r\n\
        3,5.00,Smith, Bob\r\n\
        ,7.00,Ann\r\n\
        5,-1,Ann\r\n\
        6,NaN,Ann\r\n\
        \r\n\
        1,32.38,Ann";
    fs::write(&input, lines).expect("written");
    let (input, kept) = (input.to_string_lossy(), kept.to_string_lossy());
    for delivery in deliveries(&["--input", &input, "--kills", "0", "--dir", &kept]) {
        assert_eq!(number(&delivery, "orders"), 8);
        assert_eq!(number(&delivery, "shipped_once"), 3);
        assert_eq!(number(&delivery, "rejected"), 5);
        assert_eq!(number(&delivery, "kills"), 0);
    }

    let shop = Connection::open(Path::new(&*kept).join("essentially-once.db")).expect("kept");
    let mut rejected = shop
        .prepare("SELECT line, reason, payload FROM rejected ORDER BY line")
        .expect("a table of rejected lines");
    let rejected: Vec<(u32, String, String)> = rejected
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .expect("rows")
        .collect::<Result<_, _>>()
        .expect("values");
    let expected = [
        (4, "4 fields", "3,5.00,Smith, Bob"),
        (5, "no order id", ",7.00,Ann"),
        (6, "negative", "5,-1,Ann"),
        (7, "not a finite number", "6,NaN,Ann"),
        (8, "no order id", ""),
    ];
    assert_eq!(rejected.len(), expected.len());
    for ((line, reason, payload), (at, part, whole)) in rejected.iter().zip(expected) {
        assert_eq!((*line, payload.as_str()), (at, whole));
        assert!(reason.contains(part), "{reason}");
    }

    let again = orders(&["--input", &input, "--dir", &kept]);
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("already exists"));
}

#[test]
fn more_kills_than_orders_end_all_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let input = folder.path().join("orders.csv");
    fs::write(&input, "id,freight\n1,1\n2,2\n3,x\n4,4\n5,5\n").expect("written");
    let deliveries = deliveries(&["--input", &input.to_string_lossy(), "--kills", "20"]);
    for delivery in &deliveries {
        assert_eq!(number(delivery, "kills"), 20, "{delivery}");
    }
    assert_eq!(number(&deliveries[2], "shipped_once"), 4);
    assert_eq!(number(&deliveries[2], "rejected"), 1);
}

#[test]
fn a_seed_repeats_the_made_up_orders() {
    let rejected = |seed| {
        let deliveries = deliveries(&["--orders", "2000", "--kills", "1", "--seed", seed]);
        number(&deliveries[2], "rejected")
    };
    assert_eq!(rejected("3"), rejected("3"));
}

#[test]
fn bad_input_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).expect("written");
        path.to_string_lossy().into_owned()
    };
    for (input, reason) in [
        (
            folder.path().join("nowhere.csv").to_string_lossy().into_owned(),
            "cannot read",
        ),
        (folder.path().to_string_lossy().into_owned(), "cannot read"),
        (file("empty.csv", b""), "empty"),
        (file("header.csv", b"id,freight\n"), "no orders"),
        (file("columns.csv", b"id,weight\n1,2\n"), "id, weight"),
        (
            file("latin.csv", b"id,freight\n1,2\nM\xfcller,3\n"),
            "line 3 is not UTF-8",
        ),
    ] {
        let error = refused(&["--input", &input], folder.path());
        assert!(error.contains(reason), "{error}");
        assert!(error.contains(&input), "the error does not name the file: {error}");
    }
}

#[test]
fn bad_usage_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    for arguments in [
        &["--orders", "0"][..],
        &["--orders", "many"],
        &["--kills", "-1"],
        &["--max-batch", "0"],
        &["--orders", "5", "--input", "orders.csv"],
        &["--unknown"],
        &["positional"],
    ] {
        assert!(!refused(arguments, folder.path()).is_empty());
    }
}
