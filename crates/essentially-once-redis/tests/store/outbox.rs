//! Sending with a commit: the format, the numbers, and what a server refuses.

use std::{collections::BTreeMap, time::Duration};

use essentially_once::{
    Error, KeyValue, Log, NewRecord, Offset, Outbox, Record,
    backend::{DeadLetter, DeadLetters, Retention, Source, Transaction},
};
use essentially_once_redis::{LogOptions, Redis, RedisOptions, RedisStore};
use test_servers::Reply;

use crate::{
    setup::signed_in,
    support::{Outcome, Stage, advance, assert_error, command, text_of},
};

const NUMBERS: &str = "essentially-once:{out}:outbox:out";

/// Sends in the commit after this many.
async fn send(stage: &Stage, commits: u64, log: &str, payloads: &[&str]) -> Outcome {
    let mut tx = stage.begin().await?;
    for payload in payloads {
        tx.send(log, NewRecord::new(payload.to_string())).await?;
    }
    Ok(tx.commit(advance(commits, commits + 1)).await?)
}

/// All records of a stream, as a plain handle of its log reads them.
async fn records(stage: &Stage, stream: &str) -> Result<Vec<Record>, Source> {
    let redis = Redis::connect(&stage.server.url()).await?;
    let log = redis.log_with("out", LogOptions::new().stream(stream)).await?;
    let (earliest, end) = (log.bounds().await?.earliest, log.readable_end().await?);
    let mut found: Vec<Record> = Vec::new();
    if earliest < end {
        let mut reader = log.read(earliest).await?;
        while found.last().is_none_or(|last| last.offset.successor() < end) {
            found.extend(reader.next(1_000).await?);
        }
    }
    Ok(found)
}

/// Payload and sequence of each record, and the producer of all.
async fn numbered(stage: &Stage, stream: &str) -> Result<(Vec<(String, u64)>, String), Source> {
    let (mut found, mut producers) = (Vec::new(), Vec::new());
    for record in records(stage, stream).await? {
        let origin = record.origin.ok_or("a record has no origin")?;
        found.push((String::from_utf8_lossy(&record.payload).into_owned(), origin.sequence));
        producers.push(origin.numbering.to_string());
    }
    producers.dedup();
    let [producer] = <[String; 1]>::try_from(producers).map_err(|found| format!("{found:?}"))?;
    Ok((found, producer))
}

fn numbers(first: u64, payloads: &[&str]) -> Vec<(String, u64)> {
    let payloads = payloads.iter().map(|payload| (*payload).to_owned());
    payloads.zip(first..).collect()
}

pub(crate) async fn an_entry_is_what_a_log_writes() -> Outcome {
    let stage = Stage::start().await?;
    let redis = Redis::connect(&stage.server.url()).await?;
    let full = NewRecord::new("payload")
        .key("k")
        .header("b", "1")
        .header("a", "2")
        .header("b", "");
    let sent = [full, NewRecord::new("").key(""), NewRecord::new("plain")];
    let mut tx = stage.begin().await?;
    for record in &sent {
        tx.outbox().ok_or("no outbox")?.send("out", record.clone()).await?;
    }
    // The log does not exist before the commit.
    assert_eq!(stage.ask("DBSIZE")?, "0");
    tx.commit(advance(0, 1)).await?;
    let hash = stage.server.command(&["HGETALL", NUMBERS])?;
    let hash: BTreeMap<&str, &str> = hash
        .list()
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[a, b]| (a.text(), b.text()))
        .collect();
    let producer = hash["producer"];
    assert!(producer.starts_with("out@") && producer.len() == 4 + 32, "{producer}");
    assert_eq!((hash["next"], hash.len()), ("3", 2));
    // An append of the same records to another log makes the same entries.
    let found = records(&stage, "out").await?;
    let copies: Vec<NewRecord> = found.iter().map(NewRecord::from).collect();
    redis.log("copy").await?.append(&copies).await?;
    let entries = |stream: &str| -> Result<Vec<Reply>, Source> {
        let entries = stage.server.command(&["XRANGE", stream, "-", "+"])?;
        Ok(entries.list().iter().map(|entry| entry.list()[1].clone()).collect())
    };
    assert_eq!(entries("out")?, entries("copy")?);
    for (number, (found, sent)) in (0..).zip(found.into_iter().zip(sent)) {
        let origin = found.origin.clone().ok_or("no origin")?;
        assert_eq!(
            (origin.sequence, origin.numbering.to_string().as_str()),
            (number, producer)
        );
        assert_eq!(found.malformed, None);
        assert_eq!(
            (found.key, found.headers, found.payload),
            (sent.key, sent.headers, sent.payload)
        );
    }
    Ok(())
}

