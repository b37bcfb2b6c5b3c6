//! Chooses when the worker is killed.

use std::time::Duration;

/// One kill: after the worker has passed a line, plus a short delay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Kill {
    /// How many lines the worker must have reached. 0 kills it while it starts.
    pub(crate) after_line: usize,
    /// The delay varies, so that kills hit commits as well as writes.
    pub(crate) delay: Duration,
}

/// Draws the kills, spread over the log so that the worker makes progress between them. It divides
/// the log into as many equal parts as there are kills, and draws one line in each. It leaves out
/// the last tenth, so that the worker does not finish before the last kill. The same arguments draw
/// the same kills.
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
