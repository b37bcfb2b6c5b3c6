//! Skips one record by hand.

use std::time::{Duration, SystemTime};

use crate::{
    Advance, ConsumerId, Error, Log, Note, Offset, OffsetStore, Operator, Position, Record, Transaction,
    consumer::OperatorAction, note::InHand, rt, window::Windows,
};

/// How long to wait for the record.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// Moves a consumer's position past the record at `offset` without handling it, and returns the new
/// offset. For an operator who has found that the record can never be handled (see
/// [`Error::Unhandled`]).
///
/// The record must be the next one that the consumer would handle. Its origin is marked as seen, so
/// that the consumer drops the record if it is sent again. A malformed record marks nothing. A
/// running instance of the consumer continues from the new position.
///
/// Pass the log as the consumer reads it, with its wrappers. A record that a signed log would
/// refuse looks intact without them, and its origin may be forged. [`plan_skip`](super::plan_skip)
/// shows the record beforehand.
///
/// # Errors
/// - [`Error::Failed`] if the consumer has no position, if `offset` is before the position, or if
///   another record lies between them. The error names it. Nothing is moved.
/// - [`Error::WrongLog`] if the position belongs to another log.
/// - [`Error::Truncated`] or [`Error::OutOfRange`] if the log no longer holds the position's place.
/// - [`Error::Fenced`] if a running instance committed in the meantime. Check the position again.
/// - The backend's own errors.
///
/// Dropping the future leaves the outcome unknown, as [`Error::Indeterminate`] does.
///
/// # Examples
/// ```
/// use essentially_once::consumer::Operator;
/// use essentially_once::memory::{Memory, MemoryTx};
/// use essentially_once::{
///     Consumer, ConsumerId, Error, HandlerError, Log, NewRecord, Record, handler_fn, skip,
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// let memory = Memory::new();
/// let (log, store) = (memory.log("orders")?, memory.store());
/// log.append(&[NewRecord::new("10248"), NewRecord::new("garbage"), NewRecord::new("10249")]).await?;
///
/// let shipping = ConsumerId::new("shipping")?;
/// let run = || {
///     let ship = handler_fn(|record: &Record, _: &mut MemoryTx| {
///         Box::pin(async move {
///             let order = std::str::from_utf8(&record.payload)?;
///             order.parse::<u64>().map_err(HandlerError::reject)?;
///             Ok(())
///         })
///     });
///     Consumer::essentially_once(shipping.clone(), log.clone(), store.clone(), ship)
///         .accept_volatile()
///         .run_until_caught_up()
/// };
/// let Err(Error::Unhandled { offset, .. }) = run().await else {
///     panic!("garbage was handled");
/// };
/// let ann = Operator::new("ann").because("not an order");
/// skip(&shipping, &log, &store, offset, &ann).await?;
/// assert_eq!(run().await?.handled, 1); // 10249
/// # Ok(())
/// # }
/// ```
pub async fn skip<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    offset: Offset,
    by: &Operator,
) -> Result<Offset, Error> {
    let (position, record) = next_record(consumer, log, store, offset).await?;
    let mut windows = Windows::new(position.windows);
    if record.malformed.is_none() {
        windows.mark(&record, SystemTime::now());
    }
    let next = offset.successor();
    let expected = position.revision;
    let mut advance = Advance::new(log.id().clone(), next, expected, expected.fresh_epoch());
    advance.owner = position.owner;
    // A letter that kills is not affected.
    let in_hand = InHand {
        record: None,
        ..position.note.in_hand()
    };
    advance.note = Note::after(&record).with_in_hand(in_hand);
    advance.journal = Some(position.journal.with(by, OperatorAction::Skip(offset)));
    (advance.windows, advance.forgotten) = windows.take_changes();
    store.begin(consumer).await?.commit(advance).await?;
    tracing::warn!(%consumer, log = %log.id(), %offset, by = by.name(), "skipped a record by hand");
    Ok(next)
}

/// The record that [`skip`] would pass over, without doing it.
///
/// # Errors
/// As for [`skip`], except that it never fails with [`Error::Fenced`].
pub async fn plan_skip<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    offset: Offset,
) -> Result<Record, Error> {
    let (_, record) = next_record(consumer, log, store, offset).await?;
    Ok(record)
}

/// The consumer's position, and the record at `offset`, which must come next.
async fn next_record<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    offset: Offset,
) -> Result<(Position, Record), Error> {
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
            "the consumer has no position yet; check its name, or `seek` it to choose its start".into(),
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
            "the log has no such record; its last record is before {end}"
        )));
    }
    let mut reader = log.read(position.next).await?;
    // If the record is deleted at this moment, the log may never yield another one.
    let records = rt::within(Some(READ_LIMIT), reader.next(1)).await.unwrap_or_else(|| {
        Err(refused(
            "no record arrived within 10 s; the record may have been deleted".into(),
        ))
    })?;
    let Some(record) = records.into_iter().next() else {
        return Err(Error::unavailable(
            format!("read log {}", log.id()),
            "the reader returned no record",
        ));
    };
    if record.offset != offset {
        return Err(refused(format!(
            "the next record of the consumer is at {}; handle or skip that one first",
            record.offset
        )));
    }
    Ok((position, record))
}
