//! What an error of the client library says about whether a request took effect.

use std::{error, fmt, time::Duration};

use essentially_once::{Error, backend::Source};
use tokio_postgres::error::{DbError, SqlState};

use crate::connection::Part;

/// Returns the PostgreSQL error beneath an error of this crate. Use it to tell a violated
/// constraint from a mistake in the SQL.
///
/// ```
/// # use essentially_once_postgres::tokio_postgres::error::SqlState;
/// # fn example(error: &essentially_once::Error) -> bool {
/// let cause = essentially_once_postgres::postgres_error(error);
/// cause.and_then(|cause| cause.code()) == Some(&SqlState::UNIQUE_VIOLATION)
/// # }
/// ```
pub fn postgres_error(error: &Error) -> Option<&tokio_postgres::Error> {
    let cause = error.cause()?;
    let advised = cause.downcast_ref().map(|advised: &Advised| &advised.fault);
    match advised.or_else(|| cause.downcast_ref())? {
        Fault::Postgres { error, .. } => Some(error),
        _ => None,
    }
}

/// Why a request failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The server's or the client library's error.
    Postgres {
        /// The request, if several were sent at once.
        part: Option<Part>,
        /// The error.
        error: tokio_postgres::Error,
    },
    /// A value does not fit the statement. Nothing was sent.
    Parameter(String),
    /// There was no answer in this time.
    Silent(Duration),
}

impl Fault {
    /// The request that failed, if several were sent at once.
    pub(crate) fn part(&self) -> Option<Part> {
        match self {
            Self::Postgres { part, .. } => *part,
            _ => None,
        }
    }

    /// The server's answer.
    fn answer(&self) -> Option<&DbError> {
        match self {
            Self::Postgres { error, .. } => error.as_db_error(),
            _ => None,
        }
    }

    /// The code that the server answered with.
    pub(crate) fn code(&self) -> Option<&SqlState> {
        self.answer().map(DbError::code)
    }

    /// Whether the server answered, so that it is known what it did.
    fn is_answer(&self) -> bool {
        match self {
            Self::Postgres { error, .. } => error.as_db_error().is_some() || is_local(error),
            Self::Parameter(_) => true,
            Self::Silent(_) => false,
        }
    }

    /// Whether the connection must not get another request: it is closed or silent, leads to a
    /// server that only reads, or has lost what was prepared on it.
    pub(crate) fn ends_the_session(&self) -> bool {
        match self {
            Self::Postgres { error, .. } => match error.as_db_error() {
                Some(answer) => {
                    is_fatal(answer) || is_stale(answer) || *answer.code() == SqlState::READ_ONLY_SQL_TRANSACTION
                }
                None => !is_local(error),
            },
            Self::Parameter(_) => false,
            Self::Silent(_) => true,
        }
    }

    /// Whether a prepared statement no longer fits.
    pub(crate) fn is_stale(&self) -> bool {
        match self {
            Self::Postgres { error, .. } => error.as_db_error().is_some_and(is_stale),
            _ => false,
        }
    }

    /// The failure of a request that changes nothing.
    pub(crate) fn of_read(self, action: impl Into<String>) -> Error {
        match self.is_answer() {
            true => self.of_answer(action),
            false => Error::unavailable(action, self),
        }
    }

    /// The failure of a request that may have changed data.
    pub(crate) fn of_write(self, action: impl Into<String>) -> Error {
        match self.is_answer() && !self.leaves_a_commit_open() {
            true => self.of_answer(action),
            false => Error::indeterminate(action, self),
        }
    }

    /// Whether the server may have committed before it answered with this error: it ends a commit
    /// that waits for a standby in this way.
    fn leaves_a_commit_open(&self) -> bool {
        let commits = matches!(self.part(), None | Some(Part::Commit));
        commits
            && self.code().is_some_and(|code| {
                matches!(
                    *code,
                    SqlState::ADMIN_SHUTDOWN | SqlState::CRASH_SHUTDOWN | SqlState::QUERY_CANCELED
                ) || code.code().starts_with("08")
                    || code.code().starts_with("XX")
                    || code.code().starts_with("58")
            })
    }

