//! Gets the write lock in turn, without blocking the thread.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use essentially_once::Error;
use tokio::{
    sync::{Mutex, MutexGuard, OwnedMutexGuard},
    time::{self, Instant, error::Elapsed},
};

use super::{
    file::{Errand, Holder, OpenFile},
    open,
    prepared::Prepared,
    retry::retry_busy,
    transaction::{WriteConnection, WriteTx},
    wal::Wal,
};
use crate::{
    error::{classify, closed, is_busy, on},
    options::SqliteOptions,
    store::authorizer::Authorizer,
};

/// The writer whose turn it is polls often. It is the only one that polls, and nobody writes while
/// it sleeps.
const LONGEST_PAUSE_IN_TURN: Duration = Duration::from_millis(1);

/// A writer that has passed the turnstile may write again for this long without passing it again.
/// That saves system calls if commits take microseconds. Each waiting writer waits at most this
/// much longer for each writer ahead of it.
const TENURE: Duration = Duration::from_millis(2);

/// How long a writer that had to wait for its last turn stays away from the turnstile after its
/// commit. The kernel lets a writer that comes at the moment of a handover slip in, and the next
/// writer gets the write lock, and thereby hands the turnstile over, within this time after a
/// commit.
const STAND_BACK: Duration = Duration::from_millis(3);

/// How long to wait for a turn before checking whether the writer inside the turnstile still makes
/// progress.
const PATIENCE: Duration = Duration::from_millis(250);
/// Long enough for the writer inside the turnstile to ask for the write lock many times.
const SECOND_LOOK: Duration = Duration::from_millis(30);

/// The only way to write through a handle: its write connection, and the queue for the write lock.
pub(super) struct Writer {
    path: PathBuf,
    options: SqliteOptions,
    file: Arc<OpenFile>,
    /// Fair among the tasks of this handle. `None` once the handle is closed.
    connection: Arc<Mutex<Option<WriteConnection>>>,
}

impl Writer {
    /// Opens the file. It blocks the thread, also while it waits for locks, until `given_up` is
    /// set.
    pub(super) fn open(path: &Path, options: SqliteOptions, given_up: &AtomicBool) -> Result<Self, Error> {
        let authorizer = Authorizer::default();
        let connection = open::create(path, &authorizer, &options, given_up)?;
        let wal = Wal::of(path, options.wal_limit);
        let connection = WriteConnection::new(Prepared::new(connection), authorizer, wal);
        Ok(Self {
            file: OpenFile::of(path),
            path: path.to_owned(),
            options,
            connection: Arc::new(Mutex::new(Some(connection))),
        })
    }

    /// The state that all handles of this process on the file share.
    pub(super) fn file(&self) -> &Arc<OpenFile> {
        &self.file
    }

