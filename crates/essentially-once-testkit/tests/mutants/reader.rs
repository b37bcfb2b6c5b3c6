//! The model's reader. Defects change the records that pass through it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use essentially_once::{
    Epoch, Error, Offset, Origin, Record, async_trait,
    backend::{LogId, LogReader},
};
use tokio::{
    sync::watch,
    task::yield_now,
    time::{sleep, timeout},
};

use crate::{defect::Defect, log::ModelLog, model::Shared};

/// Longer than most cancelled calls of a case live, so that the cancellation falls after the reader
/// has moved.
const STEPS_AFTER_MOVING: usize = 20;
/// About how many bytes of records one call of `next` returns at most.
const FETCH_BYTES: usize = 1024 * 1024;
/// How often a reader polls if nothing wakes it.
const POLL: Duration = Duration::from_millis(1);

pub(crate) struct ModelReader {
    shared: Arc<Shared>,
    id: LogId,
    key: String,
    incarnation: u64,
    generation: u64,
    changes: watch::Receiver<()>,
    next: Offset,
    cursor: Arc<Mutex<Offset>>,
    /// Whether it was opened while the log was empty.
    was_first: bool,
    calls: u64,
    waited: bool,
    fetched: Option<Vec<Record>>,
    /// The average record size of the last call.
    average: Option<usize>,
}

impl ModelReader {
    pub(crate) fn new(log: &ModelLog, next: Offset, was_first: bool) -> Self {
        Self {
            shared: Arc::clone(&log.shared),
            id: log.id.clone(),
            key: log.key.clone(),
            incarnation: log.incarnation,
            generation: log.generation,
            changes: log.shared.changes.subscribe(),
            next,
            cursor: Arc::clone(&log.cursor),
            was_first,
            calls: 0,
            waited: false,
            fetched: None,
            average: None,
        }
    }

    fn place(&self) -> Offset {
        match self.shared.defect {
            Defect::ReadersShareACursor => *self.cursor.lock().unwrap_or_else(PoisonError::into_inner),
            Defect::WokenReaderStartsOver if self.waited => Offset::ZERO,
            _ => self.next,
        }
    }

    /// Reads the records from the reader's place on, without moving the reader.
    fn fetch(&self, max: usize) -> Result<Vec<Record>, Error> {
        let mut state = self.shared.connected(self.generation)?;
        let next = self.place();
        let log = match state.logs.get_mut(&self.key) {
            Some(log) if log.incarnation == self.incarnation => log,
            _ => return self.log_is_gone(next),
        };
        let checked = log.check(&self.shared, &self.id, next);
        match (checked, self.shared.defect) {
            (Err(Error::Truncated { .. }), Defect::OvertakenReaderMovesOn) => {}
            (Err(Error::Truncated { .. }), Defect::OvertakenReaderWaits) => return Ok(Vec::new()),
            (Err(Error::Truncated { .. }), Defect::OvertakenReaderFailsVaguely) => {
                return Err(Error::failed("read", "no such record"));
            }
            (checked, _) => checked?,
        }
        let rest = &log.entries[log.index(next)..];
        if self.shared.is(Defect::FirstReaderSwapsTwo) && self.was_first && self.calls == 0 && rest.len() < 2 {
            return Ok(Vec::new());
        }
        let max = match self.shared.defect {
            Defect::NextIgnoresMax => max + 1,
            Defect::MaxOverflows => max.wrapping_add(1).saturating_sub(1),
            Defect::LargeMaxRefused if u32::try_from(max).is_err() => {
                return Err(Error::failed("read", "the number of records is out of range"));
            }
            Defect::FetchesOneByOne => 1,
            _ => max,
        };
        let found = rest[..self.fitting(&rest[..max.min(rest.len())])].to_vec();
        if self.shared.is(Defect::MalformedBlocks) && found.iter().any(|record| record.malformed.is_some()) {
            return Err(Error::failed("read", "an entry cannot be decoded"));
        }
        if let Some(last) = found.last() {
            log.passed(last.offset);
        }
        Ok(found)
    }

    /// How many of the records fit into one call. At least one.
    fn fitting(&self, records: &[Record]) -> usize {
        if matches!(
            self.shared.defect,
            Defect::NextIgnoresBytes | Defect::NextSkipsWhatItCutsOff
        ) {
            return records.len();
        }
        let size = match self.shared.defect {
            Defect::FetchSizedByTheFirst => records.first().map(Record::size),
            Defect::FetchSizedByTheCallBefore => self.average,
            _ => None,
        };
        match size {
            Some(size) => (FETCH_BYTES / size.max(1))
                .clamp(1, records.len().max(1))
                .min(records.len()),
            None if self.shared.is(Defect::FetchIgnoresHeaders) => fitting(records, |record| record.payload.len()),
            None => fitting(records, Record::size),
        }
    }

    fn log_is_gone(&self, requested: Offset) -> Result<Vec<Record>, Error> {
        match self.shared.defect {
            Defect::ReaderMissesRecreation => Ok(Vec::new()),
            _ => Err(Error::OutOfRange {
                log: self.id.clone(),
                requested,
                end: Offset::ZERO,
            }),
        }
    }

