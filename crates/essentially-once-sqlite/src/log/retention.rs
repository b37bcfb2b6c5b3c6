//! Removes expired records.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use essentially_once::backend::Retention;
use rusqlite::{Connection, types::ValueRef};

use crate::log::{Statements, Status};

pub(crate) fn from_columns(records: Option<i64>, age_ms: Option<i64>) -> Retention {
    let mut retention = Retention::new();
    retention.records = records.map(|records| u64::try_from(records).unwrap_or(u64::MAX));
    retention.age = age_ms.map(|age| Duration::from_millis(u64::try_from(age).unwrap_or(u64::MAX)));
    retention
}

pub(crate) fn to_columns(retention: Retention) -> (Option<i64>, Option<i64>) {
    let clamp = |number: u128| i64::try_from(number).unwrap_or(i64::MAX);
    (
        retention.records.map(|records| clamp(records.into())),
        retention.age.map(|age| clamp(age.as_millis())),
    )
}

pub(crate) fn now_millis() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Removes up to `limit` expired records, oldest first, and returns their number.
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

/// Returns the first offset from `from` up to `bound` whose record is younger than the newest
/// expired one.
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
        // An invalid time counts as old. Otherwise one bad row would keep all later ones forever.
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
    fn columns_round_trip_and_clamp() {
        let retention = Retention::new().max_records(5).max_age(Duration::from_millis(7));
        let (records, age) = to_columns(retention);
        assert_eq!(from_columns(records, age), retention);
        let endless = Retention::new().max_records(u64::MAX).max_age(Duration::MAX);
        assert_eq!(to_columns(endless), (Some(i64::MAX), Some(i64::MAX)));
        assert_eq!(from_columns(Some(-1), None).records, Some(u64::MAX));
    }
}
