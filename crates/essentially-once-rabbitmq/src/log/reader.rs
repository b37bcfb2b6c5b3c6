//! Reads a log: fetches messages, and yields their records.

use std::collections::VecDeque;

use async_trait::async_trait;
use essentially_once::{
    Error, Offset, Record,
    backend::{FetchBudget, LogId, LogReader},
};

use crate::connection::{deliveries::Delivered, tail::Tail};

/// Reads a stream. `D` decodes the records of a message.
pub(crate) struct RabbitReader<D> {
    decode: D,
    log: LogId,
    tail: Tail,
    /// The offset of the next record, or a lower one.
    next: Offset,
    messages: VecDeque<Delivered>,
    /// The records of the last decoded message that were not yielded yet.
    records: VecDeque<Record>,
    /// The error that follows those records.
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

    /// The next record of the fetched messages. Messages are decoded one at a time, since packed
    /// ones may be much larger than they look.
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

    /// The tail knows messages only. Names the log and the offset that the caller asked for.
    fn for_log(&self, error: Error) -> Error {
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
            let fetched = self.tail.next(max).await;
            self.messages.extend(fetched.map_err(|error| self.for_log(error))?);
        };
        // Nothing is awaited from here on, so a dropped call has taken nothing.
        let mut budget = FetchBudget::new();
        budget.admits(first.size());
        let mut records = vec![first];
        while records.len() < max
            && let Some(record) = self.take()
        {
            if !budget.admits(record.size()) {
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