pub(crate) async fn numbers_outlive_the_entries_and_the_stream() -> Outcome {
    let stage = Stage::start().await?;
    let redis = Redis::connect(&stage.server.url()).await?;
    send(&stage, 0, "out", &["a", "b", "c"]).await?;
    let (found, producer) = numbered(&stage, "out").await?;
    assert_eq!(found, numbers(0, &["a", "b", "c"]));
    let losses = ["XTRIM", "XDEL", "retention", "DEL", "RENAME", "restart"];
    for (commits, loss) in (1..).zip(losses) {
        match loss {
            "XTRIM" => drop(stage.ask("XTRIM out MAXLEN 0")?),
            "XDEL" => {
                for entry in stage.server.command(&["XRANGE", "out", "-", "+"])?.list() {
                    stage.ask(&format!("XDEL out {}", entry.list()[0].text()))?;
                }
            }
            "retention" => {
                let options = LogOptions::new().retention(Retention::new().max_age(Duration::from_millis(1)));
                let log = redis.log_with("out", options).await?;
                // A trim in the millisecond of the commit removes nothing.
                while log.trim().await? == 0 {}
            }
            "DEL" => drop(stage.ask("DEL out")?),
            "RENAME" => drop(stage.ask(&format!("RENAME out old-{commits}"))?),
            _ => stage.server.restart()?,
        }
        if loss != "restart" {
            assert_eq!(stage.ask("XLEN out")?, "0", "{loss}");
        }
        let sent = [format!("{loss} 1"), format!("{loss} 2")];
        send(&stage, commits, "out", &[&sent[0], &sent[1]]).await?;
        let (mut found, same) = numbered(&stage, "out").await?;
        assert_eq!(same, producer, "{loss}");
        let found = found.split_off(found.len() - 2);
        assert_eq!(found, numbers(1 + 2 * commits, &[&sent[0], &sent[1]]), "{loss}");
    }
    Ok(())
}

/// After a restore from an older copy, this keeps numbers from being used twice.
pub(crate) async fn a_deleted_counter_draws_a_new_producer() -> Outcome {
    let stage = Stage::start().await?;
    send(&stage, 0, "out", &["a", "b"]).await?;
    let (_, before) = numbered(&stage, "out").await?;
    stage.ask(&format!("DEL {NUMBERS}"))?;
    send(&stage, 1, "out", &["c"]).await?;
    stage.ask("XTRIM out MAXLEN 1")?;
    let (found, after) = numbered(&stage, "out").await?;
    assert_eq!(found, numbers(0, &["c"]));
    assert_ne!(before, after);
    Ok(())
}

pub(crate) async fn a_key_that_is_no_outbox_is_refused_before_the_first_write() -> Outcome {
    let setups: [(&[String], &[&str]); 8] = [
        (&["SET out x".into()], &["WRONGTYPE", "(out)"]),
        (&[format!("SET {NUMBERS} x")], &["WRONGTYPE", NUMBERS]),
        (&[format!("HSET {NUMBERS} next 5")], &["new producer", NUMBERS]),
        (&[format!("HSET {NUMBERS} producer p")], &["new producer", NUMBERS]),
        (
            &[format!("HSET {NUMBERS} producer p next -1")],
            &["new producer", NUMBERS],
        ),
        // Lua could not count on from here.
        (
            &[format!("HSET {NUMBERS} producer p next 1000000000000000")],
            &["new producer", NUMBERS],
        ),
        // It would be read as another epoch.
        (
            &[format!("HSET {NUMBERS} producer p#1 next 5")],
            &["new producer", NUMBERS],
        ),
        (
            &[
                "XADD out 18446744073709551615-18446744073709551615 a b".into(),
                "XTRIM out MAXLEN 0".into(),
            ],
            &["no more ids", "(out)"],
        ),
    ];
    for (commands, parts) in setups {
        let stage = Stage::start().await?;
        for text in commands {
            stage.ask(text)?;
        }
        let mut tx = stage.begin().await?;
        tx.put(b"a", b"1").await?;
        tx.command(command("INCR count")).await?;
        tx.send("another", NewRecord::new("x")).await?;
        tx.send("out", NewRecord::new("x")).await?;
        let text = text_of(tx.commit(advance(0, 1)).await);
        assert!(text.contains("Failed"), "{text}");
        for part in parts {
            assert!(text.contains(part), "{commands:?}: {part:?} is missing in {text}");
        }
        let left = (stage.ask("DBSIZE")?, stage.revision().await?);
        assert_eq!(left, ("1".into(), 0), "{commands:?}");
        // The consumer is not blocked.
        stage.commit(0, [command("INCR count")]).await?;
    }
    Ok(())
}

