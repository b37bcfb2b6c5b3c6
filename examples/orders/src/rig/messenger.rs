//! A bus that loses replies and alters records.

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    Error, Log, NewRecord, Offset, Record,
    backend::{Bounds, Durability, LogId, LogReader},
};

use super::{Fault, FaultKind, Leash, life::Report};
use crate::order::ORDER_HEADER;

/// A log of the bus. Each fault happens once to an append that holds a record about its order:
/// either all records are stored and the reply is lost, or one of them is altered as well. The
/// sender is left in doubt each time.
pub(crate) struct Messenger<L> {
    log: L,
    faults: Mutex<Vec<Fault>>,
    leash: Leash,
}

impl<L> Messenger<L> {
    pub(crate) fn new(log: L, faults: Vec<Fault>, leash: Leash) -> Self {
        let faults = Mutex::new(faults);
        Self { log, faults, leash }
    }

    /// The first fault for these records, and the record that it is for.
    fn find(&self, records: &[NewRecord]) -> Option<(Fault, usize)> {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let numbers = records.iter().map(order_number);
        let mut numbers = numbers.enumerate().filter_map(|(place, number)| Some((place, number?)));
        numbers.find_map(|(place, number)| {
            let fault = faults.iter().find(|fault| fault.order == number)?;
            Some((*fault, place))
        })
    }

    fn done(&self, done: Fault) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.retain(|fault| *fault != done);
    }
}

#[async_trait]
impl<L: Log> Log for Messenger<L> {
    fn id(&self) -> &LogId {
        self.log.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let Some((fault, place)) = self.find(records) else {
            return self.log.append(records).await;
        };
        let report = match fault.kind {
            FaultKind::LoseReply => {
                self.log.append(records).await?;
                Report::Lost
            }
            FaultKind::Alter => {
                let mut altered = records.to_vec();
                alter(&mut altered[place], fault.order);
                self.log.append(&altered).await?;
                Report::Altered
            }
        };
        self.done(fault);
        let action = || format!("append to log {}", self.log.id());
        self.leash
            .report(report)
            .map_err(|error| Error::failed(action(), error))?;
        Err(Error::indeterminate(action(), "the reply was lost"))
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        self.log.read(from).await
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.log.bounds().await
    }

    async fn readable_end(&self) -> Result<Offset, Error> {
        self.log.readable_end().await
    }

    async fn count_from(&self, from: Offset) -> Result<Option<u64>, Error> {
        self.log.count_from(from).await
    }

    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        self.log.tail(count).await
    }

    fn decode(&self, malformed: &Record) -> Option<Record> {
        self.log.decode(malformed)
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.log.remove_before(offset).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.log.durability().await
    }
}

fn order_number(record: &NewRecord) -> Option<u32> {
    let (_, number) = record.headers.iter().find(|(name, _)| name == ORDER_HEADER)?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// Flips a bit of the payload, the key or a header.
fn alter(record: &mut NewRecord, order: u32) {
    let NewRecord {
        payload, key, headers, ..
    } = record;
    let mut parts: Vec<&mut Bytes> = [payload].into_iter().chain(key.as_mut()).collect();
    parts.extend(headers.iter_mut().map(|(_, value)| value));
    parts.retain(|part| !part.is_empty());
    // A header names the order, so there is always a part.
    let which = order as usize % parts.len();
    let mut bytes = parts[which].to_vec();
    let byte = order as usize % bytes.len();
    bytes[byte] ^= 1;
    *parts[which] = bytes.into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_is_altered_somewhere() {
        let record = NewRecord::new("1,2,x").key("1").header(ORDER_HEADER, "7");
        for order in 0..50 {
            let mut altered = record.clone();
            alter(&mut altered, order);
            assert_ne!(altered, record, "{order}");
        }
        let mut empty = NewRecord::new("").header(ORDER_HEADER, "7");
        alter(&mut empty, 7);
        assert_eq!(empty.headers[0].1, "6");
    }
}
