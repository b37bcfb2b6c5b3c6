//! Sessions and servers that go away, and tables that somebody edited.

use std::{fs, os::unix::fs::symlink, path::PathBuf, time::Duration};

use essentially_once::{
    ConsumerId, Error, KeyValue as _, Log as _, NewRecord, OffsetStore as _, Outbox as _,
    backend::{Source, Transaction as _},
};
use essentially_once_postgres::PgOptions;
use test_servers::{insist, insist_and_count};

use crate::common::{Outcome, Stage, advance, assert_error, ensure, numbered, records, soon};

/// Ends all sessions of this crate, and waits until they are gone.
async fn end_sessions(stage: &Stage) -> Outcome {
    stage.sql(
        "SELECT count(pg_terminate_backend(pid, 60000)) FROM pg_stat_activity WHERE application_name = 'essentially-once'",
    )?;
    Ok(())
}

async fn stage() -> Result<Stage, Source> {
    let stage = Stage::start().await?;
    stage.sql("CREATE TABLE freight (n int)")?;
    Ok(stage)
}

pub(crate) async fn a_session_that_is_ended_in_a_transaction_applies_nothing() -> Outcome {
    let stage = stage().await?;
    for (commits, is_read) in [(0, true), (1, false), (2, true), (3, false)] {
        let mut tx = stage.begin().await?;
        tx.put(b"k", b"v").await?;
        tx.execute("INSERT INTO freight VALUES (1)", &[]).await?;
        end_sessions(&stage).await?;
        if is_read {
            assert_error!(tx.query("SELECT 1", &[]).await, Error::Unavailable { .. }, "run SQL");
            assert_error!(tx.get(b"other").await, Error::Unavailable { .. }, "rolled back");
        }
        let failed = tx.commit(advance(commits, 1)).await;
        ensure!(
            matches!(failed, Err(Error::Unavailable { .. } | Error::Indeterminate { .. })),
            "{failed:?}"
        );
        ensure!(stage.commits().await? == commits, "the position moved");
        ensure!(stage.sql("SELECT count(*) FROM freight")? == "0", "applied");
        stage.begin().await?.commit(advance(commits, 1)).await?;
    }
    ensure!(stage.value("k").await?.is_none(), "applied");
    Ok(())
}

/// As after a restart, when no call was in progress.
pub(crate) async fn idle_sessions_that_are_ended_are_replaced() -> Outcome {
    let stage = stage().await?;
    let orders = stage.pg.log("orders").await?;
    let mut failures = Vec::new();
    for round in 0..5 {
        let transactions = [stage.begin().await?, stage.begin().await?, stage.begin().await?];
        for mut tx in transactions {
            tx.get(b"k").await?;
            tx.rollback().await?;
        }
        end_sessions(&stage).await?;
        // While this waits for an answer, the connections notice it.
        stage.client().await?.batch_execute("SELECT 1").await?;
        let commit = async || stage.begin().await?.commit(advance(round, 1)).await;
        let ((), failed) = insist_and_count(commit).await?;
        failures.extend(failed);
        orders.append(&numbered(0..1)).await?;
    }
    // A busy machine may be late to notice one.
    ensure!(failures.len() < 5, "ended sessions are used again: {failures:?}");
    ensure!(records(&orders).await?.len() == 5, "records are missing");
    Ok(())
}

pub(crate) async fn a_server_that_turns_read_only_is_left_and_found_again() -> Outcome {
    let stage = Stage::start().await?;
    let orders = stage.pg.log("orders").await?;
    orders.append(&numbered(0..1)).await?;
    stage.begin().await?.commit(advance(0, 1)).await?;
    let turn = async |setting: &str| {
        stage.sql(&format!("ALTER SYSTEM SET default_transaction_read_only = {setting}"))?;
        stage.sql("SELECT pg_reload_conf()")?;
        let shown = stage.client().await?;
        let asked = test_servers::eventually(async || {
            let row = shown.query_one("SHOW default_transaction_read_only", &[]).await?;
            Ok(match row.get::<_, &str>(0) == setting {
                true => Ok(()),
                false => Err("not reloaded".into()),
            })
        });
        asked.await
    };
    turn("on").await?;
    let append = async || orders.append(&numbered(1..2)).await;
    assert_error!(append().await, Error::Unavailable { .. }, "read-only");
    // Again, when a new session is needed.
    assert_error!(append().await, Error::Unavailable { .. }, "read-only");
    turn("off").await?;
    insist(append).await?;
    insist(async || stage.begin().await?.commit(advance(1, 2)).await).await?;
    ensure!(records(&orders).await?.len() == 2, "appended more than once");
    Ok(())
}

pub(crate) async fn a_frozen_server_leaves_a_commit_in_doubt() -> Outcome {
    let options = PgOptions::new()
        .timeout(Duration::from_secs(2))
        .lock_timeout(Duration::from_secs(1));
    let stage = Stage::with(options, &[]).await?;
    let orders = stage.pg.log("orders").await?;
    orders.append(&numbered(0..1)).await?;
    // The second one prepares all statements of the third.
    for commits in 0..2 {
        let mut tx = stage.begin().await?;
        tx.put(b"warm", b"v").await?;
        tx.commit(advance(commits, 1)).await?;
    }
    let mut tx = stage.begin().await?;
    tx.put(b"k", b"v").await?;
    tx.get(b"other").await?;
    stage.server.freeze();
    let committed = soon(tx.commit(advance(2, 2))).await?;
    let appended = soon(orders.append(&numbered(1..2))).await?;
    let read = soon(stage.store.position(&stage.consumer)).await?;
    stage.server.thaw();
    assert_error!(committed, Error::Indeterminate { .. }, "did not answer within 2s");
    // Whether it was sent depends on whether the session had to prove that it is alive.
    ensure!(
        matches!(appended, Err(Error::Unavailable { .. } | Error::Indeterminate { .. })),
        "{appended:?}"
    );
    assert_error!(read, Error::Unavailable { .. }, "did not answer within 2s");
    // The frozen server had the commit in its socket. What it did is one of two things.
    let commits = insist(|| stage.commits()).await?;
    let state = stage.value("k").await?;
    ensure!(
        state.is_some() == (commits == 3),
        "in part: {commits} commits, {state:?}"
    );
    insist(async || orders.append(&numbered(2..3)).await).await?;
    Ok(())
}

