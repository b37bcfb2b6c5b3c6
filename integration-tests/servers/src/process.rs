//! Runs a server's process.

use std::{
    ffi::OsString,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Signal, kill_process_group};

use crate::{
    Error,
    folder::Folder,
    processes::{self, has_ended, pid, signal_each},
    stopped::{stop_outsiders, wait_until_group_stopped},
};

/// How long a server may take to start on a busy machine.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(60);

/// A running server and its children, in their own process group. The group is noted in the
/// server's folder. Children that leave the group, as those of PostgreSQL do, are stopped and
/// killed with it.
pub(crate) struct Process {
    child: Child,
    group: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts a program and appends its output to the folder's log.
    pub(crate) fn spawn(
        folder: &Folder,
        program: &Path,
        arguments: &[OsString],
        variables: &[(&str, OsString)],
    ) -> Result<Self, Error> {
        let log = File::options().create(true).append(true).open(folder.log())?;
        let mut command = Command::new("sh");
        if let Some(owner) = folder.owner() {
            command.uid(owner.user).gid(owner.group);
        }
        // The shell notes the group before it becomes the server, so the janitor can never miss it.
        let child = command
            .args(["-c", r#"echo $$ >"$0" && exec "$@""#])
            .arg(folder.group())
            .arg(program)
            .args(arguments)
            .envs(variables.iter().cloned())
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|error| format!("cannot start `sh` to run {}: {error}", program.display()))?;
        Ok(Self {
            child,
            group: folder.group(),
            log: folder.log(),
        })
    }

    /// Runs a program to its end.
    pub(crate) fn run(folder: &Folder, program: &Path, arguments: &[OsString]) -> Result<(), Error> {
        let mut process = Self::spawn(folder, program, arguments, &[])?;
        let status = process.child.wait()?;
        if status.success() {
            return Ok(());
        }
        Err(format!("{} failed ({status}): {}", program.display(), log_tail(&process.log)).into())
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Polls until the server is ready. `what` completes "... is not ready".
    pub(crate) fn wait_ready(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        loop {
            let Err(error) = ready() else { return Ok(()) };
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("{what} ended at its start ({status}): {}", log_tail(&self.log)).into());
            }
            if Instant::now() > deadline {
                return Err(format!("{what} is not ready after {limit:?} ({error}): {}", log_tail(&self.log)).into());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal to the whole group. The group may already be gone, since it can end at any
    /// moment.
    fn signal(&self, signal: Signal) {
        let Some(group) = pid(self.id()) else {
            return;
        };
        let _ = kill_process_group(group, signal);
    }

    /// Stops the whole group with `SIGSTOP`, and waits until it and all its descendants stand
    /// still.
    ///
    /// # Panics
    /// If it still runs after half a minute.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
        assert!(
            wait_until_group_stopped(self.id()) && stop_outsiders(self.id()),
            "process group {} still runs long after SIGSTOP",
            self.id()
        );
    }

    /// Resumes what [`freeze`](Self::freeze) stopped.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
        signal_each(&processes::outsiders(self.id()), Signal::CONT);
    }

    /// Sends a signal that ends the server, and waits until it has ended.
    pub(crate) fn end(mut self, signal: Signal) -> Result<(), Error> {
        if signal == Signal::KILL {
            return self.kill();
        }
        self.signal(signal);
        // A frozen process would not notice the signal.
        self.thaw();
        self.child.wait()?;
        Ok(())
    }

    /// Kills the whole group and its descendants, and waits until they have ended.
    fn kill(&mut self) -> Result<(), Error> {
        let mut outsiders = processes::outsiders(self.id());
        if !outsiders.is_empty() {
            // Only a living server tells who its children are, and a stopped one starts no more.
            self.signal(Signal::STOP);
            let _ = wait_until_group_stopped(self.id());
            outsiders = processes::outsiders(self.id());
            signal_each(&outsiders, Signal::KILL);
        }
        self.signal(Signal::KILL);
        self.child.wait()?;
        wait_until("the server's children have ended", START_LIMIT, || {
            Ok(outsiders.iter().copied().all(has_ended))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Only if nobody has waited for it. Otherwise another process may have its number by now.
        if let Ok(None) = self.child.try_wait() {
            // An error cannot be reported here.
            let _ = self.kill();
        }
        let _ = fs::remove_file(&self.group);
    }
}

/// Polls every few milliseconds until the answer is yes. `what` names the awaited state.
pub(crate) fn wait_until(
    what: &str,
    limit: Duration,
    mut check: impl FnMut() -> Result<bool, Error>,
) -> Result<(), Error> {
    let deadline = Instant::now() + limit;
    loop {
        let last = match check() {
            Ok(true) => return Ok(()),
            Ok(false) => String::from("not yet"),
            Err(error) => error.to_string(),
        };
        if Instant::now() > deadline {
            return Err(format!("not reached within {limit:?}: {what} ({last})").into());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The log's last lines, as one message.
fn log_tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(15)..];
    format!("its log ends with\n{}", tail.join("\n"))
}

/// Whether an error of [`Process::wait_ready`] says that another process listens on the port.
pub(crate) fn address_in_use(error: &Error) -> bool {
    let text = error.to_string().to_lowercase();
    ["address already in use", "eaddrinuse", "dist_port_already_used"]
        .iter()
        .any(|reason| text.contains(reason))
}
