//! What the tests of this folder share: backends in private places, and workers that are processes of their own.
//!
//! A test program with `harness = false` calls [`worker::main`] first: it starts itself again as its workers.

mod counter;
mod place;
mod store;
pub mod worker;

use essentially_once::Source;

pub use crate::{
    place::{Address, Backend, Place},
    store::Store,
};

/// Runs a test's future on a runtime of its own.
///
/// # Errors
/// The test's.
pub fn block_on(test: impl Future<Output = Result<(), Source>>) -> Result<(), essentially_once_testkit::Violation> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Source::from)?;
    let done = runtime.block_on(test);
    // A task that is left over must not hold up the other tests.
    runtime.shutdown_background();
    Ok(done?)
}
