//! Cases for the records that a log holds and has lost, [L5](essentially_once::Log#contract).

use essentially_once::{Error, Log, Offset, Record, backend::LogReader};

use super::{
    common::{QUIET, payloads, read, read_all, records, soon},
    compare,
    restart::{once_ready, up},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// [L5](essentially_once::Log#contract): a reader at the end waits, then returns the next record
/// appended by any handle.
pub(super) async fn l5_a_reader_at_the_end_waits_for_the_next_record<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    for round in 0..3 {
        let mut reader = log.read(log.bounds().await?.end).await?;
        let mut waiting = reader.next(10);
        let early = tokio::time::timeout(QUIET, &mut waiting).await;
        ensure!(
            early.is_err(),
            "round {round}: a reader at the end did not wait, it returned {early:?}"
        );
        backend.log("orders").await?.append(&records([round])).await?;
        let next = soon("a record appended while a reader waits", waiting).await??;
        ensure!(
            payloads(&next) == [round.to_string()],
            "round {round}: got {:?}",
            payloads(&next)
        );
    }
    Ok(())
}

/// [L5](essentially_once::Log#contract): `bounds` of an empty log and after each append.
pub(super) async fn l5_bounds_tell_the_earliest_record_and_the_end<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    let empty = log.bounds().await?;
    ensure!(empty.earliest == empty.end, "an empty log has bounds {empty:?}");
    for n in 1..=3 {
        log.append(&records([n])).await?;
        let bounds = log.bounds().await?;
        ensure!(
            bounds.earliest < bounds.end,
            "with {n} records, the bounds are {bounds:?}"
        );
        let all = read(&*log, bounds.earliest, n).await?;
        ensure!(
            bounds.end == all[n - 1].offset.successor(),
            "the end is {}, but the last record is at {}",
            bounds.end,
            all[n - 1].offset
        );
    }
    Ok(())
}

/// [L5](essentially_once::Log#contract): reading records that retention removed is an error that
/// names the earliest remaining record.
pub(super) async fn l5_below_the_earliest_record_is_truncated<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(0..20)).await?;
    let all = read_all(&*log, 20).await?;
    backend.truncate("orders", all[10].offset).await?;
    let log = backend.log("orders").await?;
    let bounds = log.bounds().await?;
    ensure!(
        all[0].offset < bounds.earliest && bounds.earliest <= all[10].offset,
        "after a truncation before {}, the bounds are {bounds:?}",
        all[10].offset
    );
    let error = first_error(&*log, all[0].offset).await?;
    ensure!(
        matches!(&error, Error::Truncated { requested, earliest, .. }
            if *requested == all[0].offset && *earliest == bounds.earliest),
        "reading a removed record failed with: {error}"
    );
    let left: Vec<_> = all
        .iter()
        .filter(|record| record.offset >= bounds.earliest)
        .cloned()
        .collect();
    let differing = compare::records(&read_all(&*log, left.len()).await?, &left);
    ensure!(
        differing.is_none(),
        "retention changed the remaining records: {}",
        differing.unwrap_or_default()
    );
    Ok(())
}

/// The error of reading at `from`, from `read` or from the first `next`.
pub(super) async fn first_error(log: &dyn Log, from: Offset) -> Result<Error, Violation> {
    let attempt = async {
        match log.read(from).await {
            Ok(mut reader) => reader.next(1).await,
            Err(error) => Err(error),
        }
    };
    match soon(&format!("an error from reading at {from}"), attempt).await? {
        Ok(found) => Err(Violation::new(format!("reading at {from} found {found:?}"))),
        Err(error) => Ok(error),
    }
}

/// [L5](essentially_once::Log#contract): a reader that falls behind retention gets an error. It
/// does not silently move on.
pub(super) async fn l5_retention_that_overtakes_a_reader_is_reported<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(0..20)).await?;
    let all = read_all(&*log, 20).await?;
    let mut reader = log.read(all[0].offset).await?;
    let first = soon("next", reader.next(1)).await??;
    ensure!(first == all[..1], "the first record is {first:?}");
    backend.truncate("orders", all[15].offset).await?;
    let earliest = log.bounds().await?.earliest;
    overtaken_stops(&mut *reader, &all[1..], earliest).await
}

