//! The conformance cases. Each is named after the contract bullet that it checks, and links to it.

mod bounds;
pub(crate) mod common;
mod compare;
mod durability;
mod fencing;
mod history;
mod journal;
mod letters;
mod letters_unreadable;
mod limits;
mod listing;
mod log;
mod names;
mod native;
mod one_commit;
pub(crate) mod outbox;
pub(crate) mod outbox_numbers;
mod pulse;
mod refusals;
mod removal;
mod restart;
mod state;
mod store;
mod tail;
mod wire;

use crate::{
    case::Case,
    harness::{Harness, Support},
};

macro_rules! case {
    ($module:ident :: $name:ident, needs $($capability:ident),+) => {
        Case {
            name: stringify!($name),
            needs: |capabilities| first_missing(&[$(needs::$capability(capabilities)),+]),
            run: |harness, backend| Box::pin($module::$name(harness, backend)),
        }
    };
}

/// A case that also needs a store that keeps dead letters.
macro_rules! letters_case {
    ($harness:ident, $module:ident::$name:ident $(, $capability:ident)*) => {
        Case {
            name: stringify!($name),
            needs: |capabilities| {
                first_missing(&[
                    needs::store(capabilities),
                    letters::support::<$harness>(),
                    $(needs::$capability(capabilities)),*
                ])
            },
            run: |harness, backend| Box::pin($module::$name(harness, backend)),
        }
    };
}

