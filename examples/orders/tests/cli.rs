//! Runs the program as its users do.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use essentially_once_sqlite::rusqlite::{Connection, OpenFlags};
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

/// A database of a delivery in a folder that a run has kept.
fn database(kept: &str, delivery: &str, name: &str) -> Connection {
    Connection::open(Path::new(kept).join(delivery).join(name)).expect("kept")
}

/// Counts in a database, without the program's own count.
fn count_in(kept: &str, delivery: &str, name: &str, query: &str) -> u64 {
    let count: i64 = database(kept, delivery, name)
        .query_row(query, [], |row| row.get(0))
        .expect("a count");
    count.unsigned_abs()
}

/// A column of a database of essentially-once.
fn column(kept: &str, name: &str, query: &str) -> Vec<String> {
    let database = database(kept, "essentially-once", name);
    let mut rows = database.prepare(query).expect("a table");
    let rows = rows.query_map([], |row| row.get(0)).expect("rows");
    rows.collect::<Result<_, _>>().expect("texts")
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
        assert!(number(delivery, "lost_replies") >= 10, "{delivery}");
        assert!(number(delivery, "duplicates_on_bus") >= 20, "{delivery}");
        assert!(delivery["seconds"].is_number());
        // The same in the databases.
        let name = delivery["delivery"].as_str().expect("a name");
        let count = |file, query| count_in(&kept, name, file, query);
        assert_eq!(count("orders.db", "SELECT count(DISTINCT line) FROM orders"), 2_000);
        let distinct = count("shipping.db", "SELECT count(DISTINCT order_number) FROM shipments");
        let again = count("shipping.db", "SELECT count(*) FROM shipments") - distinct;
        let shipped = number(delivery, "shipped_once") + number(delivery, "shipped_more");
        assert_eq!(distinct, shipped, "{delivery}");
        assert_eq!(again > 0, number(delivery, "shipped_more") > 0, "{delivery}");
        let unshipped = number(delivery, "never_shipped") + number(delivery, "rejected");
        assert_eq!(2_000 - distinct, unshipped, "{delivery}");
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
    let count = |file, query| count_in(&kept, "essentially-once", file, query);
    let confirmed = "SELECT count(*) FROM orders WHERE status = 'shipped'";
    assert_eq!(count("orders.db", confirmed), shipped);
    let letters = "SELECT count(*) FROM essentially_once_letters";
    let set_aside = count("shipping.db", letters) + count("orders.db", letters);
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
    let mut shipped = column(&kept, "shipping.db", "SELECT order_id FROM shipments");
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
        "Rejected lines among the dead letters of essentially-once: 40\n",
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
    let letters = "SELECT count(*) FROM essentially_once_letters";
    count_in(kept, "essentially-once", "shipping.db", letters)
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
    let folder = tempfile::tempdir().expect("a folder");
    let lines = |seed, name| {
        let kept = folder.path().join(name).to_string_lossy().into_owned();
        deliveries(&["--orders", "200", "--kills", "1", "--seed", seed, "--dir", &kept]);
        column(&kept, "orders.db", "SELECT line FROM orders ORDER BY number")
    };
    let first = lines("3", "first");
    assert_eq!(first.len(), 200);
    assert_eq!(lines("3", "again"), first);
    assert_ne!(lines("4", "another"), first);
}

/// Starts a run that nothing disturbs, and kills it if the test fails.
struct Run(Option<Child>);

impl Run {
    fn start(arguments: &[&str]) -> Self {
        let harmless = ["--kills", "0", "--lose", "0", "--tamper", "0"];
        let run = Command::new(env!("CARGO_BIN_EXE_orders"))
            .args([arguments, &harmless].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Self(Some(run.expect("the program starts")))
    }

    fn id(&self) -> u32 {
        self.0.as_ref().expect("running").id()
    }

    /// The output of a run that must fail.
    fn fail(mut self) -> (String, String) {
        let output = self.0.take().expect("running").wait_with_output().expect("it ends");
        let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("UTF-8"));
        assert_eq!(output.status.code(), Some(1), "{stdout}{stderr}");
        (stdout, stderr)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Some(run) = &mut self.0 {
            let _ = run.kill();
            let _ = run.wait();
        }
    }
}

