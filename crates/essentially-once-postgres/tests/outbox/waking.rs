//! How soon readers of another handle, as in another process, find new records.

use std::time::{Duration, Instant};

use essentially_once::{
    Log as _, NewRecord, Outbox as _,
    backend::{Source, Transaction as _},
};

use crate::common::{Outcome, Stage, Times, advance, ensure, soon};

const ROUNDS: u64 = 100;
/// A machine that is busy with other tests may disturb one of them.
const TRIES: u64 = 3;

/// A reader that nobody wakes looks every 200 ms.
const WOKEN: Duration = Duration::from_millis(100);

/// Shows how long it took from before the append to the record, and whether the reader was woken.
fn are_woken(times: &Times, what: &str) -> bool {
    let (half, most, all) = (times.quantile(0.5), times.quantile(0.99), times.quantile(1.0));
    eprintln!("{what}: {half:?}, {most:?} in 99 of 100 rounds, {all:?} at most");
    most < WOKEN
}

pub(crate) async fn readers_of_another_handle_wake_at_once() -> Outcome {
    let stage = Stage::start().await?;
    let (log, other) = (stage.pg.log("orders").await?, stage.other().await?.log("orders").await?);
    let mut reader = other.read(0.into()).await?;
    let watch = stage.watch_readers().await?;
    for one_try in 0..TRIES {
        let mut times = Times::new();
        for round in one_try * ROUNDS..(one_try + 1) * ROUNDS {
            let mut begun = Instant::now();
            let before = watch.time().await?;
            let (read, appended) = tokio::join!(soon(reader.next(10)), async {
                watch.until_one_waits(before).await?;
                begun = Instant::now();
                Ok::<_, Source>(log.append(&[NewRecord::new(round.to_string())]).await?)
            });
            times.since(begun);
            appended?;
            ensure!(read??[0].offset == round.into(), "another record");
        }
        if are_woken(&times, "an append, read by another handle") {
            return Ok(());
        }
    }
    Err("the reader was not woken".into())
}

pub(crate) async fn readers_wake_after_a_handlers_commit() -> Outcome {
    for what in ["this", "another"] {
        let stage = Stage::start().await?;
        let reading = match what {
            "this" => stage.pg.clone(),
            _ => stage.other().await?,
        };
        let mut reader = reading.log("out").await?.read(0.into()).await?;
        let mut is_woken = false;
        for one_try in 0..TRIES {
            let mut times = Times::new();
            for round in one_try * ROUNDS..(one_try + 1) * ROUNDS {
                let mut begun = Instant::now();
                let (read, committed) = tokio::join!(soon(reader.next(10)), async {
                    let mut tx = stage.begin().await?;
                    tx.send("out", NewRecord::new(round.to_string())).await?;
                    begun = Instant::now();
                    tx.commit(advance(round, 1)).await
                });
                times.since(begun);
                committed?;
                ensure!(read??[0].offset == round.into(), "another record");
            }
            is_woken = are_woken(&times, &format!("a commit, read by {what} handle"));
            if is_woken {
                break;
            }
        }
        ensure!(is_woken, "the reader of {what} handle was not woken");
    }
    Ok(())
}

/// Those who append in a transaction of their own notify nobody.
pub(crate) async fn without_notifications_readers_find_records_by_looking() -> Outcome {
    let stage = Stage::start().await?;
    let (log, other) = (stage.pg.log("orders").await?, stage.other().await?.log("orders").await?);
    let mut reader = other.read(0.into()).await?;
    log.append(&[NewRecord::new("0")]).await?;
    soon(reader.next(1)).await??;
    let mut client = stage.client().await?;
    for round in 1..20_u64 {
        let (read, appended) = tokio::join!(soon(reader.next(10)), async {
            // The sessions that listen are sometimes lost, too.
            if round % 5 == 0 {
                stage.sql(
                    "SELECT count(pg_terminate_backend(pid, 60000)) FROM pg_stat_activity
                         WHERE application_name = 'essentially-once' AND query ~ 'LISTEN|pg_notify'",
                )?;
            }
            let tx = client.transaction().await?;
            log.append_in(&tx, &[NewRecord::new(round.to_string())]).await?;
            tx.commit().await?;
            Ok::<_, essentially_once::backend::Source>(Instant::now())
        });
        let (records, waited) = (read??, appended?.elapsed());
        ensure!(records[0].offset == round.into(), "another record");
        ensure!(waited < Duration::from_secs(1), "it waited for {waited:?}");
    }
    Ok(())
}
