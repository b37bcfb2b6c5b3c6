//! Runs all conformance cases on the backends of this workspace that need no server.

use std::process::ExitCode;

use essentially_once_testkit::{Suite, memory::MemoryHarness};

fn main() -> ExitCode {
    Suite::new().backend("memory", MemoryHarness).run()
}
