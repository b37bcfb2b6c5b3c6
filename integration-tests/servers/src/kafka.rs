//! A broker that speaks Kafka's protocol.

use std::{
    ffi::OsString,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use essentially_once_testkit::Proxy;
use rustix::process::Signal;

use crate::{
    Error,
    folder::Folder,
    port::Port,
    process::{Process, START_LIMIT, address_in_use},
};

/// How long a broker may take to answer a question while it starts.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A private broker, `noida-db`, with its data in a temporary folder. It speaks Kafka's protocol,
/// transactions included, and keeps its data when it is stopped. It loses what it acknowledged in
/// the last half second when it is killed. Dropping it removes the broker and its folder.
///
/// Clients connect through a proxy. A broker that is being stopped acknowledges records that it has
/// not stored and does not store any more, so the proxy cuts its clients off first.
pub struct KafkaServer {
    proxy: Proxy,
    // Declared before the folder, so that it ends before the folder is removed.
    process: Mutex<Option<Process>>,
    folder: Folder,
    port: Port,
    program: PathBuf,
}

impl KafkaServer {
    /// Starts a broker, and returns when it answers.
    ///
    /// # Errors
    /// If `ESSENTIALLY_ONCE_KAFKA_SERVER` is not set, or if the broker ended or did not answer
    /// within a minute. The error then holds the end of its log.
    pub fn start() -> Result<Self, Error> {
        let mut tries = 0..20;
        loop {
            tries.next();
            let port = Port::claim()?;
            let server = Self {
                proxy: Proxy::kafka(port.number())?,
                process: Mutex::new(None),
                folder: Folder::new("kafka")?,
                port,
                program: crate::kafka_server()?,
            };
            match server.restart() {
                Ok(()) => return Ok(server),
                Err(error) if address_in_use(&error) && !tries.is_empty() => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The TCP port of 127.0.0.1. It stays the same.
    pub fn port(&self) -> u16 {
        self.proxy.port()
    }

    /// `kafka://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        format!("kafka://127.0.0.1:{}", self.port())
    }

    /// The port of the broker itself.
    pub fn direct_port(&self) -> u16 {
        self.port.number()
    }

    /// Past the proxy, for measurements: `kafka://127.0.0.1:<port>`.
    pub fn direct_url(&self) -> String {
        format!("kafka://127.0.0.1:{}", self.direct_port())
    }

    /// What clients connect through.
    pub fn proxy(&self) -> &Proxy {
        &self.proxy
    }

    /// The folder with its data and its log `server.log`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Kills it with `SIGKILL`, and returns when it is gone.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    pub fn kill(&self) -> Result<(), Error> {
        self.end(Signal::KILL)
    }

    /// Ends it with `SIGTERM`, which stores its data, and returns when it is gone.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    pub fn stop(&self) -> Result<(), Error> {
        self.proxy.refuse(true);
        self.proxy.cut();
        self.end(Signal::TERM)
    }

    fn end(&self, signal: Signal) -> Result<(), Error> {
        self.process().take().map_or(Ok(()), |process| process.end(signal))
    }

    /// Starts it again on the same data and port, and returns when it answers. If it is running, it
    /// is stopped first.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn restart(&self) -> Result<(), Error> {
        self.stop()?;
        let mut running = self.process();
        let arguments = ["start", "--only", "kafka", "--host", "127.0.0.1", "--kafka-port"].map(OsString::from);
        let mut arguments = arguments.to_vec();
        arguments.push(self.direct_port().to_string().into());
        arguments.extend(["--data-dir".into(), "data".into()]);
        let mut process = Process::spawn(&self.folder, &self.program, &arguments, &[])?;
        let what = format!("{} on port {}", self.program.display(), self.direct_port());
        process.wait_ready(&what, START_LIMIT, || self.ask_for_versions())?;
        *running = Some(process);
        self.proxy.refuse(false);
        Ok(())
    }

    /// Sends the request with which every client begins, `ApiVersions`.
    fn ask_for_versions(&self) -> Result<(), Error> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.direct_port()))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        // The size, the number of the request, its version, a number to find in the answer, and no
        // name of a client.
        let mut request = vec![0, 0, 0, 10, 0, 18, 0, 0];
        request.extend(b"once\xff\xff");
        stream.write_all(&request)?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer)?;
        match &answer[4..] {
            b"once" => Ok(()),
            other => Err(format!("answered {other:?}").into()),
        }
    }

    /// Stops its process with `SIGSTOP`. Connections stay open, but the broker does not answer.
    ///
    /// # Panics
    /// If it still runs after half a minute.
    pub fn freeze(&self) {
        if let Some(process) = self.process().as_ref() {
            process.freeze();
        }
    }

    /// Resumes a frozen broker.
    pub fn thaw(&self) {
        if let Some(process) = self.process().as_ref() {
            process.thaw();
        }
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
