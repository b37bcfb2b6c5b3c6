//! Cases for order and reading, [L2, L3, L4 and L6](essentially_once::Log#contract).

use std::{
    collections::HashMap,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use essentially_once::{Epoch, Error, NewRecord, Origin, ProducerId};
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    common::{payloads, read, read_all, records, soon},
    compare,
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// [L2](essentially_once::Log#contract): four appenders on separate handles, and three readers, two
/// of which read during the appends.
pub(super) async fn l2_many_appenders_and_readers_agree_on_one_order<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    const APPENDERS: usize = 4;
    const EACH: usize = 50;
    let mut readers = JoinSet::new();
    for _ in 0..2 {
        let log = backend.log("orders").await?;
        let from = log.bounds().await?.earliest;
        readers.spawn(async move { read(&*log, from, APPENDERS * EACH).await });
    }
    append_concurrently(backend, APPENDERS, EACH).await?;
    let log = backend.log("orders").await?;
    let expected = read_all(&*log, APPENDERS * EACH).await?;
    for reader in readers.join_all().await {
        let seen = reader?;
        let differing = expected
            .iter()
            .zip(&seen)
            .find(|(a, b)| (a.offset, &a.payload) != (b.offset, &b.payload));
        if let Some((expected, seen)) = differing {
            return Err(Violation::new(format!(
                "one reader found {:?} at {}, another {:?} at {}",
                expected.payload, expected.offset, seen.payload, seen.offset
            )));
        }
    }
    ensure!(
        expected.is_sorted_by(|a, b| a.offset < b.offset),
        "offsets do not rise strictly from record to record"
    );
    Ok(())
}

/// [L2](essentially_once::Log#contract): order within a batch, from batch to batch, and while
/// others append.
pub(super) async fn l2_one_appenders_records_keep_their_order<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    const APPENDERS: usize = 3;
    const EACH: usize = 60;
    append_concurrently(backend, APPENDERS, EACH).await?;
    let log = backend.log("orders").await?;
    let mut next: HashMap<String, usize> = HashMap::new();
    for record in read_all(&*log, APPENDERS * EACH).await? {
        let payload = String::from_utf8_lossy(&record.payload).into_owned();
        let (appender, n) = payload.split_once(':').unwrap_or(("", &payload));
        let next = next.entry(appender.to_owned()).or_default();
        ensure!(
            n == next.to_string(),
            "offset {}: record {n} of appender {appender}, expected its record {next}",
            record.offset
        );
        *next += 1;
    }
    Ok(())
}

/// Appends `each` records `<appender>:<n>` per appender, in batches of 1 to 5, on separate handles.
async fn append_concurrently(backend: &impl Backend, appenders: usize, each: usize) -> Result<(), Violation> {
    let mut tasks = JoinSet::new();
    for appender in 0..appenders {
        let log = backend.log("orders").await?;
        tasks.spawn(async move {
            let mut appended = 0;
            while appended < each {
                let batch = (1 + appended % 5).min(each - appended);
                log.append(&records(
                    (appended..appended + batch).map(|n| format!("{appender}:{n}")),
                ))
                .await?;
                appended += batch;
            }
            Ok::<_, Error>(())
        });
    }
    for result in tasks.join_all().await {
        result?;
    }
    Ok(())
}

/// [L3](essentially_once::Log#contract): a reader during concurrent appends sees exactly the
/// records that the log holds in the end.
pub(super) async fn l3_a_reader_under_concurrent_appends_skips_nothing<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    const APPENDERS: usize = 4;
    const EACH: usize = 100;
    let log = backend.log("orders").await?;
    let mut reader = log.read(log.bounds().await?.earliest).await?;
    let reading = tokio::spawn(async move {
        let mut seen = Vec::new();
        while seen.len() < APPENDERS * EACH {
            let what = format!("record {} of {} while others append", seen.len() + 1, APPENDERS * EACH);
            seen.extend(soon(&what, reader.next(7)).await??);
        }
        Ok::<_, Violation>(seen)
    });
    append_concurrently(backend, APPENDERS, EACH).await?;
    let expected = read_all(&*log, APPENDERS * EACH).await?;
    let seen = reading
        .await
        .map_err(|error| Violation::new(format!("the reader panicked: {error}")))?;
    let seen = match seen {
        Ok(seen) => seen,
        Err(stuck) => {
            return Err(Violation::new(format!("a reader skipped records or is stuck: {stuck}")));
        }
    };
    if let Some((expected, seen)) = expected.iter().zip(&seen).find(|(a, b)| a.offset != b.offset) {
        return Err(Violation::new(format!(
            "a reader under concurrent appends went to {} where {} came next",
            seen.offset, expected.offset
        )));
    }
    Ok(())
}