    /// The failure of a statement that the handler ran. It says whether the handler is to blame.
    fn of_answer(self, action: impl Into<String>) -> Error {
        let (passes, advice) = match self.answer() {
            Some(answer) => judge(answer),
            None => (false, ""),
        };
        let cause: Source = match advice {
            "" => self.into(),
            advice => Advised { fault: self, advice }.into(),
        };
        match passes {
            true => Error::unavailable(action, cause),
            false => Error::failed(action, cause),
        }
    }
}

/// Whether the client library refused a request before it sent anything, such as SQL with a zero
/// byte. The library shows that only in its text.
fn is_local(error: &tokio_postgres::Error) -> bool {
    error.to_string().starts_with("error encoding")
}

fn is_fatal(answer: &DbError) -> bool {
    matches!(answer.severity(), "FATAL" | "PANIC")
}

/// Whether a prepared statement no longer fits: a table was altered, or the handler discarded it.
fn is_stale(answer: &DbError) -> bool {
    match *answer.code() {
        SqlState::INVALID_SQL_STATEMENT_NAME => true,
        // The code alone also says that PostgreSQL does not support what the handler wants.
        SqlState::FEATURE_NOT_SUPPORTED => answer
            .routine()
            .is_none_or(|routine| routine == "RevalidateCachedQuery"),
        _ => false,
    }
}

/// Whether the condition can pass without a change to this service, and what to do about it.
fn judge(answer: &DbError) -> (bool, &'static str) {
    let code = answer.code();
    match *code {
        SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED => (true, ""),
        SqlState::LOCK_NOT_AVAILABLE => (
            true,
            "another transaction holds the lock; raise `lock_timeout` to wait longer",
        ),
        SqlState::QUERY_CANCELED => (true, "somebody canceled it, or it took longer than `statement_timeout`"),
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => (
            true,
            "the handler left its transaction idle for longer than `idle_timeout`; raise it, or let the handler wait for less",
        ),
        SqlState::TOO_MANY_CONNECTIONS => (true, "raise the server's `max_connections`, or close connections"),
        SqlState::DISK_FULL => (true, "make room on the server's disk"),
        SqlState::READ_ONLY_SQL_TRANSACTION => (
            true,
            "the server is a standby, or read-only; use the address of the primary, or list all hosts in the URL",
        ),
        SqlState::CANNOT_CONNECT_NOW => (true, "the server is starting or shutting down"),
        SqlState::INVALID_SQL_STATEMENT_NAME | SqlState::FEATURE_NOT_SUPPORTED if is_stale(answer) => (
            true,
            "the tables have changed, or the session has lost its prepared statements; the next attempt prepares them again",
        ),
        SqlState::INSUFFICIENT_PRIVILEGE => (
            false,
            "grant the user access: CREATE on the database if the schema is missing, and otherwise USAGE on the schema, \
             and SELECT, INSERT, UPDATE and DELETE on its tables",
        ),
        SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            (false, "check the URL's user and password, and the server's pg_hba.conf")
        }
        SqlState::INVALID_CATALOG_NAME => (false, "check the database in the URL"),
        SqlState::UNDEFINED_TABLE | SqlState::INVALID_SCHEMA_NAME => (
            false,
            "if it is a table of this crate, somebody has dropped it or the `schema` is wrong",
        ),
        _ => {
            let class = &code.code()[..2];
            let passes = matches!(class, "08" | "40" | "53" | "57" | "58") || *code == SqlState::OBJECT_IN_USE;
            (passes, "")
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Postgres { error, .. } => match error.as_db_error() {
                Some(answer) => {
                    write!(f, "{} (SQLSTATE {})", answer.message(), answer.code().code())?;
                    if let Some(detail) = answer.detail() {
                        write!(f, "; {detail}")?;
                    }
                    Ok(())
                }
                None => match error::Error::source(error) {
                    Some(cause) => write!(f, "{error}: {cause}"),
                    None => write!(f, "{error}"),
                },
            },
            Self::Parameter(reason) => f.write_str(reason),
            Self::Silent(limit) => write!(f, "the server did not answer within {limit:?}"),
        }
    }
}

/// The text names all causes, so there is no source that would be shown a second time.
impl error::Error for Fault {}

/// A fault, and what to do about it.
#[derive(Debug)]
struct Advised {
    fault: Fault,
    advice: &'static str,
}

impl fmt::Display for Advised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.fault, self.advice)
    }
}

impl error::Error for Advised {}
