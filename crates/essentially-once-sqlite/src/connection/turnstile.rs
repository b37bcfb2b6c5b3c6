//! Queues the writers of a file, across tasks and processes.
//!
//! SQLite has no queue for its write lock. The next process that asks gets the lock, which is
//! usually the process that has just released it. A busy consumer would lock everyone else out. So
//! each writer first passes a turnstile: a lock on a file next to the database, for which the
//! kernel keeps a queue. The writer inside the turnstile is the next to get the write lock, and
//! then leaves the turnstile. A writer that has just committed must pass again, behind the waiting
//! ones.
//!
//! The turnstile only decides the order. Without it, or next to programs that do not use it,
//! everything stays correct.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use tokio::{
    sync::{self, Notify, OwnedMutexGuard},
    time::{self, Instant},
};

use super::lock::lock;

pub(crate) struct Turnstile {
    /// Queues the tasks of this process.
    queue: Arc<sync::Mutex<()>>,
    /// `None` if the file cannot be opened or created.
    file: Option<File>,
    state: Mutex<State>,
    granted: Notify,
}

#[derive(Default)]
struct State {
    /// A thread waits in the kernel's queue. If its task gives up, the thread keeps its place for
    /// the next task.
    queued: bool,
    /// A task wants the lock that the thread waits for.
    wanted: bool,
    /// This process is inside the turnstile.
    inside: bool,
}

/// A task's place in the queue. Dropping it lets the next task through.
pub(crate) struct Turn {
    turnstile: Arc<Turnstile>,
    _first: OwnedMutexGuard<()>,
}

impl Turnstile {
    /// Opens the turnstile of the database at `path`. The database must exist.
    pub(crate) fn open(path: &Path) -> Self {
        let sibling = sibling(path, "-turn");
        let file = match open_or_create(&sibling, path) {
            Ok(file) => Some(file),
            Err(error) => {
                tracing::debug!(
                    path = %sibling.display(), %error,
                    "cannot create the file that queues writers; a busy process may keep other processes waiting"
                );
                None
            }
        };
        Self {
            queue: Arc::default(),
            file,
            state: Mutex::default(),
            granted: Notify::new(),
        }
    }

    /// Waits for the tasks of this process that came first, and then joins the queue of processes.
    pub(crate) async fn line_up(self: &Arc<Self>) -> Turn {
        let first = Arc::clone(&self.queue).lock_owned().await;
        let turn = Turn {
            turnstile: Arc::clone(self),
            _first: first,
        };
        self.enter();
        turn
    }

    /// Enters immediately if the turnstile is free. Otherwise a thread waits, because the kernel
    /// only lets threads wait.
    fn enter(self: &Arc<Self>) {
        let Some(file) = &self.file else {
            return;
        };
        let mut state = self.state();
        state.wanted = true;
        if state.queued {
            return;
        }
        match file.try_lock() {
            Ok(()) => state.inside = true,
            Err(TryLockError::WouldBlock) => {
                let turnstile = Arc::clone(self);
                let waiter = thread::Builder::new().name("essentially-once-turn".into());
                match waiter.spawn(move || turnstile.wait()) {
                    Ok(_) => state.queued = true,
                    Err(error) => self.give_up(&mut state, &error),
                }
            }
            Err(TryLockError::Error(error)) => self.give_up(&mut state, &error),
        }
    }

