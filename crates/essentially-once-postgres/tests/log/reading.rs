//! Readers.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};

use essentially_once::{Error, Log as _, NewRecord, Offset, backend::Source};
use test_servers::insist;

use crate::common::{Outcome, Stage, assert_error, ensure, numbered, payloads, records, soon};

const END: &str =
    "SELECT count(pg_terminate_backend(pid, 60000)) FROM pg_stat_activity WHERE application_name = 'essentially-once'";

pub(crate) async fn a_reader_whose_session_is_ended_fails_for_now_and_the_next_goes_on() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    log.append(&numbered(0..3)).await?;
    let mut reader = log.read(0.into()).await?;
    let first = reader.next(1).await?;
    let mut client = stage.client().await?;
    // The fetch waits on the server for this lock.
    let lock = client.transaction().await?;
    lock.batch_execute("LOCK TABLE essentially_once.records IN ACCESS EXCLUSIVE MODE")
        .await?;
    let mut next = first[0].offset.successor();
    let (failed, ended) = tokio::join!(soon(reader.next(1)), async {
        stage.until_locked(1).await?;
        stage.sql(END)?;
        lock.rollback().await?;
        Ok::<_, Source>(())
    });
    ended?;
    assert_error!(
        failed?,
        Error::Unavailable { .. },
        "read log orders",
        "terminating connection"
    );
    let mut reader = insist(|| log.read(next)).await?;
    for n in 1..3 {
        let found = soon(reader.next(1)).await??;
        ensure!(
            payloads(&found) == [n.to_string()] && found[0].offset == next,
            "{found:?}"
        );
        next = next.successor();
    }
    Ok(())
}

/// It holds none while it waits. If it looks at that moment, it fails for now, and may go on.
pub(crate) async fn a_waiting_reader_outlives_its_session() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    let mut reader = log.read(0.into()).await?;
    for n in 0..10_u64 {
        let reading = async {
            loop {
                match soon(reader.next(1)).await? {
                    Err(error) if error.is_transient() => {}
                    read => return Ok::<_, Source>(read?),
                }
            }
        };
        let (read, appended) = tokio::join!(reading, async {
            stage.sql(END)?;
            insist(async || log.append(&numbered(0..1)).await).await?;
            Ok::<_, Source>(())
        });
        appended?;
        ensure!(read?[0].offset == n.into(), "a record was lost");
    }
    Ok(())
}

pub(crate) async fn cancelled_calls_lose_and_repeat_nothing() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    log.append(&numbered(0..500)).await?;
    let mut reader = log.read(0.into()).await?;
    let (mut found, mut cancelled) = (Vec::new(), 0);
    for round in 0.. {
        if found.len() == 500 {
            break;
        }
        match polled(round % 5, reader.next(7)).await {
            Some(next) => found.extend(next?),
            None => cancelled += 1,
        }
    }
    let offsets = found.iter().map(|record| record.offset.lo());
    ensure!(offsets.eq(0..500), "lost or repeated");
    ensure!(cancelled > 0, "no call was cancelled");
    Ok(())
}

/// Drops a future that waits once more than `waits` times.
async fn polled<T>(mut waits: u32, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending if waits == 0 => Poll::Ready(None),
        Poll::Pending => {
            waits -= 1;
            Poll::Pending
        }
    })
    .await
}

pub(crate) async fn large_records_come_a_few_at_a_time() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    for n in 0..8 {
        log.append(&[NewRecord::new(vec![n; 8 * 1024 * 1024]), NewRecord::new("small")])
            .await?;
    }
    let mut reader = log.read(0.into()).await?;
    let (mut found, mut most) = (0_u64, 0);
    while found < 16 {
        let next = soon(reader.next(1_000)).await??;
        most = most.max(next.iter().map(|record| record.payload.len()).sum());
        for record in next {
            ensure!(record.offset == found.into(), "a record is missing");
            ensure!(
                found % 2 == 1 || record.payload[0] == (found / 2) as u8,
                "another record"
            );
            found += 1;
        }
    }
    ensure!(most < 32 * 1024 * 1024, "{most} bytes at once");
    Ok(())
}

pub(crate) async fn a_deleted_middle_is_reported() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    log.append(&numbered(0..10)).await?;
    stage.sql("DELETE FROM essentially_once.records WHERE \"offset\" BETWEEN 4 AND 6")?;
    let mut reader = log.read(0.into()).await?;
    let mut found = 0;
    let error = loop {
        match soon(reader.next(100)).await? {
            Ok(records) => found += records.len(),
            Err(error) => break error,
        }
    };
    ensure!(found == 4, "{found} records before it");
    ensure!(
        matches!(error, Error::Truncated { requested, earliest, .. } if requested == 4.into() && earliest == 7.into()),
        "{error:?}"
    );
    let mut reader = log.read(7.into()).await?;
    ensure!(payloads(&soon(reader.next(100)).await??) == ["7", "8", "9"], "after it");
    Ok(())
}

pub(crate) async fn handles_of_one_log_agree() -> Outcome {
    let stage = Stage::start().await?;
    let (a, b) = (stage.pg.log("orders").await?, stage.other().await?.log("orders").await?);
    ensure!(
        a.id() == b.id() && a.id().incarnation().is_some(),
        "{} and {}",
        a.id(),
        b.id()
    );
    for n in 0..10_u64 {
        let log = if n % 2 == 0 { &a } else { &b };
        ensure!(log.append(&numbered(0..1)).await? == Some(n.into()), "offsets");
    }
    ensure!(records(&a).await? == records(&b).await?, "they differ");
    ensure!(
        a.tail(3).await? == Some(7.into()) && b.count_from(Offset::from(4)).await? == Some(6),
        "counts"
    );
    // A recreated log is another one.
    stage.sql("DELETE FROM essentially_once.records; DELETE FROM essentially_once.logs")?;
    let new = stage.other().await?.log("orders").await?;
    ensure!(new.id() != a.id(), "{}", new.id());
    assert_error!(
        a.append(&numbered(0..1)).await,
        Error::Failed { .. },
        "deleted or recreated",
        "open it again"
    );
    assert_error!(a.bounds().await, Error::Failed { .. }, "open it again");
    ensure!(new.bounds().await?.end == 0.into(), "it was appended to the new one");
    Ok(())
}