/// Every case, in the order of the contract's bullets.
pub(crate) fn all<H: Harness>() -> Vec<Case<H>> {
    vec![
        case!(restart::l1_appended_records_survive_a_restart, needs log, restart),
        case!(durability::l1_a_log_reports_its_durability, needs log),
        case!(log::l2_many_appenders_and_readers_agree_on_one_order, needs log),
        case!(log::l2_one_appenders_records_keep_their_order, needs log),
        case!(log::l3_a_reader_under_concurrent_appends_skips_nothing, needs log),
        case!(log::l4_read_yields_exactly_what_is_at_or_after_the_offset, needs log),
        case!(log::l4_a_record_is_read_as_it_was_appended, needs log),
        case!(log::l4_next_returns_at_least_one_record_and_at_most_max, needs log),
        case!(limits::l4_one_call_of_next_returns_a_megabyte_at_most, needs log),
        case!(limits::l4_a_record_keeps_hundreds_of_headers, needs log),
        case!(limits::l4_headers_count_towards_the_megabyte, needs log),
        case!(limits::l4_records_that_grow_do_not_overfill_a_call, needs log),
        case!(limits::l4_next_takes_the_largest_max, needs log),
        case!(log::l4_append_times_are_of_the_append, needs log),
        case!(log::l4_logs_of_other_names_are_independent, needs log),
        case!(names::l4_logs_with_similar_names_are_independent, needs log),
        case!(log::l4_foreign_records_are_read, needs log, foreign),
        case!(bounds::l5_a_reader_at_the_end_waits_for_the_next_record, needs log),
        case!(log::l5_no_wake_up_is_missed, needs log),
        case!(bounds::l5_bounds_tell_the_earliest_record_and_the_end, needs log),
        case!(bounds::l5_below_the_earliest_record_is_truncated, needs log, truncate),
        case!(bounds::l5_retention_that_overtakes_a_reader_is_reported, needs log, truncate),
        case!(bounds::l5_retention_of_everything_keeps_the_end, needs log, truncate_all),
        case!(bounds::l5_offsets_are_not_reused_after_a_restart, needs log, truncate_all, restart),
        case!(bounds::l5_the_readable_end_leaves_out_deleted_records, needs log, delete_record),
        case!(bounds::l5_past_the_end_is_out_of_range, needs log),
        case!(bounds::l5_a_recreated_log_is_never_silent, needs log, recreate),
        case!(log::l6_a_cancelled_next_loses_and_repeats_nothing, needs log),
        case!(restart::l7_a_failed_append_reports_its_outcome, needs log, restart),
        case!(wire::l7_a_lost_reply_never_doubles_an_append, needs log, wire),
        case!(refusals::l7_a_refusal_within_a_batch_reports_its_outcome, needs log, refuse),
        case!(refusals::l7_concurrent_appends_have_their_own_outcomes, needs log, record_limit),
        case!(limits::l8_sizes_up_to_the_limit_are_taken, needs log, record_limit),
        case!(limits::l8_a_record_over_the_limit_is_refused_before_any_is_appended, needs log, record_limit),
        case!(limits::l9_a_malformed_entry_is_yielded_in_its_place, needs log, malformed),
        case!(refusals::l10_an_old_handle_never_appends_to_a_new_log, needs log, delete),
        case!(removal::l11_the_records_before_an_offset_are_removed, needs log, remove_before),
        case!(removal::l11_nothing_is_removed_past_the_end, needs log, remove_before),
        case!(removal::l11_offsets_of_removed_records_are_not_reused, needs log, remove_before),
        case!(removal::l11_offsets_are_not_reused_after_a_restart, needs log, remove_before, restart),
        case!(removal::l11_records_appended_meanwhile_stay, needs log, remove_before),
        case!(tail::l12_the_tail_holds_the_last_records, needs log, tail),
        case!(tail::l12_the_tail_is_what_retention_left, needs log, tail, truncate),
        case!(store::s1_a_commit_applies_state_and_position, needs store),
        case!(store::s1_windows_are_kept_whole_with_the_position, needs store),
        case!(store::s1_forgotten_windows_are_removed, needs store),
        case!(store::s1_the_whole_position_is_kept, needs store),
        case!(names::s1_windows_of_similar_producers_are_independent, needs store),
        case!(history::s1_hundreds_of_commits_keep_everything, needs store),
        case!(history::s1_tens_of_thousands_of_commits_keep_everything, needs store, commits_are_cheap),
        case!(native::s1_native_writes_are_applied_with_the_commit, needs store, native),
        case!(restart::s1_a_restart_never_parts_state_from_position, needs store, restart),
        case!(fencing::s2_a_stale_revision_is_fenced, needs store),
        case!(fencing::s2_a_fenced_commit_applies_nothing, needs store),
        case!(fencing::s2_a_first_commit_is_fenced_if_there_is_a_position, needs store),
        case!(fencing::s2_of_racing_commits_one_wins, needs store),
        case!(native::s2_a_fenced_commit_applies_no_native_writes, needs store, native),
        case!(restart::s3_commits_survive_a_restart, needs store, restart),
        case!(restart::s3_a_commit_that_stages_nothing_survives_a_restart, needs store, restart),
        case!(durability::s3_a_store_reports_its_durability, needs store),
        case!(store::s4_a_dropped_transaction_leaves_no_trace, needs store),
        case!(store::s4_a_rolled_back_transaction_leaves_no_trace, needs store),
        case!(native::s4_a_transaction_that_ends_leaves_no_native_writes, needs store, native),
        case!(store::s5_a_cancelled_commit_is_all_or_nothing_and_for_good, needs store),
        case!(restart::s5_position_resolves_an_unknown_outcome, needs store, restart),
        case!(wire::s5_a_lost_reply_leaves_the_truth_to_position, needs store, wire),
        case!(restart::s6_a_transaction_whose_read_failed_does_not_commit, needs store, restart_amid_transaction),
        case!(native::s6_a_failed_read_commits_no_native_writes, needs store, native, restart_amid_transaction),
        case!(state::s6_a_transaction_reads_its_own_writes, needs store),
        case!(state::s6_keys_and_values_are_kept_to_the_byte, needs store),
        case!(state::s6_every_key_and_value_of_the_guaranteed_sizes_is_taken, needs store),
        case!(state::s6_a_key_over_the_limit_is_refused_and_stages_nothing, needs store, key_limit),
        case!(state::s6_a_value_over_the_limit_is_refused_and_stages_nothing, needs store, value_limit),
        case!(state::s7_consumers_do_not_see_each_others_state, needs store),
        case!(names::s7_consumers_with_similar_names_are_independent, needs store),
        case!(names::s7_consumers_do_not_see_each_others_windows, needs store),
        case!(state::s7_many_consumers_keep_their_positions, needs store),
        case!(store::s8_a_position_remembers_its_log, needs store),
        case!(store::s8_a_known_incarnation_is_kept, needs store),
        case!(store::s8_a_log_without_incarnation_is_the_same_log, needs store),
        case!(store::s8_a_stale_commit_for_another_log_is_fenced, needs store),
        case!(store::s8_a_commit_for_another_log_is_refused, needs store),
        case!(one_commit::s9_a_position_is_of_one_commit, needs store),
        case!(one_commit::s9_a_position_waits_for_no_transaction, needs store),
        case!(pulse::s10_a_commit_changes_the_pulse, needs store),
        case!(pulse::s10_watch_returns_after_a_commit_elsewhere, needs store),
        case!(pulse::s10_a_beat_of_the_owner_changes_the_pulse, needs store, beats),
        case!(pulse::s10_a_beat_of_another_changes_nothing, needs store),
        case!(pulse::s10_a_beat_fences_nobody, needs store),
        case!(pulse::s10_a_release_clears_its_own_owner_only, needs store, beats),
        case!(one_commit::s11_a_snapshot_is_of_one_commit, needs store, read_state),
        case!(one_commit::s11_a_snapshot_keeps_the_order_of_keys, needs store, read_state),
        case!(one_commit::s11_a_snapshot_waits_for_no_transaction, needs store, read_state),
        case!(journal::s12_a_journal_is_part_of_the_commit, needs store),
        case!(listing::s13_every_consumer_with_a_position_is_listed, needs store, consumers),
        case!(listing::s13_a_consumer_that_never_committed_is_not_listed, needs store, consumers),
        case!(listing::s13_consumers_with_similar_names_are_listed, needs store, consumers),
        case!(listing::s13_consumers_are_listed_while_others_commit, needs store, consumers),
        letters_case!(H, letters::d1_letters_are_applied_with_the_commit),
        letters_case!(H, letters::d1_what_is_not_committed_leaves_no_trace),
        letters_case!(H, letters::d1_every_read_agrees_with_the_reference),
        letters_case!(H, letters::d2_a_letter_comes_back_as_it_was_parked),
        letters_case!(H, letters::d2_the_largest_record_can_be_parked, record_limit),
        letters_case!(H, letters::d2_letters_survive_a_restart, restart),
        letters_case!(H, letters::d3_keys_are_compared_to_the_byte),
        letters_case!(H, letters::d4_consumers_do_not_see_each_others_letters),
        letters_case!(
            H,
            letters_unreadable::d5_a_letter_that_cannot_be_read_hides_no_other,
            damage_letter
        ),
        case!(outbox::o1_records_are_sent_with_the_commit, needs store, outbox),
        case!(outbox::o1_what_is_not_committed_sends_nothing, needs store, outbox),
        case!(outbox::o1_a_restart_never_parts_records_from_the_position, needs store, outbox, restart),
        case!(wire::o1_a_lost_reply_neither_loses_nor_doubles_records, needs store, outbox, wire),
        case!(outbox::o2_records_keep_their_order, needs store, outbox),
        case!(outbox::o2_a_record_comes_back_as_it_was_sent, needs store, outbox),
        case!(outbox::o2_a_record_over_the_limit_is_refused_and_stages_nothing, needs store, outbox, record_limit),
        case!(outbox_numbers::o3_each_outbox_numbers_its_records, needs store, outbox),
        case!(outbox_numbers::o3_numbers_rise_after_truncation, needs store, outbox, truncate),
        case!(outbox_numbers::o3_numbers_rise_after_records_were_removed, needs store, outbox, remove_before),
        case!(outbox_numbers::o3_numbers_rise_after_a_restart, needs store, outbox, restart),
        case!(outbox_numbers::o3_concurrent_senders_share_no_number, needs store, outbox, shared_outboxes),
        case!(outbox_numbers::o3_a_record_with_an_origin_is_refused, needs store, outbox),
        case!(outbox_numbers::o3_a_consumer_behind_a_relay_handles_each_record_once, needs store, outbox),
        case!(outbox::o4_no_reader_sees_a_record_before_its_commit, needs store, outbox),
        case!(outbox::o5_consumers_share_an_outbox, needs store, outbox, shared_outboxes),
    ]
}

