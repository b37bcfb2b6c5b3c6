//! Commits that are applied, and commits that are refused.

use std::sync::Arc;

use essentially_once::{
    ConsumerId, Error, KeyValue, Offset, OffsetStore,
    backend::{Journal, Transaction, Window},
    consumer::{Operator, OperatorAction},
};
use essentially_once_redis::{Redis, RedisOptions};

use crate::support::{Outcome, Stage, advance, assert_error, changed, command, log, numbering, revision, text_of};

pub(crate) async fn a_commit_is_readable() -> Outcome {
    let stage = Stage::start().await?;
    assert_eq!(stage.store.position(&stage.consumer).await?, None);
    let mut tx = stage.begin().await?;
    tx.put(b"a", b"1").await?;
    tx.put(b"b", b"\0\xff\r\n").await?;
    tx.put(b"", b"").await?;
    tx.commit(changed(advance(0, 3), |advance| {
        advance.windows = vec![(numbering("p"), Window::new(5))];
    }))
    .await?;
    let again = Redis::connect(&stage.server.url()).await?.store();
    let position = again.position(&stage.consumer).await?.expect("a position");
    assert_eq!(position.log, log("orders#a1"));
    assert_eq!(position.next, Offset::new(3, 7));
    assert_eq!(position.revision, revision(1));
    assert_eq!(position.windows, [(numbering("p"), Window::new(5))]);
    let mut tx = again.begin(&stage.consumer).await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"1"[..]));
    assert_eq!(tx.get(b"b").await?.as_deref(), Some(&b"\0\xff\r\n"[..]));
    assert_eq!(tx.get(b"").await?.as_deref(), Some(&b""[..]));
    tx.delete(b"a").await?;
    tx.commit(advance(1, 2)).await?;
    assert_eq!(stage.value("a").await?, None);
    assert_eq!(stage.value("").await?.as_deref(), Some(""));
    let position = again.position(&stage.consumer).await?.expect("a position");
    assert_eq!(
        (position.next, position.revision),
        (Offset::new(2, 7), revision(2)),
        "a seek goes back"
    );
    Ok(())
}

pub(crate) async fn windows_are_replaced_and_forgotten() -> Outcome {
    let stage = Stage::start().await?;
    let many = (0..5_000)
        .map(|number| (numbering(&format!("p{number}")), Window::new(number)))
        .collect();
    stage
        .begin()
        .await?
        .commit(changed(advance(0, 1), |advance| {
            advance.windows = many;
        }))
        .await?;
    let change = changed(advance(1, 2), |advance| {
        advance.windows = vec![(numbering("p1"), Window::new(9)), (numbering("new"), Window::new(8))];
        advance.forgotten = (10..5_000).map(|number| numbering(&format!("p{number}"))).collect();
    });
    stage.begin().await?.commit(change).await?;
    let windows = stage
        .store
        .position(&stage.consumer)
        .await?
        .expect("a position")
        .windows;
    assert_eq!(windows.len(), 11);
    for (name, window) in [("p0", 0), ("p1", 9), ("p9", 9), ("new", 8)] {
        assert!(windows.contains(&(numbering(name), Window::new(window))), "{name}");
    }
    Ok(())
}

pub(crate) async fn large_numbers_round_trip() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    // As Lua numbers, these would lose their last digits.
    let commits = (1_u64 << 53) + 1;
    stage.ask(&format!("HSET essentially-once:{{c}}:position revision {commits}"))?;
    let largest = changed(advance(commits, 0), |advance| {
        advance.next = Offset::new(u64::MAX, u64::MAX);
    });
    assert_error!(
        stage.begin().await?.commit(advance(commits - 1, 0)).await,
        Error::Fenced { .. },
    );
    stage.begin().await?.commit(largest).await?;
    let position = stage.store.position(&stage.consumer).await?.expect("a position");
    assert_eq!(
        (position.next, position.revision),
        (Offset::new(u64::MAX, u64::MAX), revision(commits + 1))
    );
    Ok(())
}

pub(crate) async fn a_stale_revision_is_fenced() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    stage.commit(1, []).await?;
    for stale in [0, 1, 3, u64::MAX] {
        let mut tx = stage.begin().await?;
        tx.put(b"a", b"1").await?;
        let windows = vec![(numbering("p"), Window::new(5))];
        let result = tx
            .commit(changed(advance(stale, 9), |advance| {
                advance.windows = windows;
            }))
            .await;
        assert!(
            matches!(&result, Err(Error::Fenced { expected, .. }) if *expected == revision(stale)),
            "{result:?}"
        );
    }
    let position = stage.store.position(&stage.consumer).await?.expect("a position");
    assert_eq!(
        (position.revision, position.windows.len(), position.next),
        (revision(2), 0, Offset::new(2, 7))
    );
    assert_eq!(stage.value("a").await?, None);
    Ok(())
}