pub(crate) async fn a_missing_permission_is_refused_before_the_first_write() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    for (rights, named) in [
        ("-xadd", "XADD"),
        ("-xinfo", "XINFO"),
        ("-hmget", ""),
        ("-hset", "HSET"),
        ("resetkeys ~essentially-once:* ~count", "keys"),
        ("resetkeys ~essentially-once:{c}:* ~count ~out", "keys"),
    ] {
        let store = signed_in(&stage, &format!("+@all {rights}")).await?;
        let mut tx = essentially_once::OffsetStore::begin(&store, &stage.consumer).await?;
        tx.command(command("INCR count")).await?;
        tx.send("out", NewRecord::new("x")).await?;
        assert_error!(tx.commit(advance(1, 2)).await, Error::Failed { .. }, named);
        let left = (stage.ask("DBSIZE")?, stage.revision().await?);
        assert_eq!(left, ("1".into(), 1), "{rights}");
    }
    Ok(())
}

pub(crate) async fn the_documented_permissions_are_enough() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask(
        "ACL SETUSER app reset on >hunter2 ~essentially-once:{c}:position ~essentially-once:{c}:windows \
         ~essentially-once:{c}:state ~out ~essentially-once:{out}:outbox:out +evalsha +eval +hget +hgetall +hmget +hset \
         +hdel +hlen +zcard +info +config|get +xadd +xinfo|stream",
    )?;
    let url = format!("redis://app:hunter2@127.0.0.1:{}", stage.server.port());
    let store: RedisStore = Redis::connect(&url).await?.store();
    for commits in 0..2 {
        let mut tx = essentially_once::OffsetStore::begin(&store, &stage.consumer).await?;
        tx.put(b"a", b"1").await?;
        tx.send("out", NewRecord::new("x")).await?;
        tx.commit(advance(commits, commits + 1)).await?;
    }
    assert_eq!(numbered(&stage, "out").await?.0, numbers(0, &["x", "x"]));
    let denied = stage.server.command(&["ACL", "LOG"])?;
    let denied: Vec<_> = denied.list().iter().filter_map(|entry| entry.field("object")).collect();
    let of_outboxes = |object: &&&Reply| {
        ["x", "h", "out", "eval"]
            .iter()
            .any(|start| object.text().starts_with(start))
    };
    assert_eq!(denied.iter().find(of_outboxes), None, "{denied:?}");
    Ok(())
}

pub(crate) async fn a_partial_commit_sends_nothing() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    stage.commit(0, []).await?;
    let mut tx = stage.begin().await?;
    tx.send("out", NewRecord::new("x")).await?;
    tx.command(command("SET a 1")).await?;
    tx.command(command("LSET list 5 x")).await?;
    assert_error!(
        tx.commit(advance(1, 2)).await,
        Error::PartiallyApplied { .. },
        "1 commands were applied, then LSET list"
    );
    assert_eq!(stage.ask(&format!("EXISTS out {NUMBERS}"))?, "0");
    Ok(())
}

