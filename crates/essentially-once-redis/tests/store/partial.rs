//! Native commands that fail, are refused, or only read.

use essentially_once::{
    Error, KeyValue, Offset, OffsetStore,
    backend::{Advance, Revision, Transaction},
};
use essentially_once_redis::{
    Redis,
    redis::{Cmd, cmd},
};

use crate::support::{Outcome, Stage, advance, assert_error, command, log, revision, text_of};

pub(crate) async fn a_first_command_that_fails_applies_nothing() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    let result = stage.commit(0, ["LSET list 5 x", "SET a 1"].map(command)).await;
    assert_error!(result, Error::Failed { .. }, "LSET list", "index out of range");
    assert_eq!((stage.revision().await?, stage.ask("EXISTS a")?.as_str()), (0, "0"));
    stage.commit(0, [command("SET a 1")]).await?;
    Ok(())
}

pub(crate) async fn a_later_command_that_fails_blocks_the_consumer() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    stage.ask("XADD stream 5-1 a b")?;
    stage.commit(0, []).await?;
    let mut stored = revision(1);
    for failing in ["LSET list 5 secret", "XADD stream 1-1 a secret"] {
        let mut tx = stage.begin().await?;
        tx.put(b"state", b"1").await?;
        for text in ["SET a 1", "INCR count", failing, "SET b 1"] {
            tx.command(command(text)).await?;
        }
        let text = text_of(tx.commit(after(stored)).await);
        for part in [
            "PartiallyApplied",
            "2 commands were applied",
            &failing[..9],
            "resolve_partial",
            "consumer c",
        ] {
            assert!(text.contains(part), "{part:?} is missing in {text}");
        }
        assert!(!text.contains("secret"), "{text}");
        assert_eq!(stage.ask("MGET a b")?, "1 ");
        // The consumer stays blocked, in every process and across a restart.
        stage.server.restart()?;
        let other = Redis::connect(&stage.server.url()).await?.store();
        // Neither the revision before, nor the commit's own, nor the one that it left is accepted.
        for expected in [stored, stored.next_count(), stored.next_count().next_epoch()] {
            let result = other.begin(&stage.consumer).await?.commit(after(expected)).await;
            assert_error!(result, Error::PartiallyApplied { .. }, "2 commands were applied");
        }
        assert_error!(
            other.position(&stage.consumer).await,
            Error::PartiallyApplied { .. },
            "2 commands were applied"
        );
        other.resolve_partial(&stage.consumer).await?;
        assert_error!(
            other.resolve_partial(&stage.consumer).await,
            Error::Failed { .. },
            "no transaction is partially applied"
        );
        let position = other.position(&stage.consumer).await?.expect("a position");
        assert_eq!(
            (position.revision, position.next),
            (stored.next_count().next_epoch(), Offset::new(1, 7)),
            "it did not move, and opened an epoch"
        );
        stored = position.revision;
        let state = other.begin(&stage.consumer).await?.get(b"state").await?;
        assert_eq!(state, None);
    }
    let mut tx = stage.begin().await?;
    tx.command(command("SET a 2")).await?;
    tx.commit(after(stored)).await?;
    Ok(())
}

pub(crate) async fn a_first_commit_applied_in_part_can_be_resolved() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    let result = stage.commit(0, ["SET a 1", "LSET list 5 x"].map(command)).await;
    assert_error!(result, Error::PartiallyApplied { .. }, "LSET list");
    assert_error!(stage.commit(0, []).await, Error::PartiallyApplied { .. },);
    stage.store.resolve_partial(&stage.consumer).await?;
    assert_eq!(stage.store.position(&stage.consumer).await?, None);
    stage.commit(0, []).await?;
    Ok(())
}

pub(crate) async fn other_instances_are_fenced_after_a_partial_commit() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    stage.commit(0, []).await?;
    let mut overtaken = stage.begin().await?;
    overtaken.command(command("SET overtaken 1")).await?;
    let result = stage.commit(1, ["SET a 1", "LSET list 5 x"].map(command)).await;
    assert_error!(result, Error::PartiallyApplied { .. },);
    stage.store.resolve_partial(&stage.consumer).await?;
    assert_error!(overtaken.commit(advance(1, 9)).await, Error::Fenced { .. },);
    assert_eq!(stage.ask("EXISTS overtaken")?, "0");
    Ok(())
}

