//! Worker processes that consume until they are killed.

use std::{
    env,
    path::PathBuf,
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use essentially_once::{ConsumerId, backend::Source};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use test_servers::insist;

use crate::place::Address;

const VARIABLE: &str = "ESSENTIALLY_ONCE_TEST_WORKER";

/// A worker's settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Work {
    /// Where the log is.
    pub log: Address,
    /// The log's name.
    pub log_name: String,
    /// Where the store is.
    pub store: Address,
    /// The consumer's name.
    pub consumer: String,
    /// The most records in a batch.
    pub max_batch: usize,
    /// How long the handler takes for each record.
    pub pause: Duration,
    /// One in this many records takes `long_pause`.
    pub long_every: Option<u64>,
    /// How long the handler takes for that record.
    pub long_pause: Duration,
    /// How long a standby waits. The default is zero: a killed or frozen worker is then fenced at
    /// its commits, and nobody waits for it.
    pub standby_after: Duration,
    /// A file that grows by one byte for each call of the handler.
    pub calls: Option<PathBuf>,
}

impl Work {
    /// Work without pauses, in batches of 100.
    pub fn new(log: Address, store: Address, log_name: &str, consumer: &str) -> Self {
        Self {
            log,
            log_name: log_name.to_owned(),
            store,
            consumer: consumer.to_owned(),
            max_batch: 100,
            pause: Duration::ZERO,
            long_every: None,
            long_pause: Duration::ZERO,
            standby_after: Duration::ZERO,
            calls: None,
        }
    }
}

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

    /// Sends SIGSTOP.
    ///
    /// # Errors
    /// As for [`kill`](Self::kill).
    pub fn freeze(&mut self) -> Result<(), Source> {
        self.signal(Signal::STOP)
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
