//! Which dead letters an operator is interested in.

use std::{collections::HashMap, time::SystemTime};

use bytes::Bytes;

use crate::{Offset, letters::DeadLetter};

/// Selects dead letters by key, reason and time. A letter must meet all conditions.
///
/// ```
/// # use essentially_once::consumer::dead_letters::LetterFilter;
/// # use std::time::{Duration, SystemTime};
/// let yesterday = SystemTime::now() - Duration::from_secs(24 * 60 * 60);
/// let filter = LetterFilter::all().reason("invalid digit").parked_from(yesterday);
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LetterFilter {
    key: Option<Bytes>,
    reason: Option<String>,
    parked_from: Option<SystemTime>,
    parked_before: Option<SystemTime>,
    /// The versions of the letters at these offsets.
    unchanged: Option<HashMap<Offset, u64>>,
}

impl LetterFilter {
    /// All letters.
    pub fn all() -> Self {
        Self::default()
    }

    /// Letters with this [key](DeadLetter::key).
    #[must_use]
    pub fn key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Letters whose first or last reason contains this text.
    #[must_use]
    pub fn reason(mut self, text: impl Into<String>) -> Self {
        self.reason = Some(text.into());
        self
    }

    /// Letters that were set aside at or after this time.
    #[must_use]
    pub fn parked_from(mut self, time: SystemTime) -> Self {
        self.parked_from = Some(time);
        self
    }

    /// Letters that were set aside before this time.
    #[must_use]
    pub fn parked_before(mut self, time: SystemTime) -> Self {
        self.parked_before = Some(time);
        self
    }

    /// The letters at these offsets, if each still has the [version](DeadLetter::version) given.
    #[must_use]
    pub fn unchanged(mut self, versions: impl IntoIterator<Item = (Offset, u64)>) -> Self {
        self.unchanged = Some(versions.into_iter().collect());
        self
    }

    /// Whether the letter meets all conditions.
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let has_reason = |text: &String| letter.first_reason.contains(text) || letter.last_reason.contains(text);
        let is_unchanged = |versions: &HashMap<_, _>| versions.get(&letter.record.offset) == Some(&letter.version);
        self.key.as_ref().is_none_or(|key| letter.key() == Some(key))
            && self.reason.as_ref().is_none_or(has_reason)
            && self.parked_from.is_none_or(|time| letter.parked_at >= time)
            && self.parked_before.is_none_or(|time| letter.parked_at < time)
            && self.unchanged.as_ref().is_none_or(is_unchanged)
    }
}