/// [L4](essentially_once::Log#contract): reading from every record's offset, from behind it, and
/// from before the first record.
pub(super) async fn l4_read_yields_exactly_what_is_at_or_after_the_offset<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(0..10)).await?;
    let all = read_all(&*log, 10).await?;
    for (index, record) in all.iter().enumerate() {
        let at = read(&*log, record.offset, 10 - index).await?;
        ensure!(
            at == all[index..],
            "reading at offset {} of record {index} found {:?}",
            record.offset,
            payloads(&at)
        );
        if index < 9 {
            let behind = read(&*log, record.offset.successor(), 9 - index).await?;
            ensure!(
                behind == all[index + 1..],
                "reading behind offset {} of record {index} found {:?}",
                record.offset,
                payloads(&behind)
            );
        }
    }
    // Two readers of one handle at different offsets are independent.
    let (mut first, mut second) = (log.read(all[0].offset).await?, log.read(all[5].offset).await?);
    let (one, two) = (
        soon("next", first.next(1)).await??,
        soon("next", second.next(1)).await??,
    );
    ensure!(
        one == all[..1] && two == all[5..6],
        "two readers of one handle disturb each other"
    );
    Ok(())
}

/// [L4](essentially_once::Log#contract): key, headers, payload, origin and time, including binary,
/// empty and absent values.
pub(super) async fn l4_a_record_is_read_as_it_was_appended<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    let binary: Bytes = (0..=255).collect::<Vec<u8>>().into();
    let producer = ProducerId::new("web-1").expect("the name is valid");
    let new = [
        NewRecord::new(""),
        NewRecord::new(binary.clone()).key(binary.clone()),
        NewRecord::new("an empty key is not the same as none").key(""),
        NewRecord::new("headers keep order and repeat")
            .header("b", "1")
            .header("a", binary.clone())
            .header("b", "")
            .header("naïve ☃", "a name may be any text"),
        NewRecord::new("origin").origin(Origin::new(producer.clone(), Epoch::STABLE, 0)),
        NewRecord::new("another epoch").origin(Origin::new(producer.clone(), Epoch::new(7), 0)),
        NewRecord::new("the highest numbers").origin(Origin::new(producer, Epoch::new(u64::MAX), u64::MAX)),
    ];
    let last = log.append(&new).await?;
    let all = read_all(&*log, new.len()).await?;
    for (read, new) in all.iter().zip(&new) {
        let differing = compare::from_appended(read, new);
        ensure!(
            differing.is_none(),
            "the record read at {} is wrong: {}",
            read.offset,
            differing.unwrap_or_default()
        );
        ensure!(read.malformed.is_none(), "{read:?} is called malformed");
        ensure!(read.appended_at > UNIX_EPOCH, "{read:?} has no append time");
    }
    let last_read = all.last().map(|record| record.offset);
    ensure!(
        last.is_none() || last == last_read,
        "append returned {last:?} as the last offset, but it is {last_read:?}"
    );
    let before = log.bounds().await?;
    ensure!(log.append(&[]).await?.is_none(), "an empty append returned an offset");
    let after = log.bounds().await?;
    ensure!(
        after == before && read_all(&*log, new.len()).await? == all,
        "an empty append changed the log: the bounds were {before:?}, now they are {after:?}"
    );
    Ok(())
}

