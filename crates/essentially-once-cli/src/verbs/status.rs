//! `status` and `lag`: where a consumer is.

use std::time::{Duration, SystemTime};

use essentially_once::{
    Log, Offset, Record,
    backend::{LogReader, Position},
    consumer::dead_letters::LetterFilter,
};
use serde::Serialize;
use tokio::time::timeout;

use crate::{
    failure::Failure,
    output::{counted, json, line, pairs, printed, time},
    session::Session,
    store::Store,
};

/// How many letters are counted, and how many records of a log that must be read for that. More are
/// shown as "more than".
const COUNTED: usize = 10_000;

/// How many records `lag` reads.
const READ: u64 = 1_000_000;

/// How many records or letters to read at once.
const PAGE: usize = 1_000;

/// How long to wait for a record that should be there.
const READ_LIMIT: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Status {
    consumer: String,
    log: String,
    next: String,
    end: String,
    /// Records that the consumer has not handled.
    lag: u64,
    /// Whether there are more.
    is_lag_cut: bool,
    /// The offset of the next record, which may be past the position. `None` if there is none yet.
    next_record: Option<String>,
    /// How long the next record has been in the log.
    waits_seconds: Option<f64>,
    paused: Option<Paused>,
    /// The record whose last tries failed.
    failing: Option<Failing>,
    dead_letters: Letters,
    last_change: Option<String>,
}

#[derive(Serialize)]
struct Paused {
    by: String,
    reason: String,
    at: String,
}

#[derive(Serialize)]
struct Failing {
    offset: String,
    tries: u32,
    first_reason: String,
}

#[derive(Default, Serialize)]
struct Letters {
    count: usize,
    /// Whether there are more.
    is_cut: bool,
    /// Letters that the running consumer tries next.
    due: usize,
    first: Option<String>,
    first_reason: Option<String>,
}

pub(crate) async fn status(session: &Session<'_>) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let log = session.open_log(Some(&position)).await?;
    let next_record = first_record(&*log, position.next).await?;
    let waited = |record: &Record| SystemTime::now().duration_since(record.appended_at).unwrap_or_default();
    let (lag, is_lag_cut) = count(&*log, position.next, COUNTED as u64).await?;
    let status = Status {
        consumer: session.consumer()?.to_string(),
        log: format!("{} in {}", log.id().name(), session.log.shown()),
        next: position.next.to_string(),
        end: log.readable_end().await?.to_string(),
        lag,
        is_lag_cut,
        next_record: next_record.as_ref().map(|record| record.offset.to_string()),
        waits_seconds: next_record.as_ref().map(|record| waited(record).as_secs_f64()),
        paused: position.journal.paused().map(|paused| Paused {
            by: paused.by.clone(),
            reason: paused.reason.clone(),
            at: time(paused.at),
        }),
        failing: failing(&position),
        dead_letters: letters(session, &*store).await?,
        last_change: position.journal.entries().last().map(ToString::to_string),
    };
    match session.cli.json {
        true => json(&status),
        false => show(&status),
    }
}

pub(crate) async fn lag(session: &Session<'_>, max: Option<u64>) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let log = session.open_log(Some(&position)).await?;
    let limit = max.map_or(READ, |max| max.saturating_add(1));
    let (lag, is_cut) = count(&*log, position.next, limit).await?;
    let shown = match session.cli.json {
        true => json(&serde_json::json!({ "lag": lag, "is_cut": is_cut })),
        false if is_cut => line(&format!("more than {lag}")),
        false => line(&lag.to_string()),
    };
    match max {
        // Also if nobody reads how large it is.
        Some(max) if lag > max => Err(Failure::refused(format!(
            "the lag is more than {}",
            counted(max, "record", "records")
        ))),
        _ => shown,
    }
}

