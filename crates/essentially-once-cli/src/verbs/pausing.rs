//! `pause` and `resume`.

use serde_json::json;

use crate::{
    arguments::Change,
    failure::Failure,
    output::{done, is_wanted, printed},
    session::Session,
};

pub(crate) async fn pause(session: &Session<'_>, change: &Change) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let consumer = session.consumer()?;
    if let Some(paused) = position.journal.paused() {
        let by = printed(&paused.by);
        return Err(Failure::refused(format!(
            "consumer {consumer} is paused already, by {by}"
        )));
    }
    let what = format!("pause consumer {consumer} at {}", position.next);
    if is_wanted(session, change, &what, 1)? {
        store.pause(consumer, &change.operator()).await?;
        let text = format!("paused consumer {consumer}; `resume` lets it continue");
        done(session, &text, &json!({ "paused": consumer.as_str() }))?;
    }
    Ok(())
}

pub(crate) async fn resume(session: &Session<'_>, change: &Change) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let consumer = session.consumer()?;
    if position.journal.paused().is_none() {
        return Err(Failure::refused(format!("consumer {consumer} is not paused")));
    }
    let what = format!("let consumer {consumer} continue at {}", position.next);
    if is_wanted(session, change, &what, 1)? {
        store.resume(consumer, &change.operator()).await?;
        done(
            session,
            &format!("consumer {consumer} continues"),
            &json!({ "resumed": consumer.as_str() }),
        )?;
    }
    Ok(())
}
