//! Appends in a transaction on a connection of the user.

use essentially_once::{Epoch, Error, Log as _, NewRecord, Origin, ProducerId, backend::Source};
use essentially_once_postgres::{
    LogOptions, Pg, PgLog, PgOptions, Retention,
    tokio_postgres::{Client, Transaction},
};

use crate::{
    common::{Outcome, Stage, assert_error, client, ensure},
    numbered, send_alone,
};

async fn out() -> Result<(Stage, PgLog, Client), Source> {
    let stage = Stage::start().await?;
    let out = stage.pg.log("out").await?;
    let client = stage.client().await?;
    client.batch_execute("CREATE TABLE orders (n int)").await?;
    Ok((stage, out, client))
}

fn new(payloads: &[&'static str]) -> Vec<NewRecord> {
    payloads.iter().map(|payload| NewRecord::new(*payload)).collect()
}

async fn order(tx: &Transaction<'_>) -> Outcome {
    tx.execute("INSERT INTO orders VALUES (1)", &[]).await?;
    Ok(())
}

/// Appends after a change of the user, and returns why it was refused. The user commits all the
/// same.
async fn refusal(out: &PgLog, client: &mut Client, records: &[NewRecord]) -> Result<Error, Source> {
    let tx = client.transaction().await?;
    let refused = out.append_in(&tx, records).await;
    tx.commit().await?;
    refused.err().ok_or_else(|| "it was not refused".into())
}

pub(crate) async fn records_are_appended_with_the_users_commit_or_not_at_all() -> Outcome {
    let (stage, out, mut client) = out().await?;
    let tx = client.transaction().await?;
    order(&tx).await?;
    assert_eq!(out.append_in(&tx, &[]).await?, None);
    assert_eq!(out.append_in(&tx, &new(&["a", "b"])).await?, Some(1.into()));
    assert_eq!(out.append_in(&tx, &new(&["c"])).await?, Some(2.into()));
    assert_eq!(out.bounds().await?.end, 0.into(), "not committed");
    tx.commit().await?;
    for is_dropped in [false, true] {
        let tx = client.transaction().await?;
        order(&tx).await?;
        assert_eq!(out.append_in(&tx, &new(&["undone"])).await?, Some(3.into()));
        match is_dropped {
            true => drop(tx),
            false => tx.rollback().await?,
        }
    }
    let mut tx = client.transaction().await?;
    let savepoint = tx.savepoint("a").await?;
    out.append_in(&savepoint, &new(&["undone"])).await?;
    savepoint.rollback().await?;
    assert_eq!(out.append_in(&tx, &new(&["d"])).await?, Some(3.into()));
    tx.commit().await?;
    ensure!(
        numbered(&out).await?.0 == ["a", "b", "c", "d"],
        "{:?}",
        numbered(&out).await?
    );
    ensure!(
        stage.sql("SELECT count(*) FROM orders")? == "1",
        "the user's changes differ"
    );
    // A record keeps its key and headers.
    let tx = client.transaction().await?;
    let full = NewRecord::new("payload").key("k").header("a", "1").header("b", "");
    out.append_in(&tx, std::slice::from_ref(&full)).await?;
    tx.commit().await?;
    let found = crate::records(&out).await?.pop().ok_or("no record")?;
    ensure!(
        (found.key, found.headers, found.payload) == (full.key, full.headers, full.payload),
        "it was changed"
    );
    Ok(())
}

pub(crate) async fn sends_and_appends_in_transactions_share_one_numbering() -> Outcome {
    let (stage, out, mut client) = out().await?;
    let other = stage.other().await?.log("out").await?;
    for n in 0..5 {
        send_alone(&stage, "out", "sent", n).await?;
        for log in [&out, &other] {
            let tx = client.transaction().await?;
            log.append_in(&tx, &new(&["appended"])).await?;
            tx.commit().await?;
        }
    }
    let (found, _) = numbered(&out).await?;
    let expected = ["sent", "appended", "appended"].repeat(5);
    ensure!(found == expected, "{found:?}");
    // A plain append takes an offset and no number.
    out.append(&new(&["plain"])).await?;
    send_alone(&stage, "out", "sent", 5).await?;
    let last: Vec<_> = crate::records(&out).await?.into_iter().skip(15).collect();
    ensure!(last[0].origin.is_none(), "{:?}", last[0]);
    ensure!(
        last[1].origin.as_ref().is_some_and(|origin| origin.sequence == 16),
        "{:?}",
        last[1]
    );
    Ok(())
}

/// A user who ignores the refusal has appended nothing.
pub(crate) async fn a_connection_that_does_not_wait_for_the_disk_is_refused() -> Outcome {
    let (_stage, out, mut client) = out().await?;
    client.batch_execute("SET synchronous_commit = off").await?;
    for _ in 0..2 {
        let refused = refusal(&out, &mut client, &new(&["a"])).await?;
        assert_error!(
            Err::<(), _>(refused),
            Error::Failed { .. },
            "set `synchronous_commit = on`"
        );
        ensure!(out.bounds().await?.end == 0.into(), "it was appended");
    }
    for sound in ["on", "local"] {
        let tx = client.transaction().await?;
        tx.batch_execute(&format!("SET LOCAL synchronous_commit = {sound}"))
            .await?;
        out.append_in(&tx, &new(&["a"])).await?;
        tx.commit().await?;
    }
    ensure!(numbered(&out).await?.0 == ["a", "a"], "not appended");
    Ok(())
}

pub(crate) async fn another_database_is_refused() -> Outcome {
    let (stage, out, mut user) = out().await?;
    // One has the same log, and one has no schema.
    let other = stage.server.create_database("other")?;
    let namesake = Pg::connect(&other).await?.log("out").await?;
    let empty = stage.server.create_database("empty")?;
    let mut client_of = [client(&other).await?, client(&empty).await?];
    for (client, why) in client_of.iter_mut().zip(["another database", "does not exist"]) {
        let tx = client.transaction().await?;
        let refused = out.append_in(&tx, &new(&["a"])).await;
        assert_error!(refused, Error::Failed { .. }, why, "log out");
    }
    ensure!(namesake.bounds().await?.end == 0.into(), "it went to the namesake");
    // Another schema of the same database is another log as well.
    let schema = PgOptions::new().schema("b").connect(&stage.server.url()).await?;
    let elsewhere = schema.log("out").await?;
    let tx = user.transaction().await?;
    elsewhere.append_in(&tx, &new(&["b"])).await?;
    tx.commit().await?;
    ensure!(out.bounds().await?.end == 0.into(), "it went to the other schema");
    ensure!(numbered(&elsewhere).await?.0 == ["b"], "not appended");
    Ok(())
}

pub(crate) async fn records_that_a_log_refuses_are_refused_here_too() -> Outcome {
    let (stage, _, mut client) = out().await?;
    let small = PgOptions::new()
        .record_limit(1_000)
        .connect(&stage.server.url())
        .await?;
    let out = small.log("out").await?;
    let large = [NewRecord::new("a"), NewRecord::new(vec![1; 1_001])];
    let refused = refusal(&out, &mut client, &large).await?;
    ensure!(matches!(refused, Error::TooLarge { size: 1_001, .. }), "{refused:?}");
    let origin = Origin::new(ProducerId::new("web")?, Epoch::STABLE, 1);
    let refused = refusal(&out, &mut client, &[NewRecord::new("a").origin(origin)]).await?;
    assert_error!(Err::<(), _>(refused), Error::Failed { .. }, "origin web:1");
    ensure!(out.bounds().await?.end == 0.into(), "appended");
    Ok(())
}

pub(crate) async fn a_log_that_was_recreated_is_not_appended_to() -> Outcome {
    let (stage, out, mut client) = out().await?;
    let tx = client.transaction().await?;
    out.append_in(&tx, &new(&["a"])).await?;
    tx.commit().await?;
    stage.sql("DELETE FROM essentially_once.records; DELETE FROM essentially_once.logs")?;
    for is_recreated in [false, true] {
        let refused = refusal(&out, &mut client, &new(&["b"])).await?;
        let why = if is_recreated {
            "open it again"
        } else {
            "no log has that name"
        };
        assert_error!(Err::<(), _>(refused), Error::Failed { .. }, why);
        let again = stage.other().await?.log("out").await?;
        ensure!(again.bounds().await?.end == 0.into(), "appended");
    }
    Ok(())
}

pub(crate) async fn a_lock_that_is_held_for_long_is_a_passing_error() -> Outcome {
    let (stage, out, mut client) = out().await?;
    send_alone(&stage, "out", "a", 0).await?;
    let mut holder = stage.client().await?;
    let held = holder.transaction().await?;
    out.append_in(&held, &new(&["b"])).await?;
    client.batch_execute("SET lock_timeout = 100").await?;
    let tx = client.transaction().await?;
    let refused = out.append_in(&tx, &new(&["c"])).await;
    assert_error!(refused, Error::Unavailable { .. }, "lock timeout");
    drop(tx);
    held.commit().await?;
    let tx = client.transaction().await?;
    out.append_in(&tx, &new(&["c"])).await?;
    tx.commit().await?;
    ensure!(
        numbered(&out).await?.0 == ["a", "b", "c"],
        "{:?}",
        numbered(&out).await?
    );
    Ok(())
}

pub(crate) async fn retention_applies_and_numbers_go_on() -> Outcome {
    let (stage, _, mut client) = out().await?;
    let keep = LogOptions::new().retention(Retention::new().max_records(2));
    let out = stage.pg.log_with("out", keep).await?;
    for _ in 0..4 {
        let tx = client.transaction().await?;
        out.append_in(&tx, &new(&["a", "b", "c"])).await?;
        tx.commit().await?;
    }
    out.trim().await?;
    let bounds = out.bounds().await?;
    ensure!((bounds.earliest, bounds.end) == (10.into(), 12.into()), "{bounds:?}");
    ensure!(out.remove_before(12.into()).await? == 2, "two are left");
    let tx = client.transaction().await?;
    ensure!(
        out.append_in(&tx, &new(&["d"])).await? == Some(12.into()),
        "a number was used again"
    );
    tx.commit().await?;
    ensure!(numbered(&out).await?.0 == ["d"], "not appended");
    Ok(())
}
