//! Threads for slow work.

use std::thread;

use essentially_once::backend::Source;
use tokio::sync::oneshot;

/// Runs slow work on its own thread. The runtime's blocking pool may be full, and a holder of the
/// file's write lock must not wait for it.
///
/// Dropping the future does not stop the work.
pub(crate) async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Source> {
    let (done, result) = oneshot::channel();
    let thread = thread::Builder::new().name("essentially-once-sqlite".into());
    thread.spawn(move || {
        // The send fails if the caller gave up.
        let _ = done.send(work());
    })?;
    result.await.map_err(|_| "the thread that ran it panicked".into())
}
