//! What standbys see of the owner, and reading without a transaction.

use std::time::{Duration, Instant};

use essentially_once::{
    ConsumerId, Error, KeyValue as _, Log as _, Offset, OffsetStore as _, ReadState as _,
    backend::{Owner, Pulse, Revision, Transaction as _},
};
use essentially_once_rabbitmq::{LogOptions, Rabbit, RabbitStore};
use essentially_once_testkit::Violation;
use tokio::time::timeout;

use crate::{
    Tests,
    support::{Place, advance, shipping},
};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("hints::beats_and_releases_show_in_the_pulse", shown);
    tests.add("hints::hints_fence_nobody", harmless);
    tests.add("hints::watching_writes_nothing", silent);
    tests.add("hints::a_watch_is_not_ended_by_what_changes_nothing", undisturbed);
    tests.add("hints::snapshots_keep_ahead_of_beats", covered);
    tests.add("hints::hints_are_marks_that_every_version_reads", marks);
    tests.add("hints::a_watch_makes_no_commit_wait", polite);
    tests.add("hints::beats_are_read_back_while_a_handler_is_busy", read_back);
    tests.add("hints::state_is_read_as_one_commit_left_it", state);
}

const OWNER: Owner = Owner::new(0x1234);
const OTHER: Owner = Owner::new(0x5678);

/// Commits with that owner.
async fn commit(store: &RabbitStore, commits: u64, owner: Owner) -> Result<(), Error> {
    let mut tx = store.begin(&shipping()).await?;
    tx.put(b"commits", commits.to_string().as_bytes()).await?;
    tx.put(b"twice", (2 * commits).to_string().as_bytes()).await?;
    let mut advance = advance(commits + 1, commits);
    advance.owner = Some(owner);
    tx.commit(advance).await
}

/// Waits for another pulse, with as many calls as that takes.
async fn changed(store: &RabbitStore, seen: &Pulse) -> Result<Pulse, Violation> {
    let watching = async {
        loop {
            let pulse = store.watch(&shipping(), seen, Duration::from_millis(100)).await?;
            if pulse != *seen {
                return Ok(pulse);
            }
        }
    };
    match timeout(Duration::from_secs(30), watching).await {
        Ok(watched) => watched,
        Err(_) => Err(Violation::new(format!("the pulse stays {seen:?}"))),
    }
}

async fn shown() -> Result<(), Violation> {
    let place = Place::new();
    let (active, standby) = (place.store().await?, place.store().await?);
    assert_eq!(standby.pulse(&shipping()).await?, Pulse::default());
    commit(&active, 0, OWNER).await?;
    let first = changed(&standby, &Pulse::default()).await?;
    let position = standby.position(&shipping()).await?;
    assert_eq!(first, Pulse::new(position.as_ref(), 0));
    let mut last = first;
    for _ in 0..3 {
        active.beat(&shipping(), OWNER).await?;
        let pulse = changed(&standby, &last).await?;
        let beats = pulse.beats;
        last.beats = beats;
        assert_eq!(pulse, last, "only the beats change");
    }
    // The active instance sees its own hints, too, once it has read them back.
    let sees = async {
        let mut pulse = active.pulse(&shipping()).await?;
        while pulse != last {
            pulse = active.watch(&shipping(), &pulse, Duration::from_millis(100)).await?;
        }
        Ok::<_, Error>(())
    };
    timeout(Duration::from_secs(30), sees)
        .await
        .map_err(|_| Violation::new("the active instance does not see its own beats"))??;
    // A stranger's hints have no effect.
    place.store().await?.beat(&shipping(), OTHER).await?;
    place.store().await?.release(&shipping(), OTHER).await?;
    active.release(&shipping(), OWNER).await?;
    let released = changed(&standby, &last).await?;
    assert_eq!((released.owner, released.revision), (None, first.revision));
    // According to the whole changelog, and according to a snapshot.
    for _ in 0..2 {
        let position = place.store().await?.position(&shipping()).await?.expect("some");
        assert_eq!((position.owner, position.revision), (None, Revision::new(0, 1)));
        active.snapshot(&shipping()).await?;
    }
    Ok(())
}

