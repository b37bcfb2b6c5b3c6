//! What a standby sees of an owner, and what readers see of state, without waiting for the owner.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use essentially_once::{
    Consumer, ConsumerId, Error, KeyValue, Log, NewRecord, OffsetStore, ReadState, Record,
    backend::{Advance, LogId, Owner, Pulse, Revision, Transaction},
    handler_fn,
};
use essentially_once_sqlite::{Sqlite, SqliteStore, SqliteTx, rusqlite::Connection};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

const SOON: Duration = Duration::from_secs(10);
/// A held lock counts as a beat at most this often.
const BEAT: Duration = Duration::from_millis(25);

async fn open() -> (TempDir, Sqlite, SqliteStore) {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
    let store = sqlite.store();
    (folder, sqlite, store)
}

fn shipping() -> ConsumerId {
    ConsumerId::new("shipping").expect("name")
}

/// Makes the commit that follows `commits` others, with `owner`.
async fn commit(store: &SqliteStore, commits: u64, owner: Option<Owner>) {
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.put(b"k", commits.to_string().as_bytes()).await.expect("put");
    let expected = match commits {
        0 => Revision::NONE,
        count => Revision::new(1, count),
    };
    let log = LogId::new("orders").expect("name");
    let mut advance = Advance::new(log, (commits + 1).into(), expected, Revision::new(1, commits + 1));
    advance.owner = owner;
    tx.commit(advance).await.expect("commit");
}

async fn pulse(store: &SqliteStore) -> Pulse {
    sleep(BEAT).await;
    store.pulse(&shipping()).await.expect("pulse")
}

