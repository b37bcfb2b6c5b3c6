//! The store on a real broker: its contract in short form, and what may happen to its streams.

use std::{future::Future, process::ExitCode};

use essentially_once_testkit::{Suite, Violation};

mod commits;
mod doubt;
mod recovery;
mod sent;
mod support;

fn main() -> ExitCode {
    let mut suite = Tests {
        suite: Suite::new(),
        missing: test_servers::rabbitmq_server().err(),
    };
    commits::add(&mut suite);
    doubt::add(&mut suite);
    recovery::add(&mut suite);
    sent::add(&mut suite);
    suite.suite.run()
}

/// A suite whose tests show as ignored where there is no broker to run.
struct Tests {
    suite: Suite,
    missing: Option<String>,
}

impl Tests {
    /// Adds a test, to be run in a runtime of its own.
    fn add<F: Future<Output = Result<(), Violation>> + 'static>(&mut self, name: &str, test: fn() -> F) {
        let suite = std::mem::take(&mut self.suite);
        self.suite = match &self.missing {
            Some(why) => suite.ignored(name, why),
            None => suite.test(name, move || {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .enable_all()
                    .build();
                runtime
                    .map_err(|error| Violation::new(error.to_string()))?
                    .block_on(test())
            }),
        };
    }
}
