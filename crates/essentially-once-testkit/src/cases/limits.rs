//! Cases for sizes and for entries that cannot be decoded, [L4, L8 and
//! L9](essentially_once::Log#contract).

use essentially_once::{Error, Log, NewRecord, Record};

use super::{
    common::{payloads, read, read_all, records, soon},
    compare,
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, ensure},
};

/// About how many bytes one call of `next` may return.
const MEGABYTE: usize = 1024 * 1024;
/// The record size of that case. It suits every backend, with or without a stated limit.
const LARGE_RECORD: usize = 64 * 1024;

/// [L4](essentially_once::Log#contract), `next`: bounded however many records are requested, and no
/// record lost between calls.
pub(super) async fn l4_one_call_of_next_returns_a_megabyte_at_most<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let limit = harness.capabilities().record_limit;
    let size = limit.map_or(LARGE_RECORD, |limit| limit.clamp(1, LARGE_RECORD));
    let count = 5 * MEGABYTE / size;
    let new: Vec<_> = (0..count).map(|n| NewRecord::new(vec![n as u8; size])).collect();
    let log = backend.log("orders").await?;
    // In batches of half a megabyte, because some backends also limit a batch.
    for batch in new.chunks((MEGABYTE / 2 / size).max(1)) {
        log.append(batch).await?;
    }
    let mut reader = log.read(log.bounds().await?.earliest).await?;
    let max = count / 2 + 1;
    let mut seen = 0;
    while seen < count {
        let next = soon("next", reader.next(max)).await??;
        let bytes: usize = next.iter().map(Record::size).sum();
        ensure!(
            bytes <= 2 * MEGABYTE || next.len() == 1,
            "one call of next returned {} records with {bytes} bytes",
            next.len()
        );
        for record in next {
            ensure!(
                new.get(seen).is_some_and(|new| new.payload == record.payload),
                "at {} there is another record than record {seen} of those appended",
                record.offset
            );
            seen += 1;
        }
    }
    Ok(())
}

/// The limit that the harness states, or one that every backend meets.
fn record_limit(harness: &impl Harness) -> usize {
    harness.capabilities().record_limit.unwrap_or(LARGE_RECORD)
}

/// [L4](essentially_once::Log#contract): more than 255 headers, and values longer than 65,535
/// bytes.
pub(super) async fn l4_a_record_keeps_hundreds_of_headers<H: Harness>(harness: &H, backend: &H::Backend) -> CaseResult {
    const ENVELOPE: usize = 1_000;
    let limit = record_limit(harness);
    let log = backend.log("orders").await?;
    let mut many = NewRecord::new("many");
    // Ten bytes each at most.
    for n in 0..300.min(limit / 20) {
        many = many.header(format!("h{n}"), n.to_string());
    }
    let large: Vec<u8> = (0..100_000.min(limit.saturating_sub(ENVELOPE)))
        .map(|n| n as u8)
        .collect();
    let large = NewRecord::new("large")
        .header("before", "1")
        .header("large", large)
        .header("after", "2");
    let new = [many, large];
    for record in &new {
        log.append(std::slice::from_ref(record)).await?;
    }
    for (read, new) in read_all(&*log, new.len()).await?.iter().zip(&new) {
        let differing = compare::from_appended(read, new);
        ensure!(
            differing.is_none() && read.malformed.is_none(),
            "a record with {} headers is wrong: {}",
            new.headers.len(),
            differing.unwrap_or_else(|| "it is called malformed".into())
        );
    }
    Ok(())
}

/// Appends the records in batches of half a megabyte, because some backends also limit a batch.
/// Then reads them back, and checks that each call returns about a megabyte at most, unless it
/// returns a single larger record.
async fn stay_below_a_megabyte(log: &dyn Log, new: &[NewRecord], max: usize) -> CaseResult {
    let mut rest = new;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fitting = rest.iter().take_while(|record| {
            bytes += record.size();
            bytes <= MEGABYTE / 2
        });
        let (batch, others) = rest.split_at(fitting.count().clamp(1, rest.len()));
        log.append(batch).await?;
        rest = others;
    }
    let mut reader = log.read(log.bounds().await?.earliest).await?;
    let mut seen = 0;
    while seen < new.len() {
        let what = format!("next({max}) after record {seen} of {}", new.len());
        let next = soon(&what, reader.next(max)).await??;
        ensure!(!next.is_empty(), "{what} returned nothing");
        let bytes: usize = next.iter().map(Record::size).sum();
        ensure!(
            bytes <= 2 * MEGABYTE || next.len() == 1,
            "{what} returned {} records with {bytes} bytes",
            next.len()
        );
        for record in next {
            let expected = new.get(seen);
            let differing = expected.map(|new| compare::from_appended(&record, new));
            ensure!(
                differing == Some(None),
                "record {seen} of {} at {} is wrong: {}",
                new.len(),
                record.offset,
                differing.flatten().unwrap_or_else(|| "it was never appended".into())
            );
            seen += 1;
        }
    }
    Ok(())
}

