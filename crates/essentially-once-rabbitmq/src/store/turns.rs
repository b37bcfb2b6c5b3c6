//! Lets a task that only waits for entries release the replica when another needs it.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, futures::Notified};

#[derive(Default)]
pub(super) struct Turns {
    waiting: AtomicUsize,
    called: Notify,
}

/// A task that waits for the replica.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    pub(super) fn wait(&self) -> Turn<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.called.notify_waiters();
        Turn(self)
    }

    pub(super) fn are_waited_for(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Completes when the next task begins to wait.
    pub(super) fn called(&self) -> Notified<'_> {
        self.called.notified()
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
