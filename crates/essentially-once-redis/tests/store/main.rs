//! The store on private servers: commits, refusals, and errors of a failing server.

mod committing;
mod letters;
mod letters_unreadable;
mod listing;
mod lost;
mod native;
mod outbox;
mod partial;
mod pulse;
mod reads;
mod setup;
mod support;
mod trouble;
mod versions;

use std::{future::Future, pin::Pin, process::ExitCode, time::Duration};

use essentially_once_testkit::Suite;
use test_servers::redis_server;

use crate::support::Outcome;

/// The limit for a test. Only a stuck test reaches it.
const LIMIT: Duration = Duration::from_secs(100);

type Case = fn() -> Pin<Box<dyn Future<Output = Outcome>>>;

macro_rules! cases {
    ($($module:ident::$case:ident),+ $(,)?) => {
        [$((concat!(stringify!($module), "::", stringify!($case)), (|| Box::pin($module::$case())) as Case)),+]
    };
}

fn main() -> ExitCode {
    let cases = cases![
        committing::a_commit_is_readable,
        committing::windows_are_replaced_and_forgotten,
        committing::large_numbers_round_trip,
        committing::a_stale_revision_is_fenced,
        committing::one_of_two_racing_stores_wins,
        committing::a_missing_position_has_revision_0,
        committing::another_log_is_refused,
        committing::an_incarnation_is_filled_in,
        committing::a_journal_is_a_field_that_few_commits_write,
        committing::a_transaction_reads_its_own_writes,
        committing::a_transaction_that_is_dropped_leaves_nothing,
        committing::consumers_and_prefixes_are_separate,
        committing::keys_of_another_type_are_refused,
        committing::garbage_in_our_hashes_is_an_error,
        committing::sizes_are_limited,
        native::commands_run_in_the_same_step,
        native::a_fenced_commit_runs_no_command,
        native::the_wrong_type_is_found_before_the_first_write,
        native::an_invalid_number_is_found_before_the_first_write,
        native::what_the_transaction_itself_writes_is_not_checked,
        native::counting_together_is_counting_one_by_one,
        native::sums_that_overflow_are_counted_one_by_one,
        partial::a_first_command_that_fails_applies_nothing,
        partial::a_later_command_that_fails_blocks_the_consumer,
        partial::a_first_commit_applied_in_part_can_be_resolved,
        partial::other_instances_are_fenced_after_a_partial_commit,
        partial::unfit_commands_are_refused_at_once,
        partial::keys_of_stores_are_refused,
        partial::subcommands_are_known,
        partial::queries_read_now,
        pulse::a_pulse_shows_commits_and_beats,
        pulse::a_beat_of_someone_else_has_no_effect,
        pulse::a_release_gives_up_the_position_and_fences_nobody,
        pulse::beats_survive_what_counts_them,
        pulse::a_blocked_consumer_has_no_pulse,
        pulse::state_is_read_in_the_order_of_the_keys,
        pulse::state_and_position_are_of_one_commit,
        letters::letters_are_readable_with_the_servers_own_tools,
        letters::letters_of_another_writer_are_read,
        letters::a_consumer_parks_and_retries_in_order,
        letters::an_operator_changes_letters_of_a_busy_consumer,
        letters_unreadable::a_letter_that_cannot_be_read_says_why_and_can_be_removed,
        letters_unreadable::the_values_of_letters_may_be_gone,
        letters_unreadable::many_due_letters_that_cannot_be_read_are_passed_over_quickly,
        letters::indices_follow_every_change,
        letters::many_letters_are_read_in_pages,
        letters::a_letter_reads_the_same_before_and_after_the_commit,
        letters::after_a_failed_read_of_letters_nothing_is_committed,
        letters::a_key_of_another_type_is_refused_before_the_first_write,
        letters::a_missing_permission_is_refused_before_the_first_write,
        letters::the_documented_permissions_are_enough,
        letters::letters_over_the_limit_are_refused_and_harm_nothing,
        letters::a_full_server_still_takes_removals,
        letters::a_commit_without_letters_names_none_of_their_keys,
        letters::commands_on_letters_are_refused,
        listing::consumers_are_found_among_many_other_keys,
        listing::a_prefix_is_not_a_pattern,
        listing::a_name_that_no_consumer_can_have_is_an_error_that_names_it,
        listing::the_documented_permissions_are_enough,
        outbox::an_entry_is_what_a_log_writes,
        outbox::numbers_outlive_the_entries_and_the_stream,
        outbox::a_deleted_counter_draws_a_new_producer,
        outbox::a_key_that_is_no_outbox_is_refused_before_the_first_write,
        outbox::a_missing_permission_is_refused_before_the_first_write,
        outbox::the_documented_permissions_are_enough,
        outbox::a_partial_commit_sends_nothing,
        outbox::a_stream_takes_either_records_or_commands,
        outbox::names_that_cannot_be_outboxes_are_refused,
        outbox::records_over_a_limit_are_refused_and_harm_nothing,
        outbox::large_transactions_are_sent,
        outbox::a_full_server_sends_only_what_it_makes_room_for,
        outbox::missing_replicas_leave_a_sending_commit_in_doubt,
        outbox::a_commit_that_sends_nothing_is_as_before,
        reads::a_careless_handler_counts_every_record,
        reads::after_a_read_without_an_answer_nothing_is_committed,
        reads::after_a_refused_read_nothing_is_committed,
        reads::after_a_refused_command_the_rest_is_committed,
        trouble::a_full_server_applies_nothing,
        trouble::a_request_that_is_lost_did_nothing,
        trouble::a_reply_that_is_lost_is_found_out,
        trouble::a_late_commit_is_fenced,
        trouble::what_was_acknowledged_survives_kills,
        trouble::a_forgotten_script_is_sent_again,
        trouble::a_value_over_the_servers_limit_is_refused_before_anything_is_sent,
        versions::data_of_version_1_still_works,
        lost::a_position_that_is_deleted_stops_a_running_consumer,
        lost::a_deleted_record_does_not_excuse_a_lost_position,
        setup::settings_that_lose_data_are_named,
        setup::a_server_that_hides_its_settings_is_unknown,
        setup::missing_permissions_are_named,
        setup::a_permission_missing_for_a_later_command_applies_nothing,
        setup::replicas_that_are_away_are_waited_for,
        setup::missing_replicas_leave_an_append_in_doubt,
        setup::large_transactions_are_taken,
        setup::resp3_is_spoken,
        setup::what_is_wrong_with_an_address_is_named,
        setup::a_server_without_room_for_clients_is_a_passing_error,
        setup::a_busy_server_is_identified_later,
        setup::passwords_are_never_shown,
        setup::prefixes_with_which_names_could_meet_are_refused,
    ];
    let missing = redis_server().err();
    let mut suite = Suite::new();
    for (name, case) in cases {
        suite = match &missing {
            Some(why) => suite.ignored(name, why),
            None => suite.async_test(name, LIMIT, case),
        };
    }
    suite.run()
}
