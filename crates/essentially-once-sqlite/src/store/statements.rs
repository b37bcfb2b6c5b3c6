//! The SQL on positions, windows and state.

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, Offset,
    backend::{Journal, LogId, Note, Position, Revision, Source},
};
use rusqlite::{Connection, OptionalExtension, Row, types::ValueRef};

/// Stores a first position. Changes no row if the consumer has a position.
pub(super) const INSERT_POSITION: &str = "INSERT INTO main.essentially_once_consumers \
     (consumer, log, incarnation, next_hi, next_lo, epoch, count, owner, passed) \
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT (consumer) DO NOTHING";

/// Moves a position. Changes no row if its revision or its log differs.
pub(super) const UPDATE_POSITION: &str = "UPDATE main.essentially_once_consumers \
     SET incarnation = coalesce(?3, incarnation), next_hi = ?4, next_lo = ?5, epoch = ?6, count = ?7, \
     owner = ?8, passed = ?9 \
     WHERE consumer = ?1 AND epoch = ?10 AND count = ?11 AND log = ?2 \
     AND (incarnation = ?3 OR incarnation IS NULL OR ?3 IS NULL)";

/// Replaces the journal of a position. Few commits have one, so it is no part of the statements
/// above.
pub(super) const PUT_JOURNAL: &str = "UPDATE main.essentially_once_consumers SET journal = ?2 WHERE consumer = ?1";

pub(super) const PUT_WINDOW: &str = "INSERT INTO main.essentially_once_windows \
     (consumer, producer, \"window\") VALUES (?1, ?2, ?3) \
     ON CONFLICT (consumer, producer) DO UPDATE SET \"window\" = excluded.\"window\"";

pub(super) const DELETE_WINDOW: &str =
    "DELETE FROM main.essentially_once_windows WHERE consumer = ?1 AND producer = ?2";

pub(super) const GET_VALUE: &str = "SELECT value FROM main.essentially_once_state WHERE consumer = ?1 AND key = ?2";

pub(super) const PUT_VALUE: &str = "INSERT INTO main.essentially_once_state \
     (consumer, key, value) VALUES (?1, ?2, ?3) \
     ON CONFLICT (consumer, key) DO UPDATE SET value = excluded.value";

pub(super) const DELETE_VALUE: &str = "DELETE FROM main.essentially_once_state WHERE consumer = ?1 AND key = ?2";

/// Writes a beat. An owner that is handling a record holds the write lock, so it cannot run this.
pub(super) const BEAT: &str =
    "UPDATE main.essentially_once_consumers SET beats = beats + 1 WHERE consumer = ?1 AND owner = ?2";

/// Gives the position up.
pub(super) const RELEASE: &str =
    "UPDATE main.essentially_once_consumers SET owner = NULL WHERE consumer = ?1 AND owner = ?2";

/// The row of a position.
pub(super) struct PositionRow {
    log: String,
    incarnation: Option<String>,
    next: Offset,
    pub(super) revision: Revision,
    pub(super) owner: Option<String>,
    note: Option<Vec<u8>>,
    journal: Option<Vec<u8>>,
}

impl PositionRow {
    /// Returns the position without its windows.
    pub(super) fn position(&self) -> Result<Position, Source> {
        let mut position = Position::new(self.log()?, self.next, self.revision);
        position.owner = self.owner.as_deref().map(str::parse).transpose()?;
        position.note = Note::decode(self.note.as_deref().unwrap_or_default());
        position.journal = Journal::decode(self.journal.clone().unwrap_or_default())?;
        Ok(position)
    }

    /// The log that the position belongs to.
    pub(super) fn log(&self) -> Result<LogId, Error> {
        LogId::from_parts(&self.log, self.incarnation.as_deref())
    }
}

/// Reads the row of the consumer's position.
pub(super) fn position_row(connection: &Connection, consumer: &ConsumerId) -> rusqlite::Result<Option<PositionRow>> {
    connection
        .prepare_cached(
            "SELECT log, incarnation, next_hi, next_lo, epoch, count, owner, passed, journal \
             FROM main.essentially_once_consumers WHERE consumer = ?1",
        )?
        .query_row([consumer.as_str()], |row| {
            Ok(PositionRow {
                log: row.get(0)?,
                incarnation: row.get(1)?,
                next: Offset::new(unsigned(row, 2)?, unsigned(row, 3)?),
                revision: Revision::new(unsigned(row, 4)?, unsigned(row, 5)?),
                owner: row.get(6)?,
                note: row.get(7)?,
                journal: row.get(8)?,
            })
        })
        .optional()
}

/// The names of all consumers that have a position, in the order of their bytes. A value that is
/// not text comes back in a form that no name has.
pub(super) fn consumer_names(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare_cached("SELECT consumer FROM main.essentially_once_consumers ORDER BY consumer")?
        .query_map((), |row| {
            let name = row.get_ref(0)?;
            Ok(match name {
                ValueRef::Text(name) => String::from_utf8_lossy(name).into_owned(),
                other => format!("{other:?}"),
            })
        })?
        .collect()
}

/// A position and its windows, not decoded yet.
pub(super) type StoredPosition = (PositionRow, Vec<(String, Vec<u8>)>);

/// Copies the first column of a row.
pub(super) fn bytes_of_first(row: &Row<'_>) -> rusqlite::Result<Bytes> {
    Ok(Bytes::copy_from_slice(row.get_ref(0)?.as_bytes()?))
}

/// Reads the position and its windows in one read transaction.
pub(super) fn read_position(
    connection: &Connection,
    consumer: &ConsumerId,
) -> rusqlite::Result<Option<StoredPosition>> {
    let snapshot = connection.unchecked_transaction()?;
    stored_position(&snapshot, consumer)
}

/// Reads the position and its windows within the caller's transaction.
pub(super) fn stored_position(
    connection: &Connection,
    consumer: &ConsumerId,
) -> rusqlite::Result<Option<StoredPosition>> {
    let Some(row) = position_row(connection, consumer)? else {
        return Ok(None);
    };
    let windows = connection
        .prepare_cached("SELECT producer, \"window\" FROM main.essentially_once_windows WHERE consumer = ?1")?
        .query_map([consumer.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Some((row, windows)))
}

/// Reads a u64 that is stored as the i64 with the same bits.
pub(super) fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(column).map(|number| number as u64)
}
