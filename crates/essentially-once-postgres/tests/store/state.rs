//! The state that a store remembers.

use essentially_once::{
    Error, KeyValue as _, OffsetStore as _,
    backend::{Revision, Transaction as _},
};
use essentially_once_postgres::{PgOptions, PgStore};

use crate::common::{Outcome, Stage, advance, assert_error, ensure};

/// More keys than a transaction reads at once.
const MANY: u32 = 10_500;

async fn value(stage: &Stage, store: &PgStore, key: &str) -> Result<Option<String>, Error> {
    let value = store.begin(&stage.consumer).await?.get(key.as_bytes()).await?;
    Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
}

pub(crate) async fn a_store_reads_what_others_have_committed_since() -> Outcome {
    let stage = Stage::start().await?;
    let other = stage.other().await?.store();
    let (mut commits, mut expected) = (0, None);
    for store in [&stage.store, &other, &stage.store, &other, &other, &stage.store] {
        for reader in [&stage.store, &other] {
            let found = value(&stage, reader, "k").await?;
            ensure!(found == expected, "{found:?} instead of {expected:?}");
        }
        let mut tx = store.begin(&stage.consumer).await?;
        tx.get(b"k").await?;
        tx.put(b"k", commits.to_string().as_bytes()).await?;
        tx.commit(advance(commits, 1)).await?;
        expected = Some(commits.to_string());
        commits += 1;
    }
    Ok(())
}

pub(crate) async fn what_was_read_before_another_commit_is_not_committed() -> Outcome {
    let stage = Stage::start().await?;
    stage.begin().await?.commit(advance(0, 1)).await?;
    let mut late = stage.begin().await?;
    ensure!(late.get(b"k").await?.is_none(), "a value");
    let mut tx = stage.other().await?.store().begin(&stage.consumer).await?;
    tx.put(b"k", b"1").await?;
    tx.commit(advance(1, 1)).await?;
    // It would pass the check of the revision alone.
    late.put(b"k", b"from nothing").await?;
    assert_error!(late.commit(advance(2, 1)).await, Error::Fenced { .. }, "revision 2");
    ensure!(stage.value("k").await?.as_deref() == Some("1"), "overwritten");
    ensure!(stage.commits().await? == 2, "committed");
    Ok(())
}

pub(crate) async fn a_rolled_back_change_is_not_remembered() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    tx.get(b"k").await?;
    tx.put(b"k", b"1").await?;
    tx.commit(advance(0, 1)).await?;
    for is_dropped in [true, false] {
        let mut tx = stage.begin().await?;
        tx.get(b"k").await?;
        tx.put(b"k", b"2").await?;
        tx.delete(b"l").await?;
        match is_dropped {
            true => drop(tx),
            false => tx.rollback().await?,
        }
        ensure!(stage.value("k").await?.as_deref() == Some("1"), "remembered");
    }
    let mut fenced = stage.begin().await?;
    fenced.get(b"k").await?;
    fenced.put(b"k", b"3").await?;
    let stale = fenced.commit(advance(5, 1)).await;
    assert_error!(stale, Error::Fenced { .. }, "revision 5");
    ensure!(stage.value("k").await?.as_deref() == Some("1"), "remembered");
    Ok(())
}

/// The state is read in part, and each of the other keys when it is needed.
pub(crate) async fn a_large_state_is_read_key_by_key() -> Outcome {
    let stage = Stage::start().await?;
    let key = |n: u32| format!("{n:05}");
    let mut tx = stage.begin().await?;
    for n in 0..MANY {
        tx.put(key(n).as_bytes(), n.to_string().as_bytes()).await?;
    }
    tx.put(b"large", &vec![7; 2 * 1024 * 1024]).await?;
    tx.commit(advance(0, 1)).await?;
    let other = stage.other().await?.store();
    for store in [&stage.store, &other] {
        let mut tx = store.begin(&stage.consumer).await?;
        for n in [0, 9_999, 10_000, MANY - 1] {
            let found = tx.get(key(n).as_bytes()).await?;
            ensure!(found.as_deref() == Some(n.to_string().as_bytes()), "{n}: {found:?}");
        }
        ensure!(tx.get(key(MANY).as_bytes()).await?.is_none(), "a key too many");
        ensure!(
            tx.get(b"large")
                .await?
                .is_some_and(|value| value.len() == 2 * 1024 * 1024),
            "large"
        );
    }
    Ok(())
}

/// A first value that is larger than what is read at once hides no other.
pub(crate) async fn a_large_first_value_does_not_hide_the_others() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    tx.put(b"a", &vec![7; 2 * 1024 * 1024]).await?;
    tx.put(b"b", b"1").await?;
    tx.commit(advance(0, 1)).await?;
    let mut tx = stage.other().await?.store().begin(&stage.consumer).await?;
    ensure!(tx.get(b"b").await?.as_deref() == Some(b"1"), "hidden");
    ensure!(
        tx.get(b"a").await?.is_some_and(|value| value.len() == 2 * 1024 * 1024),
        "cut"
    );
    ensure!(tx.get(b"c").await?.is_none(), "a value");
    Ok(())
}

pub(crate) async fn a_store_can_remember_nothing() -> Outcome {
    let stage = Stage::with(PgOptions::new().state_memory(0), &[]).await?;
    for (commits, expected) in [(0, None), (1, Some("0")), (2, Some("1"))] {
        let mut tx = stage.begin().await?;
        let found = tx.get(b"k").await?;
        ensure!(found.as_deref() == expected.map(str::as_bytes), "{found:?}");
        ensure!(tx.get(b"l").await?.is_none(), "a value");
        tx.put(b"k", commits.to_string().as_bytes()).await?;
        tx.commit(advance(commits, 1)).await?;
    }
    Ok(())
}

/// A consumer whose rows were deleted starts without the state that its store remembers.
pub(crate) async fn a_consumer_that_was_deleted_is_not_remembered() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    tx.get(b"k").await?;
    tx.put(b"k", b"1").await?;
    tx.commit(advance(0, 1)).await?;
    stage.sql("DELETE FROM essentially_once.consumers; DELETE FROM essentially_once.state")?;
    ensure!(stage.value("k").await?.is_none(), "remembered");
    let position = stage.store.position(&stage.consumer).await?;
    ensure!(
        position.is_none_or(|position| position.revision == Revision::NONE),
        "a position"
    );
    Ok(())
}