/// The future is dropped at any of its polls.
pub(crate) async fn a_dropped_commit_is_made_or_not_but_never_in_part() -> Outcome {
    let stage = stage().await?;
    let mut commits = 0;
    let (mut made, mut undone) = (0, 0);
    for round in 0..60_u64 {
        let mut tx = stage.begin().await?;
        let value = round.to_string();
        tx.put(b"k", value.as_bytes()).await?;
        tx.execute("INSERT INTO freight VALUES (1)", &[]).await?;
        let limit = Duration::from_micros(round * 100);
        let is_done = tokio::time::timeout(limit, tx.commit(advance(commits, 1)))
            .await
            .is_ok();
        // A commit that was sent may still be made. It is fenced, or fences this one.
        let next = insist(async || {
            let before = stage.commits().await?;
            match stage.begin().await?.commit(advance(before, 1)).await {
                Err(Error::Fenced { .. }) => Err(Error::unavailable("commit", "the dropped one was first")),
                done => done.map(|()| before),
            }
        });
        let before = next.await?;
        let is_made = before == commits + 1;
        ensure!(
            is_made || (before == commits && !is_done),
            "{before} commits instead of {commits}"
        );
        ensure!((stage.value("k").await?.as_ref() == Some(&value)) == is_made, "in part");
        (made, undone) = (made + u64::from(is_made), undone + u64::from(!is_made));
        commits = before + 1;
    }
    let rows: u64 = stage.sql("SELECT count(*) FROM freight")?.parse()?;
    ensure!(
        rows == made && made > 0 && undone > 0,
        "{rows} rows, {made} commits, {undone} undone"
    );
    Ok(())
}

pub(crate) async fn garbage_in_our_tables_is_an_error() -> Outcome {
    let stage = Stage::start().await?;
    for column in [
        "log = 'not a name!'",
        "owner = 'nobody'",
        "journal = '\\xff'",
        "incarnation = 'not an incarnation!'",
    ] {
        let id = ConsumerId::new("shipping")?;
        stage.begin().await?.commit(advance(0, 1)).await?;
        stage.sql(&format!("UPDATE essentially_once.consumers SET {column}"))?;
        assert_error!(stage.store.position(&id).await, Error::Failed { .. }, "shipping");
        stage.sql("DELETE FROM essentially_once.consumers")?;
    }
    stage.begin().await?.commit(advance(0, 1)).await?;
    stage.sql("UPDATE essentially_once.consumers SET consumer = 'not a name!'")?;
    assert_error!(stage.store.consumers().await, Error::Failed { .. }, "not a name!");
    Ok(())
}

/// A table's file, in whose place the server finds a device that is always full.
struct FullDisk<'a> {
    stage: &'a Stage,
    file: PathBuf,
    aside: PathBuf,
}

impl<'a> FullDisk<'a> {
    async fn below(stage: &'a Stage, table: &str) -> Result<Self, Source> {
        let path = stage.sql(&format!("SELECT pg_relation_filepath('essentially_once.{table}')"))?;
        let file = stage.server.folder().join("data").join(path);
        let aside = file.with_extension("aside");
        fs::rename(&file, &aside)?;
        symlink("/dev/full", &file)?;
        // Sessions have the file open.
        end_sessions(stage).await?;
        Ok(Self { stage, file, aside })
    }

    async fn makes_room(self) -> Outcome {
        fs::rename(&self.aside, &self.file)?;
        end_sessions(self.stage).await
    }
}

/// The tables must be empty, like the device.
pub(crate) async fn a_full_disk_is_a_passing_error_and_leaves_no_gap() -> Outcome {
    let stage = Stage::start().await?;
    let orders = stage.pg.log("orders").await?;
    for table in ["state", "records"] {
        let full = FullDisk::below(&stage, table).await?;
        for _ in 0..3 {
            let mut tx = stage.begin().await?;
            tx.put(b"k", b"v").await?;
            tx.send("orders", NewRecord::new("sent")).await?;
            let failed = tx.commit(advance(0, 1)).await;
            assert_error!(failed, Error::Unavailable { .. }, "make room on the server's disk");
            if table == "records" {
                let failed = orders.append(&numbered(0..2)).await;
                assert_error!(failed, Error::Unavailable { .. }, "make room on the server's disk");
            }
        }
        full.makes_room().await?;
        ensure!(stage.commits().await? == 0, "the position moved");
        ensure!(stage.value("k").await?.is_none(), "the state changed");
        ensure!(records(&orders).await?.is_empty(), "records were stored");
    }
    ensure!(orders.append(&numbered(0..2)).await? == Some(1.into()), "a gap");
    stage.begin().await?.commit(advance(0, 1)).await?;
    Ok(())
}
