//! Wakes readers, in this process and in others, with `NOTIFY`.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    runtime::{Handle, Id},
    sync::{Notify, watch},
    task::JoinHandle,
    time,
};
use tokio_postgres::AsyncMessage;

use crate::{
    connection::{Param, Pool},
    error::Fault,
};

/// The least time between two notifications of a process. Each takes a lock of the whole server for
/// a moment.
const PAUSE: Duration = Duration::from_millis(5);

/// How long to wait before connecting again.
const AGAIN: Duration = Duration::from_secs(1);

/// How long to wait for an answer.
const LIMIT: Duration = Duration::from_secs(10);

/// How often a session without work looks whether its connection still exists.
const CHECK: Duration = Duration::from_secs(1);

/// The bell of a handle: it tells the readers of other processes that a log has grown, and hears of
/// it.
pub(crate) struct Bell {
    channel: String,
    shared: Arc<Shared>,
    task: Mutex<Option<(Option<Id>, JoinHandle<()>)>>,
}

#[derive(Default)]
struct Shared {
    logs: Mutex<HashMap<i64, watch::Sender<()>>>,
    /// Logs that have grown and whose notification is not sent.
    grown: Mutex<BTreeSet<i64>>,
    has_grown: Notify,
    is_listening: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn wake(&self, log: i64) {
        if let Some(readers) = lock(&self.logs).get(&log) {
            readers.send_replace(());
        }
    }

    /// For those who notify without saying which log has grown.
    fn wake_all(&self) {
        for readers in lock(&self.logs).values() {
            readers.send_replace(());
        }
    }
}

impl Bell {
    pub(crate) fn new(schema: &str) -> Self {
        Self {
            channel: format!("essentially_once:{schema}"),
            shared: Arc::default(),
            task: Mutex::default(),
        }
    }

    /// Changes whenever the log may have grown.
    pub(super) fn subscribe(&self, log: i64) -> watch::Receiver<()> {
        let mut logs = lock(&self.shared.logs);
        logs.retain(|other, readers| *other == log || readers.receiver_count() > 0);
        logs.entry(log).or_default().subscribe()
    }

    /// Whether notifications of other processes arrive.
    pub(super) fn is_listening(&self) -> bool {
        self.shared.is_listening.load(Ordering::Acquire)
    }

    /// Tells the readers of all processes that these logs have grown.
    pub(super) fn ring(&self, pool: &Arc<Pool>, logs: impl Iterator<Item = i64>) {
        let mut grown = lock(&self.shared.grown);
        for log in logs {
            self.shared.wake(log);
            grown.insert(log);
        }
        drop(grown);
        self.shared.has_grown.notify_one();
        self.keep_running(pool);
    }

    /// Starts the task that notifies and listens, if it does not run, or runs on another runtime,
    /// which may be blocked while this one waits.
    pub(super) fn keep_running(&self, pool: &Arc<Pool>) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let mut task = lock(&self.task);
        if let Some((home, running)) = &*task {
            if *home == Some(runtime.id()) && !running.is_finished() {
                return;
            }
            running.abort();
        }
        let work = run(Arc::downgrade(pool), Arc::clone(&self.shared), self.channel.clone());
        *task = Some((Some(runtime.id()), runtime.spawn(work)));
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        if let Some((_, task)) = lock(&self.task).take() {
            task.abort();
        }
    }
}

/// Says that nobody listens any more, however the task ends.
struct Listening<'a>(&'a AtomicBool);

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Waits for an answer. Readers look on their own meanwhile.
async fn within<T>(request: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    time::timeout(LIMIT, request).await.unwrap_or(Err(Fault::Silent(LIMIT)))
}

async fn run(pool: Weak<Pool>, shared: Arc<Shared>, channel: String) {
    loop {
        if let Err(why) = serve(&pool, &shared, &channel).await {
            tracing::debug!(%why, "no notifications of new records: readers look every 10 ms");
        }
        time::sleep(AGAIN).await;
    }
}

/// Notifies and listens on one connection until it breaks. Does not keep the pool, whose drop ends
/// this task.
async fn serve(pool: &Weak<Pool>, shared: &Arc<Shared>, channel: &str) -> Result<(), String> {
    let heard = Arc::clone(shared);
    let wake = move |message| {
        if let AsyncMessage::Notification(notification) = message {
            match notification.payload().parse() {
                Ok(log) => heard.wake(log),
                Err(_) => heard.wake_all(),
            }
        }
    };
    let connected = {
        let pool = pool.upgrade().ok_or("the handle was dropped")?;
        let connected = pool.connect(wake).await;
        connected.map_err(|error| pool.not_connected(pool.on("connect for notifications"), error))
    };
    let mut session = connected.map_err(|error| error.to_string())?;
    let shown = |fault: Fault| fault.to_string();
    // A notification need not survive a crash, and must not wait for the disk.
    let listen = format!("SET synchronous_commit = off; LISTEN \"{channel}\"");
    within(session.batch(&listen)).await.map_err(shown)?;
    shared.is_listening.store(true, Ordering::Release);
    let _listening = Listening(&shared.is_listening);
    loop {
        let grown: Vec<String> = std::mem::take(&mut *lock(&shared.grown))
            .iter()
            .map(ToString::to_string)
            .collect();
        if !grown.is_empty() {
            let notify = "SELECT pg_notify($1, log) FROM unnest($2::text[]) AS log";
            let params: [Param<'_>; 2] = [&channel, &grown];
            within(session.query_own(notify, &params)).await.map_err(shown)?;
            time::sleep(PAUSE).await;
        }
        if session.is_closed() {
            return Err("the connection was lost".into());
        }
        // A lost connection is noticed by looking, since no request waits on it.
        let _ = time::timeout(CHECK, shared.has_grown.notified()).await;
    }
}
