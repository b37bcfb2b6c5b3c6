//! Going past one record by hand.

use std::time::{Duration, SystemTime};

use crate::{Advance, ConsumerId, Error, Log, Offset, OffsetStore, Passed, Transaction, rt, window::Windows};

/// How long the record is waited for.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// Moves a consumer's position past the record at `offset` without handling it, for an operator who has found that it never
/// can be: see [`Error::Unhandled`]. Returns where the position is now.
///
/// The record must be the next one that the consumer would handle. Its origin is marked, so that it is dropped if its sender
/// sends it again; a malformed record marks nothing. A running instance of the consumer goes on from the new position.
///
/// # Errors
/// - [`Error::Failed`] if the consumer has no position, if `offset` is behind the position, or if another record lies
///   between the two; the error names it. Nothing was moved.
/// - [`Error::WrongLog`] if the position belongs to another log; [`Error::Truncated`] or [`Error::OutOfRange`] if the log
///   does not hold its place any more.
/// - [`Error::Fenced`] if a running instance committed meanwhile: look again. The backend's own errors.
///
/// Dropping the future leaves the outcome unknown, as [`Error::Indeterminate`] does.
pub async fn skip<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    offset: Offset,
) -> Result<Offset, Error> {
    let refused = |reason: String| {
        Error::failed(
            format!(
                "skip the record at {offset} for consumer {consumer} of log {}",
                log.id()
            ),
            reason,
        )
    };
    let Some(position) = store.position(consumer).await? else {
        return Err(refused(
            "the consumer has no position yet; `seek` it to begin elsewhere".into(),
        ));
    };
    if !position.log.is_same_log(log.id()) {
        return Err(Error::WrongLog {
            consumer: consumer.clone(),
            stored: position.log,
            given: log.id().clone(),
        });
    }
    if offset < position.next {
        return Err(refused(format!("the consumer is past it, at {}", position.next)));
    }
    let end = log.readable_end().await?;
    if offset >= end {
        return Err(refused(format!(
            "the log has no such record; the last one is before {end}"
        )));
    }
    let mut reader = log.read(position.next).await?;
    // The record may be deleted in this moment, and then nothing may follow.
    let records = rt::within(Some(READ_LIMIT), reader.next(1))
        .await
        .unwrap_or_else(|| Err(refused("no record arrived within 10 s; it may be deleted".into())))?;
    let Some(record) = records.first() else {
        return Err(Error::unavailable(
            format!("read log {}", log.id()),
            "the reader returned no record",
        ));
    };
    if record.offset != offset {
        return Err(refused(format!(
            "the next record of the consumer is at {}",
            record.offset
        )));
    }
    let mut windows = Windows::new(position.windows);
    if record.malformed.is_none() {
        windows.mark(record, SystemTime::now());
    }
    let next = offset.successor();
    let expected = position.revision;
    let mut advance = Advance::new(log.id().clone(), next, expected, expected.fresh_epoch());
    advance.owner = position.owner;
    advance.passed = record.malformed.is_none().then(|| Passed::new(record));
    (advance.windows, advance.forgotten) = windows.take_changes();
    store.begin(consumer).await?.commit(advance).await?;
    tracing::warn!(%consumer, log = %log.id(), %offset, "skipped a record by hand");
    Ok(next)
}
