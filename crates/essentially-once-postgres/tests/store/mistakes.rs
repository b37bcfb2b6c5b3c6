//! Mistakes of a handler. They are its own, are never retried as if they could pass, and nothing of
//! their transaction is applied (S6).

use essentially_once::{
    Consumer, Error, HandlerError, KeyValue as _, Log as _, NewRecord, OffsetStore as _, Outbox as _, Record,
    backend::{DeadLetters as _, Transaction as _},
    handler_fn,
};
use essentially_once_postgres::PgTx;

use crate::common::{Outcome, Stage, advance, assert_error, code_of, ensure, soon};

/// Each is refused with this code.
const MISTAKES: [(&str, &str); 13] = [
    ("SELEKT 1", "42601"),
    ("SELECT 1; SELECT 2", "42601"),
    ("SELECT * FROM missing", "42P01"),
    ("SELECT missing FROM orders", "42703"),
    ("INSERT INTO orders VALUES (NULL)", "23502"),
    ("INSERT INTO orders VALUES (1)", "23505"),
    ("SELECT 1 / (n - n) FROM orders", "22012"),
    ("SELECT 'a'::text::int", "22P02"),
    ("INSERT INTO totals VALUES (1)", "55000"),
    ("SELECT currval('numbers')", "55000"),
    ("SELECT * FROM other.public.orders", "0A000"),
    ("VACUUM", "25001"),
    ("DO $$ BEGIN COMMIT; END $$", "2D000"),
];

async fn stage() -> Result<Stage, essentially_once::backend::Source> {
    let stage = Stage::start().await?;
    stage.sql(
        "CREATE TABLE orders (n int PRIMARY KEY); INSERT INTO orders VALUES (1);
         CREATE VIEW totals AS SELECT count(*) FROM orders; CREATE SEQUENCE numbers",
    )?;
    Ok(stage)
}

pub(crate) async fn after_a_mistake_the_transaction_can_only_be_rolled_back() -> Outcome {
    let stage = stage().await?;
    let mistakes = MISTAKES.iter().map(|(sql, _)| *sql).chain(["COMMIT"]);
    for sql in mistakes {
        let mut tx = stage.begin().await?;
        tx.put(b"k", b"v").await?;
        tx.send("out", NewRecord::new("sent")).await?;
        tx.execute("INSERT INTO orders VALUES (2)", &[]).await?;
        // The handler ignores the error.
        drop(tx.execute(sql, &[]).await.expect_err(sql));
        let refused = |result: Result<(), Error>| {
            assert_error!(result, Error::Failed { .. }, "only be rolled back", "shipping");
        };
        refused(tx.execute("SELECT 1", &[]).await.map(drop));
        refused(tx.query("SELECT 1", &[]).await.map(drop));
        refused(tx.query_opt("SELECT 1", &[]).await.map(drop));
        refused(tx.queue("SELECT 1", &[]).await);
        refused(tx.execute("ROLLBACK TO a", &[]).await.map(drop));
        refused(tx.get(b"k").await.map(drop));
        refused(tx.put(b"k", b"w").await);
        refused(tx.delete(b"k").await);
        refused(tx.send("out", NewRecord::new("sent")).await);
        refused(tx.total().await.map(drop));
        refused(tx.commit(advance(0, 1)).await);
        ensure!(stage.sql("SELECT count(*) FROM orders")? == "1", "applied: {sql}");
        ensure!(
            stage.commits().await? == 0 && stage.value("k").await?.is_none(),
            "applied: {sql}"
        );
    }
    ensure!(stage.pg.log("out").await?.bounds().await?.end == 0.into(), "sent");
    Ok(())
}

pub(crate) async fn a_mistake_of_the_handler_is_not_a_passing_error() -> Outcome {
    let stage = stage().await?;
    for (sql, code) in MISTAKES {
        let failed = stage.begin().await?.execute(sql, &[]).await;
        ensure!(code_of(&failed) == Some(code), "{sql}: {failed:?}");
        assert_error!(
            &failed,
            Error::Failed { .. },
            code,
            "run SQL in a transaction of consumer shipping"
        );
        // Twice on one session, where it may be prepared.
        let mut tx = stage.begin().await?;
        if tx.queue(sql, &[]).await.is_ok() {
            assert_error!(
                tx.commit(advance(0, 1)).await,
                Error::Failed { .. },
                code,
                "run queued SQL"
            );
        }
    }
    Ok(())
}

