//! The order of the records.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use essentially_once::{
    CancellationToken, ConsumerId, Error, Log as _, NewRecord, OffsetStore as _, Outbox as _, Record,
    backend::{Source, Transaction as _},
};
use essentially_once_postgres::{Pg, PgLog};
use tokio::{
    sync::watch,
    task::{JoinSet, block_in_place},
};

use crate::common::{Outcome, Random, Stage, advance, assert_error, client, ensure, numbered, payloads, records, soon};

const TASKS: u64 = 8;
const ROUNDS: u64 = 40;

/// When the append of each payload began and when it was acknowledged.
type Times = Arc<Mutex<HashMap<String, (Instant, Instant)>>>;

/// Appends in all ways. Every third transaction is rolled back.
async fn appends(url: String, task: u64, times: Times, count: Arc<AtomicU64>) -> Outcome {
    let pg = Pg::connect(&url).await?;
    let (log, store, id) = (
        pg.log("orders").await?,
        pg.store(),
        ConsumerId::new(format!("task-{task}"))?,
    );
    let mut user = client(&url).await?;
    let mut random = Random::new(task);
    let mut commits = 0;
    for round in 0..ROUNDS {
        let some: Vec<String> = (0..=random.below(3)).map(|n| format!("{task}:{round}.{n}")).collect();
        let new: Vec<NewRecord> = some.iter().map(|payload| NewRecord::new(payload.clone())).collect();
        let begun = Instant::now();
        let is_made = match random.below(4) {
            0 => log.append(&new).await.map(|_| true)?,
            1 => {
                let mut tx = store.begin(&id).await?;
                for record in new {
                    tx.send("orders", record).await?;
                }
                tx.commit(advance(commits, 1)).await?;
                commits += 1;
                true
            }
            way => {
                let tx = user.transaction().await?;
                log.append_in(&tx, &new).await?;
                // Others see the lock, and whoever did not wait for it would take the same numbers.
                tokio::task::yield_now().await;
                match way {
                    2 => tx.commit().await?,
                    _ => tx.rollback().await?,
                }
                way == 2
            }
        };
        if is_made {
            count.fetch_add(some.len() as u64, Ordering::SeqCst);
            let mut times = times.lock().expect("no panic");
            times.extend(some.into_iter().map(|payload| (payload, (begun, Instant::now()))));
        }
    }
    Ok(())
}

/// Reads until it was told to stop and has this many records. Returns them with the times at which
/// they came.
async fn reads(
    log: PgLog,
    stop: CancellationToken,
    count: Arc<AtomicU64>,
) -> Result<(Vec<(Record, Instant)>, Duration), Source> {
    let mut reader = log.read(0.into()).await?;
    let mut found: Vec<(Record, Instant)> = Vec::new();
    let mut longest = Duration::ZERO;
    while !stop.is_cancelled() || (found.len() as u64) < count.load(Ordering::SeqCst) {
        let begun = Instant::now();
        let next = tokio::select! {
            next = soon(reader.next(100)) => next??,
            () = stop.cancelled(), if !stop.is_cancelled() => continue,
        };
        longest = longest.max(begun.elapsed());
        found.extend(next.into_iter().map(|record| (record, Instant::now())));
    }
    Ok((found, longest))
}

