//! The server is killed between any two steps of a run, and at random moments.

#[path = "../common/mod.rs"]
mod common;

use std::{process::ExitCode, time::Duration};

use test_servers::kills::{Moment, kill_at_every_step, kill_at_random};

use common::{Outcome, backend::OnRedis, cases, run};

fn main() -> ExitCode {
    run(cases![
        killed_before_any_step_in_batches_of_3,
        killed_before_any_step_one_by_one,
        killed_after_any_step_in_batches_of_3,
        killed_after_any_step_one_by_one,
        dead_for_a_while_after_any_step,
        two_consumers_and_a_sender_survive_random_kills,
    ])
}

async fn killed_before_any_step_in_batches_of_3() -> Outcome {
    kill_at_every_step::<OnRedis>(Moment::Before, 3, 0).await
}

async fn killed_before_any_step_one_by_one() -> Outcome {
    kill_at_every_step::<OnRedis>(Moment::Before, 1, 0).await
}

async fn killed_after_any_step_in_batches_of_3() -> Outcome {
    kill_at_every_step::<OnRedis>(Moment::After, 3, 0).await
}

async fn killed_after_any_step_one_by_one() -> Outcome {
    kill_at_every_step::<OnRedis>(Moment::After, 1, 0).await
}

async fn dead_for_a_while_after_any_step() -> Outcome {
    kill_at_every_step::<OnRedis>(Moment::After, 3, 2).await
}

async fn two_consumers_and_a_sender_survive_random_kills() -> Outcome {
    kill_at_random::<OnRedis>(90, Duration::from_millis(100)).await
}
