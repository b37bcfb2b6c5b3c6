//! PostgreSQL as log and store for [`essentially_once`]. Records, state and position live in one
//! database and commit together.
//!
//! - [`Pg`] is a connected database. Its clones share its sessions.
//! - [`PgLog`] is a log in the database. Offsets are dense, begin at 0 and are never reused.
//! - [`PgStore`] keeps positions and state. A handler's [`PgTx`] offers portable
//!   [`KeyValue`](essentially_once::KeyValue) state, runs SQL on your own tables, and
//!   [sends](essentially_once::Outbox) records to logs of the database. [`PgLog::append_in`] does
//!   the same in a transaction on a connection of yours.
//!
//! The crate keeps its tables in a schema of their own, `essentially_once` by default, and creates
//! and migrates it. The rest of the database is yours. It works with PostgreSQL 13 and later.
//!
//! ```no_run
//! use essentially_once::{Consumer, ConsumerId, Log, NewRecord, Record, handler_fn};
//! use essentially_once_postgres::{Pg, PgTx};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pg = Pg::connect("postgres://shop:secret@localhost/shop").await?;
//! let orders = pg.log("orders").await?;
//! orders.append(&[NewRecord::new("10248"), NewRecord::new("10249")]).await?;
//!
//! // The table is yours: CREATE TABLE shipments (order_id bytea PRIMARY KEY)
//! let ship = handler_fn(|order: &Record, tx: &mut PgTx| {
//!     Box::pin(async move {
//!         tx.queue("INSERT INTO shipments (order_id) VALUES ($1)", &[&&order.payload[..]]).await?;
//!         Ok(())
//!     })
//! });
//! let shipping = ConsumerId::new("shipping")?;
//! let report = Consumer::essentially_once(shipping, orders, pg.store(), ship)
//!     .run_until_caught_up()
//!     .await?;
//! assert_eq!(report.handled, 2);
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! - `tls` (default): `sslmode=require` in URLs, with rustls. The server's certificate is then
//!   always verified. Without `sslmode`, connections are not encrypted.
//!
//! # Sessions
//!
//! Each call takes a session of the handle, or opens one, and leaves it to the next call. A handle
//! has as many as it has calls at once, and one more that waits for notifications. The server's
//! `max_connections` must suffice for all of them. A session that is in doubt, because a call was
//! dropped or a request was not answered, is closed and never used again.
//!
//! A pooler between this crate and the server must keep a session on one connection (PgBouncer's
//! `pool_mode = session`).
//!
//! # Fail-over
//!
//! Only a server that accepts writes is used. A URL may list several hosts, and the first such
//! server is taken. A standby that is promoted may lack the last commits of the old primary, unless
//! `synchronous_standby_names` names it. A running consumer then ends with
//! [`Error::PositionLost`] if its position went back, and with [`Error::OutOfRange`] or
//! [`Error::LogChanged`] if only its log did. If both went back together, nothing tells them from
//! a database in which the commits never happened.

mod connection;
mod error;
mod log;
mod options;
mod store;

use std::sync::Arc;

use essentially_once::Error;
pub use essentially_once::backend::Retention;
pub use tokio_postgres;

use crate::{connection::Pool, store::schema};
pub use crate::{
    error::postgres_error,
    log::PgLog,
    options::{Isolation, LogOptions, PgOptions},
    store::{PgStore, PgTx},
};

/// A connected database. Clones share its sessions.
///
/// Any call may be dropped. A dropped call keeps no transaction open.
#[derive(Clone, Debug)]
pub struct Pg {
    pool: Arc<Pool>,
}

impl Pg {
    /// Connects with the default [`PgOptions`], and creates or migrates the schema.
    ///
    /// # Errors
    /// As [`PgOptions::connect`].
    pub async fn connect(url: &str) -> Result<Self, Error> {
        PgOptions::new().connect(url).await
    }

    /// Opens the log of that name, and creates it empty if it is missing.
    ///
    /// # Errors
    /// As [`log_with`](Self::log_with).
    pub async fn log(&self, name: &str) -> Result<PgLog, Error> {
        self.log_with(name, LogOptions::new()).await
    }

    /// Opens the log of that name with options, such as a [retention](LogOptions::retention).
    ///
    /// Dropping the future may leave the log created, and has no other effect.
    ///
    /// # Errors
    /// [`Error::InvalidName`], [`Error::InvalidSetting`] and [`Error::Unavailable`].
    /// [`Error::Failed`], also if the log must exist and does not; the error then lists the logs of
    /// the schema.
    pub async fn log_with(&self, name: &str, options: LogOptions) -> Result<PgLog, Error> {
        PgLog::open(Arc::clone(&self.pool), name, options).await
    }

    /// Returns the store of positions and state.
    pub fn store(&self) -> PgStore {
        PgStore::new(Arc::clone(&self.pool))
    }

    /// The server's version, such as `PostgreSQL 15.18`, of the server that answered first.
    pub fn version(&self) -> Option<&str> {
        self.pool.version.get().map(String::as_str)
    }

    /// The standbys that must confirm each commit: the server's `synchronous_standby_names`. Empty
    /// if a commit waits for none, so that a fail-over can lose the last commits.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`].
    pub async fn synchronous_standby_names(&self) -> Result<String, Error> {
        let mut settings = connection::settings(&self.pool).await?;
        Ok(settings.remove("synchronous_standby_names").unwrap_or_default())
    }
}

impl PgOptions {
    /// Connects, and creates or migrates the schema. Dropping the future may leave the schema
    /// created.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for a URL that cannot be parsed, and for a setting out of its
    /// bounds. [`Error::Failed`] for a wrong password, a missing database or right, a schema of a
    /// newer version or with other tables, a server that does not speak TLS, and a server that is
    /// too old. [`Error::Unavailable`] if no server answers, or only standbys do. No error quotes
    /// the password.
    pub async fn connect(self, url: &str) -> Result<Pg, Error> {
        let pool = Arc::new(Pool::new(self, url)?);
        schema::open(&pool).await?;
        Ok(Pg { pool })
    }
}
