//! Stores a log's retention, and removes expired records.

use std::{
    ops::Range,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use essentially_once::{Error, backend::Retention};
use rusqlite::{Connection, types::ValueRef};

/// The columns `keep_records` and `keep_age_ms`.
pub(super) type RetentionColumns = (Option<i64>, Option<i64>);

pub(super) fn from_columns((records, age_ms): RetentionColumns) -> Retention {
    let mut retention = Retention::new();
    retention.records = records.map(|records| u64::try_from(records).unwrap_or(u64::MAX));
    retention.age = age_ms.map(|age| Duration::from_millis(u64::try_from(age).unwrap_or(u64::MAX)));
    retention
}

/// Refuses limits that SQLite cannot keep or store.
pub(super) fn to_columns(retention: Retention) -> Result<RetentionColumns, Error> {
    retention.check()?;
    retention.refuse_bytes("SQLite")?;
    let column = |limit: &str, value: u128, unit: &str| {
        i64::try_from(value).map_err(|_| Error::InvalidSetting {
            setting: "retention",
            reason: format!("`{limit}` must be at most {}{unit}", i64::MAX),
        })
    };
    let records = retention
        .records
        .map(|records| column("max_records", records.into(), ""));
    let age = retention.age.map(|age| column("max_age", age.as_millis(), " ms"));
    Ok((records.transpose()?, age.transpose()?))
}

pub(super) fn now_millis() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// The SQL statements that remove a log's records.
pub(super) struct TrimStatements {
    times: String,
    delete_before: String,
}

impl TrimStatements {
    pub(super) fn new(table: &str) -> Self {
        Self {
            times: format!(
                "SELECT \"offset\", appended_at FROM {table}
                 WHERE \"offset\" >= ?1 AND \"offset\" < ?2 ORDER BY \"offset\""
            ),
            delete_before: format!("DELETE FROM {table} WHERE \"offset\" < ?1"),
        }
    }

    /// Removes up to `limit` expired records of `held`, oldest first, and returns their number.
    pub(super) fn trim(
        &self,
        connection: &Connection,
        retention: Retention,
        held: Range<u64>,
        now: i64,
        limit: u64,
    ) -> rusqlite::Result<u64> {
        let bound = held.start.saturating_add(limit).min(held.end);
        let mut cut = held.start;
        if let Some(keep) = retention.records {
            cut = cut.max(held.end.saturating_sub(keep)).min(bound);
        }
        if let Some(age) = retention.age
            && cut < bound
        {
            let newest_expired = now.saturating_sub_unsigned(u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
            cut = self.first_kept(connection, cut..bound, newest_expired)?;
        }
        if cut == held.start {
            return Ok(0);
        }
        self.remove_before(connection, cut)
    }

    /// Removes the records before `cut`, and returns their number.
    pub(super) fn remove_before(&self, connection: &Connection, cut: u64) -> rusqlite::Result<u64> {
        let removed = connection.prepare_cached(&self.delete_before)?.execute([cut as i64])?;
        Ok(removed as u64)
    }

    /// Returns the first offset in `range` whose record is younger than the newest expired one, or
    /// the end of the range's records.
    fn first_kept(&self, connection: &Connection, range: Range<u64>, newest_expired: i64) -> rusqlite::Result<u64> {
        let mut statement = connection.prepare_cached(&self.times)?;
        let mut rows = statement.query([range.start as i64, range.end as i64])?;
        let mut cut = range.start;
        while let Some(row) = rows.next()? {
            // An invalid time counts as old. Otherwise one bad row would keep all later ones
            // forever.
            if matches!(row.get_ref(1)?, ValueRef::Integer(time) if time > newest_expired) {
                return Ok(cut);
            }
            cut = row.get::<_, i64>(0)? as u64 + 1;
        }
        Ok(cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_round_trip_and_refuse_what_they_cannot_hold() {
        let retention = Retention::new().max_records(5).max_age(Duration::from_millis(7));
        assert_eq!(from_columns(to_columns(retention).expect("valid")), retention);
        let most = i64::MAX as u64;
        let longest = Retention::new().max_records(most).max_age(Duration::from_millis(most));
        assert_eq!(to_columns(longest).expect("valid"), (Some(i64::MAX), Some(i64::MAX)));
        for (refused, bound) in [
            (Retention::new().max_records(most + 1), "9223372036854775807"),
            (Retention::new().max_age(Duration::MAX), "9223372036854775807 ms"),
            (Retention::new().max_records(0), "at least 1"),
            (Retention::new().max_bytes(1), "max_bytes"),
        ] {
            let error = to_columns(refused).expect_err("refused");
            assert!(matches!(error, Error::InvalidSetting { .. }), "{error:?}");
            assert!(error.to_string().contains(bound), "{error}");
        }
        assert_eq!(from_columns((Some(-1), None)).records, Some(u64::MAX));
    }
}
