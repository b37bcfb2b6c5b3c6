//! Injects a fault at every operation of a consumer, and at every pair of operations.
//!
//! An [`Explorer`] first runs a consumer without faults over the log and store of a
//! [`Harness`](crate::Harness), and counts its operations: each read, each step of a transaction,
//! each call of the handler. It then runs the consumer again for each operation and each
//! [`FaultKind`], and for each pair of faults. A crash drops the consumer and starts another. A
//! zombie sleeps while another consumer takes over, then wakes up and carries on. After each run a
//! [`Check`](crate::Check) compares what the handler did with the delivery's promise. It does so
//! again after one more consumer has reached the end of the log.
//!
//! Runs are deterministic on a backend that does no I/O. A [`Plan`] names each finding and can be
//! replayed:
//!
//! ```
//! use essentially_once_testkit::{Expectation, faults::Explorer, memory::MemoryHarness};
//!
//! let explorer = Explorer::new(&MemoryHarness, Expectation::EssentiallyOnce).max_batch(2);
//! explorer.replay(&"7:crash-after,12:zombie".parse()?)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Explorer::dead_letters`] explores what becomes of records that cannot be handled. A plan then
//! also says which records are in [`Trouble`], and when an operator makes a [`Call`], as in
//! `5:crash-after,48:retry-all,record-0:fails-2`. Effects and operators' acts are noted in the
//! consumer's state, in one order. The check follows it: each record that the position passes is
//! owed one effect, unless it is a duplicate or was skipped, and what is still owed is a letter.
//!
//! On real backends a run takes longer and is never quite the same. There, a
//! [`Suite`](crate::Suite) runs a random sample of plans. Two environment variables repeat its
//! findings: `ESSENTIALLY_ONCE_PLAN` runs one plan, `ESSENTIALLY_ONCE_SEED` the whole sample.

mod control;
pub(crate) mod crash;
mod driver;
mod explorer;
mod letters;
mod plan;
mod sampled;
mod scene;
mod wrappers;

pub(crate) use self::sampled::{sampled, sampled_with_dead_letters};
pub use self::{
    control::{Faults, Operation, Process},
    explorer::{Counterexample, Explored, Explorer},
    letters::{Call, Trouble, TroubleKind, Verb},
    plan::{Fault, FaultKind, Plan},
    wrappers::{FaultyHandler, FaultyLog, FaultyStore, FaultyTx},
};
