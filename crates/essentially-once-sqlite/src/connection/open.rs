//! Opens connections, and checks the path, the file and the settings first.

use std::{
    ffi::OsStr,
    fs, io,
    path::{self, Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use essentially_once::{Error, backend::Durability};
use rusqlite::{Connection, OpenFlags};
use tokio::time;

use crate::{
    error::{classify, classify_reopening, is_busy, on},
    options::SqliteOptions,
    store::{authorizer::Authorizer, schema},
};

/// Prepared statements kept per connection, enough for this crate and a handler with a rich schema.
const STATEMENT_CACHE: usize = 256;

/// The page cache of a connection that only reads, as SQLite counts it: negative numbers are KiB. A
/// log is read once from front to back, so the default of 2 MiB would only take memory.
const READER_CACHE: i64 = -256;

/// The pause between attempts to get a lock while opening.
const OPEN_PAUSE: Duration = Duration::from_millis(5);

/// SQLite's default page size, in bytes.
const PAGE: u64 = 4096;

/// SQLite copies the WAL into the file by default once the WAL holds this many pages.
const CHECKPOINT_PAGES: u64 = 1000;

/// Refuses a SQLite library in which a checkpoint that races with a reset of the WAL can lose
/// committed pages (<https://sqlite.org/wal.html#the_wal_reset_bug>).
fn check_library(version: i32, path: &Path) -> Result<(), Error> {
    if version >= 3_051_003 || (3_050_007..3_051_000).contains(&version) {
        return Ok(());
    }
    Err(Error::failed(
        on("open SQLite file", path),
        format!(
            "the program is linked with SQLite {}.{}.{}, whose WAL-reset bug can lose committed records; link 3.51.3 \
             or later (or 3.50.7), or use the feature `bundled`",
            version / 1_000_000,
            version / 1000 % 1000,
            version % 1000
        ),
    ))
}

/// Checks the path without opening the file, and makes it independent of the current folder.
pub(crate) fn check_path(given: &Path) -> Result<PathBuf, Error> {
    let refuse = |reason: &str| Err(Error::failed(on("open SQLite file", given), reason));
    if given.as_os_str().is_empty() {
        return refuse("the path is empty; give the path of a file");
    }
    if given == Path::new(":memory:") {
        return refuse(
            "this adapter keeps data in a file; for data that ends with the process, use the in-memory backend \
             `essentially_once::memory`",
        );
    }
    if given.as_os_str().as_encoded_bytes().starts_with(b"file:") {
        return refuse("this looks like a URI; give the path of a file instead");
    }
    check_library(rusqlite::version_number(), given)?;
    let path = path::absolute(given).map_err(|error| Error::failed(on("open SQLite file", given), error))?;
    // Metadata only: opening and closing the file here would release this process's locks on it
    // (POSIX).
    if fs::metadata(&path).is_ok_and(|found| found.is_dir()) {
        return refuse("this is a folder; give the path of a file in it");
    }
    let parent = path.parent().unwrap_or(Path::new(OsStr::new("/")));
    if !fs::metadata(parent).is_ok_and(|found| found.is_dir()) {
        return refuse("the folder does not exist or cannot be entered; create the folder first");
    }
    Ok(path)
}

/// Opens the file for writing, creates it if it is missing, and migrates it to this crate's schema.
/// It blocks the thread, also while it waits for locks, until `given_up` is set.
pub(crate) fn create(
    path: &Path,
    authorizer: &Authorizer,
    options: &SqliteOptions,
    given_up: &AtomicBool,
) -> Result<Connection, Error> {
    let started = Instant::now();
    loop {
        match create_once(path, authorizer, options) {
            Err(error)
                if may_pass_soon(&error)
                    && started.elapsed() < options.busy_timeout
                    && !given_up.load(Ordering::Relaxed) =>
            {
                thread::sleep(OPEN_PAUSE);
            }
            result => return result,
        }
    }
}

/// Opens another connection for writing, to a file that [`create`] has set up. Waits for locks
/// without blocking the thread.
pub(crate) async fn writer(path: &Path, authorizer: &Authorizer, options: &SqliteOptions) -> Result<Connection, Error> {
    wait_for_locks(options, || {
        let mut connection = existing(path, options)?;
        install(authorizer, &mut connection, path)?;
        Ok(connection)
    })
    .await
}

/// Opens a connection for reading. Waits for locks without blocking the thread.
///
/// The caller's thread opens it. That takes a fraction of a millisecond, and leaves no half-open
/// connection behind if the caller gives up.
pub(crate) async fn reader(path: &Path, options: &SqliteOptions) -> Result<Connection, Error> {
    wait_for_locks(options, || read_only(path, options)).await
}

/// Like [`reader`], without waiting for locks.
pub(crate) fn read_only(path: &Path, options: &SqliteOptions) -> Result<Connection, Error> {
    let connection = existing(path, options)?;
    for (pragma, value) in [("query_only", 1), ("cache_size", READER_CACHE)] {
        connection
            .pragma_update(None, pragma, value)
            .map_err(|error| classify(on("open SQLite file", path), error))?;
    }
    Ok(connection)
}

/// Opens a connection that can ask for the write lock but never writes. Waits for locks without
/// blocking the thread.
pub(crate) async fn observer(path: &Path, options: &SqliteOptions) -> Result<Connection, Error> {
    wait_for_locks(options, || existing(path, options)).await
}

/// Reads from SQLite whether commits on this crate's connections survive a crash.
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

/// Whether a sync reaches the disk on macOS.
pub(crate) fn full_fsync(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("PRAGMA fullfsync", [], |row| row.get(0))
}

fn install(authorizer: &Authorizer, connection: &mut Connection, path: &Path) -> Result<(), Error> {
    authorizer
        .install(connection)
        .map_err(|error| classify(on("open SQLite file", path), error))
}

fn create_once(path: &Path, authorizer: &Authorizer, options: &SqliteOptions) -> Result<Connection, Error> {
    let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if options.existing {
        // SQLite would only say that it cannot open the file.
        if let Err(error) = fs::metadata(path) {
            return Err(Error::failed(on("open SQLite file", path), error));
        }
    } else {
        flags |= OpenFlags::SQLITE_OPEN_CREATE;
    }
    let mut connection = connect(path, flags).map_err(|error| classify(on("open SQLite file", path), error))?;
    if connection.is_readonly("main").unwrap_or(false) {
        return Err(Error::failed(
            on("open SQLite file", path),
            "the file is read-only; make the file and its folder writable for this user",
        ));
    }
    // Must come before the first write: the file may not be a database, or may be from a newer
    // version.
    schema::check(&connection, path)?;
    if options.existing {
        schema::require(&connection, path)?;
    }
    configure(&connection, path, options)?;
    schema::migrate(&connection, path)?;
    install(authorizer, &mut connection, path)?;
    Ok(connection)
}

/// Opens the file without creating it. A deleted file must not come back empty.
fn existing(path: &Path, options: &SqliteOptions) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let action = || on("open SQLite file", path);
    let connection = connect(path, flags).map_err(|error| match fs::metadata(path) {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Error::failed(
            action(),
            "the file was moved or deleted while it was open; put it back, or open it at its new path",
        ),
        Err(_) => classify(action(), error),
        Ok(_) => classify_reopening(action(), error),
    })?;
    configure(&connection, path, options)?;
    Ok(connection)
}

fn connect(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, flags)?;
    // SQLite would block the thread while it waits. This crate waits elsewhere, without blocking.
    connection.busy_timeout(Duration::ZERO)?;
    connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
    Ok(connection)
}

