//! Opening connections: what must hold of the path, the file and the settings before one is used.

use std::{
    ffi::OsStr,
    fs,
    path::{self, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use essentially_once::{Durability, Error};
use rusqlite::{Connection, OpenFlags};

use crate::{
    error::{classify, is_busy, on},
    guard::Guard,
    schema,
};

/// Statements kept prepared per connection: ours, and those of a handler with a rich schema.
const STATEMENT_CACHE: usize = 256;

/// How long to pause before asking again for a lock while opening, on a thread that may block.
const OPEN_PAUSE: Duration = Duration::from_millis(5);

/// Checks what can be told without opening the file, and makes the path independent of the current folder.
pub(crate) fn check_path(given: &Path) -> Result<PathBuf, Error> {
    let refuse = |reason: &str| Err(Error::failed(on("open SQLite file", given), reason));
    if given.as_os_str().is_empty() || given == Path::new(":memory:") {
        return refuse(
            "this adapter keeps data in a file; for data that ends with the process, use the in-memory backend \
             `essentially_once::memory`",
        );
    }
    if given.as_os_str().as_encoded_bytes().starts_with(b"file:") {
        return refuse("give the path of a file; URIs are not taken");
    }
    let path = path::absolute(given).map_err(|error| Error::failed(on("open SQLite file", given), error))?;
    // Metadata only: opening and closing the file here would drop this process's locks on it (POSIX).
    if fs::metadata(&path).is_ok_and(|found| found.is_dir()) {
        return refuse("this is a folder; give the path of a file in it");
    }
    let parent = path.parent().unwrap_or(Path::new(OsStr::new("/")));
    if !fs::metadata(parent).is_ok_and(|found| found.is_dir()) {
        return refuse("its folder does not exist (or may not be entered); create the folder first");
    }
    Ok(path)
}

/// Opens the file to write, created if missing, and brings it to our schema; waits for locks, so it may block.
pub(crate) fn create(path: &Path, guard: &Guard, busy_timeout: Duration) -> Result<Connection, Error> {
    wait_for_locks(busy_timeout, || {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = open(path, flags)?;
        if connection.is_readonly("main").unwrap_or(false) {
            return Err(Error::failed(
                on("open SQLite file", path),
                "it can be read only; make the file and its folder writable for this user",
            ));
        }
        // Before anything is changed in it: the file may be something else, or of a newer version.
        schema::check(&connection, path)?;
        configure(&connection, path)?;
        schema::migrate(&connection, path)?;
        install(guard, &mut connection, path)?;
        Ok(connection)
    })
}

/// Another connection that writes, to a file that [`create`] has seen; waits for locks, so it may block.
pub(crate) fn writer(path: &Path, guard: &Guard, busy_timeout: Duration) -> Result<Connection, Error> {
    wait_for_locks(busy_timeout, || {
        let mut connection = existing(path)?;
        install(guard, &mut connection, path)?;
        Ok(connection)
    })
}

/// A connection that only reads; waits for locks, so it may block.
pub(crate) fn reader(path: &Path, busy_timeout: Duration) -> Result<Connection, Error> {
    wait_for_locks(busy_timeout, || {
        let connection = existing(path)?;
        connection
            .pragma_update(None, "query_only", true)
            .map_err(|error| classify(on("open SQLite file", path), error))?;
        Ok(connection)
    })
}

/// Whether commits through connections such as this one survive a crash, by SQLite's own word.
pub(crate) fn durability(connection: &Connection) -> rusqlite::Result<Durability> {
    let journal: String = connection.query_row("PRAGMA main.journal_mode", [], |row| row.get(0))?;
    let synchronous: i64 = connection.query_row("PRAGMA main.synchronous", [], |row| row.get(0))?;
    Ok(if matches!(journal.as_str(), "off" | "memory") {
        Durability::Volatile(format!("journal_mode is {journal}; set it to wal"))
    } else if synchronous < 2 {
        Durability::Volatile(format!("synchronous is {synchronous}; set it to FULL"))
    } else {
        Durability::Durable
    })
}

fn install(guard: &Guard, connection: &mut Connection, path: &Path) -> Result<(), Error> {
    guard
        .install(connection)
        .map_err(|error| classify(on("open SQLite file", path), error))
}

/// Never creates the file: one that was deleted since must not come back empty.
fn existing(path: &Path) -> Result<Connection, Error> {
    let connection = open(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    configure(&connection, path)?;
    Ok(connection)
}

fn open(path: &Path, flags: OpenFlags) -> Result<Connection, Error> {
    let failed = |error| classify(on("open SQLite file", path), error);
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    // SQLite would wait by blocking the thread; locks are waited for elsewhere.
    connection.busy_timeout(Duration::ZERO).map_err(failed)?;
    connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
    Ok(connection)
}

fn configure(connection: &Connection, path: &Path) -> Result<(), Error> {
    let failed = |error| classify(on("set up SQLite file", path), error);
    let journal: String = connection
        .query_row("PRAGMA main.journal_mode = WAL", [], |row| row.get(0))
        .map_err(failed)?;
    if journal != "wal" {
        return Err(Error::failed(
            on("set up SQLite file", path),
            format!(
                "journal_mode stays {journal} when asked for wal; put the file on a local file system with shared memory"
            ),
        ));
    }
    // On macOS a sync reaches the disk only so; elsewhere it changes nothing.
    connection.pragma_update(None, "fullfsync", true).map_err(failed)?;
    connection
        .pragma_update(Some("main"), "synchronous", "FULL")
        .map_err(failed)
}

fn wait_for_locks<T>(busy_timeout: Duration, mut attempt: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    let started = Instant::now();
    loop {
        match attempt() {
            Err(error)
                if started.elapsed() < busy_timeout && crate::error::sqlite_error(&error).is_some_and(is_busy) =>
            {
                thread::sleep(OPEN_PAUSE);
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);

    #[test]
    fn read_only_connections_are_durable_by_sqlites_word() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.db");
        create(&path, &Guard::default(), TIMEOUT).expect("create");
        let connection = reader(&path, TIMEOUT).expect("reader");
        assert_eq!(durability(&connection).expect("pragmas"), Durability::Durable);
        assert!(connection.execute_batch("CREATE TABLE t (x)").is_err());
        connection.execute_batch("PRAGMA synchronous = NORMAL").expect("pragma");
        assert!(matches!(durability(&connection), Ok(Durability::Volatile(why)) if why.contains("FULL")));
    }

    #[test]
    fn a_deleted_file_does_not_come_back_empty() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.db");
        let error = reader(&path, TIMEOUT).expect_err("missing").to_string();
        assert!(error.contains("a.db"), "{error}");
        assert!(!path.exists());
    }
}
