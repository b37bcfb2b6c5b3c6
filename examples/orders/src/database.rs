//! The program's own connections to its SQLite files, next to those of the library.

use std::{path::Path, time::Duration};

use essentially_once_sqlite::rusqlite::{self, Connection, ErrorCode};

use crate::Failure;

/// Opens a file, and waits for the library's commits to the same file.
pub(crate) fn open(path: &Path) -> Result<Connection, Failure> {
    let opened = Connection::open(path).and_then(|connection| {
        connection.busy_timeout(Duration::from_secs(10))?;
        Ok(connection)
    });
    opened.map_err(|error| explain("open", path, error))
}

/// Says what failed, in which file, and what to do about it.
pub(crate) fn explain(action: &str, path: &Path, error: rusqlite::Error) -> Failure {
    let advice = match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy) => "end the process that keeps the file locked",
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            "make the file and its folder writable for this user"
        }
        Some(ErrorCode::DiskFull) => "make room on the disk",
        Some(ErrorCode::SystemIoFailure) => "check the disk's health and free space",
        _ => "check what else writes to the file",
    };
    format!("{action} ({}): {error}; {advice}, then run again", path.display()).into()
}
