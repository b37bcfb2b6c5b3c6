//! The store on a real broker: its contract in short form, and what may happen to its streams.

use std::{future::Future, process::ExitCode, time::Duration};

use essentially_once_testkit::{Suite, Violation};

mod commits;
mod doubt;
mod fixture;
mod guards;
mod hints;
mod letters;
mod names;
mod outboxes;
mod recovery;
mod sent;
mod support;
mod version_1;
mod version_2;
mod version_3;
mod version_4;

/// How long a test may take. Only a stuck test takes this long.
const LIMIT: Duration = Duration::from_secs(200);

fn main() -> ExitCode {
    let mut suite = Tests {
        suite: Suite::new(),
        missing: test_servers::rabbitmq_server().err(),
    };
    commits::add(&mut suite);
    doubt::add(&mut suite);
    guards::add(&mut suite);
    hints::add(&mut suite);
    letters::add(&mut suite);
    names::add(&mut suite);
    outboxes::add(&mut suite);
    recovery::add(&mut suite);
    sent::add(&mut suite);
    version_1::add(&mut suite);
    version_2::add(&mut suite);
    version_3::add(&mut suite);
    version_4::add(&mut suite);
    suite.suite.run()
}

/// A suite whose tests are ignored if there is no broker to run.
struct Tests {
    suite: Suite,
    missing: Option<String>,
}

impl Tests {
    /// Adds a test that runs in its own runtime.
    fn add<F: Future<Output = Result<(), Violation>> + 'static>(&mut self, name: &str, test: fn() -> F) {
        let suite = std::mem::take(&mut self.suite);
        self.suite = match &self.missing {
            Some(why) => suite.ignored(name, why),
            None => suite.async_test(name, LIMIT, test),
        };
    }
}
