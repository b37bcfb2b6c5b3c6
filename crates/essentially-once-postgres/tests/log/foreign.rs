//! Programs that use the log with SQL alone.

use std::time::{Duration, Instant};

use essentially_once::{Log as _, NewRecord, backend::Source};

use crate::common::{Outcome, Stage, Times, ensure, payloads, records, soon};

/// The statements in the documentation of `PgLog`.
fn documented() -> Result<String, Source> {
    let text = include_str!("../../src/log/mod.rs");
    let (_, block) = text.split_once("/// ```sql\n").ok_or("there is no SQL")?;
    let (block, _) = block.split_once("/// ```\n").ok_or("it does not end")?;
    let lines = block.lines().map(|line| line.trim_start_matches("///").trim());
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

pub(crate) async fn the_documented_statement_appends() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    log.append(&[NewRecord::new("ours")]).await?;
    for _ in 0..2 {
        stage.sql(&documented()?)?;
    }
    ensure!(
        log.append(&[NewRecord::new("ours")]).await? == Some(3.into()),
        "an offset was used again"
    );
    let found = records(&log).await?;
    ensure!(payloads(&found) == ["ours", "10248", "10248", "ours"], "{found:?}");
    let foreign = &found[1];
    ensure!(
        foreign.key.is_none() && foreign.headers.is_empty() && foreign.origin.is_none() && foreign.malformed.is_none(),
        "{foreign:?}"
    );
    let age = foreign.appended_at.elapsed()?;
    ensure!(age < Duration::from_secs(60), "appended {age:?} ago");
    Ok(())
}

/// A reader that nobody wakes would look 200 ms after it began to wait.
pub(crate) async fn the_documented_notification_wakes_readers() -> Outcome {
    let stage = Stage::start().await?;
    let (log, client, sql) = (stage.pg.log("orders").await?, stage.client().await?, documented()?);
    let mut reader = log.read(0.into()).await?;
    let watch = stage.watch_readers().await?;
    let mut times = Times::new();
    for round in 0..31_u64 {
        let mut begun = Instant::now();
        let before = watch.time().await?;
        let (read, appended) = tokio::join!(soon(reader.next(10)), async {
            watch.until_one_waits(before).await?;
            begun = Instant::now();
            Ok::<_, Source>(client.batch_execute(&sql).await?)
        });
        times.since(begun);
        appended?;
        ensure!(read??[0].offset == round.into(), "another record");
    }
    let half = times.quantile(0.5);
    ensure!(half < Duration::from_millis(100), "not woken, but after {half:?}");
    Ok(())
}

pub(crate) async fn rows_that_cannot_be_decoded_are_malformed_records() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    let odd = [
        ("headers", "'\\xff'"),
        ("producer", "'web'"),
        ("sequence", "7"),
        ("producer, sequence", "'not a producer!', 7"),
    ];
    // Any time is one.
    let times = [("appended_at", "'infinity'"), ("appended_at", "'-infinity'")];
    for (columns, values) in odd.iter().chain(&times) {
        stage.sql(&format!(
            "WITH log AS (UPDATE essentially_once.logs SET next = next + 1 WHERE name = 'orders' RETURNING id, next - 1 AS place)
             INSERT INTO essentially_once.records (log, \"offset\", key, payload, {columns})
                 SELECT id, place, 'k', 'payload', {values} FROM log"
        ))?;
    }
    log.append(&[NewRecord::new("fine")]).await?;
    let found = records(&log).await?;
    for (record, (columns, _)) in found.iter().zip(odd) {
        let why = record.malformed.as_deref();
        ensure!(why.is_some_and(|why| !why.is_empty()), "{columns}: {record:?}");
        ensure!(
            record.payload == "payload" && record.key.as_deref() == Some(b"k"),
            "{columns}: {record:?}"
        );
    }
    ensure!(found.len() == 7 && found[6].malformed.is_none(), "{found:?}");
    Ok(())
}

pub(crate) async fn records_are_readable_with_the_servers_own_tools() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    log.append(&[NewRecord::new("10248").key("Brazil"), NewRecord::new("10249")])
        .await?;
    let rows = stage.sql(
        "SELECT \"offset\", convert_from(key, 'UTF8'), convert_from(payload, 'UTF8'), headers IS NULL,
             now() - appended_at < interval '1 minute'
         FROM essentially_once.records r JOIN essentially_once.logs l ON l.id = r.log WHERE name = 'orders' ORDER BY 1",
    )?;
    ensure!(rows == "0|Brazil|10248|t|t\n1||10249|t|t", "{rows}");
    Ok(())
}
