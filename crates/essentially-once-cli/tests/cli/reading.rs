//! The verbs that only show something.

#[cfg(unix)]
use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use essentially_once::{Log as _, NewRecord};

use crate::support::Shop;

#[test]
fn status_shows_position_lag_and_letters() {
    let shop = Shop::with_letters();
    let status = &shop.json(&["status"])[0];
    assert_eq!(
        (&status["next"], &status["end"], &status["lag"]),
        (&"5".into(), &"5".into(), &0.into())
    );
    assert_eq!(status["dead_letters"]["count"], 3);
    assert_eq!(status["dead_letters"]["first"], "1");

    shop.place(&[("Chile", "7.00"), ("Chile", "8.00")]);
    let shown = shop.call(&["status"]);
    assert!(
        shown.output.contains("2 records; the next one, at 5, has waited"),
        "{}",
        shown.output
    );
    assert!(
        shown.output.contains("3, 0 due; the first at 1: invalid float literal"),
        "{}",
        shown.output
    );
}

#[test]
fn json_holds_every_letter_and_every_byte() {
    let shop = Shop::with_letters();
    let payloads = ["{\n\"a\": 1}".as_bytes(), b"\xff\x00n", b"\\n"];
    let records: Vec<_> = payloads
        .iter()
        .map(|payload| NewRecord::new(payload.to_vec()))
        .collect();
    let many = (0..30).map(|_| NewRecord::new("n/a"));
    let records: Vec<_> = records.into_iter().chain(many).collect();
    let append = async { shop.sqlite.log("orders").await?.append(&records).await };
    shop.runtime.block_on(append).expect("append");
    shop.consume(false);
    let letters = shop.json(&["dead-letters", "list"]);
    assert_eq!(letters.len(), 36);
    let tail = shop.json(&["tail", "--from", "5", "-n", "3"]);
    for rows in [&letters[3..6], &tail[..]] {
        assert_eq!(rows[0]["payload"], "{\n\"a\": 1}");
        assert_eq!(rows[1]["payload"]["hex"], "ff006e");
        assert_eq!(rows[2]["payload"], "\\n");
    }
    assert_eq!(shop.json(&["dead-letters", "list", "--limit", "7"]).len(), 7);
    let shown = shop.call(&["dead-letters", "list"]).output;
    assert!(shown.contains("There may be more"), "{shown}");
    shop.call(&["dead-letters", "list", "--limit", "0"])
        .failed(2, "at least one");
}

#[test]
fn lag_is_a_number_with_a_limit() {
    let shop = Shop::with_letters();
    shop.place(&[("Chile", "7.00"), ("Chile", "8.00")]);
    assert_eq!(shop.call(&["lag"]).output, "2\n");
    assert_eq!(shop.call(&["lag", "--max", "2"]).status, Some(0));
    shop.call(&["lag", "--max", "1"])
        .failed(1, "the lag is more than 1 record\n");
}

#[test]
fn positions_lists_every_consumer() {
    let shop = Shop::with_letters();
    let rows = shop.json(&["positions"]);
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (&rows[0]["consumer"], &rows[0]["log"], &rows[0]["next"]),
        (&"shipping".into(), &"orders".into(), &"5".into())
    );
    shop.call(&["positions", "shipping", "billing"]).failed(1, "billing");
    assert_eq!(shop.json(&["positions", "--consumer", "shipping"]), rows);
}

#[test]
fn tail_shows_the_last_records_or_those_from_an_offset() {
    let shop = Shop::with_letters();
    let payloads = |arguments: &[&str]| -> Vec<String> {
        let rows = shop.json(arguments);
        rows.iter()
            .map(|row| row["payload"].as_str().expect("text").to_owned())
            .collect()
    };
    assert_eq!(payloads(&["tail", "-n", "2"]), ["n/a", "4.99"]);
    assert_eq!(payloads(&["tail", "--from", "1", "-n", "1"]), ["11,61"]);
    assert_eq!(payloads(&["tail"]).len(), 5);
    let shown = shop.call(&["tail", "-n", "1"]).output;
    assert!(
        shown.starts_with("4  ") && shown.ends_with(" [Chile] 4.99\n"),
        "{shown}"
    );
}

#[cfg(unix)]
#[test]
fn following_an_idle_log_ends_when_nobody_reads() {
    let shop = Shop::with_letters();
    let mut child = shop
        .command(&["tail", "--follow", "-n", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    let mut first = String::new();
    output.read_line(&mut first).expect("a record");
    assert!(first.starts_with("4  "), "{first}");
    drop(output);
    assert_eq!(child.wait().expect("wait").code(), Some(0));
}

#[test]
fn letters_are_listed_by_filter_and_shown() {
    let shop = Shop::with_letters();
    let offsets = |arguments: &[&str]| -> Vec<String> {
        let rows = shop.json(&[&["dead-letters", "list"], arguments].concat());
        rows.iter()
            .map(|row| row["offset"].as_str().expect("text").to_owned())
            .collect()
    };
    assert_eq!(offsets(&[]), ["1", "3", "4"]);
    assert_eq!(offsets(&["--key", "Chile"]), ["1", "4"]);
    assert_eq!(offsets(&["--reason", "invalid float"]), ["1", "3"]);
    assert_eq!(offsets(&["--since", "1h"]).len(), 3);
    assert!(offsets(&["--before", "1h"]).is_empty());
    assert_eq!(offsets(&["--after", "1", "--limit", "1"]), ["3"]);

    let letter = &shop.json(&["dead-letters", "show", "1"])[0];
    assert_eq!(
        (&letter["payload"], &letter["state"], &letter["tries"]),
        (&"11,61".into(), &"waits".into(), &1.into())
    );
    assert_eq!(shop.json(&["dead-letters", "show", "4"])[0]["state"], "behind another");
    assert_eq!(
        shop.call(&["dead-letters", "show", "3", "--payload", "-"]).output,
        "n/a"
    );
}

#[test]
fn doctor_finds_nothing_wrong() {
    let shop = Shop::with_letters();
    let findings = shop.json(&["doctor"]);
    assert_eq!(findings[1]["log"], "orders", "the one that the consumer reads");
    assert_eq!(findings, shop.json(&["doctor", "--log", "sqlite:shop.db#orders"]));
    let parts: Vec<_> = findings.iter().map(|finding| finding["part"].as_str()).collect();
    assert_eq!(parts, [Some("store"), Some("log")]);
    for finding in findings {
        assert_eq!(
            (&finding["is_durable"], finding["problem"].is_null()),
            (&true.into(), true)
        );
        assert!(
            finding["version"]
                .as_str()
                .is_some_and(|version| version.starts_with("SQLite 3"))
        );
    }
}

#[test]
fn a_new_epoch_begins_at_the_end_of_the_outbox() {
    let shop = Shop::with_letters();
    // The relay is behind, as after it was restored together with its outbox.
    shop.place(&[("Chile", "7.00"), ("Chile", "8.00")]);
    let shown = shop.call(&["relay", "new-epoch"]).output;
    assert!(shown.contains("new_producer_from(Offset::from(7))"), "{shown}");
    let epoch = &shop.json(&["relay", "new-epoch"])[0];
    assert_eq!(
        (&epoch["new_producer_from"], &epoch["position"]),
        (&"7".into(), &"5".into())
    );
    assert_eq!(shop.json(&["relay", "status"])[0]["lag"], 2);
}

#[test]
fn completions_name_the_verbs() {
    let shop = Shop::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = shop.call(&["completions", shell]).output;
        assert!(script.contains("dead-letters"), "{shell}");
    }
}
