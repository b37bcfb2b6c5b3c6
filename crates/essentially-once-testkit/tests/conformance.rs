//! The backends of this workspace that need no server, under all conformance cases.

use std::process::ExitCode;

use essentially_once_testkit::{Suite, memory::MemoryHarness};

fn main() -> ExitCode {
    Suite::new().backend("memory", MemoryHarness).run()
}
