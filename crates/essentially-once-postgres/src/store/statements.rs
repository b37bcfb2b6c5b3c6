//! The SQL on positions, windows and state. `{s}` is replaced by the schema.

use bytes::Bytes;
use essentially_once::{
    Error, Offset,
    backend::{Journal, LogId, Note, Position, Revision, Source, Window},
};
use tokio_postgres::Row;

/// Stores a first position. Divides by zero if the consumer has a position, so that the rest of the
/// transaction is not applied.
pub(super) const INSERT_POSITION: &str = "WITH moved AS (
         INSERT INTO {s}.consumers (consumer, log, incarnation, next_hi, next_lo, epoch, count, owner, note, journal)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (consumer) DO NOTHING RETURNING 1
     )
     SELECT 1 / count(*),
         CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', true) END
     FROM moved";

/// Moves a position. Divides by zero if its revision or its log differs. A handler may have changed
/// the session's `synchronous_commit`.
pub(super) const UPDATE_POSITION: &str = "WITH moved AS (
         UPDATE {s}.consumers SET incarnation = coalesce($3, incarnation), next_hi = $4, next_lo = $5, epoch = $6,
             count = $7, owner = $8, note = $9, journal = coalesce($10, journal)
         WHERE consumer = $1 AND epoch = $11 AND count = $12 AND log = $2
             AND (incarnation = $3 OR incarnation IS NULL OR $3::text IS NULL)
         RETURNING 1
     )
     SELECT 1 / count(*),
         CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', true) END
     FROM moved";

pub(super) const PUT_WINDOWS: &str = "INSERT INTO {s}.windows (consumer, producer, bits)
     SELECT $1, w.producer, w.bits FROM unnest($2::text[], $3::bytea[]) AS w (producer, bits)
     ON CONFLICT (consumer, producer) DO UPDATE SET bits = excluded.bits";

pub(super) const DELETE_WINDOWS: &str = "DELETE FROM {s}.windows WHERE consumer = $1 AND producer = ANY($2::text[])";

pub(super) const REVISION: &str = "SELECT epoch, count FROM {s}.consumers WHERE consumer = $1";

/// The state if it is small, and otherwise the beginning of it, with the number of rows that were
/// looked at. There is a row unless the state is empty.
pub(super) const SMALL_STATE: &str = "SELECT key, value, total FROM (
         SELECT key, value, count(*) OVER () AS total,
             sum(octet_length(key) + octet_length(value)) OVER (ORDER BY key) AS bytes
         FROM (SELECT key, value FROM {s}.state WHERE consumer = $1 ORDER BY key LIMIT 10001) AS first
     ) AS sized
     WHERE bytes <= $2 OR bytes = octet_length(key) + octet_length(value)";

pub(super) const GET_VALUE: &str = "SELECT value FROM {s}.state WHERE consumer = $1 AND key = $2";

/// The values of some keys, in the order of the keys.
pub(super) const GET_VALUES: &str = "SELECT state.value FROM unnest($2::bytea[]) WITH ORDINALITY AS wanted (key, place)
     LEFT JOIN {s}.state ON state.consumer = $1 AND state.key = wanted.key ORDER BY wanted.place";

pub(super) const PUT_VALUES: &str = "INSERT INTO {s}.state (consumer, key, value)
     SELECT $1, e.key, e.value FROM unnest($2::bytea[], $3::bytea[]) AS e (key, value)
     ON CONFLICT (consumer, key) DO UPDATE SET value = excluded.value";

pub(super) const DELETE_VALUES: &str = "DELETE FROM {s}.state WHERE consumer = $1 AND key = ANY($2::bytea[])";

/// The position with its windows. One statement sees one commit.
pub(super) const POSITION: &str = "SELECT log, incarnation, next_hi, next_lo, epoch, count, owner, note, journal,
         (SELECT array_agg(producer ORDER BY producer) FROM {s}.windows w WHERE w.consumer = c.consumer),
         (SELECT array_agg(bits ORDER BY producer) FROM {s}.windows w WHERE w.consumer = c.consumer)
     FROM {s}.consumers c WHERE consumer = $1";

pub(super) const CONSUMERS: &str = "SELECT consumer FROM {s}.consumers ORDER BY consumer";

/// Writes a beat. It has a table of its own, because a changed row of the position would fail an
/// open transaction that does not read committed changes.
pub(super) const BEAT: &str = "INSERT INTO {s}.pulses AS p (consumer, beats)
     SELECT consumer, 1 FROM {s}.consumers WHERE consumer = $1 AND owner = $2
     ON CONFLICT (consumer) DO UPDATE SET beats = p.beats + 1";

pub(super) const PULSE: &str = "SELECT next_hi, next_lo, epoch, count, owner, beats
     FROM {s}.consumers LEFT JOIN {s}.pulses USING (consumer) WHERE consumer = $1";

/// Gives the position up.
pub(super) const RELEASE: &str = "UPDATE {s}.consumers SET owner = NULL WHERE consumer = $1 AND owner = $2";

/// The log that a row of [`POSITION`] belongs to.
pub(super) fn log_of(row: &Row) -> Result<LogId, Source> {
    let (name, incarnation): (&str, Option<&str>) = (row.try_get(0)?, row.try_get(1)?);
    Ok(LogId::from_parts(name, incarnation)?)
}

/// The revision in a row of [`POSITION`].
pub(super) fn revision_of(row: &Row) -> Result<Revision, Source> {
    Ok(Revision::new(unsigned(row, 4)?, unsigned(row, 5)?))
}

/// Decodes a row of [`POSITION`].
pub(super) fn position_of(row: &Row) -> Result<Position, Source> {
    let next = Offset::new(unsigned(row, 2)?, unsigned(row, 3)?);
    let mut position = Position::new(log_of(row)?, next, revision_of(row)?);
    position.owner = row.try_get::<_, Option<&str>>(6)?.map(str::parse).transpose()?;
    position.note = Note::decode(row.try_get::<_, Option<&[u8]>>(7)?.unwrap_or_default());
    let journal: Option<&[u8]> = row.try_get(8)?;
    position.journal = Journal::decode(Bytes::copy_from_slice(journal.unwrap_or_default()))?;
    let producers: Option<Vec<&str>> = row.try_get(9)?;
    let windows: Option<Vec<&[u8]>> = row.try_get(10)?;
    for (producer, window) in producers.unwrap_or_default().iter().zip(windows.unwrap_or_default()) {
        position.windows.push((producer.parse()?, Window::decode(window)?));
    }
    Ok(position)
}

/// Reads a u64 that is stored as the bigint with the same bits.
pub(super) fn unsigned(row: &Row, column: usize) -> Result<u64, tokio_postgres::Error> {
    row.try_get::<_, i64>(column).map(|number| number as u64)
}

/// Turns the rows of [`POSITION`] into a position.
pub(super) fn position(rows: &[Row], action: impl Fn() -> String) -> Result<Option<Position>, Error> {
    let position = rows.first().map(position_of).transpose();
    position.map_err(|error| Error::failed(action(), error))
}
