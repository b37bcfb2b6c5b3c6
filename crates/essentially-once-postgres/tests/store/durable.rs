//! Commits are durable, whatever a handler or a database says.

use essentially_once::{
    Error, Log as _, OffsetStore as _,
    backend::{Source, Transaction as _},
};
use essentially_once_postgres::Pg;

use crate::common::{Outcome, Stage, advance, ensure, numbered};

/// Notes at the commit how durable it is.
const NOTE: &str = "CREATE TABLE orders (n int);
     CREATE TABLE noted (setting text);
     CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN INSERT INTO noted VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;
     CREATE CONSTRAINT TRIGGER note AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
         FOR EACH ROW EXECUTE FUNCTION note()";

const NOTE_APPENDS: &str = "CREATE CONSTRAINT TRIGGER note AFTER INSERT ON essentially_once.records
     DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION note()";

async fn stage() -> Result<Stage, Source> {
    let stage = Stage::start().await?;
    stage.sql(NOTE)?;
    Ok(stage)
}

/// How durable the last commit was.
fn noted(stage: &Stage) -> Result<String, Source> {
    let noted = stage.sql("SELECT setting FROM noted")?;
    stage.sql("DELETE FROM noted")?;
    Ok(noted)
}

pub(crate) async fn a_handler_that_relaxes_durability_still_commits_durably() -> Outcome {
    let stage = stage().await?;
    // A program without this crate is not kept from it.
    stage.sql("SET synchronous_commit = off; INSERT INTO orders VALUES (1)")?;
    ensure!(noted(&stage)? == "off", "the trigger does not show it");
    let relaxed = [
        ("SELECT 1", "on"),
        ("SET LOCAL synchronous_commit = off", "on"),
        ("SET synchronous_commit = off", "on"),
        ("SELECT set_config('synchronous_commit', 'off', false)", "on"),
        ("SELECT 1", "on"),
        ("SET LOCAL synchronous_commit = remote_apply", "remote_apply"),
    ];
    for (commits, (sql, expected)) in (0..).zip(relaxed) {
        for is_queued in [false, true] {
            let mut tx = stage.begin().await?;
            tx.execute("INSERT INTO orders VALUES (1)", &[]).await?;
            match is_queued {
                true => tx.queue(sql, &[]).await?,
                false => drop(tx.execute(sql, &[]).await?),
            }
            tx.commit(advance(2 * commits + u64::from(is_queued), 1)).await?;
            let found = noted(&stage)?;
            ensure!(found == expected, "{sql}: committed with {found}");
        }
    }
    // An append on the session that the handler has spoilt.
    let orders = stage.pg.log("orders").await?;
    stage.sql(NOTE_APPENDS)?;
    let mut tx = stage.begin().await?;
    tx.execute("SET synchronous_commit = off", &[]).await?;
    tx.commit(advance(12, 1)).await?;
    orders.append(&numbered(0..1)).await?;
    let found = noted(&stage)?;
    ensure!(found == "on", "appended with {found}");
    Ok(())
}

pub(crate) async fn a_database_that_relaxes_durability_does_not_weaken_commits() -> Outcome {
    let stage = stage().await?;
    stage.sql("ALTER DATABASE postgres SET synchronous_commit = off")?;
    let pg = Pg::connect(&stage.server.url()).await?;
    let insert = async |commits| {
        let mut tx = pg.store().begin(&stage.consumer).await?;
        tx.execute("INSERT INTO orders VALUES (1)", &[]).await?;
        tx.commit(advance(commits, 1)).await?;
        Ok::<_, Error>(())
    };
    insert(0).await?;
    ensure!(noted(&stage)? == "on", "the commit was not durable");
    // Appends too.
    stage.sql(NOTE_APPENDS)?;
    pg.log("orders").await?.append(&numbered(0..1)).await?;
    ensure!(noted(&stage)? == "on", "the append was not durable");
    Ok(())
}