pub(crate) async fn appends_of_many_handles_are_dense_and_in_the_order_of_the_commits() -> Outcome {
    let stage = Stage::start().await?;
    stage.sql("CREATE TABLE elsewhere (n int)")?;
    let log = stage.pg.log("orders").await?;
    // Transactions that stay open all the time: one writes, and one has an old snapshot.
    let (mut a, mut b) = (stage.client().await?, stage.client().await?);
    let (writes, reading) = (a.transaction().await?, b.transaction().await?);
    writes.execute("INSERT INTO elsewhere VALUES (1)", &[]).await?;
    reading
        .batch_execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        .await?;
    reading.query("SELECT * FROM essentially_once.records", &[]).await?;
    let mut open = stage.begin().await?;
    open.execute("INSERT INTO elsewhere VALUES (2)", &[]).await?;
    open.send("orders", NewRecord::new("the last one")).await?;

    let (times, count, stop) = (Times::default(), Arc::new(AtomicU64::new(0)), CancellationToken::new());
    let other = stage.other().await?.log("orders").await?;
    let reader = tokio::spawn(reads(other, stop.clone(), Arc::clone(&count)));
    let mut running = JoinSet::new();
    for task in 0..TASKS {
        running.spawn(appends(
            stage.server.url(),
            task,
            Arc::clone(&times),
            Arc::clone(&count),
        ));
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    stop.cancel();
    let (found, _) = reader.await??;
    let times = times.lock().expect("no panic").clone();
    ensure!(
        found.len() == times.len() && found.len() > 100,
        "{} of {}",
        found.len(),
        times.len()
    );
    let (mut begun_before, mut last_round) = (None::<Instant>, HashMap::new());
    let mut longest = Duration::ZERO;
    for (place, (record, read)) in (0_u64..).zip(&found) {
        ensure!(record.offset == place.into(), "a hole before {}", record.offset);
        let payload = String::from_utf8_lossy(&record.payload).into_owned();
        let (begun, acknowledged) = times[&payload];
        // A record that was acknowledged before another one was begun is before it.
        ensure!(
            begun_before.is_none_or(|latest| acknowledged >= latest),
            "{payload} is too late"
        );
        begun_before = begun_before.max(Some(begun));
        let (task, round) = payload.split_once(':').ok_or("no task")?;
        let round: f64 = round.parse()?;
        let before = last_round.insert(task.to_owned(), round);
        ensure!(
            before.is_none_or(|before| before < round),
            "{payload} is after {before:?}"
        );
        longest = longest.max(read.saturating_duration_since(acknowledged));
    }
    eprintln!(
        "{} records, each read at most {longest:?} after it was acknowledged",
        found.len()
    );
    // An open transaction that delays readers would delay them until it ends.
    ensure!(longest < Duration::from_secs(1), "a reader waited for {longest:?}");
    open.commit(advance(0, 1)).await?;
    drop((writes, reading));
    let all = payloads(&records(&log).await?);
    ensure!(
        all.len() == found.len() + 1 && all.last().is_some_and(|last| last == "the last one"),
        "order"
    );
    Ok(())
}

pub(crate) async fn an_append_that_fails_takes_no_offset() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    stage.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'no such country' USING ERRCODE = 'check_violation'; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON essentially_once.records FOR EACH ROW
             WHEN (NEW.payload = 'bad') EXECUTE FUNCTION refuse()",
    )?;
    for n in 0..3_u64 {
        let both = [NewRecord::new("first"), NewRecord::new("bad")];
        assert_error!(
            log.append(&both).await,
            Error::Failed { .. },
            "no such country",
            "append to log orders"
        );
        ensure!(
            log.append(&numbered(0..1)).await? == Some(n.into()),
            "an offset was lost"
        );
    }
    Ok(())
}

/// Like a machine that loses power, but for what the operating system has not written.
pub(crate) async fn acknowledged_records_survive_kills_amid_appends() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.pg.log("orders").await?;
    let (mut acknowledged, mut in_doubt) = (Vec::new(), 0);
    for kill in 0..5 {
        let (acknowledge, mut acknowledges) = watch::channel(0);
        let appending = {
            let log = log.clone();
            tokio::spawn(async move {
                let mut done = Vec::new();
                for n in 0.. {
                    let payload = format!("{kill}:{n}");
                    match log.append(&[NewRecord::new(payload.clone())]).await {
                        Ok(Some(offset)) => {
                            done.push((offset, payload));
                            acknowledge.send_replace(done.len());
                        }
                        other => return (done, other),
                    }
                }
                unreachable!("it was not killed")
            })
        };
        soon(acknowledges.wait_for(|done| *done >= 3 + 5 * kill)).await??;
        block_in_place(|| stage.server.kill())?;
        let (done, ended) = soon(appending).await??;
        ensure!(matches!(&ended, Err(error) if error.is_transient()), "{ended:?}");
        in_doubt += usize::from(matches!(ended, Err(Error::Indeterminate { .. })));
        acknowledged.extend(done);
        block_in_place(|| stage.server.restart())?;
    }
    let log = test_servers::insist(async || stage.other().await?.log("orders").await).await?;
    let found = records(&log).await?;
    for (offset, payload) in &acknowledged {
        let record = found
            .get(offset.lo() as usize)
            .ok_or("an acknowledged record is gone")?;
        ensure!(
            record.offset == *offset && record.payload == payload.as_bytes(),
            "{record:?}"
        );
    }
    let extra = found.len() - acknowledged.len();
    ensure!(
        acknowledged.len() > 50 && extra <= in_doubt,
        "{extra} records more, {in_doubt} in doubt"
    );
    Ok(())
}
