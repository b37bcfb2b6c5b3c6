//! The services that the loop asks of the async runtime, so that the model checker can stand in for it.

use std::{future::Future, time::Duration};

#[cfg(not(shuttle))]
pub(crate) use tokio::task::JoinHandle;

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

/// Time does not pass under the model checker: another task may run, that is all.
#[cfg(shuttle)]
pub(crate) async fn sleep(_: Duration) {
    shuttle::future::yield_now().await;
}

/// Whether no other thread takes over the tasks of a thread that is busy.
#[cfg(not(shuttle))]
pub(crate) fn has_one_thread() -> bool {
    use tokio::runtime::{Handle, RuntimeFlavor};

    Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread
}

#[cfg(shuttle)]
pub(crate) fn has_one_thread() -> bool {
    true
}
