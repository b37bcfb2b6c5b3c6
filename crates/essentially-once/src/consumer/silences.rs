//! How patient a standby is with an owner that shows no sign of life.

use std::{collections::VecDeque, time::Duration};

/// By which factor the next silence must exceed the longest recent silence of a live owner.
const MARGIN: u32 = 3;

/// How many silences are remembered.
const REMEMBERED: usize = 16;

/// The longest silence to remember, as a multiple of `standby_after`.
const LONGEST: u32 = 60;

/// How long the owners of a position were silent while they were alive. It belongs to a run, and
/// outlives its sessions.
#[derive(Debug, Default)]
pub(super) struct Silences {
    recent: VecDeque<Duration>,
}

impl Silences {
    /// Remembers how long a live owner was silent. Caps outliers, such as the time of a suspension.
    pub(super) fn remember(&mut self, silence: Duration, standby_after: Duration) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent
            .push_back(silence.min(standby_after.saturating_mul(LONGEST)));
    }

    /// How long an owner must be silent to count as dead.
    pub(super) fn limit(&self, standby_after: Duration) -> Duration {
        let longest = self.recent.iter().max().copied().unwrap_or_default();
        standby_after.max(longest.saturating_mul(MARGIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn patience_grows_with_the_silences_of_the_living_and_fades_with_them() {
        let mut silences = Silences::default();
        assert_eq!(silences.limit(SECOND), SECOND);
        silences.remember(5 * SECOND, SECOND);
        assert_eq!(silences.limit(SECOND), 15 * SECOND);
        for _ in 0..REMEMBERED {
            silences.remember(SECOND / 10, SECOND);
        }
        assert_eq!(silences.limit(SECOND), SECOND);
    }

    #[test]
    fn an_hour_of_suspension_does_not_make_a_standby_wait_for_hours() {
        let mut silences = Silences::default();
        silences.remember(3_600 * SECOND, SECOND);
        assert_eq!(silences.limit(SECOND), MARGIN * LONGEST * SECOND);
    }
}