pub(crate) async fn one_of_two_racing_stores_wins() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    let mut racers = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (stage, redis) = (Arc::clone(&stage), Redis::connect(&stage.server.url()).await?);
        racers.spawn(async move {
            let mut won = 0;
            let store = redis.store();
            for round in 0..300 {
                let mut tx = store.begin(&stage.consumer).await?;
                tx.command(command("INCR won")).await?;
                match tx.commit(advance(round, round)).await {
                    Ok(()) => won += 1,
                    Err(Error::Fenced { .. }) => {}
                    Err(error) => return Err(error),
                }
                while stage.revision().await? <= round {
                    tokio::task::yield_now().await;
                }
            }
            Ok(won)
        });
    }
    let mut won = 0;
    while let Some(racer) = racers.join_next().await {
        won += racer??;
    }
    assert_eq!(
        (won, stage.revision().await?, stage.ask("GET won")?.as_str()),
        (300, 300, "300")
    );
    Ok(())
}

pub(crate) async fn a_missing_position_has_revision_0() -> Outcome {
    let stage = Stage::start().await?;
    assert_error!(stage.commit(1, [command("SET a 1")]).await, Error::Fenced { .. },);
    assert_eq!(stage.ask("DBSIZE")?, "0");
    Ok(())
}

pub(crate) async fn another_log_is_refused() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    for other in ["invoices#a1", "orders#b2", "invoices"] {
        let mut tx = stage.begin().await?;
        tx.put(b"a", b"1").await?;
        match tx
            .commit(changed(advance(1, 9), |advance| {
                advance.log = log(other);
            }))
            .await
        {
            Err(Error::WrongLog { stored, given, .. }) => assert_eq!((stored, given), (log("orders#a1"), log(other))),
            result => panic!("{other}: {result:?}"),
        }
    }
    assert_eq!(stage.value("a").await?, None);
    assert_eq!(stage.revision().await?, 1);
    stage
        .begin()
        .await?
        .commit(changed(advance(1, 9), |advance| {
            advance.log = log("orders");
        }))
        .await?;
    let position = stage.store.position(&stage.consumer).await?.expect("a position");
    assert_eq!(position.log, log("orders#a1"), "what is known stays");
    Ok(())
}

pub(crate) async fn an_incarnation_is_filled_in() -> Outcome {
    let stage = Stage::start().await?;
    stage
        .begin()
        .await?
        .commit(changed(advance(0, 1), |advance| {
            advance.log = log("orders");
        }))
        .await?;
    assert_eq!(
        stage.store.position(&stage.consumer).await?.expect("a position").log,
        log("orders")
    );
    stage.commit(1, []).await?;
    assert_eq!(
        stage.store.position(&stage.consumer).await?.expect("a position").log,
        log("orders#a1")
    );
    Ok(())
}

pub(crate) async fn a_journal_is_a_field_that_few_commits_write() -> Outcome {
    let paused = Journal::default().with(&Operator::new("ann"), OperatorAction::Pause);
    for known_first in [true, false] {
        let stage = Stage::start().await?;
        let steps = [
            (None, None, 0),
            (Some(paused.clone()), Some(&paused), 1),
            (None, Some(&paused), 1),
            // Not the same as none.
            (Some(Journal::default()), None, 1),
            (Some(paused.clone()), Some(&paused), 1),
        ];
        for (commits, (given, expected, fields)) in (0..).zip(steps) {
            let is_known = (commits % 2 == 0) == known_first;
            let change = changed(advance(commits, commits + 1), |advance| {
                advance.journal = given;
                if !is_known {
                    advance.log = log("orders");
                }
            });
            stage.begin().await?.commit(change).await?;
            let position = stage.store.position(&stage.consumer).await?.expect("a position");
            assert_eq!(
                position.journal,
                expected.cloned().unwrap_or_default(),
                "commit {commits}"
            );
            let incarnation = if known_first || commits > 0 {
                "orders#a1"
            } else {
                "orders"
            };
            assert_eq!(position.log, log(incarnation), "commit {commits}");
            let found = stage.ask("HEXISTS essentially-once:{c}:position journal")?;
            assert_eq!(found, fields.to_string(), "commit {commits}");
        }
    }
    // A first commit with a journal.
    let stage = Stage::start().await?;
    let first = changed(advance(0, 1), |advance| advance.journal = Some(paused.clone()));
    stage.begin().await?.commit(first).await?;
    let position = stage.store.position(&stage.consumer).await?.expect("a position");
    assert_eq!((position.journal, position.log), (paused, log("orders#a1")));
    Ok(())
}

pub(crate) async fn a_transaction_reads_its_own_writes() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    tx.put(b"a", b"1").await?;
    tx.put(b"b", b"1").await?;
    tx.commit(advance(0, 1)).await?;
    let mut tx = stage.begin().await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"1"[..]));
    tx.put(b"a", b"2").await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"2"[..]));
    tx.delete(b"a").await?;
    assert_eq!(tx.get(b"a").await?, None);
    tx.delete(b"b").await?;
    tx.put(b"b", b"3").await?;
    tx.put(b"c", b"4").await?;
    tx.delete(b"c").await?;
    assert_eq!(tx.get(b"c").await?, None);
    assert_eq!(stage.value("a").await?.as_deref(), Some("1"), "others do not see it");
    tx.commit(advance(1, 2)).await?;
    assert_eq!(stage.value("a").await?, None);
    assert_eq!(stage.value("b").await?.as_deref(), Some("3"));
    assert_eq!(stage.value("c").await?, None);
    Ok(())
}

