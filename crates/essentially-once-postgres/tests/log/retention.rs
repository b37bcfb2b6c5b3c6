//! Which records a log keeps.

use std::{sync::Arc, time::Duration};

use essentially_once::{CancellationToken, Error, Log as _, Offset};
use essentially_once_postgres::{LogOptions, Pg, PgLog, Retention};
use test_servers::eventually;
use tokio::sync::watch;

use crate::common::{Outcome, Stage, assert_error, ensure, numbered, records, soon};

async fn keeping(pg: &Pg, retention: Retention) -> Result<PgLog, Error> {
    pg.log_with("orders", LogOptions::new().retention(retention)).await
}

/// Appends until the log has no more records than these.
async fn shrinks(log: &PgLog, most: u64) -> Outcome {
    eventually(async || {
        log.append(&numbered(0..1)).await?;
        let bounds = log.bounds().await?;
        Ok(match bounds.end.lo() - bounds.earliest.lo() {
            kept if kept <= most => Ok(()),
            kept => Err(format!("{kept} records are left")),
        })
    })
    .await
}

pub(crate) async fn appends_remove_records_over_the_number() -> Outcome {
    let stage = Stage::start().await?;
    stage.pg.log("orders").await?.append(&numbered(0..500)).await?;
    let log = keeping(&stage.pg, Retention::new().max_records(10)).await?;
    ensure!(
        log.bounds().await?.earliest == 0.into(),
        "opening it has removed records"
    );
    // Some may be appended before the others are removed.
    shrinks(&log, 11).await?;
    // In the background, too.
    let rows = "SELECT count(*), next - earliest FROM essentially_once.records, essentially_once.logs GROUP BY 2";
    eventually(async || {
        let rows = stage.sql(rows)?;
        let (rows, kept) = rows.split_once('|').ok_or("no columns")?;
        Ok(match rows == kept {
            true => Ok(()),
            false => Err(format!("{rows} rows for {kept} records")),
        })
    })
    .await?;
    let (bounds, found) = (log.bounds().await?, records(&log).await?);
    ensure!(
        found[0].offset == bounds.earliest && found.len() >= 10,
        "{bounds:?}, {}",
        found.len()
    );
    // A reader that is behind learns what it has lost.
    let behind = log.read(Offset::ZERO).await.map(drop);
    ensure!(
        matches!(behind, Err(Error::Truncated { earliest, .. }) if earliest == bounds.earliest),
        "{behind:?}"
    );
    Ok(())
}

pub(crate) async fn appends_remove_records_over_the_age() -> Outcome {
    let stage = Stage::start().await?;
    stage.pg.log("orders").await?.append(&numbered(0..500)).await?;
    let log = keeping(&stage.pg, Retention::new().max_age(Duration::from_secs(1))).await?;
    shrinks(&log, 400).await?;
    let now =
        stage.sql("SELECT extract(epoch FROM clock_timestamp() - min(appended_at)) FROM essentially_once.records")?;
    let is_recent = now.parse::<f64>()? < 30.0;
    ensure!(is_recent, "the oldest is from {now} seconds ago");
    // Of an hour, nothing expires. The other log may still be trimmed in the background.
    let hour = LogOptions::new().retention(Retention::new().max_age(Duration::from_secs(3_600)));
    let log = stage.pg.log_with("letters", hour).await?;
    log.append(&numbered(0..5)).await?;
    ensure!(
        log.trim().await? == 0 && records(&log).await?.len() == 5,
        "too many were removed"
    );
    Ok(())
}

/// PostgreSQL's dates begin in the year 4713 BC.
pub(crate) async fn a_retention_of_ages_keeps_everything() -> Outcome {
    let stage = Stage::start().await?;
    for years in [10_000, 300_000, 290_000_000] {
        let age = Duration::from_secs(years * 365 * 24 * 3_600);
        let log = keeping(&stage.pg, Retention::new().max_age(age)).await?;
        log.append(&numbered(0..1)).await?;
        ensure!(
            log.trim().await? == 0 && log.bounds().await?.earliest == 0.into(),
            "removed"
        );
        ensure!(
            log.retention().await? == Retention::new().max_age(age),
            "another one is stored"
        );
    }
    Ok(())
}

pub(crate) async fn limits_that_cannot_be_kept_are_refused() -> Outcome {
    let stage = Stage::start().await?;
    for (retention, why) in [
        (Retention::new().max_records(0), "max_records"),
        (Retention::new().max_age(Duration::ZERO), "max_age"),
        (Retention::new().max_age(Duration::MAX), "max_age"),
        (Retention::new().max_records(u64::MAX), "max_records"),
        (Retention::new().max_bytes(1_000), "max_bytes"),
    ] {
        assert_error!(keeping(&stage.pg, retention).await, Error::InvalidSetting { .. }, why);
    }
    ensure!(
        stage.sql("SELECT count(*) FROM essentially_once.logs")? == "0",
        "it was created"
    );
    Ok(())
}