/// Waits until something is there.
fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "it never comes");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn lost_doubled_and_reordered_orders_are_named_and_fail_the_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let kept = folder.path().join("kept").to_string_lossy().into_owned();
    // One line each, and no malformed one.
    let input = folder.path().join("orders.csv");
    let lines: String = (2..3_002).map(|line| format!("id{line},1.00\n")).collect();
    fs::write(&input, format!("id,freight\n{lines}")).expect("written");
    let run = Run::start(&["--input", &input.to_string_lossy(), "--dir", &kept, "--json"]);
    // The table is there before the first process starts, and the last orders are shipped last.
    let path = Path::new(&kept).join("essentially-once").join("shipping.db");
    wait_for(|| {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
        let database = Connection::open_with_flags(&path, flags).ok()?;
        let harm = "CREATE TRIGGER lose AFTER INSERT ON shipments WHEN NEW.order_number BETWEEN 2900 AND 2911
            BEGIN DELETE FROM shipments WHERE order_number = NEW.order_number; END;
            CREATE TRIGGER double AFTER INSERT ON shipments WHEN NEW.order_number = 2920
            BEGIN INSERT INTO shipments VALUES (2920, 'id2920', 1.0); END;
            CREATE TRIGGER hold AFTER INSERT ON shipments WHEN NEW.order_number = 2930
            BEGIN UPDATE shipments SET order_number = 2931 WHERE order_number = 2930; END;
            CREATE TRIGGER swap AFTER INSERT ON shipments WHEN NEW.order_number = 2931
            BEGIN UPDATE shipments SET order_number = 2930 WHERE rowid = NEW.rowid; END;";
        database.execute_batch(&format!("BEGIN IMMEDIATE; {harm} COMMIT")).ok()
    });
    let (stdout, stderr) = run.fail();
    for violation in [
        "12 orders lost: neither shipped nor set aside: id2900 (line 2900), ",
        " id2909 (line 2909) and 2 more\n",
        "1 order doubled: shipped more than once: id2920 (line 2920)\n",
        "1 order in the wrong order: shipped behind a later order: id2930 (line 2930)\n",
    ] {
        assert!(stderr.contains(violation), "{violation} is not in {stderr}");
    }
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    let [lost, doubled] = ["never_shipped", "shipped_more"].map(|name| number(&report["deliveries"][2], name));
    assert_eq!((lost, doubled), (12, 1));
}

#[cfg(target_os = "linux")]
#[test]
fn a_process_that_somebody_else_kills_fails_the_run_and_is_named() {
    use rustix::process::{Pid, Signal, kill_process};

    let run = Run::start(&["--orders", "100000"]);
    let parent = run.id().to_string();
    let child = wait_for(|| {
        let processes = fs::read_dir("/proc").ok()?.flatten();
        let numbers = processes.filter_map(|process| process.file_name().to_str()?.parse::<i32>().ok());
        let mut children = numbers.filter(|process| {
            // After the name, which may contain spaces: state, parent, ...
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            let after_name = stat.rsplit(')').next().unwrap_or_default();
            after_name.split_whitespace().nth(1) == Some(&parent)
        });
        children.next()
    });
    kill_process(Pid::from_raw(child).expect("not zero"), Signal::KILL).expect("it runs");
    let (_, stderr) = run.fail();
    let error = stderr.lines().last().unwrap_or_default();
    assert!(error.starts_with("orders: the "), "{stderr}");
    assert!(
        error.contains("of at-most-once ended on its own, signal: 9"),
        "{stderr}"
    );
}
