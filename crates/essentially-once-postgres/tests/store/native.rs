//! SQL in the transaction of a handler.

use essentially_once::{
    Error, KeyValue as _,
    backend::{Source, Transaction as _},
};
use essentially_once_postgres::{PgTx, postgres_error, tokio_postgres::error::SqlState};

use crate::common::{Outcome, Stage, advance, assert_error, code_of, ensure};

const TABLE: &str = "CREATE TABLE freight (country text PRIMARY KEY, shipped int NOT NULL)";
const INSERT: &str = "INSERT INTO freight VALUES ($1, $2)";

async fn stage() -> Result<Stage, Source> {
    let stage = Stage::start().await?;
    stage.sql(TABLE)?;
    Ok(stage)
}

impl Stage {
    fn freight(&self) -> Result<String, Source> {
        Ok(self
            .sql("SELECT country, shipped FROM freight ORDER BY country")?
            .replace('\n', " "))
    }
}

pub(crate) async fn sql_state_and_position_are_committed_together() -> Outcome {
    let stage = stage().await?;
    let mut tx = stage.begin().await?;
    ensure!(tx.consumer() == &stage.consumer, "another consumer");
    tx.put(b"k", b"v").await?;
    ensure!(tx.execute(INSERT, &[&"Brazil", &1_i32]).await? == 1, "one row");
    tx.queue(INSERT, &[&"Chile", &2_i32]).await?;
    let rows = tx.query("SELECT shipped FROM freight ORDER BY shipped", &[]).await?;
    let shipped: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    ensure!(shipped == [1, 2], "{shipped:?}");
    let select = "SELECT shipped FROM freight WHERE country = $1";
    let row = tx.query_opt(select, &[&"Chile"]).await?.ok_or("no row")?;
    ensure!(row.get::<_, i32>(0) == 2, "{row:?}");
    ensure!(tx.query_opt(select, &[&"Peru"]).await?.is_none(), "a row");
    ensure!(
        stage.freight()?.is_empty() && stage.commits().await? == 0,
        "seen before the commit"
    );
    tx.commit(advance(0, 1)).await?;
    ensure!(stage.freight()? == "Brazil|1 Chile|2", "{}", stage.freight()?);
    ensure!(
        stage.commits().await? == 1 && stage.value("k").await?.as_deref() == Some("v"),
        "not committed"
    );
    for finish in [PgTx::rollback as fn(_) -> _, drop_it] {
        let mut tx = stage.begin().await?;
        tx.execute("DELETE FROM freight", &[]).await?;
        tx.queue(INSERT, &[&"Peru", &3_i32]).await?;
        tx.put(b"k", b"w").await?;
        finish(tx).await?;
        ensure!(stage.freight()? == "Brazil|1 Chile|2", "{}", stage.freight()?);
    }
    ensure!(stage.value("k").await?.as_deref() == Some("v"), "not rolled back");
    Ok(())
}

type Finished = std::pin::Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

fn drop_it(tx: PgTx) -> Finished {
    Box::pin(async move {
        drop(tx);
        Ok(())
    })
}

pub(crate) async fn a_transaction_reads_what_it_has_queued() -> Outcome {
    let stage = stage().await?;
    let mut tx = stage.begin().await?;
    for n in 0..5_i32 {
        tx.queue(INSERT, &[&n.to_string(), &n]).await?;
        let row = tx
            .query_opt("SELECT count(*) FROM freight", &[])
            .await?
            .ok_or("no row")?;
        ensure!(row.get::<_, i64>(0) == i64::from(n) + 1, "{row:?}");
    }
    ensure!(tx.execute("DELETE FROM freight", &[]).await? == 5, "five rows");
    Ok(())
}

pub(crate) async fn thousands_of_queued_statements_run_in_order() -> Outcome {
    const COUNT: i32 = 5_000;
    let stage = stage().await?;
    stage.sql("CREATE TABLE list (place serial, n int)")?;
    for round in 0..2 {
        let mut tx = stage.begin().await?;
        for n in 0..COUNT {
            tx.queue("INSERT INTO list (n) VALUES ($1)", &[&n]).await?;
        }
        tx.commit(advance(round, round + 1)).await?;
        let found = stage.sql("SELECT count(*), count(*) FILTER (WHERE (place - 1) % 5000 = n) FROM list")?;
        let expected = (round as i32 + 1) * COUNT;
        ensure!(found == format!("{expected}|{expected}"), "{found}");
    }
    Ok(())
}

