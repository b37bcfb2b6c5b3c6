//! Arguments that are wrong, and backends that are not there.

use std::fs;

use crate::support::{Called, Shop, call, program};

#[test]
fn a_backend_that_is_not_there_is_named_and_no_password_is_shown() {
    let folder = tempfile::tempdir().expect("folder");
    let status = |store: &str| call(folder.path(), &["--store", store, "--consumer", "shipping", "status"]);
    status("sqlite:none.db").failed(1, "none.db");
    assert!(!folder.path().join("none.db").exists(), "nothing was created");
    fs::write(folder.path().join("notes.txt"), "no database").expect("write");
    status("sqlite:notes.txt").failed(1, "not a SQLite database");
    for url in [
        "redis://ann:s3cret@127.0.0.1:1/",
        "amqp://ann:s3cret@127.0.0.1:1/",
        "postgres://ann:s3cret@127.0.0.1:1/shop",
    ] {
        let called = status(url);
        called.failed(1, "127.0.0.1:1");
        assert!(!called.error.contains("s3cret"), "{}", called.error);
    }
    for url in ["shop.db", "mysql://ann:s3cret@h/", "redis://h/#orders"] {
        let called = status(url);
        called.failed(2, "--store");
        assert!(!called.error.contains("s3cret"), "{}", called.error);
    }
    call(folder.path(), &["status"]).failed(2, "--store");
    let kafka = "kafka://ann:s3cret@127.0.0.1:1";
    for arguments in [&["--store", kafka, "status"][..], &["--log", kafka, "lag"]] {
        let called = call(folder.path(), &[arguments, &["--consumer", "shipping"]].concat());
        called.failed(2, "Kafka keeps the log");
        assert!(!called.error.contains("s3cret"), "{}", called.error);
    }
    let log = format!("{kafka}#orders");
    let called = call(folder.path(), &["--log", &log, "tail"]);
    called.failed(1, "127.0.0.1:1");
    assert!(!called.error.contains("s3cret"), "{}", called.error);
    let called = call(folder.path(), &["--log", &log, "--consumer", "shipping", "doctor"]);
    called.failed(1, "Kafka keeps the log");
    assert!(called.output.contains("127.0.0.1:1"), "{}", called.output);
    call(folder.path(), &["--store", "sqlite:none.db", "status"]).failed(2, "--consumer");
}

#[test]
fn a_url_in_the_wrong_place_is_not_repeated() {
    let folder = tempfile::tempdir().expect("folder");
    let url = "amqp://ann:s3cret@h/";
    for arguments in [
        &["status", url][..],
        &[url, "status"],
        &["--consumer", url, "status"],
        &["--consumer=amqp://ann:s3cret@h/", "status"],
        &["--comsumer=amqp://ann:s3cret@h/", "status"],
        &["--store", "sqlite:shop.db", "positions", url],
        &["tail", "--from", url],
        &["--store", "redis://ann:s3cret#more@h/0", "doctor"],
    ] {
        let called = call(folder.path(), arguments);
        assert_eq!(called.status, Some(2), "{arguments:?}: {}", called.error);
        let said = called.output + &called.error;
        assert!(!said.contains("s3cret") && !said.contains("more@h"), "{said}");
    }
    let mut swapped = program(folder.path());
    swapped.env("ESSENTIALLY_ONCE_CONSUMER", url).arg("status");
    let swapped = swapped.output().expect("start");
    let said = String::from_utf8_lossy(&swapped.stderr);
    assert_eq!(swapped.status.code(), Some(2), "{said}");
    assert!(said.contains("it is a URL") && !said.contains("s3cret"), "{said}");
    #[cfg(unix)]
    {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

        let unreadable = program(folder.path()).arg(OsStr::from_bytes(b"\xff")).output();
        assert_eq!(unreadable.expect("start").status.code(), Some(2));
    }
}

#[test]
fn the_exit_status_does_not_depend_on_who_reads_the_errors() {
    let folder = tempfile::tempdir().expect("folder");
    for (arguments, status) in [
        (
            &["--store", "sqlite:none.db", "--consumer", "shipping", "status"][..],
            1,
        ),
        (&["status"], 2),
        (&["--comsumer=amqp://h/", "status"], 2),
        (&["statsu"], 2),
    ] {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        drop(reader);
        let called = program(folder.path()).args(arguments).stderr(writer).status();
        assert_eq!(called.expect("start").code(), Some(status), "{arguments:?}");
    }
}

