//! What a transaction sees of others, and what of it fails.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use essentially_once::{
    Consumer, Error, HandlerError, KeyValue as _, Log as _, OffsetStore as _, Record,
    backend::{Owner, Transaction as _},
    consumer::Report,
    handler_fn,
};
use essentially_once_postgres::{Isolation, PgOptions, PgTx};

use crate::common::{Outcome, Stage, advance, assert_error, code_of, ensure, numbered};

const LEVELS: [Isolation; 3] = [
    Isolation::ReadCommitted,
    Isolation::RepeatableRead,
    Isolation::Serializable,
];

async fn stage(isolation: Isolation) -> Result<Stage, essentially_once::backend::Source> {
    let stage = Stage::with(PgOptions::new().isolation(isolation), &[]).await?;
    stage.sql(
        "CREATE TABLE totals (name text PRIMARY KEY, n int NOT NULL); INSERT INTO totals VALUES ('a', 0), ('b', 0)",
    )?;
    Ok(stage)
}

/// Counts three records, while another program changes the same row in the middle of the second
/// record's first transaction.
async fn count_beside_a_writer(stage: Stage) -> Result<(Report, String), essentially_once::backend::Source> {
    let orders = stage.pg.log("orders").await?;
    orders.append(&numbered(0..3)).await?;
    let writes = Arc::new(AtomicU64::new(0));
    let stage = Arc::new(stage);
    let other = Arc::clone(&stage);
    let handler = handler_fn(move |record: &Record, tx: &mut PgTx| {
        let (other, writes) = (Arc::clone(&other), Arc::clone(&writes));
        Box::pin(async move {
            // The snapshot of the higher levels is of this moment.
            tx.query("SELECT n FROM totals WHERE name = 'a'", &[]).await?;
            if record.offset == 1.into() && writes.fetch_add(1, Ordering::SeqCst) == 0 {
                other
                    .sql("UPDATE totals SET n = n + 100 WHERE name = 'a'")
                    .map_err(HandlerError::fatal)?;
            }
            tx.execute("UPDATE totals SET n = n + 1 WHERE name = 'a'", &[]).await?;
            Ok(())
        })
    });
    let consumer = Consumer::essentially_once(stage.consumer.clone(), orders, stage.pg.store(), handler);
    let report = consumer.retries(0).max_batch(1).run_until_caught_up().await?;
    let total = stage.sql("SELECT n FROM totals WHERE name = 'a'")?;
    Ok((report, total))
}

pub(crate) async fn a_conflicting_writer_makes_a_repeatable_read_start_again() -> Outcome {
    for level in [Isolation::RepeatableRead, Isolation::Serializable] {
        let (report, total) = count_beside_a_writer(stage(level).await?).await?;
        ensure!(total == "103" && report.handled == 3, "{level:?}: {total}, {report}");
        ensure!(report.restarts == 1 && report.fenced == 0, "{level:?}: {report}");
    }
    Ok(())
}

pub(crate) async fn a_conflicting_writer_does_not_disturb_read_committed() -> Outcome {
    let (report, total) = count_beside_a_writer(stage(Isolation::ReadCommitted).await?).await?;
    ensure!(
        total == "103" && report.handled == 3 && report.restarts == 0,
        "{total}, {report}"
    );
    Ok(())
}

/// Each reads what the other one writes.
async fn skew(level: Isolation) -> Result<(Result<(), Error>, String), essentially_once::backend::Source> {
    let stage = stage(level).await?;
    let other = essentially_once::ConsumerId::new("other")?;
    let (mut a, mut b) = (stage.begin().await?, stage.store.begin(&other).await?);
    for (tx, written) in [(&mut a, "a"), (&mut b, "b")] {
        tx.query("SELECT sum(n) FROM totals", &[]).await?;
        tx.execute("UPDATE totals SET n = n + 1 WHERE name = $1", &[&written])
            .await?;
    }
    a.commit(advance(0, 1)).await?;
    let late = b.commit(advance(0, 1)).await;
    Ok((late, stage.sql("SELECT sum(n) FROM totals")?))
}

pub(crate) async fn one_of_two_serializable_transactions_that_skew_fails() -> Outcome {
    let (late, total) = skew(Isolation::Serializable).await?;
    ensure!(code_of(&late) == Some("40001") && total == "1", "{late:?}, {total}");
    assert_error!(
        late,
        Error::Unavailable { .. },
        "commit in a transaction of consumer other"
    );
    let (late, total) = skew(Isolation::RepeatableRead).await?;
    ensure!(
        late.is_ok() && total == "2",
        "the test shows nothing: {late:?}, {total}"
    );
    Ok(())
}

pub(crate) async fn beats_and_releases_fail_no_open_transaction() -> Outcome {
    for level in LEVELS {
        let stage = stage(level).await?;
        let (owner, other) = (Owner::draw(), Owner::draw());
        let mut first = advance(0, 1);
        first.owner = Some(owner);
        stage.begin().await?.commit(first).await?;
        let mut tx = stage.begin().await?;
        tx.put(b"k", b"v").await?;
        tx.get(b"other").await?;
        tx.query("SELECT * FROM totals", &[]).await?;
        for beats in 1..=3 {
            stage.store.beat(&stage.consumer, owner).await?;
            let pulse = stage.store.pulse(&stage.consumer).await?;
            ensure!(pulse.beats == beats && pulse.owner == Some(owner), "{pulse:?}");
        }
        stage.store.beat(&stage.consumer, other).await?;
        stage.store.release(&stage.consumer, other).await?;
        let mut second = advance(1, 2);
        second.owner = Some(owner);
        tx.commit(second).await.map_err(|error| format!("{level:?}: {error}"))?;
        ensure!(
            stage.store.pulse(&stage.consumer).await?.beats == 3,
            "another's beat counts"
        );
    }
    Ok(())
}

pub(crate) async fn a_stale_revision_is_fenced_at_every_level() -> Outcome {
    for level in LEVELS {
        let stage = stage(level).await?;
        for commits in [0, 1] {
            let mut late = stage.begin().await?;
            // The snapshot is older than the other's commit.
            late.query("SELECT * FROM totals", &[]).await?;
            late.execute("UPDATE totals SET n = 7", &[]).await?;
            stage.begin().await?.commit(advance(commits, 1)).await?;
            let fenced = late.commit(advance(commits, 1)).await;
            ensure!(matches!(fenced, Err(Error::Fenced { .. })), "{level:?}: {fenced:?}");
        }
        ensure!(stage.sql("SELECT max(n) FROM totals")? == "0", "{level:?}: applied");
    }
    Ok(())
}
