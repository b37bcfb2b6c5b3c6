//! The behaviour of the Redis log beyond the contract, on private servers.

mod append;
mod full;
mod identity;
mod reading;
mod retention;
mod support;

use std::{process::ExitCode, time::Duration};

use essentially_once_testkit::{Suite, Violation};

/// The limit for a test. Only a stuck test reaches it.
const LIMIT: Duration = Duration::from_secs(60);

/// A suite of these tests. Without a server, all of them are ignored.
macro_rules! suite {
    ($($module:ident::$test:ident,)+) => {{
        let missing = test_servers::redis_server().err();
        let suite = Suite::new();
        $(let suite = match &missing {
            None => suite.async_test(concat!(stringify!($module), "::", stringify!($test)), LIMIT, || async {
                $module::$test().await;
                Ok::<_, Violation>(())
            }),
            Some(why) => suite.ignored(concat!(stringify!($module), "::", stringify!($test)), why),
        };)+
        suite
    }};
}

fn main() -> ExitCode {
    let suite = suite! {
        append::ten_thousand_records_in_order,
        append::an_acknowledged_record_survives_kills_amid_appends,
        append::without_memory_nothing_is_appended,
        append::a_chunk_that_fails_leaves_those_before_it_in_doubt,
        append::a_cut_connection_leaves_the_outcome_unknown,
        append::missing_replicas_leave_the_outcome_unknown,
        append::a_thousand_headers_are_taken_and_too_many_refused,
        append::a_value_over_the_servers_limit_is_refused_before_anything_is_sent,
        append::an_append_that_is_too_large_harms_no_other,
        append::where_the_limit_is_hidden_no_append_is_misreported,
        append::an_old_handle_never_recreates_a_deleted_stream,
        full::a_full_server_is_read,
        full::a_full_server_is_trimmed,
        full::offsets_of_removed_records_are_not_used_again,
        identity::a_log_that_must_exist,
        identity::a_recreated_stream_is_another_log,
        identity::handles_of_one_stream_agree,
        identity::a_lost_tail_is_out_of_range,
        identity::monitoring_sees_no_lag,
        identity::a_log_without_incarnation_is_not_opened_on_a_replica,
        identity::a_key_of_another_type_fails,
        identity::a_user_who_may_only_read_reads,
        identity::a_user_without_scripts_learns_what_to_grant,
        identity::a_stream_under_another_key,
        reading::cancelled_calls_lose_and_repeat_nothing,
        reading::large_records_come_a_few_at_a_time,
        reading::a_fetch_is_bounded_for_records_of_any_size,
        reading::a_deleted_last_record_is_behind_the_readable_end,
        reading::a_deleted_last_record_keeps_no_consumer_waiting,
        reading::other_peoples_entries_and_odd_ids,
        reading::the_last_id_of_all,
        reading::a_reader_fails_with_its_server_and_the_next_continues,
        reading::a_server_that_becomes_a_replica_is_left,
        reading::a_spent_reader_says_so,
        reading::a_waiting_reader_is_woken_at_once,
        retention::retention_keeps_a_number_of_records_and_readers_notice_losses,
        retention::removes_by_age,
        retention::appends_trim_on_their_own,
        retention::a_trim_by_others_is_exact_for_an_online_reader,
        retention::a_reader_that_fell_behind_reports_it,
        retention::an_emptied_stream,
        retention::a_deleted_middle_is_passed_over,
        retention::a_trim_by_others_before_ours_is_forgotten,
        retention::removed_records_are_known_exactly_in_steps_of_any_number,
        retention::an_old_handle_removes_nothing_from_a_recreated_stream,
        retention::a_stream_and_its_namesake_in_braces_are_separate,
        retention::the_retention_hash_of_an_earlier_version_is_used,
    };
    suite.run()
}
