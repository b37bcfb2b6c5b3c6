//! Cases for [`Log::remove_before`], [L11](essentially_once::Log#contract).

use essentially_once::{Error, Log, Offset, Record};

use super::{
    bounds::{emptied, first_error, overtaken_stops},
    common::{payloads, read, read_all, records, soon},
    compare,
    restart::{once_ready, up},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// Removes the records before an offset, and checks the number that the log reports.
async fn remove(log: &dyn Log, before: Offset, expected: u64) -> CaseResult {
    let removed = soon("the removal", log.remove_before(before)).await??;
    ensure!(
        removed == expected,
        "of the records before {before}, {removed} were removed, not {expected}"
    );
    Ok(())
}

/// Checks on a new handle that exactly these records are left of `all`.
async fn left<B: Backend>(backend: &B, all: &[Record], removed: usize) -> CaseResult {
    let log = backend.log("orders").await?;
    let bounds = log.bounds().await?;
    let first = all[removed].offset;
    // Offsets may be sparse.
    let is_right = bounds.earliest <= first && all[..removed].iter().all(|lost| lost.offset < bounds.earliest);
    ensure!(
        is_right,
        "after the removal of the records before {first}, the bounds are {bounds:?}"
    );
    for lost in &all[..removed] {
        let error = first_error(&*log, lost.offset).await?;
        ensure!(
            matches!(&error, Error::Truncated { requested, earliest, .. }
                if (*requested, *earliest) == (lost.offset, bounds.earliest)),
            "reading the removed record at {} failed with: {error}",
            lost.offset
        );
    }
    let differing = compare::records(&read(&*log, first, all.len() - removed).await?, &all[removed..]);
    ensure!(
        differing.is_none(),
        "the removal changed the remaining records: {}",
        differing.unwrap_or_default()
    );
    Ok(())
}

/// [L11](essentially_once::Log#contract): exactly the records before the offset are removed, once.
/// Readers that were overtaken get an error.
pub(super) async fn l11_the_records_before_an_offset_are_removed<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    remove(&*log, log.bounds().await?.end, 0).await?;
    log.append(&records(0..20)).await?;
    let all = read_all(&*log, 20).await?;
    remove(&*log, log.bounds().await?.earliest, 0).await?;
    left(backend, &all, 0).await?;
    let mut overtaken = log.read(all[0].offset).await?;
    let first = soon("next", overtaken.next(1)).await??;
    ensure!(first == all[..1], "the first record is {first:?}");
    remove(&*log, all[7].offset, 7).await?;
    left(backend, &all, 7).await?;
    // Below the earliest record, nothing is left to remove.
    for before in [all[7].offset, all[3].offset, Offset::ZERO] {
        remove(&*backend.log("orders").await?, before, 0).await?;
    }
    left(backend, &all, 7).await?;
    // An offset need not be that of a record.
    remove(&*log, all[8].offset.successor(), 2).await?;
    left(backend, &all, 9).await?;
    log.append(&records(["more"])).await?;
    let more = read(&*log, all[19].offset, 2).await?;
    ensure!(
        payloads(&more) == ["19", "more"],
        "after the removals, the log ends with {more:?}"
    );
    overtaken_stops(&mut *overtaken, &all[1..], all[9].offset).await
}

/// [L11](essentially_once::Log#contract): an offset past the end is refused, and every record
/// stays.
pub(super) async fn l11_nothing_is_removed_past_the_end<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(0..5)).await?;
    let all = read_all(&*log, 5).await?;
    let end = log.bounds().await?.end;
    for past in [
        end.successor(),
        Offset::new(end.hi(), end.lo().saturating_add(1_000)),
        Offset::new(u64::MAX >> 1, 0),
    ] {
        let result = soon("the removal", log.remove_before(past)).await?;
        ensure!(
            matches!(&result, Err(Error::OutOfRange { requested, .. }) if *requested == past),
            "removing the records before {past}, past the end {end}, returned {result:?}"
        );
        left(backend, &all, 0).await?;
    }
    Ok(())
}

