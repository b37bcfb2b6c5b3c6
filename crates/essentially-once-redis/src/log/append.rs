//! Appends records in chunks.

use std::sync::{Arc, atomic::Ordering};

use essentially_once::{Error, NewRecord, Offset, backend::FetchBudget};
use redis::{Cmd, Pipeline, RedisError, Value};

use crate::{
    connection::Link,
    error::write_failed,
    log::{
        codec::{arguments, encode, parse_id},
        stream::{NOT_UNDERSTOOD, Stream},
    },
};

const APPEND: &str = concat!(include_str!("incarnation.lua"), include_str!("append.lua"));

/// A chunk of records is appended in one step, and the server does nothing else meanwhile. Hence
/// these limits on its records and bytes.
const CHUNK_RECORDS: usize = 1_000;
const CHUNK_BYTES: usize = 1024 * 1024;

/// The overhead of a field or value, in bytes.
const ARGUMENT_BYTES: usize = 32;

/// Lua passes at most 8,000 arguments to a command.
const MAX_HEADERS: usize = 3_000;

impl Stream {
    pub(crate) async fn append(self: &Arc<Self>, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        // Connecting finds out how large a value may be, which the checks below need.
        self.link.connection().await?;
        for record in records {
            check(&self.link, record, || self.on("append to"))?;
        }
        let (mut last, mut appended) = (None, 0);
        while appended < records.len() {
            let rest = &records[appended..];
            let count = chunk(rest);
            let done = self.append_chunk(&rest[..count]).await;
            // After a refusal too: trimming makes room for the next append.
            self.trim_aside();
            match done {
                Ok(offset) => last = Some(offset),
                Err(error) if appended == 0 => return Err(error),
                Err(error) => {
                    let why = format!(
                        "the first {appended} of {} records were appended, then: {error}",
                        records.len()
                    );
                    return Err(Error::indeterminate(self.on("append to"), why));
                }
            }
            appended += count;
        }
        Ok(last)
    }

    /// Appends all records or none.
    pub(crate) async fn append_chunk(&self, records: &[NewRecord]) -> Result<Offset, Error> {
        let action = || self.on("append to");
        let mut pipeline = Pipeline::with_capacity(2);
        pipeline.add_command(self.append_command(records));
        let min_replicas = self.link.server.options.min_replicas;
        if let Some(min) = min_replicas {
            min.wait(&mut pipeline);
        }
        let mut connection = self.link.connection().await?;
        let replies = connection.send_packed_commands(&pipeline, 0, pipeline.len()).await;
        let mut replies = match replies {
            Ok(replies) => replies.into_iter(),
            Err(error) => {
                self.link.check(&error);
                return Err(write_failed(action(), error));
            }
        };
        let largest = || records.iter().map(largest_value).max().unwrap_or(0);
        let last = match replies.next() {
            Some(Value::BulkString(id)) => {
                self.may_create.store(false, Ordering::Relaxed);
                parse_id(&id)
            }
            Some(Value::Nil) => return Err(self.gone("append to")),
            Some(Value::ServerError(error)) => {
                let error = RedisError::from(error);
                self.link.check(&error);
                self.link.learn(&error, largest());
                return Err(match error.code() {
                    Some("PARTIAL") => Error::indeterminate(action(), error),
                    _ => write_failed(action(), error),
                });
            }
            _ => None,
        };
        let last = last.ok_or_else(|| Error::indeterminate(action(), NOT_UNDERSTOOD))?;
        match (min_replicas, replies.next()) {
            (None, _) => Ok(last),
            (Some(min), Some(Value::Int(have))) if have >= min.replicas.into() => Ok(last),
            (Some(min), Some(Value::Int(have))) => Err(Error::indeterminate(
                action(),
                format!(
                    "the master has the records, but only {have} of {} replicas confirmed them within {:?}; a failover may lose them",
                    min.replicas, min.timeout
                ),
            )),
            (Some(_), Some(Value::ServerError(error))) => Err(Error::indeterminate(
                action(),
                format!("the master has the records, but it did not report how many replicas have them: {error}"),
            )),
            (Some(_), _) => Err(Error::indeterminate(action(), NOT_UNDERSTOOD)),
        }
    }

    fn append_command(&self, records: &[NewRecord]) -> Cmd {
        let count = records.iter().map(|record| arguments(record) + 1).sum::<usize>();
        let mut append = Cmd::with_capacity(count + 5, APPEND.len() + records.iter().map(weight).sum::<usize>());
        append.arg("EVAL").arg(APPEND).arg(1).arg(&self.key[..]);
        append.arg(self.id.incarnation().unwrap_or_default());
        append.arg(u8::from(self.may_create.load(Ordering::Relaxed)));
        for record in records {
            append.arg(arguments(record));
            encode(record, |argument| {
                append.arg(argument);
            });
        }
        append
    }
}

/// Refuses a record that no stream can hold.
pub(crate) fn check(link: &Link, record: &NewRecord, action: impl Fn() -> String) -> Result<(), Error> {
    record.check_size(link.server.options.record_limit)?;
    link.check_value(largest_value(record))?;
    match record.headers.len() {
        ..=MAX_HEADERS => Ok(()),
        headers => {
            let why = format!("a record has {headers} headers, and at most {MAX_HEADERS} are possible");
            Err(Error::failed(action(), why))
        }
    }
}

/// The size that a record adds to a request.
pub(crate) fn weight(record: &NewRecord) -> usize {
    record.size() + ARGUMENT_BYTES * arguments(record)
}

/// The size of the largest value in the entry of a record.
pub(crate) fn largest_value(record: &NewRecord) -> usize {
    let headers = record.headers.iter();
    // The field of a header is its name with a prefix of two bytes.
    let headers = headers.flat_map(|(name, value)| [name.len() + 2, value.len()]);
    let key = record.key.as_ref().map_or(0, |key| key.len());
    headers.fold(key.max(record.payload.len()), usize::max)
}

/// The number of records in the next chunk, at least one.
fn chunk(records: &[NewRecord]) -> usize {
    let mut budget = FetchBudget::of(CHUNK_BYTES);
    let fits = |record: &&NewRecord| budget.admits(weight(record));
    records.iter().take(CHUNK_RECORDS).take_while(fits).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_bounded_by_records_and_bytes() {
        let small = vec![NewRecord::new("x"); 2_500];
        assert_eq!(chunk(&small), CHUNK_RECORDS);
        assert_eq!(chunk(&small[..7]), 7);
        let large = vec![NewRecord::new(vec![0; CHUNK_BYTES / 3]); 9];
        assert_eq!(chunk(&large), 2);
        let huge = vec![NewRecord::new(vec![0; 2 * CHUNK_BYTES]); 2];
        assert_eq!(chunk(&huge), 1);
    }
}
