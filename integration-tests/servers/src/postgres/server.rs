//! A single server.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use super::{PostgresBuilder, data};
use crate::{
    Error,
    folder::Folder,
    port::Port,
    process::{Process, START_LIMIT},
};

/// A private PostgreSQL server with its data in a temporary folder. It can be killed and started
/// again while other threads use it. Dropping it removes the server and its folder.
///
/// As root, it runs as the user `postgres`. The data of all servers of a process come from one
/// copy, so they have the same system identifier.
pub struct PostgresServer {
    // Declared before the folder, so that it ends before the folder is removed.
    process: Mutex<Option<Process>>,
    folder: Folder,
    port: Port,
    bin: PathBuf,
    arguments: Vec<OsString>,
    password: Option<String>,
}

impl PostgresServer {
    /// A server with PostgreSQL's own settings, which store every committed transaction on disk.
    pub fn builder() -> PostgresBuilder {
        PostgresBuilder::default()
    }

    /// [Starts](PostgresBuilder::start) a server without further settings.
    ///
    /// # Errors
    /// As for [`PostgresBuilder::start`].
    pub fn start() -> Result<Self, Error> {
        Self::builder().start()
    }

    pub(super) fn start_as(builder: &PostgresBuilder) -> Result<Self, Error> {
        let bin = crate::postgres_bin()?;
        let folder = Folder::owned_by(data::owner()?, "postgres")?;
        let port = Port::claim()?;
        let data = data::create(builder, &bin, &folder)?;
        let server = Self {
            process: Mutex::new(None),
            arguments: builder.arguments(folder.path(), &data, port.number()),
            folder,
            port,
            bin,
            password: builder.password.clone(),
        };
        server.restart()?;
        if let (Some(password), None) = (&builder.password, &builder.primary) {
            let password = password.replace('\'', "''");
            server.run_sql(&format!("ALTER ROLE postgres PASSWORD '{password}'"))?;
        }
        Ok(server)
    }

    /// The TCP port of 127.0.0.1. It stays the same.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// `postgres://postgres@127.0.0.1:<port>/postgres`, with the password if it was started with
    /// [one](PostgresBuilder::password).
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    /// The same for another database.
    pub fn url_of(&self, database: &str) -> String {
        let password = self.password.as_ref().map(|password| format!(":{}", encoded(password)));
        let (password, port) = (password.unwrap_or_default(), self.port());
        format!("postgres://postgres{password}@127.0.0.1:{port}/{}", encoded(database))
    }

    /// The path of its Unix socket, over which the user `postgres` needs no password.
    pub fn socket(&self) -> PathBuf {
        self.folder().join(format!(".s.PGSQL.{}", self.port()))
    }

    /// The folder with its data, its `pg_hba.conf` and its log `server.log`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The id of its first process, the postmaster, while the server runs.
    pub fn pid(&self) -> Option<u32> {
        self.process().as_ref().map(Process::id)
    }

    /// Kills all of its processes with `SIGKILL`, and returns when they are gone.
    ///
    /// # Errors
    /// If a process does not end within a minute.
    pub fn kill(&self) -> Result<(), Error> {
        self.end(Signal::KILL)
    }

    /// Ends it with `SIGINT` (PostgreSQL's fast shutdown), as a service manager would, and returns
    /// when it is gone. Transactions in progress are rolled back.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    pub fn stop(&self) -> Result<(), Error> {
        self.end(Signal::INT)
    }

    fn end(&self, signal: Signal) -> Result<(), Error> {
        self.process().take().map_or(Ok(()), |process| process.end(signal))
    }

    /// Starts it again on the same folder and port, and returns when it has recovered its data and
    /// answers. If it is running, it is killed first.
    ///
    /// # Errors
    /// As for [`PostgresBuilder::start`].
    pub fn restart(&self) -> Result<(), Error> {
        let mut running = self.process();
        if let Some(process) = running.take() {
            process.end(Signal::KILL)?;
        }
        let deadline = Instant::now() + START_LIMIT;
        *running = loop {
            match self.launch() {
                // If a test killed the first process alone, the others may take a moment to notice.
                Err(error) if error.to_string().contains("is still in use") && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(20));
                }
                launched => break Some(launched?),
            }
        };
        Ok(())
    }

    fn launch(&self) -> Result<Process, Error> {
        let program = self.bin.join("postgres");
        let mut process = Process::spawn(&self.folder, &program, &self.arguments, &[])?;
        let what = format!("{} on port {}", program.display(), self.port());
        let id = process.id().to_string();
        let notes = Path::new(&self.arguments[1]).join("postmaster.pid");
        process.wait_ready(&what, START_LIMIT, || {
            // Its own notes say when it answers, so that no other server on the port can.
            let notes = fs::read_to_string(&notes)?;
            let lines: Vec<&str> = notes.lines().map(str::trim).collect();
            match lines.get(7) {
                Some(&"ready") if lines[0] == id => Ok(()),
                state => Err(format!("its state is {state:?}").into()),
            }
        })?;
        Ok(process)
    }

    /// Stops all of its processes with `SIGSTOP`. Connections stay open, but the server does not
    /// answer.
    ///
    /// # Panics
    /// If they still run after half a minute.
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

    /// Makes a [replica](PostgresBuilder::replica_of) a primary of its own, and returns when it
    /// accepts writes. Stop the old primary first, unless the test is about two of them.
    ///
    /// # Errors
    /// If it is no replica, or takes more than a minute.
    pub fn promote(&self) -> Result<(), Error> {
        match self.run_sql("SELECT pg_promote(true, 60)")?.trim() {
            "t" => Ok(()),
            _ => Err(format!("postgres on port {} was not promoted within a minute", self.port()).into()),
        }
    }

    /// Creates an empty database, and returns its [URL](Self::url_of).
    ///
    /// # Errors
    /// If there is one of this name.
    pub fn create_database(&self, name: &str) -> Result<String, Error> {
        // Of the two templates, only this one can be copied while others are connected to it.
        let quoted = name.replace('"', "\"\"");
        self.run_sql(&format!("CREATE DATABASE \"{quoted}\" TEMPLATE template0"))?;
        Ok(self.url_of(name))
    }

    /// Runs SQL in the database `postgres`, over the Unix socket, as a user with all permissions.
    /// Several statements are one transaction. Returns one line per row, with the columns separated
    /// by `|`.
    ///
    /// # Errors
    /// If the server does not run, refuses a statement, or takes more than a minute for it.
    pub fn run_sql(&self, sql: &str) -> Result<String, Error> {
        self.run_sql_in("postgres", sql)
    }

    /// The same in another database.
    ///
    /// # Errors
    /// As for [`run_sql`](Self::run_sql).
    pub fn run_sql_in(&self, database: &str, sql: &str) -> Result<String, Error> {
        let program = self.bin.join("psql");
        let mut command = Command::new(&program);
        // A developer's own settings.
        for (name, _) in env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
            command.env_remove(name);
        }
        command
            .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "postgres"])
            .args(["-d", database, "-p", &self.port().to_string(), "-c", sql, "-h"])
            .arg(self.folder())
            .current_dir(self.folder())
            .env("PGCONNECT_TIMEOUT", "60")
            .env("PGOPTIONS", "-c statement_timeout=60s");
        let output = command.output();
        let output = output.map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        Err(format!("postgres on port {} refused the SQL: {errors}", self.port()).into())
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        // A panic elsewhere leaves either a process or none. Both states are consistent.
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a URL.
fn encoded(text: &str) -> String {
    let encoded = text.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    });
    encoded.collect()
}
