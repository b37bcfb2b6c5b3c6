//! A server that is killed between any two steps of a run, and at random moments.

mod random;
mod steps;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use essentially_once::{Consumer, ConsumerId, Error, Log, NewRecord};
use essentially_once_testkit::Ledger;

use self::steps::{Counted, Steps, Strike};
pub use self::{random::kill_at_random, steps::Moment};
use crate::{
    Backend, Outcome, Server, ensure, insist,
    ledger::{judge, message},
};

/// Enough for several batches of every size.
const MESSAGES: u64 = 4;

/// A run has more steps: it opens a log, appends, and handles each record.
const STEPS: usize = 25;

/// How long a run waits for a dead server.
const TIMEOUT: Option<Duration> = Some(Duration::from_secs(20));

/// The kinds of steps of a run.
const KINDS: [&str; 11] = [
    "append",
    "begin",
    "bounds",
    "commit",
    "durability",
    "get",
    "next",
    "open",
    "position",
    "put",
    "read",
];

/// Does one run per step, and kills the server there, until a run ends before it reaches the step.
/// The server stays dead until that number of later steps have failed.
///
/// # Errors
/// The first finding.
pub async fn kill_at_every_step<B: Backend>(moment: Moment, max_batch: usize, failures: usize) -> Outcome {
    let server = Arc::new(B::start()?);
    let mut struck = BTreeSet::new();
    let (mut failed, mut step) = (0, 0);
    loop {
        step += 1;
        let strike = Strike { step, moment, failures };
        let steps = Steps::new(Arc::clone(&server) as Arc<dyn Server>, strike);
        let outcome = one_run::<B>(&*server, &steps, max_batch).await;
        outcome.map_err(|error| format!("{strike:?} ({:?}): {error}", steps.struck()))?;
        if steps.count() < step {
            break;
        }
        // A reader's wait that ends with the run is the last step.
        struck.extend(steps.struck());
        failed += steps.failed();
    }
    ensure!(struck.iter().eq(&KINDS), "struck only {struck:?}");
    ensure!(step > STEPS, "a run had {step} steps only");
    // Not all kills make a step fail. Some steps need no server, some find the connection closed
    // and reconnect, and no step follows the last one.
    ensure!(failed > step / 3, "only {failed} operations failed in {step} runs");
    Ok(())
}

/// A sender and then a consumer, with their own log and state.
async fn one_run<B: Backend>(server: &B::Server, steps: &Steps, max_batch: usize) -> Outcome {
    let name = format!("run-{}", steps.strike().step);
    let consumer = ConsumerId::new(&name)?;
    let backend = B::connect(&server.url(), TIMEOUT).await?;
    let log = insist(|| steps.step("open", backend.log(&name))).await?;
    let log = Counted::new(log, steps);
    for number in 0..MESSAGES {
        append(&log, &[message(number)]).await?;
        if number % 3 == 1 {
            append(&log, &[message(number), message(number - 1)]).await?;
        }
    }
    let store = Counted::new(backend.store(), steps);
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
    let backend = B::connect(&server.url(), TIMEOUT).await?;
    judge(&backend.log(&name).await?, &backend.store(), &consumer, MESSAGES).await
}

/// Repeats an append until it succeeds.
async fn append(log: &dyn Log, records: &[NewRecord]) -> Result<(), Error> {
    insist(|| log.append(records)).await?;
    Ok(())
}
