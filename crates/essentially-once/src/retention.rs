//! What a log keeps.

use std::time::Duration;

use crate::Error;

/// What a log keeps; records are removed as soon as one of the two bounds says so. The default keeps everything.
///
/// For adapters whose backend removes record by record. One that removes in larger portions, as RabbitMQ does, has settings of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Retention {
    /// Keep the last so many records; at least 1.
    pub records: Option<u64>,
    /// Keep records for so long after they were appended, by the log's clock, to the millisecond; at least 1 ms.
    pub age: Option<Duration>,
}

impl Retention {
    /// Refuses what would remove a record in the moment it is appended. Adapters call it when a log is opened.
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
            return invalid("`records` must be at least 1");
        }
        if self.age.is_some_and(|age| age < Duration::from_millis(1)) {
            return invalid("`age` must be at least 1 ms");
        }
        Ok(())
    }
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
}