pub(crate) async fn a_stream_takes_either_records_or_commands() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    tx.send("out", NewRecord::new("1")).await?;
    for text in ["SET out 1", "XADD out * a b", "RENAME out x", "DEL a out"] {
        assert_error!(
            tx.command(command(text)).await,
            Error::Failed { .. },
            "sends to",
            "\"out\""
        );
    }
    for text in [format!("HSET {NUMBERS} next 1"), format!("DEL {NUMBERS}")] {
        assert_error!(
            tx.command(command(&text)).await,
            Error::Failed { .. },
            "only commits may change it"
        );
    }
    tx.command(command("XADD other * a b")).await?;
    assert_error!(
        tx.send("other", NewRecord::new("x")).await,
        Error::Failed { .. },
        "send a record to log other",
        "command of this transaction"
    );
    tx.send("out", NewRecord::new("2")).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(numbered(&stage, "out").await?.0, numbers(0, &["1", "2"]));
    assert_eq!(stage.ask("XLEN other")?, "1");
    Ok(())
}

pub(crate) async fn names_that_cannot_be_outboxes_are_refused() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    for name in ["{}", "a}b{c}", "{a}{b}", "out{", "-out"] {
        assert_error!(tx.send(name, NewRecord::new("x")).await, Error::InvalidName { .. },);
    }
    for name in [
        "essentially-once:{c}:state",
        "essentially-once:{another}:letters",
        "essentially-once:retention:{orders}",
        NUMBERS,
    ] {
        let result = tx.send(name, NewRecord::new("x")).await;
        assert_error!(result, Error::Failed { .. }, name, "choose another name");
    }
    // A single server takes any hash tag, or none.
    for name in ["{c}:out", "{d}:out", "e{f}g", "{h}", "out"] {
        tx.send(name, NewRecord::new(name)).await?;
    }
    tx.commit(advance(0, 1)).await?;
    for name in ["{c}:out", "{d}:out", "e{f}g", "{h}", "out"] {
        assert_eq!(numbered(&stage, name).await?.0, numbers(0, &[name]));
    }
    assert_eq!(stage.ask("EXISTS essentially-once:{f}:outbox:e{f}g")?, "1");
    Ok(())
}

pub(crate) async fn records_over_a_limit_are_refused_and_harm_nothing() -> Outcome {
    const OVER: usize = 1024 * 1024 + 1;
    let stage = Stage::start().await?;
    stage.ask("CONFIG SET proto-max-bulk-len 1mb")?;
    // A record staged without a connection is refused by the commit.
    let mut tx = stage.begin().await?;
    tx.send("out", NewRecord::new(vec![0; OVER])).await?;
    assert_error!(
        tx.commit(advance(0, 1)).await,
        Error::TooLarge { size: OVER, .. },
        "proto-max-bulk-len"
    );
    assert_eq!(stage.ask("DBSIZE")?, "0");
    let headers = |count: usize| (0..count).fold(NewRecord::new("x"), |record, n| record.header(n.to_string(), "v"));
    let mut tx = stage.begin().await?;
    assert_error!(
        tx.send("out", NewRecord::new(vec![0; OVER])).await,
        Error::TooLarge { size: OVER, .. },
    );
    assert_error!(
        tx.send("out", headers(3_001)).await,
        Error::Failed { .. },
        "3001 headers",
        "log out"
    );
    // A log that only refused records were meant for is not created.
    assert_error!(tx.send("unused", headers(3_001)).await, Error::Failed { .. },);
    tx.send("out", headers(3_000).key("k")).await?;
    tx.commit(advance(0, 1)).await?;
    let found = records(&stage, "out").await?;
    assert_eq!((found.len(), found[0].headers.len()), (1, 3_000));
    assert_eq!(stage.ask("EXISTS unused")?, "0");
    Ok(())
}

