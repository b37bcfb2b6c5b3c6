use std::time::Duration;

use crate::Error;

/// Which records a log keeps. A record is removed as soon as it exceeds one limit. Without limits,
/// records stay forever.
///
/// Not every backend can enforce every limit. An adapter refuses a limit that its backend cannot
/// enforce.
///
/// ```
/// # use essentially_once::backend::Retention;
/// # use std::time::Duration;
/// let week = Duration::from_secs(7 * 24 * 60 * 60);
/// let retention = Retention::new().max_age(week).max_records(1_000_000);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Retention {
    /// See [`max_records`](Self::max_records).
    pub records: Option<u64>,
    /// See [`max_age`](Self::max_age).
    pub age: Option<Duration>,
    /// See [`max_bytes`](Self::max_bytes).
    pub bytes: Option<u64>,
}

impl Retention {
    /// Keeps everything.
    pub const fn new() -> Self {
        Self {
            records: None,
            age: None,
            bytes: None,
        }
    }

    /// Keeps this many of the newest records. Must be at least 1.
    #[must_use]
    pub const fn max_records(mut self, records: u64) -> Self {
        self.records = Some(records);
        self
    }

    /// Keeps records for this long after they were appended, by the log's clock, in milliseconds.
    /// Must be at least 1 ms.
    #[must_use]
    pub const fn max_age(mut self, age: Duration) -> Self {
        self.age = Some(age);
        self
    }

    /// Keeps about this many bytes of the newest records. Must be at least 1.
    #[must_use]
    pub const fn max_bytes(mut self, bytes: u64) -> Self {
        self.bytes = Some(bytes);
        self
    }

    /// Refuses `max_bytes`, for a backend that does not count bytes.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`].
    pub fn refuse_bytes(&self, backend: &str) -> Result<(), Error> {
        Self::refuse(self.bytes.is_some(), "max_bytes", backend)
    }

    /// Refuses `max_records`, for a backend that does not count records.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`].
    pub fn refuse_records(&self, backend: &str) -> Result<(), Error> {
        Self::refuse(self.records.is_some(), "max_records", backend)
    }

    fn refuse(is_set: bool, limit: &str, backend: &str) -> Result<(), Error> {
        if is_set {
            return Err(Error::InvalidSetting {
                setting: "retention",
                reason: format!("{backend} does not support `{limit}`; use another limit"),
            });
        }
        Ok(())
    }

    /// Refuses a limit that would remove a record as soon as it is appended. Adapters call it when
    /// they open a log.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`].
    pub fn check(&self) -> Result<(), Error> {
        let invalid = |reason: &str| {
            Err(Error::InvalidSetting {
                setting: "retention",
                reason: reason.into(),
            })
        };
        if self.records == Some(0) {
            return invalid("`max_records` must be at least 1");
        }
        if self.age.is_some_and(|age| age < Duration::from_millis(1)) {
            return invalid("`max_age` must be at least 1 ms");
        }
        if self.bytes == Some(0) {
            return invalid("`max_bytes` must be at least 1");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_that_keeps_nothing_is_refused() {
        let none = Retention::new();
        assert!(none.max_records(0).check().is_err());
        assert!(none.max_age(Duration::ZERO).check().is_err());
        assert!(none.max_age(Duration::from_micros(999)).check().is_err());
        assert!(none.max_bytes(0).check().is_err());
        let least = none.max_records(1).max_age(Duration::from_millis(1)).max_bytes(1);
        assert!(least.check().is_ok());
        assert!(none.check().is_ok());
        assert!(least.refuse_bytes("it").is_err());
        assert!(least.refuse_records("it").is_err());
        assert!(none.refuse_bytes("it").is_ok());
    }
}
