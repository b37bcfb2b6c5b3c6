//! Appends: one statement that takes the numbers from the log's row and inserts the records.

use essentially_once::{Error, NewRecord, backend::encode_headers};
use tokio_postgres::{Transaction, types::ToSql};

use crate::error::Fault;

/// The most bytes of one append. A message of the protocol has at most 1 GiB.
pub(super) const MOST_BYTES: usize = 512 * 1024 * 1024;

/// Appends records that keep their origins. The lock on the log's row makes the order of the
/// offsets that of the commits. Returns no row if the log was deleted or recreated. A handler may
/// have changed the session's `synchronous_commit`.
pub(super) const APPEND: &str = "WITH log AS (
         UPDATE {s}.logs SET next = next + $3 WHERE id = $1 AND incarnation = $2
         RETURNING next, keep_records IS NOT NULL OR keep_age_ms IS NOT NULL AS has_retention
     ), added AS (
         INSERT INTO {s}.records (log, \"offset\", key, headers, payload, producer, sequence)
         SELECT $1, log.next - $3 + r.place - 1, r.key, r.headers, r.payload, r.producer, r.sequence
         FROM log, unnest($4::bytea[], $5::bytea[], $6::bytea[], $7::text[], $8::bigint[])
             WITH ORDINALITY AS r (key, headers, payload, producer, sequence, place)
     )
     SELECT next, has_retention,
         CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', true) END
     FROM log";

/// Appends records to which it gives origins: the log's sender, and the offset. Divides by zero if
/// the log was deleted or recreated, so that the rest of the transaction is not applied.
pub(super) const SEND: &str = "WITH log AS (
         UPDATE {s}.logs SET next = next + $3 WHERE id = $1 AND incarnation = $2 AND sender IS NOT NULL
         RETURNING next, sender
     ), added AS (
         INSERT INTO {s}.records (log, \"offset\", key, headers, payload, producer, sequence)
         SELECT $1, log.next - $3 + r.place - 1, r.key, r.headers, r.payload, log.sender, log.next - $3 + r.place - 1
         FROM log, unnest($4::bytea[], $5::bytea[], $6::bytea[]) WITH ORDINALITY AS r (key, headers, payload, place)
     )
     SELECT 1 / count(*) FROM log";

/// Like [`SEND`], for a transaction of the user. Appends nothing if the commit would not wait for
/// the disk, and says so.
const APPEND_IN: &str = "WITH log AS (
         UPDATE {s}.logs SET next = next + $3 WHERE id = $1 AND incarnation = $2 AND sender IS NOT NULL
             AND current_setting('synchronous_commit') <> 'off'
         RETURNING next, sender
     ), added AS (
         INSERT INTO {s}.records (log, \"offset\", key, headers, payload, producer, sequence)
         SELECT $1, log.next - $3 + r.place - 1, r.key, r.headers, r.payload, log.sender, log.next - $3 + r.place - 1
         FROM log, unnest($4::bytea[], $5::bytea[], $6::bytea[]) WITH ORDINALITY AS r (key, headers, payload, place)
     )
     SELECT (SELECT next FROM log), current_setting('synchronous_commit') <> 'off'";

/// What an append in a transaction of the user has done.
pub(super) enum AppendedIn {
    /// Appended, and this is one past the last offset.
    Next(i64),
    /// Refused, because the transaction's commit does not wait for the disk.
    Volatile,
    /// The log was not found.
    NoLog,
}

/// The columns of some records, as arrays for one statement.
pub(super) struct Columns<'a> {
    pub(super) count: i64,
    pub(super) keys: Vec<Option<&'a [u8]>>,
    pub(super) headers: Vec<Option<Vec<u8>>>,
    pub(super) payloads: Vec<&'a [u8]>,
    producers: Vec<Option<String>>,
    sequences: Vec<Option<i64>>,
}

impl<'a> Columns<'a> {
    pub(super) fn of(records: &'a [NewRecord]) -> Self {
        Self {
            count: records.len() as i64,
            keys: records.iter().map(|record| record.key.as_deref()).collect(),
            headers: records.iter().map(|record| encode_headers(&record.headers)).collect(),
            payloads: records.iter().map(|record| &record.payload[..]).collect(),
            producers: Vec::new(),
            sequences: Vec::new(),
        }
    }

    /// Adds the origins of the records.
    pub(super) fn with_origins(mut self, records: &[NewRecord]) -> Self {
        let origins = || records.iter().map(|record| record.origin.as_ref());
        self.producers = origins()
            .map(|origin| origin.map(|origin| origin.numbering.to_string()))
            .collect();
        self.sequences = origins()
            .map(|origin| origin.map(|origin| origin.sequence as i64))
            .collect();
        self
    }

    /// The parameters of [`APPEND`].
    pub(super) fn params<'p>(&'p self, row: &'p i64, incarnation: &'p &'p str) -> [&'p (dyn ToSql + Sync); 8] {
        [
            row,
            incarnation,
            &self.count,
            &self.keys,
            &self.headers,
            &self.payloads,
            &self.producers,
            &self.sequences,
        ]
    }
}

/// Refuses more bytes than one statement can carry.
pub(super) fn check_batch(records: &[NewRecord], action: impl Fn() -> String) -> Result<(), Error> {
    let bytes: usize = records.iter().map(NewRecord::size).sum();
    if bytes <= MOST_BYTES {
        return Ok(());
    }
    let reason = format!("{bytes} bytes at once are over the limit of {MOST_BYTES}; append fewer records per call");
    Err(Error::failed(action(), reason))
}

/// Appends numbered records in a transaction of the user.
pub(super) async fn append_in(
    tx: &Transaction<'_>,
    schema: &str,
    row: i64,
    incarnation: &str,
    records: &[NewRecord],
) -> Result<AppendedIn, Fault> {
    let columns = Columns::of(records);
    let sql = APPEND_IN.replace("{s}", &format!("\"{schema}\""));
    let [row, incarnation, count, keys, headers, payloads, ..] = columns.params(&row, &incarnation);
    let row = tx
        .query_one(&sql, &[row, incarnation, count, keys, headers, payloads])
        .await;
    let row = row.map_err(|error| Fault::Postgres { part: None, error })?;
    Ok(match (row.get(0), row.get(1)) {
        (_, false) => AppendedIn::Volatile,
        (Some(next), true) => AppendedIn::Next(next),
        (None, true) => AppendedIn::NoLog,
    })
}
