//! When the worker is killed.

use std::time::Duration;

/// One kill: once the worker is past a line, and a little later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Kill {
    /// How many lines must have been reached; 0 kills the worker while it starts.
    pub(crate) after_line: usize,
    /// A little more, so that the kill falls on a commit as well as on a write.
    pub(crate) delay: Duration,
}

/// Draws the kills, spread over the log so that the worker does something between any two: a line in each of as many equal parts of
/// it as there are kills. The last tenth is left out, lest the worker be done before the last kill. The same arguments draw the
/// same kills.
pub(crate) fn kills(seed: u64, lines: usize, kills: usize) -> Vec<Kill> {
    const LONGEST_DELAY_MICROS: u64 = 2_000;
    let mut rng = fastrand::Rng::with_seed(seed);
    let reach = lines - lines / 10;
    (0..kills)
        .map(|kill| {
            let (from, to) = (kill * reach / kills, (kill + 1) * reach / kills);
            Kill {
                after_line: rng.usize(from..to.max(from + 1)),
                delay: Duration::from_micros(rng.u64(..=LONGEST_DELAY_MICROS)),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_the_kills() {
        assert_eq!(kills(7, 10_000, 20), kills(7, 10_000, 20));
        assert_ne!(kills(7, 10_000, 20), kills(8, 10_000, 20));
    }

    #[test]
    fn kills_are_spread_over_the_log() {
        let lines: Vec<usize> = kills(7, 10_000, 20).iter().map(|kill| kill.after_line).collect();
        assert!(lines.is_sorted());
        assert!(
            lines.iter().enumerate().all(|(kill, line)| line / 450 == kill),
            "{lines:?}"
        );
    }

    #[test]
    fn more_kills_than_lines_fall_on_the_start() {
        let kills = kills(7, 5, 20);
        assert_eq!(kills.len(), 20);
        assert!(kills.iter().all(|kill| kill.after_line < 5), "{kills:?}");
    }
}
