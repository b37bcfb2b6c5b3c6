//! Faults around a log and a store: cut connections, closed channels, streams that change, brokers
//! in trouble or dead.

mod broker;
mod closed;
#[path = "../common/mod.rs"]
mod common;
mod cuts;
mod dropped;
mod limits;
mod silence;
mod standby;
mod streams;

use std::process::ExitCode;

use self::{
    broker::{
        a_broker_killed_and_restarted_under_a_consumer_loses_nothing,
        a_restarted_node_answers_for_all_its_streams_at_once, an_alarm_holds_up_commits_and_nothing_is_lost,
        limits_that_are_reached_pass,
    },
    closed::channels_closed_by_the_broker_are_replaced,
    common::{cases, run},
    cuts::connections_cut_amid_appends_and_commits,
    dropped::{dropped_beats_do_not_spoil_the_channel_of_commits, dropped_calls_leave_nothing_open},
    limits::{
        a_batch_too_large_for_one_commit_is_committed_in_parts,
        a_commit_too_large_for_the_broker_is_refused_with_the_setting,
        a_letter_too_large_for_the_broker_is_refused_before_it_is_sent, a_limit_that_was_raised_is_learned_again,
        a_record_too_large_for_the_broker_says_nothing_about_others, a_snapshot_is_cut_to_what_the_broker_takes,
        an_append_next_to_a_returned_one_reports_its_outcome,
        an_append_with_a_record_too_large_for_the_broker_is_in_doubt_once,
        letters_too_large_for_one_commit_are_parked_in_parts,
    },
    silence::{
        every_call_on_a_frozen_broker_ends_within_twice_the_time_out,
        heartbeats_go_on_while_a_handler_blocks_its_runtime,
    },
    standby::a_standby_waits_while_the_owner_beats_and_goes_on_when_it_stops,
    streams::{
        a_reader_of_a_deleted_stream_gets_an_error, a_stream_deleted_and_recreated_is_noticed,
        an_append_to_a_deleted_stream_fails_until_there_is_another, retention_overtaking_a_slow_consumer_is_reported,
    },
};

fn main() -> ExitCode {
    run(cases![
        connections_cut_amid_appends_and_commits,
        channels_closed_by_the_broker_are_replaced,
        a_record_too_large_for_the_broker_says_nothing_about_others,
        an_append_with_a_record_too_large_for_the_broker_is_in_doubt_once,
        a_commit_too_large_for_the_broker_is_refused_with_the_setting,
        a_batch_too_large_for_one_commit_is_committed_in_parts,
        a_letter_too_large_for_the_broker_is_refused_before_it_is_sent,
        a_limit_that_was_raised_is_learned_again,
        letters_too_large_for_one_commit_are_parked_in_parts,
        dropped_calls_leave_nothing_open,
        dropped_beats_do_not_spoil_the_channel_of_commits,
        heartbeats_go_on_while_a_handler_blocks_its_runtime,
        every_call_on_a_frozen_broker_ends_within_twice_the_time_out,
        a_snapshot_is_cut_to_what_the_broker_takes,
        an_append_next_to_a_returned_one_reports_its_outcome,
        a_reader_of_a_deleted_stream_gets_an_error,
        an_append_to_a_deleted_stream_fails_until_there_is_another,
        a_standby_waits_while_the_owner_beats_and_goes_on_when_it_stops,
        a_stream_deleted_and_recreated_is_noticed,
        retention_overtaking_a_slow_consumer_is_reported,
        an_alarm_holds_up_commits_and_nothing_is_lost,
        a_broker_killed_and_restarted_under_a_consumer_loses_nothing,
        a_restarted_node_answers_for_all_its_streams_at_once,
        limits_that_are_reached_pass,
    ])
}
