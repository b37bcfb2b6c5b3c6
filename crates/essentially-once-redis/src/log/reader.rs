//! Reads a log in order, detects removed records, and wakes soon after an append.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use async_trait::async_trait;
use essentially_once::{
    Error, Offset, Record,
    backend::{FetchBudget, LogReader},
};
use redis::{Pipeline, RedisError, RedisResult, Value};
use tokio::runtime::Id;

use crate::{
    connection::{Connection, this_runtime},
    error::read_failed,
    log::{
        codec::Decoder,
        extent::{self, Extent},
        stream::Stream,
    },
};

/// The most records that one request fetches. This keeps the server busy for about 5 ms.
const FETCH_RECORDS: usize = 2_000;

/// How long the server holds back its reply at the end of the log. A deleted stream does not wake
/// the reader, which notices it only then.
const BLOCK: Duration = Duration::from_secs(2);

/// A reader. It has its own connection, since the server holds back replies on it.
///
/// The server answers each request in one step with the stream's [`Extent`] and the next entries,
/// so the reader notices entries that were removed between two requests. At the end of the log, the
/// request begins with a blocking `XREAD`, which only wakes the reader.
///
/// A connection that was closed while the reader was idle is replaced, if the same server process
/// with the same replication history answers. Another server may have lost the log's tail, and only
/// a consumer that starts a session compares its position with the log.
pub(crate) struct RedisReader {
    log: Arc<Stream>,
    connection: Connection,
    origin: Option<Origin>,
    decoder: Decoder,
    next: Offset,
    /// The number of entries ever added before `next`, if known.
    passed: Option<u64>,
    at_end: bool,
    /// The request in flight. It stays here when a call of `next` is dropped, and the next call
    /// continues to wait for it.
    request: Option<Request>,
    ready: VecDeque<Record>,
    /// Why the reader has ended.
    over: Option<&'static str>,
}

struct Request {
    /// The runtime that drives it.
    runtime: Option<Id>,
    answer: Pin<Box<dyn Future<Output = RedisResult<Vec<Value>>> + Send>>,
    answered: Option<RedisResult<Vec<Value>>>,
}

impl Request {
    /// Sends it without waiting for the reply.
    async fn send(&mut self) {
        poll_fn(|context| {
            if let Poll::Ready(answer) = self.answer.as_mut().poll(context) {
                self.answered = Some(answer);
            }
            Poll::Ready(())
        })
        .await;
    }

    async fn answer(&mut self) -> RedisResult<Vec<Value>> {
        match self.answered.take() {
            Some(answer) => answer,
            None => self.answer.as_mut().await,
        }
    }
}

impl RedisReader {
    pub(crate) async fn open(log: Arc<Stream>, from: Offset) -> Result<Self, Error> {
        let (mut connection, origin) = connect(&log).await?;
        let answer = connection
            .inner
            .send_packed_command(&extent::ask(&log.key, &log.kept))
            .await
            .and_then(Value::extract_error);
        let mut reader = Self {
            decoder: Decoder::new(&log.options.payload_field, &log.options.key_field),
            log,
            connection,
            origin,
            next: from,
            passed: None,
            at_end: false,
            request: None,
            ready: VecDeque::new(),
            over: None,
        };
        let answer = answer.map_err(|error| reader.failed(error))?;
        let extent = reader.check(&answer)?;
        reader.passed = extent.passed(from, None);
        Ok(reader)
    }

    /// The extent, if the stream still holds every entry from `next` on.
    fn check(&self, answer: &Value) -> Result<Extent, Error> {
        let extent = Extent::parse(answer).map_err(|()| self.log.not_understood("read"))?;
        // A missing stream is empty and has no incarnation.
        let extent = extent.unwrap_or_default();
        extent.check(&self.log.id, self.next, self.passed)?;
        Ok(extent)
    }

    /// Replaces an unusable connection.
    async fn connect(&mut self) -> Result<(), Error> {
        if self.connection.is_good().await {
            return Ok(());
        }
        let (connection, origin) = connect(&self.log).await?;
        if origin.is_none() || origin != self.origin {
            let why = "the connection was closed, and another server or a restarted one may be answering now";
            return Err(Error::unavailable(self.log.on("read"), why));
        }
        self.connection = connection;
        Ok(())
    }

    fn request(&self, max: usize) -> Request {
        let (log, mut connection) = (&self.log, self.connection.inner.clone());
        let mut pipeline = Pipeline::with_capacity(2);
        if self.at_end {
            let millis = BLOCK.as_millis() as u64;
            pipeline.cmd("XREAD").arg("COUNT").arg(1).arg("BLOCK").arg(millis);
            pipeline.arg("STREAMS").arg(&log.key[..]).arg(id(before(self.next)));
        }
        pipeline.add_command(extent::read(
            &log.key,
            &log.kept,
            &id(self.next),
            max.min(FETCH_RECORDS),
            FetchBudget::BYTES,
        ));
        Request {
            runtime: this_runtime(),
            answer: Box::pin(async move { connection.send_packed_commands(&pipeline, 0, pipeline.len()).await }),
            answered: None,
        }
    }

