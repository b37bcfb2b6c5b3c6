//! What SQLite's result codes mean to a caller: try again, change something, or look at the position.

use std::{error, fmt, path::Path};

use essentially_once::Error;
use rusqlite::{ErrorCode, ffi};

/// The SQLite error beneath an error of this crate, to tell a constraint violation from a mistake in the SQL.
///
/// ```
/// # use essentially_once_sqlite::rusqlite::ErrorCode;
/// # fn example(error: &essentially_once::Error) -> bool {
/// let code = essentially_once_sqlite::sqlite_error(error).and_then(|error| error.sqlite_error_code());
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

/// An error from anywhere but a COMMIT: nothing was applied.
pub(crate) fn classify(action: impl Into<String>, error: rusqlite::Error) -> Error {
    let Some(code) = error.sqlite_error_code() else {
        return Error::failed(action, error);
    };
    let hint = match code {
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed => {
            return Error::unavailable(
                action,
                Cause::new(
                    error,
                    "another process or connection holds the lock; a longer busy_timeout waits longer",
                ),
            );
        }
        ErrorCode::OperationInterrupted | ErrorCode::OutOfMemory | ErrorCode::SchemaChanged => {
            return Error::unavailable(action, error);
        }
        ErrorCode::ReadOnly => "make the file and its folder writable for this user",
        ErrorCode::PermissionDenied => "give this user the right to read and write the file and its folder",
        ErrorCode::CannotOpen => "check that the folder exists and that this user may create files in it",
        ErrorCode::NotADatabase => "the file is no SQLite database (or an encrypted one): choose another path",
        ErrorCode::DatabaseCorrupt => "the file is damaged: stop all writers and restore it from a backup",
        ErrorCode::DiskFull => "the disk (or max_page_count) is full: make room, then go on",
        ErrorCode::SystemIoFailure => "the disk or file system reported an error: check its health and free space",
        ErrorCode::AuthorizationForStatementDenied => {
            "a handler cannot begin or end transactions, attach databases, set pragmas, write to sqlite_sequence, \
             use names that begin with essentially_once_, or write to such tables or refer to them by foreign \
             key; savepoints are allowed"
        }
        _ => return Error::failed(action, error),
    };
    Error::failed(action, Cause::new(error, hint))
}

/// An error from a COMMIT: only some codes promise that nothing was applied.
pub(crate) fn classify_commit(action: impl Into<String>, error: rusqlite::Error) -> Error {
    match error.sqlite_error_code() {
        Some(
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::DiskFull
            | ErrorCode::ReadOnly
            // A deferred foreign key that is still violated.
            | ErrorCode::ConstraintViolation,
        ) => classify(action, error),
        _ => Error::indeterminate(action, error),
    }
}

/// Whether waiting for a lock may help. It includes a lock that recovery holds for a moment after a crash.
pub(crate) fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed)
    )
}

/// Whether a handler's statement failed by its own mistake: one in the SQL, the parameters or the
/// reading of a row, a violated constraint, or a refusal by the guard. Everything else is trouble of the
/// backend, after which nothing is known of what the statement would have read or written.
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
        // A mistake in the SQL has a code, and no name of its own; so has every unknown code.
        ErrorCode::Unknown => failure.extended_code & 0xff == ffi::SQLITE_ERROR,
        _ => false,
    }
}

/// `orders of /var/lib/x.db`, so that every error names the file.
pub(crate) fn on(what: impl fmt::Display, path: &Path) -> String {
    format!("{what} ({})", path.display())
}

/// A SQLite error with what to do about it.
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

    #[test]
    fn only_codes_that_promise_nothing_was_applied_escape_indeterminate() {
        for code in [
            ffi::SQLITE_IOERR_FSYNC,
            ffi::SQLITE_CORRUPT,
            ffi::SQLITE_NOMEM,
            ffi::SQLITE_INTERRUPT,
        ] {
            assert!(
                matches!(classify_commit("commit", sqlite(code)), Error::Indeterminate { .. }),
                "{code}"
            );
        }
        assert!(matches!(
            classify_commit("commit", sqlite(ffi::SQLITE_BUSY)),
            Error::Unavailable { .. }
        ));
        for code in [
            ffi::SQLITE_FULL,
            ffi::SQLITE_CONSTRAINT_FOREIGNKEY,
            ffi::SQLITE_READONLY,
        ] {
            assert!(
                matches!(classify_commit("commit", sqlite(code)), Error::Failed { .. }),
                "{code}"
            );
        }
    }

    #[test]
    fn trouble_of_the_backend_is_told_from_a_handlers_mistake() {
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
    fn the_sqlite_error_can_be_had_with_and_without_a_hint() {
        for code in [ffi::SQLITE_FULL, ffi::SQLITE_CONSTRAINT_UNIQUE, ffi::SQLITE_BUSY] {
            let error = classify("write", sqlite(code));
            let found = sqlite_error(&error).and_then(rusqlite::Error::sqlite_extended_error_code);
            assert_eq!(found, Some(code));
        }
        assert!(sqlite_error(&Error::failed("x", "y")).is_none());
    }
}