pub(crate) async fn unfit_commands_are_refused_at_once() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    for (unfit, why) in [
        ("NOSUCH a", "no such command"),
        ("HSET a", "too few or too many"),
        ("INCR a b", "too few or too many"),
        ("XGROUP", "writes nothing"),
        ("XGROUP NOSUCH a", "no such command"),
        ("GET a", "use `query`"),
        ("SELECT 1", "writes nothing"),
        ("FLUSHALL", "names no key"),
        ("FLUSHDB", "names no key"),
        ("SWAPDB 0 1", "names no key"),
        ("BLPOP a 0", "may block"),
        ("XREADGROUP GROUP g c STREAMS s >", "may block"),
        ("MULTI", "inside a script"),
        ("EVAL return 0", "inside a script"),
        ("SUBSCRIBE a", "inside a script"),
        ("CONFIG SET maxmemory 1", "inside a script"),
        ("MIGRATE h 1 k 0 1", "inside a script"),
        ("SHUTDOWN", "inside a script"),
    ] {
        assert_error!(
            tx.command(command(unfit)).await,
            Error::Failed { .. },
            why,
            unfit.split(' ').next().unwrap_or_default()
        );
    }
    assert_error!(tx.command(Cmd::new()).await, Error::Failed { .. }, "empty");
    let mut long = cmd("RPUSH");
    long.arg("list").arg(vec![1; 7_000]);
    assert_error!(tx.command(long).await, Error::Failed { .. }, "split it");
    tx.command(command("SET fine 1")).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(stage.ask("GET fine")?, "1");
    Ok(())
}

pub(crate) async fn keys_of_stores_are_refused() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    for kind in ["position", "windows", "state"] {
        for consumer in ["c", "another"] {
            let key = format!("essentially-once:{{{consumer}}}:{kind}");
            for touching in [
                format!("HSET {key} a b"),
                format!("DEL x {key}"),
                format!("RENAME x {key}"),
                format!("ZUNIONSTORE {key} 1 x"),
            ] {
                assert_error!(
                    tx.command(command(&touching)).await,
                    Error::Failed { .. },
                    "belongs to a store"
                );
            }
        }
    }
    for stream in ["{orders}", "{shop}:orders", "}{shop}"] {
        assert_error!(
            tx.command(command(&format!("DEL essentially-once:retention:{stream}")))
                .await,
            Error::Failed { .. },
            "only the log may change it"
        );
    }
    tx.command(command("SET essentially-once:{c}:mine 1")).await?;
    Ok(())
}

pub(crate) async fn subcommands_are_known() -> Outcome {
    let stage = Stage::start().await?;
    stage
        .commit(
            0,
            [
                "xgroup create stream group $ mkstream",
                "XGROUP CREATECONSUMER stream group me",
            ]
            .map(command),
        )
        .await?;
    let consumers = stage.server.command(&["XINFO", "CONSUMERS", "stream", "group"])?;
    assert_eq!(consumers.list().len(), 1);
    Ok(())
}

pub(crate) async fn queries_read_now() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("SET a 5")?;
    let mut tx = stage.begin().await?;
    tx.command(command("SET a 6")).await?;
    assert_eq!(tx.query::<i64>(command("GET a")).await?, 5);
    assert_eq!(tx.query::<Option<i64>>(command("GET b")).await?, None);
    assert_eq!(tx.query::<String>(command("OBJECT ENCODING a")).await?, "int");
    for (unfit, why) in [
        ("SET a 1", "not a reading command"),
        ("XREAD BLOCK 0 STREAMS a 0", "may block"),
        ("GET", "too few"),
    ] {
        assert_error!(tx.query::<i64>(command(unfit)).await, Error::Failed { .. }, why);
    }
    assert_error!(
        tx.query::<i64>(command("LLEN a")).await,
        Error::Failed { .. },
        "WRONGTYPE"
    );
    stage.ask("SET text abc")?;
    assert_error!(
        tx.query::<i64>(command("GET text")).await,
        Error::Failed { .. },
        "run GET"
    );
    assert_eq!(
        tx.query::<i64>(command("GET a")).await?,
        5,
        "the connection is still good"
    );
    assert_eq!((tx.hash_tag().as_str(), tx.consumer()), ("{c}", &stage.consumer));
    Ok(())
}

/// An advance from this revision.
fn after(expected: Revision) -> Advance {
    Advance::new(log("orders#a1"), Offset::new(9, 7), expected, expected.next_count())
}