    /// Processes the reply to a request.
    fn receive(&mut self, mut replies: Vec<Value>) -> Result<(), Error> {
        self.refuse_errors(&replies)?;
        let Some(Value::Array(results)) = replies.pop() else {
            return Err(self.log.not_understood("read"));
        };
        let Ok([state, Value::BulkString(entries), Value::Int(more)]) = <[Value; 3]>::try_from(results) else {
            return Err(self.log.not_understood("read"));
        };
        let extent = self.check(&state)?;
        self.take(&extent, entries, more == 0)
    }

    fn refuse_errors(&self, replies: &[Value]) -> Result<(), Error> {
        let error = replies.iter().find_map(|reply| match reply {
            Value::ServerError(error) => Some(error.clone()),
            _ => None,
        });
        error.map_or(Ok(()), |error| Err(self.failed(error.into())))
    }

    fn take(&mut self, extent: &Extent, entries: Vec<u8>, at_end: bool) -> Result<(), Error> {
        let records = self.decoder.entries(entries);
        let records = records.ok_or_else(|| self.log.not_understood("read"))?;
        let found = records.len() as u64;
        self.at_end = at_end;
        self.passed = extent.passed(self.next, at_end.then_some(found)).or(self.passed);
        let Some(last) = records.last().map(|record| record.offset) else {
            return Ok(());
        };
        self.ready.extend(records);
        self.passed = self.passed.map(|passed| passed + found);
        if last == LAST {
            self.over = Some("the stream has used its last id, so no record can follow: use a new log");
        }
        self.next = last.successor();
        Ok(())
    }

    /// Removes up to `max` records and about a megabyte from those that are ready.
    fn hand_out(&mut self, max: usize) -> Vec<Record> {
        let mut budget = FetchBudget::new();
        let fits = |record: &&Record| budget.admits(record.size());
        let count = self.ready.iter().take(max).take_while(fits).count();
        match count == self.ready.len() {
            true => std::mem::take(&mut self.ready).into(),
            false => self.ready.drain(..count).collect(),
        }
    }

    fn failed(&self, error: RedisError) -> Error {
        read_failed(self.log.on("read"), error)
    }
}

#[async_trait]
impl LogReader for RedisReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        let max = max.max(1);
        while self.ready.is_empty() {
            if let Some(why) = self.over {
                return Err(Error::failed(self.log.on("read"), why));
            }
            // Only the runtime that sent a request gets its reply.
            self.request.take_if(|request| request.runtime != this_runtime());
            let was_sent = self.request.is_some();
            if !was_sent {
                self.connect().await?;
                self.request = Some(self.request(max));
            }
            let Some(request) = &mut self.request else { continue };
            let answer = request.answer().await;
            self.request = None;
            let received = match answer {
                // The request was lost while the reader was idle. A blocking read is different: the
                // server may have ended it because it became a replica, so the session must end.
                Err(_) if was_sent && !self.at_end && self.connection.has_ended() => continue,
                Err(error) => Err(self.failed(error)),
                Ok(replies) => {
                    self.connection.touch();
                    self.receive(replies)
                }
            };
            if let Err(error) = received {
                self.over = Some("the reader has already failed; open a new one");
                self.ready.clear();
                return Err(error);
            }
        }
        // The server fetches the next records while these are handled.
        let is_connected = !self.connection.has_ended() && self.connection.is_driven_here();
        if !self.at_end && self.request.is_none() && self.over.is_none() && is_connected {
            let request = self.request(max);
            self.request.insert(request).send().await;
        }
        Ok(self.hand_out(max))
    }
}

/// A run of a server process, and the replication history of its data.
#[derive(PartialEq, Eq)]
struct Origin {
    run: String,
    history: String,
}

impl Origin {
    /// Parses the reply to `INFO`.
    fn parse(info: &str) -> Option<Self> {
        let field = |name: &str| {
            let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.map(|value| value.trim().to_owned())
        };
        Some(Self {
            run: field("run_id")?,
            history: field("master_replid")?,
        })
    }
}

/// A connection that waits longer for replies, since the server holds them back; and its origin, if
/// the user may ask for it.
async fn connect(log: &Stream) -> Result<(Connection, Option<Origin>), Error> {
    let server = &log.link.server;
    let mut connection = server.open(&log.key).await?;
    let info: RedisResult<String> = redis::cmd("INFO").query_async(&mut connection.inner).await;
    let origin = match info {
        Ok(info) => Origin::parse(&info),
        Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => None,
        Err(error) => return Err(read_failed(log.on("read"), error)),
    };
    connection
        .inner
        .set_response_timeout(server.options.timeout.saturating_add(BLOCK));
    Ok((connection, origin))
}

const LAST: Offset = Offset::new(u64::MAX, u64::MAX);

/// A stream id as text. Unlike an offset, it always has both numbers.
pub(super) fn id(offset: Offset) -> String {
    format!("{}-{}", offset.hi(), offset.lo())
}

/// The largest id before this one. The smallest id is its own predecessor.
fn before(offset: Offset) -> Offset {
    match (offset.hi(), offset.lo()) {
        (0, 0) => Offset::ZERO,
        (hi, 0) => Offset::new(hi - 1, u64::MAX),
        (hi, lo) => Offset::new(hi, lo - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_before_is_the_one_whose_successor_it_is() {
        for offset in [Offset::new(0, 1), Offset::new(1, 0), Offset::new(7, 3), LAST] {
            assert_eq!(before(offset).successor(), offset);
        }
        assert_eq!(before(Offset::ZERO), Offset::ZERO);
        assert_eq!(id(Offset::new(0, 5)), "0-5");
    }
}
