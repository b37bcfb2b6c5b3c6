//! Removes the records that every consumer of a log has passed.

use super::resume::compare;
use crate::{ConsumerId, Error, Log, Offset, OffsetStore, Position};

/// Removes the records of a log that all of these consumers have passed, and returns how many it
/// removed. It keeps an outbox small: call it from time to time, for instance once a minute, from
/// any process.
///
/// **Name every consumer that reads the log, relays included.** The records that a consumer still
/// needs are removed if its name is missing here, and its run then ends with
/// [`Error::Truncated`]. All of the consumers keep their position in `store`. If several stores
/// hold the positions of a log's consumers, compare the positions yourself, and call
/// [`Log::remove_before`].
///
/// The last record that the slowest consumer passed stays in the log. A position recognizes its log
/// by that record, so that it notices if the log is replaced or restored from an older copy.
///
/// Consumers can run meanwhile, and so can several of these calls, since a position only moves
/// forward. The exception is an operator who moves a consumer back with [`seek`](crate::seek).
/// `seek` fails with [`Error::Truncated`] if the records there are gone. If it moves the position
/// while this call removes them, the consumer's next run ends with that error.
///
/// A dead letter holds its own copy of its record, so it can still be retried. `seek` refuses to go
/// back past a letter whose record is gone.
///
/// # Errors
/// After one of the first four, nothing was removed.
/// - [`Error::Failed`] if no consumer is named, or if one of them has no position yet.
/// - [`Error::WrongLog`] if the position of a consumer belongs to another log.
/// - [`Error::OutOfRange`] or [`Error::LogChanged`] if a position does not fit the log.
/// - [`Error::Failed`] if the log [cannot remove records](Log::remove_before).
/// - The backends' own errors. Some of the records may have been removed. Call it again.
///
/// Dropping the future may leave some of the records in place.
///
/// # Examples
/// ```
/// use essentially_once::consumer::remove_passed;
/// use essentially_once::memory::Memory;
/// use essentially_once::relay::Relay;
/// use essentially_once::{Consumer, ConsumerId, Epoch, Log, NewRecord, Origin, ProducerId};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// let memory = Memory::new();
/// let (outbox, bus, store) = (memory.log("outbox")?, memory.log("bus")?, memory.store());
/// let origin = |number| Ok::<_, essentially_once::Error>(Origin::new(ProducerId::new("shop")?, Epoch::STABLE, number));
/// for number in 0..3 {
///     outbox.append(&[NewRecord::new("order").origin(origin(number)?)]).await?;
/// }
/// let relay = ConsumerId::new("relay")?;
/// Consumer::at_least_once(relay.clone(), outbox.clone(), store.clone(), Relay::to(bus))
///     .run_until_caught_up()
///     .await?;
///
/// assert_eq!(remove_passed(&outbox, &store, &[relay]).await?, 2);
/// assert_eq!(outbox.bounds().await?.earliest, 2.into()); // the last record stays
/// # Ok(())
/// # }
/// ```
pub async fn remove_passed<S: OffsetStore>(log: &dyn Log, store: &S, consumers: &[ConsumerId]) -> Result<u64, Error> {
    let refused = |reason: String| Error::failed(format!("remove passed records from log {}", log.id()), reason);
    let mut positions = Vec::new();
    for consumer in consumers {
        let position = store.position(consumer).await?.ok_or_else(|| {
            refused(format!(
                "consumer {consumer} has no position yet, so it may need every record; check its name, or run it first"
            ))
        })?;
        if !position.log.is_same_log(log.id()) {
            return Err(Error::WrongLog {
                consumer: consumer.clone(),
                stored: position.log,
                given: log.id().clone(),
            });
        }
        positions.push((consumer, position));
    }
    let Some(first_needed) = positions.iter().map(|(_, position)| first_needed(position)).min() else {
        return Err(refused(
            "no consumer is named; name every consumer that reads the log".into(),
        ));
    };
    let end = log.bounds().await?.end;
    for (consumer, position) in positions {
        if position.next > end {
            return Err(Error::OutOfRange {
                log: log.id().clone(),
                requested: position.next,
                end,
            });
        }
        compare(log, consumer, position.note.passed()).await?;
    }
    let removed = log.remove_before(first_needed).await?;
    tracing::debug!(log = %log.id(), %first_needed, removed, "removed records that every named consumer has passed");
    Ok(removed)
}

/// The last record that the position passed, or the next one if nothing is known of that record.
fn first_needed(position: &Position) -> Offset {
    match position.note.passed_offset() {
        Some(passed) => passed.min(position.next),
        None => position.next,
    }
}