#[tokio::test]
async fn a_pulse_shows_commits_and_beats_of_the_owner_alone() {
    let (_folder, sqlite, store) = open().await;
    let other = Sqlite::open(sqlite.path()).await.expect("open").store();
    assert_eq!(pulse(&other).await, Pulse::default());
    let (owner, stranger) = (Owner::draw(), Owner::draw());
    store.beat(&shipping(), owner).await.expect("no position, no effect");
    assert_eq!(pulse(&other).await, Pulse::default());

    commit(&store, 0, Some(owner)).await;
    let first = pulse(&other).await;
    assert_eq!(
        (first.next, first.revision, first.owner),
        (1.into(), Revision::new(1, 1), Some(owner))
    );
    assert_eq!(pulse(&other).await, first, "nothing happened");
    store.beat(&shipping(), stranger).await.expect("no effect");
    assert_eq!(pulse(&other).await, first);

    store.beat(&shipping(), owner).await.expect("beat");
    let beaten = pulse(&other).await;
    assert_ne!(beaten.beats, first.beats);
    assert_eq!(
        (beaten.next, beaten.revision, beaten.owner),
        (first.next, first.revision, first.owner)
    );
    commit(&store, 1, Some(owner)).await;
    assert_eq!(
        pulse(&other).await.revision,
        Revision::new(1, 2),
        "a beat fences nobody"
    );

    store.release(&shipping(), stranger).await.expect("no effect");
    assert_eq!(pulse(&other).await.owner, Some(owner));
    store.release(&shipping(), owner).await.expect("release");
    let released = pulse(&other).await;
    assert_eq!((released.owner, released.revision), (None, Revision::new(1, 2)));
    commit(&store, 2, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_beats_although_others_hold_the_lock_most_of_the_time() {
    let (_folder, sqlite, store) = open().await;
    let owner = Owner::draw();
    commit(&store, 0, Some(owner)).await;
    let path = sqlite.path().to_owned();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let (begun, holding) = tokio::sync::oneshot::channel();
    let busy = std::thread::spawn(move || {
        let others = Connection::open(path).expect("open");
        others.execute_batch("CREATE TABLE others (n)").expect("create");
        let mut begun = Some(begun);
        loop {
            others
                .execute_batch("BEGIN IMMEDIATE; INSERT INTO others VALUES (1)")
                .expect("lock");
            let _ = begun.take().map(|begun| begun.send(()));
            let ended = stopped.recv_timeout(Duration::from_millis(60));
            others.execute_batch("COMMIT").expect("unlock");
            if ended != Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    holding.await.expect("holding");
    let beats = || {
        let reading = Connection::open(sqlite.path()).expect("open");
        let sql = "SELECT beats FROM essentially_once_consumers";
        reading.query_row(sql, [], |row| row.get::<_, i64>(0)).expect("beats")
    };
    let before = beats();
    for _ in 0..10 {
        store.beat(&shipping(), owner).await.expect("beat");
    }
    let counted = beats() - before;
    stop.send(()).expect("the thread runs");
    busy.join().expect("no panic");
    // A single attempt would succeed one time in four.
    assert!(counted >= 7, "{counted} of 10");
}

#[tokio::test]
async fn a_lock_that_stays_held_is_a_sign_of_life() {
    let (_folder, sqlite, store) = open().await;
    let owner = Owner::draw();
    commit(&store, 0, Some(owner)).await;
    let other = Sqlite::open(sqlite.path()).await.expect("open").store();
    let free = pulse(&other).await;
    // Another process looks the same, because its lock is SQLite's own.
    let process = Connection::open(sqlite.path()).expect("open");
    for shell in [false, true] {
        let mut tx = None;
        match shell {
            true => process.execute_batch("BEGIN IMMEDIATE").expect("lock"),
            false => tx = Some(store.begin(&shipping()).await.expect("begin")),
        }
        let started = Instant::now();
        store.beat(&shipping(), owner).await.expect("waits for nobody");
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        // It counts once it has lasted for a few looks.
        pulse(&other).await;
        pulse(&other).await;
        let mut seen = pulse(&other).await;
        for _ in 0..3 {
            let next = pulse(&other).await;
            assert_ne!(next, seen);
            assert_eq!(
                (next.next, next.revision, next.owner),
                (free.next, free.revision, free.owner)
            );
            seen = next;
        }
        drop(tx);
        if shell {
            process.execute_batch("ROLLBACK").expect("unlock");
        }
        let seen = pulse(&other).await;
        assert_eq!(pulse(&other).await, seen, "free again");
    }
}

#[tokio::test]
async fn a_watch_ends_soon_after_a_commit_and_at_its_interval() {
    let (_folder, sqlite, store) = open().await;
    let owner = Owner::draw();
    commit(&store, 0, Some(owner)).await;
    let seen = pulse(&store).await;
    let started = Instant::now();
    let interval = Duration::from_millis(80);
    assert_eq!(store.watch(&shipping(), &seen, interval).await.expect("watch"), seen);
    assert!(started.elapsed() >= interval);
    let consumer = shipping();
    let (watched, ()) = tokio::join!(store.watch(&consumer, &seen, Duration::MAX), async {
        // Nothing reports that the watch waits, so give it time to start.
        sleep(Duration::from_millis(30)).await;
        commit(&store, 1, Some(owner)).await;
    });
    let seen = watched.expect("watch");
    assert_eq!(seen.revision, Revision::new(1, 2));
    // Commits of another process, of which only the second concerns this consumer.
    let path = sqlite.path().to_owned();
    let process = tokio::task::spawn_blocking(move || {
        let shell = Connection::open(path).expect("open");
        std::thread::sleep(Duration::from_millis(30));
        shell.execute_batch("CREATE TABLE mine (x)").expect("write");
        std::thread::sleep(Duration::from_millis(30));
        shell
            .execute_batch("UPDATE essentially_once_consumers SET count = 9")
            .expect("write");
    });
    let watched = timeout(SOON, store.watch(&shipping(), &seen, Duration::MAX)).await;
    assert_eq!(watched.expect("soon").expect("watch").revision, Revision::new(1, 9));
    process.await.expect("no panic");
}

#[tokio::test]
async fn state_is_read_during_an_open_transaction_as_one_commit_left_it() {
    let (_folder, _, store) = open().await;
    let keys: [&[u8]; 3] = [b"missing", b"k", b"k"];
    let empty = store.read_state(&shipping(), &keys).await.expect("read");
    assert_eq!((empty.position, empty.values), (None, vec![None, None, None]));
    commit(&store, 0, None).await;
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.put(b"k", b"uncommitted").await.expect("put");
    let state = timeout(SOON, store.read_state(&shipping(), &keys)).await;
    let state = state.expect("waits for no transaction").expect("read");
    assert_eq!(
        state.position.map(|position| position.revision),
        Some(Revision::new(1, 1))
    );
    assert_eq!(state.values, [None, Some("0".into()), Some("0".into())]);
    let nothing = store.read_state(&shipping(), &[]).await.expect("read");
    assert_eq!(nothing.values, Vec::<Option<bytes::Bytes>>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn position_and_values_are_never_of_two_commits() {
    let (_folder, sqlite, store) = open().await;
    let writer = Sqlite::open(sqlite.path()).await.expect("open").store();
    let writing = tokio::spawn(async move {
        for commits in 0..200 {
            commit(&writer, commits, None).await;
        }
    });
    let mut seen = 0;
    while seen < 200 {
        let state = store.read_state(&shipping(), &[b"k"]).await.expect("read");
        let Some(position) = state.position else { continue };
        let value = state.values[0].as_deref().expect("committed with the position");
        let value: u64 = str::from_utf8(value).expect("text").parse().expect("number");
        assert_eq!(position.next, (value + 1).into());
        assert!(value + 1 >= seen, "never older than before");
        seen = value + 1;
    }
    writing.await.expect("no panic");
}

/// The owner holds the lock and cannot beat. The standby must not conclude that the owner is dead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_handles_for_long_is_left_alone() {
    let (_folder, sqlite, _) = open().await;
    let log = sqlite.log("orders").await.expect("log");
    log.append(&[NewRecord::new("short"), NewRecord::new("long"), NewRecord::new("short")])
        .await
        .expect("append");
    let calls = Arc::new(AtomicU64::new(0));
    let run = async |calls: Arc<AtomicU64>| {
        let sqlite = Sqlite::open(sqlite.path()).await.expect("open");
        let log = sqlite.log("orders").await.expect("log");
        let handler = handler_fn(move |record: &Record, _: &mut SqliteTx| {
            calls.fetch_add(1, Ordering::Relaxed);
            let long = record.payload == "long";
            Box::pin(async move {
                if long {
                    sleep(Duration::from_millis(1500)).await;
                }
                Ok(())
            })
        });
        let consumer = Consumer::essentially_once(shipping(), log, sqlite.store(), handler)
            .max_batch(1)
            .standby_after(Duration::from_millis(200));
        consumer.run_until_caught_up().await.expect("run")
    };
    let (one, two) = tokio::join!(run(Arc::clone(&calls)), run(Arc::clone(&calls)));
    assert_eq!(one.handled + two.handled, 3, "{one}\n{two}");
    assert_eq!(one.fenced + two.fenced, 0, "{one}\n{two}");
    assert_eq!(calls.load(Ordering::Relaxed), 3, "{one}\n{two}");
}

#[tokio::test]
async fn the_backlog_is_counted() {
    let (_folder, sqlite, _) = open().await;
    let log = sqlite.log("orders").await.expect("log");
    let records: Vec<_> = (0..10).map(|n| NewRecord::new(n.to_string())).collect();
    log.append(&records).await.expect("append");
    for (from, count) in [
        (0.into(), 10),
        (4.into(), 6),
        (10.into(), 0),
        (essentially_once::Offset::new(1, 0), 0),
    ] {
        assert_eq!(log.count_from(from).await.expect("count"), Some(count), "{from}");
    }
    let gone: Error = sqlite
        .log_with("order", essentially_once_sqlite::LogOptions::new().existing())
        .await
        .expect_err("mistyped");
    assert!(gone.to_string().contains("orders"), "{gone}");
}

/// Every look falls into a batch of another consumer, which begins and commits between two looks.
#[tokio::test]
async fn batches_of_another_consumer_are_no_sign_of_life() {
    let (_folder, sqlite, store) = open().await;
    let other = Sqlite::open(sqlite.path()).await.expect("open").store();
    commit(&store, 0, Some(Owner::draw())).await;
    let first = pulse(&other).await;
    let audit = ConsumerId::new("audit").expect("name");
    for _ in 0..10 {
        let tx = store.begin(&audit).await.expect("begin");
        assert_eq!(pulse(&other).await, first, "it saw the lock");
        let position = store.position(&audit).await.expect("position");
        let expected = position.map_or(Revision::NONE, |position| position.revision);
        let log = LogId::new("orders").expect("name");
        let advance = Advance::new(log, 1.into(), expected, expected.next_count());
        tx.commit(advance).await.expect("commit");
        assert_eq!(pulse(&other).await, first, "it saw the commit");
    }
}
