//! State that all handles of this process on one file share.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
};

use essentially_once::backend::{Owner, current_run};
use tokio::{sync::watch, task};

use super::{lock::lock, turnstile::Turnstile};

/// The files that handles of this process have open.
static OPEN_FILES: Mutex<Option<HashMap<PathBuf, Weak<OpenFile>>>> = Mutex::new(None);

pub(crate) struct OpenFile {
    /// Without symbolic links, if it could be resolved.
    path: PathBuf,
    pub(crate) turnstile: Arc<Turnstile>,
    /// Notified at each commit of this process.
    pub(crate) commits: watch::Sender<()>,
    /// The open transaction. At most one exists, because it holds the file's write lock.
    holder: Mutex<Option<Holder>>,
    transactions: AtomicU64,
    appends: Mutex<HashMap<i64, Arc<watch::Sender<()>>>>,
}

/// An open write transaction of this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Holder {
    number: u64,
    errand: Errand,
    began: Runner,
}

/// The purpose of a write transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Errand {
    /// An append. A handler that holds the lock may be the one that waits for it.
    Append,
    /// A transaction of the store, such as that of a handler.
    Store,
    Other,
}

/// What polls a future: a run of a consumer, a task, or a thread in `block_on`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Runner {
    Consumer(Owner),
    Task(task::Id),
    Thread(ThreadId),
}

impl Runner {
    fn current() -> Self {
        let in_task = || task::try_id().map(Self::Task);
        let run = current_run().map(Self::Consumer).or_else(in_task);
        run.unwrap_or_else(|| Self::Thread(thread::current().id()))
    }
}

impl OpenFile {
    /// Returns the shared state of the file at `path`. The file must exist.
    pub(crate) fn of(path: &Path) -> Arc<Self> {
        // Different names of one file resolve to the same state. If the path cannot be resolved,
        // only fairness suffers.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let mut files = lock(&OPEN_FILES);
        let files = files.get_or_insert_default();
        if let Some(file) = files.get(&path).and_then(Weak::upgrade) {
            return file;
        }
        files.retain(|_, file| file.strong_count() > 0);
        let file = Arc::new(Self {
            path: path.clone(),
            turnstile: Arc::new(Turnstile::open(&path)),
            commits: watch::Sender::default(),
            holder: Mutex::default(),
            transactions: AtomicU64::new(0),
            appends: Mutex::default(),
        });
        files.insert(path, Arc::downgrade(&file));
        file
    }

    /// Whether `path`, as SQLite returns it, is this file. SQLite resolves links on Unix only.
    pub(crate) fn is_at(&self, path: &str) -> bool {
        *self.path == *path || fs::canonicalize(path).is_ok_and(|path| path == self.path)
    }

    /// Returns the channel on which this process announces appends to the log of that id.
    pub(crate) fn appends(&self, log: i64) -> Arc<watch::Sender<()>> {
        Arc::clone(lock(&self.appends).entry(log).or_default())
    }

    /// Records that the current task has begun a transaction, until [`ended`](Self::ended).
    pub(crate) fn began(&self, errand: Errand) -> Holder {
        let holder = Holder {
            number: self.transactions.fetch_add(1, Ordering::Relaxed),
            errand,
            began: Runner::current(),
        };
        *lock(&self.holder) = Some(holder);
        holder
    }

    pub(crate) fn ended(&self, ended: Holder) {
        let mut holder = lock(&self.holder);
        // Another transaction may have begun since the lock was released.
        if *holder == Some(ended) {
            *holder = None;
        }
    }

    pub(crate) fn holder(&self) -> Option<Holder> {
        *lock(&self.holder)
    }
}

impl Holder {
    /// Whether what runs now began the transaction.
    pub(crate) fn is_this_runner(self) -> bool {
        self.began == Runner::current()
    }

    /// Whether it is the transaction of the handler that calls, which ends only after the handler.
    /// An append or a trim that the handler gave up on ends on its own.
    pub(crate) fn is_of_this_handler(self) -> bool {
        self.errand == Errand::Store && matches!(self.began, Runner::Consumer(_)) && self.is_this_runner()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_on_one_file_share_its_state() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.db");
        fs::write(&path, "").expect("file");
        let one = OpenFile::of(&path);
        let other_name = folder.path().join(".").join("a.db");
        assert!(Arc::ptr_eq(&one, &OpenFile::of(&other_name)));
        let weak = Arc::downgrade(&one);
        drop(one);
        assert!(weak.upgrade().is_none(), "the last handle frees it");
        OpenFile::of(&path);
    }

    #[tokio::test]
    async fn a_transaction_knows_its_task() {
        let folder = tempfile::tempdir().expect("folder");
        let file = OpenFile::of(&folder.path().join("a.db"));
        let first = file.began(Errand::Other);
        assert!(first.is_this_runner());
        let elsewhere = tokio::spawn(async move { first.is_this_runner() });
        assert!(!elsewhere.await.expect("no panic"));
        file.ended(first);
        let second = file.began(Errand::Other);
        file.ended(first);
        assert_eq!(file.holder(), Some(second), "the end of an earlier one changes nothing");
    }
}
