//! Servers that are full, killed, or behind a broken connection.

use std::{sync::Arc, time::Duration};

use essentially_once::{
    Error, KeyValue, Offset, OffsetStore,
    backend::{Transaction, Window},
};
use essentially_once_redis::RedisOptions;
use test_servers::{Cut, Proxy};

use crate::{
    LIMIT,
    support::{Outcome, Stage, advance, assert_error, changed, command, numbering, revision, text_of},
};

pub(crate) async fn a_full_server_applies_nothing() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, [command("SET x 1")]).await?;
    stage.ask("CONFIG SET maxmemory 100kb")?;
    let full: [&[&str]; 3] = [&[], &["INCR count"], &["INCR count", "RPUSH list a"]];
    for commands in full {
        let mut tx = stage.begin().await?;
        tx.put(b"a", b"1").await?;
        for text in commands {
            tx.command(command(text)).await?;
        }
        let windows = vec![(numbering("p"), Window::new(5))];
        let result = tx
            .commit(changed(advance(1, 2), |advance| {
                advance.windows = windows;
            }))
            .await;
        assert_error!(result, Error::Unavailable { .. }, "OOM", "maxmemory");
        assert_eq!((stage.revision().await?, stage.ask("DBSIZE")?.as_str()), (1, "2"));
    }
    assert_error!(stage.commit(1, []).await, Error::Unavailable { .. }, "OOM");
    // A commit that begins by freeing memory is applied as a whole.
    stage.commit(1, ["DEL x", "RPUSH list a"].map(command)).await?;
    stage.ask("CONFIG SET maxmemory 0")?;
    stage.commit(2, [command("INCR count")]).await?;
    assert_eq!((stage.revision().await?, stage.ask("LLEN list")?.as_str()), (3, "1"));
    Ok(())
}

pub(crate) async fn a_request_that_is_lost_did_nothing() -> Outcome {
    cut(Cut::BeforeRequest, 1).await
}

pub(crate) async fn a_reply_that_is_lost_is_found_out() -> Outcome {
    cut(Cut::BeforeReply, 2).await
}

async fn cut(moment: Cut, commits: u64) -> Outcome {
    let stage = Stage::start().await?;
    let proxy = Proxy::start(stage.server.port())?;
    let store = stage.through(&proxy).await?;
    store.begin(&stage.consumer).await?.commit(advance(0, 1)).await?;
    proxy.cut_at(b"EVALSHA", moment);
    let mut tx = store.begin(&stage.consumer).await?;
    tx.put(b"a", b"1").await?;
    assert_error!(
        tx.commit(advance(1, 2)).await,
        Error::Indeterminate { .. },
        "commit",
        "consumer c"
    );
    assert!(proxy.wait_fired(1, LIMIT));
    let position = store.position(&stage.consumer).await?.expect("a position");
    assert_eq!(
        (position.revision, position.next),
        (revision(commits), Offset::new(commits, 7))
    );
    assert_eq!(stage.value("a").await?.is_some(), commits == 2);
    store.begin(&stage.consumer).await?.commit(advance(commits, 5)).await?;
    Ok(())
}

pub(crate) async fn a_late_commit_is_fenced() -> Outcome {
    let stage = Stage::start().await?;
    let proxy = Proxy::start(stage.server.port())?;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let slow = RedisOptions::new()
        .timeout(Duration::from_secs(2))
        .connect(&url)
        .await?
        .store();
    slow.begin(&stage.consumer).await?.commit(advance(0, 1)).await?;
    let mut late = slow.begin(&stage.consumer).await?;
    late.command(command("SET late 1")).await?;
    // This only shows when the commit has arrived.
    proxy.cut_at(b"SET\r\n$4\r\nlate", Cut::BeforeReply);
    proxy.hold(true);
    assert_error!(late.commit(advance(1, 2)).await, Error::Indeterminate { .. },);
    stage.commit(1, [command("SET other 1")]).await?;
    proxy.hold(false);
    assert!(proxy.wait_fired(1, LIMIT), "it never arrived");
    assert_eq!((stage.revision().await?, stage.ask("EXISTS late")?.as_str()), (2, "0"));
    // The connection is closed.
    let position = loop {
        match slow.position(&stage.consumer).await {
            Err(error) if error.is_transient() => {}
            position => break position?,
        }
    };
    assert_eq!(position.map(|position| position.revision.count()), Some(2));
    Ok(())
}

