//! Cases for the durability that a backend reports, [L1](essentially_once::Log#contract) and
//! [S3](essentially_once::OffsetStore#contract).

use essentially_once::{Log, OffsetStore, backend::Durability};

use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, ensure},
};

/// [L1](essentially_once::Log#contract): the log reports its durability, gives a reason unless it
/// is durable, and reports the same on every handle.
pub(super) async fn l1_a_log_reports_its_durability<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (log, other) = (backend.log("orders").await?, backend.log("orders").await?);
    agree(&[
        log.durability().await?,
        log.durability().await?,
        other.durability().await?,
    ])
}

/// [S3](essentially_once::OffsetStore#contract): the store reports its durability, gives a reason
/// unless it is durable, and reports the same on every handle.
pub(super) async fn s3_a_store_reports_its_durability<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, other) = (backend.store().await?, backend.store().await?);
    agree(&[
        store.durability().await?,
        store.durability().await?,
        other.durability().await?,
    ])
}

fn agree(answers: &[Durability]) -> CaseResult {
    for answer in answers {
        ensure!(
            *answer == answers[0],
            "asked again, the backend reports the durability {answer:?}, before it was {:?}",
            answers[0]
        );
        let why = match answer {
            Durability::Volatile(why) | Durability::Unknown(why) => why,
            _ => continue,
        };
        ensure!(!why.is_empty(), "{answer:?} gives no reason");
    }
    Ok(())
}
