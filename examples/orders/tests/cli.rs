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
fn report(arguments: &[&str]) -> Value {
    let output = orders(&[arguments, &["--json"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    serde_json::from_slice(&output.stdout).expect("nothing but JSON on stdout")
}

/// The deliveries of a run that must succeed.
fn deliveries(arguments: &[&str]) -> Vec<Value> {
    let report = report(arguments);
    let deliveries = report["deliveries"].as_array().expect("a list").clone();
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

/// The databases of essentially-once in a folder that a run has kept.
fn database(kept: &str, name: &str) -> Connection {
    Connection::open(Path::new(kept).join("essentially-once").join(name)).expect("kept")
}

/// Counts in a database, without the program's own count.
fn count_in(kept: &str, name: &str, query: &str) -> u64 {
    let count: i64 = database(kept, name)
        .query_row(query, [], |row| row.get(0))
        .expect("a count");
    count.unsigned_abs()
}

#[test]
fn kills_lost_replies_and_altered_records_lose_and_double_nothing_under_essentially_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let kept = folder.path().join("kept").to_string_lossy().into_owned();
    let deliveries = deliveries(&["--orders", "2000", "--kills", "40", "--seed", "1", "--dir", &kept]);
    for delivery in &deliveries {
        assert_eq!(number(delivery, "orders"), 2_000);
        assert_eq!(number(delivery, "placed"), 2_000);
        assert_eq!(number(delivery, "kills"), 40);
        let sum: u64 = ["shipped_once", "shipped_more", "never_shipped", "rejected"]
            .iter()
            .map(|name| number(delivery, name))
            .sum();
        assert_eq!(sum, 2_000, "{delivery}");
        assert!(number(delivery, "lost_replies") >= 10, "{delivery}");
        assert!(number(delivery, "duplicates_on_bus") >= 20, "{delivery}");
        assert!(delivery["seconds"].is_number());
    }
    let [at_most_once, at_least_once, essentially_once] = &deliveries[..] else {
        panic!("{deliveries:?}");
    };
    assert_eq!(number(at_most_once, "shipped_more"), 0);
    assert_eq!(number(at_least_once, "never_shipped"), 0);
    // If all kills of the shipping service miss a batch in progress, they do not fall into the
    // work.
    assert!(number(at_most_once, "never_shipped") > 0, "{at_most_once}");
    assert!(number(at_least_once, "shipped_more") > 0, "{at_least_once}");
    for without_outbox in [at_most_once, at_least_once] {
        for name in ["packed", "confirmed", "tampered_rejected"] {
            assert!(without_outbox[name].is_null(), "{without_outbox}");
        }
    }

    let shipped = number(essentially_once, "shipped_once");
    assert_eq!(shipped + number(essentially_once, "rejected"), 2_000);
    for name in ["packed", "confirmed"] {
        assert_eq!(number(essentially_once, name), shipped, "{name}");
    }
    assert!(
        number(essentially_once, "tampered_rejected") >= 10,
        "{essentially_once}"
    );
    // The same in the databases.
    let shipments = "SELECT count(*) FROM shipments";
    assert_eq!(count_in(&kept, "shipping.db", shipments), shipped);
    let distinct = "SELECT count(DISTINCT order_number) FROM shipments";
    assert_eq!(count_in(&kept, "shipping.db", distinct), shipped);
    let confirmed = "SELECT count(*) FROM orders WHERE status = 'shipped'";
    assert_eq!(count_in(&kept, "orders.db", confirmed), shipped);
    let letters = "SELECT count(*) FROM essentially_once_letters";
    let set_aside = count_in(&kept, "shipping.db", letters) + count_in(&kept, "orders.db", letters);
    let expected = number(essentially_once, "rejected") + number(essentially_once, "tampered_rejected");
    assert_eq!(set_aside, expected);
}

/// The line, reason and text of each dead letter.
fn letters(run: &Value) -> Vec<(u64, String, String)> {
    let text = |letter: &Value, name: &str| letter[name].as_str().expect("a text").to_owned();
    let letters = run["dead_letters"].as_array().expect("a list").iter();
    letters
        .map(|letter| (number(letter, "line"), text(letter, "reason"), text(letter, "text")))
        .collect()
}

#[test]
fn malformed_lines_are_dead_letters_with_their_reason() {
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
    let harmless = ["--kills", "0", "--lose", "0", "--tamper", "0"];
    let deliveries = deliveries(&[&["--input", &input, "--dir", &kept], &harmless[..]].concat());
    for delivery in &deliveries {
        assert_eq!(number(delivery, "orders"), 8);
        assert_eq!(number(delivery, "shipped_once"), 3);
        assert_eq!(number(delivery, "rejected"), 5);
        assert_eq!(number(delivery, "kills"), 0);
    }
    let [at_most_once, at_least_once, essentially_once] = &deliveries[..] else {
        panic!("{deliveries:?}");
    };
    assert!(letters(at_most_once).is_empty() && letters(at_least_once).is_empty());
    let expected = [
        (4, "4 fields, but the header has 3", "3,5.00,Smith, Bob"),
        (5, "no order id", ",7.00,Ann"),
        (6, "freight \"-1\" is negative", "5,-1,Ann"),
        (7, "freight \"NaN\" is not a finite number", "6,NaN,Ann"),
        (8, "no order id", ""),
    ];
    let expected = expected.map(|(line, reason, text)| (line, reason.to_owned(), text.to_owned()));
    assert_eq!(letters(essentially_once), expected);
    assert_eq!(letters_in(&kept), 5);

    let again = orders(&["--input", &input, "--dir", &kept]);
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("already exists"));
}

/// A generated file: a script with a fixed seed drew each field from short lists of invented names,
/// streets and towns, and drew 40 of the 200 lines to have an unquoted comma in the company's name.
/// In other lines the name has no comma, or is quoted.
const UNQUOTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/unquoted.csv");

/// The lines of the file after its header, each with its number of fields, counted without the
/// program's parser.
fn unquoted_lines() -> Vec<(String, usize)> {
    let text = fs::read_to_string(UNQUOTED).expect("the file is in the repository");
    let fields = |line: &str| -> usize {
        let outside_quotes = line.split('"').step_by(2);
        1 + outside_quotes.map(|part| part.matches(',').count()).sum::<usize>()
    };
    text.lines()
        .skip(1)
        .map(|line| (line.to_owned(), fields(line)))
        .collect()
}

#[test]
fn one_line_in_five_of_the_generated_file_has_an_unquoted_comma() {
    let lines = unquoted_lines();
    assert_eq!(lines.len(), 200);
    assert_eq!(lines.iter().filter(|(_, fields)| *fields == 8).count(), 160);
    assert_eq!(lines.iter().filter(|(_, fields)| *fields > 8).count(), 40);
    assert!(lines.iter().any(|(line, _)| line.contains('"')), "no name is quoted");
}

#[test]
fn a_mended_parser_ships_every_dead_letter_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let kept = folder.path().join("kept").to_string_lossy().into_owned();
    let report = report(&[
        "--input", UNQUOTED, "--kills", "20", "--tamper", "0", "--seed", "1", "--mend", "--dir", &kept,
    ]);
    let (raced, mended) = (&report["deliveries"][2], &report["mended"]);
    assert_eq!(number(raced, "kills"), 20);
    assert_eq!(number(raced, "shipped_once"), 160);
    let lines = unquoted_lines();
    let reason = |fields| format!("{fields} fields, but the header has 8");
    let expected: Vec<_> = (2..)
        .zip(&lines)
        .filter(|(_, (_, fields))| *fields > 8)
        .map(|(number, (line, fields))| (number, reason(fields), line.clone()))
        .collect();
    assert_eq!(letters(raced), expected);

    assert_eq!(number(mended, "retried"), 40);
    assert_eq!(number(mended, "shipped_once"), 200);
    assert_eq!(number(mended, "confirmed"), 200);
    assert_eq!(number(mended, "rejected"), 0);
    assert!(letters(mended).is_empty());
    // The same in the database, without the program's own count.
    assert_eq!(letters_in(&kept), 0);
    let mut ids: Vec<_> = lines.iter().map(|(line, _)| line[..5].to_owned()).collect();
    let mut shipped = shipped_in(&kept);
    ids.sort();
    shipped.sort();
    assert_eq!(shipped, ids);
}

#[test]
fn a_mended_parser_leaves_lines_that_are_still_invalid() {
    let folder = tempfile::tempdir().expect("a folder");
    let input = folder.path().join("orders.csv");
    // The fourth line is valid, but waits behind the third, which has the same id.
    let lines = "id,freight,name\n1,1.00,Ann\n3,5.00,Smith, Bob\n3,6.00,Ann\n5,NaN,Smith, Eve\n";
    fs::write(&input, lines).expect("written");
    // If line 3 was altered on its way, line 4 would not wait for it.
    let input = input.to_string_lossy();
    let report = report(&["--input", &input, "--kills", "3", "--tamper", "0", "--mend"]);
    let (raced, mended) = (&report["deliveries"][2], &report["mended"]);
    let numbers: Vec<u64> = letters(raced).iter().map(|(line, ..)| *line).collect();
    assert_eq!(numbers, [3, 4, 5]);
    // At-least-once keeps no letters, so the fourth line does not wait.
    assert_eq!(number(&report["deliveries"][1], "rejected"), 2);
    assert_eq!(number(mended, "shipped_once"), 3);
    let reason = "freight \"NaN\" is not a finite number".to_owned();
    assert_eq!(letters(mended), [(5, reason, "5,NaN,Smith, Eve".to_owned())]);
}

#[test]
fn a_few_dead_letters_are_shown_and_how_to_retry_them() {
    let shown = |more: &[&str]| {
        // An altered line comes back behind others, so the letters would be in another order.
        let output = orders(&[&["--input", UNQUOTED, "--kills", "0", "--tamper", "0"], more].concat());
        assert_eq!(output.status.code(), Some(0));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let plain = shown(&[]);
    for part in [
        "Dead letters of essentially-once: 40\n",
        "line 10: 9 fields, but the header has 8\n    20009,",
        "and 37 more",
        "`--mend` retries them",
    ] {
        assert!(plain.contains(part), "{part} is not in {plain}");
    }
    let mended = shown(&["--mend"]);
    assert!(mended.contains("40 shipped, 0 left\n"), "{mended}");
}

/// How many dead letters the shipping service has.
fn letters_in(kept: &str) -> u64 {
    count_in(kept, "shipping.db", "SELECT count(*) FROM essentially_once_letters")
}

/// The ids of the orders that it has shipped.
fn shipped_in(kept: &str) -> Vec<String> {
    let database = database(kept, "shipping.db");
    let mut ids = database.prepare("SELECT order_id FROM shipments").expect("a table");
    let ids = ids.query_map([], |row| row.get(0)).expect("rows");
    ids.collect::<Result<_, _>>().expect("ids")
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
fn unusable_keys_are_refused_before_anything_is_written() {
    use std::os::unix::fs::PermissionsExt as _;

    let folder = tempfile::tempdir().expect("a folder");
    let key = "4fd0eb4cb2ea83d97d6d22a1d07d4e4b8b1b5ed4d9f38f8ea9d6d1d4dd2bb5a7";
    let file = |name: &str, text: String, mode: u32| {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        path.to_string_lossy().into_owned()
    };
    let missing = folder.path().join("missing").to_string_lossy().into_owned();
    for (path, reason) in [
        (missing, "there is no such file"),
        (
            file("short", format!("a = {}", &key[..62]), 0o600),
            "the key has 31 bytes",
        ),
        (file("open", format!("a = {key}"), 0o644), "chmod 600"),
    ] {
        let error = refused(&["--keys", &path], folder.path());
        assert!(error.contains(reason), "{error}");
        assert!(error.contains(&path), "the error does not name the file: {error}");
        assert!(!error.contains(&key[..8]), "the error shows a key: {error}");
    }
    let usable = file("usable", format!("a = {key}"), 0o600);
    let deliveries = deliveries(&["--orders", "100", "--kills", "0", "--keys", &usable]);
    assert_eq!(
        number(&deliveries[2], "confirmed"),
        number(&deliveries[2], "shipped_once")
    );
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
        &["--tamper", "-1"],
        &["--lose", "few"],
        &["--bus", "kafka://localhost"],
        &["--store", "nowhere"],
        &["--unknown"],
        &["positional"],
    ] {
        assert!(!refused(arguments, folder.path()).is_empty());
    }
}