fn configure(connection: &Connection, path: &Path, options: &SqliteOptions) -> Result<(), Error> {
    let failed = |error| classify(on("set up SQLite file", path), error);
    let journal: String = connection
        .query_row("PRAGMA main.journal_mode = WAL", [], |row| row.get(0))
        .map_err(failed)?;
    if journal != "wal" {
        return Err(Error::failed(
            on("set up SQLite file", path),
            format!(
                "journal_mode stays {journal} instead of wal; put the file on a local file system with shared memory"
            ),
        ));
    }
    // On macOS, only a full sync reaches the disk. Elsewhere this changes nothing.
    connection.pragma_update(None, "fullfsync", true).map_err(failed)?;
    connection
        .pragma_update(Some("main"), "synchronous", "FULL")
        .map_err(failed)?;
    let limit = options.wal_limit as i64;
    let pages = (options.wal_limit / PAGE).clamp(1, CHECKPOINT_PAGES) as i64;
    for (pragma, value) in [("main.journal_size_limit", limit), ("wal_autocheckpoint", pages)] {
        connection
            .query_row(&format!("PRAGMA {pragma} = {value}"), [], |_| Ok(()))
            .map_err(failed)?;
    }
    Ok(())
}

fn may_pass_soon(error: &Error) -> bool {
    crate::error::sqlite_error(error).is_some_and(is_busy)
}

async fn wait_for_locks<T>(options: &SqliteOptions, mut attempt: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    let started = time::Instant::now();
    loop {
        match attempt() {
            Err(error) if may_pass_soon(&error) && started.elapsed() < options.busy_timeout => {
                time::sleep(OPEN_PAUSE).await;
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlite_reports_read_only_connections_as_durable() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.db");
        let options = SqliteOptions::new();
        create(&path, &Authorizer::default(), &options, &AtomicBool::new(false)).expect("create");
        let connection = read_only(&path, &options).expect("reader");
        assert_eq!(durability(&connection).expect("pragmas"), Durability::Durable);
        assert!(connection.execute_batch("CREATE TABLE t (x)").is_err());
        connection.execute_batch("PRAGMA synchronous = NORMAL").expect("pragma");
        assert!(matches!(durability(&connection), Ok(Durability::Volatile(why)) if why.contains("FULL")));
    }

    #[test]
    fn a_library_with_the_wal_reset_bug_is_refused() {
        let check = |version| check_library(version, Path::new("a.db"));
        for sound in [3_050_007, 3_051_003, 3_052_000, rusqlite::version_number()] {
            assert!(check(sound).is_ok(), "{sound}");
        }
        for broken in [3_045_003, 3_049_002, 3_050_006, 3_051_000] {
            assert!(check(broken).is_err(), "{broken}");
        }
        let text = check(3_051_002).expect_err("refused").to_string();
        assert!(
            text.contains("SQLite 3.51.2,") && text.contains("link 3.51.3"),
            "{text}"
        );
    }

    #[test]
    fn a_deleted_file_does_not_come_back_empty() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.db");
        let error = read_only(&path, &SqliteOptions::new())
            .expect_err("missing")
            .to_string();
        assert!(error.contains("a.db") && error.contains("deleted"), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn an_abandoned_open_waits_for_no_lock() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.db");
        let other = Connection::open(&path).expect("open");
        other
            .execute_batch("BEGIN EXCLUSIVE; CREATE TABLE t (x)")
            .expect("lock");
        let options = SqliteOptions::new().busy_timeout(Duration::from_secs(60));
        let started = Instant::now();
        let error = create(&path, &Authorizer::default(), &options, &AtomicBool::new(true)).expect_err("locked");
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    }
}
