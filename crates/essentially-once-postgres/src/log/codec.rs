//! Decodes rows into records. A row edited by hand becomes a malformed record, never an error or a
//! panic.

use std::time::{SystemTime, UNIX_EPOCH};

use essentially_once::{
    Origin, Record,
    backend::{FetchBuffer, NumberingCache, decode_headers},
};
use tokio_postgres::{Row, types::FromSql};

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

    /// Decodes a row of offset, append time, key, headers, payload, producer and sequence.
    pub(super) fn record(&mut self, row: &Row) -> Record {
        let mut malformed = None;
        let mut note = |reason: &str| {
            malformed.get_or_insert_with(|| reason.into());
        };
        let offset = row.get::<_, i64>(0) as u64;
        let appended_at = get::<SystemTime>(row, 1).unwrap_or_else(|_| {
            note("appended_at is out of range");
            UNIX_EPOCH
        });
        let key = get::<Option<&[u8]>>(row, 2)
            .ok()
            .flatten()
            .map(|key| self.buffer.copy(key));
        let headers = match get::<Option<&[u8]>>(row, 3).ok().flatten() {
            None => Ok(Vec::new()),
            Some(headers) => decode_headers(&self.buffer.copy(headers)),
        };
        let headers = headers.unwrap_or_else(|reason| {
            note(reason);
            Vec::new()
        });
        let payload = self.buffer.copy(get(row, 4).unwrap_or_default());
        let origin = match (get::<Option<&str>>(row, 5), get::<Option<i64>>(row, 6)) {
            (Ok(None), Ok(None)) => Ok(None),
            (Ok(Some(producer)), Ok(Some(sequence))) => {
                let numbering = self.numberings.parse(producer.as_bytes());
                numbering.map(|numbering| Some(Origin::of(numbering, sequence as u64)))
            }
            _ => Err("only one of producer and sequence is there".into()),
        };
        let origin = origin.unwrap_or_else(|reason| {
            note(&reason);
            None
        });
        let mut record = Record::new(offset.into(), appended_at, payload);
        record.key = key;
        record.headers = headers;
        record.origin = origin;
        record.malformed = malformed;
        record
    }

    /// The number of bytes in the buffer, as an estimate for the next fetch.
    pub(super) fn buffered(&self) -> usize {
        self.buffer.copied()
    }
}

fn get<'r, T: FromSql<'r>>(row: &'r Row, column: usize) -> Result<T, tokio_postgres::Error> {
    row.try_get(column)
}
