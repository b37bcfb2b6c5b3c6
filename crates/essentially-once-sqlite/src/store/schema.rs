//! Creates and migrates this crate's tables. It leaves the user's tables and `user_version` alone.

use std::path::Path;

use essentially_once::Error;
use rusqlite::{Connection, OptionalExtension};

use crate::error::{classify, on};

/// The prefix of this crate's table names.
pub(crate) const PREFIX: &str = "essentially_once_";

/// Each entry migrates a file from the version of its index to the next one.
///
/// An entry may only create tables and add columns. A user's view may read this crate's tables, and
/// SQLite refuses to rename a table or column while any view in the file cannot be resolved.
const MIGRATIONS: &[&str] = &[
    // A u64 is stored as the i64 with the same bits. `next` is one past the last record ever
    // appended. Ids are never reused, so that the remains of a deleted log's table are never read
    // as another log.
    "CREATE TABLE main.essentially_once_logs (
         id INTEGER PRIMARY KEY AUTOINCREMENT,
         name TEXT NOT NULL UNIQUE,
         incarnation TEXT NOT NULL,
         next INTEGER NOT NULL,
         keep_records INTEGER,
         keep_age_ms INTEGER
     );
     CREATE TABLE main.essentially_once_positions (
         consumer TEXT NOT NULL PRIMARY KEY,
         log TEXT NOT NULL,
         incarnation TEXT,
         next_hi INTEGER NOT NULL,
         next_lo INTEGER NOT NULL,
         revision INTEGER NOT NULL
     );
     CREATE TABLE main.essentially_once_windows (
         consumer TEXT NOT NULL,
         producer TEXT NOT NULL,
         \"window\" BLOB NOT NULL,
         PRIMARY KEY (consumer, producer)
     ) WITHOUT ROWID;
     CREATE TABLE main.essentially_once_state (
         consumer TEXT NOT NULL,
         key BLOB NOT NULL,
         value BLOB NOT NULL,
         PRIMARY KEY (consumer, key)
     ) WITHOUT ROWID;",
    // A process of the previous version compares counts without epochs, so it must not commit any
    // more. The triggers stop it. The old table stays unchanged, because views and foreign keys of
    // the user may refer to it.
    "CREATE TABLE main.essentially_once_consumers (
         consumer TEXT NOT NULL PRIMARY KEY,
         log TEXT NOT NULL,
         incarnation TEXT,
         next_hi INTEGER NOT NULL,
         next_lo INTEGER NOT NULL,
         epoch INTEGER NOT NULL,
         count INTEGER NOT NULL,
         owner TEXT,
         passed BLOB
     );
     INSERT INTO main.essentially_once_consumers (consumer, log, incarnation, next_hi, next_lo, epoch, count)
         SELECT consumer, log, incarnation, next_hi, next_lo, 0, revision FROM main.essentially_once_positions;
     CREATE TRIGGER main.essentially_once_positions_insert BEFORE INSERT ON essentially_once_positions
         BEGIN SELECT RAISE(ABORT, 'a newer essentially-once-sqlite uses this file: upgrade this program'); END;
     CREATE TRIGGER main.essentially_once_positions_update BEFORE UPDATE ON essentially_once_positions
         BEGIN SELECT RAISE(ABORT, 'a newer essentially-once-sqlite uses this file: upgrade this program'); END;",
    // A process of the previous version names its columns, so it keeps working next to newer ones.
    // It writes no beats.
    "ALTER TABLE main.essentially_once_consumers ADD COLUMN beats INTEGER NOT NULL DEFAULT 0;",
    // A process of the previous version ignores dead letters: it handles later records of a key
    // whose earlier ones were parked. Times are in milliseconds since 1970. `place` is the offset
    // as 16 big-endian bytes, since the two integers, which are for people, do not sort as u64.
    "CREATE TABLE main.essentially_once_letters (
         consumer TEXT NOT NULL,
         place BLOB NOT NULL,
         offset_hi INTEGER NOT NULL,
         offset_lo INTEGER NOT NULL,
         appended_at INTEGER NOT NULL,
         key BLOB,
         headers BLOB,
         payload BLOB NOT NULL,
         producer TEXT,
         sequence INTEGER,
         malformed TEXT,
         tries INTEGER NOT NULL,
         first_reason TEXT NOT NULL,
         last_reason TEXT NOT NULL,
         parked_at INTEGER NOT NULL,
         last_failed_at INTEGER NOT NULL,
         due_at INTEGER,
         version INTEGER NOT NULL,
         PRIMARY KEY (consumer, place)
     );
     CREATE INDEX main.essentially_once_letters_by_key ON essentially_once_letters (consumer, key, place)
         WHERE key IS NOT NULL AND malformed IS NULL;
     CREATE INDEX main.essentially_once_letters_by_due ON essentially_once_letters (consumer, due_at, place)
         WHERE due_at IS NOT NULL;",
    // A process of the previous version names its columns, so it keeps working next to newer ones.
    // It keeps the journal, but does not know that the consumer may be paused. It would forget the
    // original of an edited letter that fails again, so the trigger stops it there. A process of
    // this version never writes NULL as the edit.
    "ALTER TABLE main.essentially_once_consumers ADD COLUMN journal BLOB;
     ALTER TABLE main.essentially_once_letters ADD COLUMN edit BLOB;
     CREATE TRIGGER main.essentially_once_letters_insert BEFORE INSERT ON essentially_once_letters
         WHEN NEW.edit IS NULL AND EXISTS (SELECT 1 FROM essentially_once_letters
             WHERE consumer = NEW.consumer AND place = NEW.place AND length(edit) > 0)
         BEGIN SELECT RAISE(ABORT, 'a newer essentially-once-sqlite edited this letter: upgrade this program'); END;",
    // The producer of the records that transactions send to the log; NULL before the first one. A
    // process of the previous version names its columns, so it keeps working next to newer ones. It
    // appends to such a log without numbering.
    "ALTER TABLE main.essentially_once_logs ADD COLUMN sender TEXT;",
];

