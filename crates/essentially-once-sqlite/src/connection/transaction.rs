//! The connection that writes, and a transaction on it.

use std::{fmt, path::Path, sync::Arc};

use essentially_once::Error;
use rusqlite::{Connection, Statement};
use tokio::{
    sync::OwnedMappedMutexGuard,
    time::{self, Instant},
};

use super::{
    file::{Errand, Holder, OpenFile},
    open,
    prepared::Prepared,
    retry::SHORTEST_PAUSE,
    wal::Wal,
};
use crate::{
    error::{classify, classify_commit},
    options::SqliteOptions,
    store::authorizer::Authorizer,
};

/// The connection of a handle that writes, held by one task.
pub(super) type Held = OwnedMappedMutexGuard<Option<WriteConnection>, WriteConnection>;

/// An open write transaction. Dropping it rolls back.
pub(crate) struct WriteTx {
    pub(super) connection: Held,
    file: Arc<OpenFile>,
    holder: Holder,
}

impl WriteTx {
    /// The transaction that was just begun on the connection.
    pub(super) fn new(connection: Held, file: Arc<OpenFile>, errand: Errand) -> Self {
        Self {
            holder: file.began(errand),
            file,
            connection,
        }
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection.connection
    }

    /// Runs SQL of this crate.
    pub(crate) fn run_internal<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.connection.connection.run_internal(sql, run)
    }

    /// Runs a handler's SQL under the authorizer's restrictions.
    pub(crate) fn run_native<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let WriteConnection {
            connection, authorizer, ..
        } = &mut *self.connection;
        authorizer.run(connection, sql, run)
    }

    /// False once SQLite itself has rolled back, for example because of `INSERT OR ROLLBACK` or a
    /// full disk. A statement that ran then would be committed immediately.
    pub(crate) fn is_open(&self) -> bool {
        !self.connection.connection.is_autocommit()
    }

    /// Commits. `action` becomes the action of an error.
    pub(crate) fn commit(mut self, action: impl FnOnce() -> String) -> Result<(), Error> {
        self.connection
            .run("COMMIT")
            .map_err(|error| classify_commit(action(), error))?;
        self.connection.wal.committed();
        self.file.commits.send_replace(());
        Ok(())
    }

    pub(crate) fn rollback(mut self, action: impl FnOnce() -> String) -> Result<(), Error> {
        self.try_rollback().map_err(|error| classify(action(), error))
    }

    fn try_rollback(&mut self) -> rusqlite::Result<()> {
        if !self.is_open() {
            return Ok(());
        }
        let result = self.connection.run("ROLLBACK");
        self.connection.broken = self.is_open();
        result
    }
}

impl Drop for WriteTx {
    fn drop(&mut self) {
        if let Err(error) = self.try_rollback() {
            tracing::warn!(%error, "a rollback failed");
        }
        self.connection.left = Some(Instant::now());
        self.file.ended(self.holder);
    }
}

impl fmt::Debug for WriteTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteTx").finish_non_exhaustive()
    }
}

/// The only connection of a handle that writes.
pub(super) struct WriteConnection {
    pub(super) connection: Prepared,
    authorizer: Authorizer,
    pub(super) wal: Wal,
    /// When this connection last got the lock in turn.
    pub(super) passed: Option<Instant>,
    /// Whether other writers were ahead of it then.
    pub(super) has_waited: bool,
    /// When its last transaction ended.
    pub(super) left: Option<Instant>,
    /// A rollback failed, so the connection's state is unknown.
    pub(super) broken: bool,
}

impl WriteConnection {
    pub(super) fn new(connection: Prepared, authorizer: Authorizer, wal: Wal) -> Self {
        Self {
            connection,
            authorizer,
            wal,
            passed: None,
            has_waited: false,
            left: None,
            broken: false,
        }
    }

    /// Replaces the connection after a failed rollback.
    pub(super) async fn reopen(&mut self, path: &Path, options: &SqliteOptions) -> Result<(), Error> {
        let authorizer = Authorizer::default();
        self.connection = Prepared::new(open::writer(path, &authorizer, options).await?);
        self.authorizer = authorizer;
        self.broken = false;
        Ok(())
    }

    /// Takes `&mut self` so that a future that holds the writer is `Send`. A connection is not
    /// `Sync`.
    pub(super) fn begin(&mut self) -> rusqlite::Result<()> {
        self.run("BEGIN IMMEDIATE")
    }

    /// Restarts the WAL if it has grown too large. The caller must be the next to write.
    pub(super) async fn restart_wal(&mut self, deadline: Instant) {
        let Some(patience) = self.wal.restart_within() else {
            return;
        };
        let until = deadline.min(Instant::now() + patience);
        loop {
            let Self { connection, wal, .. } = &mut *self;
            if wal.restart(connection) {
                return;
            }
            if Instant::now() >= until {
                return self.wal.starves();
            }
            time::sleep(SHORTEST_PAUSE).await;
        }
    }

    /// Runs SQL of this crate that has no parameters.
    pub(super) fn run(&mut self, sql: &str) -> rusqlite::Result<()> {
        self.connection
            .run_internal(sql, |statement| statement.execute([]))
            .map(drop)
    }
}
