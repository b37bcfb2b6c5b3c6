//! `journal`: what operators did.

use essentially_once::backend::Journal;
use serde::Serialize;

use crate::{
    failure::Failure,
    output::{json, line, printed, table, time},
    session::Session,
};

#[derive(Serialize)]
struct Entry<'a> {
    at: String,
    by: &'a str,
    action: String,
    reason: &'a str,
}

pub(crate) async fn journal(session: &Session<'_>) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let entries = position.journal.entries().iter().map(|entry| Entry {
        at: time(entry.at),
        by: &entry.by,
        action: entry.action.to_string(),
        reason: &entry.reason,
    });
    if session.cli.json {
        return entries.into_iter().try_for_each(|entry| json(&entry));
    }
    let entries: Vec<_> = entries.collect();
    if entries.is_empty() {
        return line("no operator has changed this consumer");
    }
    let count = entries.len();
    let rows = entries
        .into_iter()
        .map(|entry| vec![entry.at, printed(entry.by), entry.action, printed(entry.reason)]);
    table(&["at", "by", "action", "reason"], rows)?;
    if count == Journal::LIMIT {
        line(&format!("A journal keeps the last {count} entries."))?;
    }
    Ok(())
}