    /// Waits for the open transaction, and returns the connection. Taking it closes the writer.
    pub(super) async fn lock(&self, deadline: Instant) -> Result<MutexGuard<'_, Option<WriteConnection>>, Elapsed> {
        time::timeout_at(deadline, self.connection.lock()).await
    }

    /// Opens a write transaction. Waits for the lock without blocking the thread.
    pub(super) async fn begin(&self, errand: Errand, action: impl Fn() -> String) -> Result<WriteTx, Error> {
        let deadline = Instant::now() + self.options.busy_timeout;
        let held = self.file.holder();
        if errand == Errand::Append && held.is_some_and(Holder::is_of_this_handler) {
            return Err(Error::failed(
                self.on(action()),
                "this handler would wait for itself, since its own transaction has the write lock of the file; send the \
                 record with `Outbox::send` in that transaction, or append to a log in another file",
            ));
        }
        let Ok(connection) = time::timeout_at(deadline, Arc::clone(&self.connection).lock_owned()).await else {
            return Err(self.kept_waiting(errand, action(), held, None));
        };
        let Ok(mut connection) = OwnedMutexGuard::try_map(connection, Option::as_mut) else {
            return Err(closed(self.on(action())));
        };
        if connection.broken {
            tracing::warn!(path = %self.path.display(), "a rollback failed; reopening the connection");
            connection.reopen(&self.path, &self.options).await?;
        }
        match self.lock_file(&mut connection, deadline).await {
            Ok(()) => Ok(WriteTx::new(connection, Arc::clone(&self.file), errand)),
            Err(error) if is_busy(&error) => Err(self.kept_waiting(errand, action(), held, Some(error))),
            Err(error) => Err(classify(self.on(action()), error)),
        }
    }

    /// Opens a write transaction if the lock is free. Does not wait, and does not queue.
    pub(super) fn try_begin(&self, action: impl Fn() -> String) -> Result<Option<WriteTx>, Error> {
        let Ok(connection) = Arc::clone(&self.connection).try_lock_owned() else {
            return Ok(None);
        };
        let Ok(mut connection) = OwnedMutexGuard::try_map(connection, Option::as_mut) else {
            return Err(closed(self.on(action())));
        };
        if connection.broken || self.file.holder().is_some() {
            return Ok(None);
        }
        match connection.begin() {
            Ok(()) => Ok(Some(WriteTx::new(connection, Arc::clone(&self.file), Errand::Other))),
            Err(error) if is_busy(&error) => Ok(None),
            Err(error) => Err(classify(self.on(action()), error)),
        }
    }

    /// Takes the file's write lock in turn.
    async fn lock_file(&self, connection: &mut WriteConnection, deadline: Instant) -> rusqlite::Result<()> {
        if connection.passed.is_some_and(|passed| passed.elapsed() < TENURE) {
            match connection.begin() {
                Err(error) if is_busy(&error) => {}
                result => return result,
            }
        }
        if let (true, Some(left)) = (connection.has_waited, connection.left) {
            time::sleep_until(left + STAND_BACK).await;
        }
        let Ok(turn) = time::timeout_at(deadline, self.file.turnstile.line_up()).await else {
            return connection.begin();
        };
        connection.has_waited = turn.is_to_come();
        let mut patience = PATIENCE;
        while !turn.comes_within(patience.min(deadline - Instant::now())).await {
            // The writer inside takes the lock as soon as it is free. If it leaves a free lock
            // alone twice, it is frozen.
            match connection.begin() {
                Ok(()) if patience == SECOND_LOOK => return Ok(()),
                Ok(()) => {
                    connection.run("ROLLBACK")?;
                    patience = SECOND_LOOK;
                }
                Err(error) if is_busy(&error) && Instant::now() < deadline => patience = PATIENCE,
                Err(error) => return Err(error),
            }
        }
        connection.restart_wal(deadline).await;
        retry_busy(deadline, LONGEST_PAUSE_IN_TURN, || connection.begin()).await?;
        connection.passed = Some(Instant::now());
        Ok(())
    }

    /// Builds the error for a writer that did not get the lock in time. `held` is the transaction
    /// that was open when the wait began.
    ///
    /// A task that waits for itself would do so at every attempt. But it may also wait for another
    /// one of the futures that it polls concurrently (`join!`). So only an append fails
    /// permanently.
    fn kept_waiting(
        &self,
        errand: Errand,
        action: String,
        held: Option<Holder>,
        error: Option<rusqlite::Error>,
    ) -> Error {
        let (action, timeout) = (self.on(action), self.options.busy_timeout);
        match (self.file.holder().filter(|holder| held == Some(*holder)), error) {
            (Some(holder), _) if errand == Errand::Append && holder.is_this_runner() => Error::failed(
                action,
                format!(
                    "this task waits for itself: its own open transaction on the same file has held the write lock \
                     for {timeout:?}; within a handler, send the record with `Outbox::send` in the handler's \
                     transaction, or append to a log in another file"
                ),
            ),
            (Some(_), _) | (None, None) => Error::unavailable(
                action,
                format!(
                    "another transaction of this process has held the write lock for {timeout:?}; check whether a \
                     handler waits for itself because another task appends to a log of this file or opens a second \
                     transaction; inside a handler, send records with `Outbox::send`"
                ),
            ),
            (None, Some(error)) => classify(action, error),
        }
    }

    fn on(&self, what: impl fmt::Display) -> String {
        on(what, &self.path)
    }
}
