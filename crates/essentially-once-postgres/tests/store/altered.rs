//! Tables and statements that change while sessions have prepared statements for them.

use essentially_once::{
    Consumer, Error, HandlerError, KeyValue as _, Log as _, Record,
    backend::{Source, Transaction as _},
    handler_fn,
};
use essentially_once_postgres::PgTx;

use crate::common::{Outcome, Stage, advance, assert_error, code_of, ensure, numbered};

const SELECT: &str = "SELECT * FROM freight";

async fn stage() -> Result<Stage, Source> {
    let stage = Stage::start().await?;
    stage.sql("CREATE TABLE freight (n int)")?;
    Ok(stage)
}

/// The one session of the handle has the statement, and is used again.
pub(crate) async fn an_altered_table_heals_with_the_next_transaction() -> Outcome {
    let stage = stage().await?;
    for (round, is_queued) in [(0, false), (1, true)] {
        let mut tx = stage.begin().await?;
        tx.query(SELECT, &[]).await?;
        tx.commit(advance(2 * round, 1)).await?;
        stage.sql(&format!("ALTER TABLE freight ADD COLUMN added_{round} int"))?;
        let mut tx = stage.begin().await?;
        tx.put(b"k", b"v").await?;
        let failed = match is_queued {
            true => match tx.queue(SELECT, &[]).await {
                Ok(()) => tx.commit(advance(2 * round + 1, 2)).await,
                failed => failed,
            },
            false => tx.query(SELECT, &[]).await.map(drop),
        };
        ensure!(code_of(&failed) == Some("0A000"), "{failed:?}");
        assert_error!(failed, Error::Unavailable { .. }, "the tables have changed");
        ensure!(stage.value("k").await?.is_none(), "applied");
        let mut tx = stage.begin().await?;
        tx.query(SELECT, &[]).await?;
        tx.commit(advance(2 * round + 1, 2)).await?;
    }
    // A consumer goes on by itself.
    let orders = stage.pg.log("orders").await?;
    orders.append(&numbered(0..3)).await?;
    let server = std::sync::Arc::new(stage);
    let admin = std::sync::Arc::clone(&server);
    let handler = handler_fn(move |record: &Record, tx: &mut PgTx| {
        let admin = std::sync::Arc::clone(&admin);
        Box::pin(async move {
            if record.offset == 1.into() {
                admin
                    .sql("ALTER TABLE freight ADD COLUMN IF NOT EXISTS late int")
                    .map_err(HandlerError::fatal)?;
            }
            tx.query(SELECT, &[]).await?;
            Ok(())
        })
    });
    let id = essentially_once::ConsumerId::new("reading")?;
    let consumer = Consumer::essentially_once(id, orders, server.pg.store(), handler).max_batch(1);
    let report = consumer.retries(0).run_until_caught_up().await?;
    ensure!(report.handled == 3 && report.restarts == 1, "{report}");
    Ok(())
}

/// Each of the handle's sessions would otherwise fail once.
pub(crate) async fn all_sessions_heal_when_one_finds_an_altered_table() -> Outcome {
    let stage = stage().await?;
    let mut sessions = Vec::new();
    for _ in 0..3 {
        let mut tx = stage.begin().await?;
        tx.query(SELECT, &[]).await?;
        sessions.push(tx);
    }
    for tx in sessions {
        tx.rollback().await?;
    }
    stage.sql("ALTER TABLE freight ADD COLUMN added int")?;
    let mut tx = stage.begin().await?;
    let failed = tx.query(SELECT, &[]).await;
    assert_error!(failed, Error::Unavailable { .. }, "the tables have changed");
    drop(tx);
    let mut healed = Vec::new();
    for _ in 0..3 {
        let mut tx = stage.begin().await?;
        tx.query(SELECT, &[]).await?;
        healed.push(tx);
    }
    Ok(())
}

pub(crate) async fn statements_that_the_handler_discarded_are_prepared_again() -> Outcome {
    let stage = stage().await?;
    for round in 0..3 {
        let mut tx = stage.begin().await?;
        tx.get(b"k").await?;
        tx.query(SELECT, &[]).await?;
        tx.commit(advance(round, round + 1)).await?;
        let mut tx = stage.begin().await?;
        tx.query(SELECT, &[]).await?;
        tx.execute("DEALLOCATE ALL", &[]).await?;
        let failed = tx.query(SELECT, &[]).await;
        assert_error!(&failed, Error::Unavailable { .. }, "prepared statements");
    }
    Ok(())
}

pub(crate) async fn a_dropped_table_is_a_mistake_until_it_is_back() -> Outcome {
    let stage = stage().await?;
    let read = async || stage.begin().await?.query(SELECT, &[]).await;
    read().await?;
    stage.sql("DROP TABLE freight")?;
    assert_error!(read().await, Error::Failed { .. }, "42P01");
    stage.sql("CREATE TABLE freight (n int)")?;
    read().await?;
    Ok(())
}
