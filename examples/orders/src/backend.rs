//! Where log and store are opened: the one place to change for another backend.

use std::{path::Path, time::Duration};

use essentially_once::Error;
use essentially_once_sqlite::{
    Sqlite, SqliteLog, SqliteStore,
    rusqlite::{self, Connection},
};

/// Opens the log of orders and the store of the position, both in the file at `path`; creates what is not there.
pub(crate) async fn open(path: &Path) -> Result<(SqliteLog, SqliteStore), Error> {
    let sqlite = Sqlite::open(path).await?;
    Ok((sqlite.log("orders").await?, sqlite.store()))
}

/// Makes the shop's tables.
///
/// They have no unique constraint: it would hide what a delivery does twice. Offsets are kept as text, because a log's offsets are
/// opaque.
pub(crate) fn create_tables(path: &Path) -> rusqlite::Result<()> {
    Connection::open(path)?.execute_batch(
        "CREATE TABLE shipments (log_offset TEXT NOT NULL, order_id TEXT NOT NULL, freight REAL NOT NULL);
         CREATE TABLE rejected (log_offset TEXT NOT NULL, line INTEGER NOT NULL, payload TEXT NOT NULL, reason TEXT NOT NULL);",
    )
}

/// A connection of the shop's own, on which every statement commits by itself.
pub(crate) fn own_connection(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    // The consumer commits its position to the same file meanwhile.
    connection.busy_timeout(Duration::from_secs(10))?;
    // A write survives the death of the process without waiting for the disk, and only processes die here.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    Ok(connection)
}
