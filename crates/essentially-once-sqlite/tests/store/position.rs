//! Positions, and the state that is committed with them.

use essentially_once::{
    ConsumerId, Error, KeyValue, Offset, OffsetStore,
    backend::{Durability, Journal, LogId, Numbering, Transaction, Window},
};
use essentially_once_sqlite::{Sqlite, SqliteOptions, SqliteStore, rusqlite::Connection};

use super::{advance, open, orders, revision, shipping, staged, state};

fn numbering(text: &str) -> Numbering {
    text.parse().expect("numbering")
}

#[tokio::test]
async fn state_and_position_are_committed_together() {
    let (_folder, sqlite, store) = open().await;
    assert_eq!(store.position(&shipping()).await.expect("position"), None);
    staged(&store, "1").await.commit(advance(7, 0)).await.expect("commit");
    let reopened = Sqlite::open(sqlite.path()).await.expect("open").store();
    for store in [&store, &reopened] {
        let position = store.position(&shipping()).await.expect("position").expect("some");
        assert_eq!((position.next, position.revision), (7.into(), revision(1)));
        assert_eq!(position.log, orders());
        assert_eq!(state(store, &shipping(), "k").await.as_deref(), Some("1"));
    }
    assert_eq!(store.durability().await.expect("durability"), Durability::Durable);
}

#[tokio::test]
async fn late_writer_is_fenced() {
    let (_folder, sqlite, store) = open().await;
    let other = Sqlite::open(sqlite.path()).await.expect("open").store();
    staged(&store, "first")
        .await
        .commit(advance(1, 0))
        .await
        .expect("commit");
    staged(&other, "second")
        .await
        .commit(advance(2, 1))
        .await
        .expect("commit");
    for commits in [0, 1, 3, u64::MAX] {
        for store in [&store, &other] {
            let fenced = staged(store, "late").await.commit(advance(9, commits)).await;
            assert!(
                matches!(&fenced, Err(Error::Fenced { expected, .. }) if *expected == revision(commits)),
                "{fenced:?}"
            );
        }
    }
    assert_eq!(state(&store, &shipping(), "k").await.as_deref(), Some("second"));
    let position = store.position(&shipping()).await.expect("position").expect("some");
    assert_eq!((position.next, position.revision), (2.into(), revision(2)));
    // A position that was never stored cannot be advanced.
    let nobody = ConsumerId::new("nobody").expect("name");
    let tx = store.begin(&nobody).await.expect("begin");
    assert!(matches!(tx.commit(advance(1, 1)).await, Err(Error::Fenced { .. })));
}

