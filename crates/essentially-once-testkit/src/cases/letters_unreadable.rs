//! A case for dead letters that the store cannot read,
//! [D5](essentially_once::backend::DeadLetters#contract).

use essentially_once::{Offset, OffsetStore, backend::Transaction};

use super::{
    common::{advance, consumer},
    letters::{all, commit, differs, letter, letters, offsets, time},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, ensure},
};

/// [D5](essentially_once::backend::DeadLetters#contract): all reads show the letters around one
/// that cannot be read, and that one itself until it is removed.
pub(super) async fn d5_a_letter_that_cannot_be_read_hides_no_other<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let mut parked = [1, 2, 3, 4].map(|offset| letter(offset, Some(b"a")));
    parked[1].due = Some(time(3));
    parked[3].record.key = Some("b".into());
    parked[3].due = Some(time(4));
    commit(&store, &shipping, &*log, &parked, &[]).await?;
    backend.damage_letter(&shipping, 2.into()).await?;
    // The handle that parked the letters may still know the damaged one.
    let store = backend.store().await?;
    for (is_removed, expected, head) in [(false, vec![1, 2, 3, 4], 2), (true, vec![1, 3, 4], 3)] {
        let when = if is_removed { "after its removal" } else { "next to it" };
        let expected: Vec<Offset> = expected.into_iter().map(Offset::from).collect();
        let position = store.position(&shipping).await?;
        let mut tx = store.begin(&shipping).await?;
        if is_removed {
            let existed = letters(&mut tx)?.remove(2.into()).await?;
            ensure!(existed, "`remove` did not find the damaged letter");
        }
        let reads = letters(&mut tx)?;
        let found = reads.list(None, 1_000).await?;
        ensure!(offsets(&found) == expected, "the list {when}: {:?}", offsets(&found));
        for (found, at) in found.iter().zip(&expected) {
            let parked = parked.iter().find(|letter| letter.record.offset == *at);
            let is_damaged = *at == 2.into();
            ensure!(
                found.unreadable == is_damaged,
                "the letter at {at} is unreadable: {}",
                found.unreadable
            );
            let how = parked.filter(|_| !is_damaged).and_then(|parked| differs(found, parked));
            ensure!(how.is_none(), "the letter at {at}: {how:?}");
            ensure!(!found.last_reason.is_empty(), "the letter at {at} has no reason");
        }
        let page = reads.list(Some(1.into()), 2).await?;
        ensure!(offsets(&page) == expected[1..3], "a page {when}: {:?}", offsets(&page));
        let single = reads.letter(2.into()).await?;
        let is_there = single.as_ref().is_some_and(|letter| letter.unreadable);
        ensure!(is_there != is_removed, "the letter itself, {when}: {single:?}");
        let counts = (reads.counts(None, 10).await?, reads.total().await?);
        let of_a = expected.len() as u64 - 1;
        let wanted = (vec![("a".into(), of_a), ("b".into(), 1)], of_a + 1);
        ensure!(counts == wanted, "counts {when}: {counts:?}, not {wanted:?}");
        let due = reads.first_due().await?.map(|letter| letter.record.offset);
        ensure!(due == Some(4.into()), "the first due {when}: {due:?}");
        reads.remove(1.into()).await?;
        let found = reads.head(b"a").await?.map(|letter| letter.record.offset);
        ensure!(found == Some(head.into()), "the head {when}: {found:?}, not {head}");
        if is_removed {
            tx.commit(advance(position.as_ref(), &*log, 1)).await?;
        } else {
            tx.rollback().await?;
        }
    }
    let left = offsets(&all(&backend.store().await?, &shipping).await?);
    ensure!(left == [3.into(), 4.into()], "after the commit: {left:?}");
    Ok(())
}
