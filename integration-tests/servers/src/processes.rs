//! The processes of this machine, and who started them.

use std::{fs, path::Path, process::Command};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// A process or a thread.
pub(crate) struct Status {
    pub(crate) state: char,
    parent: u32,
    pub(crate) group: u32,
}

/// Its status, read from its folder in `/proc`.
pub(crate) fn status(folder: &Path) -> Option<Status> {
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    // Its name may contain anything, and ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace();
    Some(Status {
        state: words.next()?.chars().next()?,
        parent: words.next()?.parse().ok()?,
        group: words.next()?.parse().ok()?,
    })
}

/// The processes of a group.
pub(crate) fn members(group: u32) -> Vec<u32> {
    let members = all().into_iter().filter(|(_, status)| status.group == group);
    members.map(|(id, _)| id).collect()
}

/// The descendants of a group's first process that have left the group, so that no signal to the
/// group reaches them.
pub(crate) fn outsiders(first: u32) -> Vec<u32> {
    let all = all();
    let mut family = vec![first];
    let mut next = 0;
    while let Some(&parent) = family.get(next) {
        let children = all.iter().filter(|(_, status)| status.parent == parent);
        let children: Vec<u32> = children.map(|(id, _)| *id).filter(|id| !family.contains(id)).collect();
        family.extend(children);
        next += 1;
    }
    let left = all.iter().filter(|(_, status)| status.group != first);
    left.map(|(id, _)| *id).filter(|id| family.contains(id)).collect()
}

/// Sends a signal to some processes. Any of them may already be gone.
pub(crate) fn signal_each(processes: &[u32], signal: Signal) {
    for process in processes.iter().copied().filter_map(pid) {
        let _ = kill_process(process, signal);
    }
}

/// Whether a process is gone. A zombie is, too: it only waits for its parent to notice.
pub(crate) fn has_ended(process: u32) -> bool {
    let gone = pid(process).is_none_or(|process| test_kill_process(process) == Err(rustix::io::Errno::SRCH));
    let status = status(Path::new(&format!("/proc/{process}")));
    gone || status.is_some_and(|status| matches!(status.state, 'Z' | 'X'))
}

pub(crate) fn pid(process: u32) -> Option<Pid> {
    i32::try_from(process).ok().and_then(Pid::from_raw)
}

fn all() -> Vec<(u32, Status)> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return told_by_ps();
    };
    let processes = processes.flatten().filter_map(|process| {
        let id = process.file_name().to_str()?.parse().ok()?;
        Some((id, status(&process.path())?))
    });
    processes.collect()
}

/// For systems without `/proc`, such as macOS.
fn told_by_ps() -> Vec<(u32, Status)> {
    let columns = ["pid=", "ppid=", "pgid=", "stat="].map(|column| ["-o", column]);
    let output = Command::new("ps").arg("-A").args(columns.concat()).output();
    let output = output.map(|output| output.stdout).unwrap_or_default();
    let lines = String::from_utf8_lossy(&output);
    let processes = lines.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let mut number = || words.next()?.parse().ok();
        let (id, parent, group) = (number()?, number()?, number()?);
        let state = words.next()?.chars().next()?;
        Some((id, Status { state, parent, group }))
    });
    processes.collect()
}