/// [L4](essentially_once::Log#contract): the time is that of the append, to the millisecond,
/// regardless of who reads it and when.
///
/// Intervals are compared with this process's monotonic clock, so the two clocks need not agree.
pub(super) async fn l4_append_times_are_of_the_append<H: Harness>(harness: &H, backend: &H::Backend) -> CaseResult {
    const RECORDS: usize = 12;
    /// Odd, so that no coarser clock matches it by chance.
    const PAUSE: Duration = Duration::from_millis(17);
    /// Covers a millisecond clock's rounding at either end, and a clock that is slewed meanwhile.
    const ROUNDING: Duration = Duration::from_millis(3);
    let skew = harness.capabilities().clock_skew;
    let log = backend.log("orders").await?;
    let mut appends = Vec::new();
    for n in 0..RECORDS {
        let (wall, begin) = (SystemTime::now(), Instant::now());
        log.append(&records([n])).await?;
        appends.push((wall, begin, Instant::now(), SystemTime::now()));
        tokio::time::sleep(PAUSE).await;
    }
    let all = read_all(&*log, RECORDS).await?;
    tokio::time::sleep(PAUSE).await;
    let again = read_all(&*backend.log("orders").await?, RECORDS).await?;
    let differing = compare::records(&again, &all);
    ensure!(
        differing.is_none(),
        "the records changed between two reads: {}",
        differing.unwrap_or_default()
    );
    for (record, (before, _, _, after)) in all.iter().zip(&appends) {
        let at = record.appended_at;
        ensure!(
            at + skew >= *before && at <= *after + skew,
            "the append at {} ran from {before:?} to {after:?}, but its time is {at:?}",
            record.offset
        );
    }
    let (first, (_, first_begin, first_end, _)) = (&all[0], &appends[0]);
    for (record, (_, begin, end, _)) in all.iter().zip(&appends).skip(1) {
        let found = record.appended_at.duration_since(first.appended_at).unwrap_or_default();
        let (least, most) = (begin.duration_since(*first_end), end.duration_since(*first_begin));
        ensure!(
            found + ROUNDING >= least && found <= most + ROUNDING,
            "two appends were {least:?} to {most:?} apart, their times are {found:?} apart"
        );
    }
    Ok(())
}

/// [L5](essentially_once::Log#contract): reader and appender run in lockstep, so that each append
/// arrives just as the reader is about to wait.
pub(super) async fn l5_no_wake_up_is_missed<H: Harness>(harness: &H, backend: &H::Backend) -> CaseResult {
    /// A record that takes longer reached the reader by chance, not through a wake-up.
    const WITHIN: Duration = Duration::from_secs(5);
    /// The next append follows at most this many steps later.
    const STAGES: usize = 32;
    let rounds = harness.capabilities().paced_rounds;
    let (log, other) = (backend.log("orders").await?, backend.log("orders").await?);
    let mut reader = log.read(log.bounds().await?.end).await?;
    let (seen, mut reads) = mpsc::unbounded_channel();
    let reading = tokio::spawn(async move {
        for _ in 0..rounds {
            let next = reader.next(10).await?;
            // The receiver ends first only if it has found something.
            let _ = seen.send(payloads(&next));
        }
        Ok::<_, Error>(())
    });
    for round in 0..rounds {
        for _ in 0..round % STAGES {
            tokio::task::yield_now().await;
        }
        // Appends alternate between the reader's own handle and another, because many backends wake
        // readers in two ways.
        let appender = if (round / STAGES).is_multiple_of(2) {
            &other
        } else {
            &log
        };
        appender.append(&records([round])).await?;
        let next = tokio::time::timeout(WITHIN, reads.recv()).await;
        let next = next.map_err(|_| {
            Violation::new(format!(
                "round {round} of {rounds}: a waiting reader has not seen the appended record after {WITHIN:?}"
            ))
        })?;
        let Some(next) = next else { break };
        ensure!(next == [round.to_string()], "round {round}: the reader got {next:?}");
    }
    let ended = reading.await;
    ended.map_err(|error| Violation::new(format!("the reader panicked: {error}")))??;
    Ok(())
}