#[test]
fn what_does_not_exist_is_named() {
    let shop = Shop::with_letters();
    shop.call(&["status", "--consumer", "shiping"])
        .failed(1, "these have one: shipping");
    shop.call(&["dead-letters", "list", "--consumer", "shiping"])
        .failed(1, "never ran");
    shop.call(&["pause", "--consumer", "shiping"]).failed(1, "never ran");
    shop.call(&["tail", "--log", "sqlite:shop.db#ordres"])
        .failed(1, "the file holds orders; check the name\n");
    let beyond = "offset 99 does not exist; the log ends at 5";
    shop.call(&["tail", "--from", "99"]).failed(1, beyond);
    shop.call(&["seek", "99"]).failed(1, beyond);
    shop.call(&["doctor", "--consumer", "shiping"])
        .failed(1, "these have one: shipping");
    shop.call(&["positions", "--consumer", "shiping"])
        .failed(1, "no position in SQLite file shop.db for shiping");
    shop.call(&["dead-letters", "show", "2"])
        .failed(1, "no dead letter at 2");
    shop.call(&["dead-letters", "retry", "2"])
        .failed(1, "no dead letter at 2");
    shop.call(&["dead-letters", "discard", "--key", "Cuba", "--yes"])
        .failed(1, "no letter meets all conditions");
    shop.call(&["skip", "3"]).failed(1, "past it");
    shop.call(&["skip", "99"]).failed(1, "no such record");
    shop.call(&["dead-letters", "retry", "4"])
        .failed(1, "the letter at 1 of the same key comes first");
    assert!(shop.journal().is_empty());
}

#[test]
fn bad_arguments_are_refused_by_name() {
    let shop = Shop::with_letters();
    for (arguments, text) in [
        (
            &["seek", "soon"][..],
            "give `earliest`, `latest`, or an offset such as 12 or 1795792176303-0",
        ),
        (&["skip", "soon"], "is not an offset such as 12"),
        (&["dead-letters", "list", "--since", "yesterday"], "2h"),
        (&["dead-letters", "retry"], "--all"),
        (&["dead-letters", "retry", "1", "--all"], "in several ways"),
        (
            &["dead-letters", "discard", "--key", "Chile", "--all"],
            "in several ways",
        ),
        (&["dead-letters", "edit", "1"], "`--payload-file FILE`"),
        (
            &["tail", "--follow", "--from", "0", "-n", "3"],
            "leave `-n` or `--follow` out",
        ),
        (&["pause", "--watch"], "--watch"),
        (&["status", "--consumer", "a b"], "--consumer"),
        (&["status", "--prefix", "x"], "--prefix"),
    ] {
        shop.call(arguments).failed(2, text);
    }
    assert!(shop.journal().is_empty());
}

#[test]
fn an_empty_variable_counts_as_none() {
    let shop = Shop::with_letters();
    for (variable, arguments, status, text) in [
        ("STORE", &["status"][..], 2, "no backend is named"),
        ("CONSUMER", &["status"], 2, "no consumer is named"),
        ("CONSUMER", &["positions"], 0, ""),
        ("PREFIX", &["status"], 0, ""),
        ("LOG", &["status"], 0, ""),
    ] {
        let mut command = shop.command(arguments);
        command.env(format!("ESSENTIALLY_ONCE_{variable}"), "");
        Called::of(command.output().expect("start")).failed(status, text);
    }
    let mut command = shop.command(&["status"]);
    command.env("ESSENTIALLY_ONCE_PREFIX", "x");
    Called::of(command.output().expect("start")).failed(2, "ESSENTIALLY_ONCE_PREFIX");
}

#[test]
fn an_edit_that_may_not_be_is_refused() {
    let shop = Shop::with_letters();
    shop.call(&["dead-letters", "edit", "3", "--payload", "n/a"])
        .failed(1, "the record is the same");
    shop.call(&["dead-letters", "edit", "3", "--payload", "1", "--key", "Cuba"])
        .failed(1, "leave `--key` out");
    shop.call(&["dead-letters", "edit", "3", "--payload-file", "none.txt"])
        .failed(1, "none.txt");
}

#[test]
fn a_file_of_a_newer_version_is_refused() {
    let shop = Shop::with_letters();
    let path = shop.sqlite.path().to_owned();
    shop.runtime.block_on(shop.sqlite.close()).expect("close");
    let connection = essentially_once_sqlite::rusqlite::Connection::open(path).expect("open");
    connection
        .execute("UPDATE essentially_once_meta SET value = 999", [])
        .expect("update");
    drop(connection);
    shop.call(&["status"]).failed(1, "schema version 999");
}
