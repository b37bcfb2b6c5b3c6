//! Dead letters: one row per letter.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    Error, Offset, Origin, Record,
    backend::{DeadLetter, DeadLetters, Edit, Source, check_size, decode_headers, encode_headers},
};
use tokio_postgres::Row;

use super::{statements::unsigned, tx::PgTx};
use crate::connection::Param;

/// A query for letters with this condition, in the order in which [`decode`] reads the columns.
macro_rules! letters_where {
    ($condition:literal) => {
        concat!(
            "SELECT place, appended_at, key, headers, payload, producer, sequence, malformed, tries, first_reason, \
                 last_reason, parked_at, last_failed_at, due_at, version, edit \
             FROM {s}.letters WHERE consumer = $1 AND ",
            $condition
        )
    };
}

const AT: &str = letters_where!("place = $2");
const FIRST: &str = letters_where!("true ORDER BY place LIMIT $2");
const AFTER: &str = letters_where!("place > $2 ORDER BY place LIMIT $3");
/// The index holds the beginning of each key, since PostgreSQL cannot index long ones.
const HEAD: &str = letters_where!(
    "key IS NOT NULL AND malformed IS NULL AND substring(key FROM 1 FOR 1024) = substring($2::bytea FROM 1 FOR 1024) \
     AND key = $2 ORDER BY place LIMIT 1"
);
const DUE: &str = letters_where!("due_at IS NOT NULL ORDER BY due_at, place OFFSET $2 LIMIT 20");

const PARK: &str = "INSERT INTO {s}.letters (consumer, place, offset_hi, offset_lo, appended_at, key, headers, payload,
         producer, sequence, malformed, tries, first_reason, last_reason, parked_at, last_failed_at, due_at, version, edit)
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)
     ON CONFLICT (consumer, place) DO UPDATE SET appended_at = excluded.appended_at, key = excluded.key,
         headers = excluded.headers, payload = excluded.payload, producer = excluded.producer,
         sequence = excluded.sequence, malformed = excluded.malformed, tries = excluded.tries,
         first_reason = excluded.first_reason, last_reason = excluded.last_reason, parked_at = excluded.parked_at,
         last_failed_at = excluded.last_failed_at, due_at = excluded.due_at, version = excluded.version,
         edit = excluded.edit";
const REMOVE: &str = "DELETE FROM {s}.letters WHERE consumer = $1 AND place = $2";
const REMOVE_FROM: &str = "DELETE FROM {s}.letters WHERE consumer = $1 AND place >= $2";
const TOTAL: &str = "SELECT count(*) FROM {s}.letters WHERE consumer = $1";
/// A row as large as the columns of the index, so that a page does not sort the keys before it.
const COUNTS_FROM: &str = "SELECT key, count(*) FROM {s}.letters
     WHERE consumer = $1 AND key IS NOT NULL AND malformed IS NULL
         AND substring(key FROM 1 FOR 1024) >= substring($2::bytea FROM 1 FOR 1024) AND key > $2
     GROUP BY substring(key FROM 1 FOR 1024), key ORDER BY substring(key FROM 1 FOR 1024), key LIMIT $3";
const COUNTS: &str = "SELECT key, count(*) FROM {s}.letters
     WHERE consumer = $1 AND key IS NOT NULL AND malformed IS NULL
     GROUP BY substring(key FROM 1 FOR 1024), key ORDER BY substring(key FROM 1 FOR 1024), key LIMIT $2";

const READ: &str = "read dead letters";

impl PgTx {
    async fn letters(&mut self, sql: &'static str, params: &[Param<'_>]) -> Result<Vec<DeadLetter>, Error> {
        let rows = self.own(sql, READ, params).await?;
        rows.iter().map(|row| self.decoded(row)).collect()
    }

    fn decoded(&self, row: &Row) -> Result<DeadLetter, Error> {
        letter(row).map_err(|error| Error::failed(self.action(READ), error))
    }
}

