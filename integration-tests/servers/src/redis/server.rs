//! A single server.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::Signal;

use super::{
    RedisBuilder, Reply,
    builder::{ADMINISTRATOR, Ports},
    resp::Client,
};
use crate::{
    Error,
    folder::Folder,
    port::Port,
    process::{Process, START_LIMIT},
};

/// A command that takes longer means that the server is stuck.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// A private Redis or Valkey server with its data in a temporary folder. It can be killed and
/// started again while other threads use it. Dropping it removes the server and its folder.
pub struct RedisServer {
    // Declared before the folder, so that it ends before the folder is removed.
    process: Mutex<Option<Process>>,
    folder: Folder,
    ports: Ports,
    program: PathBuf,
    sentinel: bool,
}

impl RedisServer {
    /// A server that stores every acknowledged write on disk: it appends each write to a file and
    /// syncs it.
    pub fn durable() -> RedisBuilder {
        RedisBuilder::default().with(&[
            ("appendonly", "yes"),
            ("appendfsync", "always"),
            ("save", "\"\""),
            ("maxmemory-policy", "noeviction"),
        ])
    }

    pub(super) fn start(builder: &RedisBuilder) -> Result<Self, Error> {
        let program = crate::redis_server()?;
        let folder = Folder::new("redis")?;
        let ports = Ports::claim(builder)?;
        fs::write(folder.path().join("redis.conf"), builder.config(folder.path(), &ports))?;
        let server = Self {
            process: Mutex::new(None),
            folder,
            ports,
            program,
            sentinel: builder.sentinel,
        };
        server.restart()?;
        Ok(server)
    }

    /// The TCP port of 127.0.0.1. It stays the same.
    pub fn port(&self) -> u16 {
        self.ports.plain.number()
    }

    /// The port on which the nodes of a cluster talk to each other.
    pub(super) fn bus_port(&self) -> u16 {
        self.ports.cluster.as_ref().map_or(0, Port::number)
    }

    /// `redis://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port())
    }

    /// `rediss://127.0.0.1:<port>`, if it was started with [`tls`](RedisBuilder::tls).
    pub fn tls_url(&self) -> Option<String> {
        let port = self.ports.tls.as_ref()?;
        Some(format!("rediss://127.0.0.1:{}", port.number()))
    }

    /// The path of its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// The folder with its data, its configuration `redis.conf` and its log `server.log`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process id while the server runs.
    pub fn pid(&self) -> Option<u32> {
        self.process().as_ref().map(Process::id)
    }

    /// Kills it with `SIGKILL`, and returns when it is gone.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    pub fn kill(&self) -> Result<(), Error> {
        self.end(Signal::KILL)
    }

    /// Ends it with `SIGTERM`, as a service manager would, and returns when it is gone.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    pub fn stop(&self) -> Result<(), Error> {
        self.end(Signal::TERM)
    }

    fn end(&self, signal: Signal) -> Result<(), Error> {
        self.process().take().map_or(Ok(()), |process| process.end(signal))
    }

    /// Starts it again on the same folder and ports, and returns when it has loaded its data and
    /// answers. If it is running, it is killed first.
    ///
    /// # Errors
    /// As for [`RedisBuilder::start`].
    pub fn restart(&self) -> Result<(), Error> {
        let mut running = self.process();
        if let Some(process) = running.take() {
            process.end(Signal::KILL)?;
        }
        let mut arguments = vec![OsString::from("redis.conf")];
        if self.sentinel {
            arguments.push("--sentinel".into());
        }
        let mut process = Process::spawn(&self.folder, &self.program, &arguments, &[])?;
        let what = format!("{} on port {}", self.program.display(), self.port());
        // Asked over its socket, so that no other server on the port can answer.
        process.wait_ready(&what, START_LIMIT, || match self.ask(&["PING"], START_LIMIT)?.text() {
            "PONG" => Ok(()),
            other => Err(format!("answered PING with {other:?}").into()),
        })?;
        *running = Some(process);
        Ok(())
    }

    /// Stops its process with `SIGSTOP`. Connections stay open, but the server does not answer.
    ///
    /// # Panics
    /// If it still runs after half a minute.
    pub fn freeze(&self) {
        if let Some(process) = self.process().as_ref() {
            process.freeze();
        }
    }

    /// Resumes a frozen server.
    pub fn thaw(&self) {
        if let Some(process) = self.process().as_ref() {
            process.thaw();
        }
    }

    /// Sends one command over the Unix socket, as a separate user with all permissions.
    ///
    /// # Errors
    /// If the server does not run, refuses the command, or takes more than a minute.
    pub fn command<A: AsRef<[u8]>>(&self, arguments: &[A]) -> Result<Reply, Error> {
        self.ask(arguments, COMMAND_LIMIT).map_err(|error| {
            let command = arguments.first().map(|first| String::from_utf8_lossy(first.as_ref()));
            let command = command.unwrap_or_default();
            format!("redis-server on port {} failed to run {command}: {error}", self.port()).into()
        })
    }

    fn ask<A: AsRef<[u8]>>(&self, arguments: &[A], limit: Duration) -> Result<Reply, Error> {
        let mut client = Client::connect(&self.socket(), limit)?;
        client.command(&["AUTH", ADMINISTRATOR, ""])?;
        client.command(arguments)
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        // A panic elsewhere leaves either a process or none. Both states are consistent.
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
