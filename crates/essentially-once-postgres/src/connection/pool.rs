//! The sessions of a handle. Each call takes one, and leaves it to the next call.

use std::{
    fmt,
    future::Future,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use essentially_once::Error;
use tokio::time;
use tokio_postgres::{AsyncMessage, Client, Config, Connection, NoTls, Socket, tls::TlsStream};
#[cfg(feature = "tls")]
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{
    address::{parse, shown},
    session::{Session, Stale},
};
use crate::{error::Fault, log::wake::Bell, options::PgOptions};

/// The most sessions that are kept while no call uses them.
const MOST_IDLE: usize = 16;

/// The oldest version that this crate works with, as `server_version_num`.
const OLDEST: u32 = 13_00_00;

/// A server, how to connect to it, and sessions that no call uses now.
pub(crate) struct Pool {
    pub(crate) options: PgOptions,
    config: Config,
    server: String,
    /// Quoted.
    schema: Arc<str>,
    /// Of the server that answered first.
    pub(crate) version: OnceLock<String>,
    idle: Mutex<Vec<Session>>,
    stale: Stale,
    pub(crate) bell: Bell,
    #[cfg(feature = "tls")]
    tls: Option<MakeRustlsConnect>,
}

impl Pool {
    pub(crate) fn new(options: PgOptions, url: &str) -> Result<Self, Error> {
        options.check()?;
        let config = parse(url, &options)?;
        #[cfg(feature = "tls")]
        let tls = match config.get_ssl_mode() {
            tokio_postgres::config::SslMode::Disable => None,
            _ => Some(super::tls::connector(&options)?),
        };
        Ok(Self {
            server: shown(&config),
            schema: format!("\"{}\"", options.schema).into(),
            bell: Bell::new(&options.schema),
            options,
            config,
            version: OnceLock::new(),
            idle: Mutex::default(),
            stale: Stale::default(),
            #[cfg(feature = "tls")]
            tls,
        })
    }

    /// The action of an error, with the server that it concerns.
    pub(crate) fn on(&self, action: impl fmt::Display) -> String {
        format!("{action} on {}", self.server)
    }

    /// A session that nobody else uses. Dropping the future connects to nothing.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`]. Nothing was sent but what connecting takes.
    pub(crate) async fn take(self: &Arc<Self>, action: impl Fn() -> String) -> Result<Lease, Error> {
        loop {
            let Some(mut session) = self.idle().pop() else {
                break;
            };
            if session.is_good().await {
                return Ok(Lease::new(session, self));
            }
            if session.is_closed() {
                // A restart closes all of them.
                self.idle().retain(|session| !session.is_closed());
            }
        }
        let session = self
            .connect(|_| {})
            .await
            .map_err(|error| self.not_connected(action(), error))?;
        Ok(Lease::new(session, self))
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Session>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a session, and hands the server's messages to `heard`.
    pub(crate) async fn connect(&self, heard: impl Fn(AsyncMessage) + Send + 'static) -> Result<Session, NotConnected> {
        let limit = self.options.timeout;
        let connecting = async {
            #[cfg(feature = "tls")]
            if let Some(tls) = &self.tls {
                let (client, connection) = self.config.connect(tls.clone()).await.map_err(NotConnected::Postgres)?;
                return self.set_up(client, connection, heard).await;
            }
            let (client, connection) = self.config.connect(NoTls).await.map_err(NotConnected::Postgres)?;
            self.set_up(client, connection, heard).await
        };
        time::timeout(limit, connecting)
            .await
            .unwrap_or(Err(NotConnected::Fault(Fault::Silent(limit))))
    }

    async fn set_up<S>(
        &self,
        client: Client,
        connection: Connection<Socket, S>,
        heard: impl Fn(AsyncMessage) + Send + 'static,
    ) -> Result<Session, NotConnected>
    where
        S: TlsStream + Unpin + Send + 'static,
    {
        let version = connection
            .parameter("server_version")
            .unwrap_or("of an unknown version")
            .to_owned();
        let encoding = connection.parameter("server_encoding").unwrap_or_default().to_owned();
        if encoding != "UTF8" {
            return Err(NotConnected::Unsuited(format!(
                "the database has the encoding {encoding}, which cannot hold all names; create it with the encoding UTF8"
            )));
        }
        let number = version
            .split(['.', ' ', 'd', 'b', 'r'])
            .next()
            .and_then(|major| major.parse::<u32>().ok());
        if number.is_some_and(|major| major * 10_000 < OLDEST) {
            return Err(NotConnected::Unsuited(format!(
                "it is PostgreSQL {version}; upgrade to 13 or later"
            )));
        }
        self.version.get_or_init(|| format!("PostgreSQL {version}"));
        let mut session = Session::new(
            client,
            connection,
            Arc::clone(&self.schema),
            Arc::clone(&self.stale),
            heard,
        );
        let millis = |timeout: Duration| timeout.as_millis();
        // A handler's commit is durable, and an append or a migration sees what was committed
        // before it, whatever the default of the database or the user.
        let settings = format!(
            "SET default_transaction_isolation = 'read committed'; SET lock_timeout = {}; SET idle_in_transaction_session_timeout = {}; SET statement_timeout = {}; \
             SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
            millis(self.options.lock_timeout),
            millis(self.options.idle_timeout),
            millis(self.options.statement_timeout),
        );
        session.batch(&settings).await.map_err(NotConnected::Fault)?;
        Ok(session)
    }

    /// Explains why there is no connection.
    pub(crate) fn not_connected(&self, action: String, error: NotConnected) -> Error {
        match error {
            NotConnected::Unsuited(reason) => Error::failed(action, reason),
            NotConnected::Fault(fault) => fault.of_read(action),
            NotConnected::Postgres(error) => self.refused(action, error),
        }
    }

    fn refused(&self, action: String, error: tokio_postgres::Error) -> Error {
        let cause = std::error::Error::source(&error)
            .map(ToString::to_string)
            .unwrap_or_default();
        let fault = Fault::Postgres { part: None, error };
        if fault.code().is_some() {
            let needs_tls = cause.contains("no encryption") || cause.contains("SSL off");
            return match needs_tls {
                true => Error::failed(
                    action,
                    format!("{fault}; the server may require TLS: add ?sslmode=require to the URL"),
                ),
                false => fault.of_read(action),
            };
        }
        let lasting = if cause.contains("server does not support TLS") {
            Some("remove `sslmode=require` from the URL, or configure the server's `ssl`")
        } else if cause.contains("ertificate") || cause.contains("fatal alert") {
            Some(
                "add the authority that signed the server's certificate with `add_root_certificate`, use the host name in \
                 that certificate, and set `client_certificate` and `client_key` if the server requires them",
            )
        } else if cause.contains("password missing") || cause.contains("authentication method") {
            Some("put a user and password into the URL")
        } else {
            None
        };
        let read_only = cause.contains("does not allow writes");
        match lasting {
            Some(advice) => Error::failed(action, format!("{fault}; {advice}")),
            None if read_only => Error::unavailable(
                action,
                format!("{fault}; the server is a standby, or read-only; use the address of the primary"),
            ),
            None => Error::unavailable(action, fault),
        }
    }

    /// Waits for an answer within the [`timeout`](PgOptions::timeout).
    pub(crate) async fn within<T>(&self, request: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
        let limit = self.options.timeout;
        time::timeout(limit, request).await.unwrap_or(Err(Fault::Silent(limit)))
    }
}

/// Why there is no connection.
pub(crate) enum NotConnected {
    /// The client library's error.
    Postgres(tokio_postgres::Error),
    /// The server did not take the settings, or did not answer.
    Fault(Fault),
    /// The server or the database cannot be used.
    Unsuited(String),
}

/// A session that nobody else uses. Dropping it leaves the session to the next call, or closes it
/// if a request is unanswered or a transaction open.
pub(crate) struct Lease {
    /// `None` only while dropping.
    session: Option<Session>,
    pool: Arc<Pool>,
}

impl Lease {
    fn new(session: Session, pool: &Arc<Pool>) -> Self {
        Self {
            session: Some(session),
            pool: Arc::clone(pool),
        }
    }
}

impl Deref for Lease {
    type Target = Session;

    fn deref(&self) -> &Session {
        self.session.as_ref().expect("it is there until the drop")
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Session {
        self.session.as_mut().expect("it is there until the drop")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(session) = self.session.take()
            && session.is_reusable()
        {
            let mut idle = self.pool.idle();
            if idle.len() < MOST_IDLE {
                idle.push(session);
            }
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("server", &self.pool.server)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("server", &self.server)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