/// Checks that an overtaken reader leaves nothing out before its error. `following` are the records
/// from its place on.
pub(super) async fn overtaken_stops(reader: &mut dyn LogReader, following: &[Record], earliest: Offset) -> CaseResult {
    // It may still yield records that it already holds. Then it must stop.
    let mut expected = following.iter();
    loop {
        match soon("a record or an error", reader.next(1)).await? {
            Ok(records) => {
                for record in &records {
                    ensure!(
                        Some(record) == expected.next(),
                        "an overtaken reader went on at {} without an error, although {earliest} is the earliest",
                        record.offset
                    );
                    if record.offset >= earliest {
                        // It had read ahead of the truncation, so it lost nothing.
                        return Ok(());
                    }
                }
            }
            Err(Error::Truncated { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// [L5](essentially_once::Log#contract): a log that retention emptied keeps its end and continues
/// from there.
pub(super) async fn l5_retention_of_everything_keeps_the_end<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    let mut highest = None;
    for round in 0..3u32 {
        log.append(&records((0..10).map(|n| format!("{round}.{n}")))).await?;
        let bounds = log.bounds().await?;
        let all = read(&*log, bounds.earliest, 10).await?;
        ensure!(
            highest.is_none_or(|highest| highest < all[0].offset),
            "round {round}: the record at {} reuses an offset, the highest so far is {highest:?}",
            all[0].offset
        );
        highest = Some(all[9].offset);
        let mut waiting = log.read(bounds.end).await?;
        backend.truncate("orders", bounds.end).await?;
        emptied(backend, bounds.end).await?;
        let other = backend.log("orders").await?;
        let last = other.append(&records([format!("{round} again")])).await?;
        ensure!(
            last.is_none_or(|last| last >= bounds.end),
            "round {round}: an append to the emptied log returned offset {last:?}, before its end {}",
            bounds.end
        );
        let mut late = other.read(bounds.end).await?;
        for (who, reader) in [("a reader that waited", &mut waiting), ("a new reader", &mut late)] {
            let next = soon(&format!("{who} at the end of an emptied log"), reader.next(10)).await??;
            ensure!(
                payloads(&next) == [format!("{round} again")] && Some(next[0].offset) > highest,
                "round {round}: {who} at the end {} got {:?} at {}",
                bounds.end,
                payloads(&next),
                next[0].offset
            );
        }
        let end = log.bounds().await?.end;
        highest = Some(read(&*log, bounds.end, 1).await?[0].offset);
        backend.truncate("orders", end).await?;
    }
    Ok(())
}

/// Checks the bounds of a log that was emptied, on a new handle.
pub(super) async fn emptied(backend: &impl Backend, end: Offset) -> CaseResult {
    let log = backend.log("orders").await?;
    let bounds = log.bounds().await?;
    ensure!(
        bounds.earliest == bounds.end && bounds.end == end,
        "a log that ended at {end} was emptied, now its bounds are {bounds:?}"
    );
    let waiting = async { log.read(end).await?.next(1).await };
    let early = tokio::time::timeout(QUIET, waiting).await;
    ensure!(
        early.is_err(),
        "a reader at the end of an emptied log did not wait, it returned {early:?}"
    );
    Ok(())
}

/// [L5](essentially_once::Log#contract): offsets continue where they were, even if the backend
/// restarts while the log is empty.
pub(super) async fn l5_offsets_are_not_reused_after_a_restart<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(0..5)).await?;
    let end = log.bounds().await?.end;
    backend.truncate("orders", end).await?;
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
    let bounds = log.bounds().await?;
    ensure!(
        bounds.end == next[0].offset.successor(),
        "after one more append, the bounds are {bounds:?}, but the record is at {}",
        next[0].offset
    );
    Ok(())
}

/// [L5](essentially_once::Log#contract), [`readable_end`](essentially_once::Log::readable_end): one
/// past the last remaining record, after the records behind it were deleted one at a time.
pub(super) async fn l5_the_readable_end_leaves_out_deleted_records<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    let empty = (log.readable_end().await?, log.bounds().await?.end);
    ensure!(
        empty.0 <= empty.1,
        "the readable end and the end of an empty log are {empty:?}"
    );
    log.append(&records(0..6)).await?;
    let all = read_all(&*log, 6).await?;
    // Deleting one in the middle changes nothing. Deleting one at the end does. The last step
    // leaves none.
    let steps: [(usize, Option<usize>); 6] = [
        (1, Some(5)),
        (5, Some(4)),
        (4, Some(3)),
        (0, Some(3)),
        (3, Some(2)),
        (2, None),
    ];
    for (deleted, last) in steps {
        backend.delete_record("orders", all[deleted].offset).await?;
        for log in [&log, &backend.log("orders").await?] {
            let (readable, bounds) = (log.readable_end().await?, log.bounds().await?);
            let fits = match last {
                Some(last) => readable == all[last].offset.successor(),
                None => readable <= all[0].offset || readable <= bounds.earliest,
            };
            ensure!(
                fits && readable <= bounds.end,
                "record {deleted} was deleted and record {last:?} is the last one left: the readable end is {readable}, \
                 the bounds are {bounds:?}"
            );
        }
    }
    log.append(&records(["more"])).await?;
    let (readable, end) = (log.readable_end().await?, log.bounds().await?.end);
    ensure!(
        readable == end && readable > all[5].offset,
        "after one more append, the readable end is {readable}, and the end is {end}"
    );
    Ok(())
}

/// [L5](essentially_once::Log#contract): reading past the end is an error. The reader does not wait
/// until the log has grown that far.
pub(super) async fn l5_past_the_end_is_out_of_range<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(0..3)).await?;
    let end = log.bounds().await?.end;
    for past in [
        end.successor(),
        Offset::new(end.hi(), end.lo().saturating_add(1_000)),
        Offset::new(u64::MAX >> 1, 0),
    ] {
        let error = first_error(&*log, past).await?;
        ensure!(
            matches!(&error, Error::OutOfRange { requested, .. } if *requested == past),
            "reading at {past}, past the end {end}, failed with: {error}"
        );
    }
    Ok(())
}

/// [L5](essentially_once::Log#contract): in a log that was deleted and created again, an old offset
/// is an error, or the log has another id.
pub(super) async fn l5_a_recreated_log_is_never_silent<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let old = backend.log("orders").await?;
    old.append(&records(0..5)).await?;
    let end = old.bounds().await?.end;
    let mut waiting = old.read(end).await?;
    backend.recreate("orders").await?;
    let new = backend.log("orders").await?;
    if old.id().is_same_log(new.id()) {
        let error = first_error(&*new, end).await?;
        ensure!(
            matches!(error, Error::OutOfRange { .. }),
            "reading at the old end failed with: {error}"
        );
    }
    // A reader waiting in the old log must notice, even before as many records are appended as the
    // old log held.
    let noticed = soon("a waiting reader that notices that its log is gone", waiting.next(1)).await?;
    ensure!(noticed.is_err(), "a reader of the old log got {noticed:?}");
    Ok(())
}