pub(crate) async fn what_was_acknowledged_survives_kills() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    let (mut acknowledged, mut kills) = (0, 0);
    while kills < 5 {
        let mut killer = None;
        let enough = acknowledged + 3;
        loop {
            // Kill at a random moment, after some commits were acknowledged.
            if acknowledged >= enough && killer.is_none() {
                let server = Arc::clone(&stage);
                killer = Some(tokio::task::spawn_blocking(move || {
                    std::thread::sleep(Duration::from_millis(fastrand::u64(..30)));
                    server.server.restart().map_err(|error| error.to_string())
                }));
            }
            let mut tx = stage.begin().await?;
            tx.put(b"count", (acknowledged + 1).to_string().as_bytes()).await?;
            let result = match tx.command(command("INCR count")).await {
                Ok(()) => tx.commit(advance(acknowledged, acknowledged + 1)).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => acknowledged += 1,
                Err(error) if error.is_transient() => break,
                Err(error) => return Err(error.into()),
            }
        }
        killer.ok_or("a commit failed before the kill")?.await??;
        kills += 1;
        let stored = loop {
            match stage.revision().await {
                Ok(stored) => break stored,
                Err(Error::Unavailable { .. }) => tokio::task::yield_now().await,
                Err(error) => return Err(error.into()),
            }
        };
        assert!(
            stored == acknowledged || stored == acknowledged + 1,
            "{stored} of {acknowledged}"
        );
        assert_eq!(stage.ask("GET count")?, stored.to_string(), "all or nothing");
        assert_eq!(stage.value("count").await?, Some(stored.to_string()));
        acknowledged = stored;
    }
    Ok(())
}

pub(crate) async fn a_forgotten_script_is_sent_again() -> Outcome {
    let stage = Stage::start().await?;
    for revision in 0..3 {
        stage.ask("SCRIPT FLUSH")?;
        stage.commit(revision, [command("INCR count")]).await?;
    }
    stage.server.restart()?;
    stage.commit(3, [command("INCR count")]).await?;
    assert_eq!(stage.ask("GET count")?, "4");
    Ok(())
}

pub(crate) async fn a_value_over_the_servers_limit_is_refused_before_anything_is_sent() -> Outcome {
    const OVER: usize = 1024 * 1024 + 1;
    let stage = Stage::start().await?;
    stage.ask("CONFIG SET proto-max-bulk-len 1mb")?;
    // A value staged without a connection is refused by the commit.
    let mut tx = stage.begin().await?;
    tx.put(b"small", b"1").await?;
    tx.put(b"large", &vec![0; OVER]).await?;
    assert_error!(
        tx.commit(advance(0, 1)).await,
        Error::TooLarge { size: OVER, .. },
        "proto-max-bulk-len"
    );
    assert_eq!(stage.ask("DBSIZE")?, "0");
    let mut tx = stage.begin().await?;
    assert_error!(
        tx.put(b"large", &vec![0; OVER]).await,
        Error::TooLarge { size: OVER, .. },
    );
    assert_error!(tx.put(&vec![0; OVER], b"").await, Error::TooLarge { size: OVER, .. },);
    let mut set = command("SET x");
    set.arg(vec![0_u8; OVER]);
    assert_error!(tx.command(set).await, Error::TooLarge { size: OVER, .. },);
    tx.put(b"fits", &vec![0; OVER - 1]).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(stage.revision().await?, 1);
    Ok(())
}