pub(crate) async fn large_transactions_are_sent() -> Outcome {
    const COUNT: u64 = 20_000;
    let stage = Stage::start().await?;
    for commits in 0..2 {
        let mut tx = stage.begin().await?;
        for n in 0..COUNT {
            let log = if n % 4 == 0 { "few" } else { "many" };
            let record = NewRecord::new((commits * COUNT + n).to_string());
            // Records of different lengths.
            let record = if n % 3 == 0 { record.key("k") } else { record };
            let record = if n % 5 == 0 { record.header("h", "v") } else { record };
            tx.send(log, record).await?;
        }
        for n in 0..300 {
            tx.send(&format!("out-{n}"), NewRecord::new(commits.to_string()))
                .await?;
        }
        tx.commit(advance(commits, commits + 1)).await?;
    }
    for (log, is_in) in [("few", true), ("many", false)] {
        let (found, _) = numbered(&stage, log).await?;
        let expected = (0..2 * COUNT).filter(|n| (n % 4 == 0) == is_in);
        assert!(
            found == expected.map(|n| n.to_string()).zip(0..).collect::<Vec<_>>(),
            "{log}"
        );
    }
    assert_eq!(numbered(&stage, "out-299").await?.0, numbers(0, &["0", "1"]));
    Ok(())
}

pub(crate) async fn a_full_server_sends_only_what_it_makes_room_for() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("SET x 1")?;
    let mut tx = stage.begin().await?;
    let record = Record::new(Offset::ZERO, std::time::UNIX_EPOCH, "x");
    tx.park(&DeadLetter::new(record, 1, "a reason", std::time::UNIX_EPOCH))
        .await?;
    tx.commit(advance(0, 1)).await?;
    stage.ask("CONFIG SET maxmemory 100kb")?;
    assert_error!(
        async {
            let mut tx = stage.begin().await?;
            tx.send("out", NewRecord::new("refused")).await?;
            tx.commit(advance(1, 2)).await
        }
        .await,
        Error::Unavailable { .. },
        "OOM",
        "maxmemory"
    );
    assert_eq!(
        (stage.revision().await?, stage.ask(&format!("EXISTS out {NUMBERS}"))?),
        (1, "0".into())
    );
    // What frees memory comes before the records.
    let mut tx = stage.begin().await?;
    tx.send("out", NewRecord::new("a")).await?;
    tx.remove(Offset::ZERO).await?;
    tx.commit(advance(1, 2)).await?;
    let mut tx = stage.begin().await?;
    tx.send("out", NewRecord::new("b")).await?;
    tx.command(command("DEL x")).await?;
    tx.commit(advance(2, 3)).await?;
    stage.ask("CONFIG SET maxmemory 0")?;
    assert_eq!(numbered(&stage, "out").await?.0, numbers(0, &["a", "b"]));
    Ok(())
}

pub(crate) async fn missing_replicas_leave_a_sending_commit_in_doubt() -> Outcome {
    let stage = Stage::with(RedisOptions::new().min_replicas(1, Duration::from_millis(100))).await?;
    let mut tx = stage.begin().await?;
    tx.send("out", NewRecord::new("x")).await?;
    assert_error!(
        tx.commit(advance(0, 1)).await,
        Error::Indeterminate { .. },
        "only 0 of 1 replicas"
    );
    assert_eq!((stage.revision().await?, stage.ask("XLEN out")?), (1, "1".into()));
    Ok(())
}

/// The slow log shows up to 32 arguments, which are all that an empty commit has.
pub(crate) async fn a_commit_that_sends_nothing_is_as_before() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    stage.ask("CONFIG SET slowlog-log-slower-than 0")?;
    stage.commit(1, []).await?;
    stage.ask("CONFIG SET slowlog-log-slower-than -1")?;
    let log = stage.server.command(&["SLOWLOG", "GET", "-1"])?;
    let commands = log.list().iter().map(|entry| entry.list()[3].list());
    let mut sent: Vec<&str> = commands
        .filter(|command| command[0].text().eq_ignore_ascii_case("EVALSHA"))
        .flat_map(|command| command.iter().map(Reply::text))
        .collect();
    assert_eq!(sent.len(), 31, "{sent:?}");
    // The hash of the script, and a revision with a random part.
    assert_eq!(sent.remove(1).len(), 40);
    sent.remove(13);
    let empty = ["10", "9"];
    let expected = [
        &["EVALSHA", "3"][..],
        &[
            "essentially-once:{c}:position",
            "essentially-once:{c}:windows",
            "essentially-once:{c}:state",
        ],
        &["1", "2", "orders", "a1", "2-7", "", "", ""],
        &[empty; 7].concat(),
        &["1", "0"],
    ];
    assert_eq!(sent, expected.concat());
    Ok(())
}
