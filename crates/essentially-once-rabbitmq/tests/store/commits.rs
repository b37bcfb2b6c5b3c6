//! Commits without faults, and which of two wins.

use essentially_once::{
    Error, KeyValue as _, OffsetStore as _,
    backend::{Numbering, Revision, Transaction as _, Window},
};
use essentially_once_testkit::Violation;

use crate::{
    Tests,
    support::{Place, advance, get, log, put, revision, shipping},
};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("commits::state_windows_and_position_come_back", round_trip);
    tests.add("commits::of_two_handles_one_wins", race);
    tests.add("commits::a_transaction_reads_what_was_committed_before", fresh);
    tests.add("commits::another_log_is_refused", wrong_log);
    tests.add("commits::a_transaction_on_what_was_overtaken_is_fenced", overtaken);
    tests.add("commits::state_has_a_limit", state_limit);
    tests.add("commits::a_transaction_whose_put_failed_refuses_to_commit", failed_put);
    tests.add("commits::an_entry_has_a_limit", entry_limit);
}

async fn round_trip() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    assert_eq!(store.position(&shipping()).await?, None);
    let (a, b): (Numbering, Numbering) = ("a".parse()?, "a#7".parse()?);
    let mut tx = store.begin(&shipping()).await?;
    for (key, value) in [
        (&b"k"[..], &b"1"[..]),
        (b"", b"empty key"),
        (b"\xFF\0", b""),
        (b"gone", b"2"),
    ] {
        tx.put(key, value).await?;
        assert_eq!(tx.get(key).await?.as_deref(), Some(value));
    }
    let windows = vec![(a.clone(), Window::new(7)), (b.clone(), Window::new(8))];
    let mut first = advance(7, 0);
    first.windows = windows;
    tx.commit(first).await?;
    let mut tx = store.begin(&shipping()).await?;
    tx.delete(b"gone").await?;
    assert_eq!(tx.get(b"gone").await?, None);
    let changed = (b, Window::new(9));
    let mut second = advance(9, 1);
    (second.windows, second.forgotten) = (vec![changed.clone()], vec![a]);
    tx.commit(second).await?;
    for store in [store, place.store().await?] {
        let position = store.position(&shipping()).await?.expect("some");
        assert_eq!(
            (position.next, position.revision, position.log),
            (9.into(), Revision::new(0, 2), log("orders"))
        );
        assert_eq!(position.windows, std::slice::from_ref(&changed));
        let mut tx = store.begin(&shipping()).await?;
        for (key, expected) in [
            (&b"k"[..], Some(&b"1"[..])),
            (b"", Some(b"empty key")),
            (b"\xFF\0", Some(b"")),
            (b"gone", None),
        ] {
            assert_eq!(tx.get(key).await?.as_deref(), expected, "{key:?}");
        }
    }
    Ok(())
}

/// From any handle, also if it knew an older state.
async fn fresh() -> Result<(), Violation> {
    let place = Place::new();
    let (one, two) = (place.store().await?, place.store().await?);
    put(&one, "k", "1", 0).await?;
    for revision in 1..5 {
        for store in [&two, &one] {
            assert_eq!(get(store, "k").await?, Some(revision.to_string()));
        }
        put(&two, "k", &(revision + 1).to_string(), revision).await?;
    }
    Ok(())
}

async fn race() -> Result<(), Violation> {
    let place = Place::new();
    let (one, two) = (place.store().await?, place.store().await?);
    for round in 0..20 {
        assert_eq!((revision(&one).await?, revision(&two).await?), (round, round));
        let (name_one, name_two) = (format!("one {round}"), format!("two {round}"));
        let results = tokio::join!(put(&one, "k", &name_one, round), put(&two, "k", &name_two, round));
        let winner = match results {
            (Ok(()), Err(Error::Fenced { .. })) => name_one,
            (Err(Error::Fenced { .. }), Ok(())) => name_two,
            other => panic!("round {round}: {other:?}"),
        };
        assert_eq!(get(&place.store().await?, "k").await?, Some(winner));
    }
    Ok(())
}

async fn wrong_log() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.store().await?;
    let first = log("orders").with_incarnation("a")?;
    let mut advanced = advance(1, 0);
    advanced.log = first.clone();
    store.begin(&shipping()).await?.commit(advanced).await?;
    for (name, incarnation) in [("invoices", None), ("orders", Some("b"))] {
        let mut given = log(name);
        if let Some(incarnation) = incarnation {
            given = given.with_incarnation(incarnation)?;
        }
        let mut other = advance(2, 1);
        other.log = given;
        for store in [&store, &place.store().await?] {
            let mut tx = store.begin(&shipping()).await?;
            tx.put(b"k", b"v").await?;
            let result = tx.commit(other.clone()).await;
            assert!(
                matches!(&result, Err(Error::WrongLog { stored, .. }) if *stored == first),
                "{result:?}"
            );
        }
    }
    store.begin(&shipping()).await?.commit(advance(2, 1)).await?;
    let position = place.store().await?.position(&shipping()).await?.expect("some");
    assert_eq!((position.revision, position.log), (Revision::new(0, 2), first));
    assert_eq!(get(&store, "k").await?, None);
    Ok(())
}

