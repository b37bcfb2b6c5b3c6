//! Records that are sent in a transaction: atomic, numbered, in order, and soon read.

mod append_in;
#[path = "../common/mod.rs"]
mod common;
mod sending;
mod waking;

use std::process::ExitCode;

use common::{Stage, cases, records, run};
use essentially_once::{
    Epoch, Error, NewRecord, Outbox as _, ProducerId,
    backend::{Source, Transaction as _},
};
use essentially_once_postgres::PgLog;

fn main() -> ExitCode {
    run(cases![
        append_in::records_are_appended_with_the_users_commit_or_not_at_all,
        append_in::sends_and_appends_in_transactions_share_one_numbering,
        append_in::a_connection_that_does_not_wait_for_the_disk_is_refused,
        append_in::another_database_is_refused,
        append_in::records_that_a_log_refuses_are_refused_here_too,
        append_in::a_log_that_was_recreated_is_not_appended_to,
        append_in::a_lock_that_is_held_for_long_is_a_passing_error,
        append_in::retention_applies_and_numbers_go_on,
        sending::a_transaction_sends_with_its_commit_or_not_at_all,
        sending::a_slow_handler_that_has_sent_delays_no_append,
        sending::transactions_that_send_to_the_same_logs_in_any_order_do_not_deadlock,
        sending::an_outbox_that_was_recreated_heals_with_the_next_attempt,
        sending::an_outbox_that_is_deleted_under_a_consumer_costs_no_record,
        sending::without_its_sender_a_log_draws_another_one,
        sending::many_records_of_one_transaction_are_sent_in_order,
        waking::readers_of_another_handle_wake_at_once,
        waking::readers_wake_after_a_handlers_commit,
        waking::without_notifications_readers_find_records_by_looking,
    ])
}

/// Sends one record in a transaction of its own, after this many commits.
async fn send_alone(stage: &Stage, log: &str, payload: &str, commits: u64) -> Result<(), Error> {
    let mut tx = stage.begin().await?;
    tx.send(log, NewRecord::new(payload.to_owned())).await?;
    tx.commit(common::advance(commits, 1)).await
}

/// Reads every record, and checks that each is numbered by its offset and none is missing. Returns
/// the payloads and the producer.
async fn numbered(log: &PgLog) -> Result<(Vec<String>, ProducerId), Source> {
    let records = records(log).await?;
    let mut producers: Vec<_> = Vec::new();
    let first = records.first().map_or(0, |record| record.offset.lo());
    for (offset, record) in (first..).zip(&records) {
        let origin = record.origin.as_ref().ok_or("a record has no origin")?;
        assert_eq!((record.offset, record.malformed.clone()), (offset.into(), None));
        assert_eq!((origin.sequence, origin.numbering.epoch()), (offset, Epoch::STABLE));
        producers.push(origin.numbering.producer().clone());
    }
    producers.dedup();
    match <[ProducerId; 1]>::try_from(producers) {
        Ok([producer]) => Ok((common::payloads(&records), producer)),
        Err(producers) => Err(format!("one producer, not {producers:?}").into()),
    }
}
