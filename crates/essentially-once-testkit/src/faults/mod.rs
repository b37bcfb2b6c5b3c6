//! A fault at every operation of a consumer, and at every pair of them.
//!
//! An [`Explorer`] runs a consumer over the log and store of a [`Harness`](crate::Harness) once without faults, and counts
//! what it asks of them: each read, each step of a transaction, each call of the handler. It then runs it again for each
//! operation and each [`FaultKind`], and for each pair of faults. A crash drops the consumer and starts another; a zombie
//! sleeps while another takes over, and wakes to find the world changed. After each run a [`Check`](crate::Check) judges what
//! the handler did against what the delivery promises, and again when one more consumer has come to the log's end.
//!
//! Runs are deterministic on a backend that does no I/O. What was found is named by its [`Plan`], which can be replayed:
//!
//! ```
//! use essentially_once_testkit::{Expectation, faults::Explorer, memory::MemoryHarness};
//!
//! let explorer = Explorer::new(&MemoryHarness, Expectation::EssentiallyOnce).max_batch(2);
//! explorer.replay(&"7:crash-after,12:zombie".parse()?)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! On real backends, where a run takes longer and never is quite the same, a [`Suite`](crate::Suite) runs a random sample of
//! plans, and two environment variables repeat what it found: `ESSENTIALLY_ONCE_PLAN` runs a plan, `ESSENTIALLY_ONCE_SEED`
//! the whole sample.

mod control;
mod driver;
mod explorer;
mod plan;
mod sampled;
mod scene;
mod wrappers;

pub(crate) use self::sampled::sampled;
pub use self::{
    control::{Faults, Operation, Process},
    explorer::{Counterexample, Explored, Explorer},
    plan::{Fault, FaultKind, Plan},
    wrappers::{FaultyHandler, FaultyLog, FaultyStore, FaultyTx},
};
