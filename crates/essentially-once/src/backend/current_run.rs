//! Tells a backend which run of a consumer calls it.

use std::future::Future;

use crate::Owner;

tokio::task_local! {
    static CURRENT: Owner;
}

/// The run of a consumer that calls: its loop, or its handler. `None` elsewhere, and in a task that
/// the handler has spawned.
///
/// A backend with one write lock uses it to refuse at once what a handler would wait for forever,
/// because the handler's own transaction has the lock.
pub fn current_run() -> Option<Owner> {
    CURRENT.try_get().ok()
}

/// Lets everything that the future calls know its run.
pub(crate) async fn within_run<T>(owner: Owner, future: impl Future<Output = T>) -> T {
    CURRENT.scope(owner, future).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_future_of_a_run_belongs_to_it() {
        let (one, other) = (Owner::new(1), Owner::new(2));
        let seen = async || {
            tokio::task::yield_now().await;
            current_run()
        };
        let joined = tokio::join!(within_run(one, seen()), within_run(other, seen()), seen());
        assert_eq!(joined, (Some(one), Some(other), None));
        let spawned = within_run(one, tokio::spawn(async { current_run() })).await;
        assert_eq!(spawned.expect("no panic"), None);
    }
}
