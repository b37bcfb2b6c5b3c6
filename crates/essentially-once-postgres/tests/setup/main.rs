//! What is wrong with an address, a server, a user or a schema is said at once, with the remedy and
//! without a secret.

#[path = "../common/mod.rs"]
mod common;
mod refusals;
mod rights;
mod schemas;
mod secrets;
mod tls;

use std::process::ExitCode;

use common::{cases, run};

fn main() -> ExitCode {
    run(cases![
        refusals::a_wrong_password_is_named_and_never_shown,
        refusals::a_missing_database_is_named,
        refusals::a_mistyped_url_is_refused_before_anything_is_sent,
        refusals::a_port_where_nobody_listens_is_a_passing_error,
        refusals::a_server_that_never_answers_is_given_up,
        refusals::a_standby_is_refused_for_now,
        refusals::of_several_hosts_the_primary_is_found,
        refusals::another_encoding_is_refused,
        refusals::a_server_without_room_for_connections_is_a_passing_error,
        refusals::settings_that_lose_data_are_named,
        rights::a_user_without_rights_learns_what_to_grant,
        rights::a_user_who_may_not_create_learns_what_to_grant,
        rights::the_documented_rights_are_enough,
        rights::an_empty_schema_of_the_user_is_used,
        schemas::a_newer_schema_is_refused,
        schemas::tables_of_someone_else_are_refused_and_kept,
        schemas::existing_refuses_an_empty_database_and_creates_nothing,
        schemas::a_log_that_must_exist_lists_the_others,
        schemas::processes_that_start_at_once_migrate_once,
        schemas::the_default_isolation_of_a_database_disturbs_nothing,
        schemas::two_schemas_do_not_see_each_other,
        tls::clients_are_served_and_encrypted,
        tls::a_server_that_requires_tls_says_what_to_add,
        tls::a_server_without_tls_says_what_to_remove,
        tls::another_authority_is_not_trusted,
        tls::a_certificate_for_another_name_is_not_trusted,
        tls::clients_without_a_certificate_are_refused,
        secrets::no_secret_is_ever_shown,
    ])
}
