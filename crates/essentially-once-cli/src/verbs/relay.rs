//! `relay new-epoch`: what to do after an outbox was restored.

use serde_json::json;

use crate::{
    failure::Failure,
    output::{json as print_json, line},
    session::Session,
};

/// The relay's program computes the new producer, so that it needs no state. This verb finds the
/// offset for it, which is the end of the outbox: receivers know the records before it by their old
/// producer, and would handle them twice under another one.
pub(crate) async fn new_epoch(session: &Session<'_>) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let log = session.open_log(Some(&position)).await?;
    let (next, end) = (position.next, log.bounds().await?.end);
    if session.cli.json {
        return print_json(&json!({ "new_producer_from": end.to_string(), "position": next.to_string() }));
    }
    let name = log.id().name();
    let offset = match end.hi() {
        0 => format!("Offset::from({})", end.lo()),
        hi => format!("Offset::new({hi}, {})", end.lo()),
    };
    line(&format!(
        "{name} ends at {end}, and the relay continues at {next}. If {name} was restored from an older copy, receivers may \
         have seen the numbers from {end} on with other records. Before anything writes to it, start the relay with"
    ))?;
    line("")?;
    line(&format!("    Relay::to(bus).new_producer_from({offset})"))?;
    line("")?;
    line("and leave the call in the program. The records before that keep their producer, so receivers drop copies.")?;
    if next > end {
        line(&format!(
            "The relay's position is past the end, so `seek {end}` before you start it."
        ))?;
    }
    line("If records were written since it was restored, use the offset that the relay's error names instead.")?;
    line("Do not do this if it was not restored.")
}
