//! The settings of a server before it starts.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use super::PostgresServer;
use crate::{Error, process::address_in_use};

/// A server that is not started yet. See [`PostgresServer::builder`].
#[derive(Clone, Default)]
#[must_use = "the server runs only after `start`"]
pub struct PostgresBuilder {
    settings: Vec<(String, String)>,
    access: String,
    pub(super) password: Option<String>,
    pub(super) tls: Option<Tls>,
    pub(super) data: Option<PathBuf>,
    pub(super) primary: Option<Primary>,
}

/// A certificate, its key, and the authority that signs the clients' certificates, as PEM.
#[derive(Clone)]
pub(super) struct Tls {
    pub(super) certificate: String,
    pub(super) key: String,
    pub(super) authority: String,
}

/// Where a replica finds its primary.
#[derive(Clone)]
pub(super) struct Primary {
    pub(super) socket: PathBuf,
    pub(super) port: u16,
}

impl PostgresBuilder {
    /// Adds settings, as in `postgresql.conf` but without quotes (`("max_connections", "20")`).
    /// Later ones override earlier ones, and `ALTER SYSTEM` overrides none of them.
    pub fn with(mut self, settings: &[(&str, &str)]) -> Self {
        let settings = settings.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        self.settings.extend(settings);
        self
    }

    /// Adds lines of `pg_hba.conf` that decide who may connect over TCP. They precede the last
    /// one, which lets in everybody, or everybody with a password.
    pub fn access(mut self, lines: &str) -> Self {
        self.access += lines;
        self.access += "\n";
        self
    }

    /// Gives the user `postgres` this password, and lets nobody in over TCP without a password
    /// (`scram-sha-256`). A replica has the passwords of its primary, and must be told the same.
    pub fn password(mut self, password: &str) -> Self {
        self.password = Some(password.into());
        self
    }

    /// Also serves TLS with this certificate and key (PEM), on the same port, and accepts client
    /// certificates signed by the authority. Clients need neither TLS nor a certificate unless
    /// [`access`](Self::access) says so.
    pub fn tls(mut self, certificate: &str, key: &str, authority: &str) -> Self {
        self.tls = Some(Tls {
            certificate: certificate.into(),
            key: key.into(),
            authority: authority.into(),
        });
        self
    }

    /// Keeps the data in this folder, which stays behind. Data that is already there is used.
    pub fn data(mut self, folder: &Path) -> Self {
        self.data = Some(folder.into());
        self
    }

    /// Copies another server, which must run, and follows it. The replica answers queries, refuses
    /// writes, and may take a moment to catch up. See [`PostgresServer::promote`].
    pub fn replica_of(mut self, primary: &PostgresServer) -> Self {
        self.primary = Some(Primary {
            socket: primary.folder().into(),
            port: primary.port(),
        });
        self
    }

    /// Starts the server, and returns when it answers. The first start in a process takes a second
    /// longer, because it creates the data that the others copy.
    ///
    /// # Errors
    /// If `ESSENTIALLY_ONCE_POSTGRES_BIN` is not set, if we are root and there is no user
    /// `postgres`, or if the server ended or did not answer within a minute. The error then holds
    /// the end of its log.
    pub fn start(&self) -> Result<PostgresServer, Error> {
        let mut tries = 0..20;
        loop {
            tries.next();
            match PostgresServer::start_as(self) {
                Err(error) if address_in_use(&error) && !tries.is_empty() => {}
                done => return done,
            }
        }
    }

    /// The server's arguments, with the caller's settings last.
    pub(super) fn arguments(&self, folder: &Path, data: &Path, port: u16) -> Vec<OsString> {
        let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let mut settings = vec![
            ("port", port.to_string()),
            ("listen_addresses", "127.0.0.1".into()),
            ("unix_socket_directories", format!("\"{}\"", folder.to_string_lossy())),
            ("hba_file", file("pg_hba.conf")),
            // The default would leave files outside of the folder after a kill.
            ("dynamic_shared_memory_type", "mmap".into()),
        ];
        if cfg!(target_os = "linux") {
            // After a kill, the default syncs a thousand files one by one, which takes seconds.
            settings.push(("recovery_init_sync_method", "syncfs".into()));
        }
        if self.tls.is_some() {
            settings.push(("ssl", "on".into()));
            settings.push(("ssl_cert_file", file("server.crt")));
            settings.push(("ssl_key_file", file("server.key")));
            settings.push(("ssl_ca_file", file("authority.crt")));
        }
        let own = settings.iter().map(|(name, value)| format!("{name}={value}"));
        let given = self.settings.iter().map(|(name, value)| format!("{name}={value}"));
        let settings = own.chain(given).flat_map(|setting| ["-c".into(), setting.into()]);
        ["-D".into(), data.into()].into_iter().chain(settings).collect()
    }

    /// The text of `pg_hba.conf`.
    pub(super) fn access_rules(&self) -> String {
        let method = if self.password.is_some() {
            "scram-sha-256"
        } else {
            "trust"
        };
        // Administration and replication use the socket, and keep working whatever a test forbids.
        format!(
            "local all all trust\nlocal replication all trust\n{}\
             host all all 127.0.0.1/32 {method}\nhost replication all 127.0.0.1/32 {method}\n",
            self.access
        )
    }
}
