//! Proves a backend of `essentially-once`, your own or ours.
//!
//! - A [`Suite`] runs every conformance case on your [`Harness`], each as a test of its own, and a sample of faults.
//! - [`faults`] runs a consumer with a fault at every operation, and at every pair of them.
//! - A [`Check`] compares a log with what was applied, and names what was lost, doubled or reordered.
//!   [`Ledger`] and [`MemoryLedger`] are handlers that write down what they applied.
//! - A [`Proxy`] cuts connections between a client and its server at chosen moments.
//!
//! Start with [`Capabilities::minimal`], and add a hook of [`Backend`] at a time. Each capability adds cases. Cases without
//! their hook show as ignored, with the reason that your harness gives. `DEFECTS.md` in this crate's sources lists the
//! mistakes that the newer cases find.
//!
//! # Crash a server
//!
//! [`Backend::restart`] kills the server with SIGKILL and starts it again on its files, on the same port. A shutdown in order
//! proves nothing, since it flushes everything. Wait until the server answers before you return. Handles opened before may
//! fail; the cases open new ones.
//!
//! # Crash an embedded database
//!
//! A database in the process under test cannot be killed without the test. Do one of these instead:
//!
//! - *Copy what a crash would leave.* In `restart`, copy the database's files while work goes on, and make the handles that
//!   [`Backend::log`] and [`Backend::store`] open from then on use the copy. Copy all files as of one moment: hold the lock of
//!   the database's writer, or freeze the filesystem. This finds writes that are kept in memory. It does not find a missing
//!   sync, since a copy reads what the operating system still holds.
//! - *Cut off the files.* If the database takes its own file layer (SQLite's VFS, redb's `StorageBackend`, RocksDB's `Env`),
//!   wrap that layer: record what was written since the last sync. In `restart`, make all older handles fail, drop what was
//!   not synced, or a random part of it, and open the rest. This finds a missing sync too.
//! - *Kill a worker process.* Put the appends and commits into a child process, kill it with SIGKILL at a random moment, and
//!   read the files with [`read_log`], [`read_ledger`] and [`Check`]. This is a test of your own beside the suite; add it with
//!   [`Suite::async_test`].
//!
//! Handles of before the crash must not reach the files any more: a handle that goes on writing after `restart` makes
//! correct backends fail. If a database allows one opener at a time, drop or invalidate the old one first.
//!
//! # Share one server between cases
//!
//! A server that takes seconds to start should serve many cases. Start it once, behind a mutex in the harness, and let
//! [`Harness::start`] put the namespace and something random before every name of a log and of a store's keys. Three things
//! then need care:
//!
//! - Cases that call [`Backend::restart`] disturb all others. Give them a server of their own: the namespace is the name of the
//!   case, so the harness can tell.
//! - Names of cases have up to 200 bytes. State a smaller [`Capabilities::log_name_bytes`] if the prefix does not fit, and
//!   keep the prefix of a store short.
//! - Drop of the [`Backend`] removes what the case left, also after a failure.

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
