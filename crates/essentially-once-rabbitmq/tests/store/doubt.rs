//! Commits whose outcome is in doubt, and brokers that die.

use std::time::Duration;

use essentially_once::Error;
use essentially_once_testkit::Violation;
use test_servers::{Cut, Proxy, RabbitNode};

use crate::{
    Tests,
    support::{Place, get, put, revision},
};

pub(crate) fn add(tests: &mut Tests) {
    tests.add(
        "doubt::a_commit_that_is_cut_off_is_indeterminate_and_the_position_decides",
        cuts,
    );
    tests.add("doubt::a_commit_that_comes_after_a_take_over_does_not_apply", late);
    tests.add("doubt::an_entry_that_comes_twice_applies_once", twice);
    tests.add("doubt::what_was_acknowledged_survives_a_killed_broker", killed);
}

async fn cuts() -> Result<(), Violation> {
    for (cut, happened) in [(Cut::BeforeRequest, false), (Cut::BeforeReply, true)] {
        let place = Place::new();
        let proxy = Proxy::start(crate::support::node().port())?;
        let store = place.through(proxy.port()).store().await?;
        put(&store, "k", "before", 0).await?;
        proxy.cut_at(b"the one that is cut", cut);
        let result = put(&store, "k", "the one that is cut", 1).await;
        assert!(
            matches!(result, Err(Error::Indeterminate { .. })),
            "{cut:?}: {result:?}"
        );
        assert_eq!(proxy.fired(), 1);
        let expected = if happened {
            (2, "the one that is cut")
        } else {
            (1, "before")
        };
        assert_eq!(
            (revision(&store).await?, get(&store, "k").await?.as_deref()),
            (expected.0, Some(expected.1)),
            "{cut:?}"
        );
        put(&store, "k", "after", expected.0).await?;
    }
    Ok(())
}

async fn late() -> Result<(), Violation> {
    let place = Place::new();
    let proxy = Proxy::start(crate::support::node().port())?;
    let mut way = place.through(proxy.port());
    way.timeout = Duration::from_secs(3);
    let (zombie, successor) = (way.store().await?, place.store().await?);
    put(&zombie, "k", "zombie 1", 0).await?;
    proxy.hold(true);
    let result = put(&zombie, "k", "zombie 2", 1).await;
    assert!(matches!(result, Err(Error::Indeterminate { .. })), "{result:?}");
    put(&successor, "k", "successor 2", 1).await?;
    proxy.hold(false);
    // The entry is in the stream, whatever its writer knows.
    let (_, _) = place
        .stranger()
        .await
        .find(&place.changelog(), |body| contains(body, b"zombie 2"))
        .await;
    for store in [&successor, &zombie, &place.store().await?] {
        assert_eq!(
            (revision(store).await?, get(store, "k").await?.as_deref()),
            (2, Some("successor 2"))
        );
    }
    put(&successor, "k", "successor 3", 2).await?;
    let result = put(&zombie, "k", "zombie 3", 2).await;
    assert!(matches!(result, Err(Error::Fenced { .. })), "{result:?}");
    Ok(())
}

async fn twice() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    for (expected, value) in [(0, "one"), (1, "two"), (2, "three")] {
        put(&store, "k", value, expected).await?;
    }
    let stranger = place.stranger().await;
    for value in [&b"one"[..], b"two", b"three"] {
        let (_, entry) = stranger.find(&place.changelog(), |body| contains(body, value)).await;
        stranger.publish(&place.changelog(), &entry).await;
    }
    stranger.publish(&place.changelog(), b"hello").await;
    for store in [&store, &place.store().await?] {
        assert_eq!(
            (revision(store).await?, get(store, "k").await?.as_deref()),
            (3, Some("three"))
        );
    }
    put(&store, "k", "four", 3).await?;
    Ok(())
}

async fn killed() -> Result<(), Violation> {
    const KILLS: usize = 2;
    let node = RabbitNode::start()?;
    let mut place = Place::at(node.port());
    place.timeout = Duration::from_secs(60);
    let store = place.store().await?;
    assert_eq!(revision(&store).await?, 0);
    let mut acknowledged = 0;
    let mut kills = 0;
    std::thread::scope(|scope| {
        let handle = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| {
            handle.block_on(async {
                let mut killer = None;
                while kills < KILLS || acknowledged % 50 != 0 {
                    if killer.is_none() && kills < KILLS && acknowledged >= 50 * (kills as u64 + 1) {
                        killer = Some(scope.spawn(|| node.restart()));
                    }
                    match revision(&store).await {
                        Ok(revision) => {
                            assert!(
                                revision >= acknowledged,
                                "{acknowledged} was acknowledged, {revision} is left"
                            );
                            if put(&store, "k", &(revision + 1).to_string(), revision).await.is_ok() {
                                acknowledged = revision + 1;
                            }
                        }
                        Err(error) => assert!(error.is_transient(), "{error}"),
                    }
                    if let Some(done) = killer.take_if(|killer| killer.is_finished()) {
                        done.join().expect("no panic").expect("it comes up again");
                        kills += 1;
                    }
                }
            });
        });
    });
    let fresh = place.store().await?;
    let stored = loop {
        match revision(&fresh).await {
            // A node answers before its streams are up.
            Err(error) if error.is_transient() => {}
            stored => break stored?,
        }
    };
    assert_eq!(
        (stored, get(&fresh, "k").await?),
        (acknowledged, Some(acknowledged.to_string()))
    );
    Ok(())
}

pub(crate) fn contains(body: &[u8], wanted: &[u8]) -> bool {
    body.windows(wanted.len()).any(|window| window == wanted)
}
