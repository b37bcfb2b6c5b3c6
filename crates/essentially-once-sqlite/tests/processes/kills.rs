//! Workers that are killed, and workers that compete.

use std::{
    fs::{self, OpenOptions},
    hash::{BuildHasher, RandomState},
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use essentially_once::{
    CancellationToken, Consumer, Epoch, Error, Handler, Log, NewRecord, Offset, OffsetStore, Origin, ProducerId,
    Record,
    backend::{Advance, Revision, Transaction},
    handler_fn,
};
use essentially_once_sqlite::{Sqlite, SqliteOptions, SqliteTx, rusqlite::Connection};
use essentially_once_testkit::{Check, Expectation, Ledger, read_ledger, read_log};
use tokio::time::sleep;

use super::{LONG, Process, counting, given_file, until};

/// Counts in the user's own tables how often each record was handled.
fn count(tx: &mut SqliteTx, record: &Record) -> Result<(), Error> {
    tx.execute("UPDATE total SET handled = handled + 1", [])?;
    let upsert = "INSERT INTO counts VALUES (?1, 1) ON CONFLICT (record) DO UPDATE SET times = times + 1";
    tx.execute(upsert, [record.offset.lo() as i64])?;
    Ok(())
}

fn create_counts(path: &Path) -> Connection {
    let shell = Connection::open(path).expect("open");
    shell.busy_timeout(LONG).expect("timeout");
    shell
        .execute_batch(
            "CREATE TABLE total (handled INTEGER); INSERT INTO total VALUES (0);
             CREATE TABLE counts (record INTEGER PRIMARY KEY, times INTEGER)",
        )
        .expect("create");
    shell
}

/// Returns the total, the number of distinct records, and how often the most frequent one was
/// handled.
fn counts(shell: &Connection) -> (i64, i64, i64) {
    shell
        .query_row(
            "SELECT (SELECT handled FROM total), count(*), coalesce(max(times), 0) FROM counts",
            [],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .expect("counts")
}

/// Checks the ledger of the file's consumer against log and position, while no worker runs. Returns
/// the number of applied records.
async fn check(sqlite: &Sqlite, drained: bool) -> usize {
    let log = sqlite.log("orders").await.expect("log");
    let records = read_log(&log).await.expect("records");
    let applied = read_ledger(&sqlite.store(), &counting()).await.expect("ledger");
    let position = sqlite.store().position(&counting()).await.expect("position");
    let check = Check::new(&records, &applied).position(position.as_ref());
    let check = if drained { check.drained() } else { check };
    check
        .findings()
        .judge(Expectation::EssentiallyOnce)
        .expect("essentially once");
    applied.len()
}

/// Records of seven keys, each with an origin. Every tenth record is sent again fifty records
/// later.
fn keyed(count: u64) -> Vec<NewRecord> {
    let producer = ProducerId::new("web").expect("name");
    let record = |n: u64| {
        NewRecord::new(n.to_string())
            .key((n % 7).to_string())
            .origin(Origin::new(producer.clone(), Epoch::STABLE, n))
    };
    (0..count)
        .flat_map(|n| {
            let again = n.checked_sub(50).filter(|again| again % 10 == 0);
            [Some(n), again]
        })
        .flatten()
        .map(record)
        .collect()
}

/// Kills a worker at a random moment, within about a batch.
pub(super) async fn kill_at_random(child: &mut Process) {
    let micros = RandomState::new().hash_one(0u8) % 40_000;
    sleep(Duration::from_micros(micros)).await;
    child.kill();
}

#[tokio::test]
#[ignore = "a child process of state_and_position_agree_after_kills"]
async fn child_commits_forever() {
    let Some(path) = given_file() else { return };
    let sqlite = Sqlite::open(path).await.expect("open");
    let (log, store) = (sqlite.log("orders").await.expect("log"), sqlite.store());
    loop {
        let position = store.position(&counting()).await.expect("position");
        let (next, revision) = position.map_or((Offset::ZERO, Revision::NONE), |p| (p.next, p.revision));
        let mut reader = log.read(next).await.expect("read");
        let records = reader.next(5).await.expect("next");
        let mut tx = store.begin(&counting()).await.expect("begin");
        let mut next = next;
        for record in &records {
            tx.execute("UPDATE total SET handled = handled + 1", [])
                .expect("update");
            Ledger.handle(record, &mut tx).await.expect("ledger");
            next = record.offset.successor();
        }
        let advance = Advance::new(log.id().clone(), next, revision, revision.next_count());
        tx.commit(advance).await.expect("commit");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_and_position_agree_after_kills() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    // More records than a worker handles before it is killed.
    let records: Vec<_> = (0..20_000)
        .map(|n| NewRecord::new("").key((n % 7).to_string()))
        .collect();
    log.append(&records).await.expect("append");
    let shell = create_counts(&path);
    let mut before = 0;
    for round in 0..6 {
        let mut child = Process::start("kills::child_commits_forever", &path);
        until(|| counts(&shell).0 >= before + 20 + 7 * round).await;
        kill_at_random(&mut child).await;
        let position = sqlite
            .store()
            .position(&counting())
            .await
            .expect("position")
            .expect("some");
        let (handled, ..) = counts(&shell);
        assert_eq!(position.next, Offset::from(handled as u64));
        assert_eq!(check(&sqlite, false).await, handled as usize);
        assert!(handled > before);
        before = handled;
    }
}

/// Holds a byte for each time a record was handled. No rollback removes one.
fn tries_file(path: &Path) -> PathBuf {
    path.with_extension("tries")
}

#[tokio::test]
#[ignore = "a child process of each_record_counts_once_however_often_the_worker_is_killed"]
async fn child_consumes() {
    let Some(path) = given_file() else { return };
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let handler = handler_fn(move |record: &Record, tx: &mut SqliteTx| {
        let mut tries = OpenOptions::new().append(true).open(tries_file(&path)).expect("open");
        Box::pin(async move {
            tries.write_all(b".").expect("write");
            count(tx, record)?;
            Ledger.handle(record, tx).await?;
            // Gives the parent time to kill this process in the middle of a batch.
            sleep(Duration::from_micros(300)).await;
            Ok(())
        })
    });
    let consumer = Consumer::essentially_once(counting(), log, sqlite.store(), handler)
        .max_batch(32)
        // The previous worker is dead.
        .standby_after(Duration::ZERO);
    consumer.run_until_caught_up().await.expect("run");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_record_counts_once_however_often_the_worker_is_killed() {
    const RECORDS: u64 = 1500;
    const KILLS: i64 = 7;
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let sqlite = Sqlite::open(&path).await.expect("open");
    let log = sqlite.log("orders").await.expect("log");
    let records = keyed(RECORDS);
    assert!(records.len() > RECORDS as usize, "some records are sent twice");
    log.append(&records).await.expect("append");
    fs::write(tries_file(&path), "").expect("write");
    let shell = create_counts(&path);
    let (mut in_a_batch, mut lost_before) = (0, 0);
    for kill in 1..=KILLS {
        let mut child = Process::start("kills::child_consumes", &path);
        until(|| counts(&shell).0 >= kill * 120).await;
        kill_at_random(&mut child).await;
        let (handled, seen, most) = counts(&shell);
        assert_eq!((handled, most), (seen, 1));
        assert!(handled < RECORDS as i64, "killed before the end");
        assert_eq!(check(&sqlite, false).await, handled as usize);
        let tries = fs::metadata(tries_file(&path)).expect("tries").len() as i64;
        in_a_batch += i64::from(tries - lost_before > handled);
        lost_before = tries - handled;
    }
    assert!(in_a_batch > KILLS / 2, "only {in_a_batch} kills hit a batch");
    Process::start("kills::child_consumes", &path).succeeds().await;
    assert_eq!(counts(&shell), (RECORDS as i64, RECORDS as i64, 1));
    assert_eq!(check(&sqlite, true).await, RECORDS as usize);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_consumers_of_one_name_count_each_record_once() {
    const RECORDS: u64 = 2000;
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    // The consumers try again after a time-out, and the appends below do not.
    let log = SqliteOptions::new()
        .busy_timeout(LONG)
        .open(&path)
        .await
        .expect("open")
        .log("orders")
        .await
        .expect("log");
    let shell = create_counts(&path);
    let stop = CancellationToken::new();
    let run = |stop: CancellationToken| {
        let path = path.clone();
        async move {
            let sqlite = Sqlite::open(path).await.expect("open");
            let log = sqlite.log("orders").await.expect("log");
            let handler = handler_fn(|record: &Record, tx: &mut SqliteTx| {
                Box::pin(async move {
                    count(tx, record)?;
                    Ok(())
                })
            });
            Consumer::essentially_once(counting(), log, sqlite.store(), handler)
                .max_batch(16)
                .min_backoff(Duration::from_millis(1))
                .max_backoff(Duration::from_millis(20))
                .run_until(stop)
                .await
                .expect("run")
        }
    };
    let consumers = [tokio::spawn(run(stop.clone())), tokio::spawn(run(stop.clone()))];
    for n in 0..RECORDS / 20 {
        let records: Vec<_> = (0..20).map(|i| NewRecord::new((n * 20 + i).to_string())).collect();
        log.append(&records).await.expect("append");
    }
    until(|| counts(&shell).0 >= RECORDS as i64).await;
    stop.cancel();
    let mut handled = 0;
    for consumer in consumers {
        let report = consumer.await.expect("no panic");
        eprintln!("{report}");
        handled += report.handled;
    }
    assert_eq!(handled, RECORDS);
    assert_eq!(counts(&shell), (RECORDS as i64, RECORDS as i64, 1));
}
