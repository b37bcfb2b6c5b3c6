//! How a file and a log are opened.

use std::time::Duration;

use essentially_once::{Error, backend::Retention};

/// SQLite limits a row to 1,000,000,000 bytes. The rest is room for other columns and for encoded
/// headers.
const MAX_RECORD_LIMIT: usize = 900_000_000;

/// The deadlines computed from a longer timeout could overflow.
const MAX_BUSY_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Settings for opening a file. See [`Sqlite::open`](crate::Sqlite::open).
///
/// ```no_run
/// # use essentially_once_sqlite::SqliteOptions;
/// # use std::time::Duration;
/// # async fn example() -> Result<(), essentially_once::Error> {
/// let sqlite = SqliteOptions::new()
///     .busy_timeout(Duration::from_secs(2))
///     .record_limit(64 * 1024)
///     .open("/var/lib/shop/shop.db")
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SqliteOptions {
    pub(crate) busy_timeout: Duration,
    pub(crate) record_limit: usize,
    pub(crate) wal_limit: u64,
    pub(crate) existing: bool,
}

impl SqliteOptions {
    /// The defaults: a timeout of 10 seconds, records of up to 16 MiB, a WAL of 64 MiB.
    pub fn new() -> Self {
        Self {
            existing: false,
            busy_timeout: Duration::from_secs(10),
            record_limit: 16 * 1024 * 1024,
            wal_limit: 64 * 1024 * 1024,
        }
    }

    /// Sets how long to wait for the write lock before [`Error::Unavailable`]; at most 365 days.
    #[must_use]
    pub fn busy_timeout(mut self, timeout: Duration) -> Self {
        self.busy_timeout = timeout;
        self
    }

    /// Sets the size limit of a record (key, headers and payload together), a state key and a state
    /// value, in bytes; at most 900,000,000.
    #[must_use]
    pub fn record_limit(mut self, bytes: usize) -> Self {
        self.record_limit = bytes;
        self
    }

    /// Sets how large the WAL (`-wal`, next to the file) may grow, in bytes; at most [`i64::MAX`].
    /// SQLite usually copies it into the file every 4 MiB, or at this limit if it is lower.
    ///
    /// The WAL exceeds the limit if a single transaction is larger, or while a read transaction on
    /// the file stays open, because SQLite cannot remove pages that a reader may still need. A
    /// warning reports that. After the read transaction ends, a commit cuts the WAL back.
    #[must_use]
    pub fn wal_limit(mut self, bytes: u64) -> Self {
        self.wal_limit = bytes;
        self
    }

    /// Fails if the file does not exist, or was not made by this version of the crate, instead of
    /// creating or migrating it. For programs that look after the data of others, and must not turn
    /// a mistyped path into a file.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// Refuses a setting out of its bounds.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let invalid = |setting, reason| Err(Error::InvalidSetting { setting, reason });
        if self.busy_timeout > MAX_BUSY_TIMEOUT {
            let reason = format!("{:?} is more than the limit of 365 days", self.busy_timeout);
            return invalid("busy_timeout", reason);
        }
        if self.record_limit > MAX_RECORD_LIMIT {
            let reason = format!(
                "{} bytes is more than the limit of {MAX_RECORD_LIMIT}",
                self.record_limit
            );
            return invalid("record_limit", reason);
        }
        if i64::try_from(self.wal_limit).is_err() {
            let reason = format!("{} bytes is more than the limit of {}", self.wal_limit, i64::MAX);
            return invalid("wal_limit", reason);
        }
        Ok(())
    }
}

impl Default for SqliteOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// Settings for opening a log. See [`Sqlite::log_with`](crate::Sqlite::log_with).
///
/// ```no_run
/// # use essentially_once_sqlite::{LogOptions, Retention, Sqlite};
/// # use std::time::Duration;
/// # async fn example(sqlite: Sqlite) -> Result<(), essentially_once::Error> {
/// let week = Duration::from_secs(7 * 24 * 60 * 60);
/// let keep = Retention::new().max_age(week).max_records(1_000_000);
/// let orders = sqlite.log_with("orders", LogOptions::new().retention(keep)).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LogOptions {
    pub(crate) existing: bool,
    pub(crate) retention: Option<Retention>,
}

impl LogOptions {
    /// Creates the log if it is missing, and keeps the stored retention.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fails if the log does not exist, instead of creating it. Without this, a consumer with a
    /// mistyped log name would wait on an empty log.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.existing = true;
        self
    }

    /// Sets which records the log keeps. Opening the log stores this in the file, so it applies to
    /// appends of every process. Without this option, a log keeps the stored retention, and a new
    /// log keeps every record. [`Retention::new`] lifts all limits. If processes open a log with
    /// different retentions, the last one holds, and each change is logged as a warning.
    ///
    /// Each append removes about twice as many expired records as it adds.
    /// [`SqliteLog::trim`](crate::SqliteLog::trim) removes all of them at once. Of an outbox, these
    /// may be records that [no relay has sent](crate::SqliteLog#as-an-outbox).
    ///
    /// Opening the log fails with [`Error::InvalidSetting`] if the retention would keep no records
    /// or has [`max_bytes`](Retention::max_bytes), because SQLite cannot keep that limit.
    #[must_use]
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = Some(retention);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_bounds_are_refused_with_the_bound() {
        let options = SqliteOptions::new;
        let most = options()
            .busy_timeout(MAX_BUSY_TIMEOUT)
            .record_limit(MAX_RECORD_LIMIT)
            .wal_limit(i64::MAX as u64);
        most.check().expect("at the bounds");
        for (options, bound) in [
            (options().busy_timeout(Duration::MAX), "365 days"),
            (options().record_limit(MAX_RECORD_LIMIT + 1), "900000000"),
            (options().wal_limit(u64::MAX), "9223372036854775807"),
        ] {
            let error = options.check().expect_err("refused");
            assert!(matches!(error, Error::InvalidSetting { .. }), "{error:?}");
            assert!(error.to_string().contains(bound), "{error}");
        }
    }
}
