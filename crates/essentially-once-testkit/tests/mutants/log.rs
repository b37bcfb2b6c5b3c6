//! The model's log: offsets are sparse and begin high, so that no case can rely on counting them.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use essentially_once::{
    Bounds, Durability, Epoch, Error, Log, LogId, LogReader, NewRecord, Offset, Origin, ProducerId, Record, async_trait,
};

use crate::{
    defect::Defect,
    model::{RECORD_LIMIT, Shared, Stage, in_doubt},
    reader::ModelReader,
};

/// How many records the defect that acknowledges too early keeps in memory at most.
const FLUSH_EVERY: usize = 32;

pub(crate) fn origin(producer: &str, sequence: u64) -> Result<Origin, Error> {
    let producer = ProducerId::new(producer)?;
    Ok(Origin::new(producer, Epoch::STABLE, sequence))
}

/// What the backend holds of one log.
pub(crate) struct LogState {
    pub(crate) incarnation: u64,
    pub(crate) entries: Vec<Record>,
    /// A record with an offset before others that are visible: only a defect leaves such a hole.
    hole: Option<Record>,
    /// How many of the last entries a restart loses: none, without a defect.
    volatile: usize,
    /// Counts all records ever written.
    written: u64,
    earliest: Offset,
    end: Offset,
}

impl LogState {
    pub(crate) fn new(incarnation: u64) -> Self {
        Self {
            incarnation,
            entries: Vec::new(),
            hole: None,
            volatile: 0,
            written: 0,
            earliest: Offset::ZERO,
            end: Offset::ZERO,
        }
    }

    /// The index of the first entry that is not before `offset`.
    pub(crate) fn index(&self, offset: Offset) -> usize {
        self.entries.partition_point(|record| record.offset < offset)
    }

    /// Writes one record at the end, durably, and returns its offset.
    pub(crate) fn write(&mut self, shared: &Shared, mut record: Record) -> Offset {
        self.written += 1;
        let offset = Offset::new(7, 3 * self.written);
        record.offset = offset;
        self.end = offset.successor();
        if shared.is(Defect::HoleFillsInLater) && self.written % 10 == 5 {
            self.fill_hole();
            self.hole = Some(record);
        } else {
            self.entries.push(record);
        }
        if shared.is(Defect::AppendAcknowledgedBeforeDurable) {
            self.volatile = (self.volatile + 1) % FLUSH_EVERY;
        }
        shared.changes.send_replace(());
        offset
    }

    fn fill_hole(&mut self) {
        if let Some(record) = self.hole.take() {
            self.entries.insert(self.index(record.offset), record);
        }
    }

    /// A reader has gone past `offset`: the latest moment for a hole before it to fill in.
    pub(crate) fn passed(&mut self, offset: Offset) {
        if self.hole.as_ref().is_some_and(|hole| hole.offset < offset) {
            self.fill_hole();
        }
    }

    pub(crate) fn restart(&mut self, shared: &Shared) {
        self.entries.truncate(self.entries.len() - self.volatile);
        self.volatile = 0;
        if let Some(last) = self.entries.last() {
            self.end = last.offset.successor();
        } else {
            self.end = self.earliest;
        }
        if shared.is(Defect::RestartReplaysTheTail)
            && let Some(last) = self.entries.last().cloned()
        {
            self.write(shared, last);
        }
    }

    pub(crate) fn truncate(&mut self, shared: &Shared, before: Offset) {
        let mut removed = self.index(before);
        if shared.is(Defect::RetentionRemovesTooMuch) {
            removed += 1;
        }
        if let Some(last) = self.entries.drain(..removed).next_back() {
            self.earliest = last.offset.successor();
        }
        if shared.is(Defect::RetentionLosesAppendTimes) {
            for record in &mut self.entries {
                record.appended_at = UNIX_EPOCH;
            }
        }
    }

