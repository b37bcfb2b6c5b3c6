//! Proves a backend of `essentially-once`, your own or ours.
//!
//! - A [`Suite`] runs every conformance case on your [`Harness`], each as a test of its own, and a sample of faults.
//! - [`faults`] runs a consumer with a fault at every operation, and at every pair of them.
//! - A [`Check`] compares a log with what was applied, and names what was lost, doubled or reordered.
//!   [`Ledger`] and [`MemoryLedger`] are handlers that write down what they applied.

mod cases;
mod checker;
pub mod faults;
mod harness;
mod ledger;
pub mod memory;
mod proxy;
mod suite;

pub use crate::{
    checker::{Applied, Check, Doubled, Expectation, Findings, Reordered, read_log},
    harness::{Backend, Capabilities, Harness, Request, StateReader, Support},
    ledger::{Ledger, MemoryLedger, read_ledger},
    proxy::{Cut, Proxy},
    suite::{Case, Suite, Violation, conformance_cases},
};
