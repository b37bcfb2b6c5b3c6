//! What a log keeps.

use std::time::Duration;

use essentially_once::Error;

/// What a log keeps; records are removed as soon as one of the two bounds says so. The default keeps everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Retention {
    /// Keep the last so many records; at least 1.
    pub records: Option<u64>,
    /// Keep records for so long after they were appended, by the server's clock, to the millisecond; at least 1 ms.
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

    /// The two bounds as arguments of the script that trims; empty where there is none.
    pub(crate) fn arguments(&self) -> [String; 2] {
        // Lua counts exactly up to 2^53; what is more keeps everything anyway.
        let argument = |bound: Option<u128>| bound.map_or(String::new(), |bound| bound.min(1 << 52).to_string());
        [
            argument(self.records.map(u128::from)),
            argument(self.age.map(|age| age.as_millis())),
        ]
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

    #[test]
    fn bounds_that_lua_cannot_count_are_clamped() {
        let endless = Retention {
            records: Some(u64::MAX),
            age: Some(Duration::MAX),
        };
        assert_eq!(endless.arguments(), ["4503599627370496", "4503599627370496"]);
        assert_eq!(Retention::default().arguments(), ["", ""]);
    }
}
