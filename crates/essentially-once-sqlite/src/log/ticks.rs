//! A clock for readers that expect records soon. Tokio's timer rounds up to a millisecond, which
//! makes it tick every 2 ms.

use std::{
    sync::{Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::{sync::Notify, time};

use crate::connection::lock::lock;

/// The time between two ticks.
const TICK: Duration = Duration::from_micros(500);

/// How long the thread outlives the last reader that waited for it.
const LINGER: Duration = Duration::from_secs(1);

/// All readers of the process share one thread, which runs while any of them waits.
static TICKS: Ticks = Ticks {
    state: Mutex::new(State {
        is_awaited: false,
        is_running: false,
    }),
    awaited: Condvar::new(),
    tick: Notify::const_new(),
};

struct Ticks {
    state: Mutex<State>,
    awaited: Condvar,
    tick: Notify,
}

struct State {
    is_awaited: bool,
    is_running: bool,
}

/// Waits for the next tick, at most about half a millisecond. Cancel-safe.
pub(super) async fn tick() {
    let tick = TICKS.tick.notified();
    match TICKS.start() {
        true => tick.await,
        false => time::sleep(TICK).await,
    }
}

impl Ticks {
    /// Asks for a tick. Returns whether one will come: there may be no thread for it.
    fn start(&'static self) -> bool {
        let mut state = lock(&self.state);
        state.is_awaited = true;
        if state.is_running {
            self.awaited.notify_one();
            return true;
        }
        let thread = thread::Builder::new().name("essentially-once-tick".into());
        state.is_running = thread.spawn(|| self.run()).is_ok();
        state.is_running
    }

    fn run(&self) {
        loop {
            let state = lock(&self.state);
            let waited = self
                .awaited
                .wait_timeout_while(state, LINGER, |state| !state.is_awaited);
            let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if !state.is_awaited {
                state.is_running = false;
                return;
            }
            state.is_awaited = false;
            drop(state);
            thread::sleep(TICK);
            self.tick.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn each_waiter_gets_a_tick_also_after_the_thread_has_ended() {
        for _ in 0..2 {
            tokio::join!(tick(), tick());
            let deadline = Instant::now() + 20 * LINGER;
            while lock(&TICKS.state).is_running {
                assert!(Instant::now() < deadline, "the thread goes on without a reader");
                time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}
