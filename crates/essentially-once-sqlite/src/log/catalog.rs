//! The row of each log in `essentially_once_logs`.

use rusqlite::{Connection, OptionalExtension};

use super::retention::{RetentionColumns, from_columns};

/// What the row of a log says.
pub(super) struct Found {
    pub(super) id: i64,
    pub(super) incarnation: String,
    pub(super) retention: RetentionColumns,
}

/// Reads the row of the log of that name.
pub(super) fn find(connection: &Connection, name: &str) -> rusqlite::Result<Option<Found>> {
    connection
        .prepare_cached(
            "SELECT id, incarnation, keep_records, keep_age_ms FROM main.essentially_once_logs WHERE name = ?1",
        )?
        .query_row([name], |row| {
            Ok(Found {
                id: row.get(0)?,
                incarnation: row.get(1)?,
                retention: (row.get(2)?, row.get(3)?),
            })
        })
        .optional()
}

/// Finds or creates the log in a write transaction, and stores `retention` if there is one. Returns
/// `None` if the log must exist and does not.
pub(super) fn open(
    connection: &Connection,
    name: &str,
    must_exist: bool,
    retention: Option<RetentionColumns>,
) -> rusqlite::Result<Option<Found>> {
    // Another handle may have created the log while this one waited for the lock.
    let stored = find(connection, name)?;
    if let (Some(stored), Some(wanted)) = (&stored, retention)
        && stored.retention != wanted
    {
        let (before, after) = (from_columns(stored.retention), from_columns(wanted));
        tracing::warn!(
            log = name,
            ?before,
            ?after,
            "changing which records the log keeps, for all processes"
        );
    }
    let found = match stored {
        Some(found) => found,
        None if must_exist => return Ok(None),
        None => create(connection, name)?,
    };
    if let Some((records, age_ms)) = retention {
        connection.execute(
            "UPDATE main.essentially_once_logs SET keep_records = ?1, keep_age_ms = ?2 WHERE id = ?3",
            (records, age_ms, found.id),
        )?;
    }
    Ok(Some(found))
}

/// Finds or creates the log in a write transaction.
pub(super) fn find_or_create(connection: &Connection, name: &str) -> rusqlite::Result<Found> {
    match find(connection, name)? {
        Some(found) => Ok(found),
        None => create(connection, name),
    }
}

fn create(connection: &Connection, name: &str) -> rusqlite::Result<Found> {
    let (id, incarnation) = connection.query_row(
        "INSERT INTO main.essentially_once_logs (name, incarnation, next) VALUES (?1, lower(hex(randomblob(8))), 0) \
             RETURNING id, incarnation",
        [name],
        |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)),
    )?;
    connection.execute_batch(&format!(
        "CREATE TABLE main.essentially_once_log_{id} (
             \"offset\" INTEGER PRIMARY KEY,
             appended_at INTEGER NOT NULL DEFAULT (CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)),
             key BLOB,
             headers BLOB,
             payload BLOB NOT NULL,
             producer TEXT,
             sequence INTEGER
         )"
    ))?;
    Ok(Found {
        id,
        incarnation,
        retention: (None, None),
    })
}

/// The number of logs that an error lists.
const NAMED: usize = 20;

/// Returns the names of the logs in order, at most one more than an error lists.
pub(super) fn names(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare_cached("SELECT name FROM main.essentially_once_logs ORDER BY name LIMIT ?1")?
        .query_map([NAMED as i64 + 1], |row| row.get(0))?
        .collect()
}

/// Explains that no log has the wanted name.
pub(super) fn no_such_log(names: &[String]) -> String {
    if names.is_empty() {
        return "no log has that name, and the file holds no other log; check the path and the name".into();
    }
    let rest = if names.len() > NAMED { " and others" } else { "" };
    let names = names[..names.len().min(NAMED)].join(", ");
    format!("no log has that name; the file holds {names}{rest}; check the name")
}