    /// Why nothing can be read from there, if so.
    pub(crate) fn check(&self, shared: &Shared, log: &LogId, requested: Offset) -> Result<(), Error> {
        let (log, earliest, end) = (log.clone(), self.earliest, self.end);
        if requested < earliest {
            return match shared.defect {
                Defect::TruncatedTellsNoEarliest => Err(Error::Truncated {
                    log,
                    requested,
                    earliest: requested,
                }),
                Defect::TruncatedToldAsFailure => Err(Error::failed("read", "it is gone")),
                Defect::TruncationSilent | Defect::TruncationWaits => Ok(()),
                _ => Err(Error::Truncated {
                    log,
                    requested,
                    earliest,
                }),
            };
        }
        let is_past = match shared.defect {
            Defect::OffsetsComparedByLowPart => requested.lo() > end.lo(),
            Defect::EndCheckedLoosely => requested > end.successor(),
            _ => requested > end,
        };
        if is_past {
            return match shared.defect {
                Defect::OldOffsetTruncatedInNewLog => Err(Error::Truncated {
                    log,
                    requested,
                    earliest,
                }),
                Defect::PastEndToldAsFailure => Err(Error::failed("read", "no such record")),
                Defect::PastEndWaits | Defect::PastEndReadsTheLast | Defect::OldOffsetWaitsInNewLog => Ok(()),
                _ => Err(Error::OutOfRange { log, requested, end }),
            };
        }
        Ok(())
    }

    /// Where a reader that is opened at `from` begins.
    fn start(&self, shared: &Shared, from: Offset) -> Offset {
        let index = self.index(from);
        let is_exact = self.entries.get(index).is_some_and(|record| record.offset == from);
        let before = || index.checked_sub(1).map_or(from, |index| self.entries[index].offset);
        match shared.defect {
            Defect::ReaderStartsOneLate if is_exact => from.successor(),
            Defect::ReaderStartsOneEarly if is_exact => before(),
            Defect::ReaderStartsBeforeABetween if !is_exact => before(),
            Defect::PastEndReadsTheLast if from > self.end => before(),
            Defect::TruncationSilent => from.max(self.earliest),
            Defect::TruncationWaits if from < self.earliest => self.end,
            _ => from,
        }
    }
}

/// A handle of the log, as one process would have it.
pub(crate) struct ModelLog {
    pub(crate) shared: Arc<Shared>,
    pub(crate) id: LogId,
    pub(crate) key: String,
    pub(crate) incarnation: u64,
    pub(crate) generation: u64,
    /// What a defect keeps back from one append to the next.
    kept_back: Mutex<Vec<NewRecord>>,
    /// The place that a defect has all readers of the handle share.
    pub(crate) cursor: Arc<Mutex<Offset>>,
}

impl ModelLog {
    pub(crate) fn new(shared: Arc<Shared>, id: LogId, key: &str, incarnation: u64, generation: u64) -> Self {
        Self {
            shared,
            id,
            key: key.to_owned(),
            incarnation,
            generation,
            kept_back: Mutex::default(),
            cursor: Arc::default(),
        }
    }

    /// Runs `work` on the log, if handle, log and connection are still there.
    fn with<T>(&self, work: impl FnOnce(&mut LogState) -> Result<T, Error>) -> Result<T, Error> {
        self.with_connection(self.generation, work)
    }

    fn with_connection<T>(
        &self,
        generation: u64,
        work: impl FnOnce(&mut LogState) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut state = self.shared.connected(generation)?;
        match state.logs.get_mut(&self.key) {
            Some(log) if log.incarnation == self.incarnation => work(log),
            _ => Err(Error::failed(format!("use log {}", self.id), "it was deleted")),
        }
    }

    fn check_sizes(&self, new: &[NewRecord]) -> Result<(), Error> {
        for record in new {
            let mut measured = record.clone();
            match self.shared.defect {
                Defect::NoRecordLimit => measured = NewRecord::default(),
                Defect::KeyNotMeasured => measured.key = None,
                Defect::HeadersNotMeasured => measured.headers.clear(),
                Defect::LimitIsExclusive => measured = measured.header("x", ""),
                _ => {}
            }
            measured.check_size(RECORD_LIMIT).map_err(|error| match error {
                _ if self.shared.is(Defect::RefusalNamesNoLimit) => Error::failed("append", error),
                error => error,
            })?;
        }
        Ok(())
    }

    fn entry(&self, new: &NewRecord) -> Record {
        let mut record = Record::new(Offset::ZERO, SystemTime::now(), new.payload.clone());
        record.key.clone_from(&new.key);
        record.headers.clone_from(&new.headers);
        record.origin.clone_from(&new.origin);
        record
    }