#[tokio::test]
async fn a_stored_name_that_no_consumer_can_have_is_an_error_that_names_it() {
    let (_folder, sqlite, store) = open().await;
    staged(&store, "1").await.commit(advance(1, 0)).await.expect("commit");
    assert_eq!(store.consumers().await.expect("list"), Some(vec![shipping()]));
    let user = Connection::open(sqlite.path()).expect("the user's connection");
    for (name, shown) in [("'not a name'", "not a name"), ("''", "is empty"), ("x'6162'", "Blob")] {
        user.execute(&format!("UPDATE essentially_once_consumers SET consumer = {name}"), [])
            .expect("an edit by hand");
        let error = store.consumers().await.expect_err(name);
        assert!(matches!(error, Error::Failed { .. }), "{error:?}");
        assert!(error.to_string().contains(shown), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_revision_has_one_winner_when_two_handles_race() {
    let (_folder, sqlite, store) = open().await;
    let other = Sqlite::open(sqlite.path()).await.expect("open").store();
    let race = |store: SqliteStore| async move {
        let mut wins = 0;
        for _ in 0..100 {
            let commits = store
                .position(&shipping())
                .await
                .expect("position")
                .map_or(0, |p| p.revision.count());
            tokio::task::yield_now().await;
            let mut tx = store.begin(&shipping()).await.expect("begin");
            let count = tx.get(b"count").await.expect("get").map_or(0, |count| count[0]);
            tx.put(b"count", &[count + 1]).await.expect("put");
            match tx.commit(advance(commits, commits)).await {
                Ok(()) => wins += 1,
                Err(Error::Fenced { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        wins
    };
    let (one, two) = (tokio::spawn(race(store.clone())), tokio::spawn(race(other)));
    let wins = one.await.expect("race") + two.await.expect("race");
    let mut tx = store.begin(&shipping()).await.expect("begin");
    assert_eq!(u64::from(tx.get(b"count").await.expect("get").expect("some")[0]), wins);
    let position = store.position(&shipping()).await.expect("position").expect("some");
    assert_eq!(position.revision, revision(wins));
}

#[tokio::test]
async fn a_position_remembers_its_log() {
    let (_folder, _, store) = open().await;
    let with = |incarnation: Option<&str>, commits| {
        let log = match incarnation {
            Some(incarnation) => orders().with_incarnation(incarnation).expect("name"),
            None => orders(),
        };
        let mut advance = advance(commits, commits);
        advance.log = log;
        advance
    };
    let commit = async |advance| staged(&store, "x").await.commit(advance).await;
    commit(with(None, 0)).await.expect("first");
    commit(with(Some("a1"), 1))
        .await
        .expect("the incarnation becomes known");
    let wrong = commit(with(Some("b2"), 2)).await;
    assert!(
        matches!(&wrong, Err(Error::WrongLog { stored, .. }) if stored.incarnation() == Some("a1")),
        "{wrong:?}"
    );
    let mut other = advance(5, 2);
    other.log = LogId::new("payments").expect("name");
    assert!(matches!(commit(other).await, Err(Error::WrongLog { .. })));
    assert!(
        matches!(commit(with(Some("b2"), 1)).await, Err(Error::Fenced { .. })),
        "fenced comes first"
    );
    commit(with(None, 2)).await.expect("an unknown incarnation is accepted");
    assert_eq!(
        store
            .position(&shipping())
            .await
            .expect("position")
            .expect("some")
            .revision,
        revision(3)
    );
}

#[tokio::test]
async fn a_dropped_or_rolled_back_transaction_leaves_no_trace() {
    let (_folder, _, store) = open().await;
    drop(staged(&store, "dropped").await);
    staged(&store, "rolled back").await.rollback().await.expect("rollback");
    assert_eq!(state(&store, &shipping(), "k").await, None);
    staged(&store, "kept")
        .await
        .commit(advance(1, 0))
        .await
        .expect("commit");
    assert_eq!(state(&store, &shipping(), "k").await.as_deref(), Some("kept"));
}

#[tokio::test]
async fn a_transaction_reads_its_own_writes() {
    let (_folder, _, store) = open().await;
    let mut tx = staged(&store, "1").await;
    assert_eq!(tx.get(b"k").await.expect("get").as_deref(), Some(&b"1"[..]));
    tx.put(b"k", b"").await.expect("put");
    assert_eq!(tx.get(b"k").await.expect("get").as_deref(), Some(&b""[..]));
    tx.delete(b"k").await.expect("delete");
    tx.delete(b"k").await.expect("delete again");
    assert_eq!(tx.get(b"k").await.expect("get"), None);
    let binary: Vec<u8> = (0..=255).collect();
    tx.put(&binary, &binary).await.expect("put");
    tx.put(b"", b"empty key").await.expect("put");
    tx.commit(advance(1, 0)).await.expect("commit");
    let mut tx = store.begin(&shipping()).await.expect("begin");
    assert_eq!(tx.get(&binary).await.expect("get").as_deref(), Some(&binary[..]));
    assert_eq!(tx.get(b"").await.expect("get").as_deref(), Some(&b"empty key"[..]));
}

#[tokio::test]
async fn consumers_never_see_each_other() {
    let (_folder, _, store) = open().await;
    staged(&store, "mine")
        .await
        .commit(advance(3, 0))
        .await
        .expect("commit");
    let other = ConsumerId::new("shipping2").expect("name");
    assert_eq!(state(&store, &other, "k").await, None);
    assert_eq!(store.position(&other).await.expect("position"), None);
    let mut tx = store.begin(&other).await.expect("begin");
    tx.delete(b"k").await.expect("delete");
    tx.commit(advance(1, 0)).await.expect("commit");
    assert_eq!(state(&store, &shipping(), "k").await.as_deref(), Some("mine"));
}

#[tokio::test]
async fn consumers_whose_names_differ_in_case_or_at_the_end_are_distinct() {
    let (_folder, _, store) = open().await;
    let long = "x".repeat(100);
    let names = [
        "Shipping".into(),
        "shipping".into(),
        format!("{long}a"),
        format!("{long}b"),
    ];
    for (n, name) in names.iter().enumerate() {
        let consumer = ConsumerId::new(name).expect("name");
        let mut tx = store.begin(&consumer).await.expect("begin");
        tx.put(b"k", name.as_bytes()).await.expect("put");
        tx.commit(advance(n as u64 + 1, 0))
            .await
            .expect("the consumer's first commit");
    }
    for (n, name) in names.iter().enumerate() {
        let consumer = ConsumerId::new(name).expect("name");
        let position = store.position(&consumer).await.expect("position").expect("some");
        assert_eq!(position.next, (n as u64 + 1).into(), "{name}");
        assert_eq!(state(&store, &consumer, "k").await.as_ref(), Some(name));
    }
}

#[tokio::test]
async fn keys_and_values_over_the_limit_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = SqliteOptions::new()
        .record_limit(10)
        .open(folder.path().join("a.db"))
        .await
        .expect("open");
    let mut tx = sqlite.store().begin(&shipping()).await.expect("begin");
    tx.put(&[1; 10], &[2; 10]).await.expect("at the limit");
    assert!(matches!(
        tx.put(&[1; 11], &[]).await,
        Err(Error::TooLarge {
            what: "key",
            size: 11,
            ..
        })
    ));
    assert!(matches!(
        tx.put(&[], &[1; 11]).await,
        Err(Error::TooLarge { what: "value", .. })
    ));
    tx.commit(advance(1, 0)).await.expect("the transaction continues");
}

/// A window as the core encodes it: version, highest, hi, lo, two times, and 17 blocks.
fn window(highest: u8) -> Window {
    let mut bytes = [0; Window::ENCODED_LEN];
    (bytes[0], bytes[8]) = (2, highest);
    Window::decode(&bytes).expect("window")
}

#[tokio::test]
async fn windows_and_large_numbers_round_trip() {
    let (_folder, _, store) = open().await;
    let mut first = advance(0, 0);
    first.next = Offset::new(u64::MAX, u64::MAX - 1);
    first.windows = vec![(numbering("a"), window(1)), (numbering("a#7"), window(2))];
    staged(&store, "x").await.commit(first.clone()).await.expect("commit");
    let mut second = advance(0, 1);
    second.next = first.next;
    second.windows = vec![(numbering("c"), window(3)), (numbering("a#7"), window(9))];
    second.forgotten = vec![numbering("a"), numbering("never-there")];
    staged(&store, "x").await.commit(second.clone()).await.expect("commit");
    assert!(
        staged(&store, "x").await.commit(first).await.is_err(),
        "fenced: windows stay"
    );
    let position = store.position(&shipping()).await.expect("position").expect("some");
    assert_eq!(position.next, Offset::new(u64::MAX, u64::MAX - 1));
    let mut windows = position.windows;
    windows.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(windows, [(numbering("a#7"), window(9)), (numbering("c"), window(3))]);
}

#[tokio::test]
async fn a_position_that_was_tampered_with_is_an_error_that_names_the_file() {
    let (_folder, sqlite, store) = open().await;
    let mut first = advance(1, 0);
    first.windows = vec![(numbering("a"), window(1))];
    staged(&store, "x").await.commit(first).await.expect("commit");
    let shell = Connection::open(sqlite.path()).expect("open");
    shell
        .execute_batch("UPDATE essentially_once_windows SET \"window\" = x'00'")
        .expect("edit");
    let error = store.position(&shipping()).await.expect_err("no window").to_string();
    assert!(error.contains("a.db") && error.contains("window"), "{error}");
}

#[tokio::test]
async fn a_journal_that_was_tampered_with_is_an_error_that_names_consumer_and_file() {
    let (_folder, sqlite, store) = open().await;
    staged(&store, "x").await.commit(advance(1, 0)).await.expect("commit");
    let shell = Connection::open(sqlite.path()).expect("open");
    for (bytes, why) in [("x'FF'", "version"), ("x'0100'", "short"), ("'text'", "journal")] {
        shell
            .execute_batch(&format!("UPDATE essentially_once_consumers SET journal = {bytes}"))
            .expect("edit");
        let error = store.position(&shipping()).await.expect_err("no journal");
        let text = error.to_string();
        assert!(matches!(error, Error::Failed { .. }), "{error:?}");
        assert!(
            text.contains("consumer shipping") && text.contains("a.db") && text.contains(why),
            "{text}"
        );
    }
    shell
        .execute_batch("UPDATE essentially_once_consumers SET journal = NULL")
        .expect("edit");
    let position = store.position(&shipping()).await.expect("position").expect("some");
    assert_eq!(position.journal, Journal::default());
}
