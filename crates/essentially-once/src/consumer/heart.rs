//! Beats: the sign of life of a consumer that does not commit.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;
use tracing::Instrument;

use crate::{ConsumerId, OffsetStore, Owner, rt};

/// How often an owner beats, unless its standbys wait for less than a second.
const INTERVAL: Duration = Duration::from_millis(250);

/// A task that beats while the consumer works without committing. It rests while the consumer waits
/// for records, because standbys do not take over then. Dropping this ends the task.
pub(super) struct Heart {
    state: Arc<State>,
    /// `None` under the model checker, where no time passes.
    task: Option<rt::JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    is_working: AtomicBool,
    /// Counted because every commit is a sign of life too.
    commits: AtomicU64,
    work_begins: Notify,
}

impl Heart {
    pub(super) fn spawn<S: OffsetStore>(
        store: &Arc<S>,
        consumer: &ConsumerId,
        owner: Owner,
        standby_after: Duration,
    ) -> Self {
        let state = Arc::<State>::default();
        // Four beats within the silence that makes a standby take over. With a limit of zero there
        // are no standbys.
        let interval = match standby_after / 4 {
            Duration::ZERO => INTERVAL,
            quarter => quarter.min(INTERVAL),
        };
        let beating = beat(Arc::clone(&state), Arc::clone(store), consumer.clone(), owner, interval);
        Self {
            state,
            task: (!cfg!(shuttle)).then(|| rt::spawn(beating.in_current_span())),
        }
    }

    /// The consumer loads, handles or pauses, and may not commit for a long time.
    pub(super) fn work(&self) {
        if !self.state.is_working.swap(true, Ordering::Relaxed) {
            self.state.work_begins.notify_one();
        }
    }

    /// The consumer waits for records, or stands by.
    pub(super) fn rest(&self) {
        self.state.is_working.store(false, Ordering::Relaxed);
    }

    pub(super) fn committed(&self) {
        self.state.commits.fetch_add(1, Ordering::Relaxed);
    }
}

impl Heart {
    /// Ends the task and waits until it has ended.
    pub(super) async fn end(mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn beat<S: OffsetStore>(
    state: Arc<State>,
    store: Arc<S>,
    consumer: ConsumerId,
    owner: Owner,
    interval: Duration,
) {
    loop {
        if !state.is_working.load(Ordering::Relaxed) {
            state.work_begins.notified().await;
            continue;
        }
        let commits = state.commits.load(Ordering::Relaxed);
        rt::sleep(interval).await;
        let is_silent = state.commits.load(Ordering::Relaxed) == commits;
        if is_silent
            && state.is_working.load(Ordering::Relaxed)
            && let Err(error) = store.beat(&consumer, owner).await
        {
            tracing::debug!(%error, "could not beat to show that this instance is alive");
        }
    }
}
