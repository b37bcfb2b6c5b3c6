//! `pause` and `resume`.

use serde_json::json;

use crate::{
    arguments::Change,
    failure::Failure,
    output::{done, is_wanted},
    session::Session,
};

pub(crate) async fn pause(session: &Session<'_>, change: &Change) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let consumer = session.consumer()?;
    if let (true, Some(paused)) = (change.dry_run, position.journal.paused()) {
        return Err(Failure::refused(format!(
            "consumer {consumer} is paused already, by {}",
            paused.by
        )));
    }
    if !is_wanted(
        session,
        change,
        &format!("pause consumer {consumer} at {}", position.next),
        1,
    )? {
        return Ok(());
    }
    store.pause(consumer, &change.operator()).await?;
    let text = format!("paused consumer {consumer}; `resume` lets it continue");
    done(session, &text, &json!({ "paused": consumer.as_str() }))
}

pub(crate) async fn resume(session: &Session<'_>, change: &Change) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let consumer = session.consumer()?;
    if change.dry_run && position.journal.paused().is_none() {
        return Err(Failure::refused(format!("consumer {consumer} is not paused")));
    }
    if !is_wanted(
        session,
        change,
        &format!("let consumer {consumer} continue at {}", position.next),
        1,
    )? {
        return Ok(());
    }
    store.resume(consumer, &change.operator()).await?;
    let text = format!("consumer {consumer} continues");
    done(session, &text, &json!({ "resumed": consumer.as_str() }))
}
