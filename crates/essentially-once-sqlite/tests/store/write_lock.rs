//! Waiting for the write lock.

use std::{
    cell::Cell,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use essentially_once::{
    Consumer, ConsumerId, Error, Log, NewRecord, Offset, OffsetStore, Record, backend::Transaction, handler_fn,
};
use essentially_once_sqlite::{Sqlite, SqliteOptions, SqliteTx, rusqlite::Connection};

use super::{advance, open, shipping, staged};

#[tokio::test]
async fn an_append_beside_an_open_transaction_of_its_task_ends_with_an_explanation() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(100));
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let tx = staged(&sqlite.store(), "x").await;
    let error = log.append(&[NewRecord::new("y")]).await.expect_err("waits for itself");
    assert!(matches!(error, Error::Failed { .. }), "it can never succeed: {error:?}");
    let text = error.to_string();
    assert!(
        text.contains("waits for itself") && text.contains("`Outbox::send`"),
        "{text}"
    );
    // Another handle on the same file waits for the same lock.
    let other = options.open(folder.path().join(".").join("a.db")).await.expect("open");
    let orders = other.log("orders").await.expect("log");
    let error = orders
        .append(&[NewRecord::new("y")])
        .await
        .expect_err("waits for itself");
    assert!(matches!(error, Error::Failed { .. }), "it can never succeed: {error:?}");
    // Another task can succeed once the handler is done.
    let (store, waiting) = (other.store(), shipping());
    let elsewhere = tokio::spawn(async move { store.begin(&waiting).await.map(drop) });
    let error = elsewhere.await.expect("no panic").expect_err("locked");
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    tx.commit(advance(1, 0)).await.expect("commit");
    log.append(&[NewRecord::new("y")]).await.expect("the lock is free");
}

/// The handler appends through a handle of its own or through that of its store.
#[tokio::test]
async fn an_append_within_a_handler_to_its_own_file_fails_at_once_and_names_send() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let options = SqliteOptions::new().busy_timeout(Duration::from_secs(60));
    let sqlite = options.open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    log.append(&[NewRecord::new("x")]).await.expect("append");
    let other = options.open(&path).await.expect("open");
    for handle in [&sqlite, &other] {
        let results = handle.log("results").await.expect("log");
        let handler = handler_fn(move |_: &Record, _: &mut SqliteTx| {
            let results = results.clone();
            Box::pin(async move {
                results.append(&[NewRecord::new("y")]).await?;
                Ok(())
            })
        });
        let consumer = Consumer::essentially_once(shipping(), log.clone(), sqlite.store(), handler)
            .min_backoff(Duration::from_millis(1))
            .max_backoff(Duration::from_millis(1));
        let began = std::time::Instant::now();
        let error = consumer.run().await.expect_err("the append can never succeed");
        let text = error.to_string();
        assert!(
            text.contains("wait for itself") && text.contains("`Outbox::send`"),
            "{text}"
        );
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    }
}

/// Under at-least-once, a handler has no transaction, and what it begins itself ends.
#[tokio::test]
async fn a_handler_that_trims_and_appends_at_once_does_not_wait_for_itself() {
    let folder = tempfile::tempdir().expect("folder");
    let sqlite = Sqlite::open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    log.append(&[NewRecord::new("x")]).await.expect("append");
    let results = sqlite.log("results").await.expect("log");
    let trimmed = results.clone();
    let handler = handler_fn(move |_: &Record, (): &mut ()| {
        let trimmed = trimmed.clone();
        Box::pin(async move {
            let record = [NewRecord::new("y")];
            let (removed, appended) = tokio::join!(trimmed.trim(), trimmed.append(&record));
            removed?;
            appended?;
            Ok(())
        })
    });
    let consumer = Consumer::at_least_once(shipping(), log, sqlite.store(), handler).retries(0);
    assert_eq!(consumer.run_until_caught_up().await.expect("handled").handled, 1);
    assert_eq!(results.bounds().await.expect("bounds").end, 1.into());
}