    fn wait(&self) {
        let Some(file) = &self.file else {
            return;
        };
        let locked = loop {
            match file.lock() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                locked => break locked,
            }
        };
        let mut state = self.state();
        state.queued = false;
        match locked {
            Ok(()) if state.wanted => state.inside = true,
            Ok(()) => self.unlock(),
            Err(error) => self.give_up(&mut state, &error),
        }
        self.granted.notify_one();
    }

    /// Continues without a turn, which only costs fairness.
    fn give_up(&self, state: &mut State, error: &io::Error) {
        tracing::debug!(%error, "cannot queue for the write lock; asking for it without a turn");
        state.inside = false;
        state.queued = false;
    }

    fn unlock(&self) {
        if let Some(file) = &self.file
            && let Err(error) = file.unlock()
        {
            tracing::warn!(%error, "cannot leave the queue for the write lock; other processes may wait long");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Turn {
    /// Waits up to `patience`, and returns whether it is this task's turn. If the kernel keeps no
    /// queue, it always is.
    pub(crate) async fn comes_within(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        loop {
            if !self.is_to_come() {
                return true;
            }
            if time::timeout_at(until, self.turnstile.granted.notified())
                .await
                .is_err()
            {
                return !self.is_to_come();
            }
        }
    }

    /// Whether a thread waits for it in the kernel's queue.
    pub(crate) fn is_to_come(&self) -> bool {
        self.turnstile.state().queued
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.turnstile.state();
        state.wanted = false;
        if std::mem::take(&mut state.inside) {
            self.turnstile.unlock();
        }
    }
}

/// Appends `ending` to the database's file name, as SQLite does for its own files.
pub(crate) fn sibling(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Locking needs only read access, so each user who can read the database can queue.
fn open_or_create(path: &Path, database: &Path) -> io::Result<File> {
    loop {
        match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        match OpenOptions::new().read(true).write(true).create_new(true).open(path) {
            Ok(file) => {
                like_the_database(&file, database);
                return Ok(file);
            }
            // Another process created it first.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Gives the file the permissions and owner of the database, as SQLite does with its own files.
fn like_the_database(file: &File, database: &Path) {
    let done = fs::metadata(database).and_then(|metadata| {
        #[cfg(unix)]
        {
            use std::os::unix::fs::{MetadataExt, fchown};

            // Only root can change the owner, and only root needs to.
            let _ = fchown(file, Some(metadata.uid()), Some(metadata.gid()));
        }
        file.set_permissions(metadata.permissions())
    });
    if let Err(error) = done {
        tracing::debug!(%error, "the queue for the write lock may be inaccessible to other users");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);
    const NOT_YET: Duration = Duration::from_millis(20);

    fn two() -> (tempfile::TempDir, Arc<Turnstile>, Arc<Turnstile>) {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.db");
        fs::write(&path, "").expect("file");
        let turnstiles = (Turnstile::open(&path), Turnstile::open(&path));
        (folder, Arc::new(turnstiles.0), Arc::new(turnstiles.1))
    }

    #[tokio::test]
    async fn one_is_inside_and_the_next_follows() {
        let (_folder, one, two) = two();
        let inside = one.line_up().await;
        assert!(inside.comes_within(NOT_YET).await);
        let next = two.line_up().await;
        assert!(!next.comes_within(NOT_YET).await);
        drop(inside);
        assert!(next.comes_within(SOON).await);
    }

    #[tokio::test]
    async fn an_abandoned_turn_blocks_nobody_and_its_place_goes_to_the_next_task() {
        let (_folder, one, two) = two();
        let inside = one.line_up().await;
        drop(two.line_up().await);
        let next = two.line_up().await;
        assert!(two.state().queued, "the thread still waits");
        drop(inside);
        assert!(next.comes_within(SOON).await);
        drop(next);

        let inside = one.line_up().await;
        drop(two.line_up().await);
        drop(inside);
        // The abandoned thread gets the lock and releases it.
        while two.state().queued {
            time::sleep(Duration::from_millis(1)).await;
        }
        let again = one.line_up().await;
        assert!(again.comes_within(SOON).await);
    }

    #[tokio::test]
    async fn everyone_passes_if_the_file_cannot_be_created() {
        let folder = tempfile::tempdir().expect("folder");
        let nowhere = Arc::new(Turnstile::open(&folder.path().join("missing/a.db")));
        assert!(nowhere.line_up().await.comes_within(NOT_YET).await);
    }

    #[cfg(unix)]
    #[test]
    fn the_file_has_the_permissions_of_the_database() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.db");
        fs::write(&path, "").expect("file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).expect("chmod");
        Turnstile::open(&path);
        let metadata = fs::metadata(sibling(&path, "-turn")).expect("the file");
        assert_eq!(metadata.permissions().mode() & 0o777, 0o660);
    }
}
