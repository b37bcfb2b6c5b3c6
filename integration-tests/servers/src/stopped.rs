//! Whether processes have stopped after `SIGSTOP`.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

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
        let status = stat(&thread.path());
        status.is_none_or(|(state, _)| matches!(state, 'T' | 't' | 'Z' | 'X'))
    })
}

fn members(group: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let members = processes.filter_map(|process| {
        let id = process.file_name().to_str()?.parse().ok()?;
        (stat(&process.path())?.1 == group).then_some(id)
    });
    members.collect()
}

/// The state and the group of a process or thread.
fn stat(folder: &Path) -> Option<(char, u32)> {
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    // Its name may contain anything, and ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace();
    let state = words.next()?.chars().next()?;
    Some((state, words.nth(1)?.parse().ok()?))
}