pub(crate) async fn the_last_opened_retention_holds_for_all() -> Outcome {
    let stage = Stage::start().await?;
    let first = keeping(&stage.pg, Retention::new().max_records(5)).await?;
    first.append(&numbered(0..20)).await?;
    let other = stage.other().await?;
    // Opening it without a retention changes nothing.
    ensure!(
        other.log("orders").await?.retention().await? == Retention::new().max_records(5),
        "changed"
    );
    keeping(&other, Retention::new().max_records(15)).await?;
    first.trim().await?;
    let bounds = first.bounds().await?;
    ensure!(bounds.earliest.lo() == 5 || bounds.earliest.lo() == 15, "{bounds:?}");
    keeping(&other, Retention::new()).await?;
    first.append(&numbered(0..50)).await?;
    first.trim().await?;
    ensure!(records(&first).await?.len() >= 50, "it keeps everything now");
    Ok(())
}

pub(crate) async fn records_are_removed_while_appends_go_on() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    log.append(&numbered(0..1)).await?;
    let stop = CancellationToken::new();
    let (other, stopped) = (stage.other().await?.log("orders").await?, stop.clone());
    let (progress, mut appends) = watch::channel(());
    let appending = tokio::spawn(async move {
        let mut next = 1;
        while !stopped.is_cancelled() {
            let appended = other.append(&numbered(0..3)).await?;
            next += 3;
            assert_eq!(appended, Some((next - 1).into()));
            progress.send_replace(());
        }
        Ok::<_, Error>(next)
    });
    let mut removed = 0;
    for _ in 0..30 {
        // Each time there is something to remove.
        soon(appends.changed()).await??;
        let bounds = log.bounds().await?;
        let middle = Offset::from(bounds.earliest.lo() + (bounds.end.lo() - bounds.earliest.lo()) / 2);
        removed += log.remove_before(middle).await?;
        ensure!(
            log.bounds().await?.earliest == middle && removed == middle.lo(),
            "{removed} before {middle}"
        );
    }
    stop.cancel();
    let end = soon(appending).await???;
    let found = records(&log).await?;
    ensure!(
        found.first().is_some_and(|first| first.offset == removed.into()),
        "the beginning"
    );
    ensure!(
        found.len() as u64 == end - removed && removed > 0,
        "{} of {end} are left",
        found.len()
    );
    // Past the end there is nothing to remove.
    let past = log.remove_before((end + 1).into()).await;
    ensure!(matches!(past, Err(Error::OutOfRange { .. })), "{past:?}");
    ensure!(
        log.remove_before(end.into()).await? == found.len() as u64,
        "all of them"
    );
    ensure!(
        log.append(&numbered(0..1)).await? == Some(end.into()),
        "an offset was used again"
    );
    Ok(())
}

pub(crate) async fn many_records_are_removed_in_steps() -> Outcome {
    let stage = Stage::start().await?;
    let log = keeping(&stage.pg, Retention::new().max_records(7)).await?;
    stage.sql(
        "WITH log AS (UPDATE essentially_once.logs SET next = 45000 WHERE name = 'orders' RETURNING id)
         INSERT INTO essentially_once.records (log, \"offset\", payload) SELECT id, place, '' FROM log, generate_series(0, 44999) AS place",
    )?;
    ensure!(log.trim().await? == 44_993, "the number of removed records");
    ensure!(
        log.bounds().await?.earliest == 44_993.into() && records(&log).await?.len() == 7,
        "the rest"
    );
    Ok(())
}

/// The log gets another incarnation, and the same row, while the trim waits for the row.
pub(crate) async fn a_trim_of_an_old_handle_removes_nothing_of_a_recreated_log() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    stage.pg.log("orders").await?.append(&numbered(0..50)).await?;
    let old = keeping(&stage.pg, Retention::new().max_records(1)).await?;
    let mut client = stage.client().await?;
    for is_trim in [true, false] {
        let tx = client.transaction().await?;
        tx.batch_execute("UPDATE essentially_once.logs SET incarnation = md5(incarnation)")
            .await?;
        let end = if is_trim { 1 } else { 49 };
        let (removed, done) = tokio::join!(
            async {
                match is_trim {
                    true => old.trim().await,
                    false => old.remove_before(end.into()).await,
                }
            },
            async {
                stage.until_locked(1).await?;
                tx.commit().await?;
                Ok::<_, essentially_once::backend::Source>(())
            }
        );
        done?;
        ensure!(matches!(removed, Ok(0) | Err(_)), "it removed {removed:?} records");
        let left = stage.sql("SELECT count(*) FROM essentially_once.records")?;
        ensure!(left == "50", "{left} are left");
        // For the second round, the old handle is one of the log again.
        stage.sql(&format!(
            "UPDATE essentially_once.logs SET incarnation = '{}'",
            old.id().incarnation().unwrap_or_default()
        ))?;
    }
    Ok(())
}
