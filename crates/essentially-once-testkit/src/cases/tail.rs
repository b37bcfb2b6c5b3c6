//! Cases for the last records of a log, [L12](essentially_once::Log#contract).

use essentially_once::{Log, Offset, Record};

use super::common::{payloads, read, read_all, records};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// [L12](essentially_once::Log#contract): a reader at the tail yields the last records, or all of
/// them.
pub(super) async fn l12_the_tail_holds_the_last_records<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    for count in [0, 1, u64::MAX] {
        let (tail, bounds) = (tail(&*log, count).await?, log.bounds().await?);
        ensure!(
            tail == bounds.end,
            "the tail of {count} of an empty log is {tail}, and its end is {}",
            bounds.end
        );
    }
    // Each is a message of its own, where a message can hold many.
    for n in 0..40 {
        log.append(&records([n])).await?;
    }
    let all = read_all(&*log, 40).await?;
    for count in [0, 1, 2, 17, 39, 40, 41, 1_000, u64::MAX] {
        check(&*log, count, &all).await?;
    }
    Ok(())
}

/// [L12](essentially_once::Log#contract): the tail never begins before the earliest record.
pub(super) async fn l12_the_tail_is_what_retention_left<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    for n in 0..20 {
        log.append(&records([n])).await?;
    }
    let all = read_all(&*log, 20).await?;
    backend.truncate("orders", all[10].offset).await?;
    let log = backend.log("orders").await?;
    let earliest = log.bounds().await?.earliest;
    let left: Vec<_> = all.into_iter().filter(|record| record.offset >= earliest).collect();
    // The backend may have left out offsets, so that the number is inexact.
    let last = left[left.len() - 1].offset;
    for count in [1, 5, 15, 20] {
        let from = within(&*log, count).await?;
        ensure!(
            from <= last,
            "the tail of {count} is {from}, but the last record is at {last}"
        );
    }
    check(&*log, u64::MAX, &left).await
}

async fn check(log: &dyn Log, count: u64, all: &[Record]) -> CaseResult {
    let from = within(log, count).await?;
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(all.len());
    let last = &all[all.len() - count..];
    let expected = last.first().map_or(log.bounds().await?.end, |first| first.offset);
    // An offset between two records is as good.
    let before = all.len().checked_sub(count + 1).map(|place| all[place].offset);
    ensure!(
        from <= expected && before.is_none_or(|before| before < from),
        "the tail of {count} is {from}, but those records begin at {expected}"
    );
    let found = read(log, from, count).await?;
    ensure!(
        found == last,
        "the tail of {count} holds {:?}, and the log {:?}",
        payloads(&found),
        payloads(last)
    );
    Ok(())
}

/// The tail, which must be within the bounds.
async fn within(log: &dyn Log, count: u64) -> Result<Offset, Violation> {
    let (from, bounds) = (tail(log, count).await?, log.bounds().await?);
    ensure!(
        (bounds.earliest..=bounds.end).contains(&from),
        "the tail of {count} is {from}, which is outside of {bounds:?}"
    );
    Ok(from)
}

async fn tail(log: &dyn Log, count: u64) -> Result<Offset, Violation> {
    let tail = log.tail(count).await?;
    tail.ok_or_else(|| Violation::new("the log does not tell its tail, although the harness claims it"))
}
