//! A conformance case, and how it runs.

use std::{future::Future, pin::Pin, time::Duration};

use crate::{
    harness::{Capabilities, Harness, Support},
    violation::{CaseResult, Violation},
};

/// A case that takes longer is stuck. Waiting forever is a failure like any other.
const TIME_LIMIT: Duration = Duration::from_secs(600);

type CaseFuture<'a> = Pin<Box<dyn Future<Output = CaseResult> + Send + 'a>>;

/// One conformance case. Its name begins with the contract bullet that it checks.
pub struct Case<H: Harness> {
    pub(crate) name: &'static str,
    pub(crate) needs: fn(&Capabilities) -> Support,
    pub(crate) run: for<'a> fn(&'a H, &'a H::Backend) -> CaseFuture<'a>,
}

impl<H: Harness> Case<H> {
    /// The case's name, such as `s2_a_stale_revision_is_fenced`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Whether a backend with these capabilities can run this case.
    pub fn support(&self, capabilities: &Capabilities) -> Support {
        (self.needs)(capabilities)
    }

    /// Runs the case on its own backend, in its own tokio runtime with two worker threads.
    ///
    /// # Errors
    /// The violation that the case found, or a time-out after ten minutes.
    pub fn run(&self, harness: &H) -> Result<(), Violation> {
        self.run_within(harness, TIME_LIMIT)
    }

    /// Like [`run`](Self::run), with another time limit.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub fn run_within(&self, harness: &H, limit: Duration) -> Result<(), Violation> {
        block_on(limit, async {
            let backend = harness.start(self.name).await?;
            (self.run)(harness, &backend).await
        })
    }
}

/// Runs a test in its own runtime.
pub(crate) fn block_on(limit: Duration, test: impl Future<Output = CaseResult>) -> CaseResult {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Violation::new(format!("cannot start a tokio runtime: {error}")))?;
    let result = runtime.block_on(async {
        tokio::time::timeout(limit, test)
            .await
            .unwrap_or_else(|_| Err(Violation::new(format!("still waiting after {limit:?}"))))
    });
    // Tasks left behind by a stuck backend must not hold up the other tests.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}
