//! Cases for refused appends, and for the appends next to them: [L7 and
//! L10](essentially_once::Log#contract).

use essentially_once::{Error, NewRecord};

use super::common::{is_certain, payloads, read_all, records, soon};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// [L7](essentially_once::Log#contract): the backend refuses a record in the middle of a batch, as
/// a full disk does.
pub(super) async fn l7_a_refusal_within_a_batch_reports_its_outcome<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    const BATCH: usize = 5;
    let log = backend.log("orders").await?;
    let mut outcomes: Vec<Result<(), Error>> = Vec::new();
    for nth in 0..BATCH {
        log.append(&records([format!("before {nth}")])).await?;
        let batch = outcomes.len();
        backend.refuse("orders", format!("{batch}.{nth}").as_bytes()).await?;
        let result = log.append(&records((0..BATCH).map(|n| format!("{batch}.{n}")))).await;
        outcomes.push(result.map(drop));
        let after = log.append(&records([format!("after {nth}")])).await;
        ensure!(after.is_ok(), "the append after a refused one returned {after:?}");
    }
    let found = to_the_end(backend).await?;
    for (batch, outcome) in outcomes.iter().enumerate() {
        judge(&found, &batch.to_string(), BATCH, outcome)?;
        ensure!(
            outcome.is_err(),
            "the backend refused a record of append {batch}, but the append returned {outcome:?}"
        );
    }
    Ok(())
}

/// Reads all payloads on a new handle.
async fn to_the_end(backend: &impl Backend) -> Result<Vec<String>, Violation> {
    let log = backend.log("orders").await?;
    log.append(&records(["end"])).await?;
    let mut found = Vec::new();
    let mut reader = log.read(log.bounds().await?.earliest).await?;
    while found.last().is_none_or(|last| last != "end") {
        found.extend(payloads(&soon("the last record", reader.next(1_000)).await??));
    }
    Ok(found)
}

/// Compares the records `<name>.0` to `<name>.<count>` in the log with the outcome of their append.
fn judge(found: &[String], name: &str, count: usize, outcome: &Result<(), Error>) -> CaseResult {
    let prefix = format!("{name}.");
    let there: Vec<_> = found.iter().filter(|payload| payload.starts_with(&prefix)).collect();
    let expected = (0..count).map(|n| format!("{name}.{n}"));
    let is_prefix = there.len() <= count && there.iter().zip(expected).all(|(found, expected)| **found == expected);
    let (fits, meaning) = match outcome {
        Ok(()) => (is_prefix && there.len() == count, "all of its records"),
        Err(error) if is_certain(error) => (there.is_empty(), "none"),
        Err(_) => (is_prefix, "a prefix"),
    };
    ensure!(
        fits,
        "append {name} of {count} records returned {outcome:?}, which means {meaning}, but the log holds {there:?}"
    );
    Ok(())
}

/// [L7](essentially_once::Log#contract): two concurrent appends on one handle, one of which is
/// refused for a record's size. The other must neither fail nor lose records.
pub(super) async fn l7_concurrent_appends_have_their_own_outcomes<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    const ROUNDS: usize = 20;
    const BATCH: usize = 3;
    let limit = harness.capabilities().record_limit.unwrap_or_default();
    let log = backend.log("orders").await?;
    let mut outcomes = Vec::new();
    for round in 0..ROUNDS {
        let good = records((0..BATCH).map(|n| format!("good-{round}.{n}")));
        let mut bad = records((0..BATCH).map(|n| format!("bad-{round}.{n}")));
        bad.insert(round % BATCH, NewRecord::new(vec![b'x'; limit + 1]));
        let (good, bad) = match round % 2 {
            0 => tokio::join!(log.append(&good), log.append(&bad)),
            _ => {
                let (bad, good) = tokio::join!(log.append(&bad), log.append(&good));
                (good, bad)
            }
        };
        ensure!(
            matches!(bad, Err(Error::TooLarge { .. })),
            "round {round}: the append of a record over the limit returned {bad:?}"
        );
        if let Err(error) = &good {
            return Err(Violation::new(format!(
                "round {round}: an append failed because a concurrent one was refused: {error}"
            )));
        }
        outcomes.push((good.map(drop), bad.map(drop)));
    }
    let found = to_the_end(backend).await?;
    for (round, (good, bad)) in outcomes.iter().enumerate() {
        judge(&found, &format!("good-{round}"), BATCH, good)?;
        judge(&found, &format!("bad-{round}"), BATCH, bad)?;
    }
    Ok(())
}

/// [L10](essentially_once::Log#contract): a handle whose log was deleted appends to no other log.
pub(super) async fn l10_an_old_handle_never_appends_to_a_new_log<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    for is_recreated_first in [false, true] {
        let name = if is_recreated_first { "first" } else { "later" };
        let old = backend.log(name).await?;
        old.append(&records(["old"])).await?;
        backend.delete(name).await?;
        let mut expected = Vec::new();
        if is_recreated_first {
            backend.log(name).await?.append(&records(["new"])).await?;
            expected.push("new".to_owned());
        }
        // An error is best. An append that is deleted together with the old log is just as good.
        let outcome = soon("an append to a deleted log", old.append(&records(["stray"]))).await?;
        let new = backend.log(name).await?;
        let bounds = new.bounds().await?;
        let found = match bounds.earliest == bounds.end {
            true => Vec::new(),
            false => payloads(&read_all(&*new, expected.len().max(1)).await?),
        };
        ensure!(
            found == expected,
            "an append through the handle of a deleted log returned {outcome:?}, and the log created later holds {found:?}"
        );
        new.append(&records(["last"])).await?;
        expected.push("last".to_owned());
        let found = payloads(&read_all(&*new, expected.len()).await?);
        ensure!(
            found == expected,
            "an append through the handle of a deleted log returned {outcome:?}, and the log created later holds {found:?}"
        );
    }
    Ok(())
}
