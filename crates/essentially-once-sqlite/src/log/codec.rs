//! Decodes rows into records. A row edited by hand becomes a malformed record, never an error or a
//! panic.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use essentially_once::{
    Origin, Record,
    backend::{FetchBuffer, NumberingCache, decode_headers},
};
use rusqlite::{Row, types::ValueRef};

/// The columns in the order in which [`Columns`] reads them.
pub(super) const COLUMNS: &str = "\"offset\", appended_at, key, headers, payload, producer, sequence";

/// One row. Each column is fetched once, because this runs for every record.
pub(super) struct Columns<'r> {
    pub(super) offset: u64,
    appended_at: ValueRef<'r>,
    key: ValueRef<'r>,
    headers: ValueRef<'r>,
    payload: ValueRef<'r>,
    producer: ValueRef<'r>,
    sequence: ValueRef<'r>,
}

impl<'r> Columns<'r> {
    /// Reads the current row of a query for [`COLUMNS`].
    pub(super) fn of(row: &'r Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            offset: row.get::<_, i64>(0)? as u64,
            appended_at: row.get_ref(1)?,
            key: row.get_ref(2)?,
            headers: row.get_ref(3)?,
            payload: row.get_ref(4)?,
            producer: row.get_ref(5)?,
            sequence: row.get_ref(6)?,
        })
    }

    /// The size of key, headers and payload, in bytes.
    pub(super) fn size(&self) -> usize {
        [self.key, self.headers, self.payload]
            .iter()
            .map(|value| match value {
                ValueRef::Blob(bytes) | ValueRef::Text(bytes) => bytes.len(),
                _ => 0,
            })
            .sum()
    }
}

/// Decodes the rows of one fetch.
pub(super) struct Decoder<'a> {
    buffer: FetchBuffer,
    numberings: &'a mut NumberingCache,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(capacity: usize, numberings: &'a mut NumberingCache) -> Self {
        Self {
            buffer: FetchBuffer::with_capacity(capacity),
            numberings,
        }
    }

    /// The number of bytes in the buffer, as an estimate for the next fetch.
    pub(super) fn buffered(&self) -> usize {
        self.buffer.copied()
    }

    pub(super) fn record(&mut self, columns: &Columns<'_>) -> Record {
        let mut malformed = None;
        let mut note = |reason: &str| {
            malformed.get_or_insert_with(|| reason.into());
        };
        let appended_at = time(columns.appended_at).unwrap_or_else(|reason| {
            note(reason);
            UNIX_EPOCH
        });
        let key = match columns.key {
            ValueRef::Null => None,
            value => Some(self.bytes(value).unwrap_or_else(|raw| {
                note("the key is neither BLOB nor TEXT");
                raw
            })),
        };
        let headers = match columns.headers {
            ValueRef::Null => Ok(Vec::new()),
            value => match self.bytes(value) {
                Ok(bytes) => decode_headers(&bytes),
                Err(_) => Err("the headers are not a BLOB"),
            },
        };
        let headers = headers.unwrap_or_else(|reason| {
            note(reason);
            Vec::new()
        });
        let payload = self.bytes(columns.payload).unwrap_or_else(|raw| {
            note("the payload is neither BLOB nor TEXT");
            raw
        });
        let origin = self
            .origin(columns.producer, columns.sequence)
            .unwrap_or_else(|reason| {
                note(&reason);
                None
            });
        let mut record = Record::new(columns.offset.into(), appended_at, payload);
        record.key = key;
        record.headers = headers;
        record.origin = origin;
        record.malformed = malformed;
        record
    }

    /// The bytes of a BLOB or TEXT. For another type, `Err` with a readable form of the value.
    fn bytes(&mut self, value: ValueRef<'_>) -> Result<Bytes, Bytes> {
        match value {
            ValueRef::Blob(bytes) | ValueRef::Text(bytes) => Ok(self.buffer.copy(bytes)),
            ValueRef::Null => Err(Bytes::new()),
            ValueRef::Integer(number) => Err(number.to_string().into()),
            ValueRef::Real(number) => Err(number.to_string().into()),
        }
    }

    fn origin(&mut self, producer: ValueRef<'_>, sequence: ValueRef<'_>) -> Result<Option<Origin>, String> {
        match (producer, sequence) {
            (ValueRef::Null, ValueRef::Null) => Ok(None),
            (ValueRef::Text(name), ValueRef::Integer(sequence)) => {
                let numbering = self.numberings.parse(name)?;
                Ok(Some(Origin::of(numbering, sequence as u64)))
            }
            _ => Err("producer and sequence are not TEXT and INTEGER".into()),
        }
    }
}

