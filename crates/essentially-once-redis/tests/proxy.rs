//! Connections that break in the middle of a commit or append, and a silent network.

mod common;

use std::{process::ExitCode, time::Duration};

use test_servers::{Cut, cuts};

use common::{Outcome, backend::OnRedis, cases, run};

/// The timeout in a silent network.
const SHORT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    run(cases![
        commits_that_never_arrive_one_by_one,
        commits_that_never_arrive_in_batches_of_5,
        commits_whose_reply_is_lost_one_by_one,
        commits_whose_reply_is_lost_in_batches_of_5,
        appends_that_never_arrive,
        appends_whose_reply_is_lost,
        a_consumer_outlasts_a_silent_network,
        a_commit_held_back_is_in_doubt_and_fences_when_it_arrives,
        an_append_held_back_is_in_doubt,
        a_reader_in_silence_gives_up,
    ])
}

async fn commits_that_never_arrive_one_by_one() -> Outcome {
    cuts::cut_every_commit::<OnRedis>(Cut::BeforeRequest, 1).await
}

async fn commits_that_never_arrive_in_batches_of_5() -> Outcome {
    cuts::cut_every_commit::<OnRedis>(Cut::BeforeRequest, 5).await
}

async fn commits_whose_reply_is_lost_one_by_one() -> Outcome {
    cuts::cut_every_commit::<OnRedis>(Cut::BeforeReply, 1).await
}

async fn commits_whose_reply_is_lost_in_batches_of_5() -> Outcome {
    cuts::cut_every_commit::<OnRedis>(Cut::BeforeReply, 5).await
}

async fn appends_that_never_arrive() -> Outcome {
    cuts::cut_every_append::<OnRedis>(Cut::BeforeRequest, 1).await
}

async fn appends_whose_reply_is_lost() -> Outcome {
    cuts::cut_every_append::<OnRedis>(Cut::BeforeReply, 2).await
}

async fn a_consumer_outlasts_a_silent_network() -> Outcome {
    cuts::a_consumer_outlasts_a_silent_network::<OnRedis>(SHORT).await
}

async fn a_commit_held_back_is_in_doubt_and_fences_when_it_arrives() -> Outcome {
    cuts::a_commit_held_back_is_in_doubt_and_fences_when_it_arrives::<OnRedis>(SHORT).await
}

async fn an_append_held_back_is_in_doubt() -> Outcome {
    cuts::an_append_held_back_is_in_doubt::<OnRedis>(SHORT).await
}

async fn a_reader_in_silence_gives_up() -> Outcome {
    cuts::a_reader_in_silence_gives_up::<OnRedis>(SHORT).await
}