#[tokio::test]
async fn a_run_does_not_end_because_another_run_in_its_task_is_slow() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(50));
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    log.append(&[NewRecord::new("x"), NewRecord::new("y")])
        .await
        .expect("append");
    let entered = Arc::new(tokio::sync::Notify::new());
    let run = |name: &str, takes: Duration| {
        let entered = Arc::clone(&entered);
        let handler = handler_fn(move |_: &Record, _: &mut SqliteTx| {
            entered.notify_one();
            Box::pin(async move {
                tokio::time::sleep(takes).await;
                Ok(())
            })
        });
        Consumer::essentially_once(
            ConsumerId::new(name).expect("name"),
            log.clone(),
            sqlite.store(),
            handler,
        )
        .min_backoff(Duration::from_millis(1))
        .max_backoff(Duration::from_millis(20))
        .run_until_caught_up()
    };
    let quick = async {
        // The slow run holds the lock now.
        entered.notified().await;
        run("quick", Duration::ZERO).await
    };
    let (slow, quick) = tokio::join!(run("slow", Duration::from_millis(300)), quick);
    assert_eq!((slow.expect("run").handled, quick.expect("run").handled), (2, 2));
}

/// The lock changed hands within the task, so the task did not wait for itself.
#[tokio::test]
async fn a_task_that_does_two_things_at_once_does_not_wait_for_itself() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(300));
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let tx = staged(&sqlite.store(), "x").await;
    let record = [NewRecord::new("y")];
    let (committed, appended) = tokio::join!(
        async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            tx.commit(advance(1, 0)).await
        },
        log.append(&record)
    );
    committed.expect("commit");
    appended.expect("append");
}

/// Holds the file's write lock on another connection until the sender is used or dropped. The
/// thread returns whether that happened in time.
fn hold_lock(sqlite: &Sqlite) -> (mpsc::Sender<()>, thread::JoinHandle<bool>) {
    let (locked, wait) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let path = sqlite.path().to_owned();
    let holder = thread::spawn(move || {
        let connection = Connection::open(path).expect("open");
        connection.execute_batch("BEGIN IMMEDIATE").expect("lock");
        locked.send(()).expect("awaited");
        let ended = released.recv_timeout(Duration::from_secs(5));
        connection.execute_batch("COMMIT").expect("unlock");
        ended != Err(mpsc::RecvTimeoutError::Timeout)
    });
    wait.recv().expect("locked");
    (release, holder)
}

#[tokio::test(flavor = "current_thread")]
async fn waiting_for_the_lock_never_blocks_the_runtime() {
    let (_folder, sqlite, store) = open().await;
    let log = sqlite.log("orders").await.expect("log");
    let (release, holder) = hold_lock(&sqlite);
    let released = Cell::new(false);
    let ticking = async {
        // This task releases the lock. It gets to run only if the others do not block the thread.
        for _ in 0..50 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        released.set(true);
        // The send fails if the holder gave up, which the last assertion reports.
        let _ = release.send(());
    };
    let committing = async {
        staged(&store, "x").await.commit(advance(1, 0)).await.expect("commit");
        assert!(released.get(), "it had to wait");
    };
    let appending = async {
        log.append(&[NewRecord::new("y")]).await.expect("append");
        assert!(released.get(), "it had to wait");
    };
    tokio::join!(committing, appending, ticking);
    assert!(holder.join().expect("holder"), "the other task could not run");
}

#[tokio::test]
async fn a_lock_held_too_long_is_unavailable_and_reading_goes_on() {
    let folder = tempfile::tempdir().expect("folder");
    let options = SqliteOptions::new().busy_timeout(Duration::from_millis(80));
    let sqlite = options.open(folder.path().join("a.db")).await.expect("open");
    let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
    log.append(&[NewRecord::new("x")]).await.expect("append");
    let (release, holder) = hold_lock(&sqlite);
    let error = store.begin(&shipping()).await.expect_err("locked");
    assert!(
        matches!(error, Error::Unavailable { .. }) && error.to_string().contains("a.db"),
        "{error}"
    );
    let mut reader = log.read(Offset::ZERO).await.expect("read");
    let records: Vec<Record> = reader.next(5).await.expect("next");
    assert_eq!(records.len(), 1);
    assert_eq!(store.position(&shipping()).await.expect("position"), None);
    drop(release);
    holder.join().expect("holder");
    store.begin(&shipping()).await.expect("the lock is free");
}