    /// The batch as it goes out, with what a defect makes of it.
    fn outgoing(&self, new: &[NewRecord]) -> Vec<NewRecord> {
        let mut outgoing = new.to_vec();
        let mut kept_back = self.kept_back.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shared.is(Defect::BatchWrittenBackwards) {
            outgoing.reverse();
        } else if self.shared.is(Defect::RefusedBatchStaysBuffered) {
            outgoing.splice(0..0, kept_back.drain(..));
        } else if self.shared.is(Defect::LaterBatchOvertakes) && kept_back.is_empty() {
            kept_back.append(&mut outgoing);
        } else if self.shared.is(Defect::LaterBatchOvertakes) {
            outgoing.append(&mut kept_back);
        }
        outgoing
    }
}

#[async_trait]
impl Log for ModelLog {
    fn id(&self) -> &LogId {
        &self.id
    }

    async fn append(&self, new: &[NewRecord]) -> Result<Option<Offset>, Error> {
        if let Err(error) = self.check_sizes(new) {
            if self.shared.is(Defect::PrefixAppendedBeforeRefusal) {
                self.with(|log| Ok(log.write(&self.shared, self.entry(&new[0]))))?;
            }
            if self.shared.is(Defect::RefusedBatchStaysBuffered) {
                let mut kept_back = self.kept_back.lock().unwrap_or_else(PoisonError::into_inner);
                kept_back.push(new[0].clone());
            }
            return Err(error);
        }
        if new.is_empty() {
            return self.with(|log| match self.shared.defect {
                Defect::EmptyAppendTellsTheEnd => Ok(Some(log.end)),
                Defect::EmptyAppendAddsARecord => {
                    log.write(&self.shared, self.entry(&NewRecord::default()));
                    Ok(None)
                }
                _ => Ok(None),
            });
        }
        self.shared.travel(self.generation, Stage::Request).await?;
        let (mut first, mut last, mut generation) = (None, None, self.generation);
        for new in self.outgoing(new) {
            match self.with_connection(generation, |log| Ok(log.write(&self.shared, self.entry(&new)))) {
                Ok(offset) => {
                    first = first.or(Some(offset));
                    last = Some(offset);
                }
                Err(error) if first.is_none() => return Err(error),
                Err(_) if self.shared.is(Defect::ReconnectTearsBatch) => generation = self.shared.state().generation,
                Err(error) => return Err(in_doubt(error)),
            }
            let is_first = first == last;
            self.shared
                .pause(if is_first { Stage::Begun } else { Stage::Halfway })
                .await;
        }
        match self.shared.travel(self.generation, Stage::Reply).await {
            Err(error) if self.shared.is(Defect::LostAppendReplyToldAsFailure) => Err(error),
            Err(error) => Err(in_doubt(error)),
            Ok(()) if self.shared.is(Defect::AppendTellsTheFirst) => Ok(first),
            Ok(()) => Ok(last),
        }
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let (start, is_new) = self.with(|log| {
            log.check(&self.shared, &self.id, from)?;
            Ok((log.start(&self.shared, from), log.entries.is_empty()))
        })?;
        *self.cursor.lock().unwrap_or_else(PoisonError::into_inner) = start;
        Ok(Box::new(ModelReader::new(self, start, is_new)))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.with(|log| {
            let (mut earliest, mut end) = (log.earliest, log.end);
            match (log.entries.first(), log.entries.last()) {
                (None, _) if self.shared.is(Defect::EmptyLogHasAnEnd) => end = end.successor(),
                (Some(first), _) if self.shared.is(Defect::EarliestIsBehindTheFirst) => {
                    earliest = first.offset.successor();
                }
                (Some(_), _) if self.shared.is(Defect::BoundsIgnoreRetention) => earliest = Offset::ZERO,
                (_, Some(last)) if self.shared.is(Defect::EndIsTheLastRecord) => end = last.offset,
                _ => {}
            }
            Ok(Bounds { earliest, end })
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.shared.durability([
            Defect::LogDurabilityFails,
            Defect::LogDurabilityWavers,
            Defect::LogVolatileWithoutReason,
        ])
    }
}
