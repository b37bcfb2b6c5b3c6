//! A log's retention, as arguments of the script that trims.

use essentially_once::backend::Retention;

/// The limits on records and age. A missing limit is an empty argument.
pub(crate) fn trim_arguments(retention: &Retention) -> [String; 2] {
    // Lua counts exactly up to 2^53. A larger limit keeps everything anyway.
    let argument = |bound: Option<u128>| bound.map_or(String::new(), |bound| bound.min(1 << 52).to_string());
    [
        argument(retention.records.map(u128::from)),
        argument(retention.age.map(|age| age.as_millis())),
    ]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn bounds_that_lua_cannot_count_are_clamped() {
        let endless = Retention::new().max_records(u64::MAX).max_age(Duration::MAX);
        assert_eq!(trim_arguments(&endless), ["4503599627370496", "4503599627370496"]);
        assert_eq!(trim_arguments(&Retention::default()), ["", ""]);
    }
}