#[async_trait]
impl DeadLetters for PgTx {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        const VERB: &str = "park a record";
        self.check_usable(VERB)?;
        let limit = self.record_limit().saturating_add(2 * DeadLetter::REASON_LIMIT);
        if let Err(too_large) = check_size("dead letter", letter.size(), limit) {
            // The limit may have been higher when it was parked, and its key must not wait for
            // that.
            let stored = self.letter(letter.record.offset).await?;
            if !stored.is_some_and(|stored| stored.has_record_of(letter)) {
                return Err(too_large);
            }
        }
        let record = &letter.record;
        let (numbering, sequence) = match &record.origin {
            Some(origin) => (Some(origin.numbering.to_string()), Some(origin.sequence as i64)),
            None => (None, None),
        };
        let (consumer, edit) = (self.consumer.clone(), letter.edit.as_ref().map(|edit| edit.encode()));
        self.change(
            PARK,
            VERB,
            &[
                &consumer.as_str(),
                &&place(record.offset)[..],
                &(record.offset.hi() as i64),
                &(record.offset.lo() as i64),
                &millis(record.appended_at),
                &record.key.as_deref(),
                &encode_headers(&record.headers),
                &&record.payload[..],
                &numbering,
                &sequence,
                &record.malformed.as_deref().map(str::as_bytes),
                &i64::from(letter.tries),
                &letter.first_reason.as_bytes(),
                &letter.last_reason.as_bytes(),
                &millis(letter.parked_at),
                &millis(letter.last_failed_at),
                &letter.due.map(millis),
                &(letter.version as i64),
                &edit,
            ],
        )
        .await?;
        Ok(())
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        let consumer = self.consumer.clone();
        let params: [Param<'_>; 2] = [&consumer.as_str(), &&place(offset)[..]];
        Ok(self.change(REMOVE, "remove a dead letter", &params).await? > 0)
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        let consumer = self.consumer.clone();
        let params: [Param<'_>; 2] = [&consumer.as_str(), &&place(offset)[..]];
        self.change(REMOVE_FROM, "remove dead letters", &params).await
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        let consumer = self.consumer.clone();
        let found = self.letters(AT, &[&consumer.as_str(), &&place(offset)[..]]).await?;
        Ok(found.into_iter().next())
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        let consumer = self.consumer.clone();
        let found = self.letters(HEAD, &[&consumer.as_str(), &key]).await?;
        Ok(found.into_iter().next())
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        let consumer = self.consumer.clone();
        let mut passed = 0_i64;
        loop {
            let found = self.letters(DUE, &[&consumer.as_str(), &passed]).await?;
            if found.is_empty() {
                return Ok(None);
            }
            passed += found.len() as i64;
            if let Some(letter) = found.into_iter().find(|letter| !letter.unreadable) {
                return Ok(Some(letter));
            }
        }
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let consumer = self.consumer.clone();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        match after {
            None => self.letters(FIRST, &[&consumer.as_str(), &limit]).await,
            Some(after) => {
                self.letters(AFTER, &[&consumer.as_str(), &&place(after)[..], &limit])
                    .await
            }
        }
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        const VERB: &str = "count dead letters";
        let consumer = self.consumer.clone();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = match after {
            None => self.own(COUNTS, VERB, &[&consumer.as_str(), &limit]).await?,
            Some(after) => {
                self.own(COUNTS_FROM, VERB, &[&consumer.as_str(), &after, &limit])
                    .await?
            }
        };
        let count = |row: &Row| (Bytes::copy_from_slice(row.get(0)), row.get::<_, i64>(1) as u64);
        Ok(rows.iter().map(count).collect())
    }

    async fn total(&mut self) -> Result<u64, Error> {
        let consumer = self.consumer.clone();
        let rows = self.own(TOTAL, "count dead letters", &[&consumer.as_str()]).await?;
        Ok(rows.first().map_or(0, |row| row.get::<_, i64>(0) as u64))
    }
}

/// Reads a row of a query for letters.
fn letter(row: &Row) -> Result<DeadLetter, Source> {
    let place: &[u8] = row.try_get(0)?;
    let place = u128::from_be_bytes(
        place
            .try_into()
            .map_err(|_| "the place of a letter does not have 16 bytes")?,
    );
    let offset = Offset::new((place >> 64) as u64, place as u64);
    Ok(decode(row, offset).unwrap_or_else(|why| {
        let is_malformed = !matches!(row.try_get::<_, Option<&[u8]>>(7), Ok(None));
        let key: Option<&[u8]> = row.try_get(2).unwrap_or_default();
        let version: i64 = row.try_get(14).unwrap_or_default();
        DeadLetter::damaged(
            offset,
            key.filter(|_| !is_malformed).map(Bytes::copy_from_slice),
            &format!("its row cannot be read: {why}"),
            &version.to_be_bytes(),
        )
    }))
}

fn decode(row: &Row, offset: Offset) -> Result<DeadLetter, Source> {
    let bytes = |column| Ok::<_, Source>(row.try_get::<_, Option<&[u8]>>(column)?.map(Bytes::copy_from_slice));
    let text = |bytes: Bytes| String::from_utf8(bytes.into()).map_err(|_| "a reason is not UTF-8");
    let payload: &[u8] = row.try_get(4)?;
    let mut record = Record::new(offset, time(row.try_get(1)?), Bytes::copy_from_slice(payload));
    record.key = bytes(2)?;
    if let Some(headers) = bytes(3)? {
        record.headers = decode_headers(&headers)?;
    }
    let (producer, sequence): (Option<&str>, Option<i64>) = (row.try_get(5)?, row.try_get(6)?);
    if let (Some(producer), Some(sequence)) = (producer, sequence) {
        record.origin = Some(Origin::of(producer.parse()?, sequence as u64));
    }
    record.malformed = bytes(7)?.map(text).transpose()?.map(Into::into);
    let edit = bytes(15)?.map(|edit| Edit::decode(edit, &record)).transpose()?;
    let tries = u32::try_from(row.try_get::<_, i64>(8)?).map_err(|_| "the number of tries is out of range")?;
    let mut letter = DeadLetter::new(record, tries, "", time(row.try_get(11)?));
    letter.first_reason = text(bytes(9)?.unwrap_or_default())?;
    letter.last_reason = text(bytes(10)?.unwrap_or_default())?;
    letter.last_failed_at = time(row.try_get(12)?);
    letter.due = row.try_get::<_, Option<i64>>(13)?.map(time);
    letter.version = unsigned(row, 14)?;
    letter.edit = edit.map(Box::new);
    Ok(letter)
}

/// The offset as bytes that sort like it.
fn place(offset: Offset) -> [u8; 16] {
    (u128::from(offset.hi()) << 64 | u128::from(offset.lo())).to_be_bytes()
}

/// Milliseconds since 1970.
fn millis(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn time(millis: i64) -> SystemTime {
    let since = Duration::from_millis(u64::try_from(millis).unwrap_or_default());
    UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
}