/// Refuses a file that a newer version of this crate made. Only reads.
pub(crate) fn check(connection: &Connection, path: &Path) -> Result<(), Error> {
    let failed = |error| classify(on("open SQLite file", path), error);
    refuse_newer(version(connection).map_err(failed)?, path)
}

/// Refuses a file that this version of the crate did not make. Only reads.
pub(crate) fn require(connection: &Connection, path: &Path) -> Result<(), Error> {
    let action = || on("open SQLite file", path);
    let reason = match version(connection).map_err(|error| classify(action(), error))? {
        version if version == MIGRATIONS.len() as i64 => return Ok(()),
        0 => "the file has no essentially_once tables; check the path".into(),
        version => format!(
            "the essentially_once tables have schema version {version}, and this program would have to migrate them to \
             {}; upgrade the services that use the file first",
            MIGRATIONS.len()
        ),
    };
    Err(Error::failed(action(), reason))
}

/// Migrates the file to this crate's schema in one transaction. Several processes may do this
/// concurrently.
pub(crate) fn migrate(connection: &Connection, path: &Path) -> Result<(), Error> {
    let failed = |error| classify(on("create tables in SQLite file", path), error);
    if version(connection).map_err(failed)? == MIGRATIONS.len() as i64 {
        return Ok(());
    }
    connection.execute_batch("BEGIN IMMEDIATE").map_err(failed)?;
    // Another process may have migrated the file while this one waited for the lock.
    let migrated = version(connection).map_err(failed).and_then(|version| {
        refuse_newer(version, path)?;
        apply_from(connection, version).map_err(failed)
    });
    if migrated.is_err() {
        // The caller drops the connection on error, which also rolls back.
        let _ = connection.execute_batch("ROLLBACK");
    }
    migrated
}

fn apply_from(connection: &Connection, version: i64) -> rusqlite::Result<()> {
    if version == 0 {
        connection.execute_batch(
            "CREATE TABLE IF NOT EXISTS main.essentially_once_meta (name TEXT NOT NULL PRIMARY KEY, value INTEGER NOT NULL)",
        )?;
    }
    for migration in MIGRATIONS.iter().skip(usize::try_from(version).unwrap_or(0)) {
        connection.execute_batch(migration)?;
    }
    connection.execute(
        "INSERT INTO main.essentially_once_meta (name, value) VALUES ('schema', ?1)
         ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        [MIGRATIONS.len() as i64],
    )?;
    connection.execute_batch("COMMIT")
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    let known: bool = connection.query_row(
        "SELECT EXISTS (SELECT 1 FROM main.sqlite_master WHERE type = 'table' AND name = 'essentially_once_meta')",
        [],
        |row| row.get(0),
    )?;
    if !known {
        return Ok(0);
    }
    let version = connection
        .query_row(
            "SELECT value FROM main.essentially_once_meta WHERE name = 'schema'",
            [],
            |row| row.get(0),
        )
        .optional()?;
    Ok(version.unwrap_or(0))
}

fn refuse_newer(version: i64, path: &Path) -> Result<(), Error> {
    let known = MIGRATIONS.len() as i64;
    if (0..=known).contains(&version) {
        return Ok(());
    }
    Err(Error::failed(
        on("open SQLite file", path),
        format!(
            "the essentially_once tables have schema version {version}, but this program supports versions up to \
             {known}; use a newer essentially-once-sqlite, or another file"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrating_is_repeatable_and_leaves_the_users_things_alone() {
        let connection = Connection::open_in_memory().expect("open");
        connection
            .execute_batch("PRAGMA user_version = 7; CREATE TABLE orders (id)")
            .expect("user's schema");
        for _ in 0..2 {
            migrate(&connection, Path::new("x.db")).expect("migrate");
            check(&connection, Path::new("x.db")).expect("check");
        }
        let user_version: i64 = connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .expect("user_version");
        assert_eq!(user_version, 7);
        assert!(connection.is_autocommit());
    }

    #[test]
    fn newer_schema_is_refused_naming_both_versions() {
        let connection = Connection::open_in_memory().expect("open");
        migrate(&connection, Path::new("x.db")).expect("migrate");
        connection
            .execute("UPDATE essentially_once_meta SET value = 999", [])
            .expect("update");
        for result in [
            check(&connection, Path::new("x.db")),
            migrate(&connection, Path::new("x.db")),
        ] {
            let error = result.expect_err("newer").to_string();
            assert!(
                error.contains("999") && error.contains("up to 6") && error.contains("x.db"),
                "{error}"
            );
        }
        assert!(connection.is_autocommit());
    }
}
