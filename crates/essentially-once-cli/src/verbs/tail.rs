//! `tail`: records of a log.

#[cfg(unix)]
use std::io;

use essentially_once::{Log, Offset, Record};
use serde::Serialize;
use tokio::time::{Duration, timeout};

use crate::{
    failure::Failure,
    output::{Data, brief, headers, json, line, time},
    session::Session,
};

/// How many records to read at once.
const PAGE: usize = 100;

/// How long to wait for records that existed a moment ago.
const READ_LIMIT: Duration = Duration::from_secs(10);

#[derive(Serialize)]
struct Row {
    offset: String,
    appended_at: String,
    key: Option<Data>,
    origin: Option<String>,
    headers: Vec<(String, Data)>,
    payload: Data,
    malformed: Option<String>,
}

/// How many records to show by default.
const LINES: u64 = 10;

/// How often to look whether anybody still reads the output while no record arrives.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(crate) async fn tail(
    session: &Session<'_>,
    lines: Option<u64>,
    from: Option<Offset>,
    follow: bool,
) -> Result<(), Failure> {
    if follow && from.is_some() && lines.is_some() {
        return Err(Failure::usage(
            "`--follow` shows all records from `--from` on: leave `-n` or `--follow` out",
        ));
    }
    let lines = lines.unwrap_or(LINES);
    let position = match (&session.log.log, &session.cli.consumer) {
        (None, Some(_)) => Some(session.position(&*session.open_store().await?).await?),
        _ => None,
    };
    let log = session.open_log(position.as_ref()).await?;
    let mut next = match from {
        Some(from) => from,
        None => log.tail(lines).await?.ok_or_else(|| {
            Failure::refused("this log cannot tell where its last records begin; give `--from OFFSET`")
        })?,
    };
    // Last, so that the log holds as many records before it.
    let end = log.readable_end().await?;
    let mut reader = log.read(next).await.map_err(Failure::of_place)?;
    let mut left = lines;
    while follow || (left > 0 && next < end) {
        let records = match follow {
            true => match timeout(LOOK_EVERY, reader.next(PAGE)).await {
                Ok(records) => records?,
                Err(_) if is_output_closed() => return Err(Failure::ClosedOutput),
                Err(_) => continue,
            },
            false => match timeout(READ_LIMIT, reader.next(PAGE)).await {
                Ok(records) => records?,
                Err(_) => {
                    return Err(Failure::refused(
                        "no record arrived within 10 s; the last ones may have been deleted",
                    ));
                }
            },
        };
        for record in records {
            if !follow && (left == 0 || record.offset >= end) {
                return Ok(());
            }
            next = record.offset.successor();
            left = left.saturating_sub(1);
            print(session, &record)?;
        }
    }
    Ok(())
}

/// Whether nobody reads the output any more. A write would say so too, but it needs a record.
#[cfg(unix)]
fn is_output_closed() -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    let stdout = io::stdout();
    let mut output = [PollFd::new(&stdout, PollFlags::empty())];
    let polled = poll(&mut output, Some(&Timespec::default()));
    let closed = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
    polled.is_ok() && output[0].revents().intersects(closed)
}

#[cfg(not(unix))]
fn is_output_closed() -> bool {
    false
}

fn print(session: &Session<'_>, record: &Record) -> Result<(), Failure> {
    if session.cli.json {
        return json(&Row {
            offset: record.offset.to_string(),
            appended_at: time(record.appended_at),
            key: record.key.clone().map(Data),
            origin: record.origin.as_ref().map(ToString::to_string),
            headers: headers(record),
            payload: Data(record.payload.clone()),
            malformed: record.malformed.as_deref().map(str::to_owned),
        });
    }
    line(&format!(
        "{}  {} {}",
        record.offset,
        time(record.appended_at),
        brief(record)
    ))
}
