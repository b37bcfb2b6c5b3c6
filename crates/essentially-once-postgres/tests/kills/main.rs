//! The server is killed between any two steps of a run, and at random moments.

#[path = "../common/mod.rs"]
mod common;
mod processes;
mod soak;
mod steps;

use std::{collections::BTreeSet, process::ExitCode, sync::Arc, time::Duration};

use essentially_once::{Consumer, ConsumerId, Error, Log, NewRecord, backend::Source};
use essentially_once_postgres::{Pg, PgLog, PgOptions};
use essentially_once_testkit::Ledger;
use test_servers::{PostgresServer, insist};

use self::{
    common::{Outcome, cases, ensure, judge, message, run},
    processes::killed_processes_leave_no_trace_but_their_commits,
    soak::two_consumers_and_a_sender_survive_random_kills,
    steps::{Counted, Moment, Steps, Strike},
};

/// Enough for several batches of every size.
const MESSAGES: u64 = 4;
/// A run has more steps: it opens a log, appends, and handles each record.
const STEPS: usize = 25;

fn main() -> ExitCode {
    if let Some(ended) = processes::child() {
        return ended;
    }
    run(cases![
        killed_before_any_step_in_batches_of_3,
        killed_before_any_step_one_by_one,
        killed_after_any_step_in_batches_of_3,
        killed_after_any_step_one_by_one,
        dead_for_a_while_after_any_step,
        two_consumers_and_a_sender_survive_random_kills,
        killed_processes_leave_no_trace_but_their_commits,
    ])
}

async fn killed_before_any_step_in_batches_of_3() -> Outcome {
    at_every_step(Moment::Before, 3, 0).await
}

async fn killed_before_any_step_one_by_one() -> Outcome {
    at_every_step(Moment::Before, 1, 0).await
}

async fn killed_after_any_step_in_batches_of_3() -> Outcome {
    at_every_step(Moment::After, 3, 0).await
}

async fn killed_after_any_step_one_by_one() -> Outcome {
    at_every_step(Moment::After, 1, 0).await
}

/// The server stays dead until two more steps have failed.
async fn dead_for_a_while_after_any_step() -> Outcome {
    at_every_step(Moment::After, 3, 2).await
}

/// Does one run per step, until a run ends before reaching the step.
async fn at_every_step(moment: Moment, max_batch: usize, failures: usize) -> Outcome {
    let server = Arc::new(PostgresServer::start()?);
    let mut struck = BTreeSet::new();
    let (mut failed, mut step) = (0, 0);
    loop {
        step += 1;
        let strike = Strike { step, moment, failures };
        let steps = Steps::new(Arc::clone(&server), strike);
        let outcome = one_run(&server, &steps, max_batch).await;
        outcome.map_err(|error| format!("{strike:?} ({:?}): {error}", steps.struck()))?;
        if steps.count() < step {
            break;
        }
        // A reader's wait that ends with the run is the last step.
        struck.extend(steps.struck());
        failed += steps.failed();
    }
    let kinds = BTreeSet::from([
        "open",
        "append",
        "bounds",
        "durability",
        "position",
        "read",
        "next",
        "begin",
        "get",
        "put",
        "commit",
    ]);
    ensure!(struck == kinds, "struck only {struck:?}");
    ensure!(step > STEPS, "a run had {step} steps only");
    // Not all kills make a step fail. Some steps need no server, some find the connection closed
    // and reconnect, and no step follows the last one.
    ensure!(failed > step / 3, "only {failed} operations failed in {step} runs");
    Ok(())
}

/// A sender and then a consumer, with their own log and state.
async fn one_run(server: &PostgresServer, steps: &Steps, max_batch: usize) -> Outcome {
    let name = format!("run-{}", steps.strike().step);
    let consumer = ConsumerId::new(&name)?;
    let pg = PgOptions::new()
        .timeout(Duration::from_secs(20))
        .connect(&server.url())
        .await?;
    let log = open(&pg, &name, steps).await?;
    for number in 0..MESSAGES {
        append(&log, &[message(number)]).await?;
        if number % 3 == 1 {
            append(&log, &[message(number), message(number - 1)]).await?;
        }
    }
    let store = Counted::new(pg.store(), steps);
    Consumer::essentially_once(consumer.clone(), log, store, Ledger)
        .max_batch(max_batch)
        .min_backoff(Duration::from_millis(1))
        .max_backoff(Duration::from_millis(50))
        .restart_limit(100)
        .standby_after(Duration::ZERO)
        .run_until_caught_up()
        .await?;
    steps.revive()?;
    // Judge from another connection.
    let pg = Pg::connect(&server.url()).await?;
    judge(&pg.log(&name).await?, &pg.store(), &consumer, MESSAGES).await
}

async fn open(pg: &Pg, name: &str, steps: &Steps) -> Result<Counted<PgLog>, Source> {
    let log = insist(|| steps.step("open", pg.log(name))).await?;
    Ok(Counted::new(log, steps))
}

/// Repeats each append until it succeeds.
async fn append(log: &dyn Log, records: &[NewRecord]) -> Result<(), Error> {
    insist(|| log.append(records)).await?;
    Ok(())
}