/// If it took them for passing errors, it would try again forever.
pub(crate) async fn a_consumer_stops_at_a_mistake() -> Outcome {
    let stage = stage().await?;
    let orders = stage.pg.log("orders").await?;
    orders.append(&[NewRecord::new("0")]).await?;
    for (sql, code) in MISTAKES {
        let handler = handler_fn(move |_: &Record, tx: &mut PgTx| {
            Box::pin(async move {
                // The error is ignored, so that only the commit can stop it.
                drop(tx.execute(sql, &[]).await);
                Ok::<_, HandlerError>(())
            })
        });
        let consumer = Consumer::essentially_once(stage.consumer.clone(), orders.clone(), stage.pg.store(), handler);
        let ended = soon(consumer.retries(0).run_until_caught_up()).await?;
        ensure!(
            matches!(&ended, Err(error) if error.to_string().contains(code)),
            "{sql}: {ended:?}"
        );
    }
    // The consumer may have noted how often it tried.
    let position = stage.store.position(&stage.consumer).await?;
    ensure!(
        position.is_none_or(|position| position.next == 0.into()),
        "the position moved"
    );
    Ok(())
}

pub(crate) async fn the_handler_cannot_end_the_transaction() -> Outcome {
    let stage = stage().await?;
    for sql in [
        "COMMIT",
        " commit ;",
        "/* why */ COMMIT AND CHAIN",
        "-- why\nEND",
        "ROLLBACK",
        "ROLLBACK AND CHAIN",
        "ABORT",
        "BEGIN",
        "START TRANSACTION",
        "PREPARE TRANSACTION 'a'",
        "COMMIT PREPARED 'a'",
        "ROLLBACK PREPARED 'a'",
    ] {
        for is_queued in [false, true] {
            let mut tx = stage.begin().await?;
            tx.execute("INSERT INTO orders VALUES (2)", &[]).await?;
            let refused = match is_queued {
                true => tx.queue(sql, &[]).await,
                false => tx.execute(sql, &[]).await.map(drop),
            };
            assert_error!(
                refused,
                Error::Failed { .. },
                "cannot begin or end transactions",
                "savepoints"
            );
            assert_error!(tx.commit(advance(0, 1)).await, Error::Failed { .. }, "savepoints");
            ensure!(stage.sql("SELECT count(*) FROM orders")? == "1", "applied: {sql}");
        }
    }
    // A procedure cannot either.
    stage.sql("CREATE PROCEDURE finish() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$")?;
    let mut tx = stage.begin().await?;
    tx.execute("INSERT INTO orders VALUES (2)", &[]).await?;
    let refused = tx.execute("CALL finish()", &[]).await;
    assert_error!(refused, Error::Failed { .. }, "invalid transaction termination");
    drop(tx);
    ensure!(
        stage.sql("SELECT count(*) FROM orders")? == "1",
        "applied by a procedure"
    );
    Ok(())
}

pub(crate) async fn the_wrong_number_of_parameters_is_named() -> Outcome {
    let stage = stage().await?;
    const INSERT: &str = "INSERT INTO orders VALUES ($1)";
    for is_queued in [false, true] {
        let mut tx = stage.begin().await?;
        let refused = match is_queued {
            true => tx.queue(INSERT, &[&2_i32, &3_i32]).await,
            false => tx.execute(INSERT, &[]).await.map(drop),
        };
        let given = if is_queued { "2 values" } else { "0 values" };
        assert_error!(refused, Error::Failed { .. }, "has 1 parameters", given);
        assert_error!(tx.commit(advance(0, 1)).await, Error::Failed { .. }, "has 1 parameters");
    }
    let mut tx = stage.begin().await?;
    let refused = tx.execute(INSERT, &[&"text"]).await;
    assert_error!(refused, Error::Failed { .. }, "the value of $1", "int4");
    // The session is as good as before.
    let mut tx = stage.begin().await?;
    tx.execute(INSERT, &[&2_i32]).await?;
    tx.commit(advance(0, 1)).await?;
    ensure!(stage.sql("SELECT count(*) FROM orders")? == "2", "not applied");
    Ok(())
}