/// [L4](essentially_once::Log#contract), `next`: a record may be large because of its headers.
pub(super) async fn l4_headers_count_towards_the_megabyte<H: Harness>(harness: &H, backend: &H::Backend) -> CaseResult {
    let size = (record_limit(harness) / 2).clamp(1, LARGE_RECORD / 2);
    let log = backend.log("orders").await?;
    let record = |n: usize| NewRecord::new("").header("h", vec![n as u8; size]);
    let new: Vec<_> = (0..5 * MEGABYTE / size).map(record).collect();
    stay_below_a_megabyte(&*log, &new, new.len() + 1).await
}

/// [L4](essentially_once::Log#contract), `next`: thousands of small records, then large ones, small
/// ones again, and one of the maximum size.
pub(super) async fn l4_records_that_grow_do_not_overfill_a_call<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let large = record_limit(harness).min(MEGABYTE);
    let mut new: Vec<_> = (0..2_000)
        .map(|n: usize| NewRecord::new(vec![n as u8; n % 3]))
        .collect();
    new.extend((0..(4 * MEGABYTE / large).max(3)).map(|n| NewRecord::new(vec![n as u8; large])));
    new.extend((0..100).map(|n: usize| NewRecord::new(vec![n as u8])));
    new.push(NewRecord::new(vec![7; large]));
    stay_below_a_megabyte(&*backend.log("orders").await?, &new, usize::MAX - 1).await
}

/// [L4](essentially_once::Log#contract), `next`: the largest `max` means "as many as there are".
pub(super) async fn l4_next_takes_the_largest_max<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    let new: Vec<_> = (0..50).map(|n: usize| NewRecord::new(n.to_string())).collect();
    stay_below_a_megabyte(&*log, &new, usize::MAX).await
}

/// [L8](essentially_once::Log#contract): sizes 0, 1 and the limit itself.
pub(super) async fn l8_sizes_up_to_the_limit_are_taken<H: Harness>(harness: &H, backend: &H::Backend) -> CaseResult {
    let limit = harness.capabilities().record_limit.unwrap_or_default();
    let log = backend.log("orders").await?;
    let sizes = [0, 1, limit - 1, limit];
    for size in sizes {
        log.append(&[NewRecord::new(vec![b'x'; size])]).await?;
    }
    for (size, record) in sizes.iter().zip(read_all(&*log, sizes.len()).await?) {
        ensure!(
            record.payload.len() == *size && record.payload.iter().all(|byte| *byte == b'x'),
            "a payload of {size} bytes came back with {} bytes",
            record.payload.len()
        );
    }
    Ok(())
}

/// [L8](essentially_once::Log#contract): one oversized record refuses the whole batch, and the log
/// stays as it was.
pub(super) async fn l8_a_record_over_the_limit_is_refused_before_any_is_appended<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let limit = harness.capabilities().record_limit.unwrap_or_default();
    let log = backend.log("orders").await?;
    let too_large = [
        NewRecord::new(vec![b'x'; limit + 1]),
        NewRecord::new(vec![b'x'; limit]).key("k"),
        NewRecord::new(vec![b'x'; limit - 1]).header("h", "v"),
    ];
    for too_large in too_large {
        let result = log
            .append(&[NewRecord::new("first"), too_large, NewRecord::new("last")])
            .await;
        ensure!(
            matches!(&result, Err(Error::TooLarge { limit: reported, .. }) if *reported == limit),
            "an append of a record over the limit of {limit} bytes returned {result:?}"
        );
    }
    let bounds = log.bounds().await?;
    ensure!(
        bounds.earliest == bounds.end,
        "a refused batch left records: the bounds are {bounds:?}"
    );
    log.append(&records(["after"])).await?;
    let all = payloads(&read_all(&*log, 1).await?);
    ensure!(all == ["after"], "a refused batch left {all:?}");
    Ok(())
}

/// [L9](essentially_once::Log#contract): a malformed entry is neither skipped nor an error, and the
/// records after it are read.
pub(super) async fn l9_a_malformed_entry_is_yielded_in_its_place<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(["before"])).await?;
    let raw = backend.append_malformed("orders").await?;
    log.append(&records(["after"])).await?;
    let all = read_all(&*log, 3).await?;
    let malformed: Vec<_> = all.iter().map(|record| record.malformed.is_some()).collect();
    ensure!(
        malformed == [false, true, false],
        "malformed, record by record: {malformed:?}"
    );
    ensure!(
        all[0].payload == "before" && all[2].payload == "after",
        "the neighbours are {:?}",
        payloads(&all)
    );
    ensure!(
        all[1].malformed.as_deref().is_some_and(|reason| !reason.is_empty()),
        "a malformed entry gives no reason"
    );
    ensure!(
        all[1].payload == raw,
        "a malformed entry has the raw bytes {raw:?}, but the payload holds {:?}",
        all[1].payload
    );
    // Also from its own offset, where a consumer that stopped there resumes.
    let again = read(&*log, all[1].offset, 2).await?;
    ensure!(
        again == all[1..],
        "reading at a malformed entry found {:?}",
        payloads(&again)
    );
    Ok(())
}
