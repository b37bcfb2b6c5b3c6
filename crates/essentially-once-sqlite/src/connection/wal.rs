//! Keeps the write-ahead log from growing without bound, and reports what prevents that.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rusqlite::Connection;

use super::turnstile::sibling;

/// Checking the file's size costs a system call, so only every 16th commit does it.
const COMMITS_BETWEEN_LOOKS: u32 = 16;

/// How long a writer waits for readers that use the WAL before it writes.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long to leave a WAL alone after an attempt to restart it failed.
const PAUSE: Duration = Duration::from_secs(5);
const BETWEEN_WARNINGS: Duration = Duration::from_secs(60);

/// What a connection that writes knows about the WAL.
///
/// SQLite copies the WAL into the database after commits, and then overwrites it from the start. It
/// can do so only if a commit finds the WAL completely copied and unread. With writers in several
/// processes, one of them has always just added a page. So a writer whose turn it is restarts a WAL
/// that exceeds the limit.
pub(crate) struct Wal {
    path: PathBuf,
    limit: u64,
    commits: u32,
    bytes: u64,
    tried: Option<Instant>,
    warned: Option<Instant>,
}

impl Wal {
    /// Describes the WAL of a database. The database must exist.
    pub(crate) fn of(database: &Path, limit: u64) -> Self {
        // SQLite resolves links, and puts the WAL next to the resolved file.
        let database = fs::canonicalize(database).unwrap_or_else(|_| database.to_owned());
        Self {
            path: sibling(&database, "-wal"),
            limit,
            commits: 0,
            bytes: 0,
            tried: None,
            warned: None,
        }
    }

    /// Checks the size of the WAL after some of the commits.
    pub(crate) fn committed(&mut self) {
        self.commits = self.commits.wrapping_add(1);
        if self.commits.is_multiple_of(COMMITS_BETWEEN_LOOKS) {
            self.bytes = fs::metadata(&self.path).map_or(0, |metadata| metadata.len());
        }
    }

    /// Returns how long to try to restart the WAL, if a restart is due.
    pub(crate) fn restart_within(&self) -> Option<Duration> {
        let is_due = self.bytes > self.limit && self.tried.is_none_or(|tried| tried.elapsed() > PAUSE);
        is_due.then_some(PATIENCE)
    }

    /// Restarts the WAL. Returns false while another connection writes, or reads from the WAL.
    pub(crate) fn restart(&mut self, connection: &Connection) -> bool {
        // The next statement reports the same error to a caller that can handle it.
        let done = checkpoint(connection, "RESTART").unwrap_or(true);
        if done {
            self.bytes = 0;
        }
        done
    }

    /// Warns that the WAL could not be restarted.
    pub(crate) fn starves(&mut self) {
        let now = Instant::now();
        self.tried = Some(now);
        if self.warned.is_some_and(|warned| warned.elapsed() < BETWEEN_WARNINGS) {
            return;
        }
        self.warned = Some(now);
        tracing::warn!(
            path = %self.path.display(), bytes = self.bytes, limit = self.limit,
            "the WAL exceeds its limit and keeps growing, because a read transaction on the file has been open for \
             a long time; end it (a query whose rows are not fetched, an open shell, a backup)"
        );
    }

    /// Copies the whole WAL into the database and empties it. Returns false while another
    /// connection writes, or reads from the WAL.
    pub(crate) fn empty(&self, connection: &Connection) -> rusqlite::Result<bool> {
        checkpoint(connection, "TRUNCATE")
    }
}

fn checkpoint(connection: &Connection, mode: &str) -> rusqlite::Result<bool> {
    connection.query_row(&format!("PRAGMA main.wal_checkpoint({mode})"), [], |row| {
        row.get::<_, bool>(0).map(|busy| !busy)
    })
}
