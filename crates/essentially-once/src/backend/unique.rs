//! Numbers that nobody else draws.

use std::hash::{BuildHasher as _, RandomState};

/// A random number for what must differ between processes and machines: epochs, tokens,
/// incarnations.
///
/// It comes from the keys of the standard library's hash maps, which the operating system provides.
/// `fastrand` alone seeds itself from the time since the machine started, so machines that start
/// alike could draw the same numbers.
pub fn unique() -> u128 {
    let keyed = RandomState::new();
    let draw = || u128::from(keyed.hash_one(fastrand::u64(..)));
    draw() << 64 | draw()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn processes_whose_generators_agree_draw_different_numbers() {
        let draw = || {
            fastrand::seed(7);
            unique()
        };
        let drawn: HashSet<u128> = (0..1_000).map(|_| draw()).collect();
        assert_eq!(drawn.len(), 1_000);
        let halves: HashSet<u64> = drawn.iter().map(|number| *number as u64).collect();
        assert_eq!(halves.len(), 1_000);
    }
}
