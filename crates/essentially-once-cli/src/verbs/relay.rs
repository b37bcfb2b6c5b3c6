//! `relay new-epoch`: what to do after an outbox was restored.

use serde_json::json;

use crate::{
    failure::Failure,
    output::{json as print_json, line},
    session::Session,
};

/// The relay's program computes the new producer, so that it needs no state. This verb finds the
/// offset for it.
pub(crate) async fn new_epoch(session: &Session<'_>) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let log = session.open_log(Some(&position)).await?;
    let (next, end) = (position.next, log.readable_end().await?);
    if session.cli.json {
        return print_json(&json!({ "new_producer_from": next.to_string(), "end": end.to_string() }));
    }
    let offset = match next.hi() {
        0 => format!("Offset::from({})", next.lo()),
        hi => format!("Offset::new({hi}, {})", next.lo()),
    };
    line(&format!(
        "The relay has sent the records of {} before {next}; the outbox ends at {end}. If it was restored from an older \
         copy, receivers may have seen the numbers from {next} on with other records. Then start the relay with",
        log.id().name()
    ))?;
    line("")?;
    line(&format!("    Relay::to(bus).new_producer_from({offset})"))?;
    line("")?;
    line("and leave the call in the program. Do not do this if the outbox was not restored.")
}
