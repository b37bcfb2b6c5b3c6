//! Removing old records.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use essentially_once::Error;
use rusqlite::{Connection, types::ValueRef};

use crate::log::{Statements, Status};

/// What a log keeps; records are removed as soon as one of the two bounds says so. The default keeps everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Retention {
    /// Keep the last so many records; at least 1.
    pub records: Option<u64>,
    /// Keep records for so long after they were appended, to the millisecond; at least 1 ms.
    pub age: Option<Duration>,
}

impl Retention {
    /// Refuses what would remove a record in the moment it is appended.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let invalid = |reason: &str| {
            Err(Error::InvalidSetting {
                setting: "retention",
                reason: reason.into(),
            })
        };
        if self.records == Some(0) {
            return invalid("`records` must be at least 1");
        }
        if self.age.is_some_and(|age| age < Duration::from_millis(1)) {
            return invalid("`age` must be at least 1 ms");
        }
        Ok(())
    }

    pub(crate) fn from_columns(records: Option<i64>, age_ms: Option<i64>) -> Self {
        Self {
            records: records.map(|records| u64::try_from(records).unwrap_or(u64::MAX)),
            age: age_ms.map(|age| Duration::from_millis(u64::try_from(age).unwrap_or(u64::MAX))),
        }
    }

    pub(crate) fn to_columns(self) -> (Option<i64>, Option<i64>) {
        let clamp = |number: u128| i64::try_from(number).unwrap_or(i64::MAX);
        (
            self.records.map(|records| clamp(records.into())),
            self.age.map(|age| clamp(age.as_millis())),
        )
    }
}

pub(crate) fn now_millis() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Removes up to `limit` of the records that `status.retention` no longer keeps, the oldest first, and returns how many.
pub(crate) fn trim(
    connection: &Connection,
    sql: &Statements,
    status: &Status,
    now: i64,
    limit: u64,
) -> rusqlite::Result<u64> {
    let bound = status.earliest.saturating_add(limit).min(status.end);
    let mut cut = status.earliest;
    if let Some(keep) = status.retention.records {
        cut = cut.max(status.end.saturating_sub(keep)).min(bound);
    }
    if let Some(age) = status.retention.age
        && cut < bound
    {
        let newest_expired = now.saturating_sub_unsigned(u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        cut = first_kept(connection, sql, cut, bound, newest_expired)?;
    }
    if cut == status.earliest {
        return Ok(0);
    }
    let removed = connection.prepare_cached(&sql.delete_before)?.execute([cut as i64])?;
    Ok(removed as u64)
}

/// The first offset from `from` on, and up to `bound`, whose record is younger than the newest one that expired.
fn first_kept(
    connection: &Connection,
    sql: &Statements,
    from: u64,
    bound: u64,
    newest_expired: i64,
) -> rusqlite::Result<u64> {
    let mut statement = connection.prepare_cached(&sql.times)?;
    let mut rows = statement.query([from as i64, bound as i64])?;
    let mut cut = from;
    while let Some(row) = rows.next()? {
        // A time that is none counts as old, or one bad row would keep all later ones for ever.
        if matches!(row.get_ref(1)?, ValueRef::Integer(time) if time > newest_expired) {
            return Ok(cut);
        }
        cut = row.get::<_, i64>(0)? as u64 + 1;
    }
    Ok(cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_that_keeps_nothing_is_refused() {
        let of = |records, age| Retention { records, age }.check();
        assert!(of(Some(0), None).is_err());
        assert!(of(None, Some(Duration::ZERO)).is_err());
        assert!(of(None, Some(Duration::from_micros(999))).is_err());
        assert!(of(Some(1), Some(Duration::from_millis(1))).is_ok());
        assert!(of(None, None).is_ok());
    }

    #[test]
    fn columns_round_trip_and_clamp() {
        let retention = Retention {
            records: Some(5),
            age: Some(Duration::from_millis(7)),
        };
        let (records, age) = retention.to_columns();
        assert_eq!(Retention::from_columns(records, age), retention);
        let endless = Retention {
            records: Some(u64::MAX),
            age: Some(Duration::MAX),
        };
        assert_eq!(endless.to_columns(), (Some(i64::MAX), Some(i64::MAX)));
        assert_eq!(Retention::from_columns(Some(-1), None).records, Some(u64::MAX));
    }
}
