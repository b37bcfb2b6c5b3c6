//! The settings of a consumer.

use std::time::Duration;

use super::{
    letters::DeadLetterOptions,
    policy::{OnFailure, OnTruncated, Rule},
    seek::StartAt,
};
use crate::{Error, backoff::Backoff};

pub(super) struct Settings {
    pub(super) start_at: StartAt,
    pub(super) max_batch: usize,
    pub(super) read_ahead_records: Option<usize>,
    pub(super) read_ahead_bytes: usize,
    pub(super) accept_volatile: bool,
    pub(super) retries: u32,
    pub(super) max_deaths: u32,
    pub(super) restart_limit: Option<u32>,
    pub(super) on_failure: Option<Rule>,
    pub(super) on_truncated: OnTruncated,
    pub(super) letters: Option<DeadLetterOptions>,
    pub(super) backoff: Backoff,
    pub(super) forget_producers_after: Duration,
    pub(super) batch_time_limit: Duration,
    pub(super) record_time_limit: Option<Duration>,
    pub(super) stop_grace: Duration,
    pub(super) standby_after: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            start_at: StartAt::default(),
            max_batch: 1_000,
            read_ahead_records: None,
            read_ahead_bytes: 4 * 1024 * 1024,
            accept_volatile: false,
            retries: 10,
            max_deaths: 3,
            restart_limit: None,
            on_failure: None,
            on_truncated: OnTruncated::default(),
            letters: None,
            backoff: Backoff::default(),
            forget_producers_after: Duration::from_secs(7 * 24 * 60 * 60),
            batch_time_limit: Duration::from_millis(100),
            record_time_limit: None,
            stop_grace: Duration::from_secs(10),
            standby_after: Duration::from_secs(1),
        }
    }
}

impl Settings {
    /// The rule for records that cannot be handled.
    pub(super) fn on_failure(&self) -> Rule {
        let default = match self.letters {
            Some(_) => OnFailure::DeadLetter,
            None => OnFailure::Stop,
        };
        self.on_failure.clone().unwrap_or_else(|| Rule::new(move |_| default))
    }

    /// Refuses settings that are out of their bounds.
    pub(super) fn check(&self) -> Result<(), Error> {
        let zero = |setting, value: usize| match value {
            0 => Err(Error::InvalidSetting {
                setting,
                reason: "it is 0 and must be at least 1".into(),
            }),
            _ => Ok(()),
        };
        zero("max_batch", self.max_batch)?;
        zero("read_ahead_records", self.read_ahead_records.unwrap_or(1))?;
        zero("max_deaths", self.max_deaths as usize)?;
        zero("read_ahead_bytes", self.read_ahead_bytes)?;
        self.backoff.check()?;
        if let Some(letters) = &self.letters {
            letters.check()?;
        }
        if self.record_time_limit == Some(Duration::ZERO) {
            return Err(Error::InvalidSetting {
                setting: "record_time_limit",
                reason: "it is 0 s and must be longer; leave it unset for no limit".into(),
            });
        }
        Ok(())
    }
}
