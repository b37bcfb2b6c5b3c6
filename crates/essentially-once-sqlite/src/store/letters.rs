//! Dead letters: one row per letter in `essentially_once_letters`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    Error, Offset, Origin, Record,
    backend::{DeadLetter, DeadLetters, Edit, Source, check_size, decode_headers, encode_headers},
};
use rusqlite::{Row, ToSql, params_from_iter, types::ValueRef};

use super::{
    statements::{bytes_of_first, unsigned},
    tx::SqliteTx,
};

const COLUMNS: &str = "place, offset_hi, offset_lo, appended_at, key, headers, payload, producer, sequence, malformed, \
     tries, first_reason, last_reason, parked_at, last_failed_at, due_at, version, edit";

/// Implies the condition of the index by key. A key of another type is damaged, and counts as none.
const HAS_KEY: &str = "key IS NOT NULL AND malformed IS NULL AND typeof(key) = 'blob'";

impl SqliteTx {
    fn letters_where(&mut self, condition: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<DeadLetter>, Error> {
        self.check_usable("read dead letters")?;
        let sql = format!("SELECT {COLUMNS} FROM main.essentially_once_letters WHERE consumer = ?1 AND {condition}");
        self.internal(&sql, "read dead letters", |statement, consumer| {
            let consumer: &dyn ToSql = &consumer;
            let all = [consumer]
                .into_iter()
                .chain(params.iter().map(|param| *param as &dyn ToSql));
            statement.query_map(params_from_iter(all), letter)?.collect()
        })
    }
}

#[async_trait]
impl DeadLetters for SqliteTx {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        self.check_usable("park a record")?;
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
        // Older processes write NULL, which `schema.rs` tells from no edit.
        let edit = letter.edit.as_ref().map(|edit| edit.encode()).unwrap_or_default();
        let sql = format!(
            "INSERT OR REPLACE INTO main.essentially_once_letters (consumer, {COLUMNS}) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19)"
        );
        self.internal(&sql, "park a record", |statement, consumer| {
            let values: [&dyn ToSql; 19] = [
                &consumer,
                &place(record.offset),
                &(record.offset.hi() as i64),
                &(record.offset.lo() as i64),
                &millis(record.appended_at),
                &record.key.as_deref(),
                &encode_headers(&record.headers),
                &&record.payload[..],
                &numbering,
                &sequence,
                &record.malformed.as_deref(),
                &letter.tries,
                &letter.first_reason,
                &letter.last_reason,
                &millis(letter.parked_at),
                &millis(letter.last_failed_at),
                &letter.due.map(millis),
                &(letter.version as i64),
                &edit,
            ];
            statement.execute(&values[..])
        })?;
        Ok(())
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        self.check_usable("remove a dead letter")?;
        let sql = "DELETE FROM main.essentially_once_letters WHERE consumer = ?1 AND place = ?2";
        let removed = self.internal(sql, "remove a dead letter", |statement, consumer| {
            statement.execute((consumer, place(offset)))
        })?;
        Ok(removed > 0)
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        self.check_usable("remove dead letters")?;
        let sql = "DELETE FROM main.essentially_once_letters WHERE consumer = ?1 AND place >= ?2";
        let removed = self.internal(sql, "remove dead letters", |statement, consumer| {
            statement.execute((consumer, place(offset)))
        })?;
        Ok(removed as u64)
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        let found = self.letters_where("place = ?2", &[&place(offset)])?;
        Ok(found.into_iter().next())
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        let condition = format!("{HAS_KEY} AND key = ?2 ORDER BY place LIMIT 1");
        Ok(self.letters_where(&condition, &[&key])?.into_iter().next())
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        self.check_usable("read dead letters")?;
        let sql = format!(
            "SELECT {COLUMNS} FROM main.essentially_once_letters \
             WHERE consumer = ?1 AND due_at IS NOT NULL ORDER BY due_at, place"
        );
        self.internal(&sql, "read dead letters", |statement, consumer| {
            let mut letters = statement.query_map([consumer], letter)?;
            let is_wanted = |letter: &rusqlite::Result<DeadLetter>| !matches!(letter, Ok(letter) if letter.unreadable);
            letters.find(is_wanted).transpose()
        })
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        match after {
            None => self.letters_where("1 ORDER BY place LIMIT ?2", &[&limit]),
            Some(after) => self.letters_where("place > ?2 ORDER BY place LIMIT ?3", &[&place(after), &limit]),
        }
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        self.check_usable("count dead letters")?;
        // One condition for both cases would make SQLite read all keys before this page.
        let page = if after.is_some() { "AND key > ?3" } else { "" };
        let sql = format!(
            "SELECT key, count(*) FROM main.essentially_once_letters \
             WHERE consumer = ?1 AND {HAS_KEY} {page} GROUP BY key ORDER BY key LIMIT ?2"
        );
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.internal(&sql, "count dead letters", |statement, consumer| {
            let count = |row: &Row<'_>| Ok((bytes_of_first(row)?, unsigned(row, 1)?));
            match after {
                Some(after) => statement.query_map((consumer, limit, after), count)?.collect(),
                None => statement.query_map((consumer, limit), count)?.collect(),
            }
        })
    }

