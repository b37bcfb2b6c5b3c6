//! Maps SQLite's result codes to what a caller can do: try again, change something, or check the
//! position.

use std::{error, fmt, fs::File, path::Path};

use essentially_once::Error;
use rusqlite::{ErrorCode, ffi};

/// Returns the SQLite error beneath an error of this crate. Use it to tell a constraint violation
/// from a mistake in the SQL.
///
/// ```
/// # use essentially_once_sqlite::rusqlite::ErrorCode;
/// # fn example(error: &essentially_once::Error) -> bool {
/// let cause = essentially_once_sqlite::sqlite_error(error);
/// let code = cause.and_then(|cause| cause.sqlite_error_code());
/// code == Some(ErrorCode::ConstraintViolation)
/// # }
/// ```
pub fn sqlite_error(error: &Error) -> Option<&rusqlite::Error> {
    let mut next = error.cause().map(|cause| cause as &(dyn error::Error + 'static));
    while let Some(cause) = next {
        if let Some(sqlite) = cause.downcast_ref() {
            return Some(sqlite);
        }
        next = cause.source();
    }
    None
}

/// Classifies an error from anywhere but a COMMIT. Nothing was applied.
pub(crate) fn classify(action: impl Into<String>, error: rusqlite::Error) -> Error {
    let Some(failure) = error.sqlite_error() else {
        return Error::failed(action, error);
    };
    match judge(failure.extended_code, is_out_of_descriptors) {
        Verdict::Passes("") => Error::unavailable(action, error),
        Verdict::Passes(hint) => Error::unavailable(action, Cause::new(error, hint)),
        Verdict::Stays("") => Error::failed(action, error),
        Verdict::Stays(hint) => Error::failed(action, Cause::new(error, hint)),
    }
}

/// Classifies an error on a connection of the user, whose transaction has the write lock.
pub(crate) fn classify_with_lock(action: String, error: rusqlite::Error) -> Error {
    match is_busy(&error) {
        true => Error::failed(action, Cause::new(error, UNFINISHED)),
        false => classify(action, error),
    }
}

/// Classifies an error on a connection of the user, whose transaction does not have the write lock.
pub(crate) fn classify_without_lock(action: String, error: rusqlite::Error) -> Error {
    match is_busy(&error) {
        true => Error::unavailable(action, Cause::new(error, NOT_IMMEDIATE)),
        false => classify(action, error),
    }
}

/// Classifies an error from reopening a file that exists and was open before. If SQLite cannot open
/// such a file, the process or the system may be out of file descriptors, which can pass.
pub(crate) fn classify_reopening(action: impl Into<String>, error: rusqlite::Error) -> Error {
    match error.sqlite_extended_error_code() {
        Some(ffi::SQLITE_CANTOPEN) => Error::unavailable(action, Cause::new(error, OUT_OF_DESCRIPTORS)),
        _ => classify(action, error),
    }
}

/// Whether an error can pass on its own, and a hint what to do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Passes(&'static str),
    Stays(&'static str),
}

const OUT_OF_DESCRIPTORS: &str =
    "the process or the system may be out of file descriptors; raise the limit (`ulimit -n`), or open fewer files";

fn judge(extended: i32, is_out_of_descriptors: fn() -> bool) -> Verdict {
    use Verdict::{Passes, Stays};

    // Extended codes that differ from their primary code.
    match extended {
        ffi::SQLITE_CANTOPEN | ffi::SQLITE_IOERR_SHMOPEN | ffi::SQLITE_IOERR_GETTEMPPATH if is_out_of_descriptors() => {
            return Passes(OUT_OF_DESCRIPTORS);
        }
        ffi::SQLITE_IOERR_NOMEM | ffi::SQLITE_IOERR_SHMMAP | ffi::SQLITE_IOERR_MMAP => {
            return Passes("the system is short of memory; the call may succeed later");
        }
        ffi::SQLITE_IOERR_LOCK
        | ffi::SQLITE_IOERR_RDLOCK
        | ffi::SQLITE_IOERR_UNLOCK
        | ffi::SQLITE_IOERR_CHECKRESERVEDLOCK
        | ffi::SQLITE_IOERR_SHMLOCK
        | ffi::SQLITE_IOERR_BLOCKED => {
            return Passes("the system could not lock the file, perhaps because it is out of locks");
        }
        // The transaction is gone, but the next one may succeed.
        ffi::SQLITE_ABORT_ROLLBACK | ffi::SQLITE_ERROR_RETRY | ffi::SQLITE_ERROR_SNAPSHOT => return Passes(""),
        ffi::SQLITE_LOCKED_SHAREDCACHE => return Passes(HELD),
        ffi::SQLITE_READONLY_DBMOVED => {
            return Stays("the file was moved or deleted while it was open; put it back and open it again");
        }
        ffi::SQLITE_IOERR_SHMSIZE => return Stays(FULL),
        _ => {}
    }
    match extended & 0xff {
        ffi::SQLITE_BUSY | ffi::SQLITE_PROTOCOL => Passes(HELD),
        ffi::SQLITE_INTERRUPT | ffi::SQLITE_NOMEM | ffi::SQLITE_SCHEMA => Passes(""),
        // No statement of this crate outlives its call, so the table is in use within this
        // transaction.
        ffi::SQLITE_LOCKED => {
            Stays("another statement of this transaction still uses the table; finish reading its rows first")
        }
        ffi::SQLITE_READONLY => Stays("make the file and its folder writable for this user"),
        ffi::SQLITE_PERM => Stays("allow this user to read and write the file and its folder"),
        ffi::SQLITE_CANTOPEN => Stays("check that the folder exists and that this user may create files in it"),
        ffi::SQLITE_NOTADB => Stays("the file is not a SQLite database, or it is encrypted; choose another path"),
        ffi::SQLITE_CORRUPT => Stays("the file is damaged; stop all writers and restore it from a backup"),
        ffi::SQLITE_FULL => Stays(FULL),
        ffi::SQLITE_IOERR => Stays("the disk or file system reported an error; check its health and free space"),
        ffi::SQLITE_AUTH => Stays(
            "a handler cannot begin or end transactions, attach databases, set pragmas, write to sqlite_sequence, \
             use names that begin with essentially_once_, or write to tables with such names or reference them with \
             a foreign key; savepoints are allowed",
        ),
        _ => Stays(""),
    }
}

const UNFINISHED: &str = "another statement of this transaction is still writing; finish reading its rows first";
const NOT_IMMEDIATE: &str = "the transaction could not get the file's write lock; begin it with \
     `TransactionBehavior::Immediate`, set a `busy_timeout` on the connection, and run it again";
const HELD: &str = "another process or connection holds the lock; raise `busy_timeout` to wait longer";
const FULL: &str = "the disk is full, or the file has reached max_page_count; make room, then try again";

/// Whether the process cannot open any file now. SQLite reports that like a missing folder.
fn is_out_of_descriptors() -> bool {
    // Unix takes a descriptor before it looks at the path. This must not open the database: closing
    // it would release this process's locks on it.
    let opened = File::open("/");
    match opened.map_err(|error| error.raw_os_error()) {
        // ENFILE and EMFILE; ERROR_TOO_MANY_OPEN_FILES.
        Err(Some(code)) => code == if cfg!(windows) { 4 } else { 24 } || (cfg!(unix) && code == 23),
        _ => false,
    }
}

/// Classifies an error from a COMMIT. Only some codes guarantee that nothing was applied.
pub(crate) fn classify_commit(action: impl Into<String>, error: rusqlite::Error) -> Error {
    match error.sqlite_error_code() {
        Some(
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::DiskFull
            | ErrorCode::ReadOnly
            // A deferred foreign key is still violated.
            | ErrorCode::ConstraintViolation,
        ) => classify(action, error),
        _ => match error.sqlite_error().map(|failure| judge(failure.extended_code, is_out_of_descriptors)) {
            Some(Verdict::Stays(hint)) if !hint.is_empty() => Error::indeterminate(action, Cause::new(error, hint)),
            // A hint for an error that passes may say that nothing happened.
            _ => Error::indeterminate(action, error),
        },
    }
}

/// Whether waiting for a lock may help. Recovery after a crash also holds a lock for a moment.
pub(crate) fn is_busy(error: &rusqlite::Error) -> bool {
    error.sqlite_error().is_some_and(|failure| {
        failure.extended_code == ffi::SQLITE_LOCKED_SHAREDCACHE
            || matches!(failure.extended_code & 0xff, ffi::SQLITE_BUSY | ffi::SQLITE_PROTOCOL)
    })
}

/// Whether a handler's statement failed through the handler's own mistake: in the SQL, the
/// parameters or the reading of a row, a violated constraint, or a refusal by the authorizer. After
/// any other error, the backend is in trouble and nothing is known of what the statement would have
/// read or written.
pub(crate) fn is_handlers_mistake(error: &rusqlite::Error) -> bool {
    let Some(failure) = error.sqlite_error() else {
        return true;
    };
    match failure.code {
        ErrorCode::ConstraintViolation
        | ErrorCode::TooBig
        | ErrorCode::TypeMismatch
        | ErrorCode::ParameterOutOfRange
        | ErrorCode::ApiMisuse
        | ErrorCode::AuthorizationForStatementDenied => true,
        // A mistake in the SQL has the code SQLITE_ERROR but no variant of its own, like every
        // unknown code.
        ErrorCode::Unknown => failure.extended_code & 0xff == ffi::SQLITE_ERROR,
        _ => false,
    }
}

/// Explains a call after [`Sqlite::close`](crate::Sqlite::close).
const CLOSED: &str = "the file was closed with `Sqlite::close`; open it again";

/// The error of a call after [`Sqlite::close`](crate::Sqlite::close).
pub(crate) fn closed(action: impl Into<String>) -> Error {
    Error::failed(action, CLOSED)
}

/// The same as an error of SQLite, for a query without a connection.
pub(crate) fn closed_connection() -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_MISUSE), Some(CLOSED.into()))
}

