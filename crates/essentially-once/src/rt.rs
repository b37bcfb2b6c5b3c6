//! The runtime services that the consumer loop uses, so that the model checker can replace them.

use std::{future::Future, time::Duration};

#[cfg(not(shuttle))]
pub(crate) use tokio::{task::JoinHandle, time::Instant};

#[cfg(shuttle)]
pub(crate) use std::time::Instant;

#[cfg(shuttle)]
pub(crate) use shuttle::future::JoinHandle;

#[cfg(not(shuttle))]
pub(crate) use tokio::task::yield_now;

#[cfg(shuttle)]
pub(crate) use shuttle::future::yield_now;

#[cfg(not(shuttle))]
pub(crate) fn spawn(future: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(future)
}

#[cfg(shuttle)]
pub(crate) fn spawn(future: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    shuttle::future::spawn(future)
}

#[cfg(not(shuttle))]
pub(crate) async fn sleep(duration: Duration) {
    tokio::time::sleep(duration).await;
}

/// Time does not pass under the model checker, so this only lets another task run.
#[cfg(shuttle)]
pub(crate) async fn sleep(_: Duration) {
    shuttle::future::yield_now().await;
}

/// The future's result, or `None` if it takes longer than `limit`. Without a limit it may take any
/// time.
pub(crate) async fn within<T>(limit: Option<Duration>, future: impl Future<Output = T>) -> Option<T> {
    let Some(limit) = limit else {
        return Some(future.await);
    };
    tokio::select! {
        biased;
        result = future => Some(result),
        () = sleep(limit) => None,
    }
}

/// Whether the runtime has no other thread to run the tasks of a busy one.
#[cfg(not(shuttle))]
pub(crate) fn has_one_thread() -> bool {
    use tokio::runtime::{Handle, RuntimeFlavor};

    Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread
}

#[cfg(shuttle)]
pub(crate) fn has_one_thread() -> bool {
    true
}
