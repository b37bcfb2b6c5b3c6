//! How a new handle reads the streams, intact or damaged.

use std::time::Duration;

use essentially_once::{Error, KeyValue as _, OffsetStore as _, backend::Transaction as _};
use essentially_once_testkit::Violation;
use lapin::options::QueueDeleteOptions;

use crate::{
    Tests,
    support::{Place, advance, chunk_offset, get, put, revision, shipping},
};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("recovery::snapshots_are_written_and_used", snapshots);
    tests.add("recovery::a_damaged_snapshot_falls_back_to_an_older_one", damaged);
    tests.add("recovery::a_lost_changelog_is_reported", lost);
    tests.add("recovery::an_entry_that_cannot_be_read_stops", unreadable);
    tests.add("recovery::retention_removes_only_what_a_snapshot_covers", retention);
}

/// The size of entries that are not commits.
const MARK: usize = 26;

/// Commits until both streams have a snapshot, and returns the revision.
async fn until_snapshots(place: &Place) -> Result<u64, Violation> {
    let store = place.rabbit().await?.store().snapshot_after(1);
    let mut revision = 0;
    for letter in ['a', 'b'] {
        // The number of commits varies: one may find the previous snapshot still in progress.
        let (stranger, stream) = (place.stranger().await, place.snapshots(letter));
        let found = async {
            while !stranger.sees(&stream).await {}
            stranger.find(&stream, |_| true).await
        };
        tokio::pin!(found);
        loop {
            put(&store, "k", &(revision + 1).to_string(), revision).await?;
            revision += 1;
            let soon = tokio::time::timeout(Duration::from_millis(200), &mut found);
            if soon.await.is_ok() {
                break;
            }
        }
    }
    Ok(revision)
}

async fn snapshots() -> Result<(), Violation> {
    let mut place = Place::new();
    let last = until_snapshots(&place).await?;
    let fresh = place.store().await?;
    assert_eq!(
        (revision(&fresh).await?, get(&fresh, "k").await?),
        (last, Some(last.to_string()))
    );
    // Without the entries, only a snapshot has the state. The one with the highest offset must be
    // used.
    let stranger = place.stranger().await;
    stranger
        .channel
        .queue_delete(place.changelog().into(), QueueDeleteOptions::default())
        .await
        .expect("deleted");
    // For this long, the replica might only lag.
    place.timeout = Duration::from_secs(3);
    let error = loop {
        match revision(&place.store().await?).await {
            // A busy broker may take longer.
            Err(error) if error.is_transient() => {}
            found => break found.expect_err("the changelog is gone"),
        }
    };
    assert!(error.to_string().contains("state lost"), "{error}");
    Ok(())
}

async fn damaged() -> Result<(), Violation> {
    let place = Place::new();
    let last = until_snapshots(&place).await?;
    let stranger = place.stranger().await;
    for letter in ['a', 'b'] {
        let (_, chunk) = stranger.find(&place.snapshots(letter), |_| true).await;
        // Each would be the newest: one with a flipped bit, one without its second half, one with a
        // wrong offset, and junk.
        let newest = |chunk: &mut Vec<u8>| {
            let offset = chunk_offset(chunk) + 1_000;
            chunk[25..33].copy_from_slice(&offset.to_be_bytes());
        };
        let mut flipped = chunk.clone();
        *flipped.last_mut().expect("bytes") ^= 1;
        let mut half = chunk.clone();
        half[40] = 2;
        let mut lying = chunk.clone();
        newest(&mut lying);
        newest(&mut flipped);
        newest(&mut half);
        for message in [&flipped[..], &half, &lying, b"junk", b""] {
            stranger.publish(&place.snapshots(letter), message).await;
        }
    }
    let fresh = place.rabbit().await?.store().snapshot_after(1);
    assert_eq!(
        (revision(&fresh).await?, get(&fresh, "k").await?),
        (last, Some(last.to_string()))
    );
    put(&fresh, "k", "on", last).await?;
    Ok(())
}

async fn lost() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    for expected in 0..3 {
        put(&store, "k", "v", expected).await?;
    }
    let stranger = place.stranger().await;
    let mut commits = 0;
    let third = |body: &[u8]| {
        commits += usize::from(body.len() > MARK);
        commits == 3
    };
    let (_, third) = stranger.find(&place.changelog(), third).await;
    stranger
        .channel
        .queue_delete(place.changelog().into(), QueueDeleteOptions::default())
        .await
        .expect("deleted");
    let emptied = place.store().await?;
    assert_eq!(
        emptied.position(&shipping()).await?,
        None,
        "no error although the state is gone"
    );
    // It builds on two missing entries.
    stranger.publish(&place.changelog(), &third).await;
    for store in [&emptied, &place.store().await?] {
        let error = store.position(&shipping()).await.expect_err("commits are missing");
        assert!(
            matches!(error, Error::Failed { .. }) && error.to_string().contains("state lost"),
            "{error}"
        );
    }
    // A handle that has read more than the stream holds.
    let error = store
        .position(&shipping())
        .await
        .expect_err("the changelog was deleted");
    assert!(
        matches!(error, Error::Failed { .. } | Error::Unavailable { .. }),
        "{error}"
    );
    Ok(())
}

async fn unreadable() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    put(&store, "k", "v", 0).await?;
    let stranger = place.stranger().await;
    stranger
        .publish(&place.changelog(), b"eo-entry\x09 of a later version")
        .await;
    for store in [&store, &place.store().await?] {
        for _ in 0..2 {
            let error = store.position(&shipping()).await.expect_err("it cannot go on");
            let text = error.to_string();
            assert!(
                matches!(error, Error::Failed { .. }) && text.contains(&place.changelog()) && text.contains("version"),
                "{text}"
            );
        }
    }
    Ok(())
}

async fn retention() -> Result<(), Violation> {
    const VALUE: usize = 15 * 1024 * 1024;
    let place = Place::new();
    let store = place.store().await?;
    put(&store, "kept", "since the beginning", 0).await?;
    let stranger = place.stranger().await;
    let mut revision = 1;
    // More than the changelog keeps.
    for round in 0..45u8 {
        let mut tx = store.begin(&shipping()).await?;
        tx.put(b"large", &vec![round; VALUE]).await?;
        tx.commit(advance(revision + 1, revision)).await?;
        revision += 1;
    }
    let (first, _) = stranger.find(&place.changelog(), |_| true).await;
    assert!(first > 0, "retention has removed nothing");
    let fresh = place.store().await?;
    assert_eq!(crate::support::revision(&fresh).await?, revision);
    assert_eq!(get(&fresh, "kept").await?.as_deref(), Some("since the beginning"));
    let large = fresh.begin(&shipping()).await?.get(b"large").await?.expect("a value");
    assert!(large.len() == VALUE && large[0] == 44);
    put(&fresh, "kept", "on", revision).await?;
    Ok(())
}
