//! The settings of a producer.

use std::time::Duration;

use crate::{Error, Window, backoff::Backoff};

pub(super) struct Settings {
    /// How many appends may be in flight.
    pub(super) depth: usize,
    pub(super) max_batch: Option<usize>,
    pub(super) max_batch_bytes: usize,
    pub(super) queue_records: usize,
    pub(super) queue_bytes: usize,
    pub(super) backoff: Backoff,
    pub(super) give_up_after: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            depth: 1,
            max_batch: None,
            max_batch_bytes: 1024 * 1024,
            queue_records: 8_192,
            queue_bytes: 4 * 1024 * 1024,
            backoff: Backoff::default(),
            give_up_after: None,
        }
    }
}

impl Settings {
    /// The most records of one append. By default, the window is divided among the appends in
    /// flight.
    pub(super) fn max_batch(&self) -> usize {
        self.max_batch.unwrap_or(Window::SIZE as usize / self.depth.max(1))
    }

    /// Refuses settings that are out of their bounds.
    pub(super) fn check(&self) -> Result<(), Error> {
        let within = |setting, value: usize, most: u64| match value as u64 {
            0 => Err(Error::InvalidSetting {
                setting,
                reason: "it is 0 and must be at least 1".into(),
            }),
            value if value > most => Err(Error::InvalidSetting {
                setting,
                reason: format!("it is {value} and must be at most {most}"),
            }),
            _ => Ok(()),
        };
        within("unordered", self.depth, Window::SIZE)?;
        within("max_batch", self.max_batch.unwrap_or(1), Window::SIZE)?;
        within("max_batch_bytes", self.max_batch_bytes, u64::MAX)?;
        within("queue_records", self.queue_records, u32::MAX.into())?;
        within("queue_bytes", self.queue_bytes, u32::MAX.into())?;
        self.backoff.check()?;
        if self.give_up_after == Some(Duration::ZERO) {
            return Err(Error::InvalidSetting {
                setting: "give_up_after",
                reason: "it is 0 s and must be longer; leave it unset for no limit".into(),
            });
        }
        Ok(())
    }
}
