//! `status` and `lag`: where a consumer is.

use std::time::{Duration, SystemTime};

use essentially_once::{Log, Offset, backend::Position, consumer::dead_letters::LetterFilter};
use serde::Serialize;
use tokio::time::timeout;

use crate::{
    failure::Failure,
    output::{json, line, pairs, time},
    session::Session,
    store::Store,
};

/// How many letters are counted. More are shown as "more than".
const COUNTED: usize = 10_000;

/// How long to wait for a record that should be there.
const READ_LIMIT: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Status {
    consumer: String,
    log: String,
    next: String,
    end: String,
    /// Records that the consumer has not handled; `None` if the log cannot count them.
    lag: Option<u64>,
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
    let status = Status {
        consumer: session.consumer()?.to_string(),
        log: format!("{} in {}", log.id().name(), session.log.shown()),
        next: position.next.to_string(),
        end: log.readable_end().await?.to_string(),
        lag: log.count_from(position.next).await?,
        waits_seconds: waits(&*log, position.next).await?.map(|waits| waits.as_secs_f64()),
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
    let Some(lag) = log.count_from(position.next).await? else {
        return Err(Failure::refused(format!("log {} cannot count its records", log.id())));
    };
    match session.cli.json {
        true => json(&serde_json::json!({ "lag": lag }))?,
        false => line(&lag.to_string())?,
    }
    match max {
        Some(max) if lag > max => Err(Failure::refused(format!("the lag of {lag} records is more than {max}"))),
        _ => Ok(()),
    }
}

fn show(status: &Status) -> Result<(), Failure> {
    let mut rows = vec![
        ("consumer", status.consumer.clone()),
        ("log", status.log.clone()),
        ("position", format!("{}; the log ends at {}", status.next, status.end)),
    ];
    let lag = match (status.lag, status.waits_seconds) {
        (Some(0), _) => "none; it has caught up".into(),
        (lag, waits) => {
            let lag = lag.map_or_else(|| "not counted by this log".into(), |lag| format!("{lag} records"));
            let waits = waits.map(|waits| format!("; the next one has waited {waits:.1} s"));
            lag + &waits.unwrap_or_default()
        }
    };
    rows.push(("lag", lag));
    if let Some(Paused { by, reason, at }) = &status.paused {
        let reason = if reason.is_empty() {
            String::new()
        } else {
            format!(", because of {reason:?}")
        };
        rows.push(("paused", format!("by {by:?} at {at}{reason}")));
    }
    if let Some(Failing {
        offset,
        tries,
        first_reason,
    }) = &status.failing
    {
        rows.push((
            "failing",
            format!("the record at {offset}, {tries} times; at first: {first_reason}"),
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
            (Some(first), Some(reason)) => format!("{more}{count}, {due} due; the first at {first}: {reason}"),
            _ => "none".into(),
        },
    ));
    if let Some(change) = &status.last_change {
        rows.push(("last change", change.clone()));
    }
    pairs(&rows)
}

/// How long the record at `next` has been in the log; `None` if the consumer has caught up.
async fn waits(log: &dyn Log, next: Offset) -> Result<Option<Duration>, Failure> {
    if next >= log.readable_end().await? {
        return Ok(None);
    }
    let mut reader = log.read(next).await?;
    let Ok(records) = timeout(READ_LIMIT, reader.next(1)).await else {
        return Ok(None);
    };
    let appended = records?.first().map(|record| record.appended_at);
    Ok(appended.map(|appended| SystemTime::now().duration_since(appended).unwrap_or_default()))
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
            .letters(session.consumer()?, &LetterFilter::all(), after, 1_000)
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