async fn overtaken() -> Result<(), Violation> {
    let place = Place::new();
    let (store, other) = (place.store().await?, place.store().await?);
    put(&store, "k", "1", 0).await?;
    let mut tx = store.begin(&shipping()).await?;
    assert_eq!(tx.get(b"k").await?.as_deref(), Some(&b"1"[..]));
    put(&other, "k", "2", 1).await?;
    assert_eq!(revision(&store).await?, 2);
    // It read at revision 1, so it must not pass for a commit that builds on 2.
    let result = tx.commit(advance(3, 2)).await;
    assert!(matches!(result, Err(Error::Fenced { .. })), "{result:?}");
    assert_eq!(revision(&other).await?, 2);
    Ok(())
}

async fn state_limit() -> Result<(), Violation> {
    let place = Place::new();
    let store = place.rabbit().await?.store().state_limit(10_000);
    let mut tx = store.begin(&shipping()).await?;
    tx.put(b"a", &[0; 6_000]).await?;
    let error = tx.put(b"b", &[0; 6_000]).await.expect_err("too much");
    assert!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("limit of 10000"),
        "{error}"
    );
    assert_eq!(tx.get(b"b").await?, None, "it is not staged");
    let mut tx = store.begin(&shipping()).await?;
    tx.put(b"a", &[0; 7_000]).await?;
    tx.delete(b"a").await?;
    tx.put(b"b", &[0; 9_000]).await?;
    tx.commit(advance(1, 0)).await?;
    // The limit is lowered later. The state can still be read and shrunk.
    let store = place.rabbit().await?.store().state_limit(5_000);
    let mut tx = store.begin(&shipping()).await?;
    assert!(tx.put(b"c", b"").await.is_err());
    let mut tx = store.begin(&shipping()).await?;
    tx.put(b"b", &[0; 8_000]).await?;
    tx.commit(advance(2, 1)).await?;
    Ok(())
}

/// Although the handler ignored the error.
async fn failed_put() -> Result<(), Violation> {
    let store = Place::new().rabbit().await?.store().state_limit(10_000);
    let mut tx = store.begin(&shipping()).await?;
    assert!(matches!(tx.put(b"a", &[0; 11_000]).await, Err(Error::Failed { .. })));
    tx.put(b"b", b"").await?;
    let error = tx.commit(advance(1, 0)).await.expect_err("a put is missing");
    assert!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("limit of 10000"),
        "{error}"
    );
    assert_eq!((revision(&store).await?, get(&store, "b").await?), (0, None));
    // An oversized value is not staged and does no harm.
    let mut tx = store.begin(&shipping()).await?;
    let large = tx.put(b"a", &vec![0; 16 * 1024 * 1024]).await;
    assert!(matches!(large, Err(Error::TooLarge { .. })), "{large:?}");
    tx.put(b"b", b"").await?;
    tx.commit(advance(1, 0)).await?;
    Ok(())
}

async fn entry_limit() -> Result<(), Violation> {
    let store = Place::new().store().await?;
    let mut tx = store.begin(&shipping()).await?;
    let value = vec![0; 8 * 1024 * 1024];
    tx.put(b"first", &value).await?;
    let second = tx.put(b"second", &value).await;
    assert!(
        matches!(
            second,
            Err(Error::TooLarge {
                what: "transaction",
                ..
            })
        ),
        "{second:?}"
    );
    // The refused write does not affect the rest (S6).
    assert_eq!(tx.get(b"second").await?, None);
    tx.put(b"third", b"small").await?;
    // The size of windows is known only now.
    let mut advance = advance(1, 0);
    for producer in 0..40_000 {
        let numbering = format!("producer-{producer}").parse()?;
        advance.windows.push((numbering, Window::new(0)));
    }
    let error = tx.commit(advance).await.expect_err("too large");
    assert!(
        matches!(error, Error::Failed { .. }) && error.to_string().contains("max_batch"),
        "{error}"
    );
    assert_eq!(store.position(&shipping()).await?, None);
    let result = store
        .begin(&shipping())
        .await?
        .put(b"k", &vec![0; 16 * 1024 * 1024 + 1])
        .await;
    assert!(
        matches!(result, Err(Error::TooLarge { what: "value", .. })),
        "{result:?}"
    );
    Ok(())
}