pub(crate) async fn a_transaction_that_is_dropped_leaves_nothing() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    tx.put(b"a", b"1").await?;
    tx.command(command("SET x 1")).await?;
    drop(tx);
    let mut tx = stage.begin().await?;
    tx.command(command("SET x 1")).await?;
    tx.rollback().await?;
    assert_eq!(stage.ask("DBSIZE")?, "0");
    Ok(())
}

pub(crate) async fn consumers_and_prefixes_are_separate() -> Outcome {
    let stage = Stage::start().await?;
    let other_prefix = RedisOptions::new()
        .prefix("other")
        .connect(&stage.server.url())
        .await?
        .store();
    let mut tx = stage.begin().await?;
    tx.put(b"a", b"1").await?;
    tx.commit(advance(0, 1)).await?;
    for (store, consumer) in [
        (&stage.store, "d"),
        (&stage.store, "C"),
        (&stage.store, "c:d"),
        (&other_prefix, "c"),
    ] {
        let consumer = ConsumerId::new(consumer)?;
        assert_eq!(store.position(&consumer).await?, None);
        assert_eq!(store.begin(&consumer).await?.get(b"a").await?, None);
    }
    Ok(())
}

pub(crate) async fn keys_of_another_type_are_refused() -> Outcome {
    for kind in ["position", "windows", "state"] {
        let stage = Stage::start().await?;
        let key = format!("essentially-once:{{c}}:{kind}");
        stage.ask(&format!("SET {key} 1"))?;
        let mut tx = stage.begin().await?;
        tx.command(command("SET x 1")).await?;
        tx.put(b"a", b"1").await?;
        let windows = vec![(numbering("p"), Window::new(5))];
        let result = tx
            .commit(changed(advance(0, 1), |advance| {
                advance.windows = windows;
            }))
            .await;
        assert_error!(result, Error::Failed { .. }, &key, "WRONGTYPE", "another type");
        assert_eq!(stage.ask("DBSIZE")?, "1", "{kind}: nothing was applied");
        if kind == "state" {
            assert_error!(stage.value("a").await, Error::Failed { .. }, &key, "WRONGTYPE");
        } else {
            assert_error!(stage.revision().await, Error::Failed { .. }, "WRONGTYPE", "consumer c");
        }
    }
    Ok(())
}

pub(crate) async fn garbage_in_our_hashes_is_an_error() -> Outcome {
    let stage = Stage::start().await?;
    let key = "essentially-once:{c}:position";
    for (fields, about) in [
        ("x y", "\"log\" is missing"),
        ("log orders revision 1", "\"next\" is missing"),
        ("log orders next 1", "\"revision\" is missing"),
        ("log orders next -- revision 1", "--"),
        ("log orders next 1 revision -1", "invalid digit"),
        ("log {} next 1 revision 1", "name"),
    ] {
        stage.ask(&format!("DEL {key}"))?;
        stage.ask(&format!("HSET {key} {fields}"))?;
        assert_error!(stage.revision().await, Error::Failed { .. }, key, about);
    }
    stage.ask(&format!("HSET {key} log orders next 1 revision 1"))?;
    assert_eq!(stage.revision().await?, 1);
    stage.ask(&format!("HSET {key} journal garbage"))?;
    assert_error!(
        stage.revision().await,
        Error::Failed { .. },
        key,
        "consumer c",
        "journal has a version"
    );
    stage.ask(&format!("HDEL {key} journal"))?;
    assert_eq!(stage.revision().await?, 1);
    stage.ask("HSET essentially-once:{c}:windows p garbage")?;
    assert_error!(
        stage.revision().await,
        Error::Failed { .. },
        "essentially-once:{c}:windows"
    );
    stage
        .server
        .command(&[&b"HSET"[..], key.as_bytes(), b"log", b"\xff\xfe"])?;
    assert_error!(stage.revision().await, Error::Failed { .. }, "utf-8");
    // The commit finds a stored log whose name is invalid.
    assert_error!(stage.commit(1, []).await, Error::Failed { .. }, "name");
    Ok(())
}

pub(crate) async fn sizes_are_limited() -> Outcome {
    let stage = Stage::with(RedisOptions::new().record_limit(100)).await?;
    let mut tx = stage.begin().await?;
    let (fits, too_large) = ([b'x'; 100], [b'x'; 101]);
    assert_error!(
        tx.put(&too_large, b"").await,
        Error::TooLarge {
            what: "key",
            size: 101,
            limit: 100
        },
    );
    assert_error!(tx.put(b"a", &too_large).await, Error::TooLarge { what: "value", .. },);
    tx.put(&fits, &fits).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(stage.ask("HLEN essentially-once:{c}:state")?, "1");
    Ok(())
}
