//! Reading a log: messages as they come, records as they are asked for.

use std::collections::VecDeque;

use async_trait::async_trait;
use essentially_once::{
    Error, Offset, Record,
    backend::{LogId, LogReader},
};

use crate::tail::{Delivered, Tail};

/// How many bytes of records, with their headers, one `next` returns at most, unless a single one is larger.
const FETCH_BYTES: usize = 1024 * 1024;

/// Reads a stream whose messages hold records in the way that `D` knows.
pub(crate) struct RabbitReader<D> {
    decode: D,
    log: LogId,
    tail: Tail,
    /// Where the next record stands, or before it.
    next: Offset,
    messages: VecDeque<Delivered>,
    /// What the last decoded message holds and was not yielded yet.
    records: VecDeque<Record>,
    /// What comes after those.
    failed: Option<Error>,
}

impl<D: FnMut(Delivered) -> Result<Vec<Record>, Error> + Send> RabbitReader<D> {
    pub(crate) fn new(log: LogId, tail: Tail, from: Offset, decode: D) -> Self {
        Self {
            decode,
            log,
            tail,
            next: from,
            messages: VecDeque::new(),
            records: VecDeque::new(),
            failed: None,
        }
    }

    /// The next record of those that came. Messages are decoded one by one: packed ones may be much larger than they look.
    fn take(&mut self) -> Option<Record> {
        while self.records.is_empty() && self.failed.is_none() {
            let message = self.messages.pop_front()?;
            let records = (self.decode)(message).unwrap_or_else(|error| {
                self.failed = Some(error);
                vec![]
            });
            // A reader may begin within a message.
            self.records
                .extend(records.into_iter().filter(|record| record.offset >= self.next));
        }
        self.records.pop_front()
    }

    /// The tail knows messages only: what was wanted, and of which log, is known here.
    fn told(&self, error: Error) -> Error {
        let (log, requested) = (self.log.clone(), self.next);
        match error {
            Error::Truncated { earliest, .. } => Error::Truncated {
                log,
                requested,
                earliest,
            },
            Error::OutOfRange { end, .. } => Error::OutOfRange { log, requested, end },
            error => error,
        }
    }
}

#[async_trait]
impl<D: FnMut(Delivered) -> Result<Vec<Record>, Error> + Send> LogReader for RabbitReader<D> {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        let max = max.max(1);
        let first = loop {
            if let Some(record) = self.take() {
                break record;
            }
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            let came = self.tail.next(max).await;
            self.messages.extend(came.map_err(|error| self.told(error))?);
        };
        // From here on nothing is awaited, so a dropped call has taken nothing.
        let mut bytes = first.size();
        let mut records = vec![first];
        while records.len() < max
            && let Some(record) = self.take()
        {
            bytes += record.size();
            if bytes > FETCH_BYTES {
                self.records.push_front(record);
                break;
            }
            records.push(record);
        }
        if let Some(last) = records.last() {
            self.next = last.offset.successor();
        }
        Ok(records)
    }
}
