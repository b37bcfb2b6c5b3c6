//! The log: its order under load, its retention, foreign writers, and readers in trouble.

#[path = "../common/mod.rs"]
mod common;
mod foreign;
mod order;
mod reading;
mod retention;

use std::process::ExitCode;

use common::{cases, run};

fn main() -> ExitCode {
    run(cases![
        order::appends_of_many_handles_are_dense_and_in_the_order_of_the_commits,
        order::an_append_that_fails_takes_no_offset,
        order::acknowledged_records_survive_kills_amid_appends,
        foreign::the_documented_statement_appends,
        foreign::the_documented_notification_wakes_readers,
        foreign::rows_that_cannot_be_decoded_are_malformed_records,
        foreign::records_are_readable_with_the_servers_own_tools,
        reading::a_reader_whose_session_is_ended_fails_for_now_and_the_next_goes_on,
        reading::a_waiting_reader_outlives_its_session,
        reading::cancelled_calls_lose_and_repeat_nothing,
        reading::large_records_come_a_few_at_a_time,
        reading::a_deleted_middle_is_reported,
        reading::handles_of_one_log_agree,
        retention::appends_remove_records_over_the_number,
        retention::appends_remove_records_over_the_age,
        retention::a_retention_of_ages_keeps_everything,
        retention::limits_that_cannot_be_kept_are_refused,
        retention::the_last_opened_retention_holds_for_all,
        retention::records_are_removed_while_appends_go_on,
        retention::many_records_are_removed_in_steps,
        retention::a_trim_of_an_old_handle_removes_nothing_of_a_recreated_log,
    ])
}