fn time(value: ValueRef<'_>) -> Result<SystemTime, &'static str> {
    match value {
        ValueRef::Integer(millis) => u64::try_from(millis)
            .ok()
            .and_then(|millis| UNIX_EPOCH.checked_add(Duration::from_millis(millis)))
            .ok_or("appended_at is before 1970"),
        _ => Err("appended_at is not an INTEGER"),
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    /// Reads one row of these values as from a log's table.
    fn record(values: &str) -> Record {
        let connection = Connection::open_in_memory().expect("open");
        connection
            .execute_batch(&format!(
                "CREATE TABLE t (\"offset\" INTEGER PRIMARY KEY, appended_at INTEGER, key BLOB, headers BLOB, payload BLOB,
                     producer TEXT, sequence INTEGER);
                 INSERT INTO t VALUES (7, {values})"
            ))
            .expect("row");
        let mut numberings = NumberingCache::new();
        connection
            .query_row(&format!("SELECT {COLUMNS} FROM t"), [], |row| {
                Ok(Decoder::new(16, &mut numberings).record(&Columns::of(row)?))
            })
            .expect("a record")
    }

    #[test]
    fn text_typed_by_hand_is_read_as_bytes() {
        let record = record("1, 'k', NULL, 'hello', 'p', 3");
        assert_eq!(record.malformed, None);
        assert_eq!(
            (record.key.as_deref(), &record.payload[..]),
            (Some(&b"k"[..]), &b"hello"[..])
        );
        assert_eq!(record.origin.map(|origin| origin.sequence), Some(3));
    }

    #[test]
    fn an_undecodable_row_is_malformed_and_keeps_its_payload() {
        for (values, reason) in [
            ("-1, NULL, NULL, x'ff00', NULL, NULL", "before 1970"),
            ("'soon', NULL, NULL, x'ff00', NULL, NULL", "not an INTEGER"),
            ("NULL, NULL, NULL, x'ff00', NULL, NULL", "not an INTEGER"),
            ("1, 5, NULL, x'ff00', NULL, NULL", "key"),
            ("1, NULL, x'09', x'ff00', NULL, NULL", "unknown version"),
            ("1, NULL, x'', x'ff00', NULL, NULL", "unknown version"),
            ("1, NULL, x'01000000ff', x'ff00', NULL, NULL", "cut short"),
            ("1, NULL, x'0100000001ff00000000', x'ff00', NULL, NULL", "UTF-8"),
            ("1, NULL, 3.5, x'ff00', NULL, NULL", "headers are not a BLOB"),
            ("1, NULL, NULL, x'ff00', 'p', NULL", "producer and sequence"),
            ("1, NULL, NULL, x'ff00', NULL, 4", "producer and sequence"),
            ("1, NULL, NULL, x'ff00', 'p', 'x'", "producer and sequence"),
            ("1, NULL, NULL, x'ff00', x'ff', 4", "producer and sequence"),
            ("1, NULL, NULL, x'ff00', 'a b', 4", "not valid"),
            ("1, NULL, NULL, x'ff00', 'a#0', 4", "not valid"),
            ("1, NULL, NULL, x'ff00', CAST(x'ff' AS TEXT), 4", "not UTF-8"),
        ] {
            let record = record(values);
            assert_eq!(record.offset, 7.into());
            assert_eq!(&record.payload[..], b"\xff\x00", "{values}");
            let malformed = record.malformed.expect(values);
            assert!(malformed.contains(reason), "{values}: {malformed}");
        }
    }

    #[test]
    fn a_payload_of_another_type_is_shown_as_text() {
        for (value, shown) in [("NULL", ""), ("42", "42"), ("1.5", "1.5")] {
            let record = record(&format!("1, NULL, NULL, {value}, NULL, NULL"));
            assert!(record.malformed.is_some(), "{value}");
            assert_eq!(&record.payload[..], shown.as_bytes());
        }
    }

    #[test]
    fn the_last_time_and_sequence_that_fit_round_trip() {
        let record = record(&format!("{}, NULL, NULL, x'', 'p', -1", i64::MAX));
        assert_eq!(record.malformed, None);
        assert_eq!(record.origin.map(|origin| origin.sequence), Some(u64::MAX));
        assert_eq!(record.appended_at, UNIX_EPOCH + Duration::from_millis(i64::MAX as u64));
    }
}
