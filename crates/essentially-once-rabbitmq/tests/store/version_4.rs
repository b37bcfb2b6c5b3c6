//! Streams with a journal, an edited letter and records sent without an outbox, in version 4 of the
//! formats, are read as they were meant. See `tests/fixtures`.

use essentially_once::{
    Log as _, NewRecord, Offset, OffsetStore as _, Outbox as _,
    backend::{Advance, Revision, Transaction as _, Window},
    consumer::{OperatorAction, dead_letters},
};
use essentially_once_testkit::{Violation, read_log};

use crate::{
    Tests,
    fixture::{copy, messages},
    sent::payloads,
    support::{Place, chunk_offset, get, shipping},
};

const FIXTURE: &str = include_str!("../fixtures/version-4.txt");
const CHANGELOG: &str = "shop.shipping.changelog";
const SNAPSHOTS: &str = "shop.shipping.snapshots.a";

pub(crate) fn add(tests: &mut Tests) {
    tests.add("version_4::a_changelog_is_read_and_continued", changelog);
    tests.add("version_4::a_snapshot_is_read", snapshot);
}

async fn assert_is_shipping(place: &Place) -> Result<(), Violation> {
    let store = place.store().await?;
    let position = store.position(&shipping()).await?.expect("some");
    assert_eq!(
        (position.next, position.revision),
        (6.into(), Revision::new(1 << 32, 6))
    );
    assert_eq!(position.owner, None, "it was released");
    assert_eq!(position.windows, [("app#17".parse()?, Window::new(5))]);
    let entries = position.journal.entries().iter();
    let entries: Vec<_> = entries
        .map(|entry| (&*entry.by, &*entry.reason, entry.action))
        .collect();
    let expected = [
        ("ann", "too warm", OperatorAction::Pause),
        ("bob", "", OperatorAction::Resume),
    ];
    assert_eq!(entries, expected);
    let letters = dead_letters::list(&shipping(), &store, None, 10).await?;
    assert_eq!(letters.len(), 2);
    let edit = letters[0].edit.as_ref().expect("edited");
    assert_eq!((&*edit.by, &*edit.reason), ("ann", "typo"));
    assert_eq!(edit.original.payload, "order 1");
    assert_eq!(letters[0].record.payload, "order 1, corrected");
    assert_eq!((&letters[1].edit, &*letters[1].first_reason), (&None, "no price"));
    assert_eq!(get(&store, "k").await?.as_deref(), Some("5"));
    Ok(())
}

async fn changelog() -> Result<(), Violation> {
    let place = Place::new();
    let stranger = place.stranger().await;
    stranger.declare_changelog(&place.changelog()).await;
    copy(FIXTURE, &stranger, CHANGELOG, &place.changelog()).await;
    assert_is_shipping(&place).await?;
    let store = place.store().await?;
    // No record has an origin, and all stay in the log of all records.
    let all = store.sent(&shipping())?;
    let before = ["sent 0", "sent 3a", "sent 3b"];
    assert_eq!(payloads(&all).await?, before);
    assert!(read_log(&all).await?.iter().all(|record| record.origin.is_none()));
    let outbox = store.sent_to(&shipping(), "b")?;
    assert_eq!(outbox.bounds().await?.end, Offset::ZERO);
    // The first record to an outbox begins its numbers.
    let mut position = store.position(&shipping()).await?.expect("some");
    for n in 0..2 {
        let mut tx = store.begin(&shipping()).await?;
        tx.send("b", NewRecord::new(n.to_string())).await?;
        let (expected, next) = (position.revision, position.next.successor());
        tx.commit(Advance::new(position.log, next, expected, expected.next_count()))
            .await?;
        position = store.position(&shipping()).await?.expect("some");
    }
    let store = place.store().await?;
    assert_eq!(
        payloads(&store.sent(&shipping())?).await?,
        [&before[..], &["0", "1"]].concat()
    );
    let records = read_log(&store.sent_to(&shipping(), "b")?).await?;
    let sequences: Vec<_> = records
        .iter()
        .filter_map(|record| Some(record.origin.as_ref()?.sequence))
        .collect();
    assert_eq!(sequences, [0, 1]);
    Ok(())
}

async fn snapshot() -> Result<(), Violation> {
    let place = Place::new();
    let stranger = place.stranger().await;
    stranger.declare_changelog(&place.changelog()).await;
    stranger.declare_snapshots(&place.snapshots('a')).await;
    copy(FIXTURE, &stranger, SNAPSHOTS, &place.snapshots('a')).await;
    let covered = chunk_offset(&messages(FIXTURE, SNAPSHOTS)[0].body);
    assert!(covered > 0);
    // The entries that the snapshot covers are missing, so only the snapshot has their state.
    for (offset, message) in (0..).zip(messages(FIXTURE, CHANGELOG)) {
        let body = match offset < covered {
            true => b"covered",
            false => &message.body[..],
        };
        stranger.publish(&place.changelog(), body).await;
    }
    assert_is_shipping(&place).await
}
