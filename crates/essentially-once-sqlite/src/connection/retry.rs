//! Retries while the file is locked, without blocking the thread.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use tokio::time::{self, Instant};

use crate::error::is_busy;

pub(super) const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// Retries while another connection holds the lock. Other tasks run during the short pauses.
pub(crate) async fn retry_busy<T>(
    deadline: Instant,
    longest_pause: Duration,
    mut attempt: impl FnMut() -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let mut pause = SHORTEST_PAUSE;
    loop {
        match attempt() {
            Err(error) if is_busy(&error) && Instant::now() < deadline => {
                time::sleep(jittered(pause)).await;
                pause = (pause * 2).min(longest_pause);
            }
            result => return result,
        }
    }
}

/// Returns half to all of `pause`, at random, so that two processes do not poll in lockstep.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().hash_one(0u8) as u32;
    pause / 2 + (pause / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_within_their_bounds() {
        for _ in 0..1000 {
            let pause = jittered(LONGEST_PAUSE);
            assert!(pause >= LONGEST_PAUSE / 2 && pause <= LONGEST_PAUSE, "{pause:?}");
        }
    }
}
