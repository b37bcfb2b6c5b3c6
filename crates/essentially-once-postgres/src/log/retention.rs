//! Stores a log's retention, and removes expired records.

use std::{sync::Arc, time::Duration};

use essentially_once::{Error, backend::Retention};

use crate::{
    connection::{Param, Pool, Session},
    error::Fault,
};

/// The columns `keep_records` and `keep_age_ms`.
pub(super) type RetentionColumns = (Option<i64>, Option<i64>);

pub(super) fn from_columns((records, age_ms): RetentionColumns) -> Retention {
    let mut retention = Retention::new();
    retention.records = records.map(|records| u64::try_from(records).unwrap_or(u64::MAX));
    retention.age = age_ms.map(|age| Duration::from_millis(u64::try_from(age).unwrap_or(u64::MAX)));
    retention
}

/// Refuses limits that cannot be kept or stored.
pub(super) fn to_columns(retention: Retention) -> Result<RetentionColumns, Error> {
    retention.check()?;
    retention.refuse_bytes("PostgreSQL")?;
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

/// Records that one step removes. The bound keeps the statement short.
pub(super) const STEP: i64 = 10_000;

/// Moves the beginning of the log past expired records, by at most a step. Appends wait only for
/// this row. No record is 1,000 years old, and PostgreSQL's dates begin in 4713 BC.
const EXPIRE: &str = "UPDATE {s}.logs AS l SET earliest = cut.place
     FROM (SELECT id, greatest(
             CASE WHEN keep_records IS NOT NULL THEN least(greatest(next - keep_records, earliest), earliest + $3) END,
             CASE WHEN keep_age_ms IS NOT NULL THEN coalesce(
                 (SELECT \"offset\" FROM {s}.records
                     WHERE log = $1 AND \"offset\" >= earliest AND \"offset\" < earliest + $3
                         AND appended_at > clock_timestamp() - least(keep_age_ms, 31536000000000) * interval '1 millisecond'
                     ORDER BY \"offset\" LIMIT 1),
                 least(next, earliest + $3)) END
         ) AS place FROM {s}.logs WHERE id = $1 AND incarnation = $2) AS cut
     WHERE l.id = cut.id AND l.incarnation = $2 AND l.earliest < cut.place";

/// Moves the beginning of the log to a place, if it is before it.
const CUT: &str =
    "UPDATE {s}.logs SET earliest = $3 WHERE id = $1 AND incarnation = $2 AND earliest < $3 AND next >= $3";

/// Deletes the rows before the beginning, by at most a step. None if the log is another one now.
const SWEEP: &str = "DELETE FROM {s}.records WHERE log = $1 AND \"offset\" < (
         SELECT least(earliest, (SELECT min(\"offset\") FROM {s}.records WHERE log = $1) + $3)
         FROM {s}.logs WHERE id = $1 AND incarnation = $2)";

/// A log's row, to remove records from.
#[derive(Clone, Debug)]
pub(super) struct Trimmer {
    pub(super) pool: Arc<Pool>,
    pub(super) row: i64,
    pub(super) incarnation: String,
}

impl Trimmer {
    /// Removes up to a step of expired records. Returns how many it removed, and whether there may
    /// be more.
    pub(super) async fn expire(&self, session: &mut Session) -> Result<(u64, bool), Fault> {
        let params = [&self.row as Param<'_>, &self.incarnation, &STEP];
        let moved = self.pool.within(session.execute_own(EXPIRE, &params)).await?;
        let swept = self.sweep(session).await?;
        Ok((swept, moved > 0 || swept > 0))
    }

    /// Removes up to a step of the records before a place. Returns how many it removed.
    pub(super) async fn cut(&self, session: &mut Session, place: i64) -> Result<u64, Fault> {
        let params = [&self.row as Param<'_>, &self.incarnation, &place];
        self.pool.within(session.execute_own(CUT, &params)).await?;
        self.sweep(session).await
    }

    async fn sweep(&self, session: &mut Session) -> Result<u64, Fault> {
        let params = [&self.row as Param<'_>, &self.incarnation, &STEP];
        self.pool.within(session.execute_own(SWEEP, &params)).await
    }
}
