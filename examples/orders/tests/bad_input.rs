//! Bad input, and databases that cannot be used: one clear error, and nothing is lost.
#![cfg(unix)]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use essentially_once_sqlite::rusqlite::Connection;
use serde_json::{Value, json};
use tempfile::TempDir;

fn orders(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_orders"))
        .args(arguments)
        .output()
        .expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Runs a bad command line, and returns the error. The program must not write anything.
fn refused(arguments: &[&str], folder: &Path) -> String {
    let untouched = folder.join("untouched");
    let output = orders(&[arguments, &["--dir", &untouched.to_string_lossy()]].concat());
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    assert!(!untouched.exists(), "{arguments:?}");
    text(&output.stderr)
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
    let output = orders(&["--orders", "100", "--kills", "0", "--keys", &usable]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
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

/// The error of a server that cannot be used, without the name of the option.
#[cfg(any(feature = "postgres", feature = "redis", feature = "rabbitmq"))]
fn check_that_each_is_refused(urls: &[(&str, &str, &str)]) {
    let folder = tempfile::tempdir().expect("a folder");
    for (url, server, advice) in urls {
        for option in ["--bus", "--store"] {
            let error = refused(&[option, url], folder.path());
            let (first, more) = error.split_once('\n').expect("a line");
            assert!(first.starts_with(&format!("orders: {option}: ")), "{error}");
            assert!(first.contains(server) && first.contains(advice), "{error}");
            assert_eq!(more, "", "one error, not several");
        }
    }
}

#[cfg(feature = "postgres")]
#[test]
fn a_postgres_server_that_cannot_be_used_is_refused_before_anything_is_written() {
    check_that_each_is_refused(&[
        ("postgres://127.0.0.1:1/shop", "127.0.0.1:1", "start the server"),
        (
            "postgres://127.0.0.1:notaport/shop",
            "PostgreSQL URL",
            "expected postgres://",
        ),
        (
            "postgres://127.0.0.1/shop?sslmode=require",
            "PostgreSQL URL",
            "do not use TLS",
        ),
    ]);
}

#[cfg(feature = "redis")]
#[test]
fn a_redis_server_that_cannot_be_used_is_refused_before_anything_is_written() {
    check_that_each_is_refused(&[
        ("redis://127.0.0.1:1/0", "127.0.0.1:1", "start the server"),
        ("redis://127.0.0.1:notaport/0", "Redis URL", "expected redis://"),
        ("redis:/127.0.0.1", "Redis URL", "expected redis://"),
        ("redis://127.0.0.1/zero", "Redis URL", "expected redis://"),
    ]);
}

#[cfg(feature = "rabbitmq")]
#[test]
fn a_rabbitmq_broker_that_cannot_be_used_is_refused_before_anything_is_written() {
    check_that_each_is_refused(&[
        ("amqp://guest:guest@127.0.0.1:1/%2f", "127.0.0.1:1", "start the server"),
        ("amqp://127.0.0.1:notaport", "RabbitMQ URL", "expected amqp://"),
    ]);
}

#[test]
fn a_place_with_an_unknown_scheme_is_refused_with_those_that_are_known() {
    let folder = tempfile::tempdir().expect("a folder");
    for place in ["reddis://127.0.0.1", "mysql://127.0.0.1", "sqlite3", "127.0.0.1:6379"] {
        for option in ["--bus", "--store"] {
            let error = refused(&[option, place], folder.path());
            assert!(
                error.starts_with(&format!("orders: {option}: expected `sqlite` or a URL")),
                "{error}"
            );
        }
    }
    let error = refused(&["--store", "kafka://127.0.0.1"], folder.path());
    assert!(error.starts_with("orders: --store: Kafka keeps no state"), "{error}");
}

#[test]
fn a_folder_that_cannot_be_used_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    fs::write(&file, "").expect("written");
    let output = orders(&["--orders", "5", "--dir", &file.to_string_lossy()]);
    assert_eq!(output.status.code(), Some(2));
    let error = text(&output.stderr);
    assert!(
        error.contains("cannot use the folder") && error.contains(&*file.to_string_lossy()),
        "{error}"
    );
}

/// The files of one run, whose processes the test starts one by one.
struct Shop {
    folder: TempDir,
}

/// Makes one file unusable, and usable again.
struct Breakage {
    /// What the error advises.
    advice: &'static str,
    break_it: fn(&Path),
    mend_it: fn(&Path),
    /// The shell commands before the program.
    limits: &'static str,
}

impl Shop {
    fn open() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let shop = Self { folder };
        let key = "4fd0eb4cb2ea83d97d6d22a1d07d4e4b8b1b5ed4d9f38f8ea9d6d1d4dd2bb5a7";
        fs::write(shop.file("keys"), format!("a = {key}")).expect("written");
        let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(shop.file("keys"), owner_only).expect("chmod");
        let table =
            "CREATE TABLE shipments (order_number INTEGER NOT NULL, order_id TEXT NOT NULL, freight REAL NOT NULL)";
        shop.database("shipping.db").execute_batch(table).expect("created");
        shop
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn database(&self, name: &str) -> Connection {
        Connection::open(self.file(name)).expect("open")
    }

    fn count(&self, name: &str, query: &str) -> u64 {
        let count: i64 = self
            .database(name)
            .query_row(query, [], |row| row.get(0))
            .expect("a count");
        count.unsigned_abs()
    }

    /// Lets customers want this many orders in all.
    fn demand(&self, orders: u32) {
        // Long lines fill a disk soon.
        let name = "x".repeat(2_000);
        let lines: String = (0..orders).map(|order| format!("{order},1.50,{name}\n")).collect();
        fs::write(self.file("input.csv"), lines).expect("written");
    }

    /// Runs a process until it has handled everything, or fails.
    fn run(&self, role: &str, limits: &str) -> Output {
        let until = if role == "OrderService" { "Stopped" } else { "CaughtUp" };
        let task = json!({
            "role": role,
            "until": until,
            "settings": {
                "delivery": "essentially-once",
                "run": "test",
                "bus": "sqlite",
                "store": "sqlite",
                "folder": self.folder.path(),
                "keys": self.file("keys"),
                "format": { "fields": 3, "freight": 1, "mended": false },
                "max_batch": 50,
            },
            "faults": Value::Array(Vec::new()),
            "leash": 1_000_000,
            "input": self.file("input.csv"),
        });
        let mut process = Command::new("sh")
            .args([
                "-c",
                &format!("{limits} exec \"$0\" process"),
                env!("CARGO_BIN_EXE_orders"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the process starts");
        // The process ends with its stdin.
        let mut stdin = process.stdin.take().expect("piped");
        writeln!(stdin, "{task}").expect("the process reads");
        let mut stdout = BufReader::new(process.stdout.take().expect("piped"));
        let mut line = String::new();
        while stdout.read_line(&mut line).expect("UTF-8") > 0 {
            if line == "all placed\n" {
                stdin.write_all(b"s").expect("the process reads");
            }
            line.clear();
        }
        let mut stderr = Vec::new();
        process
            .stderr
            .take()
            .expect("piped")
            .read_to_end(&mut stderr)
            .expect("read");
        Output {
            status: process.wait().expect("ended"),
            stdout: Vec::new(),
            stderr,
        }
    }

    fn run_well(&self, role: &str) {
        let output = self.run(role, "");
        assert_eq!(output.status.code(), Some(0), "{role}: {}", text(&output.stderr));
    }

    /// Breaks the file that a process writes to, runs the process, mends the file, and runs the
    /// process again.
    fn break_and_mend(&self, role: &str, file: &str, breakage: &Breakage) {
        (breakage.break_it)(&self.file(file));
        let output = self.run(role, breakage.limits);
        (breakage.mend_it)(&self.file(file));
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{role}: {error}");
        assert!(
            error.starts_with("orders: ") && error.lines().count() == 1,
            "{role}: {error}"
        );
        assert!(
            error.contains(file) && error.contains(breakage.advice),
            "{role}: {error}"
        );
        self.run_well(role);
    }
}

/// The processes in the direction of the orders, with the files that they write to.
const PROCESSES: [(&str, &str); 3] = [
    ("OrderService", "orders.db"),
    ("OrderRelay", "bus.db"),
    ("ShippingService", "shipping.db"),
];

/// Each process fails, with an error that names its file, and continues once the file is mended.
fn nothing_is_lost(processes: &[(&str, &str)], breakage: &Breakage) {
    let shop = Shop::open();
    shop.demand(10);
    PROCESSES.iter().for_each(|(role, _)| shop.run_well(role));
    shop.demand(300);
    for (role, file) in PROCESSES {
        match processes.contains(&(role, file)) {
            true => shop.break_and_mend(role, file, breakage),
            false => shop.run_well(role),
        }
    }
    assert_eq!(shop.count("orders.db", "SELECT count(*) FROM orders"), 300);
    assert_eq!(shop.count("shipping.db", "SELECT count(*) FROM shipments"), 300);
    let distinct = "SELECT count(DISTINCT order_number) FROM shipments";
    assert_eq!(shop.count("shipping.db", distinct), 300);
}

fn nothing(_: &Path) {}

/// Changes the byte of a database file that says which versions of SQLite may write to it. Unlike
/// with permissions, root may not write to it either.
fn set_write_version(file: &Path, version: u8) {
    const WRITE_VERSION: usize = 18;
    let mut bytes = fs::read(file).expect("read");
    bytes[WRITE_VERSION] = version;
    fs::write(file, bytes).expect("written");
}

#[test]
fn a_read_only_database_stops_its_process_and_nothing_is_lost() {
    nothing_is_lost(
        &PROCESSES,
        &Breakage {
            advice: "make the file and its folder writable for this user",
            break_it: |file| set_write_version(file, 3),
            mend_it: |file| set_write_version(file, 2),
            limits: "",
        },
    );
}

fn set_schema_version(file: &Path, change: &str) {
    let database = Connection::open(file).expect("open");
    let update = format!("UPDATE essentially_once_meta SET value = value {change}");
    database.execute_batch(&update).expect("updated");
}

#[test]
fn a_database_of_a_newer_version_stops_its_process_and_nothing_is_lost() {
    nothing_is_lost(
        &PROCESSES,
        &Breakage {
            advice: "use a newer essentially-once-sqlite",
            break_it: |file| set_schema_version(file, "+ 90"),
            mend_it: |file| set_schema_version(file, "- 90"),
            limits: "",
        },
    );
}

#[test]
fn a_full_disk_stops_its_process_and_nothing_is_lost() {
    nothing_is_lost(
        &PROCESSES,
        &Breakage {
            advice: "free space",
            break_it: nothing,
            mend_it: nothing,
            // Files may not grow above 64 KiB, and a write beyond fails instead of killing.
            limits: "trap '' XFSZ; ulimit -f 128;",
        },
    );
}

#[test]
fn a_locked_database_stops_the_order_service_and_nothing_is_lost() {
    let shop = Shop::open();
    shop.demand(10);
    shop.run_well("OrderService");
    shop.demand(300);
    let other = shop.database("orders.db");
    other.execute_batch("BEGIN IMMEDIATE").expect("locked");
    let output = shop.run("OrderService", "");
    other.execute_batch("ROLLBACK").expect("unlocked");
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("orders.db") && error.contains("keeps the file locked"),
        "{error}"
    );
    shop.run_well("OrderService");
    assert_eq!(shop.count("orders.db", "SELECT count(*) FROM orders"), 300);
}
