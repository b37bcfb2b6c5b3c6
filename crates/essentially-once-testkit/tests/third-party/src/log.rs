use std::{
    sync::{Arc, Mutex},
    time::SystemTime,
};

use essentially_once::{Error, Log, NewRecord, Offset, Record, async_trait, backend::{Bounds, Durability, LogId, LogReader}};
use tokio::sync::watch;

use crate::{lock, volatile};

const FETCH_BYTES: usize = 1024 * 1024;

/// Offsets are indices into the `Vec`.
#[derive(Clone)]
pub struct MineLog {
    id: LogId,
    records: Arc<Mutex<Vec<Record>>>,
    appended: Arc<watch::Sender<()>>,
}

impl MineLog {
    pub(crate) fn new(id: LogId) -> Self {
        Self {
            id,
            records: Arc::default(),
            appended: Arc::default(),
        }
    }

    fn fetch(&self, from: Offset, max: usize) -> Result<Vec<Record>, Error> {
        let records = lock(&self.records);
        let end = Offset::from(records.len() as u64);
        if from > end {
            let log = self.id.clone();
            return Err(Error::OutOfRange {
                log,
                requested: from,
                end,
            });
        }
        let mut bytes = 0;
        let fitting = records[from.lo() as usize..].iter().take(max).take_while(|record| {
            let is_first = bytes == 0;
            bytes += record.size().max(1);
            is_first || bytes <= FETCH_BYTES
        });
        Ok(fitting.cloned().collect())
    }
}

#[async_trait]
impl Log for MineLog {
    fn id(&self) -> &LogId {
        &self.id
    }

    async fn append(&self, new: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let mut records = lock(&self.records);
        for new in new {
            let offset = Offset::from(records.len() as u64);
            let mut record = Record::new(offset, SystemTime::now(), new.payload.clone());
            record.key = new.key.clone();
            record.headers = new.headers.clone();
            record.origin = new.origin.clone();
            records.push(record);
        }
        self.appended.send_replace(());
        let last = new.last().and_then(|_| records.last());
        Ok(last.map(|record| record.offset))
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        self.fetch(from, 0)?;
        Ok(Box::new(MineReader {
            log: self.clone(),
            appended: self.appended.subscribe(),
            next: from,
        }))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        let end = lock(&self.records).len() as u64;
        Ok(Bounds {
            earliest: Offset::ZERO,
            end: end.into(),
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(volatile())
    }
}

struct MineReader {
    log: MineLog,
    appended: watch::Receiver<()>,
    next: Offset,
}

#[async_trait]
impl LogReader for MineReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        loop {
            // Marked before the check, so that an append between check and wait still wakes this
            // reader.
            self.appended.mark_unchanged();
            let found = self.log.fetch(self.next, max)?;
            if let Some(last) = found.last() {
                self.next = last.offset.successor();
                return Ok(found);
            }
            let _ = self.appended.changed().await;
        }
    }
}