/// [L11](essentially_once::Log#contract): a log whose records were all removed keeps its end and
/// continues from there.
pub(super) async fn l11_offsets_of_removed_records_are_not_reused<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    let mut highest = None;
    for round in 0..3u32 {
        log.append(&records((0..10).map(|n| format!("{round}.{n}")))).await?;
        let all = read_all(&*log, 10).await?;
        ensure!(
            highest.is_none_or(|highest| highest < all[0].offset),
            "round {round}: the record at {} reuses an offset, the highest so far is {highest:?}",
            all[0].offset
        );
        highest = Some(all[9].offset);
        let end = log.bounds().await?.end;
        let mut waiting = log.read(end).await?;
        remove(&*log, end, 10).await?;
        emptied(backend, end).await?;
        let error = first_error(&*log, all[9].offset).await?;
        ensure!(
            matches!(error, Error::Truncated { .. }),
            "round {round}: reading the last removed record failed with: {error}"
        );
        remove(&*log, end, 0).await?;
        backend.log("orders").await?.append(&records(["after"])).await?;
        let next = soon("a reader that waited", waiting.next(10)).await??;
        ensure!(
            payloads(&next) == ["after"] && Some(next[0].offset) > highest,
            "round {round}: a reader at the end {end} of an emptied log got {:?} at {}",
            payloads(&next),
            next[0].offset
        );
        highest = Some(next[0].offset);
        remove(&*log, next[0].offset.successor(), 1).await?;
    }
    Ok(())
}

/// [L11](essentially_once::Log#contract): offsets continue where they were, even if the backend
/// restarts while the log is empty. What was removed stays removed.
pub(super) async fn l11_offsets_are_not_reused_after_a_restart<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(0..5)).await?;
    let end = log.bounds().await?.end;
    remove(&*log, end, 5).await?;
    backend.restart().await?;
    let log = up(|| backend.log("orders")).await?;
    emptied(backend, end).await?;
    let after = records(["after"]);
    once_ready(|| log.append(&after)).await?;
    let next = once_ready(|| async { log.read(end).await?.next(10).await }).await?;
    ensure!(
        payloads(&next) == ["after"] && next[0].offset >= end,
        "reading from the old end {end} returned {:?}",
        payloads(&next)
    );
    Ok(())
}

/// [L11](essentially_once::Log#contract): a removal that runs beside appends takes none of their
/// records.
pub(super) async fn l11_records_appended_meanwhile_stay<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    const ROUNDS: u64 = 20;
    let (appender, remover) = (backend.log("orders").await?, backend.log("orders").await?);
    let mut reader = remover.read(remover.bounds().await?.end).await?;
    let appends = async {
        for n in 0..ROUNDS {
            appender.append(&records(3 * n..3 * n + 3)).await?;
        }
        Ok::<_, Violation>(())
    };
    // Each record is removed as soon as it was read, so an early removal is one that was not read.
    let reads = async {
        let (mut seen, mut removed) = (Vec::new(), 0);
        while seen.len() < 3 * ROUNDS as usize {
            let next = soon("a record that was not removed", reader.next(2)).await??;
            seen.extend(payloads(&next));
            if let Some(last) = next.last() {
                removed += remover.remove_before(last.offset.successor()).await?;
            }
        }
        Ok::<_, Violation>((seen, removed))
    };
    let (appended, found) = tokio::join!(appends, reads);
    appended?;
    let (seen, removed) = found?;
    let expected: Vec<_> = (0..3 * ROUNDS).map(|n| n.to_string()).collect();
    ensure!(
        seen == expected && removed == 3 * ROUNDS,
        "of {} records, {removed} were removed, and the reader saw {seen:?}",
        3 * ROUNDS
    );
    Ok(())
}
