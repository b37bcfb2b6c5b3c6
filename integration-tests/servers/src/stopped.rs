//! Whether processes have stopped after `SIGSTOP`.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::processes::{members, outsiders, signal_each, status};

/// How long that may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// Waits until all threads of a process have stopped. The thread that gets the signal must run
/// before it can stop the others, and on a busy machine they answer requests until then.
///
/// Returns `false` if some still run after half a minute. Only Linux shows the threads, so it
/// returns `true` at once on other systems.
#[must_use]
pub fn wait_until_stopped(process: u32) -> bool {
    wait_until(|| has_stopped(process))
}

/// The same for all processes of a group.
#[must_use]
pub(crate) fn wait_until_group_stopped(group: u32) -> bool {
    wait_until(|| members(group).into_iter().all(has_stopped))
}

/// Stops the descendants that left a group, and waits until they have stopped. The group itself
/// must have stopped, or it could start others.
#[must_use]
pub(crate) fn stop_outsiders(group: u32) -> bool {
    wait_until(|| {
        let outsiders = outsiders(group);
        signal_each(&outsiders, Signal::STOP);
        outsiders.into_iter().all(has_stopped)
    })
}

fn wait_until(condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

/// A process that has ended counts as stopped.
fn has_stopped(process: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{process}/task"));
    threads.into_iter().flatten().flatten().all(|thread| {
        let status = status(&thread.path());
        status.is_none_or(|status| matches!(status.state, 'T' | 't' | 'Z' | 'X'))
    })
}
