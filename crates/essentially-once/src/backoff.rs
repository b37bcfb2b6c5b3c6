//! Pauses before something is tried again.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

use crate::Error;

/// Pauses that double, with up to 100 % jitter, and without an end.
#[derive(Clone, Copy)]
pub(crate) struct Backoff {
    pub(crate) shortest: Duration,
    /// Without jitter.
    pub(crate) longest: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            shortest: Duration::from_millis(10),
            longest: Duration::from_secs(10),
        }
    }
}

impl Backoff {
    /// Refuses bounds in the wrong order.
    pub(crate) fn check(self) -> Result<(), Error> {
        let Self { shortest, longest } = self;
        if shortest <= longest {
            return Ok(());
        }
        Err(Error::InvalidSetting {
            setting: "min_backoff",
            reason: format!("it is {shortest:?} and must not exceed `max_backoff`, which is {longest:?}"),
        })
    }

    /// The pauses, from the shortest one on.
    pub(crate) fn pauses(self) -> ExponentialBackoff {
        ExponentialBuilder::default()
            .with_min_delay(self.shortest)
            .with_max_delay(self.longest)
            .with_jitter()
            .without_max_times()
            .build()
    }
}