/// The first round prepares the statements of the commit, which waits for answers. The second does
/// not, so that `COMMIT` is sent before the failure is known.
pub(crate) async fn a_queued_statement_that_fails_is_reported_by_the_commit() -> Outcome {
    let stage = stage().await?;
    stage.sql("INSERT INTO freight VALUES ('Brazil', 1)")?;
    for round in 0..3 {
        let mut tx = stage.begin().await?;
        tx.put(b"k", b"v").await?;
        // An answer may arrive while the statement is queued.
        let failed = async move {
            tx.queue(INSERT, &[&"Chile", &2_i32]).await?;
            tx.queue(INSERT, &[&"Brazil", &2_i32]).await?;
            tx.queue(INSERT, &[&"Peru", &3_i32]).await?;
            tx.commit(advance(round, round + 1)).await
        };
        let failed = failed.await;
        assert_error!(
            &failed,
            Error::Failed { .. },
            "queued SQL",
            "shipping",
            "duplicate key",
            "(country)=(Brazil)"
        );
        let error = failed.err().ok_or("no error")?;
        let code = postgres_error(&error).and_then(|error| error.code()).cloned();
        ensure!(code == Some(SqlState::UNIQUE_VIOLATION), "{code:?}");
        ensure!(stage.freight()? == "Brazil|1", "{}", stage.freight()?);
        ensure!(stage.commits().await? == round, "the position moved");
        stage.begin().await?.commit(advance(round, round + 1)).await?;
    }
    ensure!(stage.value("k").await?.is_none(), "state was changed");
    Ok(())
}

pub(crate) async fn a_queued_statement_that_fails_is_reported_by_the_next_query() -> Outcome {
    let stage = stage().await?;
    let mut tx = stage.begin().await?;
    // An answer may arrive while the statement is queued.
    let failed = async {
        tx.queue(INSERT, &[&"Brazil", &1_i32]).await?;
        tx.queue(INSERT, &[&"Brazil", &2_i32]).await?;
        tx.query("SELECT 1", &[]).await
    };
    let failed = failed.await;
    assert_error!(&failed, Error::Failed { .. }, "run queued SQL", "duplicate key");
    ensure!(code_of(&failed) == Some("23505"), "{failed:?}");
    assert_error!(tx.commit(advance(0, 1)).await, Error::Failed { .. }, "duplicate key");
    ensure!(stage.freight()?.is_empty() && stage.commits().await? == 0, "applied");
    Ok(())
}

pub(crate) async fn a_deferred_constraint_is_checked_by_the_commit() -> Outcome {
    let stage = stage().await?;
    stage.sql("CREATE TABLE orders (country text REFERENCES freight DEFERRABLE INITIALLY DEFERRED)")?;
    for round in 0..2 {
        let mut tx = stage.begin().await?;
        tx.put(b"k", b"v").await?;
        tx.execute("INSERT INTO orders VALUES ('Brazil')", &[]).await?;
        let failed = tx.commit(advance(round, round + 1)).await;
        assert_error!(&failed, Error::Failed { .. }, "commit", "foreign key");
        ensure!(code_of(&failed) == Some("23503"), "{failed:?}");
        ensure!(stage.commits().await? == round, "the position moved");
        stage.begin().await?.commit(advance(round, round + 1)).await?;
    }
    ensure!(stage.sql("SELECT count(*) FROM orders")? == "0", "applied");
    Ok(())
}

pub(crate) async fn a_fenced_commit_applies_no_sql() -> Outcome {
    let stage = stage().await?;
    for commits in [0, 1] {
        let mut late = stage.begin().await?;
        late.put(b"k", b"v").await?;
        late.execute(INSERT, &[&"Brazil", &1_i32]).await?;
        late.queue(INSERT, &[&"Chile", &1_i32]).await?;
        stage.begin().await?.commit(advance(commits, commits + 1)).await?;
        let fenced = late.commit(advance(commits, commits + 1)).await;
        ensure!(matches!(fenced, Err(Error::Fenced { .. })), "{fenced:?}");
        ensure!(
            stage.freight()?.is_empty() && stage.value("k").await?.is_none(),
            "applied"
        );
    }
    Ok(())
}

pub(crate) async fn savepoints_undo_sql_only() -> Outcome {
    let stage = stage().await?;
    let mut tx = stage.begin().await?;
    tx.queue(INSERT, &[&"Brazil", &1_i32]).await?;
    tx.queue("SAVEPOINT a", &[]).await?;
    tx.queue(INSERT, &[&"Chile", &1_i32]).await?;
    tx.put(b"k", b"v").await?;
    tx.execute("ROLLBACK TO SAVEPOINT a", &[]).await?;
    tx.execute("RELEASE SAVEPOINT a", &[]).await?;
    tx.queue(INSERT, &[&"Peru", &1_i32]).await?;
    tx.commit(advance(0, 1)).await?;
    ensure!(stage.freight()? == "Brazil|1 Peru|1", "{}", stage.freight()?);
    ensure!(stage.value("k").await?.as_deref() == Some("v"), "the state was undone");
    Ok(())
}
