//! Keeps the write-ahead log from growing without end, and says what keeps it from doing so.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rusqlite::Connection;

use crate::turnstile::beside;

/// Asking for the file's size costs a system call, so not every commit does.
const COMMITS_BETWEEN_LOOKS: u32 = 16;

/// How long one who is about to write waits for readers that use the WAL.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long to leave a WAL alone that could not begin again.
const PAUSE: Duration = Duration::from_secs(5);
const BETWEEN_WARNINGS: Duration = Duration::from_secs(60);

/// What a connection that writes knows of the WAL.
///
/// SQLite copies the WAL into the database after commits, and then writes it again from its
/// beginning: but only if a commit finds all of it copied, and nobody reading it. With writers in
/// several processes there is always one that has just added something, so a writer whose turn it
/// is makes it begin again where it has grown over the limit.
pub(crate) struct Wal {
    path: PathBuf,
    limit: u64,
    commits: u32,
    bytes: u64,
    tried: Option<Instant>,
    warned: Option<Instant>,
}

impl Wal {
    /// That of a database, which exists.
    pub(crate) fn of(database: &Path, limit: u64) -> Self {
        // SQLite follows links, and puts it beside the file itself.
        let database = fs::canonicalize(database).unwrap_or_else(|_| database.to_owned());
        Self {
            path: beside(&database, "-wal"),
            limit,
            commits: 0,
            bytes: 0,
            tried: None,
            warned: None,
        }
    }

    /// Looks from time to time how large it is.
    pub(crate) fn committed(&mut self) {
        self.commits = self.commits.wrapping_add(1);
        if self.commits.is_multiple_of(COMMITS_BETWEEN_LOOKS) {
            self.bytes = fs::metadata(&self.path).map_or(0, |metadata| metadata.len());
        }
    }

    /// How long to try to let it begin again, if it should.
    pub(crate) fn restart_within(&self) -> Option<Duration> {
        let is_due = self.bytes > self.limit && self.tried.is_none_or(|tried| tried.elapsed() > PAUSE);
        is_due.then_some(PATIENCE)
    }

    /// Lets it begin again, and returns whether that was possible: not while anyone writes, or
    /// reads what is in it.
    pub(crate) fn restart(&mut self, connection: &Connection) -> bool {
        // An error shows at the next statement as well, whose caller can be told.
        let done = checkpoint(connection, "RESTART").unwrap_or(true);
        if done {
            self.bytes = 0;
        }
        done
    }

    /// Says that it could not begin again.
    pub(crate) fn starves(&mut self) {
        let now = Instant::now();
        self.tried = Some(now);
        if self.warned.is_some_and(|warned| warned.elapsed() < BETWEEN_WARNINGS) {
            return;
        }
        self.warned = Some(now);
        tracing::warn!(
            path = %self.path.display(), bytes = self.bytes, limit = self.limit,
            "the WAL is over its limit and grows on, because a read transaction on the file has been open for long: end it \
             (a query whose rows nobody fetches, a shell left open, a backup)"
        );
    }

    /// Copies all of it into the database and empties it; `false` while anyone writes, or reads
    /// what is in it.
    pub(crate) fn empty(&self, connection: &Connection) -> rusqlite::Result<bool> {
        checkpoint(connection, "TRUNCATE")
    }
}

fn checkpoint(connection: &Connection, mode: &str) -> rusqlite::Result<bool> {
    connection.query_row(&format!("PRAGMA main.wal_checkpoint({mode})"), [], |row| {
        row.get::<_, bool>(0).map(|busy| !busy)
    })
}
