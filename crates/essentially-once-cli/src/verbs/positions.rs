//! `positions`: all consumers of a store.

use essentially_once::{ConsumerId, backend::Position};
use serde::Serialize;

use crate::{
    failure::Failure,
    output::{json, line, table},
    session::Session,
};

#[derive(Serialize)]
struct Row<'a> {
    consumer: &'a str,
    log: String,
    next: String,
    revision: String,
    is_paused: bool,
}

pub(crate) async fn positions(session: &Session<'_>, consumers: &[ConsumerId]) -> Result<(), Failure> {
    let store = session.open_store().await?;
    // The environment names the consumer for all other verbs, so only an argument counts here.
    let given = session.cli.consumer.iter().filter(|_| session.cli.is_consumer_given);
    let named: Vec<_> = given.chain(consumers).cloned().collect();
    let listed = match &named[..] {
        [] => store.consumers().await?.ok_or_else(|| {
            Failure::usage(format!(
                "{} cannot list its consumers: name them, as in `positions shipping billing`",
                session.store.shown()
            ))
        })?,
        _ => named,
    };
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for consumer in &listed {
        match store.position(consumer).await? {
            Some(position) => found.push((consumer, position)),
            None => missing.push(consumer.as_str()),
        }
    }
    let rows = found.iter().map(|(consumer, position)| row(consumer, position));
    if session.cli.json {
        rows.into_iter().try_for_each(|row| json(&row))?;
    } else if found.is_empty() && missing.is_empty() {
        line("no consumer has a position there")?;
    } else if !found.is_empty() {
        let rows = rows.map(|row| {
            let state = if row.is_paused { "paused" } else { "" };
            vec![row.consumer.into(), row.log, row.next, row.revision, state.into()]
        });
        table(&["consumer", "log", "next", "revision", ""], rows)?;
    }
    match &missing[..] {
        [] => Ok(()),
        missing => Err(Failure::refused(format!(
            "no position in {} for {}; check the names",
            session.store.shown(),
            missing.join(", ")
        ))),
    }
}

fn row<'a>(consumer: &'a ConsumerId, position: &Position) -> Row<'a> {
    Row {
        consumer: consumer.as_str(),
        log: position.log.name().into(),
        next: position.next.to_string(),
        revision: position.revision.to_string(),
        is_paused: position.journal.paused().is_some(),
    }
}