fn show(status: &Status) -> Result<(), Failure> {
    let mut rows = vec![
        ("consumer", status.consumer.clone()),
        ("log", status.log.clone()),
        ("position", format!("{}; the log ends at {}", status.next, status.end)),
    ];
    let lag = match (status.lag, status.waits_seconds) {
        (0, _) => "none; it has caught up".into(),
        (lag, waits) => {
            let more = if status.is_lag_cut { "more than " } else { "" };
            let next = status.next_record.as_deref().zip(waits);
            let next = next.map(|(offset, waits)| format!("; the next one, at {offset}, has waited {waits:.1} s"));
            let lag = counted(lag, "record", "records");
            format!("{more}{lag}{}", next.unwrap_or_default())
        }
    };
    rows.push(("lag", lag));
    if let Some(Paused { by, reason, at }) = &status.paused {
        let reason = match &**reason {
            "" => String::new(),
            reason => format!(": {}", printed(reason)),
        };
        rows.push(("paused", format!("by {} at {at}{reason}", printed(by))));
    }
    if let Some(Failing {
        offset,
        tries,
        first_reason,
    }) = &status.failing
    {
        rows.push((
            "failing",
            format!(
                "the record at {offset}, {}; at first: {}",
                counted((*tries).into(), "failed try", "failed tries"),
                printed(first_reason)
            ),
        ));
    }
    let Letters {
        count,
        is_cut,
        due,
        first,
        first_reason,
    } = &status.dead_letters;
    let more = if *is_cut { "more than " } else { "" };
    rows.push((
        "dead letters",
        match (first, first_reason) {
            (Some(first), Some(reason)) => {
                format!("{more}{count}, {due} due; the first at {first}: {}", printed(reason))
            }
            _ => "none".into(),
        },
    ));
    if let Some(change) = &status.last_change {
        rows.push(("last change", printed(change)));
    }
    pairs(&rows)
}

/// How many records the log holds from `next` on, and whether there are more than that. A log that
/// cannot count is read up to `limit`.
async fn count(log: &dyn Log, next: Offset, limit: u64) -> Result<(u64, bool), Failure> {
    // Fails if the log has no such place, as after it was restored from an older copy.
    let mut reader = log.read(next).await?;
    if let Some(count) = log.count_from(next).await? {
        return Ok((count, false));
    }
    let end = log.readable_end().await?;
    read_up_to(&mut *reader, next, end, limit).await
}

/// How many records the log holds between two places, if that can be found out, and whether there
/// are more than that.
pub(crate) async fn count_between(log: &dyn Log, one: Offset, other: Offset) -> Option<(u64, bool)> {
    let bounds = log.bounds().await.ok()?;
    let from = one.min(other).max(bounds.earliest);
    let until = one.max(other).min(log.readable_end().await.ok()?);
    if from >= until {
        return Some((0, false));
    }
    let mut reader = log.read(from).await.ok()?;
    read_up_to(&mut *reader, from, until, COUNTED as u64).await.ok()
}

/// Counts the records before `end` up to `limit`.
async fn read_up_to(
    reader: &mut dyn LogReader,
    mut next: Offset,
    end: Offset,
    limit: u64,
) -> Result<(u64, bool), Failure> {
    let mut count = 0;
    while count < limit && next < end {
        let Ok(records) = timeout(READ_LIMIT, reader.next(PAGE)).await else {
            return Err(Failure::refused(format!(
                "the log ends at {end}, and no record from {next} on arrived within {} s: the broker is slow, or the last \
                 records were deleted",
                READ_LIMIT.as_secs()
            )));
        };
        for record in records? {
            next = record.offset.successor();
            count += u64::from(record.offset < end);
        }
    }
    Ok((count, count >= limit && next < end))
}

/// The first record at or after `next`; `None` if there is none yet.
async fn first_record(log: &dyn Log, next: Offset) -> Result<Option<Record>, Failure> {
    if next >= log.readable_end().await? {
        return Ok(None);
    }
    let mut reader = log.read(next).await?;
    match timeout(READ_LIMIT, reader.next(1)).await {
        Ok(records) => Ok(records?.into_iter().next()),
        // It was deleted at this moment.
        Err(_) => Ok(None),
    }
}

fn failing(position: &Position) -> Option<Failing> {
    let tried = position.note.tried()?;
    Some(Failing {
        offset: tried.offset().to_string(),
        tries: tried.tries(),
        first_reason: tried.first_reason().into(),
    })
}

async fn letters(session: &Session<'_>, store: &dyn Store) -> Result<Letters, Failure> {
    let now = SystemTime::now();
    let mut letters = Letters::default();
    let mut after = None;
    while letters.count < COUNTED {
        let page = store
            .letters(session.consumer()?, &LetterFilter::all(), after, PAGE)
            .await?;
        let Some(last) = page.last() else {
            return Ok(letters);
        };
        after = Some(last.record.offset);
        if letters.first.is_none() {
            letters.first = Some(page[0].record.offset.to_string());
            letters.first_reason = Some(page[0].last_reason.clone());
        }
        letters.count += page.len();
        letters.due += page
            .iter()
            .filter(|letter| letter.due.is_some_and(|due| due <= now))
            .count();
    }
    letters.is_cut = !store
        .letters(session.consumer()?, &LetterFilter::all(), after, 1)
        .await?
        .is_empty();
    Ok(letters)
}
