//! Conformance tests for `essentially-once` backends: ours and yours.
//!
//! - A [`Suite`] runs every conformance case on your [`Harness`] as a named test, plus a random
//!   sample of faults.
//! - [`faults`] runs a consumer with a fault at every operation, and at every pair of operations.
//!   With dead letters, handlers also get into trouble, and operators act at any operation.
//! - [`crash_test`] does that to a handler of yours: every fault must lead to the same result.
//! - A [`Check`] compares a log with the applied records, and names records that were lost, doubled
//!   or reordered. [`Ledger`] and [`MemoryLedger`] are handlers that journal the records they
//!   apply.
//! - A [`Proxy`] cuts connections between a client and its server at chosen moments.
//!
//! Start with [`Capabilities::minimal`], and add one hook of [`Backend`] at a time. Each capability
//! adds cases. Cases that lack their hook show as ignored, with the reason that your harness gives.
//! `DEFECTS.md` in this crate's sources lists the mistakes that the newer cases find.
//!
//! # Crash a server
//!
//! [`Backend::restart`] kills the server with SIGKILL and starts it again on the same files and the
//! same port. An orderly shutdown proves nothing, because it flushes everything. Wait until the
//! server answers before you return. Handles opened earlier may fail. The cases open new ones.
//!
//! # Crash an embedded database
//!
//! A database inside the test process cannot be killed without killing the test. Do one of these
//! instead:
//!
//! - *Copy the files that a crash would leave.* In `restart`, copy the database's files while work
//!   goes on. Let [`Backend::log`] and [`Backend::store`] open the copy from then on. Copy all
//!   files as of one moment: hold the lock of the database's writer, or freeze the filesystem. This
//!   finds writes that exist only in memory. It does not find a missing sync, because a copy reads
//!   what the operating system still holds.
//! - *Intercept the file layer.* If the database accepts a custom file layer (SQLite's VFS, redb's
//!   `StorageBackend`, RocksDB's `Env`), wrap it and record the writes since the last sync. In
//!   `restart`, make all older handles fail, drop all unsynced writes or a random part of them, and
//!   reopen the rest. This also finds a missing sync.
//! - *Kill a worker process.* Append and commit in a child process, kill it with SIGKILL at a
//!   random moment, and read the files with [`read_log`], [`read_ledger`] and [`Check`]. This is a
//!   test of your own next to the suite. Add it with [`Suite::async_test`].
//!
//! Handles opened before the crash must no longer reach the files. A handle that keeps writing
//! after `restart` makes correct backends fail. If the database allows only one opener at a time,
//! drop or invalidate the old one first.
//!
//! # Share one server between cases
//!
//! A server that takes seconds to start should serve many cases. Start it once, behind a mutex in
//! the harness. Let [`Harness::start`] prefix every log name and every store key with the namespace
//! and something random. Watch three things:
//!
//! - Cases that call [`Backend::restart`] disturb all others. Give them their own server. The
//!   namespace is the name of the case, so the harness can recognize them.
//! - Cases use names of up to 200 bytes. If your prefix does not fit, state a smaller
//!   [`Capabilities::log_name_bytes`]. Keep the prefix of a store short.
//! - Dropping the [`Backend`] removes everything the case left, even after a failure.

mod case;
mod cases;
mod checker;
pub mod faults;
mod harness;
mod ledger;
pub mod memory;
mod proxy;
mod suite;
mod violation;

pub use crate::{
    case::Case,
    checker::{Applied, Check, Doubled, Expectation, Findings, Reordered, read_log},
    faults::crash::{
        CrashFinding, CrashFindings, CrashReport, CrashTest, CrashTx, Difference, Mistake, Probe, crash_test,
    },
    harness::{Backend, Capabilities, Harness, Request, StateReader, Support},
    ledger::{Ledger, MemoryLedger, read_ledger},
    proxy::{Cut, Proxy},
    suite::{Suite, conformance_cases},
    violation::Violation,
};
