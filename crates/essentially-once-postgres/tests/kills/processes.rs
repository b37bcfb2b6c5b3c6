//! Processes of a consumer are killed. A test starts this program again as a child.

use std::{
    env,
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use essentially_once::{Consumer, ConsumerId, OffsetStore as _, backend::Source};
use essentially_once_postgres::Pg;
use essentially_once_testkit::Ledger;
use test_servers::{PostgresServer, eventually};
use tokio::time::sleep;

use crate::common::{Outcome, Random, ensure, judge, send};

const URL: &str = "ESSENTIALLY_ONCE_POSTGRES_TEST_URL";
const KILLS: u64 = 25;
const MESSAGES: u64 = 2_000;

/// A child process that is killed at the end of the test.
struct Process(Child);

impl Process {
    fn start(url: &str) -> Result<Self, Source> {
        let child = Command::new(env::current_exe()?)
            .env(URL, url)
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Consumes until it is killed, if this process is a child.
pub(crate) fn child() -> Option<ExitCode> {
    let url = env::var(URL).ok()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    let ended = runtime.block_on(async {
        let pg = Pg::connect(&url).await?;
        let consumer = consumer(&pg).await.map_err(|error| error.to_string())?;
        Ok::<_, Source>(consumer.run().await?)
    });
    eprintln!("a child ended: {ended:?}");
    Some(ExitCode::FAILURE)
}

async fn consumer(
    pg: &Pg,
) -> Result<Consumer<essentially_once_postgres::PgStore, Ledger, essentially_once::consumer::EssentiallyOnce>, Source> {
    let log = pg.log("orders").await?;
    let consumer = Consumer::essentially_once(ConsumerId::new("shipping")?, log, pg.store(), Ledger);
    Ok(consumer.max_batch(3).standby_after(Duration::ZERO))
}

pub(crate) async fn killed_processes_leave_no_trace_but_their_commits() -> Outcome {
    let server = PostgresServer::start()?;
    let (url, id) = (server.url(), ConsumerId::new("shipping")?);
    let pg = Pg::connect(&url).await?;
    let (log, store) = (pg.log("orders").await?, pg.store());
    let sending = tokio::spawn({
        let log = log.clone();
        async move { send(&log, 0..MESSAGES).await }
    });
    let mut random = Random::new(KILLS);
    let next = async || Ok::<_, Source>(store.position(&id).await?.map_or(0, |position| position.next.lo()));
    let mut killed = 0;
    let mut process = Process::start(&url)?;
    while killed < KILLS {
        let before = next().await?;
        if before == MESSAGES {
            break;
        }
        // It has committed something, and is in the middle of something else.
        let caught_up = eventually(async || {
            Ok(match next().await? {
                next if next > before => Ok(()),
                next => Err(format!("the position stays at {next}")),
            })
        });
        caught_up.await?;
        // A kill at any moment, so no event decides when.
        sleep(Duration::from_micros(random.below(30_000))).await;
        drop(process);
        killed += 1;
        process = Process::start(&url)?;
    }
    sending.await??;
    drop(process);
    ensure!(killed > 5, "only {killed} were killed before the end");
    let report = consumer(&pg).await?.run_until_caught_up().await?;
    eprintln!("{killed} processes were killed, then {report}");
    judge(&log, &store, &id, MESSAGES).await?;
    // No session of a killed process keeps a transaction.
    let open = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
    eventually(async || {
        let open = server.run_sql(open)?;
        Ok(if open.trim() == "0" { Ok(()) } else { Err(open) })
    })
    .await
}
