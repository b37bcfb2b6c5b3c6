mod harness;

use std::process::ExitCode;

use essentially_once_testkit::Suite;

fn main() -> ExitCode {
    Suite::new().backend("mine", harness::MineHarness).run()
}
