//! Proves a backend of `essentially-once`, your own or ours.

mod cases;
mod harness;
pub mod memory;
mod suite;

pub use crate::{
    harness::{Backend, Capabilities, Harness, Support},
    suite::{Case, Suite, Violation, conformance_cases},
};