/// [L4](essentially_once::Log#contract), `next`: at least one record, never more than `max`, and no
/// record lost between calls.
pub(super) async fn l4_next_returns_at_least_one_record_and_at_most_max<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(0..30)).await?;
    let all = read_all(&*log, 30).await?;
    for max in [1, 2, 7, 1_000] {
        let mut reader = log.read(all[0].offset).await?;
        let mut seen = Vec::new();
        while seen.len() < all.len() {
            let next = soon("next", reader.next(max)).await??;
            ensure!(!next.is_empty(), "next returned nothing");
            ensure!(next.len() <= max, "next({max}) returned {} records", next.len());
            seen.extend(next);
        }
        ensure!(seen == all, "next({max}) yielded {:?}", payloads(&seen));
    }
    Ok(())
}

/// [L4](essentially_once::Log#contract): a log holds only records appended to it.
pub(super) async fn l4_logs_of_other_names_are_independent<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (orders, invoices) = (backend.log("orders").await?, backend.log("invoices").await?);
    for n in 0..3 {
        orders.append(&records([format!("order {n}")])).await?;
        invoices.append(&records([format!("invoice {n}")])).await?;
    }
    for (log, what) in [(&orders, "order"), (&invoices, "invoice")] {
        let found = payloads(&read_all(&**log, 3).await?);
        let expected: Vec<_> = (0..3).map(|n| format!("{what} {n}")).collect();
        ensure!(found == expected, "log {} holds {found:?}", log.id());
    }
    Ok(())
}

/// [L4](essentially_once::Log#contract): records written by other programs are read in their place
/// between our own.
pub(super) async fn l4_foreign_records_are_read<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let log = backend.log("orders").await?;
    log.append(&records(["ours"])).await?;
    backend.append_foreign("orders", b"foreign").await?;
    log.append(&records(["ours again"])).await?;
    let all = read_all(&*log, 3).await?;
    ensure!(
        payloads(&all) == ["ours", "foreign", "ours again"],
        "found {:?}",
        payloads(&all)
    );
    ensure!(
        all.iter().all(|record| record.malformed.is_none()),
        "a foreign record is called malformed"
    );
    ensure!(
        all[1].origin.is_none(),
        "a foreign record has an origin: {:?}",
        all[1].origin
    );
    Ok(())
}

/// [L6](essentially_once::Log#contract): calls of `next` are dropped at every stage, in a tight
/// loop, while records arrive.
pub(super) async fn l6_a_cancelled_next_loses_and_repeats_nothing<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    const COUNT: usize = 200;
    let log = backend.log("orders").await?;
    let mut reader = log.read(log.bounds().await?.earliest).await?;
    let appender = Arc::clone(&log);
    let appending = tokio::spawn(async move {
        for n in 0..COUNT {
            appender.append(&records([n])).await?;
            tokio::task::yield_now().await;
        }
        Ok::<_, Error>(())
    });
    let mut seen = Vec::new();
    let mut patience = 0;
    while seen.len() < COUNT {
        // Each call is polled a little longer than the one before, until one succeeds.
        patience = (patience + 1) % 50;
        let mut call = reader.next(3);
        let mut polls = 0;
        let polled = std::future::poll_fn(|context| match call.as_mut().poll(context) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending if polls >= patience => Poll::Ready(None),
            Poll::Pending => {
                polls += 1;
                context.waker().wake_by_ref();
                Poll::Pending
            }
        });
        let found = soon("a record after cancelled calls", polled).await?;
        drop(call);
        if let Some(found) = found {
            seen.extend(payloads(&found?));
        } else if patience == 0 {
            // Even the longest call was cancelled. Let one call wait, so that a slow backend makes
            // progress.
            seen.extend(payloads(
                &soon("a record that cancelled calls lost", reader.next(3)).await??,
            ));
        } else {
            tokio::task::yield_now().await;
        }
    }
    appending
        .await
        .map_err(|error| Violation::new(format!("the appender panicked: {error}")))??;
    let expected: Vec<_> = (0..COUNT).map(|n| n.to_string()).collect();
    let first_wrong = seen.iter().zip(&expected).position(|(seen, expected)| seen != expected);
    ensure!(
        seen == expected,
        "after cancelled calls, record {first_wrong:?} is wrong: {:?}",
        first_wrong.map(|index| &seen[index])
    );
    Ok(())
}