/// Adds the file to an error's action, as in `read log orders (/var/lib/x.db)`.
pub(crate) fn on(what: impl fmt::Display, path: &Path) -> String {
    format!("{what} ({})", path.display())
}

/// A SQLite error with a hint.
#[derive(Debug)]
struct Cause {
    error: rusqlite::Error,
    hint: &'static str,
}

impl Cause {
    fn new(error: rusqlite::Error, hint: &'static str) -> Self {
        Self { error, hint }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.error, self.hint)
    }
}

impl error::Error for Cause {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        Some(&self.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sqlite(code: i32) -> rusqlite::Error {
        rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)
    }

    /// What a caller should do after an error.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Meaning {
        /// It can pass on its own: try again.
        Passes,
        /// It cannot pass: someone must change something.
        Stays,
        /// It may have happened: look at the position.
        Doubt,
    }

    impl Meaning {
        fn of(error: &Error) -> Self {
            match error {
                Error::Unavailable { .. } => Self::Passes,
                Error::Failed { .. } => Self::Stays,
                Error::Indeterminate { .. } => Self::Doubt,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Can the error pass on its own, outside a COMMIT and in one?
    #[test]
    fn each_code_means_what_it_should() {
        use Meaning::{Doubt, Passes, Stays};

        for (code, outside, in_a_commit) in [
            (ffi::SQLITE_ERROR, Stays, Doubt),
            (ffi::SQLITE_ERROR_MISSING_COLLSEQ, Stays, Doubt),
            (ffi::SQLITE_ERROR_RETRY, Passes, Doubt),
            (ffi::SQLITE_ERROR_SNAPSHOT, Passes, Doubt),
            (ffi::SQLITE_INTERNAL, Stays, Doubt),
            (ffi::SQLITE_PERM, Stays, Doubt),
            (ffi::SQLITE_ABORT, Stays, Doubt),
            (ffi::SQLITE_ABORT_ROLLBACK, Passes, Doubt),
            (ffi::SQLITE_BUSY, Passes, Passes),
            (ffi::SQLITE_BUSY_RECOVERY, Passes, Passes),
            (ffi::SQLITE_BUSY_SNAPSHOT, Passes, Passes),
            (ffi::SQLITE_BUSY_TIMEOUT, Passes, Passes),
            (ffi::SQLITE_LOCKED, Stays, Stays),
            (ffi::SQLITE_LOCKED_SHAREDCACHE, Passes, Passes),
            (ffi::SQLITE_LOCKED_VTAB, Stays, Stays),
            (ffi::SQLITE_NOMEM, Passes, Doubt),
            (ffi::SQLITE_READONLY, Stays, Stays),
            (ffi::SQLITE_READONLY_RECOVERY, Stays, Stays),
            (ffi::SQLITE_READONLY_CANTLOCK, Stays, Stays),
            (ffi::SQLITE_READONLY_ROLLBACK, Stays, Stays),
            (ffi::SQLITE_READONLY_DBMOVED, Stays, Stays),
            (ffi::SQLITE_READONLY_CANTINIT, Stays, Stays),
            (ffi::SQLITE_READONLY_DIRECTORY, Stays, Stays),
            (ffi::SQLITE_INTERRUPT, Passes, Doubt),
            (ffi::SQLITE_IOERR, Stays, Doubt),
            (ffi::SQLITE_IOERR_READ, Stays, Doubt),
            (ffi::SQLITE_IOERR_SHORT_READ, Stays, Doubt),
            (ffi::SQLITE_IOERR_WRITE, Stays, Doubt),
            (ffi::SQLITE_IOERR_FSYNC, Stays, Doubt),
            (ffi::SQLITE_IOERR_DIR_FSYNC, Stays, Doubt),
            (ffi::SQLITE_IOERR_TRUNCATE, Stays, Doubt),
            (ffi::SQLITE_IOERR_FSTAT, Stays, Doubt),
            (ffi::SQLITE_IOERR_UNLOCK, Passes, Doubt),
            (ffi::SQLITE_IOERR_RDLOCK, Passes, Doubt),
            (ffi::SQLITE_IOERR_DELETE, Stays, Doubt),
            (ffi::SQLITE_IOERR_BLOCKED, Passes, Doubt),
            (ffi::SQLITE_IOERR_NOMEM, Passes, Doubt),
            (ffi::SQLITE_IOERR_ACCESS, Stays, Doubt),
            (ffi::SQLITE_IOERR_CHECKRESERVEDLOCK, Passes, Doubt),
            (ffi::SQLITE_IOERR_LOCK, Passes, Doubt),
            (ffi::SQLITE_IOERR_CLOSE, Stays, Doubt),
            (ffi::SQLITE_IOERR_SHMOPEN, Stays, Doubt),
            (ffi::SQLITE_IOERR_SHMSIZE, Stays, Doubt),
            (ffi::SQLITE_IOERR_SHMLOCK, Passes, Doubt),
            (ffi::SQLITE_IOERR_SHMMAP, Passes, Doubt),
            (ffi::SQLITE_IOERR_SEEK, Stays, Doubt),
            (ffi::SQLITE_IOERR_MMAP, Passes, Doubt),
            (ffi::SQLITE_IOERR_GETTEMPPATH, Stays, Doubt),
            (ffi::SQLITE_IOERR_VNODE, Stays, Doubt),
            (ffi::SQLITE_IOERR_AUTH, Stays, Doubt),
            (ffi::SQLITE_IOERR_DATA, Stays, Doubt),
            (ffi::SQLITE_IOERR_CORRUPTFS, Stays, Doubt),
            (ffi::SQLITE_IOERR_IN_PAGE, Stays, Doubt),
            (ffi::SQLITE_CORRUPT, Stays, Doubt),
            (ffi::SQLITE_CORRUPT_VTAB, Stays, Doubt),
            (ffi::SQLITE_CORRUPT_SEQUENCE, Stays, Doubt),
            (ffi::SQLITE_CORRUPT_INDEX, Stays, Doubt),
            (ffi::SQLITE_NOTFOUND, Stays, Doubt),
            (ffi::SQLITE_FULL, Stays, Stays),
            (ffi::SQLITE_CANTOPEN, Stays, Doubt),
            (ffi::SQLITE_CANTOPEN_NOTEMPDIR, Stays, Doubt),
            (ffi::SQLITE_CANTOPEN_ISDIR, Stays, Doubt),
            (ffi::SQLITE_CANTOPEN_FULLPATH, Stays, Doubt),
            (ffi::SQLITE_CANTOPEN_CONVPATH, Stays, Doubt),
            (ffi::SQLITE_CANTOPEN_SYMLINK, Stays, Doubt),
            (ffi::SQLITE_PROTOCOL, Passes, Doubt),
            (ffi::SQLITE_EMPTY, Stays, Doubt),
            (ffi::SQLITE_SCHEMA, Passes, Doubt),
            (ffi::SQLITE_TOOBIG, Stays, Doubt),
            (ffi::SQLITE_CONSTRAINT, Stays, Stays),
            (ffi::SQLITE_CONSTRAINT_FOREIGNKEY, Stays, Stays),
            (ffi::SQLITE_CONSTRAINT_TRIGGER, Stays, Stays),
            (ffi::SQLITE_MISMATCH, Stays, Doubt),
            (ffi::SQLITE_MISUSE, Stays, Doubt),
            (ffi::SQLITE_NOLFS, Stays, Doubt),
            (ffi::SQLITE_AUTH, Stays, Doubt),
            (ffi::SQLITE_RANGE, Stays, Doubt),
            (ffi::SQLITE_NOTADB, Stays, Doubt),
            (99, Stays, Doubt),
        ] {
            let found = Meaning::of(&classify("write", sqlite(code)));
            assert_eq!(found, outside, "{code}: {}", sqlite(code));
            let found = Meaning::of(&classify_commit("commit", sqlite(code)));
            assert_eq!(found, in_a_commit, "{code} in a commit: {}", sqlite(code));
            let waits = is_busy(&sqlite(code));
            assert!(!waits || outside == Passes, "{code}: waiting for a lasting error");
        }
    }

    #[test]
    fn running_out_of_descriptors_passes_and_a_missing_folder_does_not() {
        for code in [
            ffi::SQLITE_CANTOPEN,
            ffi::SQLITE_IOERR_SHMOPEN,
            ffi::SQLITE_IOERR_GETTEMPPATH,
        ] {
            assert!(matches!(judge(code, || true), Verdict::Passes(_)), "{code}");
            assert!(matches!(judge(code, || false), Verdict::Stays(_)), "{code}");
        }
        assert!(matches!(judge(ffi::SQLITE_CANTOPEN_ISDIR, || true), Verdict::Stays(_)));
        let reopening = |code| Meaning::of(&classify_reopening("open", sqlite(code)));
        assert_eq!(reopening(ffi::SQLITE_CANTOPEN), Meaning::Passes);
        assert_eq!(reopening(ffi::SQLITE_NOTADB), Meaning::Stays);
    }

    #[test]
    fn backend_errors_are_not_a_handlers_mistakes() {
        for code in [
            ffi::SQLITE_ERROR,
            ffi::SQLITE_ERROR_MISSING_COLLSEQ,
            ffi::SQLITE_CONSTRAINT_UNIQUE,
            ffi::SQLITE_TOOBIG,
            ffi::SQLITE_MISMATCH,
            ffi::SQLITE_RANGE,
            ffi::SQLITE_AUTH,
        ] {
            assert!(is_handlers_mistake(&sqlite(code)), "{code}");
        }
        assert!(is_handlers_mistake(&rusqlite::Error::QueryReturnedNoRows));
        for code in [
            ffi::SQLITE_INTERNAL,
            ffi::SQLITE_PERM,
            ffi::SQLITE_ABORT,
            ffi::SQLITE_BUSY_SNAPSHOT,
            ffi::SQLITE_LOCKED,
            ffi::SQLITE_NOMEM,
            ffi::SQLITE_READONLY,
            ffi::SQLITE_INTERRUPT,
            ffi::SQLITE_IOERR_READ,
            ffi::SQLITE_CORRUPT,
            ffi::SQLITE_FULL,
            ffi::SQLITE_CANTOPEN,
            ffi::SQLITE_PROTOCOL,
            ffi::SQLITE_SCHEMA,
            ffi::SQLITE_NOTADB,
            99,
        ] {
            assert!(!is_handlers_mistake(&sqlite(code)), "{code}");
        }
    }

    #[test]
    fn the_sqlite_error_is_returned_with_and_without_a_hint() {
        for code in [ffi::SQLITE_FULL, ffi::SQLITE_CONSTRAINT_UNIQUE, ffi::SQLITE_BUSY] {
            let error = classify("write", sqlite(code));
            let found = sqlite_error(&error).and_then(rusqlite::Error::sqlite_extended_error_code);
            assert_eq!(found, Some(code));
        }
        assert!(sqlite_error(&Error::failed("x", "y")).is_none());
    }
}
