//! Streams written in version 2 of the formats are read as they were meant. See `tests/fixtures`.

use essentially_once::{
    Log, Offset, OffsetStore as _, ReadState as _, Record,
    backend::{Note, Numbering, Owner, Revision, Snapshot, Window},
};
use essentially_once_testkit::{Violation, read_log};

use crate::{
    Tests,
    fixture::{copy, messages},
    support::{Place, log, shipping},
};

const FIXTURE: &str = include_str!("../fixtures/version-2.txt");
const CHANGELOG: &str = "shop.shipping.changelog";

pub(crate) fn add(tests: &mut Tests) {
    tests.add("version_2::a_changelog_is_read", changelog);
    tests.add("version_2::a_snapshot_is_read", snapshot);
    tests.add("version_2::the_owner_beats_until_it_releases", hints);
}

async fn assert_is_shipping(place: &Place) -> Result<(), Violation> {
    let keys: [&[u8]; 5] = [b"key-0", b"key-1", b"key-2", b"key-3", b"last"];
    let Snapshot { position, values, .. } = place.store().await?.read_state(&shipping(), &keys).await?;
    let position = position.expect("some");
    assert_eq!((position.log, position.next), (log("orders"), Offset::new(3, 1)));
    // Two sessions of two commits each.
    assert_eq!((position.revision, position.owner), (Revision::new(2, 2), None));
    let last = Record::new(Offset::new(3, 0), std::time::UNIX_EPOCH, "order 3");
    assert_eq!(position.note, Note::after(&last));
    let app: Numbering = "app#17".parse()?;
    assert_eq!(position.windows, [(app, Window::new(5))]);
    let value = |text: &'static str| Some(bytes::Bytes::from(text));
    let expected = [value("value 0"), None, value("value 2"), value("value 3"), value("3")];
    assert_eq!(values, expected);
    Ok(())
}

async fn changelog() -> Result<(), Violation> {
    let place = Place::new();
    let stranger = place.stranger().await;
    stranger.declare_changelog(&place.changelog()).await;
    copy(FIXTURE, &stranger, CHANGELOG, &place.changelog()).await;
    assert_is_shipping(&place).await?;
    let sent = place.store().await?.sent(&shipping())?;
    let records = read_log(&sent as &dyn Log).await?;
    let payloads: Vec<_> = records.into_iter().map(|record| record.payload).collect();
    assert_eq!(payloads, ["sent 0", "sent 2"]);
    Ok(())
}

async fn snapshot() -> Result<(), Violation> {
    let place = Place::new();
    let stranger = place.stranger().await;
    stranger.declare_changelog(&place.changelog()).await;
    stranger.declare_snapshots(&place.snapshots('a')).await;
    copy(FIXTURE, &stranger, "shop.shipping.snapshots.a", &place.snapshots('a')).await;
    let covered = crate::support::chunk_offset(&messages(FIXTURE, "shop.shipping.snapshots.a")[0].body);
    assert!(covered > 0);
    // The entries that the snapshot covers are missing, so only the snapshot has their state.
    for (offset, message) in (0..).zip(messages(FIXTURE, CHANGELOG)) {
        let body = if offset < covered {
            b"covered"
        } else {
            &message.body[..]
        };
        stranger.publish(&place.changelog(), body).await;
    }
    assert_is_shipping(&place).await
}

async fn hints() -> Result<(), Violation> {
    let place = Place::new();
    let stranger = place.stranger().await;
    stranger.declare_changelog(&place.changelog()).await;
    let all = messages(FIXTURE, CHANGELOG);
    // The last mark is the release, and the one before it a beat.
    let mut last = place.store().await?.pulse(&shipping()).await?;
    for (left, message) in (0..all.len()).rev().zip(&all) {
        stranger.publish(&place.changelog(), &message.body).await;
        if left <= 2 {
            let pulse = place.store().await?.pulse(&shipping()).await?;
            let owner = (left > 0).then_some(Owner::new(0x1234_5678_9abc_def0_1234_5678_9abc_def0));
            assert_eq!((pulse.owner, pulse.beats > 0), (owner, left == 1), "{left} are left");
            assert!(pulse != last, "{left} are left");
            last = pulse;
        }
    }
    Ok(())
}