    async fn total(&mut self) -> Result<u64, Error> {
        self.check_usable("count dead letters")?;
        let sql = "SELECT count(*) FROM main.essentially_once_letters WHERE consumer = ?1";
        self.internal(sql, "count dead letters", |statement, consumer| {
            statement.query_row([consumer], |row| unsigned(row, 0))
        })
    }
}

/// Reads the current row of a query for [`COLUMNS`].
fn letter(row: &Row<'_>) -> rusqlite::Result<DeadLetter> {
    let place = u128::from_be_bytes(row.get(0)?);
    let offset = Offset::new((place >> 64) as u64, place as u64);
    Ok(decode(row, offset).unwrap_or_else(|why| {
        let is_malformed = !matches!(row.get_ref(9), Ok(ValueRef::Null));
        let key: Option<Vec<u8>> = row.get(4).unwrap_or_default();
        let version: i64 = row.get(16).unwrap_or_default();
        DeadLetter::damaged(
            offset,
            key.filter(|_| !is_malformed).map(Bytes::from),
            &format!("its row cannot be read: {why}"),
            &version.to_be_bytes(),
        )
    }))
}

fn decode(row: &Row<'_>, offset: Offset) -> Result<DeadLetter, Source> {
    let payload: Vec<u8> = row.get(6)?;
    let mut record = Record::new(offset, time(row.get(3)?), payload);
    record.key = row.get::<_, Option<Vec<u8>>>(4)?.map(Bytes::from);
    if let Some(headers) = row.get::<_, Option<Vec<u8>>>(5)? {
        record.headers = decode_headers(&headers.into())?;
    }
    let (producer, sequence): (Option<String>, Option<i64>) = (row.get(7)?, row.get(8)?);
    if let (Some(producer), Some(sequence)) = (producer, sequence) {
        record.origin = Some(Origin::of(producer.parse()?, sequence as u64));
    }
    record.malformed = row.get::<_, Option<String>>(9)?.map(Into::into);
    let edit: Option<Vec<u8>> = row.get(17)?;
    let edit = edit.filter(|edit| !edit.is_empty());
    let edit = edit.map(|edit| Edit::decode(edit, &record)).transpose()?;
    let mut letter = DeadLetter::new(record, row.get(10)?, "", time(row.get(13)?));
    letter.first_reason = row.get(11)?;
    letter.last_reason = row.get(12)?;
    letter.last_failed_at = time(row.get(14)?);
    letter.due = row.get::<_, Option<i64>>(15)?.map(time);
    letter.version = unsigned(row, 16)?;
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