fn first_missing(needs: &[Support]) -> Support {
    *needs
        .iter()
        .find(|need| **need != Support::Yes)
        .unwrap_or(&Support::Yes)
}

/// What a case can require, by the names of the capabilities.
mod needs {
    use crate::harness::{Capabilities, Support};

    macro_rules! need {
        ($($capability:ident),+) => {
            $(pub(super) fn $capability(capabilities: &Capabilities) -> Support {
                capabilities.$capability
            })+
        };
    }
    need!(
        log,
        store,
        restart,
        restart_amid_transaction,
        truncate,
        truncate_all,
        recreate,
        delete,
        delete_record,
        remove_before,
        refuse,
        wire,
        native,
        read_state,
        consumers,
        beats,
        commits_are_cheap,
        malformed,
        foreign,
        tail,
        damage_letter,
        outbox,
        shared_outboxes
    );

    pub(super) fn record_limit(capabilities: &Capabilities) -> Support {
        match capabilities.record_limit {
            Some(_) => Support::Yes,
            None => Support::No("the harness does not state a record limit"),
        }
    }

    pub(super) fn key_limit(capabilities: &Capabilities) -> Support {
        match capabilities.key_limit {
            Some(_) => Support::Yes,
            None => Support::No("the harness does not state a key limit"),
        }
    }

    pub(super) fn value_limit(capabilities: &Capabilities) -> Support {
        match capabilities.value_limit {
            Some(_) => Support::Yes,
            None => Support::No("the harness does not state a value limit"),
        }
    }
}
