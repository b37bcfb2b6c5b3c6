//! Removes the records that a log's retention no longer keeps, or those before an offset.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use essentially_once::{Error, Offset, backend::Retention};
use redis::Value;

use crate::{
    error::write_failed,
    log::{reader::id, stream::Stream},
};

/// It frees memory and records what it removed, so it must also run while memory is full.
const TRIM: &str = concat!(
    "#!lua flags=allow-oom\n",
    include_str!("incarnation.lua"),
    include_str!("trim.lua")
);

/// Appends trim at most once in this time.
const TRIM_EVERY: Duration = Duration::from_secs(1);

impl Stream {
    pub(crate) async fn trim(&self) -> Result<u64, Error> {
        if self.options.retention == Retention::default() {
            return Ok(0);
        }
        let [records, age] = trim_arguments(&self.options.retention);
        self.remove("trim", [records, age, String::new()]).await
    }

    /// Removes the entries before an id, and returns their number.
    pub(crate) async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        const VERB: &str = "remove records from";
        let bounds = self.require(self.extent(VERB).await?, VERB)?.bounds();
        bounds.check(&self.id, offset.max(bounds.earliest))?;
        if offset <= bounds.earliest {
            return Ok(0);
        }
        self.remove(VERB, [String::new(), String::new(), id(offset)]).await
    }

    /// Runs the script until nothing is left to remove.
    async fn remove(&self, verb: &str, limits: [String; 3]) -> Result<u64, Error> {
        let Some(incarnation) = self.id.incarnation() else {
            let why = "the log has no incarnation: grant the user XGROUP CREATE, and open it again";
            return Err(Error::failed(self.on(verb), why));
        };
        let mut total = 0;
        loop {
            let mut trim = redis::cmd("EVAL");
            trim.arg(TRIM).arg(2).arg(&self.key[..]).arg(&self.kept.now);
            trim.arg(incarnation);
            trim.arg(&limits);
            let answer = self
                .ask(&trim)
                .await?
                .map_err(|error| write_failed(self.on(verb), error))?;
            match answer {
                Value::Nil => return Err(self.gone(verb)),
                Value::Array(parts) => match parts[..] {
                    [Value::Int(removed), Value::Int(more)] => {
                        total += u64::try_from(removed).unwrap_or(0);
                        if more == 0 {
                            return Ok(total);
                        }
                    }
                    _ => return Err(self.not_understood(verb)),
                },
                _ => return Err(self.not_understood(verb)),
            }
        }
    }

    /// Trims in the background, if it is time to.
    pub(crate) fn trim_aside(self: &Arc<Self>) {
        if self.options.retention == Retention::default() || self.id.incarnation().is_none() {
            return;
        }
        {
            let mut trimmed = self.trimmed.lock().unwrap_or_else(PoisonError::into_inner);
            if trimmed.is_some_and(|trimmed| trimmed.elapsed() < TRIM_EVERY) {
                return;
            }
            *trimmed = Some(Instant::now());
        }
        let stream = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = stream.trim().await {
                tracing::warn!(log = %stream.id, %error, "could not remove expired records; the next append tries again");
            }
        });
    }
}

/// The limits on records and age. A missing limit is an empty argument.
fn trim_arguments(retention: &Retention) -> [String; 2] {
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