async fn harmless() -> Result<(), Violation> {
    let place = Place::new();
    let (active, standby) = (place.store().await?, place.store().await?);
    commit(&active, 0, OWNER).await?;
    let tx = active.begin(&shipping()).await?;
    standby.position(&shipping()).await?;
    standby.release(&shipping(), OWNER).await?;
    standby.beat(&shipping(), OWNER).await?;
    let mut next = advance(2, 1);
    next.owner = Some(OWNER);
    tx.commit(next).await?;
    let position = standby.position(&shipping()).await?.expect("some");
    assert_eq!((position.owner, position.revision), (Some(OWNER), Revision::new(0, 2)));
    Ok(())
}

/// Writes to the changelog as a stranger who does not know what it is.
async fn end_of_changelog(place: &Place) -> Result<Offset, Violation> {
    let other = Rabbit::connect(&place.url).await?;
    let changelog = other.log_with(&place.changelog(), LogOptions::new().existing()).await?;
    Ok(changelog.bounds().await?.end)
}

async fn undisturbed() -> Result<(), Violation> {
    let place = Place::new();
    let (active, standby, other) = (place.store().await?, place.store().await?, place.store().await?);
    commit(&active, 0, OWNER).await?;
    let seen = standby.pulse(&shipping()).await?;
    let consumer = shipping();
    let mut watching = std::pin::pin!(standby.watch(&consumer, &seen, Duration::from_secs(60)));
    // Each call of `position` writes a mark that the standby reads.
    for _ in 0..5 {
        tokio::select! {
            biased;
            watched = &mut watching => {
                return Err(Violation::new(format!("a mark ended the watch: {seen:?}, {watched:?}")));
            }
            asked = other.position(&consumer) => drop(asked?),
        }
    }
    let (watched, committed) = tokio::join!(timeout(Duration::from_secs(30), watching), commit(&active, 1, OWNER));
    committed?;
    let watched = watched.map_err(|_| Violation::new("the commit did not end the watch"))??;
    assert_ne!(watched.revision, seen.revision);
    Ok(())
}

async fn covered() -> Result<(), Violation> {
    let place = Place::new();
    let active = place.rabbit().await?.store().snapshot_after(8 * 1024);
    commit(&active, 0, OWNER).await?;
    let other = Rabbit::connect(&place.url).await?;
    let writes_a_snapshot = async {
        loop {
            active.beat(&shipping(), OWNER).await?;
            for stream in ['a', 'b'].map(|letter| place.snapshots(letter)) {
                let end = async {
                    let log = other.log_with(&stream, LogOptions::new().existing()).await?;
                    Ok(log.bounds().await?.end)
                };
                match end.await {
                    Ok(end) if end > Offset::ZERO => return Ok::<_, Error>(()),
                    Ok(_) | Err(Error::Failed { .. }) => {}
                    // RabbitMQ 3.10 may answer with INTERNAL_ERROR while the stream is declared.
                    Err(error) if error.is_transient() => {}
                    Err(error) => return Err(error),
                }
            }
        }
    };
    // Only beats are published in the meantime.
    timeout(Duration::from_secs(60), writes_a_snapshot)
        .await
        .map_err(|_| Violation::new("beats were published without a snapshot"))??;
    Ok(())
}

async fn silent() -> Result<(), Violation> {
    let place = Place::new();
    let (active, standby) = (place.store().await?, place.store().await?);
    commit(&active, 0, OWNER).await?;
    let before = end_of_changelog(&place).await?;
    let pulse = standby.pulse(&shipping()).await?;
    for _ in 0..10 {
        standby.pulse(&shipping()).await?;
        let watched = standby.watch(&shipping(), &pulse, Duration::from_millis(20)).await?;
        assert_eq!(watched, pulse);
    }
    assert_eq!(end_of_changelog(&place).await?, before);
    let nobody = ConsumerId::new("nobody")?;
    standby.beat(&nobody, OWNER).await?;
    standby.release(&nobody, OWNER).await?;
    assert_eq!(standby.pulse(&nobody).await?, Pulse::default());
    let stream = format!("{}.nobody.changelog", place.prefix);
    assert!(!place.stranger().await.sees(&stream).await, "looking created {stream}");
    Ok(())
}

