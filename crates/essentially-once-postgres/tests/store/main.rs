//! Handlers' transactions: their SQL, their mistakes, and what others do meanwhile.

mod altered;
#[path = "../common/mod.rs"]
mod common;
mod durable;
mod isolation;
mod locks;
mod mistakes;
mod native;
mod runtimes;
mod state;
mod trouble;

use std::process::ExitCode;

use common::{cases, run};

fn main() -> ExitCode {
    run(cases![
        native::sql_state_and_position_are_committed_together,
        native::a_transaction_reads_what_it_has_queued,
        native::thousands_of_queued_statements_run_in_order,
        native::a_queued_statement_that_fails_is_reported_by_the_commit,
        native::a_queued_statement_that_fails_is_reported_by_the_next_query,
        native::a_deferred_constraint_is_checked_by_the_commit,
        native::a_fenced_commit_applies_no_sql,
        native::savepoints_undo_sql_only,
        state::a_store_reads_what_others_have_committed_since,
        state::what_was_read_before_another_commit_is_not_committed,
        state::a_rolled_back_change_is_not_remembered,
        state::a_large_state_is_read_key_by_key,
        state::a_large_first_value_does_not_hide_the_others,
        state::a_store_can_remember_nothing,
        state::a_consumer_that_was_deleted_is_not_remembered,
        mistakes::after_a_mistake_the_transaction_can_only_be_rolled_back,
        mistakes::a_mistake_of_the_handler_is_not_a_passing_error,
        mistakes::a_consumer_stops_at_a_mistake,
        mistakes::the_handler_cannot_end_the_transaction,
        mistakes::the_wrong_number_of_parameters_is_named,
        altered::an_altered_table_heals_with_the_next_transaction,
        altered::all_sessions_heal_when_one_finds_an_altered_table,
        altered::statements_that_the_handler_discarded_are_prepared_again,
        altered::a_dropped_table_is_a_mistake_until_it_is_back,
        durable::a_handler_that_relaxes_durability_still_commits_durably,
        durable::a_database_that_relaxes_durability_does_not_weaken_commits,
        isolation::a_conflicting_writer_makes_a_repeatable_read_start_again,
        isolation::a_conflicting_writer_does_not_disturb_read_committed,
        isolation::one_of_two_serializable_transactions_that_skew_fails,
        isolation::beats_and_releases_fail_no_open_transaction,
        isolation::a_stale_revision_is_fenced_at_every_level,
        locks::a_deadlock_is_a_passing_error,
        locks::a_lock_that_is_held_for_long_is_a_passing_error,
        locks::a_statement_that_takes_too_long_is_ended,
        locks::a_transaction_left_idle_is_ended_by_the_server,
        locks::a_transaction_left_idle_before_its_commit_applies_nothing,
        locks::a_suspended_instance_keeps_its_locks_for_a_while_only,
        locks::a_dropped_transaction_gives_its_locks_up,
        runtimes::a_handle_outlives_the_runtime_that_it_connected_on,
        runtimes::a_runtime_that_is_blocked_delays_no_other,
        runtimes::a_handle_keeps_few_sessions,
        trouble::a_session_that_is_ended_in_a_transaction_applies_nothing,
        trouble::idle_sessions_that_are_ended_are_replaced,
        trouble::a_server_that_turns_read_only_is_left_and_found_again,
        trouble::a_frozen_server_leaves_a_commit_in_doubt,
        trouble::a_dropped_commit_is_made_or_not_but_never_in_part,
        trouble::a_full_disk_is_a_passing_error_and_leaves_no_gap,
        trouble::garbage_in_our_tables_is_an_error,
    ])
}
