//! Helpers for the tests with faults.

#![allow(dead_code, unused_imports, reason = "each target uses only some of it")]

pub(crate) mod backend;

use std::process::ExitCode;

pub(crate) use test_servers::{
    Case, LIMIT, Outcome, cases, ensure, insist,
    ledger::{Seen, Watched, agree, judge, message, send, send_until, until},
    run_cases,
};

/// Runs each case as a test. Without a server, every case is ignored, with the reason.
pub(crate) fn run(cases: impl IntoIterator<Item = (&'static str, Case)>) -> ExitCode {
    run_cases(test_servers::redis_server().err(), LIMIT, cases)
}
