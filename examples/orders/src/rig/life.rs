//! One life of a process, from its start to its end or its death.

use std::{
    collections::VecDeque,
    fmt,
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio},
    str::FromStr,
    sync::mpsc::Sender,
    thread::{self, JoinHandle},
};

use serde::{Deserialize, Serialize};

use super::{customers, leash::Leash, plan::Fault, race::Event};
use crate::{
    Failure, processes,
    processes::{Role, Until},
    settings::Settings,
};

/// What a process is to do. It gets this on stdin, since it may hold passwords, and everyone can
/// read a command line.
#[derive(Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) role: Role,
    pub(crate) until: Until,
    pub(crate) settings: Settings,
    /// What happens to appends to the bus.
    pub(crate) faults: Vec<Fault>,
    /// How many orders to handle before waiting for the parent.
    pub(crate) leash: u64,
    /// The file of orders to place, with one order per line.
    pub(crate) input: std::path::PathBuf,
}

/// The bytes that a process gets from its parent after its task.
pub(super) const SLACK: u8 = b'.';
pub(super) const STOP: u8 = b's';

/// What a process tells its parent, as a line of text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Report {
    /// The order with this number was placed.
    Placed(u32),
    /// All orders were placed.
    AllPlaced,
    /// A record about the order with this number was handled.
    Handled(u32),
    /// A reply from the bus was lost.
    Lost,
    /// A record was altered on its way to the bus.
    Altered,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Placed(number) => write!(f, "placed {number}"),
            Self::AllPlaced => f.write_str("all placed"),
            Self::Handled(number) => write!(f, "handled {number}"),
            Self::Lost => f.write_str("lost"),
            Self::Altered => f.write_str("altered"),
        }
    }
}

impl FromStr for Report {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let unknown = || format!("a process reported {line:?}");
        let number = |text: &str| text.parse().map_err(|_| unknown());
        match line.split_once(' ') {
            Some(("placed", text)) => Ok(Self::Placed(number(text)?)),
            Some(("all", "placed")) => Ok(Self::AllPlaced),
            Some(("handled", text)) => Ok(Self::Handled(number(text)?)),
            None if line == "lost" => Ok(Self::Lost),
            None if line == "altered" => Ok(Self::Altered),
            _ => Err(unknown()),
        }
    }
}

/// Runs the process whose task comes on stdin.
pub(crate) fn run_process() -> Result<(), Failure> {
    let (leash, task) = Leash::attach()?;
    crate::runtime()?.block_on(async {
        let customers = match (task.role, task.until) {
            (Role::OrderService, Until::Stopped) => Some(customers::start(&task, leash.clone()).await?),
            _ => None,
        };
        let customers = async {
            match customers {
                Some(customers) => customers.await?,
                None => Ok(()),
            }
        };
        // The end of the runtime waits for the customers, also after a panic.
        let _stop = leash.stopped().clone().drop_guard();
        tokio::try_join!(processes::run(task, leash.clone()), customers).map(|_| ())
    })
}

/// A running process.
pub(super) struct Life {
    process: Child,
    listener: Option<JoinHandle<()>>,
    words: Option<JoinHandle<String>>,
}

/// How a process has ended.
pub(super) struct End {
    pub(super) status: ExitStatus,
    /// The last lines that it wrote to stderr.
    pub(super) words: String,
}

impl Life {
    /// Starts a process, and sends what it reports to `events`.
    pub(super) fn start(task: &Task, events: Sender<Event>) -> Result<Self, Failure> {
        let mut process = Command::new(std::env::current_exe()?)
            .arg("process")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start the {}: {error}", task.role.name()))?;
        let stdout = process.stdout.take().ok_or("a process has no stdout")?;
        let stderr = process.stderr.take().ok_or("a process has no stderr")?;
        let mut life = Self {
            process,
            listener: Some(listen(stdout, events)),
            words: Some(thread::spawn(|| last_lines(stderr))),
        };
        let mut line = serde_json::to_string(task)?;
        line.push('\n');
        life.write(line.as_bytes());
        Ok(life)
    }

    /// Lets the process continue for the length of its leash.
    pub(super) fn give_slack(&mut self) {
        self.write(&[SLACK]);
    }

    /// Whether the process has not ended yet.
    pub(super) fn is_running(&mut self) -> Result<bool, Failure> {
        Ok(self.process.try_wait()?.is_none())
    }

    /// Asks the process to stop.
    pub(super) fn stop(&mut self) {
        self.write(&[STOP]);
    }

    /// Kills the process with SIGKILL.
    pub(super) fn kill(&mut self) {
        // An error means that the process just ended on its own. Its status shows it.
        let _ = self.process.kill();
    }

    /// Waits for the end of the process. All that it reported has arrived afterwards.
    pub(super) fn wait(mut self) -> Result<End, Failure> {
        let status = self.process.wait()?;
        if let Some(listener) = self.listener.take() {
            listener.join().map_err(|_| "the rig panicked")?;
        }
        let words = match self.words.take() {
            Some(words) => words.join().map_err(|_| "the rig panicked")?,
            None => String::new(),
        };
        Ok(End { status, words })
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(stdin) = &mut self.process.stdin {
            // An error means that the process just ended. Its status shows it.
            let _ = stdin.write_all(bytes);
        }
    }
}

/// An error in the rig must not leave a process behind.
impl Drop for Life {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Reads to the end, so that the process never waits for its reader.
fn last_lines(stderr: ChildStderr) -> String {
    const MOST: usize = 10;
    let mut last = VecDeque::new();
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        if last.len() == MOST {
            last.pop_front();
        }
        last.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
    }
    Vec::from(last).join("\n")
}

fn listen(stdout: ChildStdout, events: Sender<Event>) -> JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            // The last line of a killed process may be incomplete, or not be text.
            let Some(report) = line.ok().and_then(|line| line.parse().ok()) else {
                break;
            };
            if events.send(Event::Reported(report)).is_err() {
                return;
            }
        }
        // An error means that the supervisor has given up.
        let _ = events.send(Event::Ended);
    })
}
