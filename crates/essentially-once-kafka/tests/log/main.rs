//! What other programs do to a topic, what a broker refuses, and what a user gets wrong.

mod compacted;
mod foreign;
#[cfg(feature = "tls")]
mod front;
mod mocked;
#[cfg(feature = "tls")]
mod protected;
mod refusals;
mod support;
mod transactions;

use std::process::ExitCode;

use support::{cases, run};

fn main() -> ExitCode {
    let with_broker = cases![
        foreign::records_of_other_programs_are_read_whole,
        foreign::other_programs_read_our_records,
        foreign::headers_of_any_name_are_kept,
        foreign::partitions_are_logs_of_their_own,
        foreign::a_topic_has_another_name_than_its_log,
        foreign::no_group_is_joined_and_no_offset_committed,
        transactions::what_was_aborted_is_not_read_and_not_waited_for,
        transactions::an_open_transaction_holds_readers_back,
        transactions::a_log_of_nothing_but_aborted_records_is_empty,
        transactions::a_transactional_append_is_all_or_nothing,
        transactions::a_commit_whose_connection_is_cut_appends_once_or_fails,
        transactions::a_dropped_append_leaves_no_open_transaction,
        transactions::a_dropped_pipelined_append_leaves_a_prefix_before_what_follows,
        transactions::the_next_append_ends_a_transaction_that_was_left_open,
        refusals::a_broker_that_does_not_answer_is_named_without_the_password,
        refusals::a_missing_topic_or_partition_is_refused,
        refusals::a_record_over_the_limit_of_the_broker_is_refused,
        refusals::a_frozen_broker_leaves_an_append_in_doubt,
        refusals::a_broker_that_is_gone_ends_a_reader,
        refusals::an_error_behind_records_is_not_lost,
        refusals::a_topic_that_may_lose_records_is_refused,
        compacted::what_was_compacted_is_not_read_and_not_waited_for,
    ];
    #[cfg(feature = "tls")]
    let with_broker = with_broker.into_iter().chain(cases![
        protected::clients_are_served_over_tls,
        protected::a_client_shows_its_certificate,
        protected::a_broker_of_an_unknown_authority_or_name_is_refused,
        protected::a_password_is_checked_and_never_shown,
        protected::a_port_with_tls_and_one_without_are_told_apart,
    ]);
    let mocked = cases![
        mocked::an_append_without_rights_is_refused,
        mocked::a_read_without_rights_is_refused,
        mocked::a_fenced_producer_is_replaced,
        mocked::a_partition_that_moves_between_brokers_loses_and_repeats_nothing,
        mocked::an_append_waits_until_enough_replicas_are_in_sync,
    ];
    run(with_broker, mocked)
}
