//! Resumes at a position, in a log that may not be the one that was read.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use crate::{ConsumerId, Error, Log, LogReader, Offset, Record, passed::Passed, rt};

/// How long to wait for a record that existed a moment ago.
const COMPARE_LIMIT: Duration = Duration::from_secs(10);

/// Opens a reader at `next`. If the log still holds the record that the position passed last, the
/// reader begins there and compares that record before it yields anything.
pub(super) async fn resume(
    log: &Arc<dyn Log>,
    consumer: &ConsumerId,
    passed: Option<Passed>,
    next: Offset,
) -> Result<Box<dyn LogReader>, Error> {
    let Some(passed) = passed.filter(|passed| passed.offset() < next) else {
        return log.read(next).await;
    };
    let bounds = log.bounds().await?;
    // A read at `next` reports a bad position. A record below the earliest one cannot be compared.
    if next > bounds.end || passed.offset() < bounds.earliest {
        return log.read(next).await;
    }
    let reader = match log.read(passed.offset()).await {
        Ok(reader) => reader,
        Err(Error::Truncated { .. }) => return log.read(next).await,
        Err(error) => return Err(error),
    };
    Ok(Box::new(Resumed {
        log: Arc::clone(log),
        consumer: consumer.clone(),
        reader,
        passed: Some(passed),
        next,
    }))
}

/// Compares the record that the position passed last, without reading on.
pub(super) async fn compare(log: &dyn Log, consumer: &ConsumerId, passed: Option<Passed>) -> Result<(), Error> {
    let Some(passed) = passed else {
        return Ok(());
    };
    // A missing record proves nothing.
    if passed.offset() < log.bounds().await?.earliest || passed.offset() >= log.readable_end().await? {
        return Ok(());
    }
    let first = async { log.read(passed.offset()).await?.next(1).await };
    // If the record is deleted at this moment, the log may never yield another one.
    let first = match rt::within(Some(COMPARE_LIMIT), first).await {
        None | Some(Err(Error::Truncated { .. })) => return Ok(()),
        Some(records) => records?,
    };
    match first.first() {
        Some(first) if first.offset == passed.offset() && !passed.is(first) => Err(Error::LogChanged {
            consumer: consumer.clone(),
            log: log.id().clone(),
            offset: passed.offset(),
        }),
        _ => Ok(()),
    }
}

/// A reader that begins at the last passed record.
struct Resumed {
    log: Arc<dyn Log>,
    consumer: ConsumerId,
    reader: Box<dyn LogReader>,
    /// The record to compare first; `None` once it is compared.
    passed: Option<Passed>,
    next: Offset,
}

impl Resumed {
    /// Checks the passed record and returns the records after it.
    fn compare(&self, passed: Passed, mut records: Vec<Record>) -> Result<Vec<Record>, Error> {
        match records.first() {
            Some(first) if passed.is(first) => drop(records.remove(0)),
            Some(first) if first.offset == passed.offset() => {
                return Err(Error::LogChanged {
                    consumer: self.consumer.clone(),
                    log: self.log.id().clone(),
                    offset: passed.offset(),
                });
            }
            // It was deleted in the meantime, which proves nothing.
            _ => {}
        }
        Ok(records)
    }
}

#[async_trait]
impl LogReader for Resumed {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        loop {
            let Some(passed) = self.passed else {
                return self.reader.next(max).await;
            };
            match self.reader.next(max).await {
                Ok(records) => {
                    // No await follows, so a dropped call loses no record.
                    let records = self.compare(passed, records)?;
                    self.passed = None;
                    if !records.is_empty() {
                        return Ok(records);
                    }
                }
                // Retention removed the record after the bounds were read.
                Err(Error::Truncated { .. }) => {
                    self.reader = self.log.read(self.next).await?;
                    self.passed = None;
                }
                Err(Error::OutOfRange { log, end, .. }) => {
                    let requested = self.next;
                    return Err(Error::OutOfRange { log, requested, end });
                }
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        NewRecord,
        memory::{Memory, MemoryLog},
    };

    async fn log_of(payloads: &[&'static str]) -> MemoryLog {
        let log = Memory::new().log("orders").expect("name");
        let records: Vec<_> = payloads.iter().map(|payload| NewRecord::new(*payload)).collect();
        log.append(&records).await.expect("append");
        log
    }

    async fn passed(log: &MemoryLog, offset: u64) -> Passed {
        let mut reader = log.read(offset.into()).await.expect("read");
        Passed::new(&reader.next(1).await.expect("next")[0])
    }

    async fn first_read(log: &MemoryLog, passed: Passed) -> Result<String, Error> {
        let log: Arc<dyn Log> = Arc::new(log.clone());
        let consumer = ConsumerId::new("shipping")?;
        let mut reader = resume(&log, &consumer, Some(passed), passed.offset().successor()).await?;
        let records = reader.next(10).await?;
        Ok(records
            .iter()
            .map(|record| String::from_utf8_lossy(&record.payload))
            .collect())
    }

    #[tokio::test]
    async fn the_log_that_was_read_goes_on_behind_the_record() {
        let log = log_of(&["a", "b", "c", "d"]).await;
        assert_eq!(
            first_read(&log, passed(&log, 1).await).await.expect("the same log"),
            "cd"
        );
    }

    #[tokio::test]
    async fn another_log_that_has_grown_past_the_position_is_noticed() {
        let (log, other) = (log_of(&["a", "b"]).await, log_of(&["a", "x", "c"]).await);
        let error = first_read(&other, passed(&log, 1).await)
            .await
            .expect_err("another log");
        assert!(
            matches!(error, Error::LogChanged { offset, .. } if offset == 1.into()),
            "{error}"
        );
    }

    #[tokio::test]
    async fn another_log_is_noticed_as_soon_as_it_has_grown_to_the_position() {
        let (log, other) = (log_of(&["a", "b"]).await, log_of(&["a"]).await);
        let passed = passed(&log, 1).await;
        let error = first_read(&other, passed).await.expect_err("shorter");
        assert!(
            matches!(error, Error::OutOfRange { requested, .. } if requested == 2.into()),
            "{error}"
        );
        other.append(&[NewRecord::new("x")]).await.expect("append");
        let error = first_read(&other, passed).await.expect_err("another log");
        assert!(matches!(error, Error::LogChanged { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_record_that_retention_took_cannot_be_compared() {
        let (log, other) = (log_of(&["a", "b"]).await, log_of(&["x", "y", "c"]).await);
        let passed = passed(&log, 1).await;
        other.truncate(2.into());
        assert_eq!(first_read(&other, passed).await.expect("cannot tell"), "c");
    }
}