    /// Moves past the found records, and returns them.
    fn moved(&mut self, mut found: Vec<Record>) -> Vec<Record> {
        if let Some(last) = found.last() {
            self.next = match self.shared.defect {
                Defect::NextRepeatsTheBoundary => last.offset,
                _ => last.offset.successor(),
            };
            *self.cursor.lock().unwrap_or_else(PoisonError::into_inner) = self.next;
        }
        if self.shared.is(Defect::NextSkipsWhatItCutsOff) {
            found.truncate(fitting(&found, Record::size));
        }
        if self.shared.is(Defect::FirstReaderSwapsTwo) && self.was_first && self.calls == 0 && found.len() > 1 {
            found.swap(0, 1);
        }
        self.calls += 1;
        self.waited = false;
        self.average = Some(found.iter().map(Record::size).sum::<usize>() / found.len().max(1));
        for record in &mut found {
            distort(self.shared.defect, record);
        }
        found
    }

    /// What a call without records returns immediately, if a defect keeps it from waiting.
    fn instead_of_waiting(&self) -> Option<Vec<Record>> {
        let is_gone = || {
            let state = self.shared.state();
            state
                .logs
                .get(&self.key)
                .is_none_or(|log| log.incarnation != self.incarnation)
        };
        (self.shared.is(Defect::OldReaderEndsQuietly) && is_gone()).then(Vec::new)
    }
}

#[async_trait]
impl LogReader for ModelReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        if self.shared.is(Defect::NextReturnsNothing) && self.calls == 0 {
            self.calls += 1;
            return Ok(Vec::new());
        }
        if let Some(fetched) = self.fetched.take() {
            return Ok(fetched);
        }
        loop {
            yield_now().await;
            // Marked before the check, so that a change between check and wait still wakes this
            // reader.
            self.changes.mark_unchanged();
            let found = match self.instead_of_waiting() {
                Some(nothing) => return Ok(nothing),
                None => self.fetch(max)?,
            };
            if found.is_empty() && self.shared.is(Defect::WaitingReaderIsNotWoken) {
                std::future::pending::<()>().await;
            }
            if !found.is_empty() {
                match self.shared.defect {
                    Defect::CancelledNextLoses => {
                        let found = self.moved(found);
                        steps().await;
                        return Ok(found);
                    }
                    Defect::CancelledNextRepeats => {
                        self.fetched = Some(found.clone());
                        steps().await;
                        self.fetched = None;
                    }
                    _ => {}
                }
                return Ok(self.moved(found));
            }
            self.waited = true;
            match self.shared.defect {
                Defect::PollsForRecords => {
                    sleep(POLL).await;
                    continue;
                }
                Defect::WakeUpLostBeforeWaiting => {
                    // Long enough that an append falls into it on any machine.
                    let _ = timeout(20 * POLL, self.changes.changed()).await;
                    self.changes.mark_unchanged();
                }
                _ => {}
            }
            // This reader shares ownership of the sender, so the channel stays open.
            let _ = self.changes.changed().await;
        }
    }
}

/// How many of the records fit into a megabyte. A larger one is returned alone.
fn fitting(records: &[Record], size: impl Fn(&Record) -> usize) -> usize {
    let mut bytes = 0;
    let over = records.iter().position(|record| {
        bytes += size(record);
        bytes > FETCH_BYTES
    });
    over.map_or(records.len(), |over| over.max(1))
}

async fn steps() {
    for _ in 0..STEPS_AFTER_MOVING {
        yield_now().await;
    }
}

/// Changes a record between the log and the reader's caller, as a defect does.
fn distort(defect: Defect, record: &mut Record) {
    match defect {
        Defect::OffsetsEqualInPairs => {
            let lo = record.offset.lo();
            record.offset = Offset::new(record.offset.hi(), lo - lo % 6);
        }
        Defect::EmptyKeyReadAsNone => record.key = record.key.take().filter(|key| !key.is_empty()),
        Defect::HeadersSorted => record.headers.sort(),
        Defect::RepeatedHeadersLost => record.headers.dedup_by_key(|(name, _)| name.len()),
        Defect::HeaderNamesReadAsAscii => {
            for (name, _) in &mut record.headers {
                *name = name.replace(|c: char| !c.is_ascii(), "?");
            }
        }
        Defect::PayloadReadAsText => {
            record.payload = Bytes::from(String::from_utf8_lossy(&record.payload).into_owned());
        }
        Defect::PayloadPadded => {
            let mut padded = record.payload.to_vec();
            padded.push(0);
            record.payload = padded.into();
        }
        Defect::OriginLost => record.origin = None,
        Defect::EpochLost => {
            if let Some(origin) = &mut record.origin {
                let producer = origin.numbering.producer().clone();
                *origin = Origin::new(producer, Epoch::STABLE, origin.sequence);
            }
        }
        Defect::OriginDrawnByTheReader => {
            if let Some(origin) = &mut record.origin {
                let producer = origin.numbering.producer().clone();
                *origin = Origin::new(producer, Epoch::fresh(), origin.sequence);
            }
        }
        Defect::SequenceReadAsSigned => {
            if let Some(origin) = &mut record.origin {
                origin.sequence = origin.sequence.min(i64::MAX as u64);
            }
        }
        Defect::EmptyPayloadCalledMalformed if record.payload.is_empty() => {
            record.malformed = Some("no payload".into());
        }
        Defect::MalformedBytesLost if record.malformed.is_some() => record.payload.clear(),
        Defect::AppendTimeLost => record.appended_at = UNIX_EPOCH,
        Defect::AppendTimeOfTheRead => record.appended_at = SystemTime::now(),
        Defect::HeadersOver255Lost => record.headers.truncate(255),
        Defect::HeaderValuesCut => {
            for (_, value) in &mut record.headers {
                value.truncate(65_535);
            }
        }
        _ => {}
    }
}
