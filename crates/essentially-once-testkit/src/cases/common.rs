//! What the cases share.

use std::{future::Future, time::Duration};

use essentially_once::{
    ConsumerId, Error, Log, NewRecord, Offset, Record,
    backend::{Advance, Position, Revision},
};

use crate::violation::Violation;

/// How long to watch for something that must not happen, such as a reader that returns a missing
/// record.
pub(super) const QUIET: Duration = Duration::from_millis(50);
/// How long to wait for something that must happen.
pub(super) const SOON: Duration = Duration::from_secs(60);

pub(super) fn consumer(name: &str) -> ConsumerId {
    ConsumerId::new(name).expect("the name is valid")
}

pub(super) fn records(payloads: impl IntoIterator<Item = impl ToString>) -> Vec<NewRecord> {
    payloads
        .into_iter()
        .map(|payload| NewRecord::new(payload.to_string()))
        .collect()
}

pub(crate) fn payloads(records: &[Record]) -> Vec<String> {
    records
        .iter()
        .map(|record| String::from_utf8_lossy(&record.payload).into_owned())
        .collect()
}

/// Reads `count` records, starting at `from`.
pub(super) async fn read(log: &dyn Log, from: Offset, count: usize) -> Result<Vec<Record>, Violation> {
    let mut reader = log.read(from).await?;
    let mut read = Vec::new();
    while read.len() < count {
        let missing = count - read.len();
        let next = soon(
            &format!("{missing} of {count} records from {from}"),
            reader.next(missing),
        )
        .await??;
        read.extend(next);
    }
    Ok(read)
}

/// Reads all `count` records of the log.
pub(super) async fn read_all(log: &dyn Log, count: usize) -> Result<Vec<Record>, Violation> {
    let earliest = log.bounds().await?.earliest;
    read(log, earliest, count).await
}

/// Awaits something that must happen within [`SOON`].
pub(super) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> Result<T, Violation> {
    tokio::time::timeout(SOON, future)
        .await
        .map_err(|_| Violation::new(format!("{what}: nothing within {SOON:?}")))
}

/// An advance from a position (or none) to `next`.
pub(super) fn advance(position: Option<&Position>, log: &dyn Log, next: impl Into<Offset>) -> Advance {
    let (expected, revision) = match position {
        Some(position) => (position.revision, position.revision.next_count()),
        None => (Revision::NONE, Revision::NONE.next_epoch()),
    };
    Advance::new(log.id().clone(), next.into(), expected, revision)
}

/// The number that a case keeps as a value, or 0 if there is none.
pub(super) fn counter(value: Option<&[u8]>) -> u64 {
    value
        .and_then(|value| value.try_into().ok())
        .map_or(0, u64::from_be_bytes)
}

/// Whether the error means that certainly nothing happened.
pub(super) fn is_certain(error: &Error) -> bool {
    !matches!(error, Error::Indeterminate { .. })
}
