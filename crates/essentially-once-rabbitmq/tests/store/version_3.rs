//! Streams with dead letters, in version 3 of the formats, are read as they were meant. See
//! `tests/fixtures`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use essentially_once::{OffsetStore as _, consumer::dead_letters};
use essentially_once::{
    Origin, Record,
    backend::{DeadLetter, DeadLetters as _, Revision, Transaction as _},
};
use essentially_once_testkit::Violation;

use crate::{
    Tests,
    fixture::{copy, messages},
    support::{Place, chunk_offset, get, shipping},
};

const FIXTURE: &str = include_str!("../fixtures/version-3.txt");
const CHANGELOG: &str = "shop.shipping.changelog";
const SNAPSHOTS: &str = "shop.shipping.snapshots.a";

pub(crate) fn add(tests: &mut Tests) {
    tests.add("version_3::letters_in_a_changelog_are_read", changelog);
    tests.add("version_3::letters_in_a_snapshot_are_read", snapshot);
}

fn time(millis: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(1_795_000_000_000 + millis)
}

/// The letters of offsets 1 to 5 as they were parked first.
fn parked() -> [DeadLetter; 5] {
    let letter = |offset: u64, key: Option<&'static [u8]>, reason: &str| {
        let mut record = Record::new(offset.into(), time(offset), format!("order {offset}"));
        record.key = key.map(Bytes::from_static);
        DeadLetter::new(record, 1, reason, time(100 + offset))
    };
    let mut letters = [
        letter(1, Some(b"a"), "no stock"),
        letter(2, Some(b"a"), "not tried"),
        letter(3, Some(b""), "no address"),
        letter(4, None, "malformed"),
        letter(5, Some(b"b"), "no price"),
    ];
    letters[0].record.headers = vec![
        ("b".into(), Bytes::from_static(b"1")),
        ("a".into(), Bytes::new()),
        ("b".into(), Bytes::from_static(b"\xFF")),
    ];
    letters[0].record.origin = "web#17".parse().ok().map(|numbering| Origin::of(numbering, 9));
    letters[0].due = Some(time(1_000));
    letters[1].tries = 0;
    letters[3].record.malformed = Some("the key is cut short".into());
    letters
}

/// What became of them.
fn left() -> [DeadLetter; 3] {
    let [mut first, second, _, malformed, _] = parked();
    first.tries = 2;
    first.last_reason = "still no stock".into();
    first.last_failed_at = time(1_001);
    first.due = Some(time(3_000));
    first.version = 2;
    [first, second, malformed]
}

async fn assert_is_shipping(place: &Place) -> Result<(), Violation> {
    let store = place.store().await?;
    let position = store.position(&shipping()).await?.expect("some");
    assert_eq!((position.next, position.revision), (5.into(), Revision::new(0, 5)));
    assert_eq!(dead_letters::list(&shipping(), &store, None, 10).await?, left());
    assert_eq!(get(&store, "k").await?.as_deref(), Some("5"));
    let mut tx = store.begin(&shipping()).await?;
    assert_eq!(tx.head(b"a").await?.as_ref(), Some(&left()[0]));
    assert_eq!(tx.first_due().await?.as_ref(), Some(&left()[0]));
    assert_eq!(tx.counts(None, 10).await?, [(Bytes::from_static(b"a"), 2)]);
    tx.rollback().await?;
    Ok(())
}

async fn changelog() -> Result<(), Violation> {
    let place = Place::new();
    let stranger = place.stranger().await;
    stranger.declare_changelog(&place.changelog()).await;
    copy(FIXTURE, &stranger, CHANGELOG, &place.changelog()).await;
    assert_is_shipping(&place).await
}

async fn snapshot() -> Result<(), Violation> {
    let place = Place::new();
    let stranger = place.stranger().await;
    stranger.declare_changelog(&place.changelog()).await;
    stranger.declare_snapshots(&place.snapshots('a')).await;
    copy(FIXTURE, &stranger, SNAPSHOTS, &place.snapshots('a')).await;
    let covered = chunk_offset(&messages(FIXTURE, SNAPSHOTS)[0].body);
    assert!(covered > 0);
    // The entries that the snapshot covers are missing, so only the snapshot has their letters.
    for (offset, message) in (0..).zip(messages(FIXTURE, CHANGELOG)) {
        let body = match offset < covered {
            true => b"covered",
            false => &message.body[..],
        };
        stranger.publish(&place.changelog(), body).await;
    }
    assert_is_shipping(&place).await
}
