//! The stream behind a log: which one it is, and what it holds.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use essentially_once::{
    Error, Offset,
    backend::{LogId, unique},
};
use redis::{Cmd, RedisError, Value};

use crate::{
    connection::{Link, Server},
    error::{printable, read_failed, write_failed},
    log::{
        codec::parse_id,
        extent::{self, Extent},
    },
    options::LogOptions,
    store::keys::RetentionKeys,
};

const OPEN: &str = concat!(include_str!("incarnation.lua"), include_str!("open.lua"));

/// The stream of a log, as one handle sees it.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) link: Link,
    pub(crate) id: LogId,
    pub(crate) options: LogOptions,
    pub(crate) key: Bytes,
    pub(crate) kept: RetentionKeys,
    /// When appends last trimmed.
    pub(crate) trimmed: Mutex<Option<Instant>>,
    /// Whether an append may create the stream. A deleted log must not come back as an empty one.
    pub(crate) may_create: AtomicBool,
}

impl Stream {
    pub(crate) async fn open(server: Arc<Server>, name: &str, options: LogOptions) -> Result<Self, Error> {
        let id = LogId::new(name)?;
        options.retention.check()?;
        options.retention.refuse_bytes("Redis")?;
        let key = options
            .stream
            .clone()
            .unwrap_or_else(|| Bytes::copy_from_slice(name.as_bytes()));
        let kept = RetentionKeys::new(&server.options.prefix, &key)?;
        let mut stream = Self {
            link: Link::new(server, &key[..]),
            id,
            options,
            key,
            kept,
            trimmed: Mutex::new(None),
            may_create: AtomicBool::new(false),
        };
        if let Some(incarnation) = stream.incarnation().await? {
            stream.id = stream.id.with_incarnation(incarnation)?;
        }
        Ok(stream)
    }

    /// The stream's incarnation, created if it is missing; `None` if this user may not create it.
    async fn incarnation(&self) -> Result<Option<String>, Error> {
        let extent = self.extent("open").await?;
        match &extent {
            Some(extent) if extent.incarnation().is_some() => return Ok(extent.incarnation().map(Into::into)),
            None if self.options.existing => return Err(self.missing()),
            _ => {}
        }
        let mut open = redis::cmd("EVAL");
        open.arg(OPEN)
            .arg(1)
            .arg(&self.key[..])
            .arg(format!("{:016x}", unique() as u64))
            .arg(u8::from(!self.options.existing));
        match self.ask(&open).await? {
            Ok(Value::BulkString(found)) => Ok(Some(String::from_utf8_lossy(&found).into_owned())),
            Ok(_) => Err(self.not_understood("open")),
            // The stream was deleted in the meantime.
            Err(error) if error.to_string().contains("no such key") => Err(self.missing()),
            // Scripts report `ERR` for a command that the user may not run.
            Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => {
                tracing::warn!(log = %self.id, %error, "the stream gets no incarnation, so consumers may not notice that it was \
                    deleted and created again; grant the user XGROUP CREATE, or open the log once as a user with that permission");
                self.may_create.store(extent.is_none(), Ordering::Relaxed);
                Ok(None)
            }
            Err(error) => Err(write_failed(self.on("open"), error)),
        }
    }

    /// The stream's state now; `None` if the stream does not exist.
    pub(crate) async fn extent(&self, verb: &str) -> Result<Option<Extent>, Error> {
        match self.ask(&extent::ask(&self.key, &self.kept)).await? {
            Ok(answer) => Extent::parse(&answer).map_err(|()| self.not_understood(verb)),
            Err(error) => Err(read_failed(self.on(verb), error)),
        }
    }

    pub(crate) async fn readable_end(&self) -> Result<Offset, Error> {
        const VERB: &str = "read the end of";
        let answer = self.ask(&extent::ask_end(&self.key, &self.kept)).await?;
        let answer = answer.map_err(|error| read_failed(self.on(VERB), error))?;
        let parts = match answer {
            Value::Array(parts) => <[Value; 2]>::try_from(parts).ok(),
            _ => None,
        };
        let Some([state, last]) = parts else {
            return Err(self.not_understood(VERB));
        };
        let last = match last {
            Value::BulkString(id) => Some(parse_id(&id).ok_or_else(|| self.not_understood(VERB))?),
            _ => None,
        };
        let extent = Extent::parse(&state).map_err(|()| self.not_understood(VERB))?;
        Ok(self.require(extent, VERB)?.readable_end(last))
    }

    /// Sends a command over the shared connection. The inner error is the command's.
    pub(crate) async fn ask(&self, command: &Cmd) -> Result<Result<Value, RedisError>, Error> {
        let mut connection = self.link.connection().await?;
        let answer = connection
            .send_packed_command(command)
            .await
            .and_then(Value::extract_error);
        if let Err(error) = &answer {
            self.link.check(error);
        }
        Ok(answer)
    }

    /// Fails unless the extent is of the stream that was opened.
    pub(crate) fn require(&self, extent: Option<Extent>, verb: &str) -> Result<Extent, Error> {
        match (self.id.incarnation(), extent) {
            (Some(ours), Some(extent)) if extent.incarnation() == Some(ours) => Ok(extent),
            (Some(_), _) => Err(self.gone(verb)),
            (None, extent) => Ok(extent.unwrap_or_default()),
        }
    }

    fn missing(&self) -> Error {
        let stream = printable(&self.key);
        Error::failed(
            self.on("open"),
            format!("stream {stream:?} does not exist; check the name"),
        )
    }

    pub(crate) fn gone(&self, verb: &str) -> Error {
        let why = "the stream was deleted or created again after the log was opened; open it again";
        Error::failed(self.on(verb), why)
    }

    pub(crate) fn not_understood(&self, verb: &str) -> Error {
        Error::failed(self.on(verb), NOT_UNDERSTOOD)
    }

    pub(crate) fn on(&self, verb: &str) -> String {
        self.link.server.on(format!("{verb} log {}", self.id))
    }
}

pub(crate) const NOT_UNDERSTOOD: &str = "the server sent an unexpected reply; it must be Redis 7.0 or later, or Valkey";
