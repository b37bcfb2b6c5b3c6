//! Arguments that are wrong, and backends that are not there.

use std::fs;

use crate::support::{Shop, call, program};

#[test]
fn a_backend_that_is_not_there_is_named_and_no_password_is_shown() {
    let folder = tempfile::tempdir().expect("folder");
    let status = |store: &str| call(folder.path(), &["--store", store, "--consumer", "shipping", "status"]);
    status("sqlite:none.db").failed(1, "none.db");
    assert!(!folder.path().join("none.db").exists(), "nothing was created");
    fs::write(folder.path().join("notes.txt"), "no database").expect("write");
    status("sqlite:notes.txt").failed(1, "not a SQLite database");
    for url in ["redis://ann:s3cret@127.0.0.1:1/", "amqp://ann:s3cret@127.0.0.1:1/"] {
        let called = status(url);
        called.failed(1, "127.0.0.1:1");
        assert!(!called.error.contains("s3cret"), "{}", called.error);
    }
    for url in ["shop.db", "postgres://ann:s3cret@h/", "redis://h/#orders"] {
        let called = status(url);
        called.failed(2, "--store");
        assert!(!called.error.contains("s3cret"), "{}", called.error);
    }
    call(folder.path(), &["status"]).failed(2, "--store");
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
fn what_does_not_exist_is_named() {
    let shop = Shop::with_letters();
    shop.call(&["status", "--consumer", "shiping"])
        .failed(1, "these have one: shipping");
    shop.call(&["dead-letters", "list", "--consumer", "shiping"])
        .failed(1, "never ran");
    shop.call(&["pause", "--consumer", "shiping"]).failed(1, "never ran");
    shop.call(&["tail", "--log", "sqlite:shop.db#ordres"])
        .failed(1, "orders");
    shop.call(&["tail", "--from", "99"]).failed(1, "99");
    shop.call(&["dead-letters", "show", "2"])
        .failed(1, "no dead letter at 2");
    shop.call(&["dead-letters", "retry", "2"])
        .failed(1, "no dead letter at 2");
    shop.call(&["dead-letters", "discard", "--key", "Cuba", "--yes"])
        .failed(1, "no letter meets all conditions");
    shop.call(&["skip", "3"]).failed(1, "past it");
    shop.call(&["skip", "99"]).failed(1, "no such record");
    shop.call(&["seek", "99"]).failed(1, "99");
    shop.call(&["dead-letters", "retry", "4"])
        .failed(1, "the letter at 1 of the same key comes first");
    assert!(shop.journal().is_empty());
}

#[test]
fn bad_arguments_are_refused_by_name() {
    let shop = Shop::with_letters();
    for (arguments, text) in [
        (&["seek", "soon"][..], "earliest"),
        (&["dead-letters", "list", "--since", "yesterday"], "2h"),
        (&["dead-letters", "retry"], "--all"),
        (&["dead-letters", "retry", "1", "--all"], "cannot be used with"),
        (&["dead-letters", "edit", "1"], "--payload"),
        (&["pause", "--watch"], "--watch"),
        (&["status", "--consumer", "a b"], "--consumer"),
        (&["status", "--prefix", "x"], "--prefix"),
    ] {
        shop.call(arguments).failed(2, text);
    }
    assert!(shop.journal().is_empty());
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