async fn marks() -> Result<(), Violation> {
    let place = Place::new();
    let active = place.store().await?;
    commit(&active, 0, OWNER).await?;
    active.beat(&shipping(), OWNER).await?;
    active.release(&shipping(), OWNER).await?;
    let stranger = place.stranger().await;
    for token in [OWNER.get(), !OWNER.get()] {
        // Version 1, and the kind of entry that changes nothing.
        let mark = [&b"eo-entry\x01\x02"[..], &token.to_be_bytes()].concat();
        stranger.find(&place.changelog(), |body| body == mark).await;
    }
    Ok(())
}

async fn polite() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    commit(&store, 0, OWNER).await?;
    // The watch goes on at once after each commit, so it waits during most of the next one.
    for commits in 1..10 {
        let pulse = store.pulse(&shipping()).await?;
        let watching = {
            let store = store.clone();
            tokio::spawn(async move { store.watch(&shipping(), &pulse, Duration::from_secs(60)).await })
        };
        let started = Instant::now();
        commit(&store, commits, OWNER).await?;
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "it waited {:?}",
            started.elapsed()
        );
        let watched = watching.await.expect("no panic")?;
        assert_eq!(watched.revision, Revision::new(0, commits + 1));
    }
    Ok(())
}

/// More beats than the broker sends ahead. Unread, they would stay unacknowledged until it closes
/// the channel.
async fn read_back() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    commit(&store, 0, OWNER).await?;
    let tx = store.begin(&shipping()).await?;
    for _ in 0..200 {
        store.beat(&shipping(), OWNER).await?;
    }
    let count = "lists:sum([proplists:get_value(messages_unacknowledged, I) || \
                 I <- rabbit_channel:info_all([messages_unacknowledged])]).";
    // Other tests on this node may have some, but this one must not.
    let unacknowledged = || -> Result<u32, Violation> {
        let node = crate::support::node();
        let shown = tokio::task::block_in_place(|| node.ctl(&["eval", count]))?;
        shown.trim().parse().map_err(|_| Violation::new(shown))
    };
    let settled = async {
        loop {
            store.beat(&shipping(), OWNER).await?;
            if unacknowledged()? < 100 {
                return Ok::<_, Violation>(());
            }
        }
    };
    timeout(Duration::from_secs(60), settled)
        .await
        .map_err(|_| Violation::new("beats stay unacknowledged"))??;
    let mut next = advance(2, 1);
    next.owner = Some(OWNER);
    tx.commit(next).await?;
    Ok(())
}

async fn state() -> Result<(), Violation> {
    let place = Place::new();
    let (writer, reader) = (place.store().await?, place.store().await?);
    let nothing = reader.read_state(&shipping(), &[b"commits"]).await?;
    assert_eq!((nothing.position, nothing.values), (None, vec![None]));
    let commits = 20;
    let writing = {
        let writer = writer.clone();
        tokio::spawn(async move {
            for number in 0..commits {
                commit(&writer, number, OWNER).await?;
            }
            Ok::<_, Error>(())
        })
    };
    let mut last = 0;
    while last < commits {
        let snapshot = reader
            .read_state(&shipping(), &[b"twice", b"absent", b"commits"])
            .await?;
        let Some(position) = snapshot.position else { continue };
        let number = position.revision.count() - 1;
        let value = |number: u64| Some(bytes::Bytes::from(number.to_string()));
        assert_eq!(snapshot.values, [value(2 * number), None, value(number)]);
        assert!(number + 1 >= last, "it went back");
        last = number + 1;
    }
    writing.await.expect("no panic")?;
    // Staged changes neither block it nor are visible to it.
    let mut open = writer.begin(&shipping()).await?;
    open.put(b"commits", b"staged").await?;
    let started = Instant::now();
    for store in [&writer, &reader] {
        let snapshot = store.read_state(&shipping(), &[b"commits"]).await?;
        assert_eq!(snapshot.values, [Some(bytes::Bytes::from((commits - 1).to_string()))]);
    }
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "it waited {:?}",
        started.elapsed()
    );
    open.rollback().await?;
    Ok(())
}
