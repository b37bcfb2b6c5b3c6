//! Worker processes that consume until they are killed.

use std::{
    env,
    process::{Child, Command, ExitCode, Stdio},
};

use essentially_once::{ConsumerId, backend::Source};
use rustix::process::{Pid, Signal, kill_process};
use test_servers::insist;

pub use crate::work::Work;

const VARIABLE: &str = "ESSENTIALLY_ONCE_TEST_WORKER";

/// Becomes a worker if this process was started as one, and then returns only when the worker ends.
pub fn main() -> Option<ExitCode> {
    let work = env::var(VARIABLE).ok()?;
    let done = serde_json::from_str(&work).map_err(Source::from).and_then(run);
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("worker {}: {error}", std::process::id());
            ExitCode::FAILURE
        }
    })
}

fn run(work: Work) -> Result<(), Source> {
    // The parent holds the other end of stdin. When the parent ends, this process ends too.
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let consumer = ConsumerId::new(&work.consumer)?;
        let log = insist(|| work.log.log(&work.log_name)).await?;
        let store = insist(|| work.store.store()).await?;
        Ok(store.consume(consumer, log, work).await?)
    })
}

/// A worker, as its parent sees it. Dropping it ends the worker.
pub struct Worker {
    process: Child,
}

impl Worker {
    /// Starts this program again, as a worker.
    ///
    /// # Errors
    /// If the program cannot start.
    pub fn start(work: &Work) -> Result<Self, Source> {
        let process = Command::new(env::current_exe()?)
            .env(VARIABLE, serde_json::to_string(work)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { process })
    }

    /// Sends SIGKILL, so the worker has no chance to clean up.
    ///
    /// # Errors
    /// If the worker had already ended on its own, which none should.
    pub fn kill(&mut self) -> Result<(), Source> {
        self.check()?;
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Sends SIGSTOP, and waits until the worker stands still.
    ///
    /// # Errors
    /// As for [`kill`](Self::kill), or if it still runs after half a minute.
    pub fn freeze(&mut self) -> Result<(), Source> {
        self.signal(Signal::STOP)?;
        match test_servers::wait_until_stopped(self.process.id()) {
            true => Ok(()),
            false => Err("a worker still runs long after SIGSTOP".into()),
        }
    }

    /// Sends SIGCONT.
    ///
    /// # Errors
    /// As for [`kill`](Self::kill).
    pub fn thaw(&mut self) -> Result<(), Source> {
        self.signal(Signal::CONT)
    }

    /// Fails if the worker ended on its own.
    ///
    /// # Errors
    /// The worker's exit status. Its stderr shows why it ended.
    pub fn check(&mut self) -> Result<(), Source> {
        match self.process.try_wait()? {
            Some(status) => Err(format!("a worker ended on its own: {status}").into()),
            None => Ok(()),
        }
    }

    fn signal(&mut self, signal: Signal) -> Result<(), Source> {
        // The process keeps its id until it is waited for.
        self.check()?;
        kill_process(Pid::from_child(&self.process), signal)?;
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
